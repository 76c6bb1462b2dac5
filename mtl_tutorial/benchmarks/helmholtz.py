"""Helmholtz: a physics-informed network, residual and boundary as tasks; no data.

``u_xx + u_yy + u = q`` on the square [-1, 1]^2 with u = 0 on its edge, the usual test of loss
balancing in physics-informed networks (Wang, Teng, Perdikaris: "Understanding and Mitigating
Gradient Flow Pathologies in Physics-Informed Neural Networks", SIAM J. Sci. Comput. 2021). The
solution is manufactured, ``u = sin(pi x) sin(4 pi y)``, and q follows from it. The residual's
gradient is orders of magnitude larger than the boundary's, so that plain training leaves the
boundary behind.

All parameters are shared, there are no heads: the two losses are two views of one output. What is
measured is the relative L2 error of u on a grid, for both tasks together. Single-task learning
means nothing here: either loss alone has infinitely many solutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .base import Benchmark, Losses, Protocol, Splits, Task

A1, A2 = 1.0, 4.0  # wave numbers of the solution, in units of pi
STEPS_PER_EPOCH = 100
GRID = 101


def solution(x: Tensor, y: Tensor) -> Tensor:
    """The manufactured solution u."""
    return torch.sin(A1 * torch.pi * x) * torch.sin(A2 * torch.pi * y)


def source(x: Tensor, y: Tensor) -> Tensor:
    """The right-hand side q that belongs to it."""
    return (1 - (A1 * torch.pi) ** 2 - (A2 * torch.pi) ** 2) * solution(x, y)


class Field(nn.Module):
    """u(x, y) as a tanh network; both losses share all its parameters."""

    def __init__(self, width: int = 50, depth: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Linear(2, width), nn.Tanh()]
        for _ in range(depth - 1):
            layers += [nn.Linear(width, width), nn.Tanh()]
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))
        for module in self.network:
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, points: Tensor) -> Tensor:
        """u (N,) at points (N, 2)."""
        return self.network(points)[:, 0]

    def with_laplacian(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """u and u_xx + u_yy (N,) at points (N, 2), carried forward through the layers.

        A layer takes the value a, its slopes along x and y and its Laplacian; for tanh the chain
        rule gives ``tanh' a_x`` and ``tanh' lap(a) + tanh'' (a_x^2 + a_y^2)``. One pass in place of
        three differentiations, and a third of the time.
        """
        n = len(points)
        along = points.new_zeros(2, n, 2)
        along[0, :, 0] = along[1, :, 1] = 1
        value, slopes, laplacian = points, along, points.new_zeros(n, 2)
        for layer in self.network:
            if isinstance(layer, nn.Linear):
                rest = torch.cat([slopes.flatten(0, 1), laplacian]) @ layer.weight.T
                value, slopes, laplacian = layer(value), rest[: 2 * n].view(2, n, -1), rest[2 * n :]
            else:
                value = torch.tanh(value)
                first = 1 - value.square()
                bend = -2 * value * first * slopes.square().sum(0)
                slopes, laplacian = first * slopes, first * laplacian + bend
        return value[:, 0], laplacian[:, 0]

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def head_parameters(self) -> list[list[nn.Parameter]]:
        return [[], []]


def residual(model: Field, points: Tensor) -> Tensor:
    """u_xx + u_yy + u - q at points (N, 2), differentiable by the parameters."""
    u, laplacian = model.with_laplacian(points)
    return laplacian + u - source(points[:, 0], points[:, 1])


class Helmholtz(Benchmark):
    """Residual and boundary loss of one network (see the module's text for the protocol)."""

    name = "helmholtz"
    title = "Helmholtz: a physics-informed network, manufactured solution"
    source = "equation and network of Wang et al., SIAM J. Sci. Comput. 2021; no data"
    synthetic = True
    baseline = False
    protocols: ClassVar[dict[str, Protocol]] = {
        "quick": Protocol(epochs=5, batch_size=128, lr=2e-3, note="500 steps"),
        "full": Protocol(
            epochs=25,
            batch_size=128,
            lr=2e-3,
            schedule="cosine",
            note="2,500 steps",
            rates=(2e-3, 6e-3),
        ),
    }
    tasks = (
        Task("residual", lambda output, target: output, ()),
        Task("boundary", lambda output, target: output, ()),
    )

    def load(self) -> Splits:
        return {}

    def model(self, seed: int, single_task: bool = False) -> nn.Module:
        if single_task:
            raise ValueError(
                "expected methods that train residual and boundary together on helmholtz, got "
                "single_task, which has no meaning there; leave it out"
            )
        return Field().to(self.device)

    def batches(self, protocol: Protocol, generator: torch.Generator) -> Iterator[Any]:
        """Fresh points in the square and on its edge (N, 2) each, drawn on the host."""
        n = protocol.batch_size
        for _ in range(STEPS_PER_EPOCH):
            inside = torch.rand(n, 2, generator=generator) * 2 - 1
            edge = torch.rand(n, 2, generator=generator) * 2 - 1
            side = torch.randint(4, (n,), generator=generator)
            index = torch.arange(n)
            edge[index, side // 2] = (side % 2 * 2 - 1).float()
            yield inside.to(self.device), edge.to(self.device)

    def losses(
        self, model: nn.Module, batch: Any, tasks: Sequence[int] | None = None
    ) -> tuple[Losses, Tensor | None]:
        inside, edge = batch
        chosen = (0, 1) if tasks is None else tasks
        field = cast(Field, model)
        makers = (
            lambda: residual(field, inside).square().mean(),
            lambda: field(edge).square().mean(),  # u is zero on the edge
        )
        return [makers[k]() for k in chosen], None

    @torch.no_grad()
    def evaluate(
        self, model: nn.Module, split: str, examples: int = 0
    ) -> dict[str, dict[str, float]]:
        axis = torch.linspace(-1, 1, GRID, device=self.device)
        x, y = torch.meshgrid(axis, axis, indexing="ij")
        points = torch.stack([x.flatten(), y.flatten()], 1)
        exact = solution(points[:, 0], points[:, 1]).double()
        error = (model(points).double() - exact).norm() / exact.norm()
        return {"solution": {"relative L2 %": 100 * float(error)}}

    def probe(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        return next(self.batches(Protocol(1, 256, 1e-3), generator))

    @property
    def higher_is_better(self) -> dict[str, dict[str, bool]]:
        return {"solution": {"relative L2 %": False}}
