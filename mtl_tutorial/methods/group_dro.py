"""Group DRO: exponentiated-gradient ascent on the weights of the tasks.

Sagawa, Koh, Hashimoto, Liang: "Distributionally Robust Neural Networks for Group Shifts: On the
Importance of Regularization for Worst-Case Generalization", ICLR 2020, arXiv:1911.08731; with
tasks in the place of groups it is a baseline of ExcessMTL.

The worst mixture of the tasks is sought while the model descends on it:

    q_k <- q_k exp(step_size L_k),   normalised,        loss = sum_k q_k L_k.

After t steps q is the softmax of ``step_size * sum_t L_k(t)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View


class GroupDRO(Method):
    """Group DRO with tasks as groups.

    Args:
        step_size: eta of the exponentiated gradient, 0 or more; 1e-2 is the default of the
            ExcessMTL code, which uses the method as a baseline. 0 is equal weighting.
        head_gradients: "weighted" (default: one backward pass of the weighted sum) or "raw".

    q is updated before the step uses it, in that code and here. Tasks that are absent from a
    batch keep their logarithm of q; the others are normalised among themselves.

    * Weights sum to one, as in Sagawa et al.; in the ExcessMTL code to K.
    * q is kept by its logarithm: the product overflows for a large ``step_size * L``.
    * The size adjustment C / sqrt(n_k) of Sagawa et al. is left out: tasks of one batch have one
      size.

    A task whose labels are noise keeps a large loss and takes the weight for ever.
    """

    name = "group_dro"
    title = "Group DRO"
    paper = "Sagawa et al., ICLR 2020"
    year = 2020
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "K"
    state = "K log weights"

    def __init__(self, step_size: float = 1e-2, *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= step_size < float("inf"):
            raise ValueError(f"group_dro: expected a finite step_size >= 0, got {step_size}")
        self.step_size = step_size

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        return {"log_weights": torch.zeros(view.n_tasks, dtype=torch.float64, device=view.device)}

    def _rule(self, view: View) -> Tensor:
        log_weights = self._state["log_weights"].clone()
        log_weights[view.index] += self.step_size * view.losses
        self._state = {"log_weights": log_weights}
        return torch.softmax(log_weights[view.index], 0)
