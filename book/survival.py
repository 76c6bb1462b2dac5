"""Write book/survival.md: which method survived what, and where the tests ran.

Usage::

    python book/survival.py            # write the page
    python book/survival.py --check    # exit 1 if the page is not what would be written
    python book/survival.py --run      # run the tests behind the table, then write the page;
                                       # --run ranks2 for a part of them
    python book/survival.py --suite tests/methods ...   # run tests with this interpreter, note how
                                                        # many passed, then write the page

The page is made from ``book/survival.json`` and from nothing else, and that file from the reports
that pytest writes (``--junitxml``). A cell counts the tests of one method that show one property.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "survival.md"
STORE = ROOT / "book" / "survival.json"

COLUMNS = {
    "2 processes": "tests/distributed/test_ranks.py",
    "4 processes": "tests/distributed/test_ranks.py",
    "float16": "tests/methods/test_amp.py and the gradient scaler's tests in test_suite.py",
    "bfloat16": "tests/methods/test_amp.py",
    "resume": "tests/test_training.py and tests/methods/test_suite.py",
}


class Run(NamedTuple):
    """Tests to run, and how the name of one says column and method."""

    arguments: list[str]
    names: list[tuple[str, str]]


RANKS = [(r"test_ranks\[(?P<size>[24])-\w+-(?P<method>\w+)\]", "{size} processes")]
RUNS = {
    "amp": Run(
        ["tests/methods/test_amp.py"],
        [
            (r"test_\w+\[(?P<method>\w+)-bfloat16\]", "bfloat16"),
            (r"test_\w+\[(?P<method>\w+)(-float16)?\]", "float16"),
        ],
    ),
    "suite": Run(
        ["tests/methods/test_suite.py", "-k", "scaler or checkpoint or state_dict"],
        [
            (r"test_scaler_\w+\[(?P<method>\w+?)(-\w+)?\]", "float16"),
            (r"test_(checkpoint|state)_\w+\[(?P<method>\w+)\]", "resume"),
        ],
    ),
    "training": Run(
        ["tests/test_training.py", "-k", "resumes_exactly"],
        [(r"test_\w+_resumes_exactly\[(?P<method>\w+)\]", "resume")],
    ),
    "ranks4": Run(["tests/distributed/test_ranks.py", "-k", "[4-"], RANKS),
    "ranks2": Run(["tests/distributed/test_ranks.py", "-k", "[2-"], RANKS),
}

INTRODUCTION = """\
# What every method survives

<!-- Written by book/survival.py from book/survival.json: change those. -->

Each cell counts the tests that this method passed; a letter stands for tests that do not apply to
it, for the reason below. An empty column has not been run since this page is kept; an empty cell
elsewhere would be a method that nobody tried, and a test fails then.

* **2 processes, 4 processes**: data-parallel training over gloo ({doc}`many_processes`). Twenty
  steps on the parts of a batch give the parameters of one process on the joined batch, to a
  relative error of 1e-9 in float64; also with parts of different size, a process without labels of
  a task, one without any example, and a model wrapped in `DistributedDataParallel`. An error or an
  overflow on one process is one on all, and state is the same on all, bit for bit. Four processes
  repeat the checks that are about averages.
* **float16**: forward pass under autocast with a `GradScaler`. The update is that of float32 to the
  type's precision and the same for the scales 1 and 65536; a step that overflows is skipped, the
  scale halved, parameters and state untouched.
* **bfloat16**: forward pass under autocast; the update is that of float32 to the type's precision.
* **resume**: a training run that is interrupted within an epoch goes on from its checkpoint and
  equals one that was not, bit for bit, on the CPU: network, optimisers, the method's state, random
  generators, position in the epoch. Kills at random moments, full disks and cut files are counted
  apart: {doc}`faults`.
"""

ENVIRONMENTS = """\
## Where the tests ran

Files of tests that ran with other interpreters and releases, warnings as errors. Skipped are tests
that need a GPU, or a package that has no release for the interpreter. The workflows repeat all of
them: each supported Python at every push, lower bounds and newest releases every week.
"""


class Test(NamedTuple):
    """One line of pytest's report."""

    name: str
    outcome: str  # "passed", "skipped" or "failed"
    reason: str


def reported(path: Path) -> Iterator[Test]:
    """The tests in a report; an error in a fixture or on import is a failure."""
    for case in ElementTree.parse(path).iter("testcase"):
        found = {child.tag: child for child in case}
        outcome, reason = "passed", ""
        if "failure" in found or "error" in found:
            outcome = "failed"
        elif "skipped" in found:
            outcome, reason = "skipped", found["skipped"].get("message", "")
        yield Test(case.get("name", ""), outcome, reason)


def run_tests(arguments: Sequence[str]) -> list[Test]:
    """Run pytest in a process of its own.

    Raises:
        SystemExit: it wrote no report.
    """
    with tempfile.TemporaryDirectory(prefix="survival") as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run(
            [*command, f"--junitxml={report}", *arguments], cwd=ROOT, env=environment, check=False
        )
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{' '.join(arguments)}: {used.ru_utime + used.ru_stime:.0f} s of CPU so far")
        if not report.exists():
            sys.exit(f"pytest wrote no report on {' '.join(arguments)}; see its output above")
        return list(reported(report))


def place(test: str, names: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """Method and column of a test; None for one that is about no method."""
    for pattern, column in names:
        if match := re.fullmatch(pattern, test):
            return match["method"], column.format(**match.groupdict())
    return None


def about() -> dict[str, Any]:
    """Where and when the tests run."""
    from mtl_tutorial import training  # loads torch, which the page alone does not need

    versions = training.versions()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": training.describe_device(training.torch.device("cpu"))["name"],
        "commit": training.git_commit(),
        **{name: versions[name] for name in ("python", "torch", "numpy")},
    }


def outcomes(run: Run) -> list[dict[str, Any]]:
    """Run tests and count their outcomes, one entry per method and column."""
    from mtl_tutorial.methods import available

    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for test in run_tests(run.arguments):
        where = place(test.name, run.names)
        if where is None or where[0] not in available():
            continue
        method, column = where
        cell = {"method": method, "column": column, "passed": 0, "failed": 0, "skipped": {}}
        cell = cells.setdefault(where, cell)
        if test.outcome == "skipped":
            cell["skipped"][test.reason] = cell["skipped"].get(test.reason, 0) + 1
        else:
            cell[test.outcome] += 1
    return [cells[where] for where in sorted(cells)]


def table_of(runs: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The outcomes of all runs, added up by method and column."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs.values():
        for found in run["cells"]:
            row = cells.setdefault(found["method"], {})
            empty = {"passed": 0, "failed": 0, "skipped": {}}
            cell = row.setdefault(found["column"], empty)
            cell["passed"] += found["passed"]
            cell["failed"] += found["failed"]
            for reason, n in found["skipped"].items():
                cell["skipped"][reason] = cell["skipped"].get(reason, 0) + n
    return cells


def counted(arguments: Sequence[str]) -> dict[str, int]:
    """Outcomes of some tests, counted."""
    outcomes = [test.outcome for test in run_tests(arguments)]
    return {what: outcomes.count(what) for what in ("passed", "failed", "skipped")}


# ------------------------------------------------------------------------------------- the page


def table(cells: dict[str, Any]) -> list[str]:
    """Methods by columns, and what the letters mean."""
    letters: dict[str, str] = {}
    lines = [f"| method | {' | '.join(COLUMNS)} |", "|---|" + "---:|" * len(COLUMNS)]
    for method in sorted(cells):
        row = []
        for column in COLUMNS:
            cell = cells[method].get(column)
            if cell is None:
                row.append("")
                continue
            text = str(cell["passed"])
            if cell["failed"]:
                text = f"**{cell['failed']} failed**, {text} passed"
            for reason in sorted(cell["skipped"]):
                plain = reason.replace(method, "the method")
                text += " " + letters.setdefault(plain, chr(ord("a") + len(letters)))
            row.append(text)
        lines.append(f"| `{method}` | {' | '.join(row)} |")
    lines.append("")
    lines += [f"* {letter}: {reason}" for reason, letter in letters.items()]
    return lines


def provenance(run: dict[str, Any]) -> str:
    return (
        f"Run on {run['date']}, {run['device']}, Python {run['python']}, torch {run['torch']}, "
        f"numpy {run['numpy']}"
    )


def environments(found: dict[str, Any]) -> list[str]:
    """A row per interpreter and torch."""
    lines = ["| Python | torch | numpy | tests | passed | failed | skipped | date |"]
    lines.append("|---|---|---|---|---:|---:|---:|---|")
    for _, each in sorted(found.items()):
        files = sorted(each["files"])
        sums = [str(sum(f[k] for f in each["files"].values())) for k in ("passed", "failed")]
        sums.append(str(sum(f["skipped"] for f in each["files"].values())))
        names = ", ".join(f"`{name.removeprefix('tests/')}`" for name in files)
        if len(files) > 4:
            names = f"{len(files)} files and folders of `tests`"
        run = each["about"]
        row = [run["python"], run["torch"], run["numpy"], names, *sums, run["date"]]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def page(report: dict[str, Any]) -> str:
    """The report as a page of the book."""
    where = [f"* {column}: {tests}" for column, tests in COLUMNS.items()]
    runs = report["runs"]
    how = sorted({provenance(run["about"]) for run in runs.values()})
    lines = [INTRODUCTION, *table(table_of(runs)), ""]
    lines += [f"{'; '.join(how)}.", "", "The tests behind the columns:", ""]
    lines += [*where, "", "```bash", "python book/survival.py --run", "```", ""]
    if report["environments"]:
        lines += [ENVIRONMENTS, *environments(report["environments"]), ""]
        lines += ["```bash", "python book/survival.py --suite tests/methods", "```", ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for, write or check the page; the exit code."""
    parser = argparse.ArgumentParser(description="Write the page on what every method survives.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    parser.add_argument(
        "--run", nargs="*", choices=RUNS, help="run the tests behind the table first, or a part"
    )
    parser.add_argument(
        "--suite", nargs="+", default=[], metavar="PATH", help="run these tests and count them"
    )
    asked = parser.parse_args(arguments)
    report: dict[str, Any] = {"runs": {}, "environments": {}}
    if STORE.exists():
        report = json.loads(STORE.read_text(encoding="utf-8"))
    for name in [] if asked.run is None else asked.run or RUNS:
        report["runs"][name] = {"cells": outcomes(RUNS[name]), "about": about()}
        save(report)
    for path in asked.suite:
        counts, here = counted([path]), about()
        key = f"Python {here['python']}, torch {here['torch']}, numpy {here['numpy']}"
        known = report["environments"].get(key, {}).get("files", {})
        report["environments"][key] = {"files": {**known, path.rstrip("/"): counts}, "about": here}
        save(report)
    wanted = page(report)
    if asked.check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{PAGE.name} is stale; do: python book/survival.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


def save(report: dict[str, Any]) -> None:
    """Keep what there is, after every part."""
    STORE.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
