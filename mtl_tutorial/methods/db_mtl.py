"""DB-MTL: dual-balancing multi-task learning.

Lin, Jiang, Ye, Zhang, Chen, Chen, Liu, Kwok: "Dual-Balancing for Multi-Task Learning",
arXiv:2308.12029 (2023).

Losses are balanced by their logarithm, gradients by their length. Task k keeps a running mean of
the gradients of its log loss,

    h_k <- beta h_k + (1 - beta) g_k / (L_k + 1e-8),        h_k = 0 at the start,

all means are brought to the length of the longest, and summed:

    d = max_j |h_j| * sum_k h_k / |h_k|.

A loss multiplied by a constant changes nothing, as its log loss has the same gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View

EPSILON = 1e-8  # inside the logarithm, the paper's


def log_factors(losses: Tensor) -> Tensor:
    """Factors (K,) from a loss's gradient to its log loss's: 1 / (L + 1e-8), or 0 where L <= 0."""
    return torch.where(losses > 0, 1 / (losses.clamp(min=0) + EPSILON), 0.0)


def equal_length_weights(norms: Tensor) -> Tensor:
    """Factors (K,) that bring vectors of these norms to the longest one's; 0 for zero vectors."""
    return torch.where(norms > 0, norms.max() / torch.where(norms > 0, norms, 1.0), 0.0)


class DBMTL(Method):
    """DB-MTL: log losses, and running means of their gradients brought to one length.

    Args:
        beta: factor of the running mean, 0 <= beta < 1. LibMTL's default; the paper chooses among
            0.1, 0.5, 0.9, each also divided by the square root of the step's number.
        sigma: the factor is ``beta / step ** sigma``; 0 (default) keeps it, 0.5 is the paper's
            other choice.
        head_gradients: "weighted" (default: by 1 / (L_k + 1e-8), the log loss's gradient) or "raw".

    State: the means (K, P) in the dtype of the gradients, at least float32, and each task's number
    of steps. It belongs to the shared parameters in their order: pass the same ``shared`` at every
    step. `direction` needs ``losses``. There are no task weights, as the step is made of means.

    Deviations:

    * The paper adds 1e-8 to ``|h_k|`` as well, so tiny gradients are balanced less. Here: none; a
      zero mean is left out by its norm.
    * The logarithm of a loss at or below zero does not exist. Here: such a task sits the step out,
      its mean unchanged.
    * Feature level: there is none, since a mean over steps would mix different samples.
    """

    name = "db_mtl"
    title = "DB-MTL"
    paper = "Lin et al., arXiv 2023"
    year = 2023
    sees = "rows"
    memory = "2 K x P"
    state = "K x P means, K counters"
    feature_level = False

    def __init__(
        self, beta: float = 0.9, sigma: float = 0.0, *, head_gradients: str = "weighted"
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= beta < 1 or not 0 <= sigma < float("inf"):
            raise ValueError(
                f"db_mtl: expected 0 <= beta < 1 and a finite sigma >= 0, got beta={beta}, "
                f"sigma={sigma}"
            )
        self.beta = beta
        self.sigma = sigma
        self._parts: tuple[Tensor, Tensor] | None = None
        self._factors: Tensor | None = None

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        assert view.rows is not None
        k, p, device = view.n_tasks, view.rows.shape[1], view.device
        dtype = torch.promote_types(view.rows.dtype, torch.float32)
        return {
            "means": torch.zeros(k, p, dtype=dtype, device=device),
            "steps": torch.zeros(k, dtype=torch.float64, device=device),
        }

    def _rule(self, view: View) -> None:
        """No weights of the current rows; `_combine` weighs the means."""
        assert view.rows is not None
        state = self._state
        if state["means"].shape != (view.n_tasks, view.rows.shape[1]):
            raise ValueError(
                f"db_mtl: expected gradients of {tuple(state['means'].shape)} tasks x parameters "
                f"as in earlier steps, got {(view.n_tasks, view.rows.shape[1])}; create a new "
                "DBMTL when tasks or shared parameters change"
            )
        at = view.index
        old = state["means"][at]
        self._factors = factors = log_factors(view.losses)
        steps = state["steps"][at] + (factors > 0)
        beta = self.beta / steps.clamp(min=1) ** self.sigma
        # Without a log loss the old mean stays: its factor is one and the row's is zero.
        beta = torch.where(factors > 0, beta, 1.0)[:, None].to(old.dtype)
        means = beta * old + (1 - beta) * (view.rows.to(old.dtype) * factors[:, None].to(old.dtype))
        norms = torch.linalg.vector_norm(means, dim=1).double()
        self._parts = equal_length_weights(torch.where(factors > 0, norms, 0.0)), means
        self._state = {
            "means": state["means"].index_copy(0, at, means),
            "steps": state["steps"].index_copy(0, at, steps),
        }

    def _combine(self, weights: Tensor | None, rows: Tensor) -> Tensor:
        assert self._parts is not None
        (balance, means), self._parts = self._parts, None
        return (balance.to(means.dtype) @ means).to(rows.dtype)

    def _head_weights(self, weights: Tensor | None) -> Tensor | None:
        return None if self.head_gradients == "raw" else self._factors
