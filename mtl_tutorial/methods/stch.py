"""STCH: smooth Tchebycheff scalarisation.

Lin, Zhang, Yang, Liu, Wang, Zhang: "Smooth Tchebycheff Scalarization for Multi-Objective
Optimization", ICML 2024, arXiv:2402.19078; official code Xi-L/STCH.

The largest of the weighted losses reaches every Pareto-optimal point but has a kink; its smooth
form, with preference lambda, ideal point z* and mu > 0, is

    S = mu log sum_k exp(lambda_k (L_k - z*_k) / mu),
    w_k = dS / dL_k = lambda_k softmax_k(lambda (L - z*) / mu),

and tends to the maximum as mu goes to zero.

The official multi-task code does something else: epochs 0 to 4 minimise ``sum_k log L_k``, the mean
losses of epoch 4 become the nadir point, and from then on

    S = K mu log sum_k exp(log(L_k / nadir_k) / mu),
    w_k = K softmax_k(log(L / nadir) / mu) / L_k.

At mu = 1 that is equal weighting of ``L_k / nadir_k``, divided by their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import Method, View, upload

FLOOR = 1e-8  # in logarithms and quotients, smaller losses count as this


def smooth_tchebycheff(losses: Tensor, preference: Tensor, ideal: Tensor, mu: float) -> Tensor:
    """Value S of the scalarisation, 0-dimensional; between the maximum and it plus mu log K."""
    return mu * torch.logsumexp(preference * (losses - ideal) / mu, 0)


def tchebycheff_weights(losses: Tensor, preference: Tensor, ideal: Tensor, mu: float) -> Tensor:
    """Derivatives (K,) of `smooth_tchebycheff` by the losses, all arguments (K,)."""
    return preference * torch.softmax(preference * (losses - ideal) / mu, 0)


def nadir_weights(losses: Tensor, nadir: Tensor, mu: float) -> Tensor:
    """Weights (K,) of the multi-task form; sum_k w_k L_k = K for losses above 1e-8."""
    losses, nadir = losses.clamp(min=FLOOR), nadir.clamp(min=FLOOR)
    return len(losses) * torch.softmax((losses / nadir).log() / mu, 0) / losses


class STCH(Method):
    """Smooth Tchebycheff scalarisation, the paper's form or the official multi-task form.

    Args:
        mu: smoothing, positive, in units of the losses (plain form) or without unit (multi-task
            form). 1 in the official multi-task code; a smaller one is nearer to the maximum.
        preference: lambda, K non-negative numbers with a positive sum, used as given; by default
            one over the number of present tasks. Plain form alone.
        ideal: z*, K numbers; zeros by default. Plain form alone.
        warmup: None (default): the plain form. A whole number E >= 0: the multi-task form, where
            epochs 0 to E train the sum of log losses and epoch E measures the nadir; 4 in the
            official code. Call `next_epoch` at the end of every epoch.
        head_gradients: "weighted" (default: one backward pass of S) or "raw".

    The weights are the derivatives of S and sum to at most max lambda, 1/K by default: learning
    rates are not comparable with equal weighting's before multiplying by K.

    * A run of E epochs or fewer never leaves the warm-up; the same holds in the official code.
    * Losses and nadirs below 1e-8 count as 1e-8 in the multi-task form, where the official code
      adds 1e-20 inside the logarithm and divides by a nadir of zero.
    * A task that epoch E never saw has nadir 1. The official code needs every task in each batch.
    """

    name = "stch"
    title = "STCH"
    paper = "Lin et al., ICML 2024"
    year = 2024
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "2 K"
    state = "epoch, K sums and counts of the nadir epoch"

    def __init__(
        self,
        mu: float = 1.0,
        preference: Sequence[float] | None = None,
        ideal: Sequence[float] | None = None,
        warmup: int | None = None,
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 < mu < float("inf"):
            raise ValueError(f"stch: expected a finite mu > 0, got {mu}")
        if warmup is not None and (warmup != int(warmup) or warmup < 0):
            raise ValueError(f"stch: expected a whole number warmup >= 0 or None, got {warmup}")
        if warmup is not None and (preference is not None or ideal is not None):
            raise ValueError(
                "stch: expected no preference and no ideal with warmup, since the multi-task form "
                f"has neither, got preference={preference}, ideal={ideal}"
            )
        if preference is not None:
            preference = [float(w) for w in preference]
            if min(preference, default=-1.0) < 0 or not 0 < sum(preference) < float("inf"):
                raise ValueError(
                    "stch: expected preference to be non-negative numbers with a positive sum, "
                    f"got {preference}"
                )
        if ideal is not None:
            ideal = [float(z) for z in ideal]
            if not all(abs(z) < float("inf") for z in ideal):
                raise ValueError(f"stch: expected ideal to be finite numbers, got {ideal}")
        self.mu = mu
        self.preference = preference
        self.ideal = ideal
        self.warmup = warmup

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        if self.warmup is None:
            return {}
        zeros = torch.zeros(view.n_tasks, dtype=torch.float64, device=view.device)
        epoch = torch.zeros((), dtype=torch.int64, device=view.device)
        return {"epoch": epoch, "sums": zeros, "counts": zeros.clone()}

    def _rule(self, view: View) -> Tensor:
        if self.warmup is None:
            preference = self._per_task("preference", view, 1.0 / len(view.tasks))
            ideal = self._per_task("ideal", view, 0.0)
            return tchebycheff_weights(view.losses, preference, ideal, self.mu)
        state, at = self._state, view.index
        measuring = (state["epoch"] == self.warmup).double()
        sums, counts = state["sums"].clone(), state["counts"].clone()
        sums[at] += measuring * view.losses
        counts[at] += measuring
        self._state = state | {"sums": sums, "counts": counts}
        nadir = torch.where(counts > 0, sums / counts.clamp(min=1), 1.0)[at]
        return torch.where(
            state["epoch"] <= self.warmup,
            1 / view.losses.clamp(min=FLOOR),
            nadir_weights(view.losses, nadir, self.mu),
        )

    def next_epoch(self) -> None:
        """Count one epoch; does nothing in the plain form and before the first step."""
        if self._state:
            self._state = self._state | {"epoch": self._state["epoch"] + 1}

    def _per_task(self, setting: str, view: View, default: float) -> Tensor:
        """The setting's entries (n,) of the present tasks."""
        given = getattr(self, setting)
        if given is None:
            return torch.full_like(view.losses, default)
        if len(given) != view.n_tasks:
            raise ValueError(
                f"stch: expected {setting} for each of {view.n_tasks} tasks, got {len(given)}"
            )
        entries = torch.tensor(given, dtype=torch.float64)[view.tasks]
        return upload(entries, view.device)
