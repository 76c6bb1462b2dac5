"""Settings for all tests: one thread, fixed seeds, reproducible properties, the method matrix."""

from __future__ import annotations

import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the toys are tiny: more threads only cost time

import pytest
import torch
from hypothesis import settings
from tiny import Tiny, prepared

from mtl_tutorial import benchmarks

torch.set_num_threads(1)

# Times vary on shared machines, so no deadline. On CI every run draws the same examples: a red run
# there means a change of the code, and new examples are looked for on people's own machines.
settings.register_profile("local", deadline=None, max_examples=25, database=None)
settings.register_profile("ci", parent=settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same global random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark of tiny.py goes by its name, also on a command line."""
    monkeypatch.setitem(benchmarks.CLASSES, "tiny", Tiny)


@pytest.fixture(scope="module")
def bench() -> Tiny:
    return prepared()


# ------------------------------------------------------------------- the method x policy matrix


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--matrix",
        action="store_true",
        help="print which method passed which policy of tests/methods/test_suite.py",
    )


_outcomes: dict[tuple[str, str], list[tuple[str, str]]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Collect the outcomes of the suite; under xdist they arrive here from all workers."""
    found = re.search(r"test_suite\.py::test_(\w+)\[([A-Za-z0-9_]+)", report.nodeid)
    if not found or (report.passed and report.when != "call"):
        return
    reason = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else ""
    policy, method = found.groups()
    _outcomes.setdefault((method, policy), []).append((report.outcome, reason))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--matrix") or not _outcomes:
        return
    write = terminalreporter.write_line
    methods = sorted({method for method, _ in _outcomes})
    policies = sorted({policy for _, policy in _outcomes})
    reasons: dict[str, str] = {}
    terminalreporter.section("methods x policies")
    write("'.' passed, 'F' failed, a letter skipped for the reason below, ' ' not run")
    for number, policy in enumerate(policies):
        write(f"{number:3d} {policy}")
    write(" " * 18 + "".join(f"{number:3d}" for number in range(len(policies))))
    for method in methods:
        cells = []
        for policy in policies:
            outcomes = _outcomes.get((method, policy), [])
            kinds = {kind for kind, _ in outcomes}
            if "failed" in kinds:
                cells.append("F")
            elif "passed" in kinds:
                cells.append(".")
            elif outcomes:
                reason = outcomes[0][1].removeprefix("Skipped: ")
                cells.append(reasons.setdefault(reason, chr(ord("a") + len(reasons))))
            else:
                cells.append(" ")
        write(f"{method:18s}" + "".join(f"{cell:>3s}" for cell in cells))
    for reason, letter in reasons.items():
        write(f"  {letter}  {reason}")
