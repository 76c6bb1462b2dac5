"""GLS: the geometric mean of the losses.

Chennupati, Sistu, Yogamani, Rawashdeh: "MultiNet++: Multi-Stream Feature Aggregation and Geometric
Loss Strategy for Multi-Task Learning", CVPR Workshops 2019, arXiv:1904.08492.

    GLS = (L_1 L_2 ... L_K)^{1/K},       w_k = dGLS / dL_k = GLS / (K L_k).

Every loss enters by its logarithm, so the direction of the step does not depend on the units of a
loss; its length does, and it shrinks with the losses.
"""

from __future__ import annotations

from torch import Tensor

from ..gradients import Method, View

FLOOR = 1e-8  # smaller losses count as this


def geometric_mean(losses: Tensor) -> Tensor:
    """Geometric mean of positive losses (K,), 0-dimensional; through logarithms, no overflow."""
    return losses.clamp(min=FLOOR).log().mean().exp()


def geometric_weights(losses: Tensor) -> Tensor:
    """Derivatives ``GLS / (K L_k)`` (K,) of the geometric mean; finite for every finite loss."""
    losses = losses.double().clamp(min=FLOOR)
    return (losses.log().mean() - losses.log()).exp() / len(losses)


class Geometric(Method):
    """Geometric loss strategy (GLS).

    Args:
        head_gradients: "weighted" (default: one backward pass of the geometric mean) or "raw".

    The weights are the derivatives of the geometric mean: their product is K^-K, their sum is at
    least one. Tasks that are absent from a batch are left out of the mean.

    Deviation: losses below 1e-8 count as 1e-8, also zero and negative ones, for which the paper's
    formula has no derivative or no value.
    """

    name = "geometric"
    title = "GLS"
    paper = "Chennupati et al., CVPR Workshops 2019"
    year = 2019
    family = "loss"
    sees = "losses"
    passes = "1"
    memory = "none"

    def __init__(self, *, head_gradients: str = "weighted") -> None:
        super().__init__(head_gradients=head_gradients)

    def _rule(self, view: View) -> Tensor:
        return geometric_weights(view.losses)
