"""The page of measured step costs: made from the committed files, and from runs that count."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("speed_tables", ROOT / "book" / "speed_tables.py")
speed_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(speed_tables)


def row(name: str, family: str, ratio: float) -> dict:
    """A contender that takes `ratio` times equal weighting's 10 ms; ours takes twice them."""
    return {
        "name": name,
        "family": family,
        "ms": 10 * ratio,
        "ratio": ratio,
        "low": ratio,
        "high": ratio,
        "over_ours": ratio / 2,
        "rounds": 9,
    }


CASE = {
    "case": "a",
    "title": "LeNet",
    "tasks": 2,
    "shared": 41_330,
    "untuned": False,
    "again": {"ratio": 1.01, "low": 1.0, "high": 1.02},
    "noisy": False,
    "torchjd_best": "torchjd chunk=1",
    "torchjd_tried_ms": {},
    "rows": [
        row("ew", "reference", 1.0),
        row("ours", "ours", 2.0),
        row("ours, features", "ours", 1.1),
        row("limit", "reference", 1.9),
        row("torchjd", "torchjd", 3.0),
        row("torchjd chunk=1", "torchjd", 1.8),
        {"name": "libmtl mgda", "family": "libmtl", "failed": "needs a GPU"},
    ],
}
RUN = {
    "format": 1,
    "kind": "speed",
    "rule": "aligned_mtl",
    "device": {"type": "cpu", "name": "CPU X", "threads": 1},
    "allocator": "system",
    "load_average": [0.1, 0.1, 0.1],
    "versions": {"torch": "2.15"},
    "commit": "0123456789",
    "date": "2026-11-23T00:00:00+00:00",
    "steps": [CASE],
}


def line(text: str, start: str) -> list[str]:
    """Cells of the table row that starts with a name."""
    (found,) = [part for part in text.splitlines() if part.startswith(f"| {start} ")]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_the_page_is_made_from_the_committed_files(capsys):
    assert speed_tables.main(["--check"]) == 0, capsys.readouterr().err


def test_check_fails_on_a_stale_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed_tables, "PAGE", tmp_path / "speed.md")
    assert speed_tables.main(["--check"]) == 1
    assert "python book/speed_tables.py" in capsys.readouterr().err
    assert speed_tables.main([]) == 0
    assert speed_tables.main(["--check"]) == 0


def test_several_runs_give_median_and_range_and_a_noisy_one_does_not_count():
    runs = [copy.deepcopy(RUN) for _ in range(4)]
    for run, ratio in zip(runs, (2.0, 2.2, 2.5, 9.0), strict=True):
        run["steps"][0]["rows"][1]["ratio"] = ratio
    runs[3]["steps"][0] |= {"noisy": True, "again": {"ratio": 1.2}}
    text = speed_tables.page(runs)
    cells = line(text, "a")
    assert cells[:5] == ["a", "2", "41,330", "10.0", "2.20 (2.00 to 2.50)"]
    assert cells[-1] == "1.01 (1.01 to 1.20)"
    assert "1 of 4 runs were too noisy to count" in text


def test_a_quicker_peer_is_named_and_one_that_did_not_run_is_blank():
    text = speed_tables.page([RUN])
    assert line(text, "a")[5:] == ["1.90", "", "1.10", "1.50", "0.90", "", "1.01"]
    assert "**Faster than ours:** torchjd chunk=1 (0.90)." in text
    assert "Blank: libmtl mgda, needs a GPU." in text


def test_the_floor_stands_beside_the_limit():
    run = copy.deepcopy(RUN)
    rows = run["steps"][0]["rows"]
    rows.append({**rows[1], "name": "floor", "family": "reference", "ratio": 1.25})
    assert line(speed_tables.page([run]), "a")[5:8] == ["1.90", "1.25", "1.10"]


def test_another_allocator_is_another_table():
    other = {**RUN, "allocator": "jemalloc"}
    text = speed_tables.page([RUN, other])
    assert "## CPU X, 1 thread\n" in text and "## CPU X, 1 thread, allocator jemalloc\n" in text


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], ""),
        ([None], ""),
        ([1.0, None], "1.00"),
        ([1.0, 1.001], "1.00"),
        ([1, 3], "2.00 (1.00 to 3.00)"),
    ],
)
def test_spread(values, text):
    assert speed_tables.spread(values) == text
