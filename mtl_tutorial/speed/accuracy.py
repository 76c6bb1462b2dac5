"""How far a contender's combined gradient is from the same step in float64.

The reference is the rule's definition on gradients computed in float64 from the same float32
numbers. Two errors meet in a figure: rounding in the gradients and their Gram matrix, and, with
peers, what their solvers leave open on purpose or by an early stop (TorchJD's MGDA and UPGrad).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import methods
from ..gradients import gram_matrix, task_gradients
from .cases import make
from .contenders import OURS, RULES, TORCHJD, Contender, field, missing
from .steps import Tell, fits

# The Gram matrix of TorchJD's default differs from that of its setting `ogc`; the other settings
# share one of the two.
COMPARED = (OURS, TORCHJD, f"{TORCHJD} ogc")


def references(case_name: str, device: torch.device) -> dict[str, Tensor]:
    """Each rule's step (P,) in float64."""
    case = make(case_name, device).to(dtype=torch.float64)
    rows = task_gradients(case.losses()[0], case.shared)
    gram = gram_matrix(rows)
    return {rule: methods.create(rule).weights(gram) @ rows for rule in RULES}


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
        Plain data per rule: per contender ``|d - d64| / |d64|``, or why there is none.
    """
    tell(f"case {case_name}: accuracy, float64")
    wanted = references(case_name, device)
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
        parts.append({"case": case_name, "rule": rule, "rows": rows})
    return parts
