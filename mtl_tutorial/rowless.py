"""Gram matrix and weighted gradient of K tasks, without the K x P matrix of their gradients.

For a layer ``y = x W^T + b`` with input rows A (n, fan_in) and output gradients D_k (n, fan_out),
task k's gradients are ``dW_k = D_k^T A`` and ``db_k = D_k^T 1``. Hence, with <., .> the sum over
entries,

    <dW_j, dW_k> + <db_j, db_k> = <D_j, (A A^T + 1 1^T) D_k>,
    sum_k w_k dW_k = (sum_k w_k D_k)^T A,

and no ``dW_k`` is ever formed. By the rows it takes K n fan_in fan_out multiplications, this way
about n^2 (fan_in + K fan_out / 2): less as long as the layer sees fewer rows than inputs. A
convolution is such a layer over its patches. Every other shared parameter, one that is used twice,
and one that is cheaper so, keeps its K gradients, in one buffer.

Autograd is asked for the gradient of a layer's output in place of the weight's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .gradients import LossGraph, Scratch, form_of, gram_matrix
from .layers import Layer, find_layers

_FEW = 2**17  # floats in K x P below which looking for layers costs more than it can save
_WORTH = 2**24  # multiplications that it has to save
# Products and pointwise functions: through these one batched pass is quicker than K passes. Through
# convolution, pooling, normalisation and attention it is slower on the CPU, by up to half.
_BATCHED = frozenset(
    f"{name}Backward0"
    for name in (
        *("Addmm", "Mm", "T", "View", "UnsafeView"),
        *("Relu", "LeakyRelu", "Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "Softplus"),
    )
)


def plan(graph: LossGraph, always: bool = False) -> tuple[list[Layer], str]:
    """Layers to treat without rows, and the reason where there are none.

    Args:
        graph: the losses, partitioned.
        always: every layer that is recognised, unless its A A^T is larger than its K gradients;
            by default those where it saves multiplications, if it saves enough of them.
    """
    k, p = len(graph.edges), sum(parameter.numel() for parameter in graph.shared)
    if k == 1:
        return [], "one task in the batch"
    if not always and k * p < _FEW:
        return [], "a small model: looking for layers would cost more than it saves"
    layers = find_layers(graph)
    if not layers:
        return [], "no linear or convolutional layer in the graph whose weight is used once"
    if always:
        limit = max(k * p, 2**16)
        return [layer for layer in layers if layer.n**2 <= limit], "layers see too many rows"
    layers = [layer for layer in layers if layer.saved(k) > 0]
    if sum(layer.saved(k) for layer in layers) < _WORTH:
        return [], "rows are as cheap: the layers see more examples or pixels than they have inputs"
    return layers, ""


class Rowless:
    """What a step holds in place of rows: gradients of layers' outputs, and rows of the rest.

    Args:
        graph: the losses, partitioned; used up.
        layers: those to treat without rows.
        scratch: memory from earlier steps.
        scale: factor on every loss (AMP), 0-dimensional; heads' gradients keep it.

    Attributes:
        gram: (n, n) in float64, of the n present tasks.
        head_gradients: per present task, beside `graph.heads`.
    """

    def __init__(
        self, graph: LossGraph, layers: list[Layer], scratch: Scratch, scale: Tensor | None = None
    ) -> None:
        self.shared, self.layers = graph.shared, layers
        taken = {i for layer in layers for i in (layer.weight, layer.bias)}
        self.rest = [i for i in range(len(self.shared)) if i not in taken]
        self.inputs = [layer.input() for layer in layers]
        targets: list[Tensor | GradientEdge] = [GradientEdge(layer.node, 0) for layer in layers]
        targets += [self.shared[i] for i in self.rest]
        doors = _doors(graph)
        if doors is None:
            rows, self.head_gradients = graph.rows_and_head_gradients(
                scale, targets=targets, scratch=scratch
            )
            reached = graph.reached
            sizes = [layer.shape.numel() for layer in layers]
            *self.cotangents, self.rows = rows.split([*sizes, rows.shape[1] - sum(sizes)], dim=1)
        else:
            entering, self.head_gradients = graph.rows_and_head_gradients(
                scale, keep_graph=True, targets=doors, scratch=scratch
            )
            reached = [True] * len(targets)
            parts = _together(doors, entering, targets)
            self.cotangents, rest = parts[: len(layers)], parts[len(layers) :]
            self.rows = torch.cat(rest, 1) if rest else entering.new_zeros(len(entering), 0)
        self.used = [False] * len(self.shared)
        for layer, seen in zip(layers, reached, strict=False):
            for i in (layer.weight, layer.bias):
                if i is not None:
                    self.used[i] = seen
        for i, seen in zip(self.rest, reached[len(layers) :], strict=True):
            self.used[i] = seen
        self._scratch = scratch
        self.gram = gram_matrix(self.rows)
        for layer, x, d in zip(layers, self.inputs, self.cotangents, strict=True):
            self.gram += layer.gram(x, d, scratch)

    def gradients(self, weights: Tensor) -> list[Tensor | None]:
        """Weighted sum of the tasks' gradients, beside the shared parameters; None where unused.

        Args:
            weights: (n,), any floating dtype.
        """
        found: list[Tensor | None] = [None] * len(self.shared)
        flat = weights.to(self.rows.dtype) @ self.rows
        parts = flat.split([self.shared[i].numel() for i in self.rest])
        for i, part in zip(self.rest, parts, strict=True):
            found[i] = part.view(self.shared[i].shape)
        for layer, x, cotangents in zip(self.layers, self.inputs, self.cotangents, strict=True):
            d = weights.to(cotangents.dtype) @ cotangents
            found[layer.weight], bias = layer.gradients(x, d.view(layer.shape), self._scratch)
            if layer.bias is not None:
                found[layer.bias] = bias
        return [g if used else None for g, used in zip(found, self.used, strict=True)]


def _doors(graph: LossGraph) -> list[GradientEdge] | None:
    """Edges by which the heads enter the trunk, if one batched pass from there on is quicker.

    The trunk is what more than one task passes through. None where a node of it is slower batched,
    where a parameter is on the wrong side of the doors, or where one door is behind another.
    """
    shared = {id(parameter) for parameter in graph.shared}
    owners = graph.owners
    doors = {(e.node, e.output_nr): None for e in graph.edges if owners[e.node] is None}
    within: set[Node] = set()
    n_shared = 0
    for node, owner in owners.items():
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if (owner is None) != (id(leaf) in shared):
                return None
            n_shared += owner is None
        elif owner is None:
            if node.name() not in _BATCHED:
                return None
            within.update(parent for parent, _ in node.next_functions if parent is not None)
        else:
            for parent, number in node.next_functions:
                if parent is not None and owners[parent] is None:
                    doors[parent, number] = None
    if n_shared < len(shared) or any(
        node in within or hasattr(node, "variable") for node, _ in doors
    ):
        return None
    return [GradientEdge(node, number) for node, number in doors]


def _together(
    doors: Sequence[GradientEdge], entering: Tensor, targets: Sequence[Tensor | GradientEdge]
) -> list[Tensor]:
    """All tasks through the trunk in one batched pass: per target, gradients (K, numel)."""
    k = len(entering)
    shapes = [form_of(door)[0] for door in doors]
    parts = entering.split([shape.numel() for shape in shapes], dim=1)

    def trunk(*cotangents: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(doors, targets, cotangents)  # type: ignore[arg-type]

    cotangents = [part.reshape(k, *shape) for part, shape in zip(parts, shapes, strict=True)]
    return [gradient.reshape(k, -1) for gradient in torch.vmap(trunk)(*cotangents)]
