"""DWA: dynamic weight average.

Liu, Johns, Davison: "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv:1803.10704.

A task whose loss falls more slowly than the others' gets a larger weight. With the mean losses
L_k(e-1) and L_k(e-2) of the last two epochs and a temperature T,

    r_k = L_k(e-1) / L_k(e-2),         w_k = K exp(r_k / T) / sum_j exp(r_j / T),

and ones in the first two epochs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View

LARGEST_RATIO = 1e6  # far above any real one; keeps the softmax from seeing an infinity


def dwa_weights(newer: Tensor, older: Tensor, temperature: float = 2.0) -> Tensor:
    """Weights of DWA from the mean losses of two epochs.

    Args:
        newer: mean losses (K,) of the last epoch.
        older: mean losses (K,) of the epoch before it. Where zero or negative, the ratio has no
            meaning and counts as one, a loss that stays as it is.
        temperature: T, positive; the larger, the nearer to equal weights.

    Returns:
        float64 tensor (K,), sum K.
    """
    valid = older > 0
    ratio = torch.where(valid, newer.double() / torch.where(valid, older, 1.0), 1.0)
    ratio = ratio.clamp(-LARGEST_RATIO, LARGEST_RATIO)
    return len(ratio) * torch.softmax(ratio / temperature, 0)


class DWA(Method):
    """Dynamic weight average. Call `next_epoch` at the end of every epoch; without it all is one.

    Args:
        temperature: T, positive; 2 in the paper.
        head_gradients: "weighted" (default: one backward pass of the weighted sum) or "raw".

    The weights sum to K, as in the paper (to the number of present tasks where some are absent).

    * Means are over the epoch's batches, as in the official code (lorenmt/mtan). Other code uses
      two sliding windows of 25 steps that start from ones; not offered here.
    * A task that an epoch never saw keeps its two means; a task with fewer than two means counts
      as one that stays as it is (r = 1), which gives the ones of the first two epochs.
    * A mean of zero or below two epochs ago: r = 1, where the official code divides by zero.
    """

    name = "dwa"
    title = "DWA"
    paper = "Liu et al., CVPR 2019"
    year = 2019
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "4 K"
    state = "K means of two epochs, K running sums and counts"

    def __init__(self, temperature: float = 2.0, *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 < temperature < float("inf"):
            raise ValueError(f"dwa: expected a finite temperature > 0, got {temperature}")
        self.temperature = temperature

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        zeros = torch.zeros(view.n_tasks, dtype=torch.float64, device=view.device)
        return {name: zeros.clone() for name in ("sums", "counts", "newer", "older")}

    def _rule(self, view: View) -> Tensor:
        state, at = self._state, view.index
        sums, counts = state["sums"].clone(), state["counts"].clone()
        sums[at] += view.losses
        counts[at] += 1
        self._state = state | {"sums": sums, "counts": counts}
        # Before two epochs are over the older mean is still zero, which counts as no change.
        return dwa_weights(state["newer"][at], state["older"][at], self.temperature)

    def next_epoch(self) -> None:
        """Close the epoch: its mean losses become the newer ones, the newer the older."""
        if not self._state:
            return
        state = self._state
        seen = state["counts"] > 0
        means = state["sums"] / state["counts"].clamp(min=1)
        self._state = {
            "sums": torch.zeros_like(means),
            "counts": torch.zeros_like(means),
            "newer": torch.where(seen, means, state["newer"]),
            "older": torch.where(seen, state["newer"], state["older"]),
        }
