"""Losses and metrics of maps: segmentation, depth, surface normals, offsets.

A loss is a mean over the valid pixels of the batch; a batch without any gives 0 with gradient 0,
never NaN. A metric is a `Metric` like any other: counts and sums over the whole split, so that the
size of the batches changes nothing. Papers on NYUv2 and Cityscapes average the figures of single
batches instead, which is `per_batch`: their "median" angle is a mean of medians.

Which pixels are valid: labels other than -1; depths, disparities and normals other than zero.
MTAN's code calls a normal invalid where its components sum to zero, which leaves out a few valid
ones; here all three must be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .metrics import Metric, ratio

IGNORE = -1
"""Label of a pixel without a class."""


def masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid values; 0 where there are none. What is invalid may be NaN."""
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


# ------------------------------------------------------------------------------------ losses


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of logits (N, C, H, W) and labels (N, H, W), -1 for none."""
    labels = target.long()
    total = F.cross_entropy(output, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


def binary_cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Binary cross entropy of logits (N, 1, ...) and labels (N, ...) of 0 and 1, -1 for none."""
    logits = output.squeeze(1)
    each = F.binary_cross_entropy_with_logits(logits, target.to(logits), reduction="none")
    return masked_mean(each, target != IGNORE)


def depth_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of depth or disparity (N, 1, H, W) against (N, H, W), 0 for none."""
    return masked_mean((output.squeeze(1) - target).abs(), target != 0)


def normal_cosine(output: Tensor, target: Tensor) -> Tensor:
    """Mean of one minus the cosine between normals (N, 3, H, W), zero for none.

    The output is brought to unit length here, so that a network may give any vector.
    """
    cosine = F.cosine_similarity(output, target, dim=1, eps=1e-6)
    return masked_mean(1 - cosine, _has_normal(target))


def offset_l1(output: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of offsets (N, 2, H, W) in pixels, NaN outside all instances."""
    valid = target.isfinite()  # NaN must not meet the output: its gradient would be NaN as well
    return masked_mean((output - torch.where(valid, target, 0)).abs(), valid)


def _has_normal(target: Tensor) -> Tensor:
    return (target != 0).any(1)


# ----------------------------------------------------------------------------------- metrics

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _mean_of(pixels: Pair, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    """Statistics of a mean over valid pixels; `pixels` gives values and which are valid."""

    def statistics(output: Tensor, target: Tensor) -> Tensor:
        values, valid = pixels(output.detach().double(), target)
        total = scale * torch.where(valid, values, 0.0).sum()
        return torch.stack([total, valid.sum().double()])

    return statistics


def confusion(output: Tensor, target: Tensor) -> Tensor:
    """Confusion matrix (C, C) of float64 counts, true classes in rows.

    Args:
        output: logits (N, C, H, W).
        target: labels (N, H, W), -1 for none.
    """
    n = output.shape[1]
    valid = target != IGNORE
    pairs = n * target[valid].long() + output.argmax(1)[valid]
    return torch.bincount(pairs, minlength=n * n).view(n, n).double()


def _mean_iou(matrix: Tensor) -> float:
    hits = matrix.diagonal()
    union = matrix.sum(0) + matrix.sum(1) - hits
    seen = union > 0
    return 100 * float((hits[seen] / union[seen]).mean()) if seen.any() else float("nan")


def _share_right(matrix: Tensor) -> float:
    total = matrix.sum()
    return 100 * float(matrix.diagonal().sum() / total) if total > 0 else float("nan")


MIOU = Metric("mIoU", True, confusion, _mean_iou)
"""Mean intersection over union in percent, over the classes that occur or are predicted."""

PIXEL_ACCURACY = Metric("pixel accuracy", True, confusion, _share_right)
"""Share of valid pixels with the right class in percent."""


def _binary_counts(output: Tensor, target: Tensor) -> Tensor:
    """True positives, false positives, false negatives, true negatives."""
    said, valid = output.squeeze(1) > 0, target != IGNORE
    true = target == 1
    parts = (said & true, said & ~true, ~said & true, ~said & ~true)
    return torch.stack([(part & valid).sum() for part in parts]).double()


def _of_counts(top: tuple[float, ...], bottom: tuple[float, ...]) -> Callable[[Tensor], float]:
    def finish(counts: Tensor) -> float:
        over, under = counts.new_tensor(top) @ counts, counts.new_tensor(bottom) @ counts
        return 100 * ratio(torch.stack([over, under]))

    return finish


IOU = Metric("IoU", True, _binary_counts, _of_counts((1, 0, 0, 0), (1, 1, 1, 0)))
"""Intersection over union of one binary map in percent; NaN if it occurs nowhere."""

BINARY_ACCURACY = Metric("accuracy", True, _binary_counts, _of_counts((1, 0, 0, 1), (1, 1, 1, 1)))
"""Share of right binary labels in percent."""

F1 = Metric("F1", True, _binary_counts, _of_counts((2, 0, 0, 0), (2, 1, 1, 0)))
"""Harmonic mean of precision and recall in percent; NaN if nothing is or is called positive."""

PRECISION = Metric("precision", True, _binary_counts, _of_counts((1, 0, 0, 0), (1, 1, 0, 0)))
"""Share of true ones among those called positive, in percent; NaN if none is."""

RECALL = Metric("recall", True, _binary_counts, _of_counts((1, 0, 0, 0), (1, 0, 1, 0)))
"""Share of the positive ones that are found, in percent; NaN if there are none."""


def _absolute(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (output.squeeze(1) - target).abs(), target != 0


def _relative(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    error, valid = _absolute(output, target)
    return error / torch.where(valid, target, 1.0).abs(), valid


def _squared(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (output.squeeze(1) - target).square(), target != 0


def _offset(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (output - target).abs(), target.isfinite()


ABSOLUTE_ERROR = Metric("absolute error", False, _mean_of(_absolute), ratio)
"""Mean absolute error of depth, in the unit of the target."""

RELATIVE_ERROR = Metric("relative error", False, _mean_of(_relative), ratio)
"""Mean of the absolute error of depth over the depth, a fraction."""

SQUARED_ERROR = Metric("MSE", False, _mean_of(_squared), ratio)
"""Mean squared error of depth or disparity."""

OFFSET_ERROR = Metric("L1", False, _mean_of(_offset), ratio)
"""Mean absolute error of offsets in pixels, over both components."""


def angles(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Angles (N, H, W) in degrees between normals (N, 3, H, W), and which of them are valid."""
    a, b = F.normalize(output.double(), dim=1), F.normalize(target.double(), dim=1)
    return torch.rad2deg((a * b).sum(1).clamp(-1, 1).acos()), _has_normal(target)


def _all_angles(output: Tensor, target: Tensor) -> Tensor:
    values, valid = angles(output.detach(), target)
    return values[valid].float()


def _median(values: Tensor) -> float:
    return float(np.median(values.numpy())) if len(values) else float("nan")


def _within(bound: float) -> Metric:
    def hits(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        values, valid = angles(output, target)
        return (values < bound).double(), valid

    return Metric(f"within {bound:g}", True, _mean_of(hits, scale=100.0), ratio)


MEAN_ANGLE = Metric("mean angle", False, _mean_of(angles), ratio)
"""Mean angle between true and predicted normals in degrees."""

MEDIAN_ANGLE = Metric("median angle", False, _all_angles, _median, lambda a, b: torch.cat([a, b]))
"""Median of the same angle over all pixels, which keeps four bytes for each of them."""

WITHIN = tuple(_within(bound) for bound in (11.25, 22.5, 30.0))
"""Share of normals within 11.25, 22.5 and 30 degrees, in percent."""

SEGMENTATION = (MIOU, PIXEL_ACCURACY)
DEPTH = (ABSOLUTE_ERROR, RELATIVE_ERROR)
NORMALS = (MEAN_ANGLE, MEDIAN_ANGLE, *WITHIN)


def per_batch(metric: Metric) -> Metric:
    """The same figure as a plain mean over batches, as papers on NYUv2 report it.

    It depends on the size of the batches. A batch in which nothing can be measured is left out.
    """

    def statistics(output: Tensor, target: Tensor) -> Tensor:
        value = metric.finish(metric.statistics(output, target).cpu())
        return torch.tensor([0.0, 0.0] if np.isnan(value) else [value, 1.0], dtype=torch.float64)

    return replace(metric, statistics=statistics, finish=ratio, merge=torch.add)
