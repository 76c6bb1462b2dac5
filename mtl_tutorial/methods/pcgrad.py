"""PCGrad: projecting conflicting gradients.

Yu, Kumar, Gupta, Levine, Hausman, Finn: "Gradient Surgery for Multi-Task Learning", NeurIPS 2020,
arXiv:2001.06782.

Two tasks conflict where their gradients have a negative inner product. For every task i, start at
``v = g_i`` and go through the other tasks j in a random order: wherever v conflicts with g_j, drop
its part along g_j (Algorithm 1),

    v <- v - (v . g_j / |g_j|^2) g_j        if v . g_j < 0,

and step along the sum of all v. Every v stays in the span of the task gradients, so its
coefficients and the Gram matrix are all that is needed; here they are kept for unit gradients
``u_k = g_k / |g_k|``, where the projection is a subtraction without a division.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View, upload

ORDERS = ("random", "fixed")


def visiting_orders(k: int, order: str, generator: torch.Generator | None = None) -> Tensor:
    """In which order each task goes through the others.

    Args:
        k: number of tasks.
        order: "random", drawn for every task on its own, or "fixed", by index.
        generator: source of the random orders, on the CPU.

    Returns:
        int64 tensor (k, k - 1); row i holds every index but i once.
    """
    if order == "random":
        scores = torch.rand(k, k, dtype=torch.float64, generator=generator)
    else:
        scores = torch.arange(k, dtype=torch.float64).repeat(k, 1)
    return scores.fill_diagonal_(torch.inf).argsort(dim=1)[:, : k - 1]


def pcgrad_weights(gram: Tensor, orders: Tensor) -> Tensor:
    """Weights w, so that ``w @ J`` is the sum of the projected gradients.

    Args:
        gram: Gram matrix (K, K).
        orders: visiting orders (K, K - 1), as from `visiting_orders`.

    Returns:
        float64 tensor (K,), each 1 plus what other tasks' projections add. A zero gradient
        conflicts with nothing and keeps weight 1. Without a conflict all weights are 1.
    """
    gram = gram.double()
    norms = gram.diagonal().clamp(min=0).sqrt()
    inverse = norms.reciprocal().masked_fill(norms == 0, 0.0)
    cosine = gram * inverse * inverse.unsqueeze(1)
    taken = torch.zeros_like(gram)  # v_i / n_i = u_i - sum_j taken_ij u_j, each at most zero
    inner = cosine  # (v_i / n_i) . u_j
    for j in upload(orders, gram.device).unbind(1):  # all tasks visit their next task at once
        at = j.unsqueeze(1)
        amount = inner.gather(1, at).clamp_(max=0)
        taken.scatter_(1, at, amount)
        inner = inner.addcmul(amount, cosine.index_select(0, j), value=-1)
    return 1 - (norms @ taken) * inverse


class PCGrad(Method):
    """PCGrad (Algorithm 1).

    Args:
        order: "random" (the paper), each task draws its own order at every step; "fixed", by
            index. The order matters from three tasks on.
        reduction: "sum" (the paper) or "mean", 1/K of it.
        seed: of the random orders.
        head_gradients: "raw" (default: the surgery is on shared parameters) or "weighted".

    With two tasks the step conflicts with neither; from three tasks on it may conflict, since a
    later projection can undo an earlier one.

    Where released code differs, and what is done here:

    * tianheyu927/PCGrad shuffles a copy that it does not use, so its order is fixed. Here: random
      as in Algorithm 1; ``order="fixed"`` gives the other.
    * Several releases also project v_i on g_i itself, which matters from three tasks on, once
      v_i has turned against g_i. Here: other tasks alone, as in Algorithm 1.
    * WeiChengTseng/Pytorch-PCGrad always takes the mean. Here: the sum; under plain SGD the mean
      is a K times smaller learning rate.
    * A small constant is added to ``|g_j|^2`` in some releases. Here: none; a zero gradient is
      left out by its norm.
    """

    name = "pcgrad"
    title = "PCGrad"
    paper = "Yu et al., NeurIPS 2020"
    year = 2020
    sees = "gram"
    state = "random generator"
    properties = frozenset({"scale", "rotation"})  # a permutation meets other random orders

    def __init__(
        self,
        order: str = "random",
        reduction: str = "sum",
        seed: int = 0,
        *,
        head_gradients: str = "raw",
    ) -> None:
        super().__init__(head_gradients=head_gradients, seed=seed)
        if order not in ORDERS:
            raise ValueError(f"pcgrad: expected order {' or '.join(ORDERS)}, got {order!r}")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"pcgrad: expected reduction 'sum' or 'mean', got {reduction!r}")
        self.order = order
        self.reduction = reduction
        self.seed = seed

    def _rule(self, view: View) -> Tensor:
        orders = visiting_orders(len(view.tasks), self.order, self._generator)
        weights = pcgrad_weights(view.gram, orders)
        return weights / len(weights) if self.reduction == "mean" else weights
