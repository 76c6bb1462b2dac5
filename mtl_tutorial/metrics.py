"""What is measured: metrics of one task, and the two figures that compare whole methods.

A `Metric` is a sum over examples and a last step, so that evaluating in batches of any size gives
the same number as evaluating at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def added(a: Tensor, b: Tensor) -> Tensor:
    """Statistics of two parts together, where they are sums."""
    return a + b


@dataclass(frozen=True)
class Metric:
    """One number of one task.

    Attributes:
        name: as in tables.
        higher_is_better: direction of improvement.
        statistics: (output, target) of a batch to a tensor that is summed over batches.
        finish: the summed statistics to the number; NaN where nothing was counted.
        merge: puts the statistics of two batches together, where a sum would not do.
    """

    name: str
    higher_is_better: bool
    statistics: Callable[[Tensor, Tensor], Tensor]
    finish: Callable[[Tensor], float]
    merge: Callable[[Tensor, Tensor], Tensor] = added


def ratio(total: Tensor) -> float:
    """First entry divided by the second; NaN for an empty count."""
    return float(total[0] / total[1]) if total[1] > 0 else float("nan")


def _correct(output: Tensor, target: Tensor) -> Tensor:
    hits = (output.argmax(1) == target).sum()
    return torch.stack([100.0 * hits.double(), hits.new_tensor(target.numel()).double()])


def _value(output: Tensor, target: Tensor) -> Tensor:
    return torch.stack([output.detach().double().sum(), output.new_tensor(output.numel()).double()])


ACCURACY = Metric("accuracy", True, _correct, ratio)
"""Share of right classes in percent, from logits (B, C) and labels (B,)."""

VALUE = Metric("loss", False, _value, ratio)
"""The task's output itself, for problems whose outputs are losses."""

Scores = Mapping[str, Mapping[str, float]]  # task -> metric -> value


def mean_scores(
    runs: Sequence[Mapping[str, Mapping[str, float | None]]],
    higher: Mapping[str, Mapping[str, bool]],
) -> dict[str, dict[str, float]]:
    """Mean of each score over runs, or over the epochs of one; NaN where one is missing."""
    return {
        task: {m: float(np.mean([_value_of(run, task, m) for run in runs])) for m in metrics}
        for task, metrics in higher.items()
    }


def _value_of(scores: Mapping[str, Mapping[str, float | None]], task: str, metric: str) -> float:
    value = scores.get(task, {}).get(metric)
    return float("nan") if value is None else float(value)


def mean_score(scores: Scores, higher: Mapping[str, Mapping[str, bool]]) -> float:
    """One number to pick an epoch by: the mean over the tasks of each task's first metric.

    The larger the better: a metric of which less is better counts with a minus. A task without a
    value makes it minus infinity.
    """
    first = {task: next(iter(metrics.items())) for task, metrics in higher.items() if metrics}
    signed = [_value_of(scores, t, name) * (1 if up else -1) for t, (name, up) in first.items()]
    mean = float(np.mean(signed)) if signed else float("nan")
    return -float("inf") if np.isnan(mean) else mean


def delta_m(
    scores: Scores,
    baseline: Scores,
    higher: Mapping[str, Mapping[str, bool]],
    by_task: bool = False,
) -> float:
    """Mean relative drop against the single-task baseline in percent; lower is better.

    ``100 / M * sum_i s_i (M_i - B_i) / B_i`` over all M metrics of all tasks, with s_i = -1 where
    higher is better and +1 elsewhere (Maninis et al. 2019; Nash-MTL and FAMO print this form).

    Args:
        scores: task -> metric -> value of the method.
        baseline: the same of single-task learning.
        higher: the same, whether higher is better.
        by_task: take the mean of each task's metrics first and then that over the tasks, as
            Aligned-MTL prints it beside the other.

    Returns:
        Percentage; NaN where a baseline is zero or a value is missing.
    """
    drops: list[list[float]] = []
    for task, metrics in higher.items():
        drops.append([])
        for metric, up in metrics.items():
            ours = scores.get(task, {}).get(metric, float("nan"))
            base = baseline.get(task, {}).get(metric, float("nan"))
            drop = (-1 if up else 1) * (ours - base) / base if base else float("nan")
            drops[-1].append(drop)
    tasks = [each for each in drops if each]
    if by_task:
        tasks = [[float(np.mean(each))] for each in tasks]
    every = [drop for each in tasks for drop in each]
    return 100 * float(np.mean(every)) if every else float("nan")


def mean_rank(table: Sequence[Scores], higher: Mapping[str, Mapping[str, bool]]) -> list[float]:
    """Mean over all metrics of each method's rank; 1 is best, ties share the mean of their ranks.

    Args:
        table: scores of each method.
        higher: whether higher is better, per task and metric.

    Returns:
        One mean rank per method; a missing or NaN value ranks last.
    """
    ranks = []
    for task, metrics in higher.items():
        for metric, up in metrics.items():
            values = np.array([s.get(task, {}).get(metric, np.nan) for s in table], dtype=float)
            keys = np.nan_to_num(-values if up else values, nan=np.inf)
            below = (keys[None, :] < keys[:, None]).sum(1)
            equal = (keys[None, :] == keys[:, None]).sum(1)
            ranks.append(below + (equal + 1) / 2)
    return [float(r) for r in np.mean(ranks, axis=0)] if ranks else [float("nan")] * len(table)
