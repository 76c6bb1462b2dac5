"""How far a contender's combined gradient is from the same step in float64.

The reference is the rule's definition on gradients computed in float64 from the same float32
numbers. Two errors meet in a figure: rounding in the gradients and their Gram matrix, and, with
peers, what their solvers leave open on purpose or by an early stop (TorchJD's MGDA and UPGrad).

A network with ReLUs has kinks. Of the five million activations of case b, two lie so close to zero
that float32 and float64 see them on different sides; each of the two gradients is then right where
it stands, and they differ by 1e-3, whatever an engine does. So the reference takes the side of zero
that float32 took, and the number of activations where float64 alone would have taken the other one
is reported beside the errors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import methods
from ..gradients import gram_matrix, task_gradients
from .cases import make
from .contenders import OURS, RULES, TORCHJD, Contender, field, missing
from .steps import Tell, fits

# The Gram matrix of TorchJD's default differs from that of its setting `ogc`; the other settings
# share one of the two.
COMPARED = (OURS, TORCHJD, f"{TORCHJD} ogc")


class Sides(TorchFunctionMode):
    """Notes on which side of zero each ReLU's input lies, or takes the sides that were noted.

    Args:
        given: one mask per call of a ReLU, in order; None to note them.
    """

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__()
        self.given = given
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_):
            return func(*args, **(kwargs or {}))
        self.seen.append(args[0].detach() > 0)
        if self.given is None:
            return func(*args, **(kwargs or {}))
        return args[0] * self.given[len(self.seen) - 1]


def references(case_name: str, device: torch.device) -> tuple[dict[str, Tensor], int, int]:
    """Each rule's step (P,) in float64, on float32's sides of the ReLUs' kinks.

    Returns:
        The steps by rule, how many activations float64 has on the other side, and of how many.
    """
    with Sides() as noted:
        make(case_name, device).losses()
    case = make(case_name, device).to(dtype=torch.float64)
    with Sides(noted.seen) as taken:
        losses, _ = case.losses()
    pairs = list(zip(noted.seen, taken.seen, strict=True))
    other = sum(int((a != b).sum()) for a, b in pairs)
    rows = task_gradients(losses, case.shared)
    gram = gram_matrix(rows)
    steps = {rule: methods.create(rule).weights(gram) @ rows for rule in RULES}
    return steps, other, sum(a.numel() for a, _ in pairs)


def shared_gradient(
    contender: Contender, case_name: str, rule: str, device: torch.device
) -> Tensor:
    """Gradient (P,) that a contender's first step leaves in the shared parameters."""
    case = make(case_name, device)
    contender.build(case, rule)()
    return torch.cat([p.grad.reshape(-1) for p in case.shared if p.grad is not None])


def measure(
    case_name: str, device: torch.device, tell: Tell = lambda _: None
) -> list[dict[str, Any]]:
    """Relative errors of ours and the peers, for every rule.

    Returns:
        Plain data per rule: per contender ``|d - d64| / |d64|``, or why there is none; and the
        number of activations that lie on the other side of zero in float64.
    """
    tell(f"case {case_name}: accuracy, float64")
    wanted, other, activations = references(case_name, device)
    case = make(case_name, device)
    parts = []
    for rule, want in wanted.items():
        tell(f"case {case_name}: accuracy of {rule}")
        rows: list[dict[str, Any]] = []
        for contender in field(rule):
            if contender.name not in COMPARED and contender.family != "libmtl":
                continue
            row: dict[str, Any] = {"name": contender.name, "family": contender.family}
            rows.append(row)
            why = missing(contender.family) or fits(contender, case, device)
            if why is None:
                try:
                    got = shared_gradient(contender, case_name, rule, device)
                    row["error"] = ((got - want).norm() / want.norm()).item()
                    continue
                except Exception as error:  # whatever a peer raises, the others go on
                    if contender.family == "ours":
                        raise
                    why = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
            row["failed"] = why
        sides = {"other_side": other, "activations": activations}
        parts.append({"case": case_name, "rule": rule, "rows": rows, **sides})
    return parts
