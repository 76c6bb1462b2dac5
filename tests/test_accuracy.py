"""Every deterministic gradient-balancing method steps where its definition says."""

from __future__ import annotations

import json

import accuracy
import definitions
import numpy as np
import pytest
import torch
from helpers import close, vector

from mtl_tutorial.methods import CLASSES

J3 = np.array([[1, -0.5, 2, 0.25], [-2, 1, 0.5, 1], [0.5, 1.5, -1, 2]])


@pytest.fixture(scope="module")
def stored():
    return json.loads(accuracy.STORE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured():
    return accuracy.measure(50, n_forty=1, seed=1)


@pytest.mark.parametrize("which", ["measured", "stored"])
def test_errors_stay_within_what_is_promised(which, request):
    for row in request.getfixturevalue(which)["rows"]:
        found, name = dict(row["errors"]), (row["method"], row["settings"])
        if row["tolerance_forty"] is not None:
            assert found.pop("forty") <= row["tolerance_forty"], name
        assert found, name
        assert max(found.values()) <= row["tolerance"], name


def test_the_promises():
    """1e-8, and 1e-5 for CAGrad. GradVac's sine loses digits for parallel gradients."""
    for row in accuracy.ROWS:
        expected = {"cagrad": 1e-5, "gradvac": 1e-6}.get(row.name, 1e-8)
        assert row.tolerance == expected
        assert row.forty in (None, expected)


def test_every_gradient_balancing_method_is_measured_or_left_out_for_a_reason():
    gradient = {name for name, cls in CLASSES.items() if cls.family == "gradient"}
    assert {row.name for row in accuracy.ROWS} == gradient - set(accuracy.LEFT_OUT)


def test_stored_numbers_are_of_the_rows_and_size_that_the_page_tells(stored):
    assert stored["n"] == 2000
    assert [(row["method"], row["settings"]) for row in stored["rows"]] == [
        (row.name, row.settings) for row in accuracy.ROWS
    ]
    promised = [(row["tolerance"], row["tolerance_forty"]) for row in stored["rows"]]
    assert promised == [(row.tolerance, row.forty) for row in accuracy.ROWS]
    for row, kept in zip(accuracy.ROWS, stored["rows"], strict=True):
        assert set(kept["errors"]) - {"forty"} == set(row.kinds)


def test_page_is_up_to_date(stored):
    assert accuracy.PAGE.read_text(encoding="utf-8") == accuracy.page(stored), (
        "do: python tests/accuracy.py --page"
    )


@pytest.mark.parametrize("row", accuracy.ROWS, ids=lambda row: f"{row.name}-{row.settings}")
def test_a_wrong_step_is_noticed(row, monkeypatch):
    """A step that is off by one part in ten thousand."""

    def wrong(name, **settings):
        method = CLASSES[name](**settings)
        right = method.direction

        def direction(jacobian, *, losses=None):
            step = right(jacobian, losses=losses).clone()
            step[0] += 1e-4 * step.norm()
            return step

        method.direction = direction
        return method

    case = next(accuracy.cases(1))
    if row.tasks is not None:
        case = accuracy.first_tasks(case, row.tasks)
    assert accuracy.error(row, case) <= row.tolerance
    monkeypatch.setattr(accuracy, "create", wrong)
    assert accuracy.error(row, case) == pytest.approx(1e-4, rel=1e-3)


# --------------------------------------------------------------------- the definitions themselves


def step(weights) -> torch.Tensor:
    exact = definitions.Exact(J3)
    return vector(*(float(x) for x in exact.combine(weights)))


def test_definitions_give_known_steps():
    """Known to ten digits from an enumeration of faces and from closed forms."""
    exact = definitions.Exact(J3)
    close(
        step(definitions.min_norm(exact)),
        vector(0.0371428571, 0.4314285714, 0.8114285714, 0.9085714286),
    )
    close(
        step(definitions.project(exact, exact.mean)),
        vector(-0.1666666667, 0.6666666667, 0.5, 1.0833333333),
    )
    close(
        step(definitions.max_min(exact, 0.5, (0, 1, 2))),
        vector(0.0514948858, 0.5981329039, 1.1249651968, 1.2596441288),
    )
    close(
        step(definitions.max_min(exact, 0.4, (2,))),
        vector(0.0706214098, 0.5480226284, 0.9788137513, 1.1440678852),
    )
    close(
        step(definitions.balanced(exact, 1.0, np.ones(3))),
        vector(-0.0457438981, 0.6835223226, 0.9319758167, 1.2892345819),
    )
    close(
        step(definitions.balanced(exact, 2.0, np.ones(3))),
        vector(-0.0067196002, 0.4896317863, 0.7564175190, 0.9611911768),
    )
    close(
        step(definitions.aligned(exact, "min")),
        vector(-0.0485217814, 0.4885656753, 0.6207090424, 0.9014678482),
    )
    close(
        step(definitions.imtl_g(exact)),
        vector(0.0471845943, 0.4657321033, 0.7546539535, 0.9425765090),
    )
    close(
        step(definitions.config(exact)),
        vector(0.1435786204, 1.4171823219, 2.2963464069, 2.8681784143),
    )


def test_definitions_see_a_hull_that_contains_zero():
    rows = np.array([[1.0, 2, 0], [3.0, -1, 1], [-8.0, -2, -2]])  # 2 g_1 + 2 g_2 + g_3 = 0
    exact = definitions.Exact(rows)
    assert definitions.min_norm(exact) is None
    assert definitions.balanced(exact, 1.0, np.ones(3)) is None
    away = definitions.Exact(rows[:2])
    assert definitions.min_norm(away) is not None


def test_linear_systems_are_solved_and_singular_ones_refused():
    draw = np.random.default_rng(0)
    square = draw.standard_normal((5, 7))
    exact = definitions.Exact(square)
    right = [definitions.mp.mpf(float(x)) for x in draw.standard_normal(5)]
    (solution,) = definitions.solve(exact.gram, right)
    back = definitions.times(exact.gram, solution)
    assert max(abs(a - b) for a, b in zip(back, right, strict=True)) < 1e-35
    dependent = definitions.Exact(np.array([[1.0, 2], [2.0, 4]]))
    assert definitions.solve(dependent.gram, right[:2]) is None


def test_jacobians_of_low_rank_are_exactly_dependent():
    """Their singular values below the rank are zero with 40 digits, not only in float64."""
    for case in accuracy.cases(40):
        if case.kind == "low rank":
            assert len(definitions.eigen(case.exact.gram)) == np.linalg.matrix_rank(
                case.rows / np.linalg.norm(case.rows, axis=1, keepdims=True)
            )
