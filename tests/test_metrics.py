"""Metrics against hand numbers and a published row; batches of any size give the same number."""

import math

import pytest
import torch
from helpers import rng
from hypothesis import given
from hypothesis import strategies as st

from mtl_tutorial import metrics
from mtl_tutorial.metrics import ACCURACY, VALUE, delta_m, mean_rank

# NYUv2 with MTAN, as printed in the table of Aligned-MTL (Senushkin et al., CVPR 2023).
NYUV2 = ("mIoU", "pixel", "absolute", "relative", "mean", "median", "11.25", "22.5", "30")
UP = (True, True, False, False, False, False, True, True, True)
SINGLE = (38.30, 63.76, 0.68, 0.28, 25.01, 19.21, 30.14, 57.20, 69.15)
UNIFORM = (39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08)
TASKS = ("segmentation",) * 2 + ("depth",) * 2 + ("normals",) * 5


def by_task(values):
    scores: dict[str, dict] = {}
    for task, name, value in zip(TASKS, NYUV2, values, strict=True):
        scores.setdefault(task, {})[name] = value
    return scores


def test_delta_m_by_hand():
    higher = {"a": {"acc": True, "err": False}, "b": {"acc": True}}
    baseline = {"a": {"acc": 80.0, "err": 0.5}, "b": {"acc": 50.0}}
    ours = {"a": {"acc": 84.0, "err": 0.6}, "b": {"acc": 45.0}}
    # -5 %, +20 %, +10 %: a lower accuracy and a higher error are drops.
    assert delta_m(ours, baseline, higher) == pytest.approx(25 / 3, abs=1e-12)
    assert delta_m(baseline, baseline, higher) == 0


def test_delta_m_weighs_metrics_as_the_published_row_does():
    drop = delta_m(by_task(UNIFORM), by_task(SINGLE), by_task(UP))
    assert round(drop, 2) == 5.46


@pytest.mark.parametrize(
    ("ours", "baseline"),
    [
        ({"a": {"m": 1.0}}, {"a": {"m": 0.0}}),
        ({}, {"a": {"m": 1.0}}),
        ({"a": {"m": 1.0}}, {}),
        ({"a": {"m": math.nan}}, {"a": {"m": 1.0}}),
    ],
    ids=["zero baseline", "no score", "no baseline", "nan"],
)
def test_delta_m_is_nan_where_it_is_undefined(ours, baseline):
    assert math.isnan(delta_m(ours, baseline, {"a": {"m": True}}))


def test_delta_m_of_no_metric_is_nan():
    assert math.isnan(delta_m({}, {}, {}))


def test_mean_rank_by_hand_with_ties_and_gaps():
    higher = {"a": {"acc": True, "err": False}}
    table = [
        {"a": {"acc": 90.0, "err": 0.1}},
        {"a": {"acc": 90.0, "err": 0.3}},
        {"a": {"acc": 70.0, "err": 0.2}},
        {"a": {"acc": math.nan}},
    ]
    # acc: 1.5 1.5 3 4; err: 1 3 2 4
    assert mean_rank(table, higher) == [1.25, 2.25, 2.5, 4.0]
    assert mean_rank([table[0]] * 3, higher) == [2.0] * 3
    assert mean_rank([], higher) == []
    assert all(map(math.isnan, mean_rank(table, {})))


@given(st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=2), min_size=1, max_size=6))
def test_mean_ranks_always_sum_to_the_same(values):
    table = [{"a": {"up": float(x), "down": float(y)}} for x, y in values]
    ranks = mean_rank(table, {"a": {"up": True, "down": False}})
    assert sum(ranks) == pytest.approx(len(table) * (len(table) + 1) / 2)


@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 1000))
@pytest.mark.parametrize("metric", [ACCURACY, VALUE], ids=lambda m: m.name)
def test_batches_of_any_size_give_the_same_number(metric, n, size, seed):
    output = torch.randn(n, 4, generator=rng(seed))
    target = torch.randint(4, (n,), generator=rng(seed + 1))
    whole = metric.finish(metric.statistics(output, target))
    parts = [
        metric.statistics(output[i : i + size], target[i : i + size]) for i in range(0, n, size)
    ]
    assert metric.finish(torch.stack(parts).sum(0)) == pytest.approx(whole, rel=1e-12)


def test_accuracy_and_value_by_hand():
    output = torch.tensor([[2.0, 1.0], [0.0, 3.0], [5.0, 4.0]])
    total = ACCURACY.statistics(output, torch.tensor([0, 0, 0]))
    assert ACCURACY.finish(total) == pytest.approx(200 / 3)
    assert VALUE.finish(VALUE.statistics(output, torch.zeros(3))) == 2.5
    assert ACCURACY.higher_is_better
    assert not VALUE.higher_is_better


def test_nothing_counted_is_nan():
    assert math.isnan(metrics.ratio(torch.zeros(2)))
