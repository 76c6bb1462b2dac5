"""Label noise on one task, as ExcessMTL's code injects it; validation and test stay clean.

A fixed share of the task's training examples, drawn once, loses its labels to uniform ones over all
classes, the true one included, so the expected share of wrong labels is ``fraction (C - 1) / C``.
The official code draws a fresh label at each access (`redraw`), so a network cannot memorise them;
the usual protocol elsewhere draws once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def apply(self, labels: Tensor, n_classes: int, seed: int, epoch: int) -> Tensor:
        """Labels with noise.

        Args:
            labels: clean labels (N,), or (N, H, W) for dense tasks.
            n_classes: number of classes C.
            seed: of the run; fixes which examples are noisy.
            epoch: with `redraw`, the random labels change with it.

        Returns:
            A new tensor like `labels`, on its device; drawn on the host, so that a seed means the
            same labels on any device.
        """
        index = self.chosen(len(labels), seed)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + (epoch if self.redraw else 0))
        drawn = torch.randint(n_classes, (len(index), *labels.shape[1:]), generator=generator)
        noisy = labels.clone()
        noisy[index.to(labels.device)] = drawn.to(labels)
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
