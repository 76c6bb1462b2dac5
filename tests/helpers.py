"""Matrices with a known property, toy models and small tools that several test files use.

Each sampler's property holds by construction, and tests/test_helpers.py checks it.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from mtl_tutorial import device_solvers, solvers
from mtl_tutorial.gradients import Method

# Two and three tasks whose results are known to ten digits for every method.
G2 = torch.tensor([[3, 0, 4], [0, 1, -1]], dtype=torch.float64)
G3 = torch.tensor([[1, 2, -1], [2, -1, 0.5], [-0.5, 1, 3]], dtype=torch.float64)


def vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10, rtol: float = 0.0) -> None:
    """Assert equality in float64 to a stated tolerance, absolute unless `rtol` is given."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=rtol)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected` (over one where that is zero)."""
    expected = expected.double()
    norm = expected.norm().item()
    return (actual.double() - expected).norm().item() / (norm if norm > 0 else 1.0)


# ------------------------------------------------------------------------------------- matrices


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(k: int, p: int, seed: int) -> Tensor:
    return torch.randn(k, p, dtype=torch.float64, generator=rng(seed))


def orthogonal(n: int, seed: int) -> Tensor:
    """Orthogonal matrix (n, n)."""
    return torch.linalg.qr(gaussian(n, n, seed))[0]


def with_condition(k: int, p: int, condition: float, seed: int) -> Tensor:
    """Full-rank (k, p) matrix, k <= p, of that condition number and smallest singular value 1."""
    values = torch.logspace(0, 1, k, base=condition, dtype=torch.float64)
    return orthogonal(k, seed) @ torch.diag(values) @ orthogonal(p, seed + 1)[:k]


def of_rank(k: int, p: int, rank: int, seed: int) -> Tensor:
    """(k, p) matrix of that rank, non-zero singular values between 1 and 2."""
    values = torch.linspace(1, 2, rank, dtype=torch.float64)
    return orthogonal(k, seed)[:, :rank] @ torch.diag(values) @ orthogonal(p, seed + 1)[:rank]


def stationary(k: int, p: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pareto-stationary (k, p) matrix J and the positive weights w, sum one, with J^T w = 0."""
    weights = torch.rand(k, dtype=torch.float64, generator=rng(seed)) + 0.1
    weights /= weights.sum()
    rows = gaussian(k, p, seed + 1)
    rows[-1] = -(weights[:-1] @ rows[:-1]) / weights[-1]
    return rows, weights


def equal_angles(norms: Tensor, p: int, cosine: float, seed: int) -> Tensor:
    """Rows of the given norms whose pairwise cosines are all `cosine`, in 0 <= cosine < 1."""
    k = len(norms)
    gram = (1 - cosine) * torch.eye(k, dtype=torch.float64) + cosine
    unit = torch.linalg.cholesky(gram)
    return norms[:, None] * unit @ orthogonal(p, seed)[:k]


def degenerate(seed: int = 0) -> dict[str, Tensor]:
    """The inputs on which a formula may divide by zero or a solver may not converge."""
    j = gaussian(3, 5, seed)
    g = j[:1]
    zero = torch.zeros_like(g)
    return {
        "one_task": g,
        "one_task_zero": zero,
        "zero_row": torch.cat([j[:1], zero, j[2:]]),
        "two_zero_rows": torch.cat([zero, j[1:2], zero]),
        "all_zero": torch.zeros_like(j),
        "parallel": torch.cat([g, 2 * g, 0.5 * g]),
        "parallel_pair": torch.cat([g, 3 * g]),
        "antiparallel": torch.cat([g, -2 * g]),
        "antiparallel_equal": torch.cat([g, -g]),
        "antiparallel_of_three": torch.cat([g, -g, j[1:2]]),
        "duplicates": torch.cat([g, g, g]),
        "duplicate_pair": torch.cat([g, j[1:2], g]),
        "sum_zero": torch.cat([j[:2], -(j[:1] + j[1:2])]),
        "more_tasks_than_parameters": gaussian(4, 2, seed),
        "one_parameter": gaussian(3, 1, seed),
        "very_unequal_norms": j * vector(1e-6, 1.0, 1e6)[:, None],
    }


seeds = st.integers(0, 10_000)


@st.composite
def jacobians(
    draw: st.DrawFn, min_tasks: int = 2, max_tasks: int = 5, condition: float = 30.0
) -> Tensor:
    """Full-rank Jacobians with a condition number up to `condition`, over a range of sizes."""
    k = draw(st.integers(min_tasks, max_tasks))
    p = draw(st.integers(k, 12))
    c = draw(st.floats(1.0, condition))
    return with_condition(k, p, c, draw(seeds)) * draw(st.sampled_from([1e-3, 1.0, 1e3]))


@st.composite
def positive(draw: st.DrawFn, k: int, low: float = 0.1, high: float = 10.0) -> Tensor:
    """Tensor (k,) of floats between low and high."""
    return vector(*draw(st.lists(st.floats(low, high), min_size=k, max_size=k)))


# ------------------------------------------------------------------------------------------ toys


class Linear(nn.Module):
    """K losses ``L_k = J_k . theta + phi_k + offset_k``: Jacobian and head gradients are known.

    theta starts at zero, so the losses start at the offsets (plus phi, which is zero as well).
    """

    def __init__(self, jacobian: Tensor, offsets: Tensor | None = None) -> None:
        super().__init__()
        k, p = jacobian.shape
        self.jacobian = jacobian
        self.offsets = torch.arange(1.0, k + 1).to(jacobian) if offsets is None else offsets
        self.theta = nn.Parameter(torch.zeros(p, dtype=jacobian.dtype))
        self.phi = nn.ParameterList(
            nn.Parameter(torch.zeros((), dtype=jacobian.dtype)) for _ in range(k)
        )

    def forward(self, z: Tensor | None = None) -> list[Tensor]:
        z = self.theta if z is None else z
        linear = [row @ z for row in self.jacobian]
        return [x + p + c for x, p, c in zip(linear, self.phi, self.offsets, strict=True)]

    @property
    def shared(self) -> list[Tensor]:
        return [self.theta]

    @property
    def heads(self) -> list[list[Tensor]]:
        return [[p] for p in self.phi]


class Regression(nn.Module):
    """Trunk and K heads on fixed random data; losses positive and bounded away from zero.

    The losses are ``mean |head_k(tanh(trunk x)) - y_k|^2 + 0.1``, in the order of the tasks.
    """

    def __init__(self, k: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        g = rng(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, generator=g)

        self.trunk = nn.Linear(4, 6, dtype=dtype)
        self.tasks = nn.ModuleList(nn.Linear(6, 1, dtype=dtype) for _ in range(k))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * draw(*parameter.shape))
        self.inputs = [draw(8, 4) for _ in range(20)]
        self.targets = [draw(k, 8, 1) * (1 + torch.arange(k))[:, None, None] for _ in range(20)]

    def features(self, batch: int) -> Tensor:
        return torch.tanh(self.trunk(self.inputs[batch % 20]))

    def losses_from(
        self,
        z: Tensor,
        batch: int,
        bad_paths: Sequence[int] = (),
        bad_heads: Sequence[int] = (),
    ) -> list[Tensor]:
        """Losses from the features.

        No finite gradient reaches the features from `bad_paths`, or the weights of `bad_heads`.
        """
        losses = []
        for k, (head, y) in enumerate(zip(self.tasks, self.targets[batch % 20], strict=True)):
            seen = BadGradient.apply(z) if k in bad_paths else z
            weight = BadGradient.apply(head.weight) if k in bad_heads else head.weight
            output = nn.functional.linear(seen, weight, head.bias)
            losses.append(((output - y) ** 2).mean() + 0.1)
        return losses

    def forward(self, batch: int) -> Tensor:
        return torch.stack(self.losses_from(self.features(batch), batch))


class BadGradient(torch.autograd.Function):
    """Identity whose gradient is not a number: a finite loss with a non-finite gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.nan


# ----------------------------------------------------------------------------------------- tools


def through_file(state: Any) -> Any:
    """Save and load with the safe loader, as a checkpoint does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_equal_state(actual: Any, expected: Any) -> None:
    """Exact equality of nested dicts and lists of tensors and plain values."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal_state(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_equal_state(a, e)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    else:
        assert actual == expected


def pretend_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine, the rules and the solvers do as if the CPU were an accelerator.

    Loops have two rounds: enough to see what they do, not for their answer.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith("mtl_tutorial") and hasattr(module, "on_host"):
            monkeypatch.setattr(module, "on_host", lambda device: False)
    monkeypatch.setattr(solvers, "_elsewhere", lambda x: device_solvers)
    for number in ("PIVOTS", "INTERIOR", "NEWTON", "PURIFICATIONS", "POLAR", "EIGHTH_POWERS"):
        monkeypatch.setattr(device_solvers, number, 2)
    monkeypatch.setattr(Method, "_remember", lambda self, finite, tasks: None)


def sgd(parameters: Any, lr: float = 0.1, **settings: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, **settings)


def repeat(f: Callable[[int], Any], times: int, start: int = 0) -> list[Any]:
    return [f(i) for i in range(start, start + times)]
