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
from functools import cache

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from .gradients import LossGraph, form_of, gram_matrix

_PADDED = 1.5  # from this share of computed over needed channels on, blocks are mostly padding
_SMALL = 128  # entries of a weight below which looking for the layer costs more than it can save
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

    def rows(self, x: Tensor) -> Tensor:
        """A (n, fan_in): the input x; of a convolution its patches, by row, column and channel."""
        return self.patches(x) if self.convolution else x

    def patches(self, x: Tensor) -> Tensor:
        """Patches (n, fan_in) of a convolution's input."""
        stride, padding, dilation = self.geometry
        (n, c, h, w), (out_h, out_w) = x.shape, self.shape[2:]
        kernel = self.weight_shape[2:]
        h, w = h + 2 * padding[0], w + 2 * padding[1]
        images = x.permute(0, 2, 3, 1).contiguous()  # channels last: a patch is a few long pieces
        if any(padding):
            images = torch.nn.functional.pad(images, (0, 0, *2 * padding[1:], *2 * padding[:1]))
        steps = (h * w * c, stride[0] * w * c, stride[1] * c, dilation[0] * w * c, dilation[1] * c)
        patches = images.as_strided((n, out_h, out_w, *kernel, c), (*steps, 1))
        return patches.reshape(self.n, self.fan_in)

    def gram(self, x: Tensor, cotangents: Tensor) -> Tensor:
        """Gram matrix (K, K) of the layer's task gradients, in float64.

        Args:
            x: input of the layer.
            cotangents: K gradients of its output, (K, numel).
        """
        rows = self.rows(x)
        k = len(cotangents)
        d = cotangents.reshape(k, self.n, self.fan_out)
        if self.convolution:
            d = cotangents.reshape(k, self.shape[0], self.fan_out, -1).transpose(2, 3)
            d = d.reshape(k, self.n, self.fan_out)
        kernel = rows @ rows.T
        if self.bias is not None:
            kernel += 1
        return gram_matrix(d.reshape(k, -1), (kernel @ d).view(k, -1))

    def gradients(self, x: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias from input and gradient of the output."""
        if self.convolution:
            (weight,) = self.kernels(x, d.transpose(0, 1).reshape(self.fan_out, -1))
            return weight.contiguous(), None if self.bias is None else d.sum((0, 2, 3))
        weight = d.T @ x if self.flipped else x.T @ d
        return weight, None if self.bias is None else d.sum(0)

    def kernels(self, x: Tensor, outputs: Tensor) -> Tensor:
        """Gradients of a convolution's weight for any number of tasks, in one product.

        Patches are made anew for it, as they take more room than time.

        Args:
            x: input of the layer.
            outputs: gradients of its output (tasks times fan_out, n).

        Returns:
            Gradients (tasks, and the shape of the weight), not contiguous.
        """
        fan_out, channels, *kernel = self.weight_shape
        products = (outputs @ self.patches(x)).view(-1, fan_out, *kernel, channels)
        return products.permute(0, 1, 4, 2, 3)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation of a convolution."""
        names = ("stride", "padding", "dilation")
        return tuple(list(getattr(self.node, f"_saved_{name}")) for name in names)  # type: ignore[return-value]


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

    def __init__(self, layer: Layer, places: list[int]) -> None:
        super().__init__(layer, places)
        self._x = layer.input()
        self._held: list[tuple[list[Tensor], Tensor]] = []

    def _take(self, row: list[Tensor], d: Tensor) -> None:
        self._held.append((row, d))

    def finish(self) -> None:
        k, layer = len(self._held), self.layer
        if not k:
            return
        outputs = self._x.new_empty(k, layer.fan_out, layer.shape[0], *layer.shape[2:])
        for output, (_, d) in zip(outputs, self._held, strict=True):
            output.copy_(d.transpose(0, 1))
        weights = layer.kernels(self._x, outputs.view(k * layer.fan_out, -1))
        for i, (row, _) in enumerate(self._held):
            row[0].view(layer.weight_shape).copy_(weights[i])
            if layer.bias is not None:
                row[1].copy_(outputs[i].view(layer.fan_out, -1).sum(1))
        self._held.clear()


def from_outputs(graph: LossGraph, targets: Sequence[Tensor | GradientEdge]) -> list[FromOutput]:
    """Convolutions among the targets whose gradients are quicker to get from their outputs'.

    Args:
        graph: the losses, partitioned.
        targets: what is differentiated by.
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
    return [*padded, *(Together(layer, at) for layer, at in large)]


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
