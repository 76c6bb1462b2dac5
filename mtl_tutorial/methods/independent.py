"""Independent losses: when to step, rather than how to weigh.

Pascal, Michiardi, Bost, Huet, Zuluaga: "Improved Optimization Strategies for Deep Multi-Task
Networks", arXiv:2109.11678 (2021); official code lucaspascal/AITSO_MTL.

One batch, K losses, m groups of tasks; a group's loss is the sum of its tasks' losses.

* joint (one group): one forward, one backward of the sum, one optimiser step.
* independent updates: for each group in turn a fresh forward with the current parameters on the
  same batch, backward of the group's loss, a step of the one shared optimiser.
* individual optimisers: the same, but each group steps an optimiser of its own, so that Adam's
  moments and step count belong to that group. Adam then divides every group's gradient by that
  group's own size, which makes the method balance losses without a single weight.
* random grouping: tasks are put into ceil(K / s) groups of size s at random, which trades the
  number of forward passes against the independence of the updates.

The paper's body was not at hand; the abstract and the released code are what this file follows.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from ..gradients import (
    Closure,
    Info,
    Losses,
    LossGraph,
    Method,
    View,
    all_finite,
    optimizer_step,
    refuse_shards,
    split_closure_output,
    takes_tasks,
)


def draw_groups(k: int, size: int | None, generator: torch.Generator | None) -> list[list[int]]:
    """Partition k tasks into ceil(k / size) groups at random; the last one may be smaller.

    Args:
        k: number of tasks.
        size: tasks per group; None or k and more: one group; 1: one group per task, in order.
        generator: source of the permutation; not used for one group or groups of one.

    Returns:
        Groups of task indices, disjoint, together all of ``range(k)``.
    """
    if size is None or size >= k:
        return [list(range(k))]
    if size == 1:
        return [[task] for task in range(k)]
    order = torch.randperm(k, generator=generator).tolist()
    return [sorted(order[i : i + size]) for i in range(0, k, size)]


def clone_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A new optimiser of the same class over the same parameters and settings, without state."""
    accepted = inspect.signature(type(optimizer)).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    return type(optimizer)([dict(group) for group in optimizer.param_groups], **defaults)


class Independent(Method):
    """Joint, independent and individual updates, with random grouping of the tasks.

    Args:
        optimizers: "shared", every group steps the optimiser given to `step`; or "individual",
            every group steps its own copy of it. Copies follow the settings of the given one, so
            a learning-rate scheduler on that one rules them all.
        group_size: tasks per group; 1 (default) steps for each task; None steps once, jointly.
        regroup: "once", groups are drawn at the first step and kept (the official code), or
            "epoch", drawn anew after each `next_epoch`. Individual optimisers then start afresh,
            since the moments of one group say nothing of another.
        seed: of the grouping. The official code leaves it unseeded.

    Where the official code differs, and what is done here:

    * It was written for torch 1.2, whose ``zero_grad`` left zeros: with the shared optimiser every
      other head kept moving on stale Adam moments. Here gradients are set to None, so that an
      optimiser skips the parameters that a group does not use.
    * Its individual optimisers decay every head's weights at every group's step. Here, for the
      same reason, a head is decayed by its own group alone; without weight decay there is no
      difference.

    The rule is a schedule and no direction: use `step`. With more than one step per batch the
    learning rate wants tuning: the paper's commands use smaller ones the more groups there are.
    """

    name = "independent"
    title = "Independent losses"
    paper = "Pascal et al., arXiv 2021"
    year = 2021
    family = "schedule"
    sees = "losses"
    passes = "1 per group, with a forward each"
    memory = "none; individual optimisers: a state per group"
    state = "groups; individual optimisers: their states"

    def __init__(
        self,
        optimizers: str = "shared",
        group_size: int | None = 1,
        regroup: str = "once",
        seed: int = 0,
    ) -> None:
        super().__init__(seed=seed)
        if optimizers not in ("shared", "individual"):
            raise ValueError(
                f"{self.name}: expected optimizers 'shared' or 'individual', got {optimizers!r}"
            )
        if group_size is not None and (group_size != int(group_size) or group_size < 1):
            raise ValueError(
                f"{self.name}: expected a whole number group_size >= 1 or None, got {group_size}"
            )
        if regroup not in ("once", "epoch"):
            raise ValueError(f"{self.name}: expected regroup 'once' or 'epoch', got {regroup!r}")
        self.optimizers = optimizers
        self.group_size = group_size
        self.regroup = regroup
        self.seed = seed
        self.groups: list[list[int]] = []
        self._copies: list[torch.optim.Optimizer] = []
        self._saved: list[dict[str, Any]] = []

    def step(
        self,
        closure: Closure,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """One forward, backward and optimiser step per group, on the same batch.

        Args:
            closure: computes and returns the losses (K,) of the batch; it is called once per
                group. If it has a positional argument without default, it is given the group's
                task indices (None for all tasks) and may return the losses of these tasks alone,
                which saves the other heads' forward passes.
            optimizer: optimiser over shared and head parameters; with individual optimisers, the
                pattern of the copies, itself never stepped.
            shared, heads: not needed.
            scaler: gradient scaler, for float16.

        Returns:
            `Info` with each task's loss just before its own group's step; no weights, no Gram.

        Raises:
            FloatingPointError: a group's loss or gradient is not finite; on the CPU, without a
                scaler, at once. Earlier groups of the batch have stepped by then.
        """
        self._raise_pending()
        refuse_shards(p for group in optimizer.param_groups for p in group["params"])
        told = takes_tasks(closure)
        if not self.groups:
            with torch.no_grad():
                output = closure(None) if told else closure()
            self.groups = draw_groups(len(_losses_of(output)), self.group_size, self._generator)
        k = sum(map(len, self.groups))
        values: list[Tensor] = [torch.zeros(())] * k
        ok: list[Tensor] = []
        for j, group in enumerate(self.groups):
            with torch.enable_grad():
                losses = _losses_of(closure(group) if told else closure())
            if len(losses) not in (k, len(group)):
                raise ValueError(
                    f"{self.name}: expected {k} losses, or those of tasks {group}, got "
                    f"{len(losses)}; return one loss per task from the closure"
                )
            owner = self._optimizer_of(j, optimizer)
            owner.zero_grad(set_to_none=True)
            info = self._group_backward(losses, group, owner, scaler)
            for i, task in enumerate(group):
                values[task] = info.losses[task if len(losses) == k else i]
            ok.append(info.finite)
            optimizer_step(owner, scaler)
        return Info(torch.stack(values), None, None, torch.stack(ok).all())

    def backward(
        self,
        losses: Losses,
        *,
        shared: Iterable[Tensor] | None = None,
        heads: Sequence[Iterable[Tensor]] | None = None,
        features: Tensor | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> Info:
        """Backward of the sum of the losses, for the joint schedule alone.

        `shared` and `heads` are needed where a task is absent on some ranks alone.

        Raises:
            RuntimeError: the schedule has more than one group, so one backward is not enough.
        """
        k = len(losses)
        if self.group_size is not None and self.group_size < k:
            raise RuntimeError(
                f"{self.name}: expected one group, got group_size={self.group_size} for {k} "
                "losses, which takes several optimiser steps per batch; call "
                "step(closure, optimizer)"
            )
        inputs = None
        if shared is not None and heads is not None and self.ranks() is not None:
            groups = [shared, *heads]
            inputs = list({id(p): p for group in groups for p in group if p.requires_grad}.values())
        return self._group_backward(losses, list(range(k)), None, scaler, inputs)

    def direction(self, jacobian: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Not defined: raises TypeError."""
        raise TypeError(
            f"{self.name}: a schedule of several optimiser steps has no single direction; call "
            "step(closure, optimizer)"
        )

    def weights(self, x: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Not defined: raises TypeError."""
        raise TypeError(f"{self.name}: a schedule has no weights; call step(closure, optimizer)")

    def next_epoch(self) -> None:
        """Draw new groups at the next step, if ``regroup="epoch"``."""
        if self.regroup == "epoch":
            self.groups, self._copies, self._saved = [], [], []

    def state_dict(self) -> dict[str, Any]:
        """Groups, generator state, and the individual optimisers' states."""
        return super().state_dict() | {
            "groups": [list(group) for group in self.groups],
            # An optimiser's own state_dict refers to the tensors that its next step changes.
            "optimizers": deepcopy([own.state_dict() for own in self._copies] or self._saved),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; optimiser states are used at the next `step`."""
        super().load_state_dict(state_dict)
        self.groups = [list(group) for group in state_dict["groups"]]
        self._copies, self._saved = [], deepcopy(state_dict["optimizers"])

    def _rule(self, view: View) -> Tensor:
        return torch.ones(len(view.tasks), dtype=torch.float64, device=view.device)

    def _group_backward(
        self,
        losses: Losses,
        group: list[int],
        owner: torch.optim.Optimizer | None,
        scaler: torch.amp.GradScaler | None,
        inputs: list[Tensor] | None = None,
    ) -> Info:
        """Backward of the sum of the group's losses; nothing non-finite reaches an optimiser."""
        graph = LossGraph(losses, ranks=self.ranks())
        # Of K losses take the group's edges: an index would send zeros into the other heads.
        wanted = set(group if graph.n_tasks > len(group) else range(graph.n_tasks))
        chosen = [(i, e) for i, e in zip(graph.present, graph.edges, strict=True) if i in wanted]
        tasks = [i if graph.n_tasks > len(group) else group[i] for i, _ in chosen]
        finite = graph.values[[i for i, _ in chosen]].isfinite()
        on_cpu = graph.values.device.type == "cpu"
        if on_cpu and scaler is None and not finite.all():
            self._raise(finite.tolist(), tasks, "this group's step was not taken")
        one = torch.ones((), dtype=graph.values.dtype, device=graph.values.device)
        one = one if scaler is None else scaler.scale(one).to(graph.values.dtype)
        if graph.uneven and owner is not None:  # the ranks' own graphs have not the same leaves
            inputs = [p for g in owner.param_groups for p in g["params"] if p.requires_grad]
        if chosen:
            graph.present, graph.edges = [i for i, _ in chosen], [edge for _, edge in chosen]
            graph.backward([one] * len(chosen), inputs)
        ok = finite.all()
        if owner is not None:
            parameters = [p for g in owner.param_groups for p in g["params"] if p.grad is not None]
            ok = ok & all_finite((p.grad for p in parameters), ok.device)
        if owner is not None and scaler is None:
            if on_cpu and not ok:
                owner.zero_grad(set_to_none=True)
                self._raise([False] * len(tasks), tasks, "this group's step was not taken")
            if not on_cpu:
                self._remember((finite & ok).clone(), tasks)
                for p in parameters:
                    p.grad = torch.where(ok, p.grad, 0.0)
        return Info(graph.values, None, None, ok)

    def _optimizer_of(self, j: int, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Group j's optimiser, made on first use, with the settings of the given one."""
        if self.optimizers == "shared":
            return optimizer
        if not self._copies:
            self._copies = [clone_optimizer(optimizer) for _ in self.groups]
            for copy, saved in zip(self._copies, self._saved, strict=False):
                copy.load_state_dict(saved)
            self._saved = []
        for mine, given in zip(self._copies[j].param_groups, optimizer.param_groups, strict=True):
            mine.update({key: value for key, value in given.items() if key != "params"})
        return self._copies[j]


class Joint(Independent):
    """One update for all tasks: backward of the sum of the losses, one optimiser step.

    The schedule that the others are compared with; `independent` with ``group_size=None``. It is
    equal weighting with ``reduction="sum"``.
    """

    name = "joint"
    title = "Joint update"
    passes = "1"
    memory = "none"
    state = "none"

    def __init__(self) -> None:
        super().__init__(group_size=None)


class Individual(Independent):
    """Individual optimisers, the paper's proposal; `independent` with ``optimizers="individual"``.

    Args:
        group_size, regroup, seed: as in `Independent`.
    """

    name = "individual"
    title = "Individual optimisers"
    memory = "one optimiser state per group"
    state = "groups, optimiser states"

    def __init__(self, group_size: int | None = 1, regroup: str = "once", seed: int = 0) -> None:
        super().__init__("individual", group_size, regroup, seed)


def _losses_of(output: Any) -> Losses:
    """Losses (K,), or a list of scalars, from what a closure returned."""
    losses, _ = split_closure_output(output)  # a schedule has no use for features
    return losses if isinstance(losses, Tensor) else list(losses)
