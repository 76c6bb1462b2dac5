"""Result files and tables: nothing half written, nothing made up, every form well formed."""

import csv
import io
import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtl_tutorial import results
from mtl_tutorial.results import render, tables

PROTOCOL = {
    "epochs": 2,
    "batch_size": 100,
    "lr": 0.002,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "schedule": "constant",
    "report": "last",
    "note": "",
}


def result(label, seed=0, acc=90.0, err=0.5, **changes):
    """A finished result of two tasks, one metric each."""
    return {
        "format": results.FORMAT,
        "benchmark": "made",
        "synthetic": False,
        "baseline": True,
        "budget": "quick",
        "protocol": PROTOCOL,
        "label": label,
        "seed": seed,
        "metrics": {"a": {"acc": True}, "b": {"err": False}},
        "finished": True,
        "failed": None,
        "test": {"a": {"acc": acc}, "b": {"err": err}},
        "history": [],
        "seconds_per_epoch": 1.5,
        "device": {"name": "CPU one"},
        "versions": {"mtl_tutorial": "0.1.0", "torch": "2.15"},
    } | changes


def failed(label, seed, why="epoch 1: bad"):
    return result(label, seed, finished=False, failed=why, test=None)


def test_folders_have_names_that_every_system_takes():
    path = results.result_path(Path("out"), "b", "cpu-noise-left:0.4", "imtl:lr=0.1", 0, "abc")
    assert path.parts == ("out", "b", "cpu-noise-left-0.4", "imtl-lr=0.1", "seed0-abc.json")


# ------------------------------------------------------------------------------------ tables


def test_means_sample_deviations_delta_m_and_ranks_by_hand():
    runs = [
        result("single_task", 0, 80, 0.4),
        result("single_task", 1, 90, 0.6),  # baseline: 85 and 0.5
        result("x", 0, 86.7, 0.5),
        result("x", 1, 88.4, 0.6),
        result("y", 0, 90, 0.45),
    ]
    (table,) = tables(runs)
    assert [row.label for row in table.rows] == ["single_task", "y", "x"]
    base, y, x = table.rows
    assert base.scores["a"]["acc"] == pytest.approx((85, math.sqrt(50)))
    assert math.isnan(base.delta_m[0])
    assert math.isnan(base.mean_rank)
    assert x.scores["a"]["acc"] == pytest.approx((87.55, 1.7 / math.sqrt(2)))
    # Delta m of each seed against the mean baseline: (-2 + 0)/2 and (-4 + 20)/2.
    assert x.delta_m == pytest.approx((3.5, 9 / math.sqrt(2)))
    assert y.delta_m[0] == pytest.approx(50 * (-5 / 85 - 0.05 / 0.5))
    assert math.isnan(y.delta_m[1])  # one seed has no deviation
    assert (y.mean_rank, x.mean_rank) == (1.0, 2.0)
    assert (x.seeds, y.seeds) == ([0, 1], [0])


def test_text_of_the_same_table():
    runs = [result("single_task", 0, 80, 0.4), result("x", 0, 84, 0.5), result("x", 1, 88, 0.6)]
    header, body = results.cells(tables(runs)[0])
    assert header == [
        *("method", "a acc ↑", "b err ↓", "Delta m % ↓", "mean rank ↓", "s/epoch", "seeds")
    ]
    assert body == [
        ["single_task", "80.00", "0.40", "", "", "1.50", "1"],
        ["x", "86.00 ± 2.83", "0.55 ± 0.07", "15.00 ± 7.07", "1.0", "1.50", "2"],
    ]


def trial(label, lr, val, seed=0, test=90.0, **changes):
    """A run at one of several learning rates, with its validation accuracy."""
    history = [{"epoch": 1, "val": {"a": {"acc": val}, "b": {"err": 0.5}}}]
    return result(label, seed, test, lr=lr, history=history, **changes)


def test_learning_rate_is_chosen_by_validation_never_by_test_scores():
    runs = [
        trial("x", 0.1, val=80, test=99),
        trial("x", 0.3, val=85, test=70),
        trial("x", 0.3, val=10, seed=1, test=72),  # the later seeds have no say
        trial("x", 1.0, val=None, finished=False, failed="epoch 1: not finite"),
        trial("y", 0.1, val=80, test=60),
        trial("y", 0.3, val=70, test=95),
    ]
    assert results.best_rate(runs[:4]) == 0.3
    assert results.best_rate(runs[3:4]) is None
    (table,) = tables(runs)
    assert table.rates == [0.1, 0.3, 1.0]
    assert "lr of 0.1, 0.3, 1 by validation with seed 0" in table.title
    rows = {row.label: row for row in table.rows}
    assert (rows["x"].lr, rows["y"].lr) == (0.3, 0.1)
    assert rows["x"].scores["a"]["acc"][0] == 71
    assert rows["y"].scores["a"]["acc"][0] == 60
    header, body = results.cells(table)
    assert {row[0]: row[header.index("lr")] for row in body} == {"x": "0.3", "y": "0.1"}


def test_lower_is_better_where_the_metric_says_so_when_rates_are_compared():
    def of(lr, err):
        return result("x", lr=lr, history=[{"val": {"a": {"acc": 90.0}, "b": {"err": err}}}])

    assert results.best_rate([of(0.1, 0.6), of(0.3, 0.5), of(1.0, 0.7)]) == 0.3


@pytest.mark.parametrize("first", [0.0, 50.0])
def test_a_rate_can_be_chosen_where_the_first_one_scores_zero(first):
    def of(lr, acc, err):
        return result("x", lr=lr, history=[{"val": {"a": {"acc": acc}, "b": {"err": err}}}])

    found = [of(0.1, first, 0.5), of(0.3, 70.0, 0.4), of(1.0, 60.0, 0.4)]
    assert results.best_rate(found) == 0.3
    assert results.best_rate([of(0.1, 0.0, 0.5), of(0.3, 0.0, 0.4)]) == 0.3


def test_methods_are_compared_with_equal_weighting_seed_by_seed():
    runs = [
        *(result("equal", s, acc) for s, acc in enumerate((80, 100))),
        *(result("x", s, acc) for s, acc in enumerate((84, 90, 50))),
    ]
    (table,) = tables(runs)
    rows = {row.label: row for row in table.rows}
    # Delta m with the same seed: (-5 + 0)/2 and (10 + 0)/2; the third seed has no partner.
    assert rows["x"].against_equal == pytest.approx((1.25, 7.5 / math.sqrt(2)))
    assert math.isnan(rows["equal"].against_equal[0])
    header, body = results.cells(table)
    place = header.index("vs equal % ↓")
    assert {row[0]: row[place] for row in body} == {"x": "1.25 ± 5.30", "equal": ""}


def test_peak_memory_is_the_largest_of_the_seeds():
    runs = [result("x", 0, peak_memory_mb=10.4), result("x", 1, peak_memory_mb=20.6), result("y")]
    header, body = results.cells(tables(runs)[0])
    place = header.index("peak MB")
    assert {row[0]: row[place] for row in body} == {"x": "21", "y": ""}


def test_single_task_comes_first_and_what_only_failed_last():
    runs = [failed("aaa", 0), result("b", acc=99), result("single_task", acc=1), result("a", acc=9)]
    assert [r.label for r in tables(runs)[0].rows] == ["single_task", "b", "a", "aaa"]


def test_not_run_is_blank_and_failed_is_counted_and_said():
    runs = [result("x", 0), failed("x", 1, "epoch 3: x: not finite"), failed("y", 0)]
    (table,) = tables(runs)
    _, body = results.cells(table)
    assert body[0] == ["x", "90.00", "0.50", "", "1.0", "1.50", "1 (1 failed)"]
    assert body[1] == ["y", "", "", "", "", "", "0 (1 failed)"]
    text = render(table)
    assert "failed: x, seed 1: epoch 3: x: not finite" in text
    assert "failed: y, seed 0: epoch 1: bad" in text
    assert render(tables([failed("x", 0)])[0])  # nothing but a failure is a table too


def test_null_scores_are_blank_and_no_error():
    runs = [result("single_task"), result("x", acc=None), result("y")]
    (table,) = tables(runs)
    rows = {row[0]: row for row in results.cells(table)[1]}
    assert rows["x"][1:4] == ["", "0.50", ""]
    assert rows["y"][1:4] == ["90.00", "0.50", "0.00"]
    assert all(render(table, form) for form in results.TABLE_FORMATS)


def test_delta_m_over_the_first_measure_of_each_task_where_the_protocol_says_so():
    metrics = {"a": {"f1": True, "acc": True}, "b": {"f1": True, "acc": True}}

    def run(label, a, b):
        changes = {"metrics": metrics, "test": {"a": a, "b": b}}
        made = result(label, 0, 0, 0, **changes)
        return made | {"protocol": made["protocol"] | {"delta_m": "first"}}

    base = run("single_task", {"f1": 50, "acc": 90}, {"f1": 40, "acc": 80})
    equal = run("equal", {"f1": 55, "acc": 9}, {"f1": 38, "acc": 8})
    other = run("x", {"f1": 44, "acc": 1}, {"f1": 57, "acc": 2})
    (table,) = tables([base, equal, other])
    rows = {row.label: row for row in table.rows}
    assert rows["equal"].delta_m[0] == pytest.approx(100 * (-0.1 + 0.05) / 2)
    assert rows["x"].against_equal[0] == pytest.approx(100 * (0.2 - 0.5) / 2)
    assert "Delta m over each task's first measure" in table.title


def test_a_column_of_small_numbers_shows_four_decimals():
    runs = [result("single_task", 0, 80, 0.0126), result("single_task", 1, 80, 0.0124)]
    runs += [result("x", 0, 0.05, 0.0155)]
    (table,) = tables(runs)
    text = results.render(table)
    assert "0.0125 ± 0.0001" in text and "0.0155" in text
    assert "80.00 ± 0.00" in text and "0.05" in text  # one large mean keeps the column at two


def test_no_delta_m_without_baseline_runs_or_where_it_means_nothing():
    for runs in (
        [result("x")],
        [failed("single_task", 0), result("x")],
        [result("single_task", baseline=False), result("x", baseline=False)],
    ):
        assert all(math.isnan(row.delta_m[0]) for row in tables(runs)[0].rows)


def test_title_names_protocol_devices_and_versions():
    runs = [
        result("x", device={"name": "CPU two"}, synthetic=True),
        result("y", versions={"mtl_tutorial": "0.2.0", "torch": "2.16"}, synthetic=True),
        result("z", device={}, versions={}, synthetic=True),
    ]
    assert tables(runs)[0].title == (
        "made (synthetic), budget quick: 2 epochs, batch 100, adam lr 0.002, constant; test scores "
        "after the last epoch; CPU one; CPU two; unknown device; mtl_tutorial 0.1.0, torch 2.15; "
        "mtl_tutorial 0.2.0, torch 2.16; mtl_tutorial ?, torch ?"
    )


def test_protocols_budgets_and_benchmarks_are_never_mixed():
    runs = [
        result("x"),
        result("x", protocol=PROTOCOL | {"lr": 0.1}),
        result("x", budget="full"),
        result("x", benchmark="other"),
        result("y"),
    ]
    found = tables(runs)
    assert [len(t.rows) for t in found] == [2, 1, 1, 1]


# ------------------------------------------------------------------------------------- forms


@pytest.fixture
def table():
    runs = [result("single_task", s, 80 + s) for s in range(2)]
    runs += [result("x:lr=0.1,0.2|%&_$", 0, 85), failed("y", 0, 'a, "quoted" reason')]
    return tables(runs)[0]


def test_csv(table):
    rows = list(csv.reader(io.StringIO(render(table, "csv"))))
    header, body = results.cells(table)
    assert rows == [header, *body]


def test_json(table):
    data = json.loads(render(table, "json"))
    assert data["benchmark"] == "made"
    assert data["title"] == table.title
    assert [row["label"] for row in data["rows"]] == [row.label for row in table.rows]
    assert data["rows"][0]["scores"]["a"]["acc"] == pytest.approx([80.5, math.sqrt(0.5)])
    assert data["rows"][2]["scores"]["a"]["acc"] == [None, None]
    assert data["rows"][2]["failed"] == ['seed 0: a, "quoted" reason']


def test_markdown_has_as_many_cells_in_every_line():
    runs = [result("single_task"), result("x", 0), result("x", 1), failed("y", 0)]
    lines = render(tables(runs)[0], "markdown").splitlines()
    grid = [line for line in lines if line.startswith("|")]
    assert len(grid) == 2 + 3
    assert {line.count("|") for line in grid} == {8}
    assert set(grid[1]) <= set("|-: ")


def test_latex_is_one_tabular_with_escaped_text(table):
    text = render(table, "latex")
    title, rest = text.split("\n", 1)
    assert title == f"% {table.title}"
    assert rest.startswith(r"\begin{tabular}{lrrrrrr}")
    assert rest.rstrip().endswith(r"\end{tabular}")
    rows = [line for line in rest.splitlines() if line.rstrip().endswith(r"\\")]
    assert len(rows) == 4
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {6}
    assert r"single\_task" in rest
    assert r"\%\&\_\$" in rest
    assert not re.search(r"(?<!\\)[%$_]", rest)


def test_text_lines_up(table):
    lines = render(table).splitlines()
    assert lines[0] == table.title
    assert lines[1] == ""
    assert len({len(line) for line in lines[2:7]}) == 1


def test_unknown_form_is_an_error(table):
    with pytest.raises(ValueError, match="expected a table form of text, markdown"):
        render(table, "html")


# ------------------------------------------------------------------------------------- files

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=10,
)


@given(extra=trees)
def test_what_is_written_is_read_back(extra, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "deep" / "seed0-0.json"
    results.write_result(path, result("x", extra=extra))
    read = results.read_result(path)
    assert read == json.loads(json.dumps(results._plain(result("x", extra=extra))))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_nan_and_infinity_become_null(tmp_path):
    path = tmp_path / "seed0-0.json"
    results.write_result(
        path, result("x", acc=math.nan, history=[{"epoch": 1, "val": {}, "norms": (math.inf, 1.0)}])
    )
    read = results.read_result(path)
    assert read["test"]["a"]["acc"] is None
    assert read["history"][0]["norms"] == [None, 1.0]
    assert "NaN" not in path.read_text()


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    results.write_atomically(path, b"old")

    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        results.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "format 2"),
        ({"format": None}, "format None"),
        ({"protocol": []}, "no valid protocol"),
        ({"protocol": {"epochs": 1}}, r"no valid protocol.batch_size, protocol.optimizer"),
        ({"metrics": None, "label": 3}, "no valid label, metrics"),
        ({"seed": "0"}, "no valid seed"),
        ({"history": None}, "no valid history"),
        ({"history": [3]}, "no valid history"),
        ({"history": [{"epoch": 1}]}, "no valid history"),
        ({"label": "a\x1b[2J"}, "no valid label"),
        ({"metrics": {"a": {"acc": 1}}}, "no valid metrics"),
        ({"metrics": {}}, "no valid metrics"),
        ({"lr": 10**400}, "no valid lr"),
        ({"device": {"name": "a\nb"}}, "no valid device"),
        ({"test": {"a": 5}}, "no valid test"),
        ({"protocol": PROTOCOL | {"lr": "1"}}, r"no valid protocol\.lr"),
        ({"test": None}, "no valid test"),
    ],
)
def test_a_file_that_is_no_result_names_the_reason_and_the_cure(changes, why, tmp_path):
    path = tmp_path / "seed0-0.json"
    path.write_text(json.dumps(result("x") | changes))
    with pytest.raises(ValueError, match=why) as error:
        results.read_result(path)
    assert str(path) in str(error.value)
    assert "run the same command again" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"3"])
def test_a_file_that_is_no_json_is_a_value_error(content, tmp_path):
    path = tmp_path / "seed0-0.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="run the same command again"):
        results.read_result(path)


def test_good_files_are_loaded_and_bad_ones_complained_about(tmp_path):
    for seed in range(2):
        results.write_result(tmp_path / "a" / f"seed{seed}-0.json", result("x", seed))
    (tmp_path / "a" / "seed2-0.json").write_text("{")
    (tmp_path / "a" / ".seed3-0.json.tmp").write_text("half")
    (tmp_path / "a" / "seed4-0.broken").write_text("half")
    (tmp_path / "other.json").write_text("{}")
    found, complaints = results.load_results(tmp_path)
    assert [r["seed"] for r in found] == [0, 1]
    assert len(complaints) == 1
    assert "seed2-0.json" in complaints[0]


def test_missing_folder_and_file_for_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; make one with `mtl-tutorial run`"):
        results.load_results(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="is a file"):
        results.load_results(tmp_path / "file")


def test_identity_ignores_order_and_sees_every_value():
    def key(benchmark="b", budget="q", lr=0.1, settings=()):
        return results.identity(benchmark, budget, {"lr": lr, "n": 1}, dict(settings))

    assert re.fullmatch("[0-9a-f]{8}", key())
    assert key() == results.identity("b", "q", {"n": 1, "lr": 0.1}, {})
    others = [key("c"), key(budget="f"), key(lr=0.2), key(settings=[("a", 1)])]
    assert len({key(), *others}) == 5
