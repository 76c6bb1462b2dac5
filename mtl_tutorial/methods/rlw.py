"""RLW: random loss weighting.

Lin, Ye, Zhang, Tsang: "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
Learning", TMLR 2022, arXiv:2111.10603.

At every step the weights are the softmax of K independent standard normal numbers:

    z ~ N(0, I_K),     w = softmax(z),     E[w_k] = 1/K.

On average it is equal weighting with noise on the weights, which makes it the yardstick for every
rule that claims to choose its weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View, upload


def random_weights(k: int, generator: torch.Generator | None = None) -> Tensor:
    """Softmax of `k` standard normal numbers: float64 tensor (k,), positive, sum one."""
    return torch.softmax(torch.randn(k, generator=generator, dtype=torch.float64), 0)


class RLW(Method):
    """Random loss weighting with normal logits.

    Args:
        seed: of the generator of the logits. It draws on the host, so that a seed gives the same
            weights on every device, and its state is part of `state_dict`.
        head_gradients: "weighted" (default: one backward pass of the weighted sum) or "raw".

    Weights sum to one. One weight per task is drawn at every step; where tasks are absent from a
    batch, the weights of the present ones are normalised among themselves.

    Only the normal distribution is offered; our source for the paper's others is not certain.
    """

    name = "rlw"
    title = "RLW"
    paper = "Lin et al., TMLR 2022"
    year = 2022
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "none"
    state = "generator"
    properties = frozenset({"scale", "rotation"})  # permuted tasks meet the same draws

    def __init__(self, seed: int = 0, *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients, seed=seed)
        self.seed = seed

    def _rule(self, view: View) -> Tensor:
        weights = random_weights(view.n_tasks, self._generator)[view.tasks]
        return upload(weights / weights.sum(), view.device)
