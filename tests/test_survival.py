"""The page on what every method survives: complete, up to date, and made from reports of pytest."""

import importlib.util
import json
from pathlib import Path

import pytest

from mtl_tutorial.methods import available

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("survival", ROOT / "book" / "survival.py")
survival = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(survival)

REPORT = json.loads(survival.STORE.read_text(encoding="utf-8"))
CELLS = survival.table_of(REPORT["runs"])


def test_page_is_up_to_date(capsys):
    assert survival.main(["--check"]) == 0, capsys.readouterr().err


def test_stale_page_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(survival, "PAGE", tmp_path / "survival.md")
    assert survival.main(["--check"]) == 1
    assert "python book/survival.py" in capsys.readouterr().err
    assert survival.main([]) == 0
    assert survival.main(["--check"]) == 0


def test_every_method_has_a_row():
    do = "run: python book/survival.py --run"
    assert sorted(CELLS) == available(), do


@pytest.mark.parametrize("name", survival.RUNS)
def test_every_part_was_run(name):
    if name not in REPORT["runs"]:  # the page's column is blank until then
        pytest.skip(f"not run yet; do: python book/survival.py --run {name}")
    assert REPORT["runs"][name]["cells"]


@pytest.mark.parametrize("method", available())
def test_every_cell_is_filled(method):
    for column in survival.COLUMNS:
        if not any(column in row for row in CELLS.values()):
            continue  # said by the test above
        cell = CELLS.get(method, {}).get(column, {"passed": 0, "failed": 0})
        assert cell["passed"] > 0, f"{method}, {column}: no test ran"
        assert cell["failed"] == 0, f"{method}, {column}: {cell['failed']} tests failed"


def test_environments_passed_without_a_failure():
    for key, each in REPORT["environments"].items():
        for path, counts in each["files"].items():
            assert counts["failed"] == 0, f"{key}, {path}"
            assert counts["passed"] > 0, f"{key}, {path}"


def test_outcomes_are_read_from_a_report(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite>"
        '<testcase name="test_a[x]"/>'
        '<testcase name="test_b[x]"><skipped message="why"/></testcase>'
        '<testcase name="test_c[x]"><failure message="no"/></testcase>'
        '<testcase name="test_d[x]"><error message="no"/></testcase>'
        "</testsuite></testsuites>",
        encoding="utf-8",
    )
    assert list(survival.reported(report)) == [
        ("test_a[x]", "passed", ""),
        ("test_b[x]", "skipped", "why"),
        ("test_c[x]", "failed", ""),
        ("test_d[x]", "failed", ""),
    ]


@pytest.mark.parametrize(
    ("run", "test", "where"),
    [
        ("ranks2", "test_ranks[2-equal_parts-aligned_mtl]", ("aligned_mtl", "2 processes")),
        ("ranks4", "test_ranks[4-uneven_parts-mgda]", ("mgda", "4 processes")),
        ("ranks2", "test_ranks[2-famo_by_hand-]", None),
        ("amp", "test_x[imtl_g-bfloat16]", ("imtl_g", "bfloat16")),
        ("amp", "test_x[imtl_g-float16]", ("imtl_g", "float16")),
        ("amp", "test_x[imtl_g]", ("imtl_g", "float16")),
        ("suite", "test_scaler_skips_it[imtl_g-loss]", ("imtl_g", "float16")),
        ("suite", "test_checkpoint_continues[famo]", ("famo", "resume")),
        ("training", "test_every_method_trains_and_resumes_exactly[famo]", ("famo", "resume")),
    ],
)
def test_names_of_tests_say_method_and_column(run, test, where):
    assert survival.place(test, survival.RUNS[run][1]) == where


def test_page_shows_failures_reasons_and_holes():
    cells = [
        {"column": "2 processes", "passed": 3, "failed": 2, "skipped": {}},
        {"column": "float16", "passed": 4, "failed": 0, "skipped": {"mgda sees no z": 1}},
        {"column": "float16", "passed": 5, "failed": 0, "skipped": {}},
    ]
    run = REPORT["runs"]["amp"] | {"cells": [{"method": "mgda", **cell} for cell in cells]}
    report = REPORT | {"runs": {"amp": run}}
    text = survival.page(report)
    assert "| `mgda` | **2 failed**, 3 passed |  | 9 a |  |  |" in text
    assert "* a: the method sees no z" in text
