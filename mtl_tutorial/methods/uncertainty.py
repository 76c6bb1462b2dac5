"""Uncertainty weighting: losses divided by learnt variances.

Kendall, Gal, Cipolla: "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry
and Semantics", CVPR 2018, arXiv:1705.07115.

Every task has a log variance s_k, and model and s minimise together

    sum_k  L_k / (2 e^{s_k}) + s_k / 2,          w_k = e^{-s_k} / 2.

At fixed losses the minimum over s is ``s_k = log L_k``: there ``w_k = 1 / (2 L_k)``, which is half
of the scale-invariant weights, and the objective is ``sum_k (1 + log L_k) / 2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View


def uncertainty_loss(losses: Tensor, log_variances: Tensor) -> Tensor:
    """Objective ``sum_k L_k / (2 e^{s_k}) + s_k / 2`` of losses (K,) and s (K,), 0-dimensional."""
    return (losses * (-log_variances).exp() + log_variances).sum() / 2


def uncertainty_step(log_variances: Tensor, losses: Tensor, lr: float, bound: float) -> Tensor:
    """One gradient step of `uncertainty_loss` on s: ``s - lr (1 - L e^{-s}) / 2``, in +-bound."""
    slope = (1 - losses * (-log_variances).exp()) / 2
    return (log_variances - lr * slope).clamp(-bound, bound)


class Uncertainty(Method):
    """Uncertainty weighting with one form, L / (2 e^s) + s / 2, for every kind of loss.

    Each step weighs by the current log variances and then moves them.

    Args:
        lr: step size of the log variances, positive. A setting of its own and plain gradient
            descent, since `backward` does not see the optimiser; code bases differ in whether
            the model's optimiser or another one moves s.
        init: initial s_k. 0 gives every task the weight 1/2.
        bound: s_k stays within +-bound, so that a weight is at most e^bound / 2. Not in the
            paper, where a loss of zero sends s_k to minus infinity and its weight to infinity;
            it also keeps losses at or below zero finite, for which the model has no meaning.
        head_gradients: "weighted" (default: model and s share one objective) or "raw".

    The paper gives a classification loss twice the factor, e^{-s}; all code that we know uses the
    form of regression for every task, and so does this class. The difference is a shift of s.

    The weights do not sum to one: their scale is the method's own result.
    """

    name = "uncertainty"
    title = "Uncertainty weighting"
    paper = "Kendall et al., CVPR 2018"
    year = 2018
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "K"
    state = "K log variances"

    def __init__(
        self,
        lr: float = 0.01,
        init: float = 0.0,
        bound: float = 10.0,
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 < lr < float("inf") or not 0 < bound <= 80 or not abs(init) <= bound:
            raise ValueError(
                "uncertainty: expected a finite lr > 0, 0 < bound <= 80 and |init| <= bound, got "
                f"lr={lr}, init={init}, bound={bound}"
            )
        self.lr = lr
        self.init = init
        self.bound = bound

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        start = torch.full((view.n_tasks,), float(self.init), dtype=torch.float64)
        return {"log_variances": start.to(view.device)}

    def _rule(self, view: View) -> Tensor:
        before = self._state["log_variances"]
        now = before[view.index]
        after = before.clone()
        after[view.index] = uncertainty_step(now, view.losses, self.lr, self.bound)
        self._state = {"log_variances": after}
        return (-now).exp() / 2
