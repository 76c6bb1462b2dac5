"""The fault campaign: what can go wrong while a sweep runs, done to it and counted.

Each function below does one kind of fault to sweeps on a benchmark that trains in a moment, starts
the same sweep again, and compares with a sweep that nothing happened to. *Lost* is a run without a
result, or with another one than the undisturbed run; *double* is a run that was trained to its end
twice or has two files; *unclear* is an end with a traceback, or without a sentence that says why.

``make faults`` runs everything and writes ``book/faults.json`` and the page made from it;
``tests/faults/test_faults.py`` runs a short form. As a script (with ``tests`` on PYTHONPATH),
``--page`` only writes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tiny import Tiny, cell, prepared, without_times
from torch.nn import functional as F

from mtl_tutorial import benchmarks, checkpoints, cli, methods, results, training
from mtl_tutorial.benchmarks import Task
from mtl_tutorial.metrics import ACCURACY
from mtl_tutorial.training import Cell

CPU = torch.device("cpu")
BOOK = Path(__file__).parents[2] / "book"
LIMIT = 180  # seconds that a child may take


class Fragile(Tiny):
    """Tiny, whose second task can be told to fall ill or to ask for too much memory."""

    name = "fragile"
    nan_at = 0  # the training batch whose loss is not a number, counted from 1; 0: none
    hungry_at = 0  # the training batch that needs 64 GB
    seen = 0
    last: torch.Tensor | None = None

    @staticmethod
    def second(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(output, target)
        if len(target) == Tiny.protocols["quick"].batch_size:
            if target is not Fragile.last:  # some methods look at a batch more than once
                Fragile.seen, Fragile.last = Fragile.seen + 1, target
            if Fragile.seen == Fragile.nan_at:
                return loss * float("nan")
            if Fragile.seen == Fragile.hungry_at:
                loss = loss + torch.empty(2**34).sum()
        return loss

    tasks = (Task("left", F.cross_entropy, (ACCURACY,)), Task("right", second, (ACCURACY,)))

    @classmethod
    @contextlib.contextmanager
    def told(cls, **what: int) -> Iterator[None]:
        """Fragile as told, and counting from the start."""
        for name, value in what.items():
            setattr(cls, name, value)
        cls.seen, cls.last = 0, None
        yield
        cls.nan_at = cls.hungry_at = 0


def know_benchmarks() -> None:
    benchmarks.CLASSES.update(tiny=Tiny, fragile=Fragile)


@dataclasses.dataclass
class Tally:
    """How often one kind of fault was tried, and what became of it."""

    kind: str
    tried: int = 0
    lost: int = 0
    double: int = 0
    unclear: int = 0
    remark: str = ""
    seconds: float = 0.0


# ------------------------------------------------------------------------------------- children


def sweep_in_child(
    cells: Sequence[Cell], root: Path, every: float, log: Path, ready: Any, past: float
) -> None:
    """Sweep, and write down each outcome at once; with `past`, under a clock that runs back."""
    torch.set_num_threads(1)
    know_benchmarks()
    prepared()
    if past:
        clock = iter(range(10**9))
        time.time = lambda: past - next(clock)
    ready.set()
    with log.open("a", encoding="utf-8") as lines:
        for o in training.sweep(cells, root, CPU, every=every):
            lines.write(json.dumps([o.cell.spec.label, o.cell.seed, o.status]) + "\n")
            lines.flush()


def command_in_child(arguments: Sequence[str], file_size: int, memory: int, pipe: Any) -> None:
    """The command line with limits; sends its exit code and what it said on standard error."""
    torch.set_num_threads(1)
    know_benchmarks()
    prepared()
    sys.argv = ["mtl-tutorial", *arguments]
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if memory:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    pipe.send((code, sys.stdout.getvalue(), sys.stderr.getvalue()))


@cache
def children() -> Any:
    """A server of child processes that have everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["campaign", "tiny", "mtl_tutorial.training"])
    return context


def start(cells: Sequence[Cell], root: Path, log: Path, every: float, past: float = 0) -> Any:
    """A sweep in a child process, at work when this returns."""
    ready = children().Event()
    child = children().Process(target=sweep_in_child, args=(cells, root, every, log, ready, past))
    child.start()
    if not ready.wait(LIMIT):
        raise TimeoutError("a child process did not start")
    return child


def finish(
    cells: Sequence[Cell], root: Path, log: Path, every: float = 60, past: float = 0
) -> None:
    child = start(cells, root, log, every, past)
    child.join(LIMIT)
    if child.exitcode != 0:
        raise RuntimeError(f"the last sweep ended with {child.exitcode}")


def command(arguments: Sequence[str], file_size: int = 0, memory: int = 0) -> tuple[int, str, str]:
    ours, theirs = children().Pipe()
    child = children().Process(target=command_in_child, args=(arguments, file_size, memory, theirs))
    child.start()
    said = ours.recv() if ours.poll(LIMIT) else (1, "", "no end")
    child.join(LIMIT)
    return said


# -------------------------------------------------------------------------------------- judging


@cache
def bench_of(name: str) -> benchmarks.Benchmark:
    return benchmarks.create(name).prepare(CPU)


def undisturbed(what: Cell) -> dict[str, Any]:
    """The result of a cell that nothing happens to."""
    with tempfile.TemporaryDirectory() as folder:
        result = training.train(what, bench_of(what.benchmark), Path(folder))
    return without_times(json.loads(json.dumps(result)))


def judge(tally: Tally, cells: Sequence[Cell], root: Path, logs: Sequence[Path] = ()) -> None:
    """Count what a folder lost, and what was done twice."""
    for what in cells:
        found = training.finished(what.path(root))
        same = found is not None and without_times(found) == undisturbed(what)
        tally.lost += not same
    found, complaints = results.load_results(root)
    tally.lost += len(complaints)
    runs = [(r["label"], r["seed"], r["lr"], r["benchmark"]) for r in found]
    tally.double += len(runs) - len(set(runs))
    lines = [line for log in logs if log.exists() for line in log.read_text().splitlines()]
    done = [tuple(json.loads(line)[:2]) for line in lines if json.loads(line)[2] == "done"]
    tally.double += len(done) - len(set(done))
    tally.lost += len(list(root.rglob("*.ckpt")) + list(root.rglob("*.previous")))


def clear(tally: Tally, code: int, err: str) -> None:
    """Count an end that says nothing plain, or a traceback."""
    plain = code == 2 and err.startswith("mtl-tutorial: expected ") and err.count("\n") == 1
    tally.unclear += not plain


# ---------------------------------------------------------------------------------- the faults


def kinds_of_method() -> list[str]:
    """Every method that two tasks allow, the baseline, and settings that keep more state."""
    fits = [n for n, c in methods.CLASSES.items() if c.n_tasks in (None, 2)]
    return [results.BASELINE, *fits, "independent:group_size=1", "imtl:level=feature"]


def kills(folder: Path, each: int, chance: random.Random, names: Sequence[str] = ()) -> Tally:
    """SIGKILL at a random moment; half of the sweeps write a checkpoint after every batch."""
    names = names or kinds_of_method()
    tally = Tally("process killed (SIGKILL) at a random moment")
    left = 0
    for index, name in enumerate(names):
        root, log, every = folder / f"kills{index}", folder / f"log{index}", 0 if index % 2 else 60
        cells, killed = [cell(name, seed=s, epochs=5) for s in range(2)], 0
        bench_of("tiny")
        began = time.perf_counter()
        undisturbed(cells[0])
        usual = time.perf_counter() - began
        while killed < each:
            child = start(cells, root, log, every)
            child.join(chance.uniform(0, usual))
            if child.is_alive():
                child.kill()
                killed += 1
            child.join()
            left += any(c.path(root).with_suffix(".ckpt").exists() for c in cells)
            if all(training.finished(c.path(root)) for c in cells):
                cells.append(cell(name, seed=len(cells), epochs=5))
        finish(cells, root, log)
        judge(tally, cells, root, [log])
        tally.tried += killed
    tally.remark = (
        f"{len(names)} methods and settings; {left} kills left a checkpoint, the others fell before"
        " the first one or beside the training"
    )
    return tally


def disk_full(folder: Path, sizes: Sequence[int]) -> Tally:
    """Files may have so many bytes: results or checkpoints are cut while they are written."""
    tally = Tally("disk full (limit on the size of files)")
    arguments = ["run", "tiny", "--methods", "equal,famo", "--seeds", "1", "--device", "cpu"]
    cells = [dataclasses.replace(cell(m), lr=None) for m in ("equal", "famo")]
    for size in sizes:
        root = folder / f"size{size}"
        code, _, err = command([*arguments, "--out", str(root)], file_size=size)
        clear(tally, code, err)
        code, _, _ = command([*arguments, "--out", str(root)])
        tally.unclear += code != 0
        judge(tally, cells, root)
        tally.tried += 1
    return tally


def mounted(folder: Path, options: str) -> bool:
    """Whether a file system in memory could be mounted there; needs the right to."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def tmpfs_full(folder: Path, sizes: Sequence[int]) -> Tally:
    """A file system of so many pages is full; then there is room."""
    tally = Tally("disk full (small tmpfs)")
    disk = folder / "disk"
    arguments = ["run", "tiny", "--methods", "equal,famo", "--seeds", "1", "--device", "cpu"]
    cells = [dataclasses.replace(cell(m), lr=None) for m in ("equal", "famo")]
    for pages in sizes:
        if shutil.which("mount") is None or not mounted(disk, f"size={4 * pages}k"):
            tally.remark = "not run: no right to mount"
            return tally
        try:
            code, _, err = command([*arguments, "--out", str(disk / "out")])
            clear(tally, code, err)
            remount(disk, "size=20m")
            code, _, _ = command([*arguments, "--out", str(disk / "out")])
            tally.unclear += code != 0
            judge(tally, cells, disk / "out")
            tally.tried += 1
        finally:
            subprocess.run(["umount", str(disk)], check=True)
    return tally


def read_only(folder: Path) -> Tally:
    """An output folder that cannot be written: empty, half done, done."""
    tally = Tally("output folder read-only")
    arguments = ["run", "tiny", "--seeds", "1", "--device", "cpu", "--methods"]
    cells = [dataclasses.replace(cell(m), lr=None) for m in ("equal", "famo")]
    disk = folder / "readonly"
    root = disk / "out"
    root_user = os.geteuid() == 0
    if root_user and (shutil.which("mount") is None or not mounted(disk, "size=20m")):
        tally.remark = "not run: to this user nothing is read-only, and no right to mount"
        return tally
    root.mkdir(parents=True, exist_ok=True)

    def lock(locked: bool) -> None:
        if root_user:
            remount(disk, "ro" if locked else "rw")
            return
        for path in [root, *(p for p in root.rglob("*") if p.is_dir())]:
            path.chmod(0o555 if locked else 0o755)

    try:
        for before in ("", "equal", "equal,famo"):
            if before:
                command([*arguments, before, "--out", str(root)])
            lock(True)
            code, out, err = command([*arguments, "equal,famo", "--out", str(root)])
            if before == "equal,famo":  # nothing to write: the table is printed
                tally.unclear += code != 0 or "2 of 2 runs are done" not in out
            else:
                clear(tally, code, err)
            lock(False)
            tally.tried += 1
        judge(tally, cells, root)
    finally:
        if root_user:
            subprocess.run(["umount", str(disk)], check=True)
    return tally


def memory(folder: Path, batches: Sequence[int]) -> Tally:
    """A batch needs more memory than the process may have; the next run is not concerned."""
    tally = Tally("out of memory in one run")
    for n in batches:
        root = folder / f"memory{n}"
        hungry = dataclasses.replace(cell("aligned_mtl"), benchmark="fragile")
        cells = [hungry, cell("equal")]
        with Fragile.told(hungry_at=n), _most_memory(2**30):
            outcomes = [o.status for o in training.sweep(cells, root, CPU, every=0)]
        failed = results.read_result(hungry.path(root))["failed"] or ""
        tally.lost += outcomes != ["failed", "done"]
        tally.unclear += not failed.startswith("epoch ") or "out of memory" not in failed
        outcomes = [o.status for o in training.sweep(cells, root, CPU)]
        tally.double += outcomes != ["done", "kept"]
        judge(tally, cells, root)
        tally.tried += 1
    return tally


@contextlib.contextmanager
def _most_memory(more: int) -> Iterator[None]:
    """This process may take so many bytes more of address space."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def nan_loss(folder: Path, batches: Sequence[int], names: Sequence[str]) -> Tally:
    """A loss is not a number at the n-th batch: the run has failed, the next one is done."""
    tally = Tally("NaN loss at batch n")
    for name in names:
        for n in batches:
            root = folder / f"nan-{name}-{n}"
            ill = dataclasses.replace(cell(name), benchmark="fragile")
            cells = [ill, cell("equal")]
            with Fragile.told(nan_at=n):
                outcomes = [o.status for o in training.sweep(cells, root, CPU)]
            tally.lost += outcomes != ["failed", "done"]
            failed = results.read_result(ill.path(root))["failed"] or ""
            tally.unclear += not failed.startswith("epoch ") or "finite" not in failed
            with Fragile.told():
                outcomes = [o.status for o in training.sweep(cells, root, CPU)]
            tally.double += outcomes != ["done", "kept"]
            judge(tally, cells, root)
            tally.tried += 1
    return tally


def two_sweeps(folder: Path, rounds: int, chance: random.Random) -> Tally:
    """Three sweeps on one folder at once, one of which is killed on the way."""
    tally = Tally("three sweeps on one folder at once, one killed")
    for n in range(rounds):
        root = folder / f"two{n}"
        cells = [cell(m, s, epochs=3) for s in range(3) for m in ("equal", "dwa", "pcgrad")]
        logs = [folder / f"two{n}-{k}" for k in range(4)]
        running = [start(cells, root, log, every=0) for log in logs[:3]]
        time.sleep(chance.uniform(0.05, 0.8))
        running[0].kill()
        for child in running:
            child.join(LIMIT)
        finish(cells, root, logs[3])
        judge(tally, cells, root, logs)
        tally.tried += 1
    return tally


def clock_back(folder: Path, rounds: int, chance: random.Random) -> Tally:
    """After a kill all files are from the future, and the clock runs backwards from 1970 on."""
    tally = Tally("clock set back between kill and next sweep")
    for n in range(rounds):
        root, log = folder / f"clock{n}", folder / f"clock{n}.log"
        cells = [cell(m, n, epochs=6) for m in ("famo", "rlw")]
        child = start(cells, root, log, every=0)
        child.join(chance.uniform(0.1, 0.8))
        child.kill()
        child.join()
        future = time.time() + 10 * 365 * 86_400
        for path in root.rglob("*"):
            os.utime(path, (future, future))
        finish(cells, root, log, past=1000.0)
        judge(tally, cells, root, [log])
        tally.tried += 1
    return tally


def results_cut(folder: Path, again: int) -> Tally:
    """A result file cut at every byte length; at every `again`-th the sweep does the run again."""
    tally = Tally("result file cut at every byte length")
    root, what = folder / "cut", cell("equal", epochs=1)
    (outcome,) = training.sweep([what], root, CPU)
    path = what.path(root)
    whole, expected = path.read_bytes(), outcome.result
    repeated = 0
    for n in range(len(whole) - 1):  # the last byte ends the line, no more
        path.write_bytes(whole[:n])
        tally.tried += 1
        try:
            results.read_result(path)
            tally.lost += 1  # half a file was taken for a result
        except ValueError:
            tally.lost += training.finished(path) is not None
        if n % again == 0:
            with contextlib.redirect_stderr(io.StringIO()):
                (outcome,) = training.sweep([what], root, CPU)
            repeated += 1
            tally.lost += without_times(outcome.result) != without_times(expected)
    kept = len(list(path.parent.glob("*.broken*")))
    tally.lost += kept != repeated  # each broken file is kept, under a name of its own
    tally.remark = f"{repeated} times the sweep was given again; every broken file was kept"
    return tally


def checkpoints_cut(folder: Path, step: int, again: int) -> Tally:
    """A checkpoint cut at every `step`-th byte length, or with one byte changed."""
    tally = Tally("checkpoint cut at every byte length, or one byte changed")
    root, what, bench = folder / "ckpt", cell("famo", epochs=4), prepared()
    expected = undisturbed(what)

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        training.train(what, bench, root, stop)
    newest, before = checkpoints.files(what.path(root))
    kept = newest.read_bytes(), before.read_bytes()
    repeated = 0
    for n in range(0, len(kept[0]), step):
        changed = bytearray(kept[0])
        changed[n] ^= 1 + n % 255
        for data in (kept[0][:n], bytes(changed)):
            newest.write_bytes(data)
            tally.tried += 1
            try:
                checkpoints.read(newest)
                tally.lost += 1
            except ValueError:
                pass
        if n // step % again == 0:
            said = io.StringIO()
            before.write_bytes(kept[1])
            seen: list[int] = []
            with contextlib.redirect_stderr(said):
                result = training.train(what, bench, root, lambda done, _, to=seen: to.append(done))
            tally.lost += without_times(json.loads(json.dumps(result))) != expected
            tally.lost += seen != [3, 4]  # two epochs came from the checkpoint before
            tally.unclear += "trying the one before it" not in said.getvalue()
            repeated += 1
    tally.remark = f"{repeated} times the run went on from the checkpoint before"
    return tally


# ------------------------------------------------------------------------------------- the report


def parts(folder: Path, seed: int) -> dict[str, Callable[[], Tally]]:
    """The whole campaign: name of a part to what runs it."""
    chance = random.Random(seed)
    some = ("equal", "aligned_mtl", "imtl_l", "independent", "famo", "pcgrad")
    sizes = [1, 100, 1000, 3000, 5000, 10_000, 20_000, 40_000]
    return {
        "kills": lambda: kills(folder, 6, chance),
        "disk": lambda: disk_full(folder, sizes),
        "tmpfs": lambda: tmpfs_full(folder, [1, 2, 4, 8, 12]),
        "readonly": lambda: read_only(folder),
        "memory": lambda: memory(folder, [1, 4, 6, 7, 12]),
        "nan": lambda: nan_loss(folder, range(1, 13), some),
        "sweeps": lambda: two_sweeps(folder, 8, chance),
        "clock": lambda: clock_back(folder, 8, chance),
        "results": lambda: results_cut(folder, 50),
        "checkpoints": lambda: checkpoints_cut(folder, 1, 2000),
    }


def store(name: str, outcome: dict[str, Any]) -> None:
    """Put one part's outcome into the report; several parts may run at once."""
    path = BOOK / "faults.json"
    with FileLock(Path(tempfile.gettempdir()) / "faults.json.lock"):
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        report[name] = outcome
        text = json.dumps(dict(sorted(report.items())), indent=1)
        results.write_atomically(path, f"{text}\n".encode())


def run(only: Sequence[str], seed: int, inputs: int) -> None:
    """Run the campaign, or some parts of it, and store each part's outcome once it is there."""
    import readers

    torch.set_num_threads(1)
    know_benchmarks()
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": training.describe_device(CPU)["name"],
        "python": training.versions()["python"],
        "torch": training.versions()["torch"],
        "seed": seed,
    }
    with tempfile.TemporaryDirectory(prefix="faults") as folder:
        for name, part in parts(Path(folder), seed).items():
            if only and name not in only:
                continue
            began = time.perf_counter()
            tally = part()
            tally.seconds = round(time.perf_counter() - began, 1)
            store(name, dataclasses.asdict(tally) | about)
            print(
                f"{tally.kind}: {tally.tried} tried, {tally.lost} lost, {tally.double} double, "
                f"{tally.unclear} unclear ({tally.seconds:.0f} s)",
                flush=True,
            )
    for name, (_, _, share) in readers.CASES.items():
        if only and name not in only and "inputs" not in only:
            continue
        began = time.perf_counter()
        n = readers.attack(name, round(inputs * share))
        seconds = round(time.perf_counter() - began, 1)
        store(f"input: {name}", {"inputs": n, "crashes": 0, "seconds": seconds} | about)
        print(f"{name}: {n} inputs, no crash ({seconds:.0f} s)", flush=True)


def page(report: dict[str, Any]) -> str:
    """The report as a page of the book."""
    faults = [report[name] for name in parts(Path(), 0) if name in report]
    inputs = {n.removeprefix("input: "): r for n, r in report.items() if n.startswith("input: ")}
    rows = []
    for f in faults:
        numbers = [str(f[k]) if f["tried"] else "" for k in ("tried", "lost", "double", "unclear")]
        rows.append(f"| {f['kind']} | {' | '.join(numbers)} | {f['remark']} |")
    sums = [str(sum(f[k] for f in faults)) for k in ("tried", "lost", "double", "unclear")]
    total = sum(r["inputs"] for r in inputs.values())
    keys = ("date", "device", "python", "torch", "seed")
    names = ("", "", "Python ", "torch ", "seed ")
    runs = [
        ", ".join(f"{name}{r[key]}" for name, key in zip(names, keys, strict=True))
        for r in report.values()
    ]
    lines = [
        "# Faults, tried and counted",
        "",
        "<!-- Written by tests/faults/campaign.py from book/faults.json: change those. -->",
        "",
        "`make faults` does to sweeps what happens to them on real machines, starts the same "
        "command again, and compares with a sweep that nothing happened to, bit for bit. *Lost* is "
        "a run without a result or with another one, *double* one that was trained to its end "
        "twice, *unclear* an end with a traceback or without a sentence that says what to do.",
        "",
        "| fault | tried | lost | double | unclear | remark |",
        "|---|---:|---:|---:|---:|---|",
        *rows,
        f"| **sum** | {' | '.join(sums)} | |",
        "",
        "## Hostile input",
        "",
        "Inputs that hypothesis made from good ones: bytes changed, cut out, doubled, put in; "
        "values of another kind; texts of any kind. Each reader took them or refused them with the "
        "exception that its documentation names, in one line; nothing was written beside the "
        "chosen folders. The first crash would have ended the campaign.",
        "",
        "| reader | inputs | crashes |",
        "|---|---:|---:|",
        *(f"| {name} | {r['inputs']:,} | {r['crashes']} |" for name, r in inputs.items()),
        f"| **sum** | {total:,} | {sum(r['crashes'] for r in inputs.values())} |",
        "",
        f"Run on {'; '.join(sorted(set(runs)))}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the fault campaign and write its page.")
    names = ", ".join([*parts(Path(), 0), "inputs"])
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help=f"some of: {names}")
    parser.add_argument("--page", action="store_true", help="only write the page from the report")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills")
    parser.add_argument("--inputs", type=int, default=100_000, help="of hostile input, in all")
    asked = parser.parse_args()
    if not asked.page:
        run(asked.only, asked.seed, asked.inputs)
    report = json.loads((BOOK / "faults.json").read_text(encoding="utf-8"))
    (BOOK / "faults.md").write_text(page(report), encoding="utf-8")
    bad = [r["kind"] for r in report.values() if r.get("lost", 0) + r.get("double", 0)]
    bad += [r["kind"] for r in report.values() if r.get("unclear")]
    sys.exit(f"harm was done by: {'; '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
