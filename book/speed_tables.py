"""Write book/speed.md: what a step costs, from the committed measurements.

Usage::

    python book/speed_tables.py            # write the page
    python book/speed_tables.py --check    # exit 1 if the page is not what would be written

The page is made from the files that ``mtl-tutorial speed --out`` wrote to ``book/speed``, and from
nothing else. Several files of one machine and allocator are runs of one measurement: the page shows
the median over them, and in brackets the least and the largest.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mtl_tutorial.speed.cases import CASES, GROWTH
from mtl_tutorial.speed.contenders import EW, FEATURES, FLOOR, LIMIT, OURS, TORCHJD

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "speed.md"
STORE = ROOT / "book" / "speed"

Run = dict[str, Any]
Row = dict[str, Any]

INTRODUCTION = """\
# What a step costs, measured

One training step is forward pass, gradients, weights and optimiser. Here it is timed against equal
weighting (`ew`: the sum of the losses, one backward pass), against TorchJD and against LibMTL, on
random data with Adam. {doc}`/notebooks/63_costs` says where the figures come from.

Each case has a process of its own: memory that another case freed would make large allocations
cheaper. The contenders take turns in it, in an order drawn anew in every round. Each runs once
untimed, then for half a second or a tenth of the longest step of all, whichever is more, and one
step at least; the median of these steps is its time in that round. Ratios are taken within a round,
and the median over the rounds counts. `ew` takes part twice: column A/A is its ratio to itself, the
noise. A run in which a case's A/A ratio is off by more than 5 % does not count for that case.
Brackets hold the least and the largest value over several runs.

Some runs of `a`, `c`, `d` and `d16`, and those of `sq` and `vit`, are from before the last change
to the engine, which takes a few percent from `c` and `d` at most. Two of them have no feature
level: it was measured anew when all heads were passed at once.

Our engine chooses its path by itself. TorchJD runs as its documentation writes it, and again at the
quickest of its settings, tried anew for each case and run. LibMTL's release lacks some methods; in
rows named "shim" its gradients are combined by our weights. On `sq` and `vit` nothing was tuned.

`limit` does what every method with one gradient per task has to do, by autograd, and nothing else;
where our engine gets the Gram matrix without these gradients, or computes them in a quicker layout,
it lies below that. `floor` leaves out the weights' gradients of all tasks but one, as if a Gram
matrix cost nothing: an exact step gets below it only by quicker operations than autograd's. A ratio
above one in the columns of the others says how many times longer they take than ours.
"""


def load(store: Path = STORE) -> list[Run]:
    """The committed measurements, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(store.glob("*.json"))]


def groups(runs: Iterable[Run]) -> dict[tuple[str, int, str], list[Run]]:
    """Runs by machine, threads and allocator."""
    found: dict[tuple[str, int, str], list[Run]] = {}
    for run in runs:
        device = run["device"]
        found.setdefault((device["name"], device["threads"], run["allocator"]), []).append(run)
    return found


# ------------------------------------------------------------------------------- numbers


def spread(values: Sequence[float | None], form: str = ".2f") -> str:
    """Median of what is there; least and largest where they look different."""
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    middle, least, most = (format(f(numbers), form) for f in (statistics.median, min, max))
    return middle if least == most else f"{middle} ({least} to {most})"


def named(case: Row, name: str) -> Row:
    """A contender's row; empty if it was not there."""
    return next((row for row in case["rows"] if row["name"] == name), {})


def of_family(case: Row, family: str) -> list[Row]:
    """Rows of a family that have a time."""
    return [r for r in case["rows"] if r["family"] == family and "ratio" in r]


def quickest(rows: list[Row]) -> Row:
    return min(rows, key=lambda row: row["ratio"], default={})


def measured(runs: Iterable[Run], names: Sequence[str]) -> dict[str, list[Row]]:
    """Measurements of each case, in the order of the names."""
    found = [case for run in runs for case in run.get("steps", [])]
    table = {name: [case for case in found if case["case"] == name] for name in names}
    return {name: cases for name, cases in table.items() if cases}


Column = Callable[[Row], float | None]
OWN: dict[str, Column] = {
    "ours / ew": lambda case: named(case, OURS).get("ratio"),
    "limit / ew": lambda case: named(case, LIMIT).get("ratio"),
    "floor / ew": lambda case: named(case, FLOOR).get("ratio"),
    "features / ew": lambda case: named(case, FEATURES).get("ratio"),
}
OWN_HEADER = [name.removesuffix(" / ew") for name in OWN]
PEERS: dict[str, Column] = {
    "TorchJD / ours": lambda case: named(case, TORCHJD).get("over_ours"),
    "its best / ours": lambda case: quickest(of_family(case, "torchjd")).get("over_ours"),
    "LibMTL / ours": lambda case: quickest(of_family(case, "libmtl")).get("over_ours"),
}
COLUMNS = OWN | PEERS


def steps_table(runs: list[Run]) -> list[str]:
    """One row per case, and what has to be said below."""
    body, below = [], []
    for name, cases in measured(runs, CASES).items():
        kept = [case for case in cases if not case["noisy"]]
        facts = cases[0]
        row = [name, str(facts["tasks"]), f"{facts['shared']:,}"]
        row += [spread([named(case, EW)["ms"] for case in kept], ".1f")]
        row += [spread([column(case) for case in kept]) for column in COLUMNS.values()]
        row += [spread([case["again"]["ratio"] for case in cases])]
        body.append(row)
        about = f"`{name}`: {facts['title']}."
        if len(kept) < len(cases):
            about += f" {len(cases) - len(kept)} of {len(cases)} runs were too noisy to count."
        settings = dict.fromkeys(c["torchjd_best"] for c in kept if c["torchjd_best"])
        if settings:
            about += f" TorchJD at its best: {', '.join(settings)}."
        below.append(f"- {about}{faster(kept)}{blank(cases)}")
    if not body:
        return []
    header = ["case", "K", "P", "ew, ms", *COLUMNS, "A/A"]
    return ["### Steps", table(header, body), "\n".join(below)]


def faster(cases: list[Row]) -> str:
    """A sentence on the peers that need less time than ours."""
    ratios: dict[str, list[float]] = {}
    for case in cases:
        for row in [*of_family(case, "torchjd"), *of_family(case, "libmtl")]:
            ratios.setdefault(row["name"], []).append(row["over_ours"])
    won = {name: statistics.median(r) for name, r in ratios.items() if statistics.median(r) < 1}
    if not won:
        return ""
    return " **Faster than ours:** " + ", ".join(f"{n} ({r:.2f})" for n, r in won.items()) + "."


def blank(cases: list[Row]) -> str:
    """A sentence on the peers that did not run."""
    failed = {
        row["name"]: row["failed"] for case in cases for row in case["rows"] if "failed" in row
    }
    return "".join(f" Blank: {name}, {why}." for name, why in failed.items())


def growth_table(runs: list[Run]) -> list[str]:
    """Multiples of equal weighting by number of tasks."""
    body = []
    for cases in measured(runs, GROWTH).values():
        kept = [case for case in cases if not case["noisy"]]
        facts = cases[0]
        row = [str(facts["tasks"]), f"{facts['shared']:,}"]
        row += [spread([named(case, EW)["ms"] for case in kept], ".1f")]
        row += [spread([column(case) for case in kept], ".1f") for column in OWN.values()]
        for family in ("torchjd", "libmtl"):
            best = [quickest(of_family(case, family)).get("ratio") for case in kept]
            row.append(spread(best, ".1f"))
        body.append([*row, spread([case["again"]["ratio"] for case in cases])])
    if not body:
        return []
    header = ["K", "P", "ew, ms", *OWN_HEADER, "TorchJD's best", "LibMTL", "A/A"]
    said = (
        "An MLP of three hidden layers with binary heads on one batch of 128, in multiples of "
        "equal weighting. A row stays empty where every run was too noisy to count."
    )
    return ["### More tasks, more parameters", said, table(header, body)]


def memory_table(runs: list[Run]) -> list[str]:
    """What a step needs beyond equal weighting."""
    found: dict[str, list[Row]] = {}
    for run in runs:
        for case in run.get("memory", []):
            found.setdefault(case["case"], []).append(case)
    body = []
    for name, cases in found.items():
        for contender in [row["name"] for row in cases[0]["rows"]]:
            rows = [named(case, contender) for case in cases]
            percent = spread([row.get("extra_percent") for row in rows], ".1f")
            peak = spread([row.get("peak_mb") for row in rows], ".0f")
            extra = spread([row.get("extra_mb") for row in rows], "+.0f")
            full = f"{cases[0]['full_mb']:,.0f}"
            body.append([name, full, contender, peak, extra, percent])
    if not body:
        return []
    said = (
        "Peak of one step, each contender in a fresh process: resident memory on the CPU, the "
        "allocator's count on CUDA. The last column is what a step needs beyond equal weighting, "
        "in percent of K x P floats."
    )
    header = ["case", "K x P, MB", "step", "peak, MB", "over ew, MB", "% of K x P"]
    return ["### Memory", said, table(header, body)]


def accuracy_table(runs: list[Run]) -> list[str]:
    """Largest error per case and contender."""
    errors: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in runs:
        for part in run.get("accuracy", []):
            rows = errors.setdefault((part["case"], part["rule"]), {})
            for row in part["rows"]:
                if "error" in row:
                    column = "libmtl" if row["family"] == "libmtl" else row["name"]
                    rows.setdefault(column, []).append(row["error"])
    if not errors:
        return []
    columns = list(dict.fromkeys(column for rows in errors.values() for column in rows))
    body = [
        [case, f"`{rule}`", *(f"{max(rows[c]):.0e}" if c in rows else "" for c in columns)]
        for (case, rule), rows in errors.items()
    ]
    said = (
        "The combined gradient of one step in float32 against the same step in float64: norm of "
        "the difference over the norm of the step. An activation that lies so close to zero that "
        "float64 puts it on the other side is put on float32's side in the reference."
    )
    return ["### Accuracy", said, table(["case", "method", *columns], body)]


def solver_table(runs: list[Run]) -> list[str]:
    """Microseconds per Gram matrix."""
    found: dict[tuple[str, int], list[Row]] = {}
    for run in runs:
        for row in run.get("solvers", []):
            found.setdefault((row["solver"], row["tasks"]), []).append(row)
    if not found:
        return []
    body = [
        [
            f"`{solver}`",
            str(tasks),
            spread([row["ours_us"] for row in rows], ".0f"),
            spread([row.get("torchjd_us") for row in rows], ".0f"),
            spread([row.get("ratio") for row in rows], ".1f"),
        ]
        for (solver, tasks), rows in found.items()
    ]
    said = "The weights alone, from a K x K Gram matrix, in microseconds."
    header = ["method", "K", "ours", "TorchJD", "TorchJD / ours"]
    return ["### Solvers", said, table(header, body)]


# ------------------------------------------------------------------------------- the page


def table(header: list[str], body: list[list[str]]) -> str:
    return tabulate(body, headers=header, tablefmt="pipe", disable_numparse=True)


def about(runs: list[Run]) -> str:
    """Where and when a group was measured."""
    versions = runs[0]["versions"]
    days = sorted({run["date"][:10] for run in runs})
    commits = sorted({str(run["commit"])[:7] for run in runs})
    rules = sorted({run["rule"] for run in runs})
    return (
        f"Method: {', '.join(f'`{rule}`' for rule in rules)}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f". {' to '.join(dict.fromkeys((days[0], days[-1])))}, commit {', '.join(commits)}, "
        + f"{len(runs)} file{'s' * (len(runs) > 1)}."
    )


def page(runs: list[Run]) -> str:
    """The text of book/speed.md."""
    blocks = [INTRODUCTION.rstrip("\n")]
    for (device, threads, allocator), mine in groups(runs).items():
        plural = "s" * (threads != 1)
        allocates = "" if allocator == "system" else f", allocator {allocator}"
        blocks += [f"## {device}, {threads} thread{plural}{allocates}", about(mine)]
        for write in (steps_table, growth_table, memory_table, accuracy_table, solver_table):
            blocks += write(mine)
    blocks.append(
        "## Measure it yourself\n\n"
        "```bash\npip install 'mtl-tutorial[speed]'\n"
        "mtl-tutorial speed --out speed.json\n```\n\n"
        "`--memory`, `--accuracy` and `--solvers` ask for the other tables, `--cases growth` for "
        "the one by number of tasks, `--device cuda` for a GPU. A file put into `book/speed` "
        "becomes part of this page by `python book/speed_tables.py`."
    )
    return "\n\n".join(blocks) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; the exit code."""
    parser = argparse.ArgumentParser(description="Write the page on what a step costs.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    asked = parser.parse_args(arguments)
    wanted = page(load())
    if asked.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{PAGE.name} is stale; do: python book/speed_tables.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
