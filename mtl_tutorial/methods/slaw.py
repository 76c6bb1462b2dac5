"""SLAW: scaled loss approximate weighting.

Crawshaw, Kosecka: "SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning",
arXiv:2109.08218 (2021); official code mtcrawshaw/meta, branch slaw.

Weights inverse to the norms of the task gradients make all tasks pull equally hard. SLAW reads
these norms from the spread of the recent losses, without a backward pass per task: for a small
isotropic move of radius r in P parameters, ``Std[L_k] ~ r / sqrt(P) * |g_k|``. With running
statistics of every loss,

    s_k = max(Std[L_k], floor),            w_k = K (1 / s_k) / sum_j (1 / s_j).

The paper's body was not at hand; the abstract and the released code are what this file follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View


def running_statistics(
    losses: Tensor, mean: Tensor, deviation: Tensor, seen: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Mean and deviation after one more loss: plain ones at first, exponential ones later.

    Args:
        losses: new losses (K,).
        mean: running mean (K,).
        deviation: running standard deviation (K,), of the population and not of the sample.
        seen: number of losses (K,) so far, the new one included.
        beta: decay of the exponential average that takes over after ``1 / (1 - beta)`` losses.

    Returns:
        New mean and deviation (K,). The deviation is the root of E[L^2] - E[L]^2, updated without
        ever taking that difference or a square, so it neither cancels nor overflows.
    """
    plain = seen <= round(1 / (1 - beta))
    share = torch.where(plain, 1 / seen, 1 - beta)
    change = losses - mean
    spread = torch.hypot(deviation, share.sqrt() * change)
    return mean + share * change, (1 - share).sqrt() * spread


def slaw_weights(deviation: Tensor, floor: float = 1e-5) -> Tensor:
    """Weights (K,) inverse to the standard deviations, sum K; deviations are at least `floor`."""
    inverse = 1 / deviation.double().clamp(min=floor)
    return len(inverse) * inverse / inverse.sum()


class SLAW(Method):
    """SLAW, with the official code's statistics.

    Args:
        beta: decay of the running averages, in [0, 1); 0.99 in the official code. The first
            round(1 / (1 - beta)) steps use arithmetic means.
        floor: smallest standard deviation, positive, in units of the losses; 1e-5 in the
            official code.
        head_gradients: "weighted" (default: one backward pass of the weighted sum) or "raw".

    The weights sum to K, as in the official code, and are updated before the step uses them; at
    the first step they are ones. Where tasks are absent, the present ones share their number.

    * The deviation is kept itself, and not as the root of E[L^2] - E[L]^2: equal in exact
      arithmetic. The official code keeps the old weights where that difference rounds below zero.
    * Other re-implementations start an exponential average from zero: their weights differ for
      hundreds of steps, since the spread is then mostly that of the start. Kept: the official.

    A loss that stands still has no spread, so its task takes nearly all the weight. That is the
    method's own: watch it where a task converges early. Mini-batch noise enters the spread too.
    """

    name = "slaw"
    title = "SLAW"
    paper = "Crawshaw and Kosecka, arXiv 2021"
    year = 2021
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "3 K"
    state = "K running means, deviations and counts"

    def __init__(
        self, beta: float = 0.99, floor: float = 1e-5, *, head_gradients: str = "weighted"
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= beta < 1 or not 0 < floor < float("inf"):
            raise ValueError(
                "slaw: expected 0 <= beta < 1 and a finite floor > 0, got "
                f"beta={beta}, floor={floor}"
            )
        self.beta = beta
        self.floor = floor

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        zeros = torch.zeros(view.n_tasks, dtype=torch.float64, device=view.device)
        return {name: zeros.clone() for name in ("mean", "deviation", "seen")}

    def _rule(self, view: View) -> Tensor:
        at = view.index
        mean, deviation, seen = (
            self._state[name].clone() for name in ("mean", "deviation", "seen")
        )
        seen[at] += 1
        mean[at], deviation[at] = running_statistics(
            view.losses, mean[at], deviation[at], seen[at], self.beta
        )
        self._state = {"mean": mean, "deviation": deviation, "seen": seen}
        return slaw_weights(deviation[at], self.floor)
