"""FAMO: fast adaptive multitask optimisation.

Liu, Feng, Stone, Liu: "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023,
arXiv:2306.03792; official code Cranial-XIX/FAMO.

All log losses shall fall at the same rate, at the cost of one backward pass. With logits xi, lower
bounds b and ``D = L - b + 1e-8``:

    z = softmax(xi),       w_k = c z_k / D_k,       c = 1 / sum_k (z_k / D_k),

so the step is a convex combination of the task gradients. After the optimiser's step the losses of
the same batch are computed again, and the logits move by Adam, with decay gamma:

    delta_k = log D_k - log D'_k,     gradient_k = z_k (delta_k - sum_j z_j delta_j) + gamma xi_k.

Adam descends, so the logit of a task that improved less than the weighted average rises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..gradients import (
    Closure,
    Info,
    Losses,
    Method,
    View,
    all_finite,
    split_closure_output,
    upload,
)

EPSILON = 1e-8  # the official code's, added to L - b
BETAS = (0.9, 0.999)  # of Adam, torch's defaults
ADAM_EPSILON = 1e-8


def famo_weights(logits: Tensor, excess: Tensor) -> Tensor:
    """Weights ``w_k`` (K,), sum one, from logits (K,) and positive excess losses D (K,)."""
    # Softmax of xi - log D is the same quotient, without dividing by a tiny loss.
    return torch.softmax(logits - excess.log(), 0)


def famo_gradient(logits: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Gradient (K,) by the logits, from D before and after the step; sums to zero."""
    z = torch.softmax(logits, 0)
    delta = before.log() - after.log()
    return z * (delta - z @ delta)


class FAMO(Method):
    """FAMO. `step` does all of it; after a plain `backward` call `update` yourself.

    Args:
        lr: step size of Adam on the logits, positive; 0.025 in the paper.
        decay: gamma, 0 or more. The paper uses 0.001, and 0.01 on Cityscapes; the official
            class's default is 1e-5.
        lower_bounds: b, K finite numbers that the losses cannot go below; zeros by default.
        head_gradients: "weighted" (default: one backward pass of the weighted sum, as in the
            official code) or "raw".

    Weights sum to one and start in proportion to ``1 / D_k``.

    * The decay goes through Adam (coupled), as in the official code; the update that the paper
      writes is therefore only approximate.
    * A loss below its lower bound counts as at the bound; the official logarithm gives NaN.
    * The official trainer clips the shared gradients to norm one. Here: left to the caller.
    * Tasks that are absent from a batch keep their logit and Adam state; the others are
      normalised among themselves. The official code needs every task in each batch.

    The second forward pass runs in the mode that the model is in: batch-norm statistics are
    updated twice per step, and dropout draws another mask, which adds noise to delta. The closure
    must return the losses of the same batch when it is called again.
    """

    name = "famo"
    title = "FAMO"
    paper = "Liu et al., NeurIPS 2023"
    year = 2023
    family = "loss"
    sees = "losses"
    passes = "1, and one forward more"
    memory = "6 K"
    state = "K logits with Adam's moments, K losses between backward and update"

    def __init__(
        self,
        lr: float = 0.025,
        decay: float = 1e-3,
        lower_bounds: Sequence[float] | None = None,
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 < lr < float("inf") or not 0 <= decay < float("inf"):
            raise ValueError(
                f"famo: expected a finite lr > 0 and decay >= 0, got lr={lr}, decay={decay}"
            )
        if lower_bounds is not None:
            lower_bounds = [float(b) for b in lower_bounds]
            if not all(abs(b) < float("inf") for b in lower_bounds):
                raise ValueError(f"famo: expected finite lower_bounds, got {lower_bounds}")
        self.lr = lr
        self.decay = decay
        self.lower_bounds = lower_bounds

    def step(
        self,
        closure: Closure,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """One training step, then the closure again without gradients, then `update`.

        Args:
            closure: computes and returns the losses (K,) of the current batch; called twice.
            optimizer: optimiser over shared and head parameters.
            shared, heads, scaler: as in `backward`. A step that the scaler skips leaves the
                logits as they were.

        Returns:
            `Info` of the step, with the losses before it.
        """
        info = super().step(closure, optimizer, shared=shared, heads=heads, scaler=scaler)
        with torch.no_grad():
            losses, _ = split_closure_output(closure())
            stepped = info.finite
            if scaler is not None:
                groups = optimizer.param_groups
                gradients = [p.grad for g in groups for p in g["params"]]
                stepped = stepped & all_finite(gradients, stepped.device)
            self._update(losses, stepped)
        return info

    @torch.no_grad()
    def update(self, losses_after: Losses) -> None:
        """Move the logits, once per `backward` and after the optimiser's step.

        Args:
            losses_after: losses (K,), or K scalars, of the same batch with the new parameters;
                entries of tasks that the batch did not have are not looked at. If another one is
                not finite the logits stay as they are, and the next `backward` tells.

        Raises:
            RuntimeError: there was no `backward` yet.
            ValueError: wrong number of losses.
        """
        if not self._state:
            raise RuntimeError(
                "famo: expected a backward before update, got none; call backward(losses), then "
                "optimizer.step(), then update(losses of the same batch)"
            )
        self._update(losses_after, None)

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        zeros = torch.zeros(view.n_tasks, dtype=torch.float64, device=view.device)
        names = ("logits", "first_moment", "second_moment", "updates", "before")
        return {name: zeros.clone() for name in names} | {"waiting": zeros.bool()}

    def _rule(self, view: View) -> Tensor:
        excess = self._excess(view.losses, view.n_tasks, view.tasks)
        before = torch.zeros_like(self._state["before"])
        waiting = torch.zeros_like(self._state["waiting"])
        before[view.index] = excess
        waiting[view.index] = True
        self._state = self._state | {"before": before, "waiting": waiting}
        return famo_weights(self._state["logits"][view.index], excess)

    def _excess(self, losses: Tensor, n_tasks: int, tasks: list[int]) -> Tensor:
        """D (n,) of the losses (n,) of some tasks."""
        bounds = self.lower_bounds
        if bounds is None:
            return losses.clamp(min=0) + EPSILON
        if len(bounds) != n_tasks:
            raise ValueError(f"famo: expected lower_bounds for {n_tasks} tasks, got {len(bounds)}")
        b = upload(torch.tensor(bounds, dtype=torch.float64)[tasks], losses.device)
        return (losses - b).clamp(min=0) + EPSILON

    def _update(self, losses_after: Losses, stepped: Tensor | None) -> None:
        """Adam on the logits of the tasks that wait for it, where the step was taken."""
        if not isinstance(losses_after, Tensor):
            losses_after = torch.stack([loss.reshape(()) for loss in losses_after])
        state = self._state
        logits, waiting, k = state["logits"], state["waiting"], len(state["logits"])
        if losses_after.shape != (k,):
            raise ValueError(
                f"famo: expected losses of shape ({k},) after the step, got "
                f"{tuple(losses_after.shape)}; return one loss per task, in the same order"
            )
        ranks = self.ranks()
        if ranks is not None:  # over the ranks that had the task in the step
            losses_after = ranks.average(losses_after, self._shares or [1 / ranks.size] * k)
        losses = losses_after.to(logits)
        use = waiting & (losses.isfinite() | ~waiting).all()
        use = use if stepped is None else use & stepped
        # Without a task in use all values below are harmless, and none of them is taken.
        before = torch.where(use, state["before"], 1.0)
        after = torch.where(use, self._excess(losses, k, list(range(k))), 1.0)
        alone = torch.where(use | ~use.any(), logits, -torch.inf)
        gradient = famo_gradient(alone, before, after) + self.decay * logits
        updates = state["updates"] + 1
        first = BETAS[0] * state["first_moment"] + (1 - BETAS[0]) * gradient
        second = BETAS[1] * state["second_moment"] + (1 - BETAS[1]) * gradient**2
        spread = (second / (1 - BETAS[1] ** updates)).sqrt() + ADAM_EPSILON
        moved = logits - self.lr * first / (1 - BETAS[0] ** updates) / spread
        self._state = {
            "logits": torch.where(use, moved, logits),
            "first_moment": torch.where(use, first, state["first_moment"]),
            "second_moment": torch.where(use, second, state["second_moment"]),
            "updates": torch.where(use, updates, state["updates"]),
            "before": torch.zeros_like(before),
            "waiting": torch.zeros_like(waiting),
        }
