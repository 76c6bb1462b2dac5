"""GeN: a learning rate from a parabola through the loss along the step.

Bu, Xu: "Gradient Descent with Generalized Newton's Method"; official code: gen-optim on PyPI.

Along the optimiser's update ``theta - m * lr * d`` the loss is fitted by ``a - b m + h m^2 / 2``.
Its vertex ``m* = b / h`` is the step that a Newton method would take along d, found with two
forward passes beside the current loss:

    b = (L(-1) - L(1)) / 2,        h = L(1) - 2 L(0) + L(-1).

This file needs torch alone; several processes that train one model, ``parallel.py`` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def fit_parabola(steps: Tensor, losses: Tensor) -> tuple[float, float, float]:
    """Least-squares parabola ``a - b m + h m^2 / 2``.

    Args:
        steps: multipliers m (n,), at least three different ones.
        losses: (n,).

    Returns:
        Slope b, curvature h, and the share R^2 of the losses' variance that the parabola explains
        (one for three steps, through which there always is a parabola).
    """
    steps, losses = steps.double(), losses.double()
    design = torch.stack([torch.ones_like(steps), -steps, steps**2 / 2], dim=1)
    solution = torch.linalg.lstsq(design, losses).solution
    residual = ((design @ solution - losses) ** 2).sum()
    spread = ((losses - losses.mean()) ** 2).sum()
    r2 = float(1 - residual / spread) if spread > 0 else 0.0
    return float(solution[1]), float(solution[2]), r2


class GeNLR:
    """Sets an optimiser's learning rate by the parabola, every few steps.

    Call `update` between the backward pass and ``optimizer.step()``. For NGDiff pass a closure of
    the retain loss (how third-party code reads the paper, which we could not check)::

        method.backward(torch.stack([retain, forget]), shared=..., heads=...)
        gen.update(lambda: retain_loss(model, batch), optimizer, model)
        optimizer.step()

    Args:
        every: steps between two updates; the first comes at step `every`.
        clip: the vertex counts as a factor between 1 / clip and clip.
        smooth: share of the old learning rate that is kept.
        min_r2: fits that explain less leave the learning rate as it is. It can reject with more
            than three probes alone.
        probes: multipliers of the update at which the loss is looked at, three at least.

    Attributes:
        group: as `Method.group`. The losses are averaged over its ranks, so that all of them find
            the same learning rate.

    A fit with b <= 0 or h <= 0 has no minimum ahead and leaves the learning rate as it is. A probe
    with a non-finite loss divides it by `clip`.

    Where the official code differs, and what is done here:

    * It finds the update by stepping the optimiser and going back, so Adam's moments advance once
      more at each probe. Here: they are put back, as are parameters, buffers and random states.
    * It probes on the next batch of an iterator. Here: on what the closure computes, every probe
      with the same random numbers, so that dropout does not look like curvature.

    The update is found by a step of the optimiser on a saved copy of its state, so parameters and
    state are in memory twice for a moment, and the probes wait for the device.
    """

    def __init__(
        self,
        every: int = 10,
        clip: float = 2.0,
        smooth: float = 0.9,
        min_r2: float = 0.99,
        probes: Sequence[float] = (-1.0, 0.0, 1.0),
    ) -> None:
        if every != int(every) or every < 1:
            raise ValueError(f"GeNLR: expected a whole number every >= 1, got {every}")
        if not clip >= 1 or not 0 <= smooth < 1:
            raise ValueError(
                f"GeNLR: expected clip >= 1 and 0 <= smooth < 1, got clip={clip}, smooth={smooth}"
            )
        if len(set(probes)) < 3:
            raise ValueError(f"GeNLR: expected three different probes at least, got {probes}")
        self.every = every
        self.clip = clip
        self.smooth = smooth
        self.min_r2 = min_r2
        self.probes = tuple(probes)
        self.calls = 0
        self.group: Any = "auto"

    def update(
        self,
        closure: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
    ) -> float | None:
        """Count one step and, when it is due, set the learning rate of every parameter group.

        Args:
            closure: computes the loss to look at, a scalar tensor; called without gradients.
            optimizer: optimiser whose ``.grad`` are filled for the coming step.
            model: the module whose buffers a forward pass may change.

        Returns:
            The vertex m*, in multiples of the learning rate; None where nothing was fitted or the
            fit was not used.
        """
        self.calls += 1
        if self.calls % self.every:
            return None
        losses = self._probe(closure, optimizer, [] if model is None else list(model.buffers()))
        if not losses.isfinite().all():
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] / self.clip
            return None
        slope, curvature, r2 = fit_parabola(torch.tensor(self.probes), losses)
        if not (slope > 0 and curvature > 0 and r2 >= self.min_r2):
            return None
        vertex = slope / curvature
        factor = min(max(vertex, 1 / self.clip), self.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * (self.smooth + (1 - self.smooth) * factor)
        return vertex

    def state_dict(self) -> dict[str, Any]:
        """Number of steps counted; the learning rate itself is in the optimiser's state."""
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.calls = state_dict["calls"]

    @torch.no_grad()
    def _probe(
        self,
        closure: Callable[[], Tensor],
        optimizer: torch.optim.Optimizer,
        buffers: list[Tensor],
    ) -> Tensor:
        """Losses at the probes; parameters, buffers, random and optimiser state as before."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        buffers_before = [b.clone() for b in buffers]
        state = {p: _cloned(values) for p, values in optimizer.state.items()}
        losses = []
        try:
            optimizer.step()
            updates = [p - old for p, old in zip(parameters, before, strict=True)]
            for m in self.probes:
                for p, old, update in zip(parameters, before, updates, strict=True):
                    p.copy_(old + m * update)
                with torch.random.fork_rng():
                    losses.append(closure().detach().double())
                _restore(buffers, buffers_before)
        finally:
            _restore(parameters, before)
            _restore(buffers, buffers_before)
            optimizer.state.clear()
            optimizer.state.update(state)
        found = torch.stack(losses)
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.group is not None and several:
            from ..parallel import ranks_of  # here, so that this file by itself needs torch alone

            ranks = ranks_of(self.group)
            if ranks is not None:
                found = ranks.average(found, [1 / ranks.size] * len(found))
        return found.cpu()


def _cloned(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}


def _restore(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
