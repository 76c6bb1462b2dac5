"""The steps that compete: each is built on a model of its own and takes one step when called.

A step is forward pass, zeroed gradients, gradients of shared parameters and heads, optimiser. All
contenders run the same case with the same optimiser; they differ in the gradients alone.

* ``ew``: the sum of the losses, one backward pass. ``ew again`` is the same once more.
* ``ours`` and ``ours, features``: `Method.backward` as a user calls it, with the path that the
  engine chooses by itself, on shared parameters and on the shared representation.
* ``limit``: what every method with one gradient per task has to do, and nothing more: the forward
  pass, K backward passes of autograd through the trunk, the heads' passes, the optimiser. The Gram
  matrix without rows gets below it, and so do gradients computed quicker than autograd's.
* ``floor``: as ``limit``, but K - 1 of the trunk's passes give the activations' gradients alone, as
  if a Gram matrix cost nothing. A peer's time over it bounds how much faster than the peer an exact
  step of autograd's operations can be.
* ``torchjd ...``: TorchJD as its documentation writes it (``mtl_backward``, ``jac_to_grad``), by
  default and with each of its settings for speed; and its other engine, ``autogram``.
* ``libmtl ...``: LibMTL's release 1.1.5 from PyPI. Its trainer needs a GPU and modules that newer
  torchvision does not have, so its weightings run in a model of their own, with the vector of
  losses built as the trainer builds it. It lacks Aligned-MTL and UPGrad, and the loop of its MGDA
  need not end; for these, its gradients are combined by our weights, in rows named "shim".
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .. import methods
from ..names import nearest
from .cases import LR, Case

Step = Callable[[], None]
RULES = ("aligned_mtl", "imtl_g", "mgda", "upgrad")  # all peers can be compared on these
INSTALL = "pip install 'mtl-tutorial[speed]'"


@dataclass(frozen=True)
class Contender:
    """One way to take a step.

    Attributes:
        name: as in tables; TorchJD's settings stand behind its name.
        family: "reference", "ours", "torchjd" or "libmtl".
        build: makes a step on a case, for a rule of `RULES`; gradients are left in ``.grad``.
        copies: K x P arrays that it holds at its peak, about; to leave out what would not fit.
    """

    name: str
    family: str
    build: Callable[[Case, str], Step]
    copies: int = 0


# ------------------------------------------------------------------------------- ours


def equal_step(case: Case, rule: str) -> Step:
    optimizer = case.optimizer()

    def step() -> None:
        losses, _ = case.losses()
        optimizer.zero_grad(set_to_none=True)
        torch.stack(losses).sum().backward()
        optimizer.step()

    return step


def our_step(case: Case, rule: str) -> Step:
    optimizer, method = case.optimizer(), methods.create(rule)

    def step() -> None:
        losses, _ = case.losses()
        optimizer.zero_grad(set_to_none=True)
        method.backward(losses, shared=case.shared, heads=case.heads)
        optimizer.step()

    return step


def our_feature_step(case: Case, rule: str) -> Step:
    optimizer, method = case.optimizer(), methods.create(rule)

    def step() -> None:
        losses, z = case.losses()
        optimizer.zero_grad(set_to_none=True)
        method.backward(losses, shared=case.shared, heads=case.heads, features=z)
        optimizer.step()

    return step


def heads_passes(case: Case, losses: list[Tensor], cut: Tensor) -> Iterator[Tensor]:
    """One pass per head, as they are asked for: its ``.grad``, and the gradient by the features."""
    for loss, head in zip(losses, case.heads, strict=True):
        cotangent, *of_head = torch.autograd.grad(loss, [cut, *head])
        for parameter, gradient in zip(head, of_head, strict=True):
            parameter.grad = gradient
        yield cotangent


def limit_step(case: Case, rule: str) -> Step:
    optimizer = case.optimizer()

    def step() -> None:
        z = case.model.features(case.batch)
        cut = z.detach().requires_grad_()
        losses = case.losses_at(cut)
        optimizer.zero_grad(set_to_none=True)
        for i, cotangent in enumerate(heads_passes(case, losses, cut)):
            last = i == case.n_tasks - 1
            of_trunk = torch.autograd.grad(z, case.shared, cotangent, retain_graph=not last)
        for parameter, gradient in zip(case.shared, of_trunk, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


def floor_step(case: Case, rule: str) -> Step:
    optimizer = case.optimizer()
    trunk = list(case.model.trunk.modules())
    # Products and pointwise functions of all tasks at once take less time than one by one.
    batched = all(type(m) in (nn.Sequential, nn.Linear, nn.ReLU) for m in trunk)
    first = next(m for m in trunk if not list(m.children()) and list(m.parameters()))
    edges: list[GradientEdge] = []

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        edges[:] = [get_gradient_edge(output)]

    first.register_forward_hook(note)

    def step() -> None:
        z = case.model.features(case.batch)
        cut = z.detach().requires_grad_()
        losses = case.losses_at(cut)
        optimizer.zero_grad(set_to_none=True)
        *others, last = heads_passes(case, losses, cut)

        def through(cotangent: Tensor) -> Tensor:
            return torch.autograd.grad([z], edges, cotangent, retain_graph=True)[0]

        if batched:
            torch.vmap(through)(torch.stack(others))
        else:
            for cotangent in others:
                through(cotangent)
        of_trunk = torch.autograd.grad(z, case.shared, last)
        for parameter, gradient in zip(case.shared, of_trunk, strict=True):
            parameter.grad = gradient
        optimizer.step()

    return step


# ------------------------------------------------------------------------------- TorchJD


def torchjd_aggregator(rule: str) -> Any:
    """TorchJD's aggregator for a rule, at its defaults."""
    aggregation = importlib.import_module("torchjd.aggregation")
    names = {"aligned_mtl": "AlignedMTL", "imtl_g": "IMTLG", "mgda": "MGDA", "upgrad": "UPGrad"}
    return getattr(aggregation, names[rule])()


def torchjd_step(chunk: int | None, skip_concatenation: bool) -> Callable[[Case, str], Step]:
    """TorchJD's ``mtl_backward`` and ``jac_to_grad``.

    Args:
        chunk: its ``parallel_chunk_size``; None, its default, for all tasks in one batch.
        skip_concatenation: its ``optimize_gramian_computation``.
    """

    def build(case: Case, rule: str) -> Step:
        autojac = importlib.import_module("torchjd.autojac")
        optimizer, aggregator = case.optimizer(), torchjd_aggregator(rule)

        def step() -> None:
            losses, z = case.losses()
            optimizer.zero_grad(set_to_none=True)
            autojac.mtl_backward(
                losses,
                features=z,
                tasks_params=case.heads,
                shared_params=case.shared,
                parallel_chunk_size=chunk,
            )
            autojac.jac_to_grad(
                case.shared, aggregator, optimize_gramian_computation=skip_concatenation
            )
            optimizer.step()

        return step

    return build


def torchjd_autogram_step(case: Case, rule: str) -> Step:
    """TorchJD's Gram engine on the trunk, then one backward pass of the weighted losses."""
    autogram = importlib.import_module("torchjd.autogram")
    optimizer = case.optimizer()
    weighting = torchjd_aggregator(rule).gramian_weighting
    engine = autogram.Engine(case.model.trunk, batch_dim=None)  # losses are no batch

    def step() -> None:
        losses = torch.stack(case.losses()[0])
        optimizer.zero_grad(set_to_none=True)
        weights = weighting(engine.compute_gramian(losses))
        losses.backward(weights)
        optimizer.step()

    return step


# ------------------------------------------------------------------------------- LibMTL


def libmtl_class(name: str) -> type[nn.Module]:
    """A weighting of the installed LibMTL, for example "PCGrad".

    ``import LibMTL`` loads its trainer, which needs modules that torchvision no longer has, and a
    graph library. The weightings need none of them, so its packages are put in place empty, with
    their folders as search path, and the weighting's file is imported by itself.

    Raises:
        ImportError: LibMTL is not there, or its file cannot be imported.
    """
    if "LibMTL" not in sys.modules:
        spec = importlib.util.find_spec("LibMTL")
        if spec is None or not spec.submodule_search_locations:
            raise ImportError("expected LibMTL to be installed, found none")
        for package in ("LibMTL", "LibMTL.weighting"):
            module = ModuleType(package)
            folder = Path(spec.submodule_search_locations[0], *package.split(".")[1:])
            module.__path__ = [str(folder)]
            sys.modules[package] = module
    return getattr(importlib.import_module(f"LibMTL.weighting.{name}"), name)


class _Surroundings(nn.Module):
    """What a weighting expects its model to be: hard sharing, on one device."""

    rep_grad = False
    epoch = 0

    def set_up(self, case: Case) -> None:
        self.encoder = case.model.trunk
        self.decoders = case.model.heads
        self.task_num = case.n_tasks
        self.task_name = [str(k) for k in range(case.n_tasks)]
        self.device = case.batch.device
        self.init_param()  # type: ignore[operator]

    def get_share_params(self) -> Any:
        return self.encoder.parameters()

    def zero_grad_share_params(self) -> None:
        # As torch did when the release was written; it writes into gradients that must exist.
        self.encoder.zero_grad(set_to_none=False)


def _libmtl_rule(rule: str) -> type[nn.Module]:
    """LibMTL's own weighting for a rule, or its gradients combined by our weights."""
    if rule == "imtl_g":
        return libmtl_class("IMTL")
    base = libmtl_class("EW").__mro__[1]  # AbsWeighting
    method = methods.create(rule)

    def backward(self: Any, losses: Tensor, **arguments: Any) -> None:
        rows = self._get_grads(losses, mode="backward")
        weights = method.weights((rows @ rows.T).double())
        self._backward_new_grads(weights.to(rows), grads=rows)

    return type("Shim", (base,), {"backward": backward})


def libmtl_step(case: Case, rule: str) -> Step:
    model = type("Model", (_libmtl_rule(rule), _Surroundings), {})()
    model.set_up(case)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)  # its own parameters as well

    def step() -> None:
        losses, _ = case.losses()
        optimizer.zero_grad(set_to_none=True)
        vector = torch.zeros(case.n_tasks, device=case.batch.device)
        for k, loss in enumerate(losses):
            vector[k] = loss
        model.backward(vector)
        optimizer.step()

    return step


# ------------------------------------------------------------------------------- who takes part

EW, AGAIN, OURS, FEATURES = "ew", "ew again", "ours", "ours, features"
LIMIT, FLOOR = "limit", "floor"
TORCHJD = "torchjd"

REFERENCES = [
    Contender(EW, "reference", equal_step),
    Contender(AGAIN, "reference", equal_step),
    Contender(OURS, "ours", our_step, 1),
    Contender(FEATURES, "ours", our_feature_step),
    Contender(LIMIT, "reference", limit_step),
    Contender(FLOOR, "reference", floor_step),
]
TORCHJD_SETTINGS = [
    Contender(TORCHJD, "torchjd", torchjd_step(None, False), 3),
    Contender(f"{TORCHJD} chunk=1", "torchjd", torchjd_step(1, False), 3),
    Contender(f"{TORCHJD} ogc", "torchjd", torchjd_step(None, True), 2),
    Contender(f"{TORCHJD} ogc chunk=1", "torchjd", torchjd_step(1, True), 2),
    Contender(f"{TORCHJD} autogram", "torchjd", torchjd_autogram_step, 2),
]


def libmtl_contender(rule: str) -> Contender:
    own = rule == "imtl_g"
    name = "libmtl IMTL" if own else f"libmtl {rule} (shim)"
    return Contender(name, "libmtl", libmtl_step, 6 if own else 2)


def missing(family: str) -> str | None:
    """Why a peer cannot take part; None if it can."""
    module = {"torchjd": "torchjd", "libmtl": "LibMTL"}.get(family)
    # A peer put in place without its package (`libmtl_class`) has no spec to find again.
    if module is None or module in sys.modules or importlib.util.find_spec(module) is not None:
        return None
    return f"{module} is not installed; do: {INSTALL}"


def field(rule: str) -> list[Contender]:
    """All contenders for a rule.

    Raises:
        ValueError: unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"no rule {rule!r} to compare on; {nearest(rule, RULES, 'rules')}")
    return [*REFERENCES, *TORCHJD_SETTINGS, libmtl_contender(rule)]


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    found = {}
    for name in ("torchjd", "LibMTL"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
