"""The two-objective landscape on which gradient balancing is usually drawn: two parameters.

Introduced with CAGrad (Liu et al., NeurIPS 2021) and used by Nash-MTL and Aligned-MTL. Both
objectives have a steep valley above ``x2 = 0`` and a shallow bowl below; along the valleys the
gradients conflict and differ in length by orders of magnitude. With ``c1 = max(tanh(x2 / 2), 0)``
and ``c2 = max(tanh(-x2 / 2), 0)``

    L_1 = c1 (log max(|(-x1 - 7) / 2 - tanh(-x2)|, 5e-6) + 6)
          + c2 (((7 - x1)^2 + (x2 + 8)^2 / 10) / 10 - 20)
    L_2 = c1 (log max(|(3 - x1) / 2 + tanh(-x2) + 2|, 5e-6) + 6)
          + c2 (((7 + x1)^2 + (x2 + 8)^2 / 10) / 10 - 20)

These are the formulas of the published code; Aligned-MTL's text prints other signs. The Pareto set
is a flat arc from (-7, -8.43) over (0, -8.36) to (7, -8.43).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..metrics import VALUE
from .base import Benchmark, Losses, Protocol, Splits, Task

START_POINTS = ((-8.5, 7.5), (0.0, 0.0), (9.0, 9.0), (-7.5, -0.5), (9.0, -1.0))
STEPS_PER_EPOCH = 250
_FLOOR = 5e-6


def toy_losses(x: Tensor) -> Tensor:
    """Both objectives.

    Args:
        x: points (..., 2).

    Returns:
        Losses (..., 2); they may be negative.
    """
    x1, x2 = x[..., 0], x[..., 1]
    above, below = _positive(torch.tanh(x2 / 2)), _positive(torch.tanh(-x2 / 2))
    valley1 = ((-x1 - 7) / 2 - torch.tanh(-x2)).abs().clamp(min=_FLOOR).log() + 6
    valley2 = ((3 - x1) / 2 + torch.tanh(-x2) + 2).abs().clamp(min=_FLOOR).log() + 6
    bowl1 = ((7 - x1) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    bowl2 = ((7 + x1) ** 2 + 0.1 * (x2 + 8) ** 2) / 10 - 20
    return torch.stack([valley1 * above + bowl1 * below, valley2 * above + bowl2 * below], -1)


def _positive(x: Tensor) -> Tensor:
    """max(x, 0) with slope one at zero, as in the published code under the torch of its day.

    The slope of `clamp` at its bound has since become zero, and the start point (0, 0) would rest.
    """
    return torch.where(x >= 0, x, 0.0)


class Point(nn.Module):
    """The toy problem's network: a point in the plane, or one point per task."""

    def __init__(self, start: Sequence[float], n_tasks: int | None = None) -> None:
        super().__init__()
        rows = 1 if n_tasks is None else n_tasks
        self.points = nn.ParameterList(
            torch.tensor(start, dtype=torch.float64) for _ in range(rows)
        )
        self.shared = n_tasks is None

    def forward(self) -> list[Tensor]:
        """Losses of both tasks, each at its own point where there are two."""
        if self.shared:
            return list(toy_losses(self.points[0]).unbind())
        return [toy_losses(point)[k] for k, point in enumerate(self.points)]

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.points) if self.shared else []

    def head_parameters(self) -> list[list[nn.Parameter]]:
        return [[], []] if self.shared else [[point] for point in self.points]


class Toy(Benchmark):
    """The landscape as a benchmark: seed i starts from the i-th of the five usual points.

    A run is Adam on the point in float64; an "epoch" is 250 steps. The full budget is the papers':
    35,000 steps with learning rate 1e-3. Losses are negative near the optimum, so a relative
    difference, and with it Delta m, means nothing here.
    """

    name = "toy"
    title = "Toy: the two-objective landscape of CAGrad, Nash-MTL and Aligned-MTL"
    source = "formulas of Liu et al., NeurIPS 2021 (published code)"
    synthetic = True
    baseline = False
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=8, batch_size=1, lr=2e-2, note="2,000 steps"),
        "full": Protocol(epochs=140, batch_size=1, lr=1e-3, note="35,000 steps"),
    }
    tasks = (
        Task("objective 1", lambda output, target: output, (VALUE,)),
        Task("objective 2", lambda output, target: output, (VALUE,)),
    )

    def load(self) -> Splits:
        return {}

    def model(self, seed: int, single_task: bool = False) -> nn.Module:
        start = START_POINTS[seed % len(START_POINTS)]
        return Point(start, len(self.tasks) if single_task else None).to(self.device)

    def batches(self, protocol: Protocol, generator: torch.Generator) -> Iterator[Any]:
        return iter([None] * STEPS_PER_EPOCH)

    def losses(
        self, model: nn.Module, batch: Any, tasks: Sequence[int] | None = None
    ) -> tuple[Losses, Tensor | None]:
        every = model()
        return (every if tasks is None else [every[k] for k in tasks]), None

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, examples: int = 0
    ) -> dict[str, dict[str, float]]:
        return {
            task.name: {"loss": float(loss)} for task, loss in zip(self.tasks, model(), strict=True)
        }

    def probe(self) -> Any:
        return None
