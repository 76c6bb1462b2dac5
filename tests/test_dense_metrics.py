"""Losses and metrics of maps against loops over pixels, with empty classes and empty images."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_tutorial import dense_metrics as dm
from mtl_tutorial.metrics import Metric, ratio

N_CLASSES = 4


def maps(seed, empty=0.3):
    """Random outputs and targets of every kind: five images, one with nothing valid."""
    rng = np.random.default_rng(seed)
    shape = (5, 6, 7)
    label = rng.integers(-1, N_CLASSES - 1, shape)  # the last class never occurs
    depth = rng.uniform(0.5, 6, shape) * (rng.random(shape) > empty)
    normal = rng.standard_normal((5, 3, 6, 7))
    normal /= np.linalg.norm(normal, axis=1, keepdims=True)
    normal *= rng.random((5, 1, 6, 7)) > empty
    for target in (label, depth, normal):
        target[2] = -1 if target is label else 0
    logits = rng.standard_normal((5, N_CLASSES, 6, 7))
    if seed % 2:
        logits[:, -1] = -9  # nor is it predicted
    return {
        "label": (logits, label),
        "depth": (rng.uniform(0, 6, (5, 1, 6, 7)), depth),
        "normal": (rng.standard_normal((5, 3, 6, 7)), normal),
        "binary": (rng.standard_normal((5, 1, 6, 7)), np.minimum(label, 1)),
    }


def ours(metric: Metric, pair, size):
    """The metric, in batches of the given size."""
    output, target = (torch.from_numpy(x) for x in pair)
    total = None
    for i in range(0, len(output), size):
        part = metric.statistics(output[i : i + size], target[i : i + size])
        total = part if total is None else metric.merge(total, part)
    return metric.finish(total)


def by_loops(name, output, target):
    """The same figure, one pixel after the other."""
    values = []
    hits, seen = [0] * N_CLASSES, [0] * N_CLASSES
    counts = {"tp": 0, "fp": 0, "fn": 0, "tn": 0}
    for n in range(len(target)):
        for i in range(6):
            for j in range(7):
                if name in ("mIoU", "pixel accuracy"):
                    true = target[n, i, j]
                    if true == -1:
                        continue
                    said = max(range(N_CLASSES), key=lambda c: output[n, c, i, j])
                    values.append(float(said == true))
                    hits[true] += said == true
                    for c in {true, said}:
                        seen[c] += 1
                elif name in ("absolute error", "relative error", "MSE"):
                    true = target[n, i, j]
                    if true == 0:
                        continue
                    error = abs(output[n, 0, i, j] - true)
                    error = error / true if name == "relative error" else error
                    values.append(error**2 if name == "MSE" else error)
                elif name in ("IoU", "accuracy", "F1", "precision", "recall"):
                    true = target[n, i, j]
                    if true != -1:
                        said = output[n, 0, i, j] > 0
                        right = "t" if said == bool(true) else "f"
                        counts[right + ("p" if said else "n")] += 1
                else:
                    true, said = target[n, :, i, j], output[n, :, i, j]
                    if not true.any():
                        continue
                    cosine = true @ said / math.sqrt((true @ true) * (said @ said))
                    angle = math.degrees(math.acos(min(1, max(-1, cosine))))
                    if name.startswith("within"):
                        angle = 100.0 * (angle < float(name.split()[1]))
                    values.append(angle)
    if name == "mIoU":
        shares = [h / s for h, s in zip(hits, seen, strict=True) if s]
        return 100 * sum(shares) / len(shares)
    if counts != dict.fromkeys(counts, 0):
        tp, fp, fn, tn = counts.values()
        over, under = {
            "IoU": (tp, tp + fp + fn),
            "accuracy": (tp + tn, tp + fp + fn + tn),
            "F1": (2 * tp, 2 * tp + fp + fn),
            "precision": (tp, tp + fp),
            "recall": (tp, tp + fn),
        }[name]
        return 100 * over / under
    if name == "median angle":
        ordered = sorted(values)
        half = len(ordered) // 2
        return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
    return (100 if name == "pixel accuracy" else 1) * sum(values) / len(values)


CASES = [
    *(("label", metric) for metric in dm.SEGMENTATION),
    *(("depth", metric) for metric in (*dm.DEPTH, dm.SQUARED_ERROR)),
    *(("normal", metric) for metric in dm.NORMALS),
    *(
        ("binary", metric)
        for metric in (dm.IOU, dm.BINARY_ACCURACY, dm.F1, dm.PRECISION, dm.RECALL)
    ),
]


@pytest.mark.parametrize(("kind", "metric"), CASES, ids=lambda x: getattr(x, "name", x))
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 6))
def test_a_metric_is_what_a_loop_over_pixels_gives(kind, metric, seed, size):
    pair = maps(seed)[kind]
    # Image 2 has nothing valid; in batches of one it is a batch of its own.
    assert ours(metric, pair, size) == pytest.approx(by_loops(metric.name, *pair), rel=1e-6)


@pytest.mark.parametrize(("kind", "metric"), CASES, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("size", [1, 2])
def test_the_papers_way_is_a_plain_mean_over_batches(kind, metric, size):
    pair = maps(7)[kind]
    parts = []
    for i in range(0, 5, size):
        output, target = pair[0][i : i + size], pair[1][i : i + size]
        nothing = (target == (0 if kind in ("depth", "normal") else -1)).all()
        if not nothing:
            parts.append(by_loops(metric.name, output, target))
    value = ours(dm.per_batch(metric), pair, size)
    assert value == pytest.approx(sum(parts) / len(parts), rel=1e-6)
    if metric in (dm.MIOU, dm.ABSOLUTE_ERROR, dm.MEAN_ANGLE, dm.MEDIAN_ANGLE):
        assert value != pytest.approx(ours(metric, pair, size), rel=1e-4)


def test_a_class_that_only_occurs_in_the_output_counts_and_one_in_neither_does_not():
    output = torch.zeros(1, 3, 1, 4)
    output[0, [0, 0, 1, 1], 0, range(4)] = 1.0
    target = torch.tensor([[[0, 0, 0, -1]]])
    # Class 0: 2 of 3. Class 1: predicted once where it counts, never there. Class 2: left out.
    assert ours(dm.MIOU, (output.numpy(), target.numpy()), 1) == pytest.approx(100 * (2 / 3) / 2)


def test_offsets_are_measured_inside_instances_alone():
    target = torch.full((1, 2, 1, 3), torch.nan)
    target[0, :, 0, 1] = torch.tensor([2.0, -4.0])
    output = torch.ones(1, 2, 1, 3, requires_grad=True)
    loss = dm.offset_l1(output, target)
    assert loss.item() == pytest.approx((1 + 5) / 2)
    loss.backward()
    assert output.grad.isfinite().all()
    assert (output.grad[..., [0, 2]] == 0).all()
    statistics = dm.OFFSET_ERROR.statistics(output, target)
    assert dm.OFFSET_ERROR.finish(statistics) == pytest.approx(3)


LOSSES = {
    "label": dm.cross_entropy,
    "depth": dm.depth_l1,
    "normal": dm.normal_cosine,
    "binary": dm.binary_cross_entropy,
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_without_a_valid_pixel_is_zero_with_gradient_zero(kind):
    output, target = (torch.from_numpy(x)[2:3] for x in maps(0)[kind])
    output.requires_grad_()
    loss = LOSSES[kind](output, target)
    loss.backward()
    assert loss.item() == 0
    assert (output.grad == 0).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_is_a_mean_over_valid_pixels(kind):
    output, target = maps(3)[kind]
    total, count = 0.0, 0
    for n in range(len(target)):
        for i in range(6):
            for j in range(7):
                o, t = output[n, ..., i, j], target[n, ..., i, j]
                if (kind in ("label", "binary") and t == -1) or not (
                    kind in ("label", "binary") or np.any(t)
                ):
                    continue
                count += 1
                if kind == "label":
                    total += math.log(np.exp(o).sum()) - o[t]
                elif kind == "binary":
                    total += math.log(1 + math.exp(-o[0] if t else o[0]))
                elif kind == "depth":
                    total += abs(o[0] - t)
                else:
                    total += 1 - o @ t / np.linalg.norm(o) / np.linalg.norm(t)
    loss = LOSSES[kind](torch.from_numpy(output), torch.from_numpy(target))
    assert loss.item() == pytest.approx(total / count, rel=1e-6)


def test_nothing_to_measure_in_a_whole_split_is_a_blank_not_a_number():
    for kind, metric in CASES:
        output, target = (x[2:3] for x in maps(0)[kind])
        assert math.isnan(ours(metric, (output, target), 1))
        assert math.isnan(ours(dm.per_batch(metric), (output, target), 1))


def test_a_metric_without_merge_of_its_own_sums():
    metric = replace(dm.MIOU, statistics=lambda o, t: torch.tensor([1.0, 2.0]), finish=ratio)
    assert ours(metric, (np.zeros((4, 1)), np.zeros(4)), 1) == 0.5
