"""Equal weighting: the mean of the losses, the baseline of every comparison.

With K losses the step is ``d = 1/K * sum_k g_k``. The literature's linear scalarisation sums the
losses, which is the same direction K times as long; under Adam the two differ by rounding alone.
This package lets weights sum to one wherever a paper leaves the choice, so that the steps of
different methods are comparable under SGD as well; ``reduction="sum"`` gives the other convention.

With a preference w the step is ``d = sum_k w_k g_k``, w scaled to sum one: linear scalarisation
with fixed weights, whose runs for many w draw a Pareto front.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import Method, View, upload


def equal_weights(k: int, reduction: str = "mean") -> Tensor:
    """Weights (k,) in float64: 1/k each ("mean") or 1 each ("sum")."""
    return torch.full((k,), 1.0 if reduction == "sum" else 1.0 / k, dtype=torch.float64)


class Equal(Method):
    """Equal weighting (linear scalarisation with equal weights).

    Args:
        reduction: "mean", weights 1/K, or "sum", weights 1.
        preference: fixed weights w, K non-negative numbers with a positive sum; equal by default.
            "mean" divides them by their sum, "sum" takes them as they are.
        head_gradients: "weighted" (default: what one backward pass of the mean gives) or "raw".

    Tasks that are absent from a batch are left out of the mean.

    Raises:
        ValueError: another reduction, or a preference that is none.
    """

    name = "equal"
    title = "Equal weighting"
    paper = "linear scalarisation; Caruana, Machine Learning 1997"
    year = 1997
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "none"

    def __init__(
        self,
        reduction: str = "mean",
        preference: Sequence[float] | None = None,
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"equal: expected reduction 'mean' or 'sum', got {reduction!r}")
        if preference is not None:
            preference = [float(w) for w in preference]
            if min(preference, default=-1.0) < 0 or not 0 < sum(preference) < float("inf"):
                raise ValueError(
                    "equal: expected preference to be non-negative numbers with a positive sum, "
                    f"got {preference}"
                )
        self.reduction = reduction
        self.preference = preference

    def _rule(self, view: View) -> Tensor:
        if self.preference is not None:
            if len(self.preference) != view.n_tasks:
                raise ValueError(
                    f"equal: expected a preference for each of {view.n_tasks} tasks, got "
                    f"{len(self.preference)}"
                )
            w = torch.tensor([self.preference[k] for k in view.tasks], dtype=torch.float64)
            # All present tasks may have weight zero: then the step is zero.
            total = float(w.sum()) if self.reduction == "mean" else 1.0
            return upload(w / (total or 1.0), view.device)
        return upload(equal_weights(len(view.tasks), self.reduction), view.device)
