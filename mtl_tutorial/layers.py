"""Linear and convolutional layers, found in the autograd graph of K losses.

For a layer ``y = x W^T + b`` with input rows A (n, fan_in) and output gradients D_k (n, fan_out),
task k's gradients are ``dW_k = D_k^T A`` and ``db_k = D_k^T 1``. A convolution is such a layer over
its patches. Whoever asks autograd for D_k in place of ``dW_k`` can do with it what is cheapest: the
Gram matrix without any ``dW_k`` (`mtl_tutorial.rowless`), or ``dW_k`` itself by a quicker way than
autograd's (`FromOutput`).

Nobody has to hand over modules: the node of a layer in the graph holds its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .gradients import LossGraph, Scratch, form_of, gram_matrix, upload

_PADDED = 1.5  # from this share of computed over needed channels on, blocks are mostly padding
_SMALL = 128  # entries of a weight below which looking for the layer costs more than it can save
_STRIP = 64  # rows of A A^T in one product, on the CPU
_LONG = 128  # inputs of an output from which on a product with patches is quicker
_PATCHES = 2**23  # floats in a layer's patches at most; more are memory that was never touched
_HELD = 3 * 2**22  # floats in all tasks' output gradients at most, for they are held at once


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
        strip: rows of A A^T to take in one product.
    """

    node: Node
    weight: int
    bias: int | None
    weight_shape: torch.Size
    flipped: bool
    shape: torch.Size
    strip: int

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
        triangle = sum((end - start) * end for start, end in self.strips)
        without = n * n * i + k * triangle * o + k * k * n * o + n * i * o
        return int(0.9 * (k * n * i * o + k * k * i * o)) - without

    def input(self) -> Tensor:
        """What the node saved of the forward pass; autograd checks that it was not changed."""
        attribute = {"AddmmBackward0": "mat1", "MmBackward0": "self"}.get(self.node.name(), "input")
        return getattr(self.node, f"_saved_{attribute}").detach()

    def rows(self, x: Tensor, scratch: Scratch) -> Tensor:
        """A (n, fan_in): the input x; of a convolution its patches, by row, column and channel."""
        return self.patches(x, scratch) if self.convolution else x

    def patches(self, x: Tensor, scratch: Scratch) -> Tensor:
        """Patches (n, fan_in) of a convolution's input, valid until the next layer's."""
        stride, padding, dilation = self.geometry
        (n, c, h, w), (out_h, out_w) = x.shape, self.shape[2:]
        kernel = self.weight_shape[2:]
        h, w = h + 2 * padding[0], w + 2 * padding[1]
        images = x.permute(0, 2, 3, 1).contiguous()  # channels last: a patch is a few long pieces
        if any(padding):
            images = torch.nn.functional.pad(images, (0, 0, *2 * padding[1:], *2 * padding[:1]))
        steps = (h * w * c, stride[0] * w * c, stride[1] * c, dilation[0] * w * c, dilation[1] * c)
        shape = (n, out_h, out_w, *kernel, c)
        patches = scratch.space("patches", shape, x.dtype, x.device)
        patches.copy_(images.as_strided(shape, (*steps, 1)))
        return patches.view(self.n, self.fan_in)

    @property
    def strips(self) -> list[tuple[int, int]]:
        """Ranges of the n rows."""
        n, strip = self.n, self.strip
        return [(start, min(start + strip, n)) for start in range(0, n, strip)]

    def gram(self, x: Tensor, cotangents: Tensor, scratch: Scratch) -> Tensor:
        """Gram matrix (K, K) of the layer's task gradients, in float64.

        As A A^T is symmetric, the sum over its lower triangle, with half the diagonal, gives half
        of the Gram matrix up to a transpose. The triangle is taken in strips, in whole blocks.

        Args:
            x: input of the layer.
            cotangents: K gradients of its output, (K, numel).
            scratch: memory from earlier layers.
        """
        rows = self.rows(x, scratch)
        k = len(cotangents)
        d = cotangents.reshape(k, self.n, self.fan_out)
        if self.convolution:
            d = cotangents.reshape(k, self.shape[0], self.fan_out, -1).transpose(2, 3)
            d = d.reshape(k, self.n, self.fan_out)
        kernel = rows @ rows.T
        if self.bias is not None:
            kernel += 1
        gram = torch.zeros(k, k, dtype=torch.float64, device=d.device)
        for start, end in self.strips:
            kernel[start:end, start:end] /= 2
            shape = (k, end - start, self.fan_out)
            products = scratch.space("products", shape, d.dtype, d.device)
            torch.matmul(kernel[start:end, :end], d[:, :end], out=products)
            gram += 2 * gram_matrix(d[:, start:end].reshape(k, -1), products.view(k, -1))
        return gram

    def gradients(self, x: Tensor, d: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias from input and gradient of the output."""
        if self.convolution:
            (weight,) = self.kernels(x, d.transpose(0, 1).reshape(self.fan_out, -1), scratch)
            return weight.contiguous(), None if self.bias is None else d.sum((0, 2, 3))
        weight = d.T @ x if self.flipped else x.T @ d
        return weight, None if self.bias is None else d.sum(0)

    def kernels(self, x: Tensor, outputs: Tensor, scratch: Scratch) -> Tensor:
        """Gradients of a convolution's weight for any number of tasks, in one product.

        Patches are made anew for it, as they take more room than time. They have the channels last
        and the weight has them first: what is smaller is brought into the other's order, the
        patches or the product.

        Args:
            x: input of the layer.
            outputs: gradients of its output (tasks times fan_out, n).
            scratch: memory from earlier layers.

        Returns:
            Gradients (tasks, and the shape of the weight), not always contiguous.
        """
        fan_out, channels, *kernel = self.weight_shape
        patches = self.patches(x, scratch)
        if self.n < len(outputs):
            patches = patches.view(self.n, -1, channels).transpose(1, 2).reshape(self.n, -1)
            return (outputs @ patches).view(-1, *self.weight_shape)
        products = (outputs @ patches).view(-1, fan_out, *kernel, channels)
        return products.permute(0, 1, 4, 2, 3)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation of a convolution."""
        names = ("stride", "padding", "dilation")
        return tuple(list(getattr(self.node, f"_saved_{name}")) for name in names)  # type: ignore[return-value]


def find_layers(graph: LossGraph, parameters: Sequence[Tensor] | None = None) -> list[Layer]:
    """Layers whose weight is used once, and a leaf up to its transpose.

    Args:
        graph: the losses, partitioned.
        parameters: weights and biases to look for, and what `Layer.weight` and `Layer.bias` count;
            the shared ones by default.
    """
    parameters = graph.shared if parameters is None else parameters
    uses: dict[Node, list[tuple[Node, int]]] = {}
    leaves: dict[int, Node] = {}
    for node in graph.owners:
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = node
        for slot, (parent, _) in enumerate(node.next_functions):
            if parent is not None:
                uses.setdefault(parent, []).append((node, slot))
    place = {id(parameter): i for i, parameter in enumerate(parameters)}
    layers = []
    for i, weight in enumerate(parameters):
        end = leaves.get(id(weight))
        users = [] if end is None else uses.get(end, [])
        flipped = len(users) == 1 and users[0][0].name() == "TBackward0"
        if flipped:
            users = uses[users[0][0]]
        if len(users) != 1 or not _plain(weight):
            continue
        node, slot = users[0]
        shape, dtype, device = form_of(GradientEdge(node, 0))
        # An accelerator has more to lose by small products than by the other triangle.
        strip = _STRIP if device.type == "cpu" else max(shape.numel(), 1)
        layer = Layer(node, i, None, weight.shape, flipped, shape, strip)
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


# ------------------------------------------------------------- gradients by a quicker way


class FromOutput:
    """Rows of a convolution's weight and bias, from the gradients of its output.

    Args:
        layer: the convolution.
        places: of its weight and, where that is trained, its bias among the targets.
    """

    def __init__(self, layer: Layer, places: list[int]) -> None:
        self.layer, self.places = layer, places
        self.edge = GradientEdge(layer.node, 0)

    def take(self, row: list[Tensor], d: Tensor | None) -> None:
        """Fill a task's part of the rows, beside `places`, now or in `finish`.

        Args:
            row: uninitialised tensors (numel,).
            d: gradient of the output; None where the task does not use the layer.
        """
        if d is None:
            for part in row:
                part.zero_()
        else:
            self._take(row, d)

    def _take(self, row: list[Tensor], d: Tensor) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Fill what is left."""


class ChannelsLast(FromOutput):
    """One task at a time, by torch's own function in another layout.

    Where vectors hold 8 floats, torch lays a convolution's arrays out in blocks of 8 channels. With
    one channel, or with a few more than a block holds, much of that is padding, and the weight's
    gradient takes two to eight times as long as it does with the channels last.
    """

    def __init__(self, layer: Layer, places: list[int]) -> None:
        super().__init__(layer, places)
        self._x = layer.input().contiguous(memory_format=torch.channels_last)
        self._weight = torch.empty(  # its values do not matter, its layout decides
            layer.weight_shape, dtype=self._x.dtype, memory_format=torch.channels_last
        )

    def _take(self, row: list[Tensor], d: Tensor) -> None:
        layer = self.layer
        _, weight, _ = torch.ops.aten.convolution_backward(
            *(d, self._x, self._weight, [layer.fan_out], *layer.geometry, False, [0, 0], 1),
            (False, True, False),
        )
        row[0].view(layer.weight_shape).copy_(weight)
        if layer.bias is not None:
            row[1].copy_(d.sum((0, 2, 3)))


class Together(FromOutput):
    """All tasks at once: one product of their output gradients with the patches.

    The larger the product, the nearer it comes to what the processor can do; torch's own function
    for one task needs 1.2 to 1.7 times as long where vectors hold 8 floats.
    """

    def __init__(self, layer: Layer, places: list[int], scratch: Scratch) -> None:
        super().__init__(layer, places)
        self._x, self._scratch = layer.input(), scratch
        self._held: list[tuple[list[Tensor], Tensor]] = []

    def _take(self, row: list[Tensor], d: Tensor) -> None:
        self._held.append((row, d))

    def finish(self) -> None:
        k, layer = len(self._held), self.layer
        if not k:
            return
        shape = (k, layer.fan_out, layer.shape[0], *layer.shape[2:])
        outputs = self._scratch.space("products", shape, self._x.dtype, self._x.device)
        for output, (_, d) in zip(outputs, self._held, strict=True):
            output.copy_(d.transpose(0, 1))
        weights = layer.kernels(self._x, outputs.view(k * layer.fan_out, -1), self._scratch)
        for i, (row, _) in enumerate(self._held):
            row[0].view(layer.weight_shape).copy_(weights[i])
            if layer.bias is not None:
                row[1].copy_(outputs[i].view(layer.fan_out, -1).sum(1))
        self._held.clear()


def from_outputs(
    graph: LossGraph, targets: Sequence[Tensor | GradientEdge], scratch: Scratch
) -> list[FromOutput]:
    """Convolutions among the targets whose gradients are quicker to get from their outputs'.

    Args:
        graph: the losses, partitioned.
        targets: what is differentiated by.
        scratch: memory from earlier steps.
    """
    k = len(graph.edges)
    places = {id(t): i for i, t in enumerate(targets) if isinstance(t, Tensor) and t.is_leaf}
    ways = {id(t): _way(t, k) for t in targets if id(t) in places}  # type: ignore[arg-type]
    if not any(ways.values()):
        return []
    padded, large = [], []
    for layer in find_layers(graph):
        weight = graph.shared[layer.weight]
        way = ways.get(id(weight))
        if way is None or _channels_last(layer.input()):
            continue
        bias = None if layer.bias is None else places.get(id(graph.shared[layer.bias]))
        at = [places[id(weight)], *([] if bias is None else [bias])]
        if way == "channels last":
            padded.append(ChannelsLast(replace(layer, bias=bias), at))
        elif layer.n * layer.fan_in <= _PATCHES:
            large.append((replace(layer, bias=bias), at))
    if k * sum(layer.shape.numel() for layer, _ in large) > _HELD:
        large = []
    return [*padded, *(Together(layer, at, scratch) for layer, at in large)]


def _way(weight: Tensor, k: int) -> str | None:
    """How a convolution's gradients of k tasks are quicker to get than by autograd, if at all.

    With AVX-512, torch's own way takes no longer; on other processors it was not measured.
    """
    if weight.dim() != 4 or weight.dtype != torch.float32 or weight.numel() < _SMALL:
        return None
    if weight.device.type != "cpu" or _channels_last(weight) or not _vectors_of_8():
        return None
    fan_out, channels = weight.shape[:2]
    # Images of three colours have a way of their own.
    padded = (fan_out + -fan_out % 8) * (channels + -channels % 8)
    if channels == 1 or (channels > 3 and padded >= _PADDED * fan_out * channels):
        return "channels last"
    return "together" if k > 1 and weight[0].numel() >= _LONG else None


@cache
def _vectors_of_8() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _channels_last(x: Tensor) -> bool:
    """Whether a convolution takes this input or weight as laid out with the channels last.

    A kernel of one pixel is laid out both ways, and autograd's way with it is the quickest.
    """
    return x.stride(1) == 1


# ------------------------------------------------------------- all heads in one backward pass


def entrances(graph: LossGraph) -> list[Layer]:
    """The linear layer by which each head takes the features in; empty if it is not so.

    Then the gradients by these layers' outputs say all that has to be told apart: one backward pass
    through all heads gives them side by side, where K passes would have to be asked for K gradients
    by the same features.

    Args:
        graph: the losses, partitioned, with features.

    Returns:
        One layer per present task, its weight and bias counted over the heads' parameters side by
        side. Empty unless each head enters once, by a linear layer that is not wider than the
        features, shares no parameter with another, and nobody waits for the features' gradients.
    """
    z = graph.features
    if z is None or z.dim() != 2 or z._backward_hooks or z.retains_grad:
        return []
    parameters = [p for head in graph.heads for p in head]
    users = [k for k, head in enumerate(graph.heads) for _ in head]
    place = {id(p): i for i, p in enumerate(parameters)}
    if len(place) < len(parameters):
        return []
    doors = []
    for node, owner in graph.owners.items():
        at = place.get(id(getattr(node, "variable", None)))
        if at is not None and owner != users[at]:
            return []
        for slot, (parent, number) in enumerate(node.next_functions):
            if parent is z.grad_fn and number == z.output_nr:
                doors.append((owner, node, slot))
    if [owner for owner, _, _ in doors] != list(range(len(graph.edges))):
        return []
    layers = {layer.node: layer for layer in find_layers(graph, parameters)}
    found = [layers.get(node) for _, node, _ in doors]
    slots = {"AddmmBackward0": 1, "MmBackward0": 0}
    for layer, (_, node, slot) in zip(found, doors, strict=True):
        if layer is None or slots.get(node.name()) != slot or layer.fan_out > layer.fan_in:
            return []
    return [layer for layer in found if layer is not None]


class Entered:
    """One backward pass of all tasks through their heads, down to their `entrances`.

    Args:
        graph: the losses, partitioned; kept.
        layers: `entrances` of the graph.
        scale: factor on every loss, 0-dimensional; the heads' gradients keep it.

    Attributes:
        head_gradients: per task a list of gradients beside `graph.heads`.
    """

    def __init__(self, graph: LossGraph, layers: list[Layer], scale: Tensor | None = None) -> None:
        assert graph.features is not None
        self._shape, self._dtype, self._device = form_of(graph.features)
        self._scale = scale
        parameters = [p for head in graph.heads for p in head]
        taken = {i for layer in layers for i in (layer.weight, layer.bias)}
        rest = [i for i in range(len(parameters)) if i not in taken]
        edges: list[Tensor | GradientEdge] = [GradientEdge(layer.node, 0) for layer in layers]
        answers = torch.autograd.grad(
            graph.edges,
            [*edges, *(parameters[i] for i in rest)],  # type: ignore[arg-type]
            grad_outputs=None if scale is None else [scale.to(graph.values.dtype)] * len(layers),
            retain_graph=True,
            allow_unused=True,
        )
        # Autograd notices here if a layer's input or weight was changed after the forward pass.
        self._weights = [layer.node._saved_mat2.detach().T for layer in layers]  # type: ignore[attr-defined]
        self._outputs = answers[: len(layers)]
        found: list[Tensor | None] = [None] * len(parameters)
        for i, gradient in zip(rest, answers[len(layers) :], strict=True):
            found[i] = gradient
        for layer, d in zip(layers, self._outputs, strict=True):
            if d is not None:
                found[layer.weight], bias = layer.gradients(layer.input(), d, Scratch())
                if layer.bias is not None:
                    found[layer.bias] = bias
        each = iter(found)
        self.head_gradients = [[next(each) for _ in head] for head in graph.heads]

    def rows(self, scratch: Scratch) -> Tensor:
        """Gradients (n, numel) by the features."""
        k = len(self._outputs)
        rows = scratch.rows(k, self._shape.numel(), self._dtype, self._device)
        for row, d, weight in zip(rows, self._outputs, self._weights, strict=True):
            if d is None:
                row.zero_()
            else:
                torch.mm(d, weight, out=row.view(self._shape))
        if self._scale is not None:
            rows /= self._scale.to(rows.dtype)
        return rows

    def gram(self) -> Tensor:
        """Gram matrix (n, n) of the rows in float64, without them.

        For heads that take the features z in by weights W_k, with output gradients D_k, the rows
        are D_k W_k, and <D_j W_j, D_k W_k> is the sum over entries of (D_j^T D_k) (W_j W_k^T).
        """
        outputs, weights, sizes = self._side_by_side
        outputs, weights = outputs.double(), weights.double()
        products = (outputs.T @ outputs) * (weights @ weights.T)
        ones = [torch.ones(1, size, dtype=torch.float64) for size in sizes]
        of_task = upload(torch.block_diag(*ones), outputs.device)
        gram = of_task @ products @ of_task.T
        return gram if self._scale is None else gram / self._scale.double() ** 2

    def direction(self, weights: Tensor) -> Tensor:
        """Weighted sum (numel,) of the rows."""
        outputs, matrices, sizes = self._side_by_side
        weights = weights.to(self._dtype)
        if self._scale is not None:
            weights = weights / self._scale.to(self._dtype)
        parts = [w.expand(size) for w, size in zip(weights, sizes, strict=True)]
        return ((outputs * torch.cat(parts)) @ matrices).view(-1)

    @cached_property
    def _side_by_side(self) -> tuple[Tensor, Tensor, list[int]]:
        """Output gradients (n, S), weights (S, fan_in), and the tasks' parts of S."""
        outputs = [
            weight.new_zeros(self._shape[0], len(weight)) if d is None else d
            for d, weight in zip(self._outputs, self._weights, strict=True)
        ]
        return torch.cat(outputs, 1), torch.cat(self._weights), [len(w) for w in self._weights]


def gram_is_cheaper(layers: Sequence[Layer]) -> bool:
    """Whether `Entered.gram` takes fewer multiplications than the rows and theirs."""
    k, n, width = len(layers), layers[0].n, layers[0].fan_in
    outputs = sum(layer.fan_out for layer in layers)
    return outputs**2 * (n + width) < n * width * (outputs + k**2)
