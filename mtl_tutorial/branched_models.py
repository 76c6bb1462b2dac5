"""Networks in which tasks share otherwise than through one trunk: MTAN, cross-stitch, MMoE.

Every task has a representation of its own, so there is no single z: gradient balancing works on the
parameters alone, and `features` says so. Shared is what at least two tasks' losses depend on;
everything else counts to the head of its task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hard_models import (
    SEGNET_WIDTHS,
    Enlarged,
    Multiples,
    SegNetTrunk,
    conv_block,
    map_head,
    xavier,
)


class Branched(nn.Module):
    """Base of networks with a representation per task.

    A subclass writes `forward` and `own_modules`.
    """

    def forward(self, x: Tensor) -> list[Tensor]:
        """Outputs of all tasks."""
        raise NotImplementedError

    def own_modules(self) -> list[list[nn.Module]]:
        """Per task, the modules that no other task's loss depends on."""
        raise NotImplementedError

    def features(self, x: Tensor) -> NoReturn:
        """Not defined: raises TypeError."""
        raise TypeError(
            f"{type(self).__name__}: expected a network with one shared representation for the "
            "feature level, got one with a representation per task; use the parameter level"
        )

    def outputs(self, z: Tensor, tasks: Sequence[int] | None = None) -> NoReturn:
        """Not defined: raises TypeError."""
        self.features(z)

    def head_parameters(self) -> list[list[nn.Parameter]]:
        return [[p for m in modules for p in m.parameters()] for modules in self.own_modules()]

    def shared_parameters(self) -> list[nn.Parameter]:
        own = {id(p) for head in self.head_parameters() for p in head}
        return [p for p in self.parameters() if id(p) not in own]


# ------------------------------------------------------------------------------- MTAN


def attention(c_in: int, c_out: int) -> nn.Sequential:
    """Two 1x1 convolutions with batch norm, ReLU between them, sigmoid behind: a mask in (0, 1)."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 1),
        nn.BatchNorm2d(c_out),
        nn.Sigmoid(),
    )


class MTAN(Branched):
    """Multi-task attention network on SegNet.

    Liu, Johns, Davison: "End-to-End Multi-Task Learning with Attention", CVPR 2019,
    arXiv:1803.10704; official code lorenmt/mtan.

    At each of SegNet's ten stages a task multiplies the stage's output by a mask. The mask is
    computed from the stage's entry beside what the task brings from the stage before, which a
    convolution that all tasks share has carried to the new size.

    Shared: SegNet and those convolutions. A task's own: its masks and its prediction layers. The
    code of Nash-MTL counts the masks as shared as well: each task's own gradient then enters its
    norm, while the products between tasks are the same. With NYUv2's three tasks the network has
    1.77 times SegNet's parameters.

    Args:
        n_outputs: channels of each task's map.
        c_in: channels of the image.
        widths: channels of SegNet's five stages.
    """

    def __init__(
        self, n_outputs: Sequence[int], c_in: int = 3, widths: Sequence[int] = SEGNET_WIDTHS
    ) -> None:
        super().__init__()
        self.trunk = SegNetTrunk(c_in, widths)
        n, above = len(widths), (widths[0], *widths[:-1])
        following = (*widths[1:], widths[-1])
        self.carry_down = nn.ModuleList(map(conv_block, widths, following))
        self.carry_up = nn.ModuleList(map(conv_block, widths, above))
        self.masks_down = nn.ModuleList()
        self.masks_up = nn.ModuleList()
        for _ in n_outputs:
            down = [attention(w if j == 0 else 2 * w, w) for j, w in enumerate(widths)]
            up = [attention(widths[j] + above[j], above[j]) for j in range(n)]
            self.masks_down.append(nn.ModuleList(down))
            self.masks_up.append(nn.ModuleList(up))
        self.heads = nn.ModuleList(map_head(widths[0], c) for c in n_outputs)
        xavier(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        down, up = self.trunk.stages(x)
        return [
            head(self._attend(masks_down, masks_up, down, up))
            for masks_down, masks_up, head in zip(
                self.masks_down, self.masks_up, self.heads, strict=True
            )
        ]

    def _attend(
        self,
        masks_down: nn.Module,
        masks_up: nn.Module,
        down: list[tuple[Tensor, Tensor]],
        up: list[tuple[Tensor, Tensor]],
    ) -> Tensor:
        """One task's way through the masks to its full-size representation."""
        brought: Tensor | None = None
        for mask, carry, (entry, whole) in zip(masks_down, self.carry_down, down, strict=True):  # type: ignore[call-overload]
            seen = entry if brought is None else torch.cat([entry, brought], 1)
            brought = F.max_pool2d(carry(mask(seen) * whole), 2)
        assert brought is not None
        for j in reversed(range(len(up))):
            spread, whole = up[j]
            brought = F.interpolate(
                brought, size=whole.shape[-2:], mode="bilinear", align_corners=True
            )
            brought = self.carry_up[j](brought)
            brought = masks_up[j](torch.cat([spread, brought], 1)) * whole  # type: ignore[index]
        return brought

    def own_modules(self) -> list[list[nn.Module]]:
        return [list(own) for own in zip(self.masks_down, self.masks_up, self.heads, strict=True)]


# ------------------------------------------------------------------------------- cross-stitch


class CrossStitch(Branched):
    """K networks of equal stages whose outputs are mixed after each stage.

    Misra, Shrivastava, Gupta, Hebert: "Cross-Stitch Networks for Multi-Task Learning", CVPR 2016,
    arXiv:1604.03539. After stage s, channel c of network k becomes

        sum_j  a[s, k, j, c]  x_j[c],

    with learnt a that starts at `own` for j = k and divides the rest among the others. Nothing is
    mixed after the last stage.

    Shared: all stages but the last, and the mixing weights. A task's own: its last stage and head.

    Args:
        networks: K networks, each a sequence of stages.
        heads: output of a network's last stage to the task's output.
        channels: channels of each stage but the last.
        own: weight of a network's own channel at the start.
    """

    def __init__(
        self,
        networks: Sequence[Sequence[nn.Module]],
        heads: Sequence[nn.Module],
        channels: Sequence[int],
        own: float = 0.9,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.Sequential(*stages) for stages in networks)
        self.heads = nn.ModuleList(heads)
        k = len(networks)
        others = (1 - own) / (k - 1) if k > 1 else 0.0
        start = torch.eye(k) * (own - others) + others
        self.units = nn.ParameterList(
            nn.Parameter(start[..., None].repeat(1, 1, c)) for c in channels
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        found = [x] * len(self.networks)
        for s, stages in enumerate(zip(*self.networks, strict=True)):
            found = [stage(z) for stage, z in zip(stages, found, strict=True)]
            if s < len(self.units):
                mixed = torch.einsum("kjc,jnc...->knc...", self.units[s], torch.stack(found))
                found = list(mixed.unbind())
        return [head(z) for head, z in zip(self.heads, found, strict=True)]

    def own_modules(self) -> list[list[nn.Module]]:
        last = [list(net.children())[-1] for net in self.networks]
        return [list(own) for own in zip(last, self.heads, strict=True)]


# ------------------------------------------------------------------------------- MMoE


class MMoE(Branched):
    """Experts that all tasks share, and a gate per task that mixes their outputs.

    Ma, Zhao, Yi, Chen, Hong, Chi: "Modeling Task Relationships in Multi-Task Learning with
    Multi-Gate Mixture-of-Experts", KDD 2018. Task k's representation is

        z_k = sum_e  softmax(W_k g)_e  expert_e(x).

    The paper's gate sees the input, g = x; for images that would be most of the network, so here g
    is the image's mean over a 4x4 grid.

    Shared: the experts. A task's own: its gate and its head.

    Args:
        experts: image to a map, all of one shape.
        heads: z_k to the task's output.
        c_in: channels of the image.
    """

    def __init__(
        self, experts: Sequence[nn.Module], heads: Sequence[nn.Module], c_in: int = 3
    ) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.heads = nn.ModuleList(heads)
        self.seen = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.gates = nn.ModuleList(nn.Linear(16 * c_in, len(experts)) for _ in heads)

    def shares(self, x: Tensor) -> list[Tensor]:
        """Share of each expert (N, E) in each task; sums to one over the experts."""
        seen = self.seen(x)
        return [gate(seen).softmax(1) for gate in self.gates]

    def forward(self, x: Tensor) -> list[Tensor]:
        found = torch.stack([expert(x) for expert in self.experts])
        # Task by task: in one tensor, every loss would depend on every gate.
        mixed = [torch.einsum("ne,en...->n...", s.to(found.dtype), found) for s in self.shares(x)]
        return [head(z) for head, z in zip(self.heads, mixed, strict=True)]

    def own_modules(self) -> list[list[nn.Module]]:
        return [list(own) for own in zip(self.gates, self.heads, strict=True)]


# ------------------------------------------------------------------------------- small ones


def small_stages(c_in: int = 3, width: int = 16) -> list[nn.Module]:
    """Three stages of a small dense network: 4 x `width` channels at a quarter of the sides."""
    w = width
    return [
        nn.Sequential(Multiples(4), conv_block(c_in, w, stride=2)),
        nn.Sequential(conv_block(w, 2 * w, stride=2), conv_block(2 * w, 2 * w)),
        nn.Sequential(conv_block(2 * w, 4 * w), conv_block(4 * w, 4 * w)),
    ]


def small_cross_stitch(n_outputs: Sequence[int], c_in: int = 3, width: int = 16) -> CrossStitch:
    """Cross-stitch on small dense networks, for images whose sides are multiples of 4.

    Args:
        n_outputs: channels of each task's map.
        c_in: channels of the image.
        width: channels of the first stage.
    """
    heads = [Enlarged(map_head(4 * width, c), 4) for c in n_outputs]
    networks = [small_stages(c_in, width) for _ in n_outputs]
    return CrossStitch(networks, heads, [width, 2 * width])


def small_mmoe(n_outputs: Sequence[int], c_in: int = 3, width: int = 16, experts: int = 3) -> MMoE:
    """MMoE on small dense networks, for images whose sides are multiples of 4.

    Args:
        n_outputs: channels of each task's map.
        c_in: channels of the image.
        width: channels of an expert's first stage.
        experts: number of experts.
    """
    heads = [Enlarged(map_head(4 * width, c), 4) for c in n_outputs]
    trunks = [nn.Sequential(*small_stages(c_in, width)) for _ in range(experts)]
    return MMoE(trunks, heads, c_in)
