"""The page of deviations: complete, up to date, and every test it names exists."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

import pytest

from mtl_tutorial.methods import available

ROOT = Path(__file__).resolve().parent.parent

# A script of the book, not a package: loaded by its path.
_spec = importlib.util.spec_from_file_location("deviations", ROOT / "book" / "deviations.py")
deviations = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(deviations)

ENTRIES = deviations.load()


@cache
def functions_in(file: str) -> set[str]:
    """Names of the test functions that a file defines at its top level."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_page_is_up_to_date(capsys):
    assert deviations.main(["--check"]) == 0, capsys.readouterr().err


def test_stale_page_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(deviations, "PAGE", tmp_path / "deviations.md")
    assert deviations.main(["--check"]) == 1
    assert "python book/deviations.py" in capsys.readouterr().err
    assert deviations.main([]) == 0
    assert deviations.main(["--check"]) == 0


@pytest.mark.parametrize("name", available())
def test_method_has_an_entry(name):
    assert name in {entry["method"] for entry in ENTRIES}


@pytest.mark.parametrize("test", sorted({entry["test"] for entry in ENTRIES}))
def test_named_test_exists(test):
    file, name = test.split("::")
    assert name.startswith("test_")
    assert name in functions_in(file)


def test_entries_say_what_is_done_here_on_one_line():
    for entry in ENTRIES:
        assert entry["ours"], entry["method"]
        assert not any("\n" in text for text in entry.values()), entry["method"]
    topics = [(entry["method"], entry["topic"]) for entry in ENTRIES if "topic" in entry]
    assert len(topics) == len(set(topics)), "expected each topic of a method once"


def test_incomplete_data_is_refused(tmp_path):
    path = tmp_path / "deviations_x.py"
    path.write_text("ENTRIES = []", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a list DEVIATIONS"):
        deviations.load(tmp_path)
    path.write_text("DEVIATIONS = [{'method': 'equal'}]", encoding="utf-8")
    with pytest.raises(ValueError, match="expected the fields method, paper"):
        deviations.load(tmp_path)
    entry = {**ENTRIES[0], "method": "imtk"}
    path.write_text(f"DEVIATIONS = [{entry!r}]", encoding="utf-8")
    with pytest.raises(ValueError, match="expected a method, got 'imtk'"):
        deviations.load(tmp_path)


def test_table_cell_shows_its_text_unchanged():
    assert deviations.escape("a|b * `x_1 * y` [z] $w$") == r"a\|b \* `x_1 * y` \[z] \$w\$"
