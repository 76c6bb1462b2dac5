"""Figures from result files, in one style; a method looks the same in every figure.

Nothing happens at import: `set_style` is called by who wants it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from . import results
from .noise import parse_noise

SINGLE = (5.5, 3.4)  # inches
PAIR = (7.6, 3.0)
MOST_PANELS = 5

# Okabe and Ito's colour-blind safe colours, without their yellow, which is faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

# The order fixes each method's look for good: append, never insert. Colours repeat after eight
# with another line and marker, so the methods that meet most often stand among the first.
_ORDER = (
    *("excess_mtl", "aligned_mtl", "imtl_g", "imtl", "independent", "imtl_l", "equal"),
    *("single_task", "individual", "joint", "mgda", "cagrad", "nash_mtl", "pcgrad"),
    *("upgrad", "config", "fairgrad", "dualproj", "gradnorm", "uncertainty", "dwa"),
    *("famo", "slaw", "group_dro", "rlw", "geometric", "gradvac", "graddrop"),
    *("sdmgrad", "db_mtl", "ngdiff", "cross_learning", "stch", "scale_invariant"),
    *("config_momentum", "gen_lr"),
)


def style(label: str) -> dict[str, Any]:
    """Colour, line and marker of a method, the same everywhere.

    Args:
        label: method name, with or without settings; settings change line and marker only.

    Returns:
        Keyword arguments of ``Axes.plot``.
    """
    name, _, settings = label.partition(":")
    index = _ORDER.index(name) if name in _ORDER else len(_ORDER) + sum(name.encode()) % 8
    lap = index // len(COLORS) + (2 if settings else 0)
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": _LINES[lap % len(_LINES)],
        "marker": _MARKERS[(index + index // len(COLORS) + (3 if settings else 0)) % len(_MARKERS)],
        "markersize": 4,
        "label": label,
    }


def set_style() -> None:
    """The book's look: white ground, no frame on top and right, readable at column width."""
    mpl.rcParams.update(
        {
            "figure.figsize": SINGLE,
            "figure.dpi": 110,
            "savefig.dpi": 150,
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "savefig.bbox": "tight",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "font.size": 9,
            "legend.frameon": False,
            "legend.fontsize": 8,
            "lines.linewidth": 1.5,
        }
    )


Runs = Sequence[dict[str, Any]]


def _by_label(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if run["finished"]:
            groups.setdefault(run["label"], []).append(run)
    return dict(sorted(groups.items(), key=lambda kv: (kv[0] != results.BASELINE, kv[0])))


def _lines(
    axes: Axes, runs: Runs, value: Callable[[dict[str, Any]], float | None], what: str
) -> None:
    """One line per method: the mean over seeds, seeds as thin lines."""
    for label, group in _by_label(runs).items():
        curves = []
        for run in group:
            points = [(h["epoch"], value(h)) for h in run["history"]]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                curves.append(np.array(points, dtype=float).T)
        if not curves:
            continue
        look = style(label)
        for x, y in curves if len(curves) > 1 else []:
            axes.plot(x, y, color=look["color"], linewidth=0.5, alpha=0.3)
        shortest = min(len(c[0]) for c in curves)
        mean = np.mean([c[1][:shortest] for c in curves], axis=0)
        axes.plot(curves[0][0][:shortest], mean, markevery=max(1, shortest // 6), **look)
    axes.set_xlabel("epoch")
    axes.set_ylabel(what)


def _legend(figure: Figure) -> None:
    """One legend to the right of all axes."""
    found = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if found:
        figure.legend(found.values(), found.keys(), loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()


def learning_curves(runs: Runs) -> Figure:
    """Validation score against epoch, one panel per task, for the first metric of each.

    With more than five tasks, one panel with their mean.
    """
    metrics = runs[0]["metrics"]
    shown = list(metrics.items())
    if len(shown) > MOST_PANELS:
        shown = [(f"mean of {len(metrics)} tasks", next(iter(metrics.values())))]
    width = PAIR[0] / 2 * max(2, len(shown))
    figure, panels = plt.subplots(1, len(shown), figsize=(width, PAIR[1]), squeeze=False)
    for axes, (task, names) in zip(panels[0], shown, strict=True):
        metric = next(iter(names))

        def value(h: dict[str, Any], task: str = task, metric: str = metric) -> float | None:
            if task in h["val"]:
                return h["val"][task][metric]
            return float(np.mean([scores[metric] for scores in h["val"].values()]))

        _lines(axes, runs, value, f"{task}: {metric}")
    _legend(figure)
    return figure


def weight_curves(runs: Runs) -> Figure:
    """Mean weight of the first task as a share of all weights, against epoch."""
    figure, axes = plt.subplots(figsize=SINGLE)

    def share(h: dict[str, Any]) -> float | None:
        weights = h.get("weights")
        return weights[0] / sum(weights) if weights and sum(weights) else None

    shown = [r for r in runs if r["label"] != results.BASELINE]
    first = next(iter(runs[0]["metrics"]))
    _lines(axes, shown, share, f"weight of task {first}, share")
    _legend(figure)
    return figure


def cosine_curves(runs: Runs) -> Figure:
    """Mean cosine between task gradients on a fixed validation batch, against epoch."""
    figure, axes = plt.subplots(figsize=SINGLE)
    axes.axhline(0, color="#7F7F7F", linewidth=0.8)
    _lines(axes, runs, lambda h: h.get("cosine"), "cosine of task gradients")
    _legend(figure)
    return figure


def noise_curves(runs: Runs, task: str, metric: str) -> Figure:
    """Score of the clean tasks and of the noisy one against the noise, one line per method.

    Args:
        runs: one benchmark and budget, without noise and with noise on `task`.
        task: name of the noisy task.
        metric: name of the score; the clean tasks' panel shows its mean over them.

    Returns:
        Two panels; a bar is the standard deviation over seeds. Methods that ran without noise
        alone are left out.
    """
    scores: dict[str, dict[float, list[dict[str, Any]]]] = {}
    for run in results.with_best_rates(runs):
        if run["finished"]:
            level = parse_noise(run["noise"]).fraction if run.get("noise") else 0.0
            scores.setdefault(run["label"], {}).setdefault(level, []).append(run["test"])
    clean = [name for name in runs[0]["metrics"] if name != task]
    figure, panels = plt.subplots(1, 2, figsize=PAIR, sharex=True)
    for axes, tasks in zip(panels, (clean, [task]), strict=True):
        for label, levels in sorted(scores.items()):
            if set(levels) == {0.0}:
                continue
            seeds = [
                [np.mean([test[name][metric] for name in tasks]) for test in levels[level]]
                for level in sorted(levels)
            ]
            bars = [np.std(s, ddof=1) if len(s) > 1 else 0.0 for s in seeds]
            means = [np.mean(s) for s in seeds]
            axes.errorbar(sorted(levels), means, yerr=bars, capsize=2, **style(label))
        what = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} clean tasks"
        axes.set_ylabel(f"{what}: {metric}")
        axes.set_xlabel(f"share of random labels on {task}")
    _legend(figure)
    return figure


def comparison(table: results.Table) -> Figure:
    """Score of each task per method as points with standard deviation over seeds.

    The single-task baseline is a line; Delta m stands beside where it means something.
    """
    numbers = results.columns(table)
    rows = [r for r in table.rows if r.seeds and r.label != results.BASELINE][::-1]
    base = next((r for r in table.rows if r.label == results.BASELINE and r.seeds), None)
    with_delta = base is not None and any(not np.isnan(r.delta_m[0]) for r in rows)
    size = (2.6 * (len(numbers) + with_delta) + 1.6, 0.3 * len(rows) + 1.2)
    figure, panels = plt.subplots(
        1, len(numbers) + with_delta, figsize=size, squeeze=False, sharey=True
    )
    heights = np.arange(len(rows))
    for axes, (name, up, value) in zip(panels[0], numbers, strict=False):
        _points(axes, rows, [value(row) for row in rows])
        axes.set_xlabel(f"{name} ({'higher' if up else 'lower'} is better)")
        if base is not None:
            axes.axvline(value(base)[0], color="#7F7F7F", linestyle=":")
    if with_delta:
        axes = panels[0][-1]
        _points(axes, rows, [r.delta_m for r in rows])
        axes.axvline(0, color="#7F7F7F", linestyle=":")
        axes.set_xlabel("Delta m in % (lower is better)")
    panels[0][0].set_yticks(heights, [r.label for r in rows])
    panels[0][0].set_ylim(-0.6, len(rows) - 0.4)
    figure.tight_layout()
    return figure


def _points(axes: Axes, rows: Sequence[results.Row], values: Sequence[tuple[float, float]]) -> None:
    for height, (row, (mean, std)) in enumerate(zip(rows, values, strict=True)):
        look = style(row.label)
        axes.errorbar(
            mean,
            height,
            xerr=0 if np.isnan(std) else std,
            color=look["color"],
            marker=look["marker"],
            capsize=2,
        )


def contact_sheet(
    images: Tensor, truths: Sequence[Tensor], outputs: Sequence[Tensor], kinds: Sequence[str]
) -> Figure:
    """Images with true and predicted maps below each other, one column per image.

    Args:
        images: (N, 3, H, W), from 0 to 1.
        truths: true maps of each task, as a benchmark has them.
        outputs: what the network gives for each task, (N, C, H, W).
        kinds: "label", "depth" and so on, see `mtl_tutorial.benchmarks.dense`; one output channel
            of a label map is in or out.
    """
    rows: list[tuple[str, list[NDArray[Any]], dict[str, Any]]] = [
        ("image", list(images.permute(0, 2, 3, 1).numpy()), {})
    ]
    for k, (kind, truth, output) in enumerate(zip(kinds, truths, outputs, strict=True)):
        said, scale = output, {}
        if kind == "label":
            n = max(2, output.shape[1])
            said = output.argmax(1) if output.shape[1] > 1 else (output[:, 0] > 0).long()
            scale = {"cmap": "tab20", "vmin": 0, "vmax": n - 1, "interpolation": "nearest"}
        elif kind in ("depth", "disparity"):
            said, scale = output[:, 0], {"vmin": float(truth.min()), "vmax": float(truth.max())}
        elif kind == "normal":
            truth, said = (
                (F.normalize(m, dim=1).permute(0, 2, 3, 1) + 1).div(2).clamp(0, 1)
                for m in (truth, output)
            )
        else:  # offsets: their length
            truth, said = truth.norm(dim=1), output.norm(dim=1)
        void = truth.float().where(truth != -1, torch.nan) if kind == "label" else truth
        rows += [(f"task {k + 1}, true", list(void.numpy()), scale)]
        rows += [(f"task {k + 1}, predicted", list(said.numpy()), scale)]
    height, width = images.shape[-2:]
    side = 1.5
    figure, panels = plt.subplots(
        len(rows),
        len(images),
        figsize=(side * len(images) + 1, side * height / width * len(rows)),
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, pictures, how) in zip(panels, rows, strict=True):
        for one, picture in zip(axes, pictures, strict=True):
            one.imshow(picture, **how)
            one.set_xticks([])
            one.set_yticks([])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def save_all(root: Path, folder: Path) -> list[Path]:
    """Write every figure of every table below an output folder; returns the files.

    Raises:
        ValueError: no finished run below `root`.
    """
    found, _ = results.load_results(root)
    written: list[Path] = []
    groups: list[str] = []
    with mpl.rc_context():
        set_style()
        for table in results.tables(found):
            mine = [r for r in found if table.holds(r)]
            runs = [r for r in results.with_best_rates(mine) if r["finished"]]
            if not runs:
                continue
            figures = {
                "comparison": comparison(table),
                "curves": learning_curves(runs),
                "weights": weight_curves(runs),
                "cosine": cosine_curves(runs),
            }
            # Two protocols may share benchmark and budget, when a release changed one.
            group = f"{table.benchmark}-{table.budget}"
            group += f"-noise-{table.noise.replace(':', '-')}" if table.noise else ""
            groups.append(group)
            group += f"-{groups.count(group)}" if groups.count(group) > 1 else ""
            for name, figure in figures.items():
                path = folder / f"{group}-{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path, metadata={"Software": None})
                plt.close(figure)
                written.append(path)
    if not written:
        raise ValueError(f"expected finished runs below {root}, found none; make some first")
    return written
