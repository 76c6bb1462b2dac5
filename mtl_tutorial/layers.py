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
_SMALL = 128  # entries of a kernel below which looking for the layer costs more than it can save


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

    def rows(self) -> Tensor:
        """A (n, fan_in): the input; of a convolution its patches, by row, column and channel."""
        x = self.input()
        if not self.convolution:
            return x
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

    def gram(self, rows: Tensor, cotangents: Tensor) -> Tensor:
        """Gram matrix (K, K) of the layer's task gradients, in float64.

        Args:
            rows: A (n, fan_in).
            cotangents: K gradients of the layer's output, (K, numel).
        """
        k = len(cotangents)
        d = cotangents.reshape(k, self.n, self.fan_out)
        if self.convolution:
            d = cotangents.reshape(k, self.shape[0], self.fan_out, -1).transpose(2, 3)
            d = d.reshape(k, self.n, self.fan_out)
        kernel = rows @ rows.T
        if self.bias is not None:
            kernel += 1
        return gram_matrix(d.reshape(k, -1), (kernel @ d).view(k, -1))

    def gradients(self, rows: Tensor, d: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of weight and bias from A and the gradient of the output."""
        if self.convolution:
            _, c, *kernel = self.weight_shape
            weight = d.transpose(0, 1).reshape(self.fan_out, -1) @ rows
            weight = weight.view(-1, *kernel, c).permute(0, 3, 1, 2).contiguous()
            return weight, None if self.bias is None else d.sum((0, 2, 3))
        weight = d.T @ rows if self.flipped else rows.T @ d
        return weight, None if self.bias is None else d.sum(0)

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
    """Gradients of a convolution's weight and bias, from that of its output.

    Where vectors hold 8 floats (AVX2), torch lays a convolution's arrays out in blocks of 8
    channels. With one channel, or with a few more than a block holds, much of that is padding, and
    the weight's gradient takes two to eight times as long as it does with the channels last.

    Args:
        layer: the convolution.
        places: of its weight and, where that is trained, its bias among the targets.
    """

    def __init__(self, layer: Layer, places: list[int]) -> None:
        self.layer, self.places = layer, places
        self.edge = GradientEdge(layer.node, 0)
        self._x = layer.input().contiguous(memory_format=torch.channels_last)
        self._weight = torch.empty(  # its values do not matter, its layout decides
            layer.weight_shape, dtype=self._x.dtype, memory_format=torch.channels_last
        )

    def gradients(self, d: Tensor) -> list[Tensor]:
        """Gradients beside `places`, from the gradient of the output."""
        layer = self.layer
        _, weight, _ = torch.ops.aten.convolution_backward(
            *(d, self._x, self._weight, [layer.fan_out], *layer.geometry, False, [0, 0], 1),
            (False, True, False),
        )
        return [weight] if layer.bias is None else [weight, d.sum((0, 2, 3))]


def from_outputs(graph: LossGraph, targets: Sequence[Tensor | GradientEdge]) -> list[FromOutput]:
    """Convolutions among the targets whose gradients are quicker to get from their outputs'.

    Args:
        graph: the losses, partitioned.
        targets: what is differentiated by.
    """
    places = {id(t): i for i, t in enumerate(targets) if isinstance(t, Tensor)}
    if not any(isinstance(t, Tensor) and is_padded(t) for t in targets):
        return []
    found = []
    for layer in find_layers(graph):
        weight = graph.shared[layer.weight]
        if id(weight) not in places or not is_padded(weight) or _channels_last(layer.input()):
            continue
        bias = None if layer.bias is None else places.get(id(graph.shared[layer.bias]))
        at = [places[id(weight)], *([] if bias is None else [bias])]
        found.append(FromOutput(replace(layer, bias=bias), at))
    return found


def is_padded(weight: Tensor) -> bool:
    """Whether a convolution with this weight is computed in blocks that are mostly padding."""
    if weight.dim() != 4 or weight.numel() < _SMALL or weight.dtype != torch.float32:
        return False
    if weight.device.type != "cpu" or _channels_last(weight) or not _blocks_of_8():
        return False
    fan_out, channels = weight.shape[:2]
    if channels == 1:
        return True
    # Images of three colours have a way of their own.
    padded = (fan_out + -fan_out % 8) * (channels + -channels % 8)
    return channels > 3 and padded >= _PADDED * fan_out * channels


@cache
def _blocks_of_8() -> bool:
    # With AVX-512, torch's own way takes no longer; elsewhere it was not measured.
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def _channels_last(x: Tensor) -> bool:
    """Whether a convolution takes this input or weight as laid out with the channels last."""
    return x.stride(1) == 1
