"""Gram matrix and weighted gradient of K tasks, without the K x P matrix of their gradients.

For a layer ``y = x W^T + b`` with input rows A (n, fan_in) and output gradients D_k (n, fan_out),
task k's gradients are ``dW_k = D_k^T A`` and ``db_k = D_k^T 1``. Hence, with <., .> the sum over
entries,

    <dW_j, dW_k> + <db_j, db_k> = <D_j, (A A^T + 1 1^T) D_k>,
    sum_k w_k dW_k = (sum_k w_k D_k)^T A,

and no ``dW_k`` is ever formed. By the rows it takes K n fan_in fan_out multiplications, this way
about n^2 (fan_in + K fan_out): less as long as the layer sees fewer rows than it has inputs. A
convolution is such a layer over its patches. Every other shared parameter, one that is used twice,
and one that is cheaper so, keeps its K gradients, in one buffer.

Layers are found in the autograd graph of the losses, so nobody has to hand over modules: the node
of a layer holds its input, and autograd is asked for the gradient of its output in place of the
weight's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn.grad import conv2d_weight

from .gradients import LossGraph, Scratch, form_of, gram_matrix

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


@dataclass
class Layer:
    """A linear or convolutional layer of the graph.

    Attributes:
        node: the autograd node whose output is the layer's.
        weight: its place among the shared parameters.
        bias: the place of the bias that the same node adds; None without one that is trained.
        weight_shape: (fan_out, fan_in), (fan_in, fan_out), or (fan_out, channels, height, width).
        flipped: whether a matrix stands as (fan_out, fan_in), which is how modules hold it.
        shape: of the output.
    """

    node: Node
    weight: int
    bias: int | None
    weight_shape: torch.Size
    flipped: bool
    shape: torch.Size

    @property
    def convolution(self) -> bool:
        return len(self.weight_shape) == 4

    @property
    def fan_out(self) -> int:
        return self.weight_shape[0] if self.flipped or self.convolution else self.weight_shape[1]

    @property
    def fan_in(self) -> int:
        return self.weight_shape.numel() // self.fan_out

    @property
    def n(self) -> int:
        """Rows of the product: examples, times pixels of the output."""
        return self.shape.numel() // self.fan_out

    def saved(self, k: int) -> int:
        """Multiplications that k tasks save; a tenth is kept back for what is not counted."""
        n, i, o = self.n, self.fan_in, self.fan_out
        without = n * n * i + k * n * n * o + k * k * n * o + n * i * o
        return int(0.9 * (k * n * i * o + k * k * i * o)) - without

    def input(self) -> Tensor:
        """What the node saved of the forward pass; autograd checks that it was not changed."""
        attribute = {"AddmmBackward0": "mat1", "MmBackward0": "self"}.get(self.node.name(), "input")
        return getattr(self.node, f"_saved_{attribute}").detach()

    def gram(self, x: Tensor, cotangents: Tensor) -> Tensor:
        """Gram matrix (K, K) of the layer's task gradients, in float64.

        Args:
            x: input of the layer.
            cotangents: K gradients of its output, (K, numel).
        """
        k = len(cotangents)
        d = cotangents.reshape(k, self.n, self.fan_out)
        if self.convolution:
            patches = torch.nn.functional.unfold(x, **self._geometry, kernel_size=self._kernel)
            x = patches.transpose(1, 2).reshape(self.n, self.fan_in)
            d = cotangents.reshape(k, self.shape[0], self.fan_out, -1).transpose(2, 3)
            d = d.reshape(k, self.n, self.fan_out)
        kernel = x @ x.T
        if self.bias is not None:
            kernel += 1
        return gram_matrix(d.reshape(k, -1), (kernel @ d).view(k, -1))

    def gradients(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias from input and gradient of the output."""
        if self.convolution:
            weight = conv2d_weight(x, self.weight_shape, d, **self._geometry)
            return weight, None if self.bias is None else d.sum((0, 2, 3))
        weight = d.T @ x if self.flipped else x.T @ d
        return weight, None if self.bias is None else d.sum(0)

    @property
    def _kernel(self) -> tuple[int, ...]:
        return tuple(self.weight_shape[2:])

    @property
    def _geometry(self) -> dict[str, tuple[int, ...]]:
        return {
            name: getattr(self.node, f"_saved_{name}") for name in ("stride", "padding", "dilation")
        }


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


def find_layers(graph: LossGraph) -> list[Layer]:
    """Layers whose weight is shared, used once, and a leaf up to its transpose."""
    uses: dict[Node, list[tuple[Node, int]]] = {}
    leaves: dict[int, Node] = {}
    for node in graph.owners:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = node
        for slot, (parent, _) in enumerate(node.next_functions):
            if parent is not None:
                uses.setdefault(parent, []).append((node, slot))
    place = {id(parameter): i for i, parameter in enumerate(graph.shared)}
    layers = []
    for i, weight in enumerate(graph.shared):
        end = leaves.get(id(weight))
        users = [] if end is None else uses.get(end, [])
        flipped = len(users) == 1 and users[0][0].name() == "TBackward0"
        if flipped:
            users = uses[users[0][0]]
        if len(users) != 1 or not _plain(weight):
            continue
        node, slot = users[0]
        shape, dtype, _ = form_of(GradientEdge(node, 0))
        layer = Layer(node, i, None, weight.shape, flipped, shape)
        if not _takes(node, slot, layer) or dtype != weight.dtype:
            continue
        layers.append(layer)
        if node.name() == "MmBackward0":
            continue
        end = node.next_functions[2 if layer.convolution else 0][0]
        bias = getattr(end, "variable", None)
        if end is None or bias is None or bias.shape != (layer.fan_out,):
            continue
        if len(uses[end]) == 1 and _plain(bias):
            layer.bias = place.get(id(bias))
    return layers


def _plain(parameter: Tensor) -> bool:
    """Whether nobody misses the parameter's own gradients: no hook, no subclass, no half floats."""
    return (
        type(parameter) in (Tensor, torch.nn.Parameter)
        and parameter.dtype in (torch.float32, torch.float64)
        and not parameter._backward_hooks
    )


def _takes(node: Node, slot: int, layer: Layer) -> bool:
    """Whether the node is a product or convolution of which the weight is the second factor."""
    name = node.name()
    if name == "ConvolutionBackward0" and slot == 1 and layer.convolution and not layer.flipped:
        return not node._saved_transposed and node._saved_groups == 1  # type: ignore[attr-defined]
    if name == "AddmmBackward0" and slot == 2:
        return node._saved_alpha == node._saved_beta == 1  # type: ignore[attr-defined]
    return name == "MmBackward0" and slot == 1


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
        self.gram = gram_matrix(self.rows)
        for layer, x, d in zip(layers, self.inputs, self.cotangents, strict=True):
            self.gram += layer.gram(x, d)

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
            found[layer.weight], bias = layer.gradients(x, d.view(layer.shape))
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
