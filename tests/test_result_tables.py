"""The page of results is what the committed files say, and every table can be repeated."""

import importlib.util
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from mtl_tutorial import results, training
from mtl_tutorial.benchmarks import protocols

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


PUBLISHED = tomllib.loads(result_tables.PUBLISHED.read_text(encoding="utf-8"))["table"]
PROTOCOLS = {
    "nyuv2": protocols.NYUV2,
    "cityscapes": protocols.CITYSCAPES,
    "cityscapes3": protocols.CITYSCAPES_THREE,
    "celeba": protocols.CELEBA,
}


@pytest.mark.parametrize("known", PUBLISHED, ids=lambda known: known["title"])
def test_published_rows_are_whole_and_their_command_can_be_read(known):
    labels = []
    for name, label, source, *figures in known["rows"]:
        assert name
        assert source
        assert len(figures) == len(known["columns"])
        assert all(figure == "" or float(figure) is not None for figure in figures)
        labels += [label] if label else []
    specs = training.parse_specs(",".join(labels))
    assert {spec.label for spec in specs} == set(labels)
    if known["protocol"]:
        assert known["protocol"] in PROTOCOLS[known["benchmark"]]
        network = PROTOCOLS[known["benchmark"]][known["protocol"]].network
        # A network of branches has no feature level, so no row may promise one.
        assert network != "mtan" or all(spec.level == "parameter" for spec in specs)


def test_printed_delta_m_follows_from_the_printed_row():
    """Of NYUv2 under MTAN: a slip of the pen in a figure would show."""
    known = PUBLISHED[0]
    single = known["rows"][0][3:12]
    signs = [-1 if "↑" in column else 1 for column in known["columns"][:9]]
    for name, _, _, *figures in known["rows"][1:]:
        drops = [
            100 * sign * (float(ours) - float(base)) / float(base)
            for sign, ours, base in zip(signs, figures[:9], single, strict=True)
        ]
        # Two-digit depths and IMTL-G's own row leave this much room.
        assert sum(drops) / 9 == pytest.approx(float(figures[9]), abs=0.33), name


def test_published_section_is_blank_until_there_is_a_run():
    text = result_tables.published([])
    line = next(x for x in text.splitlines() if x.startswith("| Aligned-MTL ") and "28.88" in x)
    assert line.split("|")[-2].strip() == ""
    assert "57.20" in text  # as printed, with its zero
    assert "mtl-tutorial run nyuv2 --methods $methods --seeds 3" in text
    assert "--protocol mtan --out book/results" in text


def test_published_section_shows_a_run_that_is_there():
    found, _ = results.load_results(result_tables.STORE)
    found = [run for run in found if run["benchmark"] == "multidigits"]
    table = next(t for t in results.tables(found) if any(r.label == "famo" for r in t.rows))
    table = replace(table, benchmark="nyuv2", budget="mtan")
    famo = next(row for row in table.rows if row.label == "famo")
    text = result_tables.published([table])
    line = next(x for x in text.splitlines() if x.startswith("| FAMO ") and "29.21" in x)
    assert line.split("|")[-2].strip() == f"{famo.delta_m[0]:.2f}"


def test_command_repeats_precision_and_pieces():
    found, _ = results.load_results(result_tables.STORE)
    table = results.tables(found)[0]
    plain = result_tables.command(table)
    assert "--precision" not in plain
    changed = {**table.protocol, "precision": "bfloat16", "accumulate": 2, "channels_last": True}
    command = result_tables.command(replace(table, protocol=changed))
    assert "--precision bfloat16 --accumulate 2 --channels-last" in command
