"""Equal weighting: the mean of the losses, the baseline of every comparison.

With K losses the step is ``d = 1/K * sum_k g_k``. The literature's linear scalarisation sums the
losses, which is the same direction K times as long; under Adam the two differ by rounding alone.
This package lets weights sum to one wherever a paper leaves the choice, so that the steps of
different methods are comparable under SGD as well; ``reduction="sum"`` gives the other convention.
"""

from __future__ import annotations

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
        head_gradients: "weighted" (default: what one backward pass of the mean gives) or "raw".

    Tasks that are absent from a batch are left out of the mean.
    """

    name = "equal"
    title = "Equal weighting"
    paper = "linear scalarisation; Caruana, Machine Learning 1997"
    year = 1997
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "none"

    def __init__(self, reduction: str = "mean", *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients)
        if reduction not in ("mean", "sum"):
            raise ValueError(f"equal: expected reduction 'mean' or 'sum', got {reduction!r}")
        self.reduction = reduction

    def _rule(self, view: View) -> Tensor:
        return upload(equal_weights(len(view.tasks), self.reduction), view.device)
