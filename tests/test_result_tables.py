"""The page of results is what the committed files say, and every table can be repeated."""

import importlib.util
import re
from pathlib import Path

from mtl_tutorial import results, training

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("result_tables", ROOT / "book" / "result_tables.py")
result_tables = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(result_tables)


def test_page_is_up_to_date(capsys):
    assert result_tables.main(["--check"]) == 0, capsys.readouterr().err


def test_stale_page_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(result_tables, "PAGE", tmp_path / "results.md")
    assert result_tables.main(["--check"]) == 1
    assert "python book/result_tables.py" in capsys.readouterr().err
    assert result_tables.main([]) == 0
    assert result_tables.main(["--check"]) == 0


def test_commands_name_methods_that_exist():
    found, complaints = results.load_results(result_tables.STORE)
    assert not complaints
    for table in results.tables(found):
        command = result_tables.command(table)
        named = ",".join(re.findall(r"methods=(?:\$methods,)?(\S+)", command))
        labels = [spec.label for spec in training.parse_specs(named)]
        assert sorted(labels) == sorted(row.label for row in table.rows)


def test_committed_runs_are_finished_and_say_where_they_come_from():
    found, _ = results.load_results(result_tables.STORE)
    assert found
    for run in found:
        assert run["finished"]
        assert run["device"]["name"]
        assert run["versions"]["torch"]
        assert run["commit"]
        assert run["data"] or run["synthetic"]
