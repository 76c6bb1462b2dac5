"""What a step can save: half the bits of its activations, and all but a piece of the batch.

Lower precision is torch's autocast: weights, optimiser, Gram matrix and the method's algebra stay
as they are, the forward and backward passes run in bfloat16 or float16.

A batch in n pieces gives the losses and the gradients of the whole batch, so that any method can
follow: each task's gradients are summed over the pieces *before* anything is made of them. Gram
matrices cannot be summed so, since ``(a + b)(a + b)^T`` has cross terms. Losses of pieces are
averaged, which is the whole batch's loss where a loss is a mean over equally many things in each
piece; with pixels that count for nothing, and with batch norm, it is nearly that.

Price of the pieces: a backward pass per task whatever the method, and one more buffer of K
gradients. No graph outlives its piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which a model computes in a precision; float32 is no context at all."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, DTYPES[precision])


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler | None:
    """The gradient scaler that float16 needs."""
    return torch.amp.GradScaler(device.type) if precision == "float16" else None


def cut(batch: Any, n: int) -> list[Any]:
    """A batch as n pieces of the same form.

    Args:
        batch: a tensor, cut along its first dimension, or tuples and lists of such.
        n: number of pieces.

    Raises:
        ValueError: something else, or a tensor that does not fall into n equal pieces.
    """
    if isinstance(batch, Tensor):
        if batch.dim() == 0 or len(batch) % n or not len(batch):
            raise ValueError(
                f"expected a batch of equal pieces, {n} of them, got one of shape "
                f"{tuple(batch.shape)}; accumulate over a number that divides it"
            )
        return list(batch.chunk(n))
    if isinstance(batch, tuple | list) and batch:
        parts = zip(*(cut(part, n) for part in batch), strict=True)
        return [type(batch)(part) for part in parts]
    raise ValueError(
        f"expected a batch of tensors to cut into {n} pieces, got {type(batch).__name__}; "
        "leave accumulate at 1"
    )


class Known(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        """The loss as it is."""
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Any) -> Any:
        """The known gradients, times the factor of the loss."""
        (factor,) = factors
        return None, None, *(factor.to(g.dtype) * g for g in ctx.gradients)


def losses_in_pieces(
    compute: Callable[[Any], Sequence[Tensor]],
    batch: Any,
    n: int,
    parameters: Sequence[Tensor],
    scaler: torch.amp.GradScaler | None = None,
) -> list[Tensor]:
    """Losses of a batch that is never computed as a whole.

    Args:
        compute: a piece to the losses of its tasks, scalars.
        batch: see `cut`.
        n: number of pieces.
        parameters: all that the losses are to be differentiated by.
        scaler: for float16: gradients of a piece are computed scaled.

    Returns:
        One scalar per task, the mean over the pieces, whose backward pass hands out the gradients
        that were summed here. Without gradients enabled, the means alone.
    """
    pieces = cut(batch, n)
    if not torch.is_grad_enabled():
        parts = [torch.stack([loss.detach() for loss in compute(piece)]) for piece in pieces]
        return list((torch.stack(parts).sum(0) / n).unbind())
    parameters = [p for p in parameters if p.requires_grad]
    values: list[Tensor] = []
    sums: list[dict[int, Tensor]] = []
    for piece in pieces:
        losses = list(compute(piece))
        if not values:
            values = [torch.zeros_like(loss, requires_grad=False) for loss in losses]
            sums = [{} for _ in losses]
        present = [k for k, loss in enumerate(losses) if loss.requires_grad]
        for k, loss in enumerate(losses):
            values[k] = values[k] + loss.detach() / n
        for k in present:
            _add_gradients(sums[k], losses[k] / n, parameters, scaler, keep=k != present[-1])
    return [
        Known.apply(value, list(found.values()), *(parameters[j] for j in found))
        for value, found in zip(values, sums, strict=True)
    ]


def _add_gradients(
    sums: dict[int, Tensor],
    loss: Tensor,
    parameters: Sequence[Tensor],
    scaler: torch.amp.GradScaler | None,
    keep: bool,
) -> None:
    """Add a loss's gradients to the sums, under the position of their parameter."""
    scale = None
    if scaler is not None:
        scale = scaler.scale(torch.ones((), device=loss.device))
    found = torch.autograd.grad(
        loss if scale is None else loss * scale.to(loss.dtype),
        parameters,
        retain_graph=keep,
        allow_unused=True,
    )
    for j, gradient in enumerate(found):
        if gradient is None:
            continue
        gradient = gradient if scale is None else gradient / scale.to(gradient.dtype)
        sums[j] = sums[j] + gradient if j in sums else gradient.clone()
