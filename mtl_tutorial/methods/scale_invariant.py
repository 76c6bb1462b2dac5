"""Scale-invariant weighting: the sum of the logarithms of the losses.

A baseline of Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: "Multi-Task Learning as
a Bargaining Game", ICML 2022, arXiv:2202.01017.

    minimise  sum_k log L_k,           w_k = 1 / L_k.

Multiplying a loss by a constant leaves the gradient of its logarithm as it is, so the units of a
loss do not matter at all. The geometric mean of the losses has the same direction and another
length.
"""

from __future__ import annotations

from torch import Tensor

from ..gradients import Method, View

FLOOR = 1e-8  # smaller losses count as this


def scale_invariant_weights(losses: Tensor) -> Tensor:
    """Weights ``1 / L_k`` (K,) in float64, at most 1e8."""
    return 1 / losses.double().clamp(min=FLOOR)


class ScaleInvariant(Method):
    """Sum of log losses.

    Args:
        head_gradients: "weighted" (default: one backward pass of the sum of logs) or "raw".

    The weights do not sum to one: normalising them would bring the units of the losses back.

    Deviation: losses below 1e-8 count as 1e-8, also zero and negative ones; the official code
    (AvivNavon/nash-mtl) has no guard and turns them into infinity or NaN.
    """

    name = "scale_invariant"
    title = "Scale-invariant"
    paper = "baseline of Navon et al., ICML 2022"
    year = 2022
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "none"

    def __init__(self, *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients)

    def _rule(self, view: View) -> Tensor:
        return scale_invariant_weights(view.losses)
