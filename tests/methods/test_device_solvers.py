"""The solvers for accelerators, run on the CPU: the steps are those of the host's solvers.

Weights are compared by the step they make, in units of its length: where gradients are linearly
dependent, several weights make one step.
"""

from __future__ import annotations

import pytest
import torch
from helpers import gaussian, of_rank, seeds, stationary, vector
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtl_tutorial import device_solvers, solvers
from mtl_tutorial.methods import aligned_mtl, config, dualproj, sdmgrad, upgrad


def rows(k: int, p: int, seed: int, ratio: float = 1.0, common: float = 0.0) -> Tensor:
    """Rows whose norms are spread over `ratio`, plus `common` times one vector of either sign."""
    j = gaussian(k, p, seed) + common * gaussian(k, 1, seed + 1).sign() * gaussian(1, p, seed + 2)
    exponents = torch.rand(k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exponents[0], exponents[-1] = 0.0, 1.0
    return torch.nn.functional.normalize(j, dim=1) * ratio ** exponents[:, None]


RULES = {
    "imtl_g": solvers.equal_projection_weights,
    "mgda": solvers.min_norm_weights,
    "sdmgrad": lambda gram: sdmgrad.sdmgrad_weights(gram, 0.3),
    "nash_mtl": lambda gram: solvers.balanced_weights(gram, 1.0),
    "fairgrad 0.3": lambda gram: solvers.balanced_weights(gram, 0.3),
    "fairgrad 2": lambda gram: solvers.balanced_weights(gram, 2.0),
    "fairgrad 5": lambda gram: solvers.balanced_weights(gram, 5.0),
    "aligned_mtl": lambda gram: aligned_mtl.aligned_weights(gram),
    "aligned_mtl rmse": lambda gram: aligned_mtl.aligned_weights(gram, scale="rmse"),
    "config": lambda gram: config.config_weights(gram),
    "config 1 2 3": lambda gram: config.config_weights(
        gram, torch.arange(len(gram), dtype=torch.float64) % 3 + 1
    ),
    "upgrad": upgrad.upgrad_weights,
    "dualproj": dualproj.dualproj_weights,
}
every = pytest.mark.parametrize("rule", list(RULES))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch):
    """Call a rule as on an accelerator."""

    def call(rule, gram: Tensor) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(solvers, "_elsewhere", lambda x: device_solvers)
            for module in (aligned_mtl, config):
                patch.setattr(module, "on_host", lambda device: False)
            return rule(gram)

    return call


def error(here: Tensor, there: Tensor, j: Tensor) -> float:
    return float((there @ j - here @ j).norm() / (here @ j).norm())


@every
@pytest.mark.parametrize("k", [2, 3, 10, 40])
def test_the_steps_are_those_of_the_host(elsewhere, rule: str, k: int) -> None:
    """To 1e-9, for norms spread over 1e3, with and without conflicts."""
    for seed, (ratio, common) in enumerate([(1.0, 0.0), (1e3, 0.0), (1.0, 1.0), (1e3, 1.0)]):
        j = rows(k, 400, seed, ratio, common)
        gram = j @ j.T
        here, there = RULES[rule](gram), elsewhere(RULES[rule], gram)
        assert error(here, there, j) < 1e-9, (ratio, common)


@every
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seeds, st.integers(2, 6), st.sampled_from([1.0, 1e3]), st.sampled_from([1e-6, 1.0, 1e6]))
def test_any_independent_gradients(elsewhere, rule, seed, k, ratio, scale) -> None:
    j = scale * rows(k, 50, seed, ratio)
    gram = j @ j.T
    assert error(RULES[rule](gram), elsewhere(RULES[rule], gram), j) < 1e-9


# What the host's solvers document for these holds here too.
ROWS = gaussian(4, 9, 0)
DEGENERATE = {
    "one": ROWS[:1],
    "one of zeros": 0 * ROWS[:1],
    "two, one of zeros": ROWS[:2] * vector(1, 0)[:, None],
    "a zero row": ROWS * vector(1, 0, 1, 1)[:, None],
    "zeros": 0 * ROWS,
    "parallel": vector(1, 2, 3)[:, None] * ROWS[0],
    "opposite": vector(1, -2)[:, None] * ROWS[0],
    "opposite pairs": torch.cat([ROWS[:2], -ROWS[:2]]),
    "duplicates": ROWS[[0, 1, 1, 2]],
    "rank 2": of_rank(4, 9, 2, 1),
    "more tasks than parameters": gaussian(6, 3, 2),
    "stationary": stationary(4, 9, 3)[0],
    "tiny": 1e-100 * ROWS,
    "huge": 1e100 * ROWS,
}


@every
@pytest.mark.parametrize("case", list(DEGENERATE))
def test_degenerate_gradients_have_the_answers_of_the_host(elsewhere, rule, case) -> None:
    """In units of the sum of the weighted norms: where the step is zero, so are both."""
    j = DEGENERATE[case]
    gram = j @ j.T
    here, there = RULES[rule](gram), elsewhere(RULES[rule], gram)
    assert there.isfinite().all()
    size = (here.abs() @ j.norm(dim=1)).item()
    if case == "opposite pairs":  # Aligned-MTL's weights, too, are zero but for rounding
        size = max(size, 1.0)
    if case == "opposite" and rule == "imtl_g":
        assert torch.allclose(there, here)
    # What is zero but for rounding comes as the root of a rounding error.
    assert (there @ j - here @ j).norm() <= 1e-8 * size


def test_imtl_g_stops_at_pairs_of_opposite_gradients_of_any_angle(elsewhere) -> None:
    """In a plane, every tenth pair of pairs is so close that rounding errors look like a step."""
    for seed in range(60):
        pair = torch.nn.functional.normalize(gaussian(2, 2, seed), dim=1)
        norms = gaussian(1, 4, seed + 1)[0].abs() + 0.1
        j = norms[:, None] * torch.cat([pair, -pair])
        there = elsewhere(solvers.equal_projection_weights, j @ j.T)
        torch.testing.assert_close(there, (1 / norms) / (1 / norms).sum(), atol=1e-9, rtol=0)


def test_numbers_worked_out_by_hand(elsewhere) -> None:
    """(2, 0) and (0, 1): nearest point of the segment, equal projections, bargaining."""
    gram = torch.diag(vector(4.0, 1.0))
    third = 1 / 3
    expected = {
        "mgda": (0.2, 0.8),
        "imtl_g": (third, 2 * third),
        "nash_mtl": (0.5, 1.0),
        "upgrad": (0.5, 0.5),
        "dualproj": (0.5, 0.5),
        "aligned_mtl": (0.25, 0.5),
        "config": (0.75, 1.5),
    }
    for rule, weights in expected.items():
        torch.testing.assert_close(elsewhere(RULES[rule], gram), vector(*weights), msg=rule)


# ------------------------------------------------------------------------- the numbers of rounds


def problems(count: int) -> list[Tensor]:
    """Random gradients of 2 to 40 tasks, some of dependent ones, with and without conflicts."""
    found = []
    for seed in range(count):
        k = (2, 3, 10, 40)[seed % 4]
        p = (400, 2 * k, k, max(k // 2, 2))[seed // 4 % 4]
        found.append(rows(k, p, seed, (1.0, 1e3)[seed // 16 % 2], (0.0, 1.0, 5.0)[seed // 32 % 3]))
    return found


@pytest.mark.parametrize("rule", ["mgda", "dualproj"])
def test_twice_the_rounds_change_nothing(elsewhere, monkeypatch, rule) -> None:
    for j in problems(48):
        gram = j @ j.T
        usual = elsewhere(RULES[rule], gram) @ j
        with monkeypatch.context() as patch:
            patch.setattr(device_solvers, "PIVOTS", 2 * device_solvers.PIVOTS)
            patch.setattr(device_solvers, "INTERIOR", 2 * device_solvers.INTERIOR)
            more = elsewhere(RULES[rule], gram) @ j
        size = j.norm(dim=1).min() if rule == "mgda" else j.mean(0).norm()
        assert (usual - more).norm() <= 1e-7 * size


@pytest.mark.parametrize("alpha", [0.3, 1.0, 2.0, 5.0])
def test_twice_the_rounds_of_newton_change_nothing(monkeypatch, alpha) -> None:
    for j in problems(32):
        gram = j @ j.T
        hull = solvers.min_norm_weights(gram)
        if solvers.is_stationary(gram, hull) or len(j) > j.shape[1]:
            continue  # there is no solution to be found
        usual = device_solvers.balanced_weights(gram, alpha) @ j
        with monkeypatch.context() as patch:
            patch.setattr(device_solvers, "NEWTON", 2 * device_solvers.NEWTON)
            more = device_solvers.balanced_weights(gram, alpha) @ j
        assert (usual - more).norm() <= 1e-9 * more.norm()
