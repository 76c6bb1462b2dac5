"""ConFIG: conflict-free inverse gradients, and its momentum form M-ConFIG.

Liu, Chu, Thuerey: "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
ICLR 2025, arXiv:2408.11104; official code tum-pbs/ConFIG.

The step should have the same cosine with every task gradient, and be as long as the task gradients
are along it. With unit gradients ``u_k = g_k / n_k`` as rows of U, and ``U^+`` its pseudo-inverse,

    e = U^+ 1 / |U^+ 1|,        d = (sum_k g_k . e) e.

Since ``U^+ = U^T C^+`` with the cosine matrix ``C = U U^T``, the weights need the Gram matrix
alone: with ``x = C^+ 1``,

    w_k = (x_k / n_k) (n . C x) / (x . C x).

M-ConFIG needs one backward pass per step: the tasks take turns, each keeps a running mean of its
own gradients, and the rule above is applied to the K means. Adam's second moment cannot follow from
one task at a time, so it is built from the gradient that would have given the combined mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..gradients import (
    Info,
    LossGraph,
    Method,
    View,
    gram_matrix,
    leaves_of,
    on_host,
    upload,
)

EPSILON = 1e-8  # of M-ConFIG's denominator, as in the official code and in Adam


def config_weights(gram: Tensor, preference: Tensor | None = None, eps: float = 1e-14) -> Tensor:
    """Weights of ConFIG.

    Args:
        gram: Gram matrix (K, K).
        preference: wanted ratios of the cosines (K,), positive; ones by default.
        eps: eigenvalues of the cosine matrix below ``K * eps`` count as zero.

    Returns:
        float64 tensor (K,), with a defined answer for every input:

        * zero gradients get weight zero, the others are solved among themselves;
        * linearly dependent gradients: the pseudo-inverse gives the nearest cosines in the sense
          of least squares; parallel gradients give their sum;
        * no direction at all (opposite gradients): zero.
    """
    gram = gram.double()
    norms = gram.diagonal().clamp(min=0).sqrt()
    alive = norms > 0
    inverse = torch.where(alive, 1 / torch.where(alive, norms, 1.0), 0.0)
    cosine = gram * inverse * inverse[:, None]
    wanted = alive.double()
    if preference is not None:
        wanted = wanted * preference.to(wanted) / preference.double().mean()
    x = _pseudo_solve((cosine + cosine.T) / 2, wanted, len(gram) * eps)
    cosines = cosine @ x  # of U^+ 1 with each task, times its length
    squared = x @ cosines  # |U^+ 1|^2, at least one where all cosines can be equal
    length = torch.where(squared > len(gram) * eps, (norms @ cosines) / squared, 0.0)
    return x * inverse * length


def _pseudo_solve(matrix: Tensor, right: Tensor, floor: float) -> Tensor:
    """``A^+ b``, with eigenvalues up to `floor` counted as zero."""
    if not on_host(matrix.device):
        try:  # here, so that a copy of this file works without it
            from ..device_solvers import pseudo_solve
        except ImportError:
            pass
        else:
            return pseudo_solve(matrix, right, floor)[0]
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    keep = eigenvalues > floor
    pinv = torch.where(keep, 1 / torch.where(keep, eigenvalues, 1.0), 0.0)
    return vectors @ (pinv * (vectors.T @ right))


class ConFIG(Method):
    """ConFIG.

    Args:
        preference: wanted ratios of the step's cosines with the tasks, K positive numbers; equal
            by default (the paper's direction weights).
        head_gradients: "raw" (default) or "weighted". The paper's networks have no heads.

    The direction is that of IMTL-G wherever the gradients are linearly independent, and that of
    Nash-MTL for two tasks; the length is the method's own, and the weights do not sum to one.

    Where the official code differs, and what is done here:

    * Its shortcut for two losses gives NaN for a zero gradient, and float32's rounding noise for
      opposite ones. Here: both are defined, see `config_weights`.
    * It solves a (K, P) least-squares problem. Here: the same through the Gram matrix.
    """

    name = "config"
    title = "ConFIG"
    paper = "Liu et al., ICLR 2025"
    year = 2025
    sees = "gram"

    def __init__(
        self, preference: Sequence[float] | None = None, *, head_gradients: str = "raw"
    ) -> None:
        super().__init__(head_gradients=head_gradients)
        if preference is not None:
            preference = [float(w) for w in preference]
            if not preference or not all(0 < w < float("inf") for w in preference):
                raise ValueError(
                    f"config: expected preference to be positive numbers, got {preference}"
                )
        self.preference = preference

    def _rule(self, view: View) -> Tensor:
        wanted = None
        if self.preference is not None:
            if len(self.preference) != view.n_tasks:
                raise ValueError(
                    f"config: expected a preference for each of {view.n_tasks} tasks, got "
                    f"{len(self.preference)}"
                )
            wanted = torch.tensor(self.preference, dtype=torch.float64)[view.tasks]
            wanted = upload(wanted, view.device)
        return config_weights(view.gram, wanted, view.eps)


class ConFIGMomentum(Method):
    """M-ConFIG: one task's backward pass per step; to be used with plain SGD.

    Task k's turn t_k updates its mean; with all means known, the step is

        m_k <- beta1 m_k + (1 - beta1) g_k,       d = ConFIG(m_1 / (1 - beta1^t_1), ...),
        f   <- d (1 - beta1^t),                   c = (f - beta1 f_before) / (1 - beta1),
        v   <- beta2 v + (1 - beta2) c^2,         step = d / (sqrt(v / (1 - beta2^t)) + 1e-8).

    Args:
        beta1: factor of the running means, 0 <= beta1 < 1.
        beta2: factor of the second moment, 0 <= beta2 < 1.

    The step is zero until every task has had a turn. It is Adam's kind of step, of the size of the
    learning rate whatever the size of the gradients, so do not step it with Adam again. A task's
    head receives its raw gradient in that task's turn alone, and no ``.grad`` otherwise.

    State: the means (K, P), f and v (P,), the numbers of turns and of steps, and whose turn it is.
    A task that is absent from the batch loses its turn. Under a scaler, on an accelerator, a
    skipped step counts as a turn too, since asking would stall the device.

    `direction` takes the row of the task whose turn it is and leaves the other rows unused. A
    non-finite gradient of another task is met in that task's turn.
    """

    name = "config_momentum"
    title = "M-ConFIG"
    paper = "Liu et al., ICLR 2025"
    year = 2025
    sees = "rows"
    passes = "1"
    state = "K x P means, 2 P, counters"
    feature_level = False
    properties: ClassVar[frozenset[str]] = (
        frozenset()
    )  # tasks take turns, coordinates have their own scale

    def __init__(self, beta1: float = 0.9, beta2: float = 0.999) -> None:
        super().__init__()
        if not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
            raise ValueError(
                f"config_momentum: expected 0 <= beta < 1, got beta1={beta1}, beta2={beta2}"
            )
        self.beta1 = beta1
        self.beta2 = beta2
        self._turn = 0
        self._step: Tensor | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"beta1": self.beta1, "beta2": self.beta2}

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        assert view.rows is not None
        k, p, device = view.n_tasks, view.rows.shape[1], view.device
        dtype = torch.promote_types(view.rows.dtype, torch.float32)
        return {
            "means": torch.zeros(k, p, dtype=dtype, device=device),
            "turns": torch.zeros(k, dtype=torch.float64, device=device),
            "before": torch.zeros(p, dtype=dtype, device=device),
            "squares": torch.zeros(p, dtype=dtype, device=device),
            "steps": torch.zeros((), dtype=torch.float64, device=device),
        }

    def _next(self, tasks: Sequence[int], n_tasks: int) -> int:
        """The first task of those present, counted from the one whose turn it is."""
        return min(tasks, key=lambda task: (task - self._turn) % n_tasks)

    def _rule(self, view: View) -> None:
        assert view.rows is not None
        task = self._next(view.tasks, view.n_tasks)
        self._turn = (task + 1) % view.n_tasks
        row = view.rows[view.tasks.index(task)]
        state, beta1, beta2 = self._state, self.beta1, self.beta2
        if state["means"].shape != (view.n_tasks, len(row)):
            raise ValueError(
                f"config_momentum: expected gradients of {tuple(state['means'].shape)} tasks x "
                f"parameters as in earlier steps, got {(view.n_tasks, len(row))}; pass the same "
                "shared at every step"
            )
        means, turns = state["means"].clone(), state["turns"].clone()
        means[task] = beta1 * means[task] + (1 - beta1) * row.to(means.dtype)
        turns[task] += 1
        known = (turns > 0).all()
        steps = state["steps"] + known
        corrected = means / (1 - beta1 ** turns.clamp(min=1)).to(means.dtype)[:, None]
        eps = View(rows=corrected).eps
        direction = config_weights(gram_matrix(corrected), eps=eps).to(means.dtype) @ corrected
        now = direction * (1 - beta1**steps)
        pseudo = (now - beta1 * state["before"]) / (1 - beta1)
        squares = beta2 * state["squares"] + (1 - beta2) * pseudo**2
        second = squares / (1 - beta2 ** steps.clamp(min=1))
        self._step = torch.where(known, direction / (second.sqrt() + EPSILON), 0.0)
        self._state = {
            "means": means,
            "turns": turns,
            "before": torch.where(known, now, state["before"]).to(means.dtype),
            "squares": torch.where(known, squares, state["squares"]).to(means.dtype),
            "steps": steps,
        }

    def _combine(self, weights: Tensor | None, rows: Tensor) -> Tensor:
        assert self._step is not None
        step, self._step = self._step, None
        return step.to(rows.dtype)

    def _backward_rows(self, graph: LossGraph, scale: Tensor | None) -> Info:
        """The engine's step on the graph of one task, the one whose turn it is."""
        task, turn = self._next(graph.present, graph.n_tasks), self._turn
        if on_host(graph.values.device) and scale is None:
            finite = graph.values[graph.present].isfinite()
            if not finite.all():
                self._raise(finite.tolist(), graph.present, "this step was not taken")
        i = graph.present.index(task)
        # The step moves what any task uses, not what this turn's task uses alone.
        used = {id(leaf) for edge in graph.edges for leaf in leaves_of(edge)}
        graph.used = [id(parameter) in used for parameter in graph.shared]
        graph.edges, graph.heads, graph.present = [graph.edges[i]], [graph.heads[i]], [task]
        info = super()._backward_rows(graph, scale)
        if on_host(info.finite.device) and not info.finite:
            self._turn = turn
        return info

    def state_dict(self) -> dict[str, Any]:
        """Adds whose turn it is."""
        return super().state_dict() | {"turn": self._turn}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._turn = state_dict["turn"]
