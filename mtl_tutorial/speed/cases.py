"""Networks to time a step on: a trunk, K heads and one fixed batch of random numbers each.

Two cases stand here to keep the others honest. They were named before any measurement, and no
engine or setting may be tuned on them: ``sq``, convolutional (SqueezeNet 1.1: 1x1 and 3x3
convolutions side by side, activations in place), and ``vit``, attention (a small vision
transformer). Both are torchvision's, so not even their layers are ours.

The cases of `GROWTH` are one MLP at two widths, with 2 to 139 binary heads: how the price of a step
grows with the number of tasks and of parameters.

The learning rate is tiny, so that a case computes the same at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ..models import HardSharing, count_parameters
from ..names import nearest

Loss = Callable[[Tensor, Tensor], Tensor]

LR = 1e-6  # small enough that the losses stand still while steps are timed


@dataclass
class Case:
    """A model, its batch and its losses.

    Attributes:
        name: as in `CASES`.
        title: one line about the model.
        model: trunk and heads.
        batch: input of the trunk.
        targets: one per task.
        loss_functions: one per task, of output and target.
        untuned: whether it is one of the two cases that nothing is tuned on.
    """

    name: str
    title: str
    model: HardSharing
    batch: Tensor
    targets: list[Tensor]
    loss_functions: list[Loss]
    untuned: bool = False
    shared: list[nn.Parameter] = field(init=False)
    heads: list[list[nn.Parameter]] = field(init=False)

    def __post_init__(self) -> None:
        self.shared = self.model.shared_parameters()
        self.heads = self.model.head_parameters()

    @property
    def n_tasks(self) -> int:
        return len(self.targets)

    @property
    def n_shared(self) -> int:
        """P, the number of shared scalars."""
        return count_parameters(self.shared)

    def losses_at(self, z: Tensor) -> list[Tensor]:
        """K scalar losses at a shared representation."""
        outputs = self.model.outputs(z)
        columns = zip(self.loss_functions, outputs, self.targets, strict=True)
        return [loss(output, target) for loss, output, target in columns]

    def losses(self) -> tuple[list[Tensor], Tensor]:
        """K scalar losses, and the shared representation z."""
        z = self.model.features(self.batch)
        return self.losses_at(z), z

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam with its defaults, at a learning rate that changes next to nothing."""
        return torch.optim.Adam(self.model.parameters(), lr=LR)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Case:
        """The case on a device, in a floating-point dtype; the model is moved in place."""
        self.model.to(device=device, dtype=dtype)

        def moved(x: Tensor) -> Tensor:
            return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

        self.batch = moved(self.batch)
        self.targets = [moved(target) for target in self.targets]
        return self


# ------------------------------------------------------------------------------- parts of models


def mlp(inputs: int, width: int, depth: int) -> nn.Module:
    """`depth` linear layers with ReLU."""
    sizes = [inputs] + [width] * depth
    layers = [[nn.Linear(a, b), nn.ReLU()] for a, b in pairwise(sizes)]
    return nn.Sequential(*[layer for pair in layers for layer in pair])


def lenet() -> nn.Module:
    """LeNet for 36 x 36 grey images, 41,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(720, 50),
        nn.ReLU(),
    )


def resnet18(pooled: bool) -> nn.Module:
    """torchvision's ResNet-18 with a 3 x 3 stem for small images; a map, or its mean."""
    net = torchvision.models.resnet18(weights=None)
    stem = nn.Conv2d(3, 64, 3, stride=2, padding=1, bias=False)
    body = [stem, net.bn1, nn.ReLU(), net.layer1, net.layer2, net.layer3, net.layer4]
    return nn.Sequential(*body, *([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if pooled else []))


def dense_head(channels: int) -> nn.Module:
    """A map of 512 channels, 16 times as large and with the given channels."""
    return nn.Sequential(
        nn.Conv2d(512, 128, 3, padding=1),
        nn.ReLU(),
        nn.Upsample(scale_factor=4, mode="bilinear"),
        nn.Conv2d(128, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, channels, 1),
        nn.Upsample(scale_factor=4, mode="bilinear"),
    )


class Attention(nn.Module):
    """Self-attention with four heads, written out in linear layers and products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        parts = self.inputs(x).view(n, tokens, 3, 4, width // 4)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) / (width // 4) ** 0.5
        mixed = scores.softmax(-1) @ value
        return self.output(mixed.transpose(1, 2).reshape(n, tokens, width))


class Residual(nn.Module):
    """``x + f(norm(x))``."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class MeanOfTokens(nn.Module):
    """(n, tokens, width) to (n, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def transformer(width: int = 256, depth: int = 6) -> nn.Module:
    """A pre-norm transformer on tokens of 32 numbers, 4.7 million parameters."""
    blocks: list[nn.Module] = []
    for _ in range(depth):
        wide = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        blocks += [Residual(width, Attention(width)), Residual(width, wide)]
    return nn.Sequential(nn.Linear(32, width), *blocks, nn.LayerNorm(width), MeanOfTokens())


def vision_transformer(width: int = 192) -> nn.Module:
    """torchvision's VisionTransformer on 32 x 32 images, 64 patches, 6 layers."""
    net = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=6,
        num_heads=4,
        hidden_dim=width,
        mlp_dim=2 * width,
    )
    net.heads = nn.Identity()
    return net


def small_head(inputs: int, outputs: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def cosine_loss(output: Tensor, target: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(output, target, dim=1).mean()


def binary_loss(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output.squeeze(1), target)


# ------------------------------------------------------------------------------- the cases


def _classes(
    name: str,
    title: str,
    trunk: nn.Module,
    heads: Sequence[nn.Module],
    x: Tensor,
    n_classes: int,
    untuned: bool = False,
) -> Case:
    targets = [torch.randint(n_classes, (len(x),)) for _ in heads]
    losses: list[Loss] = [F.cross_entropy] * len(heads)
    return Case(name, title, HardSharing(trunk, heads), x, targets, losses, untuned)


def _binary(name: str, title: str, trunk: nn.Module, width: int, x: Tensor, k: int) -> Case:
    heads = [nn.Linear(width, 1) for _ in range(k)]
    targets = [torch.randint(2, (len(x),)).float() for _ in heads]
    return Case(name, title, HardSharing(trunk, heads), x, targets, [binary_loss] * k)


def _a() -> Case:
    heads = [small_head(50, 10, 50) for _ in range(2)]
    x = torch.randn(256, 1, 36, 36)
    return _classes("a", "LeNet, 36 x 36, batch 256", lenet(), heads, x, 10)


def _b() -> Case:
    targets = [
        torch.randint(13, (8, 64, 64)),
        torch.randn(8, 1, 64, 64),
        F.normalize(torch.randn(8, 3, 64, 64), dim=1),
    ]
    return Case(
        "b",
        "ResNet-18, 64 x 64, three dense heads, batch 8",
        HardSharing(resnet18(pooled=False), [dense_head(c) for c in (13, 1, 3)]),
        torch.randn(8, 3, 64, 64),
        targets,
        [F.cross_entropy, F.l1_loss, cosine_loss],
    )


def _c() -> Case:
    title = "MLP 512-1024-1024-1024, binary heads, batch 128"
    return _binary("c", title, mlp(512, 1024, 3), 1024, torch.randn(128, 512), 40)


def _d(name: str, batch: int) -> Case:
    heads = [small_head(1024, 5, 64) for _ in range(10)]
    title = f"MLP 5 x 1024, batch {batch}"
    return _classes(name, title, mlp(1024, 1024, 5), heads, torch.randn(batch, 1024), 5)


def _t() -> Case:
    heads = [small_head(256, 5, 64) for _ in range(10)]
    title = "transformer, 6 layers of width 256, 16 x 32 tokens"
    return _classes("t", title, transformer(), heads, torch.randn(16, 32, 32), 5)


def _m() -> Case:
    title = "MLP 5 x 1536, binary heads, batch 64"
    return _binary("m", title, mlp(1024, 1536, 5), 1536, torch.randn(64, 1024), 40)


def _r() -> Case:
    title = "ResNet-18, 64 x 64, binary heads, batch 16"
    return _binary("r", title, resnet18(pooled=True), 512, torch.randn(16, 3, 64, 64), 40)


def _sq() -> Case:
    net = torchvision.models.squeezenet1_1(weights=None)
    trunk = nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = [nn.Linear(512, 10) for _ in range(5)]
    x = torch.randn(16, 3, 64, 64)
    return _classes("sq", "SqueezeNet 1.1, 64 x 64, batch 16", trunk, heads, x, 10, untuned=True)


def _vit() -> Case:
    heads = [nn.Linear(192, 10) for _ in range(6)]
    x = torch.randn(16, 3, 32, 32)
    title = "ViT, 6 layers of width 192, 16 x 65 tokens"
    return _classes("vit", title, vision_transformer(), heads, x, 10, untuned=True)


def _growing(width: int, k: int) -> Case:
    title = f"MLP 256-{width}-{width}-{width}, binary heads, batch 128"
    x = torch.randn(128, 256)
    return _binary(f"w{width}k{k}", title, mlp(256, width, 3), width, x, k)


def _tiny() -> Case:
    heads = [nn.Linear(8, 3) for _ in range(3)]
    return _classes("tiny", "MLP 2 x 8, batch 4", mlp(6, 8, 2), heads, torch.randn(4, 6), 3)


BUILDERS: dict[str, Callable[[], Case]] = {
    "a": _a,
    "b": _b,
    "c": _c,
    "d": lambda: _d("d", 128),
    "d16": lambda: _d("d16", 16),
    "t": _t,
    "m": _m,
    "r": _r,
    "sq": _sq,
    "vit": _vit,
    "tiny": _tiny,
}
CASES = [name for name in BUILDERS if name != "tiny"]  # tiny is for the tests
GROWING: dict[str, Callable[[], Case]] = {
    f"w{width}k{k}": partial(_growing, width, k)
    for width in (256, 1024)
    for k in (2, 5, 10, 20, 40, 80, 139)
}
GROWTH = list(GROWING)
BUILDERS |= GROWING


def chosen(text: str) -> list[str]:
    """Names of cases from a comma-separated list; "all" and "growth" stand for their lists."""
    groups = {"all": CASES, "growth": GROWTH}
    return [n for part in text.split(",") for n in groups.get(part.strip(), [part.strip()])]


def make(name: str, device: torch.device | None = None) -> Case:
    """A case with its own copy of everything; the same numbers at every call.

    Raises:
        ValueError: unknown name.
    """
    if name not in BUILDERS:
        raise ValueError(f"no case {name!r}; {nearest(name, CASES, 'cases')}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = BUILDERS[name]()
    case.model.train()
    return case.to(device)
