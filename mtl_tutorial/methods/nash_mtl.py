"""Nash-MTL: the step as the Nash bargaining solution between the tasks.

Navon, Shamsian, Achituve, Maron, Kawaguchi, Chechik, Fetaya: "Multi-Task Learning as a Bargaining
Game", ICML 2022, arXiv:2202.01017.

Among the steps d in a ball, the tasks agree on the one that maximises ``sum_k log(g_k . d)``. It is
``d = sum_k alpha_k g_k`` with

    G alpha = 1 / alpha,   alpha > 0.

That is the stationary point of the convex function ``1/2 alpha'G alpha - sum_k log alpha_k``, so
Newton's method finds it. Two facts follow: ``|d|^2 = alpha'G alpha = K``, and scaling a loss
changes alpha but not d. For two tasks d is proportional to the sum of the unit gradients.

This file needs torch, gradients.py and solvers.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gradients import Method, View, on_host
from ..solvers import balanced_weights


def nash_weights(gram: Tensor, eps: float = 1e-14) -> Tensor:
    """Weights alpha of the Nash bargaining solution, without any clipping.

    Args:
        gram: Gram matrix (K, K).
        eps: relative rounding error of its entries.

    Returns:
        float64 tensor (K,), positive but for the guards of `solvers.balanced_weights`: zero
        gradients get weight zero, a single gradient weight one, and at a Pareto stationary point,
        where there is nothing to agree on, the step is zero.
    """
    return balanced_weights(gram, 1.0, eps)


def clip_factor(gram: Tensor, weights: Tensor, max_norm: float) -> Tensor:
    """Factor in (0, 1] that shortens the weighted sum to `max_norm`; one if `max_norm` is 0."""
    length = (weights @ gram.double() @ weights).clamp(min=0).sqrt()
    if max_norm == 0:
        return torch.ones_like(length)
    return max_norm / length.clamp(min=max_norm)


class NashMTL(Method):
    """Nash-MTL.

    Args:
        max_norm: the shared step is shortened to this norm, 0 for no clipping. 1 (default) is the
            official code's; since |d|^2 = K, every step with two tasks or more then has norm 1.
        update_every: the weights are solved for at every so many-th step and reused in between;
            1 by default, as in the paper's main runs. A task that has no weights yet is always
            solved for. Here this saves the solver's time only, since all K passes are made at each
            step, and on an accelerator, where asking which step it is would stall, nothing.
        head_gradients: "weighted" (default, by alpha before clipping, as in the official code) or
            "raw".

    State: alpha (K,) of the last solution and the number of steps.

    Where the official code (AvivNavon/nash-mtl) differs, and what is done here:

    * It solves at most 20 convex programs with ECOS from the last alpha, and its stopping test
      compares quantities of different scale; unequal or small gradients end far from the solution.
      Here: damped Newton on the cosine matrix, to rounding error.
    * It needs a start alpha of ones, which stays where the first program fails. Here: none.
    * A single gradient, which the formula would normalise to length one, keeps its own length.
    """

    name = "nash_mtl"
    title = "Nash-MTL"
    paper = "Navon et al., ICML 2022"
    year = 2022
    sees = "gram"
    state = "K weights, steps"
    properties = frozenset({"permutation", "rotation"})  # the length of d is fixed

    def __init__(
        self, max_norm: float = 1.0, update_every: int = 1, *, head_gradients: str = "weighted"
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if not 0 <= max_norm < float("inf"):
            raise ValueError(f"nash_mtl: expected a finite max_norm >= 0, got {max_norm}")
        if update_every != int(update_every) or update_every < 1:
            raise ValueError(
                f"nash_mtl: expected a whole number update_every >= 1, got {update_every}"
            )
        self.max_norm = max_norm
        self.update_every = update_every

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        return {
            "alpha": torch.zeros(view.n_tasks, dtype=torch.float64, device=view.device),
            "steps": torch.zeros((), dtype=torch.int64, device=view.device),
        }

    def _rule(self, view: View) -> Tensor:
        alpha, steps, at = self._state["alpha"], self._state["steps"], view.index
        reused = alpha[at]
        due = (steps % self.update_every == 0) | (reused == 0).any()
        if not on_host(view.device) or due:
            reused = torch.where(due, nash_weights(view.gram, view.eps), reused)
            alpha = alpha.index_copy(0, at, reused)
        self._state = {"alpha": alpha, "steps": steps + 1}
        self._unclipped = reused
        return reused * clip_factor(view.gram, reused, self.max_norm)

    def _head_weights(self, weights: Tensor | None) -> Tensor | None:
        return None if self.head_gradients == "raw" else self._unclipped
