"""Draw book/_static/rules.png, what book/rules.md shows where no script runs.

Usage::

    python book/rules_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from mtl_tutorial import plots
from mtl_tutorial.methods import create

FIGURE = Path(__file__).resolve().parent / "_static" / "rules.png"
# The starts of book/_static/rules.js.
POSITIONS = (
    [[2.0, 0.4], [-1.0, 0.6]],
    [[2.0, 0.4], [-0.5, 1.2], [-0.2, -0.7]],
)
SHOWN = ("equal", "mgda", "imtl_g", "upgrad")


def arrow(ax: Axes, to: list[float], color: str, line: str, label: str | None = None) -> None:
    """An arrow from zero; a dot for a vector of length zero."""
    if abs(to[0]) + abs(to[1]) < 0.02:
        ax.plot([0], [0], "o", color=color, markersize=5, label=label)
        return
    shape = {"arrowstyle": "-|>", "color": color, "linestyle": line, "lw": 1.8, "shrinkA": 0}
    ax.annotate("", xy=(to[0], to[1]), xytext=(0, 0), arrowprops={**shape, "shrinkB": 0})
    ax.plot([], [], color=color, linestyle=line, label=label)


def main() -> None:
    """Draw both positions beside each other."""
    plots.set_style()
    figure, axes = plt.subplots(1, 2, figsize=(8.2, 4.2))
    for ax, rows in zip(axes, POSITIONS, strict=True):
        jacobian = torch.tensor(rows, dtype=torch.float64)
        angles = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
        circle = 10 * torch.stack([angles.cos(), angles.sin()])
        inside = circle[:, ((jacobian @ circle) >= 0).all(0)]
        if inside.shape[1]:
            middle = inside.mean(1, keepdim=True)
            ends = inside[:, (inside * middle).sum(0).argsort()[:2]]
            ax.fill(*torch.cat([torch.zeros(2, 1), ends], 1).tolist(), color="#009E73", alpha=0.14)
        for k, row in enumerate(rows):
            arrow(ax, row, "#0072B2", "-", "gradients" if k == 0 else None)
            ax.annotate(f"$g_{k + 1}$", row, color="#0072B2", fontsize=12)
        for name in SHOWN:
            method = create(name)
            step = method.direction(jacobian, losses=torch.ones(len(rows), dtype=torch.float64))
            look = plots.style(name)
            arrow(ax, step.tolist(), look["color"], look["linestyle"], method.title)
        ax.axis("off")
        ax.set(xlim=(-1.3, 2.5), ylim=(-1.2, 1.8), aspect="equal", xticks=[], yticks=[])
    axes[0].legend(loc="lower right", fontsize=9)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Software": None})


if __name__ == "__main__":
    main()
