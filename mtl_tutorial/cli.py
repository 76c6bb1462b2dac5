"""The command ``mtl-tutorial``: thin, calls what a script could call.

Heavy imports happen inside the commands, so that ``--help`` is instant. A wrong argument gives one
line on standard error and exit code 2; an interrupted sweep keeps what is done and exits with 130.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click

from . import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .training import Cell, Grid, Outcome

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
folder_argument = click.argument("folder", type=click.Path(path_type=Path))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mtl-tutorial", message="%(prog)s %(version)s")
def app() -> None:
    """One Network, Many Losses: run, compare and plot multi-task optimisation methods."""


@app.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List methods with their papers, and benchmarks with the data they need."""
    from . import benchmarks, methods

    method_rows = [
        {
            "method": name,
            "family": cls.family,
            "paper": cls.paper,
            "year": cls.year,
            "backward passes": cls.passes,
            "extra memory": cls.memory,
            "state": cls.state,
            "waits for device": "yes" if cls.syncs else "no",
        }
        for name, cls in sorted(methods.CLASSES.items())
    ]
    benchmark_rows = [
        {
            "benchmark": name,
            "title": cls.title,
            "tasks": len(cls.tasks),
            "data": "nothing to download" if cls.embedded else cls.source,
            "here": "yes" if cls().here() else "no",
        }
        for name, cls in sorted(benchmarks.CLASSES.items())
    ]
    if as_json:
        click.echo(json.dumps({"methods": method_rows, "benchmarks": benchmark_rows}))
        return
    click.echo(_grid(method_rows))
    click.echo("")
    click.echo(_grid(benchmark_rows))


@app.command()
@click.argument("benchmark")
@click.option(
    "--methods",
    default="single_task,equal,aligned_mtl,imtl_g",
    show_default=True,
    help="Comma-separated methods, each with optional settings: name:setting=value:setting=value. "
    "`single_task` is the baseline, `all` is everything.",
)
@click.option("--seeds", default=3, show_default=True, help="Number of seeds: 0 to N - 1.")
@click.option(
    "--budget",
    "--protocol",
    "budget",
    default="quick",
    show_default=True,
    help="quick, full, or the name of a published protocol that the benchmark has.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("results"),
    show_default=True,
    help="Folder for result files.",
)
@click.option(
    "--noise",
    default=None,
    metavar="TASK:FRACTION[:fixed]",
    help="Random labels on a fraction of one task's training examples, drawn anew every epoch, or "
    "once with `:fixed`.",
)
@click.option(
    "--precision",
    default="float32",
    show_default=True,
    help="float32, or bfloat16 or float16 for what autocast lowers.",
)
@click.option(
    "--accumulate",
    default=1,
    show_default=True,
    help="Pieces that each batch is computed in, for less memory.",
)
@click.option("--channels-last", is_flag=True, help="Convolutions in that memory layout.")
@click.option("--cuda-graph", is_flag=True, help="Record each step as a CUDA graph; on CUDA alone.")
@click.option("--threads", default=1, show_default=True, help="Torch's threads on the CPU.")
@click.option(
    "--together",
    is_flag=True,
    help="Train the seeds of a method side by side in one process, as one stacked model; for "
    "small networks.",
)
@json_option
def run(
    benchmark: str,
    methods: str,
    seeds: int,
    budget: str,
    device: str,
    out: Path,
    noise: str | None,
    precision: str,
    accumulate: int,
    channels_last: bool,
    cuda_graph: bool,
    threads: int,
    together: bool,
    as_json: bool,
) -> None:
    """Train methods on BENCHMARK.

    Finished runs are kept and an interrupted one goes on from its last checkpoint, so the same
    command can be given again at any time. Several processes on one --out share the runs; so do
    those of `torchrun -m mtl_tutorial run ...`, one GPU each.
    """
    import torch

    from . import benchmarks as benches
    from . import cuda_graph as recording
    from . import results, training
    from .noise import parse_noise

    bench = benches.create(benchmark)
    if budget not in bench.protocols:
        raise ValueError(f"expected budget {' or '.join(bench.protocols)}, got {budget!r}")
    asked: dict[str, Any] = {"precision": precision, "accumulate": accumulate}
    if channels_last:
        asked["channels_last"] = True
    if cuda_graph:
        asked["cuda_graph"] = True
    protocol = dataclasses.replace(bench.protocols[budget], **asked)
    if seeds < 1:
        raise ValueError(f"expected --seeds of 1 or more, got {seeds}")
    if threads < 1:
        raise ValueError(f"expected --threads of 1 or more, got {threads}")
    noisy = None if noise is None else parse_noise(noise)
    if noisy is not None:
        bench.noisy_task(noisy)
    chosen = training.pick_device(device)
    if chosen.type == "cpu":
        torch.set_num_threads(threads)
    elif chosen.index is not None:
        torch.cuda.set_device(chosen)
    specs, left_out = training.fitting(training.parse_specs(methods), len(bench.tasks), methods)
    for spec in specs if cuda_graph else []:
        recording.check(spec.make(), protocol, chosen)
    rank, ranks = training.launched()
    if together and ranks > 1:
        raise ValueError(
            f"expected --together in one process, got {ranks} of torchrun; leave one of them out"
        )
    for why in left_out if rank == 0 else []:
        click.echo(why, err=True)
    grid = training.Grid(benchmark, budget, protocol, specs, seeds, noisy)
    outcomes = _run_grid(grid, out, str(chosen), quiet=as_json, together=together)
    if rank > 0:
        if not as_json:
            done = sum(outcome.status == "done" for outcome in outcomes)
            click.echo(f"rank {rank}: {done} of {len(grid)} runs were done here")
        return
    paths = sorted({str(o.cell.path(out)) for o in outcomes})
    if as_json:
        click.echo(json.dumps({"results": paths, "out": str(out)}))
    else:
        found = [r for path in paths if (r := training.finished(Path(path))) is not None]
        click.echo(f"{len(found)} of {len(grid)} runs are done; results in {out}")
        for table in results.tables(found):
            click.echo(f"\n{results.render(table)}")


@app.command()
@folder_argument
@click.option(
    "--format", "form", default="text", show_default=True, help="text, markdown, csv, latex, json."
)
@json_option
def table(folder: Path, form: str, as_json: bool) -> None:
    """Print the tables of all result files below FOLDER."""
    from . import results

    form = "json" if as_json else form
    if form not in results.TABLE_FORMATS:
        raise ValueError(f"expected --format {', '.join(results.TABLE_FORMATS)}, got {form!r}")
    found, complaints = results.load_results(folder)
    for complaint in complaints:
        click.echo(complaint, err=True)
    if not found:
        raise ValueError(f"expected result files below {folder}, found none; run something first")
    texts = [results.render(t, form) for t in results.tables(found)]
    click.echo(f"[{', '.join(texts)}]" if form == "json" else "\n\n".join(texts))


@app.command()
@folder_argument
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder for figures; default: `figures` below FOLDER.",
)
@json_option
def plot(folder: Path, out: Path | None, as_json: bool) -> None:
    """Write comparison, learning-curve, weight and cosine figures, and say where."""
    import matplotlib as mpl

    mpl.use("Agg")
    from . import plots

    written = plots.save_all(folder, out if out is not None else folder / "figures")
    if as_json:
        click.echo(json.dumps({"figures": [str(path) for path in written]}))
    else:
        for path in written:
            click.echo(f"figure written: {path}")


@app.command()
@click.argument("name")
@click.option(
    "--root",
    type=click.Path(path_type=Path),
    default=None,
    help="Folder of the data sets; default: MTL_TUTORIAL_DATA, else ~/.cache/mtl_tutorial.",
)
def data(name: str, root: Path | None) -> None:
    """Download the data set NAME (mnist, fashionmnist or cifar10), through torchvision."""
    from . import names
    from .data import DOWNLOADS, data_root

    if name not in DOWNLOADS:
        near = names.nearest(name, list(DOWNLOADS), "sets that can be downloaded")
        raise ValueError(f"no data set {name!r}; {near}; others come from their authors")
    folder = data_root(root)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        DOWNLOADS[name](folder)
    except (RuntimeError, OSError) as error:
        raise OSError(
            f"expected to download {name} into {folder}, got: {error}; try again, or copy the "
            "files there by hand"
        ) from None
    click.echo(f"{name} is in {folder}")


@app.command()
@json_option
def info(as_json: bool) -> None:
    """Print versions, devices and threads, for a bug report."""
    import platform

    import torch

    from . import training

    facts: dict[str, Any] = {
        **training.versions(),
        "platform": platform.platform(),
        "device": training.describe_device(training.pick_device("auto"))["name"],
        "cuda": torch.version.cuda if torch.cuda.is_available() else "no device",
        "threads": torch.get_num_threads(),
        "commit": training.git_commit() or "no checkout",
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        click.echo("\n".join(f"{key:13} {value}" for key, value in facts.items()))


@app.command()
@click.option(
    "--cases", default="all", show_default=True, help="Comma-separated cases, or all, or growth."
)
@click.option(
    "--method",
    default="aligned_mtl",
    show_default=True,
    help="Method to compare on: aligned_mtl, imtl_g, mgda or upgrad.",
)
@click.option("--steps", is_flag=True, help="Time steps (the default if nothing else is asked).")
@click.option("--memory", is_flag=True, help="Peak memory, each contender in a fresh process.")
@click.option("--accuracy", is_flag=True, help="Gradients against float64, for all four methods.")
@click.option("--solvers", is_flag=True, help="Time the solvers on Gram matrices alone.")
@click.option("--rounds", default=9, show_default=True, help="Rounds per case, at most.")
@click.option(
    "--seconds",
    default=60.0,
    show_default=True,
    help="No round beyond the third of a case starts after that time.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--threads", default=1, show_default=True, help="Torch's threads on the CPU.")
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="Store the numbers as JSON."
)
@json_option
def speed(
    cases: str,
    method: str,
    rounds: int,
    seconds: float,
    device: str,
    threads: int,
    out: Path | None,
    as_json: bool,
    **chosen: bool,
) -> None:
    """Compare what a step costs: equal weighting, ours, TorchJD and LibMTL, in one run.

    The peers come with the extra `speed`; without it their rows stay blank. With the two cases of
    11 million parameters and 40 tasks (m, r) the peers allocate gigabytes per step. To compare
    with a caching allocator for everybody, install Debian's libjemalloc2 and put
    LD_PRELOAD=libjemalloc.so.2 before the command.
    """
    from . import training
    from .speed import report
    from .speed.cases import chosen as chosen_cases

    names = chosen_cases(cases)
    parts = [part for part in report.PARTS if chosen[part]] or ["steps"]
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ValueError(f"expected --out to be a file in a folder that exists, got {out}")

    def tell(line: str) -> None:
        click.echo(line, err=True)

    result = report.measure(
        parts, names, method, training.pick_device(device), rounds, seconds, threads, tell, out
    )
    click.echo(json.dumps(result) if as_json else report.render(result))


# ------------------------------------------------------------------------------- how runs show


def _run_grid(
    grid: Grid, out: Path, device: str, quiet: bool, together: bool = False
) -> list[Outcome]:
    """Run a grid with progress bars on a terminal, plain lines elsewhere."""
    import torch

    from . import training

    chosen = torch.device(device)
    rank, ranks = training.launched()
    patient = ranks > 1 and rank == 0  # it prints the table of what all ranks did
    runs: Callable[..., Iterator[Outcome]]
    runs = functools.partial(training.sweep, grid.cells(out), out, chosen, patient=patient)
    if together:
        from . import together as side_by_side

        for spec in grid.specs:
            why = side_by_side.why_alone(spec)
            if why:
                click.echo(f"one by one: {spec.label}, {why}", err=True)
        runs = functools.partial(side_by_side.sweep, grid, out, chosen)
    if quiet:
        return list(runs())
    outcomes: list[Outcome] = []
    if ranks > 1:
        for outcome in runs():
            outcomes.append(outcome)
            if outcome.status in ("done", "failed"):  # the others' runs are told by them
                click.echo(f"rank {rank}: {_sentence(outcome)}")
        return outcomes
    if not sys.stderr.isatty():
        for outcome in runs():
            outcomes.append(outcome)
            click.echo(f"[{len(outcomes)}/{len(grid)}] {_sentence(outcome)}")
        return outcomes

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:42}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as bars:
        every = bars.add_task("runs", total=len(grid))
        one = bars.add_task("", total=1)

        def show(cell: Cell, epoch: int, epochs: int) -> None:
            bars.update(one, description=_run_name(cell), completed=epoch, total=epochs)

        for outcome in runs(progress=show):
            outcomes.append(outcome)
            bars.advance(every)
            bars.console.print(_sentence(outcome), highlight=False, markup=False)
    return outcomes


def _run_name(cell: Cell) -> str:
    tried = f" lr {cell.rate:g}" if cell.protocol.rates else ""
    return f"{cell.spec.label}{tried} seed {cell.seed}"


def _sentence(outcome: Outcome) -> str:
    what = _run_name(outcome.cell)
    result = outcome.result
    if outcome.status == "elsewhere":
        return f"{what}: left to another process that is running it"
    assert result is not None
    if outcome.status == "failed":
        return f"{what}: failed, {result['failed']}"
    scores = ", ".join(f"{n} {'none' if v is None else f'{v:.2f}'}" for n, v in _scores(result))
    kept = " (done before)" if outcome.status == "kept" else f" ({result['seconds']:.1f} s)"
    return f"{what}: {scores}{kept}"


def _scores(result: dict[str, Any]) -> list[tuple[str, float | None]]:
    """Test scores and their names; of many tasks, each metric's mean over those that have it."""
    from .results import MOST_COLUMNS

    test = result["test"]
    every = [(f"{t} {m}", value) for t, metrics in test.items() for m, value in metrics.items()]
    if len(every) <= MOST_COLUMNS:
        return every
    of_metric: dict[str, list[float]] = {}
    for metrics in test.values():
        for m, value in metrics.items():
            of_metric.setdefault(m, []).extend([] if value is None else [value])
    return [(f"{m}, mean of {len(v)} tasks", fmean(v) if v else None) for m, v in of_metric.items()]


def _grid(rows: list[dict[str, Any]]) -> str:
    """Rows as a table, folded to the width of the terminal where there is one.

    Where no folding is enough, the last columns are left out, which the last line says.
    """
    header = list(rows[0])
    for n in range(len(header), 1, -1):
        text = _folded([{name: row[name] for name in header[:n]} for row in rows])
        if not sys.stdout.isatty() or _width(text) <= shutil.get_terminal_size().columns:
            break
    left_out = f"\n(no room for: {', '.join(header[n:])}; see --json)" if header[n:] else ""
    return text + left_out


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def _folded(rows: list[dict[str, Any]]) -> str:
    """Rows as a table no wider than the terminal, unless a word would have to be broken."""
    from tabulate import tabulate

    header = list(rows[0])
    body = [[str(value) for value in row.values()] for row in rows]
    pad = 2  # tabulate's, on every header
    columns = list(zip([name + " " * pad for name in header], *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - 2 * (len(header) - 1)
        words = [max(map(_longest, column)) for column in columns]
        words = [max(n, _longest(name) + pad) for n, name in zip(words, header, strict=True)]
        # The widest column gives way first; none becomes narrower than its longest word.
        spare = [k for k, width in enumerate(widths) if width > words[k]]
        while sum(widths) > room and spare:
            widths[max(spare, key=lambda k: widths[k])] -= 1
            spare = [k for k in spare if widths[k] > words[k]]
    return tabulate(
        body,
        headers=header,
        tablefmt="simple",
        disable_numparse=True,
        maxcolwidths=list(widths),
        maxheadercolwidths=[width - pad for width in widths],
    )


def _longest(text: str) -> int:
    return max((len(word) for word in text.split()), default=0)


def main() -> None:
    """Entry point: turns bad input into one line and an exit code."""
    try:
        code = app(standalone_mode=False, prog_name="mtl-tutorial")
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 0
    except click.ClickException as error:
        code = _fail(error.format_message())
    except (ValueError, OSError) as error:
        code = _fail(str(error))
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "interrupted; finished runs are kept and the current one goes on from its last "
            "checkpoint: give the same command again",
            err=True,
        )
        code = 130
    except Exception as error:
        _fail(
            f"unexpected {type(error).__name__}; finished runs are kept; please report what follows"
        )
        raise
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> int:
    click.echo(f"mtl-tutorial: {' '.join(message.split())}", err=True)
    return 2
