"""GradNorm: loss weights that equalise the norms of the weighted task gradients.

Chen, Badrinarayanan, Lee, Rabinovich: "GradNorm: Gradient Normalization for Adaptive Loss Balancing
in Deep Multitask Networks", ICML 2018, arXiv:1711.02257.

With n_k the norm of task k's gradient by the last shared layer and L_k(0) its first loss,

    G_k = w_k n_k,        r_k = (L_k / L_k(0)) / mean_j (L_j / L_j(0)),
    target_k = mean_j(G_j) r_k^alpha,

the weights take a gradient step on ``sum_k |G_k - target_k|`` with the targets held constant, so
``dw_k = sign(G_k - target_k) n_k``, and are then scaled to sum to K. A task that trains slowly has
a large r_k, and its gradient shall be larger. The model's step uses the weights before that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gradients import Method, View

FLOOR = 1e-8  # smaller losses count as this in the quotients
SMALLEST = 1e-6  # smallest weight
TIE = 1e-6  # relative difference from the target that counts as none


def gradnorm_targets(norms: Tensor, weights: Tensor, rates: Tensor, alpha: float) -> Tensor:
    """Targets (K,) of the weighted norms.

    Args:
        norms: n_k (K,), of the unweighted gradients.
        weights: w_k (K,).
        rates: L_k / L_k(0) (K,), not negative, at least one positive.
        alpha: strength of the pull towards equal training rates.
    """
    return (weights * norms).mean() * (rates / rates.mean()) ** alpha


def gradnorm_slope(norms: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
    """Derivative (K,) of ``sum_k |w_k n_k - target_k|`` by w, the targets held constant.

    Zero where the two are equal up to a millionth: the sign of a rounding error is noise.
    """
    gap = weights * norms - targets
    return torch.where(gap.abs() > TIE * targets, torch.sign(gap), 0.0) * norms


class GradNorm(Method):
    """GradNorm with plain gradient descent on the weights.

    Args:
        alpha: exponent of the training rates, 0 or more; 1.5 on NYUv2 and 0.12 on the toy problem
            in the paper. 0 asks for equal norms.
        lr: step size of the weights, positive. The slopes carry the units of the gradients, so it
            wants tuning; 0.025 is ours, the paper's value is not certain to us.
        last: number of shared scalars, from the end, whose gradient gives the norms. None: all
            shared parameters. For the paper's norms pass the size of the last shared layer, and
            that layer last in ``shared``; not for the feature level, where the columns are z.
        initial_losses: L_k(0), K positive numbers, for example log(classes); by default the first
            loss of each task.
        head_gradients: "weighted" (default: the model descends on sum_k w_k L_k) or "raw".

    Weights start at one and sum to K. Where tasks are absent from a batch, the present ones keep
    their sum and the absent ones their weights.

    * Whole gradients are taken for all tasks, where the paper needs those of one layer and one
      pass of the weighted sum: the same weights with `last`, at the cost of K passes.
    * Weights below 1e-6 are raised to it before scaling; in the paper a large step can turn a
      weight negative.
    * A weighted norm within a millionth of its target counts as on it, where the slope is zero.
    * Losses below 1e-8 count as 1e-8 in the rates, also zero and negative ones.
    """

    name = "gradnorm"
    title = "GradNorm"
    paper = "Chen et al., ICML 2018"
    year = 2018
    sees = "rows"
    state = "K weights, K first losses"
    # At the first step alone "scale" holds: the weights' steps are as long as the gradients.
    properties = frozenset({"permutation", "rotation"})

    def __init__(
        self,
        alpha: float = 1.5,
        lr: float = 0.025,
        last: int | None = None,
        initial_losses: Sequence[float] | None = None,
        *,
        head_gradients: str = "weighted",
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= alpha < float("inf") or not 0 < lr < float("inf"):
            raise ValueError(
                f"gradnorm: expected a finite alpha >= 0 and lr > 0, got alpha={alpha}, lr={lr}"
            )
        if last is not None and (last != int(last) or last < 1):
            raise ValueError(f"gradnorm: expected a whole number last >= 1 or None, got {last}")
        if initial_losses is not None:
            initial_losses = [float(loss) for loss in initial_losses]
            if not all(0 < loss < float("inf") for loss in initial_losses):
                raise ValueError(
                    f"gradnorm: expected positive initial_losses, got {initial_losses}"
                )
        self.alpha = alpha
        self.lr = lr
        self.last = last
        self.initial_losses = initial_losses

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        k, device = view.n_tasks, view.device
        given = self.initial_losses
        if given is not None and len(given) != k:
            raise ValueError(f"gradnorm: expected initial_losses for {k} tasks, got {len(given)}")
        first = torch.tensor([0.0] * k if given is None else given, dtype=torch.float64)
        return {
            "weights": torch.ones(k, dtype=torch.float64, device=device),
            "first": first.to(device),
            "seen": torch.full((k,), given is not None, device=device),
        }

    def _rule(self, view: View) -> Tensor:
        assert view.rows is not None
        size = view.rows.shape[1]
        if self.last is not None and self.last > size:
            raise ValueError(f"gradnorm: expected last <= {size} shared scalars, got {self.last}")
        rows = view.rows if self.last is None else view.rows[:, -self.last :]
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        at, state = view.index, self._state
        losses = view.losses.clamp(min=FLOOR)
        initial = torch.where(state["seen"][at], state["first"][at], losses)
        weights = state["weights"][at]
        targets = gradnorm_targets(norms, weights, losses / initial, self.alpha)
        moved = weights - self.lr * gradnorm_slope(norms, weights, targets)
        moved = moved.clamp(min=SMALLEST)
        after = {name: value.clone() for name, value in state.items()}
        after["weights"][at] = moved * (weights.sum() / moved.sum())
        after["first"][at] = initial
        after["seen"][at] = True
        self._state = after
        return weights
