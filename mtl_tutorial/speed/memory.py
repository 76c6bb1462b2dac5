"""Peak memory of one step, each contender in a fresh process.

A process prepares everything, takes note of its memory, takes two steps (the first one allocates
the optimiser's state) and prints how far its peak lies above what it had before. On the CPU that is
resident memory, on CUDA what torch's allocator handed out. The difference to equal weighting is
what the gradients of single tasks cost.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from .cases import make
from .contenders import EW, Contender, field, missing
from .steps import Tell, fits, run_module

STATUS = Path("/proc/self/status")


def peak_of_step(case_name: str, contender_name: str, rule: str, device: torch.device) -> int:
    """Bytes by which two steps raise the peak of this process; only right in a fresh one."""
    (contender,) = [c for c in field(rule) if c.name == contender_name]
    step = contender.build(make(case_name, device), rule)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        step()
        return torch.cuda.max_memory_allocated(device) - before
    before = _resident()
    step()
    step()
    return max(_peak() - before, 0)


def _resident() -> int:
    """Resident memory now; puts the system's record of the peak back to it where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _from_status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _from_status("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _from_status(key: str) -> int:
    lines = STATUS.read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(line.split()[1])


def in_fresh_process(case_name: str, contender: str, rule: str, device: str, threads: int) -> int:
    """`peak_of_step`, in a process of its own.

    Raises:
        OSError: the process failed; the text is its last line.
    """
    arguments = [case_name, contender, rule, device, str(threads)]
    code, lines, output = run_module("memory", arguments)
    if code:
        raise OSError(lines[-1][:200] if lines else f"ended with code {code}")
    return int(json.loads(output.splitlines()[-1])["peak"])


def measure(
    case_name: str,
    rule: str,
    device: torch.device,
    threads: int,
    tell: Tell = lambda _: None,
    contenders: list[Contender] | None = None,
) -> dict[str, Any]:
    """Peaks of all contenders on a case.

    Returns:
        Plain data: per contender the peak in MB, the extra over equal weighting in MB, and that in
        percent of K x P floats; for one that could not run, why.
    """
    contenders = field(rule) if contenders is None else contenders
    case = make(case_name)
    full = 4 * case.n_tasks * case.n_shared
    rows: list[dict[str, Any]] = []
    base: float | None = None
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name, "family": contender.family}
        rows.append(row)
        why = missing(contender.family) or fits(contender, case, device)
        if why is None:
            tell(f"case {case_name}: memory of {contender.name}")
            try:
                peak = in_fresh_process(case_name, contender.name, rule, device.type, threads)
            except OSError as error:
                why = f"fails: {error}"
        if why is not None:
            row["failed"] = why
            continue
        row["peak_mb"] = peak / 2**20
        base = peak if contender.name == EW else base
        if base is not None:
            row["extra_mb"] = (peak - base) / 2**20
            row["extra_percent"] = 100 * (peak - base) / full
    facts = {"case": case_name, "title": case.title, "full_mb": full / 2**20}
    return {**facts, "tasks": case.n_tasks, "shared": case.n_shared, "rows": rows}


def main(arguments: list[str]) -> None:
    """Print one peak as JSON: case, contender, rule, device, threads."""
    case_name, contender, rule, device, threads = arguments
    torch.set_num_threads(int(threads))
    torch.set_flush_denormal(True)
    peak = peak_of_step(case_name, contender, rule, torch.device(device))
    print(json.dumps({"peak": peak}))


if __name__ == "__main__":
    main(sys.argv[1:])
