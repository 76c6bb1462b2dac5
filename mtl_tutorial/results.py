"""Result files, one JSON file per run, and tables of them.

A file is written to a temporary name and then renamed, so a file that exists is complete. Tables
and figures read files and nothing else.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from .metrics import Scores, delta_m, mean_rank, mean_scores

FORMAT = 1
BASELINE = "single_task"
REFERENCE = "equal"  # what every method is compared with, seed by seed
GROUPED_BY = ("benchmark", "budget", "protocol", "noise", "remark")  # what one table has in common
MOST_COLUMNS = 8  # numbers per method; beyond, tasks are averaged
TABLE_FORMATS = ("text", "markdown", "csv", "latex", "json")
LONGEST_NAME = 150  # bytes of a folder's name made from a label; file systems allow 255
# ------------------------------------------------------------------------------- files


def identity(benchmark: str, budget: str, protocol: dict[str, Any], run: dict[str, Any]) -> str:
    """Eight hexadecimal digits that change with everything that defines a run but its seed.

    Device and versions are left out: a finished run is not repeated on another machine.
    """
    text = json.dumps([FORMAT, benchmark, budget, protocol, run], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def result_path(root: Path, benchmark: str, budget: str, label: str, seed: int, key: str) -> Path:
    """Where a run's result file lies below the output folder."""
    folders = [_folder_name(text) for text in (benchmark, budget, label)]
    return root.joinpath(*folders) / f"seed{seed}-{key}.json"


def _folder_name(text: str) -> str:
    """A text as the name of one folder on any system: no way up, nothing hidden, not too long."""
    safe = "".join(c if c.isalnum() or c in "-_=.," else "-" for c in text)
    safe = f"-{safe[1:]}" if safe[:1] in ("", ".") else safe
    if len(safe.encode()) > LONGEST_NAME:  # the file's name tells the runs apart
        safe = safe.encode()[:LONGEST_NAME].decode(errors="ignore")
    return safe


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, part behind part, under a temporary name in the same folder; then rename it.

    Raises:
        OSError: it cannot be written; what was at the path is there still.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:LONGEST_NAME]}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        raise OSError(
            f"expected to write {path}, got: {error.strerror or error}; make room there or choose "
            "another folder, and give the same command again"
        ) from error


def one_line(error: BaseException) -> str:
    """What an exception says, short enough for a table and without what moves a cursor."""
    text = "".join(c if c.isprintable() else " " for c in str(error))
    return " ".join(text.split())[:200] or type(error).__name__


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file atomically; NaN becomes null."""
    text = json.dumps(_plain(result), indent=1, allow_nan=False)
    write_atomically(path, (text + "\n").encode())


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: the file is not a complete result file of this format.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ValueError(
            f"expected a complete result file, got unreadable JSON in {path} ({error}); "
            "delete it and run the same command again"
        ) from None
    what = _complaint(result)
    if what:
        raise ValueError(
            f"expected a result file of format {FORMAT}, got {what} in {path}; move it away and "
            "run the same command again"
        )
    return result


def _complaint(result: Any) -> str:
    """What keeps parsed JSON from being a result; empty where nothing does."""
    if not isinstance(result, dict):
        return f"JSON of another kind ({type(result).__name__})"
    if result.get("format") != FORMAT:
        return f"format {str(result.get('format'))[:20]!a}".replace("'", "")
    bad = [name for name, fits in _FIELDS.items() if not fits(result.get(name))]
    if not bad:
        protocol = result["protocol"]
        bad = [f"protocol.{k}" for k, fits in _PROTOCOL.items() if not fits(protocol.get(k))]
    if not bad and result["finished"] and not _is_scores(result.get("test")):
        bad = ["test"]
    return f"no valid {', '.join(bad)}" if bad else ""


def _is_text(value: Any) -> bool:
    """Whether a terminal can print it: no line breaks, no control characters."""
    return isinstance(value, str) and value.isprintable()


def _is_number(value: Any) -> bool:
    """Whether it is a number that sums and squares of do not overflow."""
    return isinstance(value, int | float) and abs(value) < 1e60


def _is_scores(value: Any) -> bool:
    """Whether it maps tasks to metrics to numbers; null stands for not a number."""
    return isinstance(value, dict) and all(
        isinstance(metrics, dict) and all(map(_or_none(_is_number), metrics.values()))
        for metrics in value.values()
    )


def _is_history(value: Any) -> bool:
    """Whether it lists epochs with validation scores."""
    numbers = _or_none(_list_of(_or_none(_is_number)))
    return isinstance(value, list) and all(
        isinstance(epoch, dict)
        and _is_number(epoch.get("epoch"))
        and _is_scores(epoch.get("val"))
        and numbers(epoch.get("weights"))
        and numbers(epoch.get("train_losses"))
        and _or_none(_is_number)(epoch.get("cosine"))
        for epoch in value
    )


def _is_metrics(value: Any) -> bool:
    """Whether it maps tasks to metrics to true or false, and there is one."""
    return (
        isinstance(value, dict)
        and all(isinstance(metrics, dict) and metrics for metrics in value.values())
        and all(_is_text(name) for metrics in value.values() for name in metrics)
        and all(isinstance(up, bool) for metrics in value.values() for up in metrics.values())
        and bool(value)
        and all(map(_is_text, value))
    )


def _is_facts(value: Any) -> bool:
    """Whether it is a dict whose texts can be printed."""
    return isinstance(value, dict) and all(
        _is_text(fact) for fact in value.values() if not isinstance(fact, int | None)
    )


Check = Callable[[Any], bool]


def _or_none(fits: Check) -> Check:
    return lambda value: value is None or fits(value)


def _list_of(fits: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is(kind: type) -> Check:
    return lambda value: isinstance(value, kind)


_FIELDS: dict[str, Check] = {
    "benchmark": _is_text,
    "budget": _is_text,
    "protocol": _is(dict),
    "label": _is_text,
    "seed": _is_number,
    "metrics": _is_metrics,
    "finished": _is(bool),
    "history": _is_history,
    # what may be missing
    "failed": _or_none(_is_text),
    "noise": _or_none(_is_text),
    "remark": _or_none(_is_text),
    "lr": _or_none(_is_number),
    "seconds_per_epoch": _or_none(_is_number),
    "peak_memory_mb": _or_none(_is_number),
    "device": _or_none(_is_facts),
    "versions": _or_none(_is_facts),
}
_PROTOCOL: dict[str, Check] = {
    "epochs": _is_number,
    "batch_size": _is_number,
    "optimizer": _is_text,
    "lr": _is_number,
    "schedule": _is_text,
    "report": _is_text,
    "note": _or_none(_is_text),
    "examples": _or_none(_is_number),
}


def load_results(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All result files below a folder, sorted by path, and a complaint per unreadable file.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise FileNotFoundError(
            f"expected a folder of result files, got {root}, which {what}; make one with "
            "`mtl-tutorial run`"
        )
    results, complaints = [], []
    for path in sorted(root.rglob("seed*.json")):
        if path.name.startswith("."):
            continue
        try:
            results.append(read_result(path))
        except ValueError as error:
            complaints.append(str(error))
    return results, complaints


def _plain(value: Any) -> Any:
    """The same data with NaN and infinity as null, tuples as lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------- tables


def best_rate(runs: Sequence[dict[str, Any]]) -> float | None:
    """The learning rate with the best validation scores after the last epoch.

    Judged with the lowest seed that has tried most rates, by Delta m against the validation
    scores of the first rate; never by test scores. Where that rate scores zero, as for a class that
    is never found, the best of the others stands for it. Failed runs are left out.

    Args:
        runs: results of one method that differ in learning rate and seed.

    Returns:
        The rate, or None if no run has finished.
    """
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for run in runs:
        if run["finished"] and run["history"]:
            by_seed.setdefault(run["seed"], []).append(run)
    if not by_seed:
        return None
    tried = max(sorted(by_seed.items()), key=lambda item: len(item[1]))[1]
    tried.sort(key=_rate)
    higher = tried[0]["metrics"]
    scores = [mean_scores([run["history"][-1]["val"]], higher) for run in tried]
    # Another reference shifts a metric's drops alike for all rates, so a zero can be replaced.
    reference = {
        task: {m: scores[0][task][m] or max(abs(s[task][m]) for s in scores) or 1.0 for m in ms}
        for task, ms in higher.items()
    }
    drops = [delta_m(score, reference, higher) for score in scores]
    finite = [math.inf if math.isnan(drop) else drop for drop in drops]
    return _rate(tried[finite.index(min(finite))])


def _rate(run: dict[str, Any]) -> float:
    own = run.get("lr")
    return float(run["protocol"]["lr"] if own is None else own)


def with_best_rates(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs that count: of each method of each table, those with its `best_rate`."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        key = json.dumps([run["label"], *(run.get(k) or None for k in GROUPED_BY)])
        groups.setdefault(key, []).append(run)
    kept = []
    for group in groups.values():
        best = best_rate(group) if len({_rate(run) for run in group}) > 1 else None
        kept += [run for run in group if best is None or _rate(run) == best]
    return kept


@dataclass
class Row:
    """One method in a table: mean and standard deviation over its seeds."""

    label: str
    seeds: list[int]
    scores: dict[str, dict[str, tuple[float, float]]]  # task -> metric -> mean, std
    averages: dict[str, tuple[float, float]]  # metric -> mean, std of the mean over tasks
    delta_m: tuple[float, float]
    mean_rank: float
    seconds: float  # per epoch
    lr: float
    against_equal: tuple[float, float]  # Delta m against equal weighting with the same seed
    peak_memory: float  # MB
    failed: list[str] = field(default_factory=list)


@dataclass
class Table:
    """All methods of one benchmark under one protocol."""

    benchmark: str
    budget: str
    protocol: dict[str, Any]
    metrics: dict[str, dict[str, bool]]
    rows: list[Row]
    devices: list[str]
    versions: list[str]
    synthetic: bool
    noise: str | None = None
    remark: str | None = None
    rates: list[float] = field(default_factory=list)  # all learning rates of the runs
    tried: bool = False  # whether a method's rate was chosen among several

    def holds(self, result: dict[str, Any]) -> bool:
        """Whether a result belongs to this table."""
        return all((result.get(k) or None) == (getattr(self, k) or None) for k in GROUPED_BY)

    @property
    def title(self) -> str:
        """What stands above the table: benchmark, budget, device, versions."""
        p = self.protocol
        made_up = " (synthetic)" if self.synthetic else ""
        made_up += f" ({self.remark})" if self.remark else ""
        made_up += f", label noise {self.noise}" if self.noise else ""
        rate = "lr " + (" or ".join(f"{r:g}" for r in self.rates) or f"{p['lr']:g}")
        if self.tried:
            rate = f"lr of {', '.join(f'{r:g}' for r in self.rates)} by validation with seed 0"
        few = f", {p['examples']} training examples a task" if p.get("examples") else ""
        note = f" ({p['note']})" if p.get("note") else ""
        return (
            f"{self.benchmark}{made_up}, budget {self.budget}: {p['epochs']} epochs{note}{few}, "
            f"batch {p['batch_size']}, {p['optimizer']} {rate}, {p['schedule']}"
            f"{''.join(f', {text}' for text in _unusual(p))}; test scores {_reported(p)}; "
            f"{'; '.join(self.devices)}; {'; '.join(self.versions)}"
        )


def _reported(protocol: dict[str, Any]) -> str:
    """Which test scores a table shows, in words."""
    if protocol["report"] == "best":
        return "after the epoch with the best validation scores"
    n = protocol.get("average", 1)
    return "after the last epoch" if n == 1 else f"averaged over the last {n} epochs"


def _unusual(protocol: dict[str, Any]) -> list[str]:
    """What a table says of network, precision and measures where they are not the usual ones."""
    pieces = protocol.get("accumulate", 1)
    said = [
        protocol.get("network", ""),
        protocol.get("precision", ""),
        "channels last" if protocol.get("channels_last") else "",
        f"batches in {pieces} pieces" if pieces > 1 else "",
        "figures per batch as in the papers" if protocol.get("evaluation") == "papers" else "",
        {"tasks": "Delta m over tasks", "first": "Delta m over each task's first measure"}.get(
            protocol.get("delta_m", ""), ""
        ),
    ]
    return [text for text in said if text]


def tables(results: Iterable[dict[str, Any]]) -> list[Table]:
    """Group results that can be compared, one table each, in order of first appearance."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        key = json.dumps([result.get(k) or None for k in GROUPED_BY])
        groups.setdefault(key, []).append(result)
    return [_table(group) for group in groups.values()]


def _table(every: list[dict[str, Any]]) -> Table:
    results = with_best_rates(every)
    rates = sorted({_rate(run) for run in every})
    first = results[0]
    higher: dict[str, dict[str, bool]] = first["metrics"]
    labels: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        labels.setdefault(result["label"], []).append(result)
    done = {k: [r for r in v if r["finished"] and r.get("test")] for k, v in labels.items()}
    means = {k: mean_scores([r["test"] for r in v], higher) for k, v in done.items() if v}
    baseline = means.get(BASELINE) if first.get("baseline", True) else None
    reference = {r["seed"]: r["test"] for r in done.get(REFERENCE, [])}
    ranked = [k for k in means if k != BASELINE]
    ranks = dict(zip(ranked, mean_rank([means[k] for k in ranked], higher), strict=True))
    by_task = first["protocol"].get("delta_m") == "tasks"
    judged = _judged(first["protocol"], higher)
    rows = []
    for label, runs in labels.items():
        scores = {
            task: {m: _mean_std([_score(r["test"], task, m) for r in done[label]]) for m in ms}
            for task, ms in higher.items()
        }
        tests = [mean_scores([r["test"]], higher) for r in done[label]]  # null becomes NaN
        drops = [delta_m(test, baseline, judged, by_task) for test in tests] if baseline else []
        pairs = [
            delta_m(test, mean_scores([reference[r["seed"]]], higher), judged, by_task)
            for r, test in zip(done[label], tests, strict=True)
            if r["seed"] in reference and label != REFERENCE
        ]
        memory = [r["peak_memory_mb"] for r in done[label] if r.get("peak_memory_mb")]
        rows.append(
            Row(
                label=label,
                seeds=sorted(r["seed"] for r in done[label]),
                scores=scores,
                averages=_averages(tests, higher),
                delta_m=_mean_std(drops if label != BASELINE else []),
                mean_rank=ranks.get(label, math.nan),
                seconds=_mean_std([r.get("seconds_per_epoch") for r in done[label]])[0],
                lr=_rate(runs[0]),
                against_equal=_mean_std(pairs),
                peak_memory=max(memory, default=math.nan),
                failed=[f"seed {r['seed']}: {r['failed']}" for r in runs if r.get("failed")],
            )
        )
    rows.sort(key=lambda r: (r.label != BASELINE, r.mean_rank if r.seeds else math.inf, r.label))
    return Table(
        benchmark=first["benchmark"],
        budget=first["budget"],
        protocol=first["protocol"],
        metrics=higher,
        rows=rows,
        devices=sorted({_device(r) for r in results}),
        versions=sorted({_versions(r) for r in results}),
        synthetic=bool(first.get("synthetic")),
        noise=first.get("noise"),
        remark=first.get("remark"),
        rates=rates,
        tried=len(every) > len(results),
    )


def _judged(
    protocol: dict[str, Any], higher: dict[str, dict[str, bool]]
) -> dict[str, dict[str, bool]]:
    """The metrics that Delta m takes in: all, or each task's first."""
    if protocol.get("delta_m") != "first":
        return higher
    return {task: dict(list(metrics.items())[:1]) for task, metrics in higher.items()}


def _device(result: dict[str, Any]) -> str:
    return str((result.get("device") or {}).get("name") or "unknown device")


def _versions(result: dict[str, Any]) -> str:
    versions = result.get("versions") or {}
    return f"mtl_tutorial {versions.get('mtl_tutorial', '?')}, torch {versions.get('torch', '?')}"


def _score(scores: Scores, task: str, metric: str) -> float:
    value = scores.get(task, {}).get(metric)
    return math.nan if value is None else float(value)


def _averages(
    runs: Sequence[Scores], higher: dict[str, dict[str, bool]]
) -> dict[str, tuple[float, float]]:
    """Per metric, mean and standard deviation over runs of the mean over the tasks that have it."""
    metrics = {metric: [t for t, ms in higher.items() if metric in ms] for metric in _ups(higher)}
    return {
        metric: _mean_std([float(np.mean([_score(r, t, metric) for t in tasks])) for r in runs])
        for metric, tasks in metrics.items()
    }


def _ups(higher: dict[str, dict[str, bool]]) -> dict[str, bool]:
    """Metric to whether higher is better, over all tasks."""
    return {metric: up for metrics in higher.values() for metric, up in metrics.items()}


def _mean_std(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there is nothing to take them of."""
    numbers = [math.nan if v is None else float(v) for v in values]
    mean = float(np.mean(numbers)) if numbers else math.nan
    return mean, float(np.std(numbers, ddof=1)) if len(numbers) > 1 else math.nan


Pair = tuple[float, float]  # mean, standard deviation


def columns(table: Table) -> list[tuple[str, bool, Callable[[Row], Pair]]]:
    """The numbers of a table: name, whether higher is better, and how to get it from a row.

    With more than eight numbers per method, each metric is averaged over the tasks that have it.
    """

    def of_task(task: str, metric: str) -> Callable[[Row], Pair]:
        return lambda row: row.scores[task][metric]

    def of_all(metric: str) -> Callable[[Row], Pair]:
        return lambda row: row.averages[metric]

    if sum(map(len, table.metrics.values())) <= MOST_COLUMNS:
        return [
            (f"{task} {metric}", up, of_task(task, metric))
            for task, metrics in table.metrics.items()
            for metric, up in metrics.items()
        ]
    shown = []
    for metric, up in _ups(table.metrics).items():
        tasks = [task for task, metrics in table.metrics.items() if metric in metrics]
        alone = f"{tasks[0]} {metric}"
        name = alone if len(tasks) == 1 else f"{metric}, mean of {len(tasks)} tasks"
        shown.append((name, up, of_all(metric)))
    return shown


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table as text; an empty cell was not run.

    The columns for the learning rate, the paired comparison with equal weighting and the memory
    are there only if there is something to put in them.
    """
    shown: list[tuple[str, Callable[[Row], str]]] = [("method", lambda row: row.label)]
    for name, up, value in columns(table):
        shown.append((f"{name} {'↑' if up else '↓'}", _text_of(value, table.rows)))
    shown.append(("Delta m % ↓", lambda row: _pm(row.delta_m)))
    if any(not math.isnan(row.against_equal[0]) for row in table.rows):
        shown.append(("vs equal % ↓", lambda row: _pm(row.against_equal)))
    shown.append(("mean rank ↓", lambda row: _number(row.mean_rank, ".1f")))
    if len(table.rates) > 1:
        shown.append(("lr", lambda row: f"{row.lr:g}" if row.seeds else ""))
    shown.append(("s/epoch", lambda row: _number(row.seconds, ".2f")))
    if any(not math.isnan(row.peak_memory) for row in table.rows):
        shown.append(("peak MB", lambda row: _number(row.peak_memory, ".0f")))
    shown.append(("seeds", _seeds))
    return [name for name, _ in shown], [[text(row) for _, text in shown] for row in table.rows]


def _text_of(value: Callable[[Row], Pair], rows: Sequence[Row]) -> Callable[[Row], str]:
    """A column's text: two decimals, or four where every mean is below 0.1 in size."""
    sizes = [abs(value(row)[0]) for row in rows]
    small = all(math.isnan(size) or size < 0.1 for size in sizes) and any(s > 0 for s in sizes)
    return lambda row: _pm(value(row), 4 if small else 2)


def _number(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _seeds(row: Row) -> str:
    return str(len(row.seeds)) + (f" ({len(row.failed)} failed)" if row.failed else "")


def render(table: Table, form: str = "text") -> str:
    """A table as text, Markdown, CSV, LaTeX or JSON.

    Raises:
        ValueError: unknown form.
    """
    header, body = cells(table)
    if form == "csv":
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([header, *body])
        return stream.getvalue()
    if form == "json":
        return json.dumps(
            {
                "title": table.title,
                "benchmark": table.benchmark,
                "budget": table.budget,
                "protocol": table.protocol,
                "rows": [_plain(vars(row)) for row in table.rows],
            }
        )
    styles = {"text": "simple", "markdown": "github", "latex": "latex_booktabs"}
    if form not in styles:
        raise ValueError(f"expected a table form of {', '.join(TABLE_FORMATS)}, got {form!r}")
    # Numbers come with their standard deviation, so they are text, set flush right.
    text = tabulate(
        body,
        headers=header,
        tablefmt=styles[form],
        disable_numparse=True,
        colalign=("left", *["right"] * (len(header) - 1)),
    )
    if form == "latex":
        return f"% {table.title}\n{text}"
    lines = [table.title, "", text]
    lines += [f"failed: {row.label}, {why}" for row in table.rows for why in row.failed]
    return "\n".join(lines)


def _pm(pair: Pair, decimals: int = 2) -> str:
    mean, std = pair
    if math.isnan(mean):
        return ""
    text = f"{mean:.{decimals}f}"
    return text if math.isnan(std) else f"{text} ± {std:.{decimals}f}"
