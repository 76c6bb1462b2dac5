"""Figures: one look per method, every figure made, the same bytes from the same results."""

import copy
import itertools

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import pytest
from test_results import PROTOCOL, failed, result

from mtl_tutorial import methods, plots, results


@pytest.fixture(autouse=True)
def _no_figure_is_left_open():
    yield
    plt.close("all")


def run(label, seed=0, acc=90.0, weights=(0.3, 0.7), **changes):
    shared = label != "single_task"
    history = [
        {
            "epoch": e,
            "seconds": float(e),
            "train_losses": [1 / e, 2 / e],
            "weights": list(weights) if weights else None,
            "val": {"a": {"acc": acc - 10 / e}, "b": {"err": 0.5 + 1 / e}},
            **({"cosine": 0.1 * e - 0.2} if shared else {}),
        }
        for e in (1, 2, 3)
    ]
    return result(label, seed, acc, history=history, **changes)


RUNS = [
    *(run("single_task", seed, 85 + seed) for seed in range(2)),
    *(run("equal", seed, 86 + seed) for seed in range(2)),
    run("graddrop", weights=None),
    run("independent:optimizers=individual"),
]


def write(root, runs):
    for i, one in enumerate(runs):
        results.write_result(root / f"{i}" / f"seed{one['seed']}-{i:08x}.json", one)


def looks(label):
    look = plots.style(label)
    return look["color"], look["linestyle"], look["marker"]


# -------------------------------------------------------------------------------------- looks


def test_every_method_has_its_fixed_place():
    missing = set(methods.available()) - set(plots._ORDER)
    assert not missing, f"append {sorted(missing)} to _ORDER in mtl_tutorial/plots.py"
    assert len(set(plots._ORDER)) == len(plots._ORDER)
    assert all(len(name) > 1 for name in plots._ORDER), "a name was spread into its letters"


def test_no_two_methods_look_the_same_with_or_without_settings():
    known = [*plots._ORDER, *(f"{name}:x=1" for name in plots._ORDER)]
    assert len({looks(label) for label in known}) == len(known)


def test_looks_are_fixed_for_good():
    # Figures already printed use them; new methods are appended.
    assert looks("excess_mtl") == ("#0072B2", "-", "o")
    assert looks("aligned_mtl") == ("#D55E00", "-", "s")
    assert looks("equal") == ("#000000", "-", "X")
    assert looks("single_task") == ("#7F7F7F", "-", "*")
    assert plots._ORDER.index("individual") == 8


def test_settings_keep_the_colour_and_unknown_methods_get_a_look():
    assert plots.style("equal")["color"] == plots.style("equal:reduction=sum")["color"]
    assert looks("mine") == looks("mine")
    assert plots.style("mine")["label"] == "mine"


def test_colours_are_told_apart():
    def luminance(color):
        return [int(color[i : i + 2], 16) for i in (1, 3, 5)]

    for one, other in itertools.combinations(plots.COLORS, 2):
        apart = sum(abs(a - b) for a, b in zip(luminance(one), luminance(other), strict=True))
        assert apart > 60


def test_import_changes_no_setting_and_set_style_does():
    with mpl.rc_context():
        mpl.rcdefaults()
        assert mpl.rcParams["axes.spines.top"]
        plots.set_style()
        assert not mpl.rcParams["axes.spines.top"]
        assert tuple(mpl.rcParams["figure.figsize"]) == plots.SINGLE


# ------------------------------------------------------------------------------------ figures


def lines(figure, axes=0):
    return {x.get_label(): x for x in figure.axes[axes].lines if x.get_label()[0] != "_"}


def test_learning_curves_draw_the_mean_over_seeds():
    figure = plots.learning_curves(RUNS)
    assert [a.get_ylabel() for a in figure.axes] == ["a: acc", "b: err"]
    assert list(lines(figure)) == [
        *("single_task", "equal", "graddrop", "independent:optimizers=individual")
    ]
    assert list(lines(figure)["equal"].get_xdata()) == [1, 2, 3]
    assert list(lines(figure)["equal"].get_ydata()) == pytest.approx([76.5, 81.5, 86.5 - 10 / 3])
    thin = [x for x in figure.axes[0].lines if x.get_label()[0] == "_"]
    assert len(thin) == 4  # two methods of two seeds
    assert len(figure.legends[0].get_texts()) == 4


def test_weight_curves_are_shares_without_the_baseline_and_weightless_methods():
    figure = plots.weight_curves([*RUNS, run("famo", weights=(2.0, 6.0))])
    assert set(lines(figure)) == {"equal", "independent:optimizers=individual", "famo"}
    assert list(lines(figure)["famo"].get_ydata()) == pytest.approx([0.25] * 3)
    assert figure.axes[0].get_ylabel() == "weight of task a, share"


def test_cosine_curves_leave_out_what_has_no_shared_parameters():
    figure = plots.cosine_curves(RUNS)
    assert "single_task" not in lines(figure)
    assert list(lines(figure)["equal"].get_ydata()) == pytest.approx([-0.1, 0.0, 0.1])


def test_runs_of_unequal_length_and_gaps_are_drawn_as_far_as_they_go():
    short = copy.deepcopy(RUNS[2])
    short["history"] = short["history"][:2]
    figure = plots.learning_curves([short, RUNS[3]])
    assert list(lines(figure)["equal"].get_xdata()) == [1, 2]
    gap = copy.deepcopy(RUNS[2])
    for entry in gap["history"]:
        entry["val"]["a"]["acc"] = None
    assert "equal" not in lines(plots.learning_curves([gap, RUNS[4]]))


def test_comparison_has_a_panel_per_metric_and_one_for_delta_m():
    figure = plots.comparison(results.tables(RUNS)[0])
    assert [a.get_xlabel() for a in figure.axes] == [
        "a acc (higher is better)",
        "b err (lower is better)",
        "Delta m in % (lower is better)",
    ]
    shown = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    rows = [r.label for r in results.tables(RUNS)[0].rows if r.label != "single_task"]
    assert shown == rows[::-1]
    base = [x for x in figure.axes[0].lines if x.get_linestyle() == ":"]
    assert base[0].get_xdata()[0] == 85.5


@pytest.mark.parametrize(
    "runs",
    [[RUNS[0]], [run("equal")], [run("equal"), failed("mgda", 0)], [run("x", weights=(0.0, 0.0))]],
    ids=["baseline alone", "one run", "with a failure", "weights zero"],
)
def test_every_figure_of_little_is_made(runs, tmp_path):
    write(tmp_path, runs)
    assert len(plots.save_all(tmp_path, tmp_path / "out")) == 4


def test_saved_figures_are_complete_deterministic_and_named(tmp_path):
    write(tmp_path / "r", [*RUNS, failed("mgda", 0)])
    first = plots.save_all(tmp_path / "r", tmp_path / "one")
    assert [p.name for p in first] == [
        f"made-quick-{name}.png" for name in ("comparison", "curves", "weights", "cosine")
    ]
    second = plots.save_all(tmp_path / "r", tmp_path / "two")
    for one, two in zip(first, second, strict=True):
        data = one.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert data == two.read_bytes()
        assert b"Software" not in data
        assert plt.imread(one).std() > 0.01
    assert not plt.get_fignums()


def test_two_protocols_of_one_budget_keep_their_own_figures(tmp_path):
    write(tmp_path, [run("equal"), run("equal", protocol=PROTOCOL | {"lr": 0.5})])
    names = [p.name for p in plots.save_all(tmp_path, tmp_path / "out")]
    assert len(set(names)) == 8
    assert "made-quick-2-curves.png" in names


def test_nothing_finished_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="expected finished runs below"):
        plots.save_all(tmp_path, tmp_path / "out")
    write(tmp_path, [failed("equal", 0)])
    with pytest.raises(ValueError, match="expected finished runs below"):
        plots.save_all(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_noise_curves_show_clean_and_noisy_task_with_seeds():
    def noisy(label, level, scores):
        noise = f"a:{level}" if level else None
        metrics = {"a": {"acc": True}, "b": {"acc": True}, "c": {"acc": True}}
        return [
            run(label, seed, noise=noise, metrics=metrics)
            | {"test": {"a": {"acc": low}, "b": {"acc": high}, "c": {"acc": high + 2}}}
            for seed, (low, high) in enumerate(scores)
        ]

    runs = [
        *noisy("equal", 0, [(80, 90), (82, 94)]),
        *noisy("equal", 0.4, [(60, 85)]),
        *noisy("mgda", 0, [(70, 70)]),  # never with noise: left out
    ]
    figure = plots.noise_curves(runs, "a", "acc")
    clean, dirty = figure.axes
    assert clean.get_ylabel() == "mean of 2 clean tasks: acc"
    assert dirty.get_ylabel() == "a: acc"
    (line,) = [c[0] for c in clean.containers]
    assert line.get_xydata().tolist() == [[0, 93], [0.4, 86]]
    (bars,) = clean.containers[0][2]
    assert [abs(b - a) for (_, a), (_, b) in bars.get_segments()] == [
        pytest.approx(2 * 8**0.5),
        0,
    ]
    assert [c[0].get_xydata().tolist() for c in dirty.containers] == [[[0, 81], [0.4, 60]]]
