"""A training step as one CUDA graph: recorded once an epoch, replayed for every further batch.

For CUDA alone. A step of a small network is hundreds of short kernels, and launching them costs the
host more time than the device needs to run them; a graph launches all of them in one call. What is
recorded must be the same work on every batch: batches of one shape, and a method whose rule runs on
the device without waiting for it and without numbers that the host draws or counts.

Each epoch records anew, since its learning rate is part of the recording, and so is whatever the
method changes between epochs.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from . import gradients, results
from .benchmarks import Protocol
from .gradients import Info, Method

if TYPE_CHECKING:
    from .training import Run

OWN = ("step", "backward", "_backward_rows")  # what makes a step, here the engine's alone
WARM_UP = 3  # ordinary steps before the recording: libraries choose their kernels in them


def check(method: Method, protocol: Protocol, device: torch.device) -> None:
    """Raise ValueError, with the reason, where a step cannot be recorded."""
    why = ""
    own = [getattr(type(method), a) is not getattr(Method, a) for a in OWN]
    if any(own):
        why = f"{method.name} has a step of its own"
    elif method.syncs:
        why = f"the rule of {method.name} waits for the device"
    elif method._generator is not None:
        why = f"{method.name} draws random numbers on the host"
    elif protocol.precision == "float16" or protocol.accumulate > 1:
        why = "a gradient scaler waits for the device, and pieces of a batch are not recorded"
    if device.type != "cuda":
        why = f"the device is {device.type}"
    if why:
        raise ValueError(
            f"expected a step on CUDA that runs without the host, for --cuda-graph, got another "
            f"one: {why}; leave --cuda-graph or the method out"
        )


class GraphedStep:
    """One epoch's stand-in for `Run.step`, for batches of one shape.

    The first `WARM_UP` batches are ordinary steps on a stream aside; the next one is recorded, and
    from then on a step copies its batch into the recording's and replays it.

    Raises:
        ValueError: see `check`; also for a step that turns out to need the host, and a batch of
            another shape than the recorded one.
    """

    def __init__(self, run: Run) -> None:
        check(run.method, run.cell.protocol, run.benchmark.device)
        self.run = run
        self.steps = 0
        for group in run.optimizer.param_groups:
            if "capturable" in group:  # Adam counts its steps on the host unless told so
                group["capturable"] = True
        for state in run.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].to(run.benchmark.device)

    def __call__(self, batch: Any) -> Info:
        """One step of the run on a batch; its `Info` is the caller's own."""
        if self.steps < WARM_UP:
            info = self._warm_up(batch)
        else:
            if self.steps == WARM_UP:
                self._record(batch)
            self.run.method._raise_pending()
            self._fill(batch)
            self._graph.replay()
            recorded = self.run.method._recorded
            if recorded is not None:
                self.run.method._remember(*recorded)
            info = copy.copy(self._info)
            for name, value in vars(info).items():
                if isinstance(value, Tensor):
                    setattr(info, name, value.clone())
        self.steps += 1
        return info

    def _warm_up(self, batch: Any) -> Info:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), gradients.Constants() as self._constants:
            info = self.run.step(batch)
        torch.cuda.current_stream().wait_stream(aside)
        return info

    def _record(self, batch: Any) -> None:
        torch.cuda.synchronize()
        self.run.method._raise_pending()  # asks for what is done: none of it may be left to ask
        self._batch = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
        self._state = {k: v.clone() for k, v in self.run.method._state.items()}
        self.run.method._recorded = None  # flags of an epoch before
        self._graph = torch.cuda.CUDAGraph()
        try:
            with self._constants.again(), torch.cuda.graph(self._graph):
                self._info = self._step()
        except RuntimeError as error:
            raise ValueError(
                f"expected a step that CUDA can record, for --cuda-graph, got: "
                f"{results.one_line(error)}; leave it out"
            ) from error

    def _step(self) -> Info:
        """What is recorded: a step from the recording's batch and state to the same places."""
        method = self.run.method
        method._state = self._state
        info = self.run.step(self._batch)
        for key, value in method._state.items():
            self._state[key].copy_(value)
        method._state = self._state
        return info

    def _fill(self, batch: Any) -> None:
        ours, theirs = tree_leaves(self._batch), tree_leaves(batch)
        forms = [[x.shape for x in each if isinstance(x, Tensor)] for each in (ours, theirs)]
        if forms[0] != forms[1]:
            raise ValueError(
                f"expected batches of one shape for --cuda-graph, got {forms[1]} after {forms[0]}; "
                "leave it out"
            )
        for mine, other in zip(ours, theirs, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(other)
