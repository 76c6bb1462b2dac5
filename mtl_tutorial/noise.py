"""Label noise on one task, as ExcessMTL's code means to inject it; validation and test stay clean.

A fixed share of the task's training examples, drawn once, loses its labels to uniform ones over all
classes, the true one included, so the expected share of wrong labels is ``fraction (C - 1) / C``.
The official code draws a fresh label at each access (`redraw`), so a network cannot memorise them;
the usual protocol elsewhere draws once.

Maps get noise in every pixel of a chosen image: classes uniform from -1 (none) to C - 1, depths
from a standard normal distribution, normals with their z from one and renormalised. The released
NYUv2 program of ExcessMTL reads these settings and never hands them to its data set; here they are
applied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Draw = Callable[[Tensor, torch.Generator], Tensor]
"""Clean targets (n, ...) and a generator on the host to noisy ones of the same shape."""


def uniform_labels(n_classes: int, lowest: int = 0) -> Draw:
    """Labels uniform from `lowest` to ``n_classes - 1``, whatever the clean ones are."""

    def draw(labels: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randint(lowest, n_classes, labels.shape, generator=generator).to(labels)

    return draw


def normal_depths(depths: Tensor, generator: torch.Generator) -> Tensor:
    """Depths from a standard normal distribution, negative ones too, as in the official code."""
    return torch.randn(depths.shape, generator=generator).to(depths)


def turned_normals(normals: Tensor, generator: torch.Generator) -> Tensor:
    """Normals (n, 3, H, W) whose z is drawn from a standard normal distribution, renormalised."""
    z = torch.randn(normals[:, 2].shape, generator=generator).to(normals)
    return F.normalize(torch.stack([normals[:, 0], normals[:, 1], z], dim=1), dim=1)


@dataclass(frozen=True)
class LabelNoise:
    """Noise on the labels of one task.

    Attributes:
        task: name of the task.
        fraction: share of its training examples with random labels, 0 to 1.
        redraw: draw new random labels every epoch, in which each example is seen once ("per
            access", the official code); else once per run.

    Raises:
        ValueError: the fraction is outside 0 to 1.
    """

    task: str
    fraction: float
    redraw: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"expected a noise fraction from 0 to 1, got {self.fraction}")

    @property
    def label(self) -> str:
        """The text that `parse_noise` reads back."""
        return f"{self.task}:{self.fraction:g}" + ("" if self.redraw else ":fixed")

    def chosen(self, n: int, seed: int) -> Tensor:
        """Indices of the ``int(fraction * n)`` noisy examples, drawn without replacement."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(n, generator=generator)[: int(self.fraction * n)]

    def stream(self, seed: int, epoch: int) -> int:
        """Seed of the random labels of an epoch."""
        return seed * 1_000_003 + (epoch if self.redraw else 0)

    def apply(self, labels: Tensor, draw: Draw | int, seed: int, epoch: int) -> Tensor:
        """Targets with noise.

        Args:
            labels: clean targets (N, ...).
            draw: gives noisy targets for clean ones; a number of classes stands for uniform ones.
            seed: of the run; fixes which examples are noisy.
            epoch: with `redraw`, the random labels change with it.

        Returns:
            A new tensor like `labels`, on its device; drawn on the host, so that a seed means the
            same labels on any device.
        """
        index = self.chosen(len(labels), seed).to(labels.device)
        generator = torch.Generator().manual_seed(self.stream(seed, epoch))
        draw = uniform_labels(draw) if isinstance(draw, int) else draw
        noisy = labels.clone()
        noisy[index] = draw(labels[index], generator)
        return noisy


def parse_noise(text: str) -> LabelNoise:
    """Read ``TASK:FRACTION`` or ``TASK:FRACTION:fixed``.

    Raises:
        ValueError: another form, or a fraction outside 0 to 1.
    """
    task, *rest = text.split(":")
    try:
        fraction = float(rest[0])
        how = rest[1:] or ["redraw"]
        if not task or how not in (["fixed"], ["redraw"]):
            raise ValueError
    except (IndexError, ValueError):
        raise ValueError(
            f"expected noise as TASK:FRACTION or TASK:FRACTION:fixed, got {text!r}"
        ) from None
    return LabelNoise(task, fraction, how == ["redraw"])
