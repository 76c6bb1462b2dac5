"""Several processes that train one model: what they tell each other in a step.

Each process (rank) of a `torch.distributed` group runs the model on its own part of the batch.
Task k's loss and its gradient row on the joined batch are then the averages over the ranks,

    L_k = sum_r s_rk L_rk,        g_k = sum_r s_rk g_rk,        sum_r s_rk = 1,

and Gram matrix and weights follow from these rows: the average of the ranks' own Gram matrices
lacks the products of one rank's rows with another's. Every rank then computes the same Gram matrix,
the same weights and the same step.

The share s_rk is 1/R_k on the R_k ranks that have labels of task k. That is the joined batch where
these ranks have equally many; where they have not, `joined_losses` makes it so.

Only presence of tasks and the layout of the parameters are told on the host, a few dozen bytes per
step. They need a group that can send CPU tensors, or the device is waited for: call
``init_process_group()`` without a backend, which takes gloo beside nccl.

This file needs torch alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks_of(group: Any = "auto") -> Ranks | None:
    """The ranks that train together; None where this process trains alone.

    Args:
        group: a process group; "auto", the default group once it is initialised; or None, nobody.

    Raises:
        ValueError: this process does not belong to the group.
    """
    if group is None or not dist.is_available() or not dist.is_initialized():
        return None
    group = None if isinstance(group, str) else group
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError(
            "expected a process group that this process belongs to, got another one; set "
            "method.group to the group of the ranks that train this model, or to None"
        )
    return Ranks(group) if size > 1 else None


class Ranks:
    """The ranks of a process group. Each method is called by all of them, in the same order.

    Args:
        group: process group of at least two ranks; None: the default group.

    Attributes:
        size: number of ranks.
        rank: this one's number.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self._on_host = "cpu:" in str(dist.get_backend_config(group))

    def exchange(self, numbers: Sequence[int], device: torch.device) -> list[list[int]]:
        """Every rank's numbers, equally many on each; rank r's are entry r."""
        where = torch.device("cpu") if self._on_host else device
        mine = torch.tensor(numbers, dtype=torch.int64, device=where)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine, group=self.group)
        return [each.tolist() for each in everyone]

    def shares(self, here: Sequence[bool], device: torch.device) -> tuple[list[float], list[int]]:
        """This rank's share of each task, and how many ranks have the task in their batch."""
        everyone = self.exchange([int(x) for x in here], device)
        holders = [sum(column) for column in zip(*everyone, strict=True)]
        return [mine / n if mine else 0.0 for mine, n in zip(here, holders, strict=True)], holders

    def average(self, values: Tensor, shares: Sequence[float]) -> Tensor:
        """Losses (K,) averaged over the ranks with these shares; zero for a task that none has."""
        factors = torch.tensor(shares, dtype=torch.float64).to(values.device, non_blocking=True)
        mine = torch.where(factors > 0, values.double() * factors, 0.0)
        dist.all_reduce(mine, group=self.group)
        return mine.to(values.dtype)

    def agree(self, parameters: Sequence[Tensor], reached: Sequence[bool]) -> list[bool]:
        """For each parameter, whether a gradient reaches it on any rank.

        Raises:
            ValueError: the ranks' parameters differ in number or shape; on every rank.
        """
        layout = zlib.crc32(repr([tuple(p.shape) for p in parameters]).encode())
        flags = [int(x) for x in reached]
        device = parameters[0].device
        layouts, hashes = zip(
            *self.exchange([layout, zlib.crc32(bytes(flags))], device), strict=True
        )
        if len(set(layouts)) > 1:
            raise ValueError(
                "expected the same shared and head parameters on every rank, in the same order, "
                "got other shapes on some ranks; pass shared= and heads= to the method"
            )
        if len(set(hashes)) == 1:
            return [bool(x) for x in reached]
        return [any(column) for column in zip(*self.exchange(flags, device), strict=True)]

    def sum_in_place(self, tensors: Sequence[Tensor]) -> None:
        """Sum each tensor over the ranks, in one flat buffer per dtype."""
        for dtype in dict.fromkeys(t.dtype for t in tensors):
            own = [t for t in tensors if t.dtype == dtype]
            flat = own[0].view(-1) if len(own) == 1 else torch.cat([t.reshape(-1) for t in own])
            dist.all_reduce(flat, group=self.group)
            if len(own) > 1:
                for t, part in zip(own, flat.split([t.numel() for t in own]), strict=True):
                    t.copy_(part.view(t.shape))

    def beside(self, rows: Tensor) -> tuple[Tensor, slice]:
        """The ranks' rows (n, P_r) side by side (n, sum P_r), and which columns are this rank's."""
        sizes = [n for (n,) in self.exchange([rows.shape[1]], rows.device)]
        # Tensors of one size are what every backend can gather.
        padded = rows.new_zeros(len(rows), max(sizes))
        padded[:, : rows.shape[1]] = rows
        everyone = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyone, padded, group=self.group)
        parts = [each[:, :n] for each, n in zip(everyone, sizes, strict=True)]
        start = sum(sizes[: self.rank])
        return torch.cat(parts, 1), slice(start, start + rows.shape[1])


def joined_losses(
    losses: Tensor | Sequence[Tensor], counts: int | Sequence[int], group: Any = "auto"
) -> list[Tensor]:
    """Mean losses of this rank's part of the batch, scaled for the mean over the joined batch.

    Between the forward pass and the method, where the ranks have batches of different size or not
    all labels; every rank calls it, also under ``torch.no_grad()``. In one process it only marks
    the tasks without labels as absent, so the same code runs there.

    Args:
        losses: tensor (K,) or K scalars, each the mean over this rank's examples of the task.
        counts: number of these examples: for each task, or one number for all. Zero marks a task
            without labels here, whatever its loss (the mean over nothing is not a number).
        group: as `Method.group`.

    Returns:
        K scalars ``L_k R_k n_k / N_k`` with n_k of N_k examples on this rank, R_k ranks having
        any, so that their average over those ranks is the mean over the N_k examples. A loss with
        count zero is a plain zero without graph, which is how an absent task is told.

    Raises:
        ValueError: not one count, zero or more, per loss.
    """
    values = list(losses.unbind()) if isinstance(losses, Tensor) else list(losses)
    own = [counts] * len(values) if isinstance(counts, int) else [int(n) for n in counts]
    if len(own) != len(values) or min(own, default=0) < 0:
        raise ValueError(
            f"joined_losses: expected {len(values)} counts, zero or more, got {own}; pass how many "
            "examples each task's mean is taken over"
        )
    ranks = ranks_of(group)
    everyone = [own] if ranks is None else ranks.exchange(own, values[0].device)
    scaled = []
    for loss, n, column in zip(values, own, zip(*everyone, strict=True), strict=True):
        if n == 0:
            scaled.append(torch.zeros_like(loss, requires_grad=False))
            continue
        holders = sum(each > 0 for each in column)
        factor = holders * n / sum(column)
        scaled.append(loss if factor == 1 else loss * factor)
    return scaled
