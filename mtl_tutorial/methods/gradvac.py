"""GradVac: gradient vaccine.

Wang, Tsvetkov, Firat, Cao: "Gradient Vaccine: Investigating and Improving Multi-task Optimization
in Massively Multilingual Models", ICLR 2021, arXiv:2010.05874.

PCGrad acts where two gradients conflict. GradVac acts wherever they are less similar than usual:
it keeps a target cosine ``t_ij`` for every pair, a running mean of the cosines seen so far. For
every task i, start at ``v = g_i`` and go through the other tasks j in a random order; with
``phi = cos(v, g_j)``, wherever ``phi < t_ij``,

    v <- v + |v| (t sqrt(1 - phi^2) - phi sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)) g_j,

after which the cosine is t_ij exactly. Whether v was changed or not,

    t_ij <- (1 - beta) t_ij + beta phi.

The step is the sum of all v. Targets start at zero, so the first step is PCGrad's. As there, the
coefficients of v over unit gradients and the Gram matrix are all that is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View, upload

ORDERS = ("random", "fixed")
LARGEST_TARGET = 0.999  # a cosine of one is reached by an infinitely long correction alone


def visiting_orders(k: int, order: str, generator: torch.Generator | None = None) -> Tensor:
    """In which order each task goes through the others, (k, k - 1); as in PCGrad.

    Args:
        k: number of tasks.
        order: "random", drawn for every task on its own, or "fixed", by index.
        generator: source of the random orders, on the CPU.
    """
    if order == "random":
        scores = torch.rand(k, k, dtype=torch.float64, generator=generator)
    else:
        scores = torch.arange(k, dtype=torch.float64).repeat(k, 1)
    return scores.fill_diagonal_(torch.inf).argsort(dim=1)[:, : k - 1]


def gradvac_weights(
    gram: Tensor, targets: Tensor, orders: Tensor, beta: float, eps: float = 1e-14
) -> tuple[Tensor, Tensor]:
    """Weights of one GradVac step, and the targets of the next.

    Args:
        gram: Gram matrix (K, K).
        targets: target cosines (K, K), float64; the diagonal is not used.
        orders: visiting orders (K, K - 1), as from `visiting_orders`.
        beta: share of a new cosine in the running mean.
        eps: relative rounding error of `gram`; a v shorter than ``sqrt(K eps) |g_i|`` is counted
            as zero.

    Returns:
        Weights (K,) and targets (K, K), float64. Pairs with a zero gradient, or a v that earlier
        corrections made zero, have no cosine: no correction, target unchanged.
    """
    gram = gram.double()
    k = len(gram)
    norms = gram.diagonal().clamp(min=0).sqrt()
    alive = norms > 0
    inverse = torch.where(alive, 1 / torch.where(alive, norms, 1.0), 0.0)
    cosine = gram * inverse * inverse[:, None]
    tasks = torch.arange(k, device=gram.device)
    added = torch.zeros_like(gram)  # v_i / n_i = u_i + sum_j added_ij u_j
    inner = cosine  # (v_i / n_i) . u_j
    new = targets.clone()
    for j in upload(orders, gram.device).T:  # all tasks visit their next task at once
        squared = inner.diagonal() + (added * inner).sum(1)  # |v_i / n_i|^2
        known = (squared > k * eps) & alive[j]
        length = torch.where(known, squared, 1.0).sqrt()
        phi = torch.where(known, inner[tasks, j] / length, 0.0).clamp(-1, 1)
        target = targets[tasks, j].clamp(-LARGEST_TARGET, LARGEST_TARGET)
        amount = length * (target * ((1 - phi**2) / (1 - target**2)).sqrt() - phi)
        amount = torch.where(known & (phi < target), amount, 0.0)
        added[tasks, j] += amount
        inner = inner + amount[:, None] * cosine[j]
        new[tasks, j] += torch.where(known, beta * (phi - targets[tasks, j]), 0.0)
    return 1 + (norms @ added) * inverse, new


class GradVac(Method):
    """GradVac on all shared parameters at once.

    Args:
        beta: share of a new cosine in its running mean, 0 to 1; 0 keeps all targets at zero,
            which is PCGrad. The default 0.5 is that of released code (LibMTL, TorchJD); the paper
            is said to use 1e-2, which we could not check.
        order: "random", each task draws its own order at every step, or "fixed", by index.
        seed: of the random orders.
        head_gradients: "raw" (default: the surgery is on shared parameters) or "weighted".

    State: one target cosine per ordered pair of tasks.

    Deviations:

    * The paper also keeps targets per layer or per matrix. Here: for the whole trunk.
    * Released code adds 1e-8 to its denominators, which changes results for small gradients.
      Here: no constant, zero vectors are left out by their norm; targets act up to a cosine of
      0.999, since the correction towards one has no bound.
    * The scale is PCGrad's: a sum of K vectors.
    """

    name = "gradvac"
    title = "GradVac"
    paper = "Wang et al., ICLR 2021"
    year = 2021
    sees = "gram"
    state = "K x K target cosines, random generator"
    properties = frozenset({"scale", "rotation"})  # a permutation meets other random orders

    def __init__(
        self,
        beta: float = 0.5,
        order: str = "random",
        seed: int = 0,
        *,
        head_gradients: str = "raw",
    ) -> None:
        super().__init__(head_gradients=head_gradients, seed=seed)
        if not 0 <= beta <= 1:
            raise ValueError(f"gradvac: expected 0 <= beta <= 1, got {beta}")
        if order not in ORDERS:
            raise ValueError(f"gradvac: expected order {' or '.join(ORDERS)}, got {order!r}")
        self.beta = beta
        self.order = order
        self.seed = seed

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        k = view.n_tasks
        return {"targets": torch.zeros(k, k, dtype=torch.float64, device=view.device)}

    def _rule(self, view: View) -> Tensor:
        orders = visiting_orders(len(view.tasks), self.order, self._generator)
        at = view.index
        targets = self._state["targets"].clone()
        pairs = (at[:, None], at)
        weights, targets[pairs] = gradvac_weights(
            view.gram, targets[pairs], orders, self.beta, view.eps
        )
        self._state = {"targets": targets}
        return weights
