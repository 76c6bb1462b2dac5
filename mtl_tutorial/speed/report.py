"""All parts of a measurement: run them, store them, print them."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from .. import training
from ..names import nearest
from ..results import write_atomically
from . import accuracy, memory, solver_times, steps
from .cases import CASES, GROWTH
from .contenders import OURS, RULES, missing, peer_versions
from .steps import Tell

FORMAT = 1
PARTS = ("steps", "memory", "accuracy", "solvers")


# ------------------------------------------------------------------------------- run and store


def allocator() -> str:
    """The allocator of this process: "system", or the name of a preloaded one."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    known = ("jemalloc", "tcmalloc", "mimalloc")
    return next((name for name in known if name in preloaded), "system")


def provenance(device: torch.device, rule: str) -> dict[str, Any]:
    """What the numbers depend on besides the code that they time."""
    try:
        load = list(os.getloadavg())
    except (AttributeError, OSError):  # not on every system
        load = None
    return {
        "format": FORMAT,
        "kind": "speed",
        "rule": rule,
        "device": training.describe_device(device),
        "allocator": allocator(),
        "load_average": load,
        "versions": {**training.versions(), **peer_versions()},
        "commit": training.git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def check(cases: Sequence[str], rule: str, rounds: int, seconds: float, threads: int) -> None:
    """Refuse bad arguments before anything is measured.

    Raises:
        ValueError: an unknown case or rule, or a number out of range.
    """
    for name in cases:
        if name not in (*CASES, *GROWTH):
            raise ValueError(f"no case {name!r}; {nearest(name, [*CASES, 'growth'], 'cases')}")
    if rule not in RULES:
        raise ValueError(f"no method {rule!r} to compare on; {nearest(rule, RULES, 'methods')}")
    for what, value in (("rounds", rounds), ("threads", threads)):
        if value < 1:
            raise ValueError(f"expected --{what} of 1 or more, got {value}")
    if not seconds > 0:
        raise ValueError(f"expected --seconds above 0, got {seconds}")


def measure(
    parts: Sequence[str],
    cases: Sequence[str],
    rule: str,
    device: torch.device,
    rounds: int,
    seconds: float,
    threads: int,
    tell: Tell = lambda _: None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the parts that are asked for; with `out`, store what is there after every case.

    Args:
        parts: of `PARTS`.
        cases: of `cases.CASES`; the solvers need none.
        rule: of `contenders.RULES`; the accuracy is of all of them.
        device: where to run.
        rounds, seconds: per case, which has a process of its own; see `steps.interleave`.
        threads: torch's threads on the CPU.
        tell: gets a line on what is going on.
        out: result file, replaced if it exists.
    """
    check(cases, rule, rounds, seconds, threads)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # random models make denormal numbers, at many times the price
    result = {**provenance(device, rule), **{part: [] for part in parts}}

    def keep(part: str, found: list[dict[str, Any]]) -> None:
        result[part] += found
        if out is not None:
            write_atomically(out, (json.dumps(result, indent=1) + "\n").encode())

    if "steps" in parts:
        for case in cases:
            arguments = (case, rule, device, rounds, seconds, threads, tell)
            keep("steps", [steps.in_fresh_process(*arguments)])
    if "memory" in parts:
        for case in cases:
            keep("memory", [memory.measure(case, rule, device, threads, tell)])
    if "accuracy" in parts:
        for case in cases:
            keep("accuracy", accuracy.measure(case, device, tell))
    if "solvers" in parts:
        keep("solvers", solver_times.measure(tell=tell))
    return result


# ------------------------------------------------------------------------------- print


def render(result: dict[str, Any]) -> str:
    """A measurement as text."""
    writers: dict[str, Callable[[list[dict[str, Any]]], list[str]]] = {
        "steps": lambda found: [text for case in found for text in _steps(case)],
        "memory": lambda found: [text for case in found for text in _memory(case)],
        "accuracy": _accuracy,
        "solvers": lambda found: _solvers(found, _case_a(result)),
    }
    blocks = [_header(result)]
    for part, write in writers.items():
        blocks += write(result[part]) if result.get(part) else []
    return "\n\n".join(blocks)


def _header(result: dict[str, Any]) -> str:
    device, versions = result["device"], result["versions"]
    load = result["load_average"]
    lines = [
        f"{device['name']}, {device['threads']} thread{'s' * (device['threads'] != 1)}, "
        f"allocator: {result['allocator']}, "
        f"load before: {'unknown' if load is None else f'{load[0]:.1f}'}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    lines += [f"{f}: blank, {why}" for f in ("torchjd", "libmtl") if (why := missing(f))]
    return "\n".join(lines)


def _table(header: Sequence[str], body: list[list[str]]) -> str:
    right = ["right"] * (len(header) - 1)
    return tabulate(
        body, headers=header, tablefmt="simple", disable_numparse=True, colalign=("left", *right)
    )


def _number(row: dict[str, Any], key: str, form: str) -> str:
    value = row.get(key)
    return "" if value is None else format(value, form)


def _why(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['name']}: {row['failed']}" for row in rows if "failed" in row]


def _title(case: dict[str, Any]) -> str:
    return f"{case['case']}: {case['title']}, K={case['tasks']}, P={_short(case['shared'])}"


def _short(n: int) -> str:
    return f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}k"


def _steps(case: dict[str, Any]) -> list[str]:
    rows, again = case["rows"], case["again"]
    body = [
        [
            row["name"],
            _number(row, "ratio", ".2f"),
            f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else "",
            _number(row, "ms", ".1f"),
            _number(row, "over_ours", ".2f"),
            _number(row, "rounds", "d"),
        ]
        for row in rows
    ]
    header = ["step", "x ew", "over rounds", "ms", "x ours", "rounds"]
    lines = [_title(case) + (" (nothing is tuned on it)" if case["untuned"] else "")]
    if case["noisy"]:
        lines.append(f"NOISY: ew again takes {again['ratio']:.2f} times ew; not to be quoted")
    lines += ["", _table(header, body)]
    if case["torchjd_best"]:
        lines.append(f"TorchJD at its best: {case['torchjd_best']}")
    for row in rows:
        if row["family"] in ("torchjd", "libmtl") and row.get("over_ours", 1) < 1:
            lines.append(f"faster than ours: {row['name']}, {1 / row['over_ours']:.2f} times")
    return ["\n".join([*lines, *_why(rows)])]


def _memory(case: dict[str, Any]) -> list[str]:
    keys = (("peak_mb", ".0f"), ("extra_mb", "+.0f"), ("extra_percent", "+.1f"))
    body = [[r["name"], *(_number(r, key, form) for key, form in keys)] for r in case["rows"]]
    title = f"Memory of a step, {_title(case)}: K x P floats are {case['full_mb']:.0f} MB"
    table = _table(["step", "peak MB", "over ew MB", "% of K x P"], body)
    return ["\n".join([title, "", table, *_why(case["rows"])])]


def _accuracy(found: list[dict[str, Any]]) -> list[str]:
    names = {row["name"]: row["family"] for part in found for row in part["rows"]}
    names = {n: f for n, f in names.items() if f != "libmtl"}
    header = ["relative error", *names, "libmtl"]
    body: list[list[str]] = []
    why: dict[str, None] = {}
    for part in found:
        rows = {row["name"]: row for row in part["rows"]}
        libmtl = [row for row in part["rows"] if row["family"] == "libmtl"]
        cells = [_number(rows.get(name, {}), "error", ".0e") for name in names]
        cells += [" ".join(_number(row, "error", ".0e") for row in libmtl)]
        body.append([f"{part['case']} {part['rule']}", *cells])
        why |= dict.fromkeys(f"{part['case']}, {line}" for line in _why(part["rows"]))
        if part.get("other_side"):
            why[
                f"{part['case']}: {part['other_side']} of {part['activations']:,} activations lie "
                "on the other side of zero in float64; the reference takes float32's side"
            ] = None
    title = "Combined gradient against the same step in float64"
    return ["\n".join([title, "", _table(header, body), *why])]


def _case_a(result: dict[str, Any]) -> float | None:
    """Microseconds of our step in case a, where it was measured."""
    for case in result.get("steps", []):
        if case["case"] == "a" and not case["noisy"]:
            return 1e3 * next(row["ms"] for row in case["rows"] if row["name"] == OURS)
    return None


def _solvers(found: list[dict[str, Any]], step: float | None) -> list[str]:
    header = ["solver", "K", "ours us", "torchjd us", "torchjd / ours", "% of step a"]
    body = [
        [
            row["solver"],
            str(row["tasks"]),
            _number(row, "ours_us", ".0f"),
            _number(row, "torchjd_us", ".0f"),
            _number(row, "ratio", ".2f"),
            f"{100 * row['ours_us'] / step:.2f}" if step and row["tasks"] == 2 else "",
        ]
        for row in found
    ]
    why = dict.fromkeys(f"{row['solver']}: {row['failed']}" for row in found if "failed" in row)
    return ["\n".join(["Solvers alone, on the same Gram matrices", "", _table(header, body), *why])]
