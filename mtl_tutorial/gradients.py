"""The engine: from K task losses to one step.

Read from top to bottom: the losses are split into one autograd edge per task (`LossGraph`), each
edge gives one row of the Jacobian (`task_gradients`), the rows give the Gram matrix
(`gram_matrix`), a rule turns what it looks at (`View`) into weights, and `Method.backward` writes
the weighted step into ``.grad``.

This file needs torch alone. A method file of `mtl_tutorial.methods` needs torch and this file.

Conventions, the same for every method:

* K tasks, P shared parameters (scalars, all shared tensors flattened one after the other).
* ``d = weights @ J`` is the direction that the optimiser *subtracts*; J is the (K, P) Jacobian.
* K x K algebra is done in float64, whatever the dtype of the gradients.
* Nothing here copies a value to the host on an accelerator, so no step waits for the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

if TYPE_CHECKING:
    from .layers import Entered, FromOutput, Layer
    from .parallel import Ranks

Losses = Tensor | Sequence[Tensor]
Closure = Callable[..., Any]

_BLOCK = 1024  # columns whose products are summed in float32 before the total goes on in float64


# ------------------------------------------------------------------------- tensors to tensors


def gram_matrix(rows: Tensor, others: Tensor | None = None) -> Tensor:
    """Gram matrix ``rows @ rows.T`` in float64, without a float64 copy of the rows.

    Products are summed in float32 over blocks of 1024 columns and the block sums are added in
    float64: over millions of columns this keeps about 7 digits, where one float32 product keeps 3.

    Args:
        rows: floating-point tensor (K, P).
        others: ``rows`` times a symmetric matrix (P, P), for the Gram matrix in its inner product
            ``rows @ others.T``; by default the rows themselves.

    Returns:
        float64 tensor (K, K), symmetric.
    """
    if rows.dtype == torch.float64 and others is None:
        return rows @ rows.T
    others = rows if others is None else others
    if rows.dtype == torch.float64:
        total = rows @ others.T
        return (total + total.T) / 2
    k, p = rows.shape
    rows, others = rows.float(), others.float()  # no copy of float32
    body = p - p % _BLOCK
    total = (rows[:, body:] @ others[:, body:].T).double()
    if body:
        left = rows[:, :body].view(k, -1, _BLOCK).transpose(0, 1)
        right = others[:, :body].view(k, -1, _BLOCK).permute(1, 2, 0)
        total = total + (left @ right).sum(0, dtype=torch.float64)
    return (total + total.T) / 2


def task_gradients(losses: Losses, parameters: Iterable[Tensor]) -> Tensor:
    """Jacobian of K losses: one row per task, all parameters flattened side by side.

    The graph is kept, so the losses can be differentiated again.

    Args:
        losses: tensor (K,) or K scalar tensors.
        parameters: tensors to differentiate by; frozen ones are left out, unused ones give zeros.

    Returns:
        Tensor (K, P) without graph. A loss that has no graph gives a row of zeros.

    Raises:
        ValueError: the losses have a wrong shape, or no parameter requires a gradient.
    """
    k = losses.numel() if isinstance(losses, Tensor) else len(losses)
    graph = LossGraph(losses)
    graph.partition(parameters, heads=[()] * k)
    rows, _ = graph.rows_and_head_gradients(keep_graph=True)
    if len(graph.present) == graph.n_tasks:
        return rows
    full = rows.new_zeros(graph.n_tasks, rows.shape[1])
    full[graph.present] = rows
    return full


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a small host tensor to the device, without waiting for what runs there."""
    if Constants.kept is not None:
        return Constants.kept.send(x, device)
    return _send(x, device)


def _send(x: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


class Constants:
    """The small tensors that a step uploads, kept for a recording of the same step.

    A recording (`mtl_tutorial.cuda_graph`) cannot upload: ``with Constants() as constants:`` around
    a step keeps what `upload` sends, and ``with constants.again():`` hands it out in that order.
    """

    kept: ClassVar[Constants | None] = None  # what `upload` asks at present

    def __init__(self) -> None:
        self._sent: list[tuple[Tensor, Tensor]] = []  # on the host and on the device
        self._left: list[tuple[Tensor, Tensor]] | None = None

    def __enter__(self) -> Constants:
        Constants.kept = self
        return self

    def __exit__(self, *_: object) -> None:
        Constants.kept = None

    def again(self) -> Constants:
        """The same tensors once more, from the first on."""
        self._left = list(self._sent)
        return self

    def send(self, x: Tensor, device: torch.device) -> Tensor:
        """The device's copy of a host tensor; RuntimeError for another one than in that step."""
        if self._left is None:
            self._sent.append((x.clone(), _send(x, device)))
            return self._sent[-1][1].clone()
        if not self._left or not torch.equal(self._left[0][0], x):
            raise RuntimeError("the host sends other numbers than in the step before")
        return self._left.pop(0)[1].clone()


def on_host(device: torch.device) -> bool:
    """Whether values on this device can be read without waiting for what it still has to do."""
    return device.type == "cpu"


def refuse_shards(parameters: Iterable[Tensor]) -> None:
    """Raise ValueError for parameters of ``fully_shard``: gradients by task do not reach them."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if any(hasattr(p, "full_tensor") for p in parameters):
        raise ValueError(
            "expected parameters that this process holds whole, got sharded ones (fully_shard); "
            "use DistributedDataParallel, or the step that the page on several processes shows"
        )


def add_gradient(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to ``.grad``, as ``backward`` does: parameters without one are left alone."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        gradient = gradient.to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def _bare(parameters: Iterable[Tensor]) -> bool:
    """Whether no parameter has a ``.grad`` yet, nor a hook that waits for one."""
    return all(
        p.grad is None and not getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters
    )


def all_finite(gradients: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Whether all entries of these gradients are finite, 0-dimensional bool on the device."""
    found = [g._values() if g.is_sparse else g for g in gradients if g is not None and g.numel()]
    if not found:
        return torch.ones((), dtype=torch.bool, device=device)
    if all(on_host(g.device) for g in found):
        # There, the largest entry's size takes twenty times as long as largest and smallest entry.
        fine = torch.stack([end for g in found for end in torch.aminmax(g)]).isfinite().all()
    else:
        fine = torch.nn.utils.get_total_norm(found, torch.inf).isfinite()
    return fine if fine.device == device else fine.to(device)


# ------------------------------------------------------------------------ the graph of K losses


def _split_losses(losses: Losses) -> tuple[Tensor, list[GradientEdge | None]]:
    """Values (K,) and one autograd edge per task; None for a loss without graph."""
    if isinstance(losses, Tensor):
        if losses.dim() != 1 or losses.numel() == 0:
            raise ValueError(
                f"expected losses of shape (K,), got {tuple(losses.shape)}; "
                "stack one scalar per task, for example torch.stack([loss_a, loss_b])"
            )
        node = losses.grad_fn
        if node is None:
            edges: list[GradientEdge | None] = [None] * losses.numel()
            if losses.requires_grad:
                edges = [get_gradient_edge(loss) for loss in losses.unbind()]
        elif node.name() == "StackBackward0":
            # Enter behind the stack: through it, every task's pass would run all K heads.
            edges = [GradientEdge(n, i) if n is not None else None for n, i in node.next_functions]
        else:
            edges = [get_gradient_edge(loss) for loss in losses.unbind()]
        return losses.detach(), edges
    losses = list(losses)
    bad = [i for i, loss in enumerate(losses) if not isinstance(loss, Tensor) or loss.numel() != 1]
    if bad or not losses:
        raise ValueError(
            "expected a tensor (K,) or a sequence of K scalar tensors as losses, "
            + (f"got something else for task {bad[0]}" if losses else "got an empty sequence")
        )
    losses = [loss if loss.dim() == 0 else loss.reshape(()) for loss in losses]
    values = torch.stack([loss.detach() for loss in losses])
    return values, [get_gradient_edge(loss) if loss.requires_grad else None for loss in losses]


def owners_of(edges: Sequence[GradientEdge], stop: Node | None = None) -> dict[Node, int | None]:
    """Every node behind the edges: the number of the one edge that leads to it, None if several do.

    In order of discovery; nothing behind the node `stop` is looked at.
    """
    owners: dict[Node, int | None] = {}
    for k, edge in enumerate(edges):
        stack = [edge.node]
        while stack:
            node = stack.pop()
            if node is stop:
                continue
            owner = owners.setdefault(node, -1)
            if owner is None or owner == k:
                continue
            # A second edge's visit goes on to all that lies behind, so no node is seen twice more.
            owners[node] = k if owner == -1 else None
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return owners


def form_of(target: Tensor | GradientEdge) -> tuple[torch.Size, torch.dtype, torch.device]:
    """Shape, dtype and device of a tensor, or of the gradient that enters an edge."""
    if isinstance(target, Tensor):
        return target.shape, target.dtype, target.device
    form = target.node._input_metadata[target.output_nr]
    return torch.Size(form.shape), form.dtype, form.device


class Scratch:
    """Buffers for the rows of one step and for what its layers pass through, used again later.

    On the CPU, fresh memory costs as much as filling it does; an accelerator's allocator keeps its
    memory itself.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def rows(self, k: int, p: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised tensor (k, p), valid until the next call."""
        return self.space("rows", (k, p), dtype, device)

    def space(
        self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """Uninitialised tensor, valid until the next call with this name."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        n = torch.Size(shape).numel()
        kept = self._kept.pop(name, None)
        if kept is None or kept.numel() < n or kept.dtype != dtype:
            kept = None  # free it before there is another one
            kept = torch.empty(n, dtype=dtype)
        self._kept[name] = kept
        return kept[:n].view(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Scratch, ()  # copies and files need no contents


def leaves_of(edge: GradientEdge, stop: Node | None = None) -> list[Tensor]:
    """Leaf tensors that require a gradient and that the edge depends on, in order of discovery."""
    found: list[Tensor] = []
    seen: set[Node] = set()
    stack = [edge.node]
    while stack:
        node = stack.pop()
        if node in seen or node is stop:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.append(leaf)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return found


def _sum_over(
    ranks: Ranks, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Sum over the ranks of gradients beside their parameters; None where no rank has one."""
    reached = ranks.agree(parameters, [g is not None for g in gradients])
    total = [
        (torch.zeros_like(p) if g is None else g.clone()) if reach else None
        for p, g, reach in zip(parameters, gradients, reached, strict=True)
    ]
    ranks.sum_in_place([g for g in total if g is not None])
    return total


class LossGraph:
    """K losses as autograd edges, and the parameters that they share.

    Args:
        losses: tensor (K,) or K scalar tensors. A loss without graph (``requires_grad`` false)
            marks a task that is absent from this batch.
        features: shared representation z, any shape, through which alone the losses depend on the
            shared parameters.
        ranks: the `parallel.Ranks` that hold one part of the batch each; None: all of it is here.

    Attributes:
        values: losses (K,), detached; averaged over the ranks.
        present: indices of the tasks that are in this batch, on whatever rank.
        shares: this rank's share of each task (K,), floats; None without ranks.
        uneven: whether some ranks have a task that others have not.
        edges: one autograd edge per present task.
        shared: list of shared parameters; set by `partition`.
        heads: head parameters per present task; set by `partition`.
        used: per shared parameter, whether a present task's gradient reaches it; set by
            `rows_and_head_gradients`.
        reached: the same for the targets that `rows_and_head_gradients` was given.

    Raises:
        ValueError: wrong shapes, no loss with a graph, or features without a graph.
    """

    def __init__(
        self, losses: Losses, features: Tensor | None = None, ranks: Ranks | None = None
    ) -> None:
        self.values, edges = _split_losses(losses)
        self.ranks = ranks
        self.shares: list[float] | None = None
        self.uneven = False
        if ranks is not None:
            edges = self._join(ranks, edges)
        self.n_tasks = len(edges)
        self.present = [k for k, edge in enumerate(edges) if edge is not None]
        self.edges = [edge for edge in edges if edge is not None]
        self.features = features
        self.shared: list[Tensor] = []
        self.heads: list[list[Tensor]] = []
        self.reached: list[bool] = []
        self._owners: dict[Node, int | None] | None = None
        self._entrances: list[Layer] | None = None
        if not self.edges:
            raise ValueError(
                "expected at least one loss that depends on a parameter, got losses without a "
                "graph; compute them outside torch.no_grad() and do not detach them"
            )
        if features is not None and features.grad_fn is None:
            raise ValueError(
                "expected features computed from the shared parameters, got a leaf tensor; pass "
                "the trunk's output before any detach()"
            )

    def _join(self, ranks: Ranks, edges: list[GradientEdge | None]) -> list[GradientEdge | None]:
        """Average the losses; a task that only other ranks have gets a graph without gradients."""
        device = self.values.device
        self.shares, holders = ranks.shares([edge is not None for edge in edges], device)
        self.uneven = any(0 < n < ranks.size for n in holders)
        average = ranks.average(self.values, self.shares)
        known = upload(torch.tensor([n > 0 for n in holders]), device)
        self.values = torch.where(known, average, self.values)
        with torch.enable_grad():
            nothing = get_gradient_edge(torch.zeros_like(self.values[0], requires_grad=True) * 1)
        return [nothing if e is None and n else e for e, n in zip(edges, holders, strict=True)]

    def _factors(self, like: Tensor) -> Tensor:
        """This rank's shares of the present tasks (n,), device and dtype of `like`."""
        assert self.shares is not None
        shares = torch.tensor([self.shares[k] for k in self.present], dtype=like.dtype)
        return upload(shares, like.device)

    @property
    def owners(self) -> dict[Node, int | None]:
        """`owners_of` the present tasks' edges, as far as the features."""
        if self._owners is None:
            stop = None if self.features is None else self.features.grad_fn
            self._owners = owners_of(self.edges, stop)
        return self._owners

    @property
    def entrances(self) -> list[Layer]:
        """`layers.entrances`: linear layers by which the heads take the features in, if they do."""
        if self._entrances is None:
            try:
                from .layers import entrances  # here, so that this file by itself needs torch alone
            except ImportError:
                self._entrances = []
            else:
                self._entrances = entrances(self)
        return self._entrances

    def _leaves(self) -> list[tuple[Tensor, int | None]]:
        """Leaves among `owners`, and their owners."""
        pairs = ((getattr(node, "variable", None), k) for node, k in self.owners.items())
        return [(leaf, k) for leaf, k in pairs if leaf is not None]

    @property
    def present_values(self) -> Tensor:
        """Losses (n,) of the present tasks, detached."""
        if len(self.present) == self.n_tasks:
            return self.values
        return torch.stack([self.values[k] for k in self.present])

    def partition(
        self,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
    ) -> None:
        """Tell shared parameters from those of the heads; frozen ones are left out.

        Args:
            shared: shared parameters. Without it: every leaf that at least two losses depend on
                (with one task, every leaf; with features, every leaf behind them).
            heads: K iterables of parameters, one per task. Without it: every other leaf.

        Raises:
            ValueError: no shared parameter to train, wrong number of heads, or a shared parameter
                that a loss reaches around the features.
        """
        if shared is None or heads is None:
            self._need_told()
        found = self._infer_shared() if shared is None else shared
        self.shared = [p for p in found if p.requires_grad]
        refuse_shards(self.shared)
        if not self.shared:
            raise ValueError(
                "expected at least one shared parameter that requires a gradient, got none; pass "
                "shared=model.trunk.parameters() (a generator can be used once only)"
            )
        self.heads = self._infer_heads() if heads is None else self._check_heads(heads)
        self.used = [False] * len(self.shared)

    def _need_told(self) -> None:
        """Parameters cannot be found in graphs that differ from rank to rank."""
        if self.uneven:
            raise ValueError(
                "expected shared and heads, since a task is absent on some ranks, got none; pass "
                "shared= and heads= to the method, on every rank"
            )

    def _check_heads(self, heads: Sequence[Iterable[Tensor]]) -> list[list[Tensor]]:
        if len(heads) != self.n_tasks:
            raise ValueError(
                f"expected heads for {self.n_tasks} tasks, got {len(heads)}; pass one iterable "
                "of parameters per loss, in the order of the losses"
            )
        return [[p for p in heads[k] if p.requires_grad] for k in self.present]

    def _infer_heads(self) -> list[list[Tensor]]:
        shared = {id(p) for p in self.shared}
        leaves = self._leaves()
        if self.features is not None and any(id(leaf) in shared for leaf, _ in leaves):
            raise ValueError(
                "expected the losses to depend on the shared parameters through features alone, "
                "got a shared parameter that a head uses as well; leave features out or move "
                "that parameter out of shared"
            )
        others = [(leaf, k) for leaf, k in leaves if id(leaf) not in shared]
        return [
            [leaf for leaf, owner in others if owner is None or owner == k]
            for k in range(len(self.edges))
        ]

    def _infer_shared(self) -> list[Tensor]:
        if self.features is not None:
            return leaves_of(get_gradient_edge(self.features))
        return [leaf for leaf, owner in self._leaves() if owner is None or self.n_tasks == 1]

    def rows_and_head_gradients(
        self,
        scale: Tensor | None = None,
        keep_graph: bool = False,
        targets: Sequence[Tensor | GradientEdge] | None = None,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, list[list[Tensor | None]]]:
        """One backward pass per present task: its row, and the gradients of its head.

        Args:
            scale: factor on every loss (AMP), 0-dimensional. Rows are divided by it again, head
                gradients are not.
            keep_graph: whether the graph can be used again afterwards.
            targets: what to differentiate by; by default the features, else the shared parameters.
            scratch: where the rows' memory comes from; fresh memory by default.

        Returns:
            Rows (n, P) over the shared parameters, (n, numel) over the features, or over the
            targets side by side, of the n present tasks in one buffer; and per task a list of
            gradients beside `heads`.
        """
        scratch = Scratch() if scratch is None else scratch
        if targets is None and self.entrances:
            from .layers import Entered

            entered = Entered(self, self.entrances, scale)
            self.reached = [True]
            return entered.rows(scratch), entered.head_gradients
        own = targets is None and self.features is None
        keep_graph = keep_graph or self.features is not None
        if targets is None:
            targets = self.shared if self.features is None else [self.features]
        shapes, dtypes, devices = zip(*map(form_of, targets), strict=True)
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        sizes = [shape.numel() for shape in shapes]
        rows = scratch.rows(len(self.edges), sum(sizes), dtype, devices[0])
        self.reached = [False] * len(targets)
        head_gradients: list[list[Tensor | None]] = []
        columns = rows.split(sizes, dim=1)
        layers = self._from_outputs(targets, scratch)
        elsewhere = {place for layer in layers for place in layer.places}
        kept = [j for j in range(len(targets)) if j not in elsewhere]
        asked = [*(targets[j] for j in kept), *(layer.edge for layer in layers)]
        for i, (edge, head) in enumerate(zip(self.edges, self.heads, strict=True)):
            answers = torch.autograd.grad(
                [edge],
                [*asked, *head],  # type: ignore[arg-type]  # tensors beside edges are fine
                grad_outputs=None if scale is None else [scale.to(self.values.dtype)],
                retain_graph=keep_graph or i < len(self.edges) - 1,
                allow_unused=True,
            )
            views, copied = [], []
            for j, gradient in zip(kept, answers, strict=False):
                view = columns[j][i]
                if gradient is None:
                    view.zero_()
                else:
                    views.append(view.view(shapes[j]))
                    copied.append(gradient)
                    self.reached[j] = True
            if copied:
                torch._foreach_copy_(views, copied)
            for layer, gradient in zip(layers, answers[len(kept) :], strict=False):
                layer.take([columns[j][i] for j in layer.places], gradient)
                for j in layer.places:
                    self.reached[j] |= gradient is not None
            head_gradients.append(list(answers[len(asked) :]))
        for layer in layers:
            layer.finish()
        if own:
            self.used = [a or b for a, b in zip(self.used, self.reached, strict=True)]
        if scale is not None:
            rows /= scale.to(rows.dtype)
        return rows, head_gradients

    def _from_outputs(
        self, targets: Sequence[Tensor | GradientEdge], scratch: Scratch
    ) -> list[FromOutput]:
        """Layers among the targets whose gradients are computed here, from those of outputs."""
        try:
            from .layers import from_outputs  # here, so that this file by itself needs torch alone
        except ImportError:
            return []
        return from_outputs(self, targets, scratch)

    def head_gradients(self, scale: Tensor | None = None) -> list[list[Tensor | None]]:
        """Gradients of each present task's head alone, beside `heads`; the graph is kept.

        Averaged over the ranks.
        """
        outputs = None if scale is None else [scale.to(self.values.dtype)]
        gradients: list[list[Tensor | None]] = [
            list(torch.autograd.grad([edge], head, outputs, retain_graph=True, allow_unused=True))
            if head
            else []
            for edge, head in zip(self.edges, self.heads, strict=True)
        ]
        return gradients if self.ranks is None else self._average_heads(self.ranks, gradients)

    def average(
        self, rows: Tensor, head_gradients: list[list[Tensor | None]]
    ) -> tuple[Tensor, list[list[Tensor | None]]]:
        """Average over the ranks what `rows_and_head_gradients` gave; one process: nothing to do.

        Rows over features have a part of the joined batch in each rank's columns; all ranks'
        columns come back side by side.
        """
        if self.ranks is None:
            return rows, head_gradients
        head_gradients = self._average_heads(self.ranks, head_gradients)  # looks at the layout too
        rows *= self._factors(rows)[:, None]
        if self.features is None:
            self.ranks.sum_in_place([rows])
        else:
            rows, self._columns = self.ranks.beside(rows)
        return rows, head_gradients

    def _average_heads(
        self, ranks: Ranks, head_gradients: list[list[Tensor | None]]
    ) -> list[list[Tensor | None]]:
        parameters = [p for head in self.heads for p in head]
        found = [g for gradients in head_gradients for g in gradients]
        reached = ranks.agree(
            [*self.shared, *parameters], [*self.used, *(g is not None for g in found)]
        )
        self.used = reached[: len(self.used)]
        pairs = zip(parameters, found, strict=True)
        wanted = [
            (torch.zeros_like(p) if g is None else g.clone()) if reach else None
            for (p, g), reach in zip(pairs, reached[len(self.used) :], strict=True)
        ]
        each = iter(wanted)
        result = [[next(each) for _ in head] for head in self.heads]
        for factor, gradients in zip(self._factors(self.values), result, strict=True):
            for g in gradients:
                if g is not None:
                    g *= factor.to(g.dtype)
        ranks.sum_in_place([g for g in wanted if g is not None])
        return result

    def backward(self, factors: Sequence[Tensor], inputs: Sequence[Tensor] | None = None) -> None:
        """One backward pass of the present losses, times one factor each, into ``.grad``.

        Under ranks the sum over them goes there, and no hook of DistributedDataParallel fires.

        Args:
            factors: n 0-dimensional tensors, dtype of the losses.
            inputs: parameters that receive gradients; every leaf by default.
        """
        if self.ranks is None:
            torch.autograd.backward(self.edges, factors, inputs=inputs)
            return
        if inputs is None:
            self._need_told()
            inputs = list({id(p): p for edge in self.edges for p in leaves_of(edge)}.values())
        add_gradient(inputs, self.gradients(factors, inputs, keep_graph=False))

    def gradients(
        self, factors: Sequence[Tensor], inputs: Sequence[Tensor], keep_graph: bool = True
    ) -> Sequence[Tensor | None]:
        """Gradients of the sum of the present losses, times one factor each.

        Averaged over the ranks.
        """
        if self.ranks is not None:
            factors = [f * s for f, s in zip(factors, self._factors(self.values), strict=True)]
        found = torch.autograd.grad(
            self.edges, inputs, factors, retain_graph=keep_graph, allow_unused=True
        )
        return found if self.ranks is None else _sum_over(self.ranks, inputs, found)

    def gradients_finite(self) -> Tensor:
        """Whether ``.grad`` of every leaf of the losses is finite, 0-dimensional bool."""
        leaves = {id(p): p for edge in self.edges for p in leaves_of(edge)}
        # Of a task that only other ranks have, the leaves are not in this rank's graph.
        leaves |= {id(p): p for group in (self.shared, *self.heads) for p in group}
        return all_finite((p.grad for p in leaves.values()), self.values.device)

    def shared_gradients(self, direction: Tensor) -> list[Tensor | None]:
        """A direction, (P,) or the flattened features' (numel,), as gradients beside `shared`."""
        if self.features is None:
            parts = direction.split([p.numel() for p in self.shared])
            return [
                part.view(p.shape) if used else None
                for part, p, used in zip(parts, self.shared, self.used, strict=True)
            ]
        if self.ranks is not None:
            direction = direction[self._columns]
        cotangent = direction.view(self.features.shape)
        if self.ranks is None and _bare(self.shared):
            return self._filled(cotangent)
        found = torch.autograd.grad([self.features], self.shared, [cotangent], allow_unused=True)
        if self.ranks is not None:
            return _sum_over(self.ranks, self.shared, found)
        # Autograd may hand out one tensor, or an expanded one, for several parameters.
        return [None if g is None else g.clone() for g in found]

    def _filled(self, cotangent: Tensor) -> list[Tensor | None]:
        """The features' pass into empty ``.grad``, where autograd copies only what others hold."""
        assert self.features is not None
        try:
            torch.autograd.backward([self.features], [cotangent], inputs=self.shared)
        finally:
            found = [p.grad for p in self.shared]
            for p in self.shared:
                p.grad = None
        return found

    def add_heads(
        self, gradients: list[list[Tensor | None]], weights: Tensor | None, ok: Tensor | None
    ) -> None:
        """Add the heads' gradients, times one weight per present task where weights are given.

        Where the 0-dimensional bool `ok` is given and false, zeros are added.
        """
        for i, (head, gradient) in enumerate(zip(self.heads, gradients, strict=True)):
            if weights is not None:
                factor = weights[i]
                gradient = [None if g is None else g * factor.to(g.dtype) for g in gradient]
            if ok is not None:
                gradient = [None if g is None else torch.where(ok, g, 0.0) for g in gradient]
            if weights is None and ok is None:
                # Autograd may hand out one tensor, or an expanded one, for several parameters.
                gradient = [None if g is None else g.clone() for g in gradient]
            add_gradient(head, gradient)


# ------------------------------------------------------------------------- a rule and its method


class View:
    """What a rule may look at, of the n tasks present in the batch.

    Attributes:
        losses: (n,) in float64.
        rows: (n, P) in the dtype of the gradients, or None where only a Gram matrix is known.
        gram: (n, n) in float64, computed from the rows when first asked for.
        tasks: indices of the present tasks among all `n_tasks` tasks.
        eps: relative rounding error that the entries of `gram` may carry.

    Args:
        dtype: of the gradients behind a Gram matrix that is given; float64 counts as exact.
    """

    def __init__(
        self,
        *,
        losses: Tensor | None = None,
        rows: Tensor | None = None,
        gram: Tensor | None = None,
        tasks: Sequence[int] | None = None,
        n_tasks: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        source = next(x for x in (rows, gram, losses) if x is not None)
        n = source.shape[0]
        self._losses = None if losses is None else losses.double()
        self._gram = None if gram is None else gram.double()
        self.rows = rows
        self.tasks = list(range(n)) if tasks is None else list(tasks)
        self.n_tasks = n if n_tasks is None else n_tasks
        self.device = source.device
        # Float64 sums over P columns lose a few digits, hence the factor.
        exact = (source.dtype if dtype is None else dtype) == torch.float64
        self.eps = 1e-14 if exact else torch.finfo(torch.float32).eps

    @property
    def index(self) -> Tensor:
        """`tasks` as an int64 tensor (n,) on the device, to index state with.

        A list as an index is copied to the device at every use, and the host waits for that.
        """
        return upload(torch.tensor(self.tasks), self.device)

    @property
    def has_losses(self) -> bool:
        return self._losses is not None

    @property
    def known_gram(self) -> Tensor | None:
        """The Gram matrix where it is known already, else None."""
        return self._gram

    @property
    def losses(self) -> Tensor:
        if self._losses is None:
            raise TypeError("this rule weighs losses: pass losses, a Jacobian is not enough")
        return self._losses

    @property
    def gram(self) -> Tensor:
        if self._gram is None:
            if self.rows is None:
                raise TypeError("this rule weighs gradients: pass a Jacobian or a Gram matrix")
            self._gram = gram_matrix(self.rows)
        return self._gram

    def blank(self, ok: Tensor) -> None:
        """Replace what a rule sees by harmless values where the 0-dimensional `ok` is false."""
        if self._losses is not None:
            self._losses = torch.where(ok, self._losses, 1.0)
        if self._gram is not None:
            self._gram = torch.where(
                ok, self._gram, torch.eye(len(self._gram), out=torch.empty_like(self._gram))
            )
        elif self.rows is not None:
            self.rows = torch.where(ok, self.rows, 0.0)


@dataclass
class Info:
    """What one step did. Tensors stay on the device, so reading them is the caller's choice.

    Attributes:
        losses: (K,), detached; as given, so absent tasks keep their value.
        weights: (K,) factors of the raw task gradients in the shared step, zero for absent tasks;
            None where a rule has no weights.
        gram: (n, n) float64 Gram matrix of the present tasks; None where none was computed.
        finite: 0-dimensional bool; False where the step was skipped.
        path: what was computed: "losses", weights from losses and one backward pass; "features",
            gradients by the features; "rows", the gradients of all tasks; "gram", their Gram matrix
            with some layers' gradients left out (`mtl_tutorial.rowless`); "" for a schedule.
        reason: why rows were computed where a Gram matrix would do; else "".
    """

    losses: Tensor
    weights: Tensor | None
    gram: Tensor | None
    finite: Tensor
    path: str = ""
    reason: str = ""


class Method:
    """A rule that turns K task gradients into one step; base class of all methods.

    A subclass sets the class attributes and writes `_rule`, and `_initial_state` if it has state.
    State lives in ``self._state`` as tensors and is replaced, never changed in place, so that a
    skipped step can put the old state back.

    Args:
        head_gradients: what head k receives: "raw", dL_k/dphi_k, or "weighted", the same times
            the task's weight. The default is what the method's paper does.
        seed: of a random rule's generator; None for a rule that draws nothing.

    Attributes:
        group: processes that train this model together, each on its part of the batch: a process
            group of `torch.distributed`; "auto" (default), the default group once it is
            initialised; or None, this process trains alone. See `mtl_tutorial.parallel`.
        path: how the Gram matrix is computed, which decides the time and memory of a step but not
            its outcome: "rows", from all tasks' gradients; "gram", without them wherever that is
            possible, else from rows; "auto" (default), what is cheaper. `Info` tells what was done.
    """

    name: ClassVar[str] = ""
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    year: ClassVar[int] = 0
    family: ClassVar[str] = "gradient"  # "loss", "gradient" or "schedule"
    sees: ClassVar[str] = "gram"  # natural input of the rule: "losses", "gram" or "rows"
    passes: ClassVar[str] = "K"  # backward passes through the trunk per step
    memory: ClassVar[str] = "K x P"  # beyond equal weighting
    state: ClassVar[str] = "none"
    syncs: bool = False  # whether the rule itself waits for the device
    feature_level: ClassVar[bool] = True  # whether the rule may look at dL_k/dz
    n_tasks: ClassVar[int | None] = None  # number of tasks, where the method demands one
    # What holds as an equality for `direction`, and is checked for every method by the tests:
    # "scale" d(cJ) = c d(J); "permutation" of the tasks; "rotation" of parameter space.
    properties: ClassVar[frozenset[str]] = frozenset({"scale", "permutation", "rotation"})

    def __init__(self, *, head_gradients: str = "raw", seed: int | None = None) -> None:
        if head_gradients not in ("raw", "weighted"):
            raise ValueError(f"expected head_gradients 'raw' or 'weighted', got {head_gradients!r}")
        self.head_gradients = head_gradients
        self.group: Any = "auto"
        self.path = "auto"
        # Drawn on the host on every device, so that a seed means the same numbers everywhere.
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._state: dict[str, Tensor] = {}
        self._shares: list[float] | None = None  # this rank's, of the last step
        self._scratch = Scratch()
        self._pending: list[tuple[Tensor, torch.cuda.Event, list[int]]] = []
        self._recorded: tuple[Tensor, list[int]] | None = None  # flags of a recorded step

    def ranks(self) -> Ranks | None:
        """The ranks of `group`; None where this process trains alone."""
        if self.group is None or not torch.distributed.is_available():
            return None
        if not torch.distributed.is_initialized():
            return None
        from .parallel import ranks_of  # here, so that this file by itself needs torch alone

        return ranks_of(self.group)

    # What a method defines ------------------------------------------------------------------

    def _rule(self, view: View) -> Tensor | None:
        """Weights (n,) in float64 of the present tasks; advances the state by one step.

        None where the step is no combination of the rows; `_combine` then makes it.
        """
        raise NotImplementedError

    def _initial_state(self, view: View) -> dict[str, Tensor]:
        """State before the first step, for `view.n_tasks` tasks."""
        return {}

    def _head_weights(self, weights: Tensor | None) -> Tensor | None:
        """Factors (n,) of the head gradients; None for one."""
        return None if self.head_gradients == "raw" else weights

    def next_epoch(self) -> None:
        """Tell the method that an epoch ends; most methods do nothing."""

    # The rule by itself ---------------------------------------------------------------------

    def weights(self, x: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Weights of the tasks, from the natural input of the rule (class attribute `sees`).

        For a method with state, one call is one step.

        Args:
            x: losses (K,), Gram matrix (K, K) or Jacobian (K, P), as `sees` says.
            losses: (K,), for rules that look at losses beside the gradients.

        Returns:
            Tensor (K,), dtype of `x`.

        Raises:
            ValueError: wrong shape.
            FloatingPointError: a non-finite entry, with the task; the state is unchanged.
        """
        dims = {"losses": "(K,)", "gram": "(K, K)", "rows": "(K, P)"}[self.sees]
        square = self.sees != "gram" or x.shape[:1] == x.shape[1:]
        if x.dim() != (1 if self.sees == "losses" else 2) or not square or x.shape[0] == 0:
            raise ValueError(
                f"{self.name}: expected {self.sees} of shape {dims}, got {tuple(x.shape)}"
            )
        inputs: dict[str, Any] = {"losses": losses, self.sees: x.detach()}
        with torch.no_grad():
            weights, _, _ = self._solve(View(**inputs))
        if weights is None:
            raise TypeError(f"{self.name}: has no weights, its step is made per coordinate")
        return weights.to(x.dtype)

    def direction(self, jacobian: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """The step that the optimiser subtracts, from the Jacobian alone.

        For a method with state, one call is one step.

        Args:
            jacobian: task gradients (K, P), one row per task.
            losses: (K,), needed by rules that weigh losses.

        Returns:
            Tensor (P,), dtype and device of `jacobian`.

        Raises:
            ValueError: `jacobian` is not a floating-point matrix with at least one row.
            TypeError: the rule needs losses and got none.
            FloatingPointError: a non-finite entry, with the task; the state is unchanged.
        """
        if jacobian.dim() != 2 or not jacobian.is_floating_point() or jacobian.shape[0] == 0:
            raise ValueError(
                f"{self.name}: expected a floating-point Jacobian (K, P), got "
                f"{jacobian.dtype} of shape {tuple(jacobian.shape)}"
            )
        jacobian = jacobian.detach()
        with torch.no_grad():
            weights, _, _ = self._solve(View(rows=jacobian, losses=losses))
            return self._combine(weights, jacobian)

    def _combine(self, weights: Tensor | None, rows: Tensor) -> Tensor:
        """Step (P,) from weights (n,) and rows (n, P)."""
        assert weights is not None
        return weights.to(rows.dtype) @ rows

    # One step of training -------------------------------------------------------------------

    def backward(
        self,
        losses: Losses,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        features: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """Fill ``.grad`` of shared and head parameters, in place of ``losses.sum().backward()``.

        Args:
            losses: tensor (K,) or K scalar tensors. A loss without graph marks a task that is
                absent from this batch: weight zero, state untouched.
            shared: shared parameters. Without it: every leaf that at least two losses depend on.
            heads: parameters of each task's head. Without it: every other leaf of the graph.
            features: shared representation z of the whole batch. With it, a gradient-balancing
                rule looks at dL_k/dz, flattened over batch and features, and the trunk is
                differentiated once (feature level). Rules that look at losses ignore it.
            scaler: gradient scaler, for float16. The rule sees unscaled gradients, ``.grad`` is
                left scaled for ``scaler.step``; after an overflow it holds infinities, so that
                the scaler skips the step, and the state is what it was.

        Returns:
            `Info`, with tensors on the device.

        Raises:
            ValueError: see `LossGraph`.
            FloatingPointError: a task's loss, or its gradient by a shared or head parameter, is not
                finite and there is no scaler. On the CPU at once, with ``.grad`` and state
                untouched; on an accelerator the error comes with a later call, since asking at
                once would stall the device, and until then the state is untouched and the step
                zero. The error names the task; behind the features the tasks are one sum, and it
                names all of the batch. A rule that sees losses alone has its losses checked alone;
                its gradients are what a plain backward pass gives.
        """
        self._raise_pending()
        if features is not None and not self.feature_level:
            raise ValueError(
                f"{self.name}: expected no features, since the method has no feature level, got "
                f"features of shape {tuple(features.shape)}; leave them out"
            )
        graph = LossGraph(losses, features, self.ranks())
        self._shares = graph.shares
        scale = None if scaler is None else scaler.scale(torch.ones((), device=graph.values.device))
        with torch.no_grad(), torch.autocast(graph.values.device.type, enabled=False):
            if self.sees == "losses":
                info = self._backward_losses(graph, shared, heads, scale)
                info.path = "losses"
                return info
            graph.partition(shared, heads)
            layers, reason = self._layers(graph)
            if layers:
                return self._backward_gram(graph, layers, scale)
            info = self._backward_rows(graph, scale)
            info.path = "rows" if features is None else "features"
            info.reason = reason
            return info

    def _backward_losses(
        self,
        graph: LossGraph,
        shared: Iterable[Tensor] | None,
        heads: Sequence[Iterable[Tensor]] | None,
        scale: Tensor | None,
    ) -> Info:
        """Weights first, then one backward pass of the weighted losses."""
        losses = graph.present_values
        view = View(losses=losses, tasks=graph.present, n_tasks=graph.n_tasks)
        before = None if scale is None else self._snapshot(view)
        weights, _, ok = self._solve(view, masked=scale is not None)
        assert weights is not None
        factors = weights if scale is None else torch.where(ok, weights * scale, torch.inf)
        outputs = [factor.to(losses.dtype) for factor in factors]
        if self.head_gradients == "weighted" and heads is None and not graph.uneven:
            graph.backward(outputs)
        elif self.head_gradients == "weighted":
            graph.partition(shared, heads)
            inputs = {id(p): p for group in (graph.shared, *graph.heads) for p in group}
            graph.backward(outputs, list(inputs.values()))
        else:
            graph.partition(shared, heads)
            gradients = graph.gradients(outputs, graph.shared)
            graph.add_heads(graph.head_gradients(scale), None, None)
            add_gradient(graph.shared, gradients)
        if before is not None:
            # Finite losses may still have overflowing gradients; the scaler will skip those too.
            ok = ok & graph.gradients_finite()
            self._keep(ok, before)
        return self._info(graph, weights, None, ok)

    def _layers(self, graph: LossGraph) -> tuple[list[Layer], str]:
        """Layers whose gradients need not be computed for each task, or why there are none."""
        if self.path not in ("auto", "rows", "gram"):
            raise ValueError(
                f"{self.name}: expected path 'auto', 'rows' or 'gram', got {self.path!r}"
            )
        if graph.features is not None:
            return [], ""
        if self.path == "rows":
            return [], "asked for"
        if not self._needs_gram_alone:
            return [], "the rule looks at the gradients themselves"
        if graph.ranks is not None:
            return [], "several processes: the products of their gradients would be missing"
        if any(p.grad is not None for p in graph.shared):
            return [], "gradients are accumulated: .grad of a shared parameter is there already"
        try:
            from . import rowless  # here, so that this file by itself needs torch alone
        except ImportError:
            return [], "rowless.py and layers.py are not both there"
        return rowless.plan(graph, always=self.path == "gram")

    @property
    def _needs_gram_alone(self) -> bool:
        """Whether the step is a combination of the rows with weights from their Gram matrix."""
        return self.sees == "gram" and type(self)._combine is Method._combine

    def _backward_gram(self, graph: LossGraph, layers: list[Layer], scale: Tensor | None) -> Info:
        """Gram matrix with the rows of these layers left out, weights, then the weighted sum."""
        from .rowless import Rowless

        parts = Rowless(graph, layers, self._scratch, scale)
        view = View(
            losses=graph.present_values,
            gram=parts.gram,
            tasks=graph.present,
            n_tasks=graph.n_tasks,
            dtype=parts.rows.dtype,
        )
        weights, head_weights, ok = self._solve(view, scale is not None, parts.head_gradients)
        assert weights is not None
        gradients = parts.gradients(weights)
        skip = ok if scale is None and not on_host(ok.device) else None
        gradients = [None if g is None else _masked(g, ok, scale) for g in gradients]
        add_gradient(graph.shared, gradients)
        graph.add_heads(parts.head_gradients, head_weights, skip)
        info = self._info(graph, weights, view.known_gram, ok)
        info.path = "gram"
        return info

    def _backward_rows(self, graph: LossGraph, scale: Tensor | None) -> Info:
        """One backward pass per task, then weights, then the weighted rows."""
        entered = self._entered(graph, scale)
        gram = rows = None
        if entered is None:
            # What such a rule sees and keeps are K x K numbers: nobody holds on to the rows.
            scratch = self._scratch if self._needs_gram_alone else None
            rows, head_gradients = graph.rows_and_head_gradients(scale, scratch=scratch)
            rows, head_gradients = graph.average(rows, head_gradients)
        else:
            gram, head_gradients = entered.gram(), entered.head_gradients
        view = View(
            losses=graph.present_values,
            rows=rows,
            gram=gram,
            tasks=graph.present,
            n_tasks=graph.n_tasks,
            dtype=None if graph.features is None else graph.features.dtype,
        )
        before = None if graph.features is None else self._snapshot(view)
        weights, head_weights, ok = self._solve(view, scale is not None, head_gradients)
        if entered is None:
            assert rows is not None
            direction = self._combine(weights, rows)
        else:
            assert weights is not None
            direction = entered.direction(weights)
        gradients = graph.shared_gradients(_masked(direction, ok, scale))
        if before is not None:
            # The trunk's own pass comes after the rule, and may overflow by itself.
            trunk = all_finite(gradients, ok.device)
            ok = ok & trunk
            self._keep(ok, before)
            if scale is None:
                self._remember(trunk.expand(len(graph.present)), graph.present)
                gradients = [None if g is None else _masked(g, ok, None) for g in gradients]
        skip = ok if scale is None and not on_host(ok.device) else None
        add_gradient(graph.shared, gradients)
        graph.add_heads(head_gradients, head_weights, skip)
        return self._info(graph, weights, view.known_gram, ok)

    def _entered(self, graph: LossGraph, scale: Tensor | None) -> Entered | None:
        """The heads' pass, if by it the Gram matrix is cheaper than with rows over the features."""
        if not (graph.entrances and self._needs_gram_alone) or graph.ranks is not None:
            return None
        from .layers import Entered, gram_is_cheaper

        layers = graph.entrances
        return Entered(graph, layers, scale) if gram_is_cheaper(layers) else None

    def step(
        self,
        closure: Closure,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """One training step: closure, zero the gradients, `backward`, optimiser step.

        Args:
            closure: computes and returns the losses (K,) of the current batch, or the pair
                (losses, features) for the feature level.
            optimizer: optimiser over shared and head parameters.
            shared, heads, scaler: as in `backward`.

        Returns:
            `Info` of the step.
        """
        refuse_shards(p for group in optimizer.param_groups for p in group["params"])
        with torch.enable_grad():
            output = closure()
        losses, features = split_closure_output(output)
        optimizer.zero_grad(set_to_none=True)
        info = self.backward(losses, shared=shared, heads=heads, features=features, scaler=scaler)
        optimizer_step(optimizer, scaler)
        return info

    # State ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on besides the model: a dict of tensors."""
        state = {k: v.clone() for k, v in self._state.items()}
        saved: dict[str, Any] = {"method": self.name, "state": state}
        if self._generator is not None:
            saved["generator"] = self._generator.get_state()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, into an object created with the same settings.

        Raises:
            ValueError: the state is another method's.
        """
        if state_dict.get("method") != self.name:
            raise ValueError(
                f"expected a state of {self.name}, got one of {state_dict.get('method')}; "
                "create the method that wrote the state"
            )
        self._state = {k: v.clone() for k, v in state_dict["state"].items()}
        if self._generator is not None:
            self._generator.set_state(state_dict["generator"].cpu())

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that create this method again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        settings = ", ".join(f"{k}={v!r}" for k, v in self.settings.items())
        return f"{type(self).__name__}({settings})"

    # How a rule is run safely ---------------------------------------------------------------

    def _solve(
        self,
        view: View,
        masked: bool = False,
        head_gradients: Sequence[Sequence[Tensor | None]] = (),
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Run the rule: weights (n,), head weights, and whether all input was finite.

        On an accelerator, and under a gradient scaler (`masked`), a bad step is blanked out by
        masks in place of an exception. The rule does not see the head gradients, if there are any,
        but they must be finite too.
        """
        finite = torch.ones(len(view.tasks), dtype=torch.bool, device=view.device)
        if view.has_losses:
            finite = finite & view.losses.isfinite()
        if view.rows is None:
            if view.known_gram is not None:
                # A bad task spoils its row and column; its own entry tells it from the others.
                good = view.gram.diagonal().isfinite()
                fine = view.gram.isfinite() | ~(good[:, None] & good)
                finite = finite & good & fine.all(1)
        elif self.sees == "rows":
            finite = finite & view.rows.amax(1).isfinite() & view.rows.amin(1).isfinite()
        elif self.sees == "gram":
            finite = finite & view.gram.diagonal().isfinite()
        if head_gradients:
            heads = [all_finite(gradients, view.device) for gradients in head_gradients]
            finite = finite & torch.stack(heads)
        ok = finite.all()
        if on_host(view.device):
            if not masked and not ok:
                self._raise(finite.tolist(), view.tasks, "this step was not taken")
            blank = not ok
        else:
            blank = True
            if not masked:
                self._remember(finite, view.tasks)
        if not self._state:
            self._state = self._initial_state(view)
        before = self._snapshot(view) if blank else None
        if blank:
            view.blank(ok)
        weights = self._rule(view)
        head_weights = self._head_weights(weights)
        if before is not None:
            self._keep(ok, before)
            if head_weights is not None:
                head_weights = torch.where(ok, head_weights, 0.0)
        return weights, head_weights, ok

    def _snapshot(self, view: View) -> tuple[dict[str, Tensor], Tensor | None]:
        """State, the initial one before the first step, and generator state, for `_keep`."""
        drawn = None if self._generator is None else self._generator.get_state()
        return self._state or self._initial_state(view), drawn

    def _keep(self, ok: Tensor, before: tuple[dict[str, Tensor], Tensor | None]) -> None:
        """Put the state of `before` back where `ok` is false.

        On an accelerator a generator, which lives on the host, has drawn one step's numbers more.
        """
        state, drawn = before
        if not on_host(ok.device):
            self._state = {k: torch.where(ok, v, state[k]) for k, v in self._state.items()}
        elif not ok:
            self._state = state
            if self._generator is not None and drawn is not None:
                self._generator.set_state(drawn)

    def _info(
        self, graph: LossGraph, weights: Tensor | None, gram: Tensor | None, ok: Tensor
    ) -> Info:
        full = weights
        if weights is not None and len(graph.present) < graph.n_tasks:
            full = weights.new_zeros(graph.n_tasks)
            for k, weight in zip(graph.present, weights, strict=True):
                full[k] = weight
        return Info(graph.values, full, gram, ok)

    def _raise(self, finite: list[bool], tasks: Sequence[int], what: str) -> None:
        bad = [k for k, fine in zip(tasks, finite, strict=True) if not fine]
        raise FloatingPointError(
            f"{self.name}: expected finite losses and gradients, got a non-finite one for task "
            f"{', '.join(map(str, bad))}; {what}. Look at that task's loss and data, lower the "
            "learning rate, or pass scaler= under float16"
        )

    def _remember(self, finite: Tensor, tasks: list[int]) -> None:
        """Start copying the flags to the host without waiting for them."""
        if finite.device.type != "cuda":
            if not finite.all():
                self._raise(finite.tolist(), tasks, "this step was not taken")
            return
        if torch.cuda.is_current_stream_capturing():  # to be copied after each replay
            earlier = self._recorded  # of the same step: of the features, before the trunk behind
            self._recorded = finite if earlier is None else finite & earlier[0], tasks
            return
        host = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event, tasks))

    def _raise_pending(self) -> None:
        while self._pending and self._pending[0][1].query():
            host, _, tasks = self._pending.pop(0)
            if not host.all():
                self._pending.clear()
                self._raise(host.tolist(), tasks, "an earlier step was skipped for it")


def _masked(x: Tensor, ok: Tensor, scale: Tensor | None) -> Tensor:
    """A gradient as it goes to ``.grad``: scaled, and blanked out where the step is skipped."""
    if scale is not None:
        return torch.where(ok, x * scale.to(x.dtype), torch.inf)
    return x if on_host(x.device) else torch.where(ok, x, 0.0)


def split_closure_output(output: Any) -> tuple[Losses, Tensor | None]:
    """Losses and features from what a closure returned: losses, or (losses, features)."""
    pair = isinstance(output, tuple) and len(output) == 2
    if pair and not (isinstance(output[0], Tensor) and output[0].dim() == 0):
        return output
    return output, None


def takes_tasks(closure: Closure) -> bool:
    """Whether a closure wants to be told the tasks: it has a positional argument without default.

    The argument of ``lambda batch=batch: ...`` is the caller's own.
    """
    return any(
        argument.default is argument.empty
        and argument.kind in (argument.POSITIONAL_ONLY, argument.POSITIONAL_OR_KEYWORD)
        for argument in inspect.signature(closure).parameters.values()
    )


def optimizer_step(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None
) -> None:
    """Step the optimiser, through the gradient scaler where there is one."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
