"""Cross-learning: every task its own parameters, none far from the others'.

Cervino, Bazerque, Calvo-Fullana, Ribeiro: "Multi-task Supervised Learning via Cross-learning",
arXiv:2010.12993 (2020).

Each task k has a copy theta_k of the shared parameters, and all copies stay near one free centre:

    minimise sum_k L_k(theta_k)    subject to    |theta_k - centre| <= radius for all k.

Radius 0 is one shared network, a large radius is one network per task. The method is projected
stochastic gradient descent: step every copy on its own loss, then move all copies v_k to the
nearest feasible ones. For a given centre those are

    theta_k = centre + min(1, radius / |v_k - centre|) (v_k - centre),

so the centre minimises the convex function ``1/2 sum_k max(|v_k - centre| - radius, 0)^2``. It lies
in the span of the copies: one Gram matrix of theirs, and the rest is O(K^2) numbers.

Only the paper's abstract was at hand; the projection is derived from the problem above.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..gradients import (
    Closure,
    Info,
    Losses,
    LossGraph,
    Method,
    add_gradient,
    all_finite,
    gram_matrix,
    optimizer_step,
    split_closure_output,
    takes_tasks,
)


def centre_coefficients(gram: Tensor, radius: float, steps: int = 100) -> Tensor:
    """The centre as a combination of the points, by Newton's method with a line search.

    Args:
        gram: Gram matrix (K, K) of the points, best taken around their mean.
        radius: 0 or more.
        steps: most Newton steps; about ten are the rule.

    Returns:
        float64 tensor (K,) on the CPU, sum one; 1/K each where the mean is a feasible centre.
    """
    gram = gram.double().cpu()
    k = len(gram)
    eye = torch.eye(k, dtype=torch.float64)
    scale = gram.diagonal().max()
    # K points in K dimensions with that Gram matrix: differences of them lose no digits.
    eigenvalues, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    points = vectors * eigenvalues.clamp(min=0).sqrt()

    def look(c: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        offsets = c @ points - points  # row i: centre - v_i
        distances = torch.linalg.vector_norm(offsets, dim=1)
        outside = distances > radius
        pull = torch.where(outside, 1 - radius / torch.where(outside, distances, 1.0), 0.0)
        value = ((distances - radius).clamp(min=0) ** 2).sum() / 2
        return offsets, distances, pull, value, pull @ offsets

    c = torch.full((k,), 1.0 / k, dtype=torch.float64)
    offsets, distances, pull, value, gradient = look(c)
    for _ in range(steps):
        if value <= 1e-30 * scale or gradient @ gradient <= 1e-30 * scale:
            break
        # Hessian: sum(pull) I + sum_i (1 - pull_i) r_i r_i^T over the points outside, with r_i the
        # unit vector from v_i to the centre. Newton's step is a combination of the r_i.
        outside = pull > 0
        units = offsets / torch.where(distances > 0, distances, 1.0)[:, None]
        curve = torch.where(outside, 1 - pull, 0.0)
        matrix = pull.sum() * eye + curve[:, None] * (units @ units.T)
        y = torch.linalg.solve(matrix, -pull * distances)
        move = torch.where(outside, y / torch.where(outside, distances, 1.0), 0.0) @ (c - eye)
        slope = (y @ units) @ gradient
        length = 1.0
        while length > 1e-6:
            new = look(c + length * move)
            # Near the end the value is exact to rounding only, but the gradient still tells.
            flat = new[3] <= value * (1 + 1e-12) and new[4].norm() < gradient.norm()
            if new[3] <= value + 1e-4 * length * slope or flat:
                break
            length /= 2
        if not (new[3] < value or new[4].norm() < gradient.norm()):
            break
        c = c + length * move
        offsets, distances, pull, value, gradient = new
    return c


def project_copies(points: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Nearest points that all lie within `radius` of one centre.

    Args:
        points: copies (K, P), one per row.
        radius: 0 or more, in the units of the parameters; infinity leaves the points as they are.

    Returns:
        The projected points (K, P) and their centre (P,), dtype of `points`. Where the points'
        mean is a feasible centre, the points themselves and the mean.
    """
    mean = points.mean(0)
    offsets = points - mean  # around the mean, so that near copies lose no digits in the Gram
    c = centre_coefficients(gram_matrix(offsets), radius)
    centre = mean + c.to(offsets) @ offsets
    distances = torch.linalg.vector_norm(points - centre, dim=1).double()
    outside = distances > radius
    pull = torch.where(outside, 1 - radius / torch.where(outside, distances, 1.0), 0.0)
    return points + pull[:, None].to(points) * (centre - points), centre


class CrossLearning(Method):
    """Cross-learning by projected stochastic gradient descent.

    Use `step` on an ordinary model with a trunk and K heads. The method keeps the K copies of the
    shared parameters; during a step the model holds one after the other, and between steps it
    holds the centre, one network for all tasks. To evaluate a task by its own copy::

        with method.use(task):
            evaluate(model, task)

    Args:
        radius: largest distance of a copy from the centre, 0 or more, in the units of the
            parameters: compare it with the norm of the shared parameters. The default 1.0 is
            ours, not the paper's.

    Heads belong to one task each and step with its copy. The optimiser keeps its state (momentum,
    Adam's moments) per copy; the method puts it in place for each task's step and takes it out
    afterwards, so the optimiser's own ``state_dict`` has none of the shared parameters.

    State: copies (K, P) and their optimiser states. Pass the same ``shared`` at every step. A task
    that is absent from the batch takes no step, but the projection may move its copy with the
    others. Buffers, such as batch norm's running statistics, are not copied: every task's forward
    pass updates the model's.

    The paper also has a primal-dual form, whose cost depends on K alone. Here: the projection,
    whose cost beside one Gram matrix does too.
    """

    name = "cross_learning"
    title = "Cross-learning"
    paper = "Cervino et al., arXiv 2020"
    year = 2020
    family = "schedule"
    sees = "losses"
    passes = "1 per task, with a forward each"
    memory = "2 K x P"
    state = "K x P copies, K optimiser states"
    syncs = True  # the projection is solved on the host
    feature_level = False
    properties: ClassVar[frozenset[str]] = frozenset()  # no direction

    def __init__(self, radius: float = 1.0) -> None:
        super().__init__()
        if not radius >= 0:
            raise ValueError(f"cross_learning: expected radius >= 0, got {radius}")
        self.radius = radius
        self._shared: list[Tensor] = []
        self._moments: list[list[dict[str, Any]]] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"radius": self.radius}

    def step(
        self,
        closure: Closure,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """Forward and backward of each task at its copy, one optimiser step each, projection.

        Args:
            closure: computes and returns the losses (K,) of the batch; called K times, with None
                if it has a positional argument without default.
            optimizer: optimiser over shared and head parameters.
            shared, heads: as in `Method.backward`.
            scaler: gradient scaler, for float16; it counts the batch as one step.

        Returns:
            `Info` with each task's loss at its own copy; no weights, no Gram.

        Raises:
            FloatingPointError: a task's loss or gradient is not finite and there is no scaler;
                nothing was stepped.
        """
        if shared is not None:
            self._shared = [p for p in shared if p.requires_grad]
        heads = None if heads is None else [list(head) for head in heads]
        if not self._shared:  # one more forward pass, at the first step alone
            self._shared = self._graph(closure, shared, heads).shared
        device = self._shared[0].device
        scale = None if scaler is None else scaler.scale(torch.ones((), device=device))
        centre = self._flat()
        self._check_copies(centre)
        passes: list[_Pass] = []
        n_tasks = 1  # until the first pass tells
        try:
            while len(passes) < n_tasks:
                if self._state:
                    self._put(self._state["copies"][len(passes)])
                graph = self._graph(closure, self._shared, heads)
                n_tasks = graph.n_tasks
                passes.append(_Pass(graph, len(passes), scale))
        finally:
            self._put(centre)
        present = [task for task, each in enumerate(passes) if each.row is not None]
        finite = torch.stack([passes[task].finite for task in present])
        ok = finite.all()
        if not ok and scaler is None:
            self._raise(finite.tolist(), present, "this step was not taken")
        if not self._state:
            self._state = {"copies": centre.repeat(n_tasks, 1)}
            for parameter in self._shared:
                optimizer.state.pop(parameter, None)
        self._moments = self._moments or [[{} for _ in self._shared] for _ in range(n_tasks)]
        if ok:
            self._step_copies(optimizer, passes, present, scaler)
        else:
            assert scaler is not None
            optimizer.zero_grad(set_to_none=True)
            add_gradient(self._shared, [torch.full_like(p, torch.inf) for p in self._shared])
            optimizer_step(optimizer, scaler)  # finds the infinities, and skips
        return Info(torch.stack([each.loss for each in passes]), None, None, ok)

    def backward(
        self,
        losses: Losses,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        features: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """Not defined: raises RuntimeError."""
        raise RuntimeError(
            "cross_learning: expected a call of step(closure, optimizer), got backward(); every "
            "task has its own forward pass and its own optimiser step"
        )

    def direction(self, jacobian: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Not defined: raises TypeError."""
        raise TypeError(
            "cross_learning: K networks have no single direction; call step(closure, optimizer)"
        )

    def weights(self, x: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Not defined: raises TypeError."""
        raise TypeError("cross_learning: has no weights; call step(closure, optimizer)")

    @contextmanager
    def use(self, task: int, shared: Iterable[Tensor] | None = None) -> Iterator[None]:
        """Put a task's copy into the model for the length of a ``with`` block.

        Args:
            task: its index.
            shared: the shared parameters, as in `step`; those of the last step by default.

        Raises:
            RuntimeError: before the first step there are no copies.
        """
        if shared is not None:
            self._shared = [p for p in shared if p.requires_grad]
        if not self._state or not self._shared:
            raise RuntimeError(
                "cross_learning: expected copies of the shared parameters, got none so far; call "
                "step first, or pass shared= after loading a state"
            )
        before = self._flat()
        self._check_copies(before)
        self._put(self._state["copies"][task])
        try:
            yield
        finally:
            self._put(before)

    def state_dict(self) -> dict[str, Any]:
        """Adds the optimiser states of the copies."""
        moments = [[_cloned(values) for values in each] for each in self._moments]
        return super().state_dict() | {"moments": moments}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._moments = [[_cloned(values) for values in each] for each in state_dict["moments"]]

    def _step_copies(
        self,
        optimizer: torch.optim.Optimizer,
        passes: list[_Pass],
        present: list[int],
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """One optimiser step per copy, then the projection; the model then holds the centre."""
        copies = self._state["copies"].clone()
        for task in present:
            each = passes[task]
            self._put(copies[task])
            optimizer.zero_grad(set_to_none=True)
            # The gradients are finite by now. The scaler gets the last step, scaled, to count it.
            counts = scaler is not None and task == present[-1]
            up = each.scale if counts else None
            add_gradient(self._shared, _times(self._split(each), up))
            down = None if counts or each.scale is None else 1 / each.scale
            add_gradient(each.head, _times(each.head_gradients, down))
            for parameter, values in zip(self._shared, self._moments[task], strict=True):
                if values:
                    optimizer.state[parameter] = values
            optimizer_step(optimizer, scaler if counts else None)
            self._moments[task] = [optimizer.state.pop(p, {}) for p in self._shared]
            copies[task] = self._flat()
        copies, centre = project_copies(copies, self.radius)
        self._state = {"copies": copies}
        self._put(centre)

    def _graph(
        self,
        closure: Closure,
        shared: Iterable[Tensor] | None,
        heads: Sequence[Iterable[Tensor]] | None,
    ) -> LossGraph:
        with torch.enable_grad():
            output = closure(None) if takes_tasks(closure) else closure()
        losses, _ = split_closure_output(output)  # copies of the trunk share no features
        losses = losses if isinstance(losses, Tensor) else list(losses)
        graph = LossGraph(losses, ranks=self.ranks())
        graph.partition(shared, heads)
        return graph

    def _split(self, each: _Pass) -> list[Tensor | None]:
        """The row as gradients of the shared parameters; None for those the task does not use."""
        assert each.row is not None
        parts = each.row.split([p.numel() for p in self._shared])
        views = zip(parts, self._shared, each.used, strict=True)
        return [part.view(p.shape) if used else None for part, p, used in views]

    def _flat(self) -> Tensor:
        """The shared parameters as they are now, (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._shared])

    def _put(self, values: Tensor) -> None:
        """Write (P,) numbers into the shared parameters."""
        parts = values.split([p.numel() for p in self._shared])
        with torch.no_grad():
            for parameter, part in zip(self._shared, parts, strict=True):
                parameter.copy_(part.view(parameter.shape))

    def _check_copies(self, flat: Tensor) -> None:
        if self._state and self._state["copies"].shape[1] != len(flat):
            raise ValueError(
                f"cross_learning: expected {self._state['copies'].shape[1]} shared parameters as "
                f"in earlier steps, got {len(flat)}; pass the same shared at every step"
            )


class _Pass:
    """One task's loss and gradients, from the graph of a forward pass at its copy."""

    def __init__(self, graph: LossGraph, task: int, scale: Tensor | None) -> None:
        self.loss = graph.values[task]
        self.scale = scale
        self.row: Tensor | None = None
        if task not in graph.present:
            return
        i = graph.present.index(task)
        graph.edges, graph.heads, graph.present = [graph.edges[i]], [graph.heads[i]], [task]
        rows, head_gradients = graph.average(*graph.rows_and_head_gradients(scale))
        self.row, self.used = rows[0], list(graph.used)
        self.head, self.head_gradients = graph.heads[0], head_gradients[0]
        found = [self.row, *self.head_gradients]
        self.finite = self.loss.isfinite() & all_finite(found, self.loss.device)


def _times(gradients: list[Tensor | None], factor: Tensor | None) -> list[Tensor | None]:
    if factor is None:
        return [None if g is None else g.clone() for g in gradients]
    return [None if g is None else g * factor.to(g.dtype) for g in gradients]


def _cloned(values: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
