"""Time the contenders' steps in turn, and take ratios within each round."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .cases import Case, make
from .contenders import AGAIN, EW, OURS, TORCHJD, Contender, Step, field, missing

Timer = Callable[[Step], float]  # seconds of one step
Tell = Callable[[str], None]

NOISY = 0.05  # how far the A/A ratio may be from one
LEAST_ROUNDS = 3  # however long they take
TURN = 0.5  # seconds for which a contender's steps are timed in a round, at least
SHARE = 0.1  # the same, of the longest step so far: all ratios rest on one of the shortest
CLOSE = 1.1  # settings this close to the best one in the trial are timed again
MOST_SETTINGS = 2  # of a peer, beside its default


def wall_time(step: Step) -> float:
    """Seconds of one step on the CPU."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def cuda_time(step: Step) -> float:
    """Seconds of one step between two events on the current CUDA stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleave(
    steps: Mapping[str, Step],
    rounds: int,
    seconds: float = float("inf"),
    *,
    least: int = LEAST_ROUNDS,
    turn: float = 0.0,
    share: float = 0.0,
    timer: Timer = wall_time,
    rng: random.Random | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, float]]:
    """Run every step in every round, in an order drawn anew, each once untimed and then timed.

    Args:
        steps: what to run, by name.
        rounds: number of rounds.
        seconds: after that time no further round starts.
        least: number of rounds that start whatever the time is.
        turn: seconds of timed steps until it is the next contender's turn; their median counts. One
            step at least.
        share: the same in multiples of the longest step so far, if that is more.
        timer: runs one step and returns its seconds.
        rng: source of the orders.
        clock: seconds now, for `seconds`.

    Returns:
        Seconds by name, one dict per round.
    """
    rng = rng or random.Random(0)
    begin, table, longest = clock(), [], 0.0
    for done in range(rounds):
        if done >= least and clock() - begin > seconds:
            break
        order = list(steps)
        rng.shuffle(order)
        row = {}
        for name in order:
            steps[name]()  # untimed: what ran before leaves its traces here
            taken = [timer(steps[name])]
            longest = max(longest, *taken)
            while sum(taken) < max(turn, share * longest):
                taken.append(timer(steps[name]))
            row[name] = statistics.median(taken)
        table.append(row)
    return table


def ratios(table: Sequence[Mapping[str, float]], name: str, base: str) -> list[float]:
    """Time of a step over that of another one in the same round, per round that has both."""
    return [row[name] / row[base] for row in table if name in row and base in row]


def summary(table: Sequence[Mapping[str, float]], name: str) -> dict[str, Any]:
    """Median milliseconds, and median, least and largest ratio to ``ew`` and to ours."""
    over_ew, over_ours = ratios(table, name, EW), ratios(table, name, OURS)
    return {
        "ms": 1e3 * statistics.median(row[name] for row in table if name in row),
        "ratio": statistics.median(over_ew),
        "low": min(over_ew),
        "high": max(over_ew),
        "over_ours": statistics.median(over_ours) if over_ours else None,
        "rounds": len(over_ew),
    }


def is_noisy(again: float) -> bool:
    """Whether an A/A ratio marks a case as not to be quoted."""
    return not abs(again - 1) <= NOISY


def promising(tried: Mapping[str, float]) -> list[str]:
    """The quickest settings of a trial: those within 10% of the best, two at most."""
    quickest = sorted(tried, key=lambda name: tried[name])[:MOST_SETTINGS]
    return [name for name in quickest if tried[name] <= CLOSE * tried[quickest[0]]]


# ------------------------------------------------------------------------------- one case


def fits(contender: Contender, case: Case, device: torch.device) -> str | None:
    """Why a contender's K x P arrays would not fit into the free memory; None if they do."""
    need = 4 * contender.copies * case.n_tasks * case.n_shared
    free = free_memory(device)
    if free is None or need < 0.8 * free:
        return None
    return f"needs about {need / 2**30:.1f} GiB for K x P arrays, {free / 2**30:.1f} are free"


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            sizes = dict(line.split(":") for line in file)
        return 1024 * int(sizes["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def prepare(
    contenders: Sequence[Contender], case_name: str, rule: str, device: torch.device
) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps that run, and for every other contender why it does not."""
    steps, failed = {}, {}
    for contender in contenders:
        case = make(case_name, device)
        why = missing(contender.family) or fits(contender, case, device)
        if why is None:
            try:
                step = contender.build(case, rule)
                step()
                steps[contender.name] = step
                continue
            except Exception as error:  # whatever a peer raises, the others go on
                if contender.family in ("reference", "ours"):
                    raise
                why = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        failed[contender.name] = why
    return steps, failed


def measure(
    case_name: str,
    rule: str,
    device: torch.device,
    rounds: int,
    seconds: float,
    tell: Tell = lambda _: None,
    contenders: Sequence[Contender] | None = None,
    timer: Timer | None = None,
) -> dict[str, Any]:
    """Time all contenders on a case.

    TorchJD's settings are tried among themselves first, in up to three rounds; its default and the
    quickest take part in the rounds that count, and the best of these is named.

    Args:
        case_name: of `cases.CASES`.
        rule: of `contenders.RULES`.
        device: where to run.
        rounds, seconds: see `interleave`.
        tell: gets a line on what is going on.
        contenders: `contenders.field(rule)` unless given.
        timer: wall time on the CPU, events on CUDA unless given.

    Returns:
        Plain data: the case, the A/A ratio, one row per contender, TorchJD's best setting.
    """
    contenders = field(rule) if contenders is None else contenders
    timer = timer or (cuda_time if device.type == "cuda" else wall_time)
    case = make(case_name)
    facts = {
        "case": case_name,
        "title": case.title,
        "tasks": case.n_tasks,
        "shared": case.n_shared,
        "untuned": case.untuned,
    }
    tell(f"case {case_name}: preparing")
    steps, failed = prepare(contenders, case_name, rule, device)

    settings = {name: step for name, step in steps.items() if name.startswith(TORCHJD)}
    tried: dict[str, float] = {}
    if len(settings) > 1:
        tell(f"case {case_name}: TorchJD's settings")
        trial = interleave(settings, 3, 0.1 * seconds, least=1, timer=timer)
        tried = {name: statistics.median(row[name] for row in trial) for name in settings}
        chosen = {TORCHJD, *promising(tried)}
        steps = {n: s for n, s in steps.items() if n not in settings or n in chosen}

    tell(f"case {case_name}: rounds of {', '.join(steps)}")
    table = interleave(steps, rounds, seconds, turn=TURN, share=SHARE, timer=timer)
    rows = [
        {"name": c.name, "family": c.family, **summary(table, c.name)}
        if c.name in steps
        else {"name": c.name, "family": c.family, "failed": failed[c.name]}
        for c in contenders
        if c.name in steps or c.name in failed
    ]
    again = summary(table, AGAIN)
    timed = {r["name"]: r["ratio"] for r in rows if "ratio" in r and r["name"] in settings}
    best = min(timed, key=lambda name: timed[name]) if timed else None
    return {
        **facts,
        "again": {key: again[key] for key in ("ratio", "low", "high")},
        "noisy": is_noisy(again["ratio"]),
        "torchjd_best": best,
        "torchjd_tried_ms": {name: 1e3 * value for name, value in tried.items()},
        "rows": rows,
    }


# ------------------------------------------------------------------- a case, in its own process


def in_fresh_process(
    case_name: str,
    rule: str,
    device: torch.device,
    rounds: int,
    seconds: float,
    threads: int,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """`measure`, in a process of its own.

    What earlier cases freed stays with a process: its memory is known to the system already, and
    the C library asks for the next large block less often. Steps that allocate much, those of peers
    above all, then take up to half as long as in a process that runs one case, as training does.

    Raises:
        OSError: the process failed; the text has its last line.
    """
    arguments = [case_name, rule, str(device), str(rounds), repr(seconds), str(threads)]
    code, lines, output = run_module("steps", arguments, tell)
    if code:
        last = lines[-1][:200] if lines else "it printed nothing"
        raise OSError(
            f"expected the process of case {case_name} to end with code 0, got {code}: {last}"
        )
    return dict(json.loads(output.splitlines()[-1]))


def run_module(
    module: str, arguments: Sequence[str], tell: Tell = lambda _: None
) -> tuple[int, list[str], str]:
    """Run a module of this folder as a process of its own.

    Args:
        module: its name.
        arguments: of its ``main``.
        tell: gets the lines of its standard error as they come.

    Returns:
        Exit code, lines of standard error that are not blank, standard output.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        for line in filter(str.strip, child.stderr):
            lines.append(line.rstrip())
            tell(lines[-1])
        output = child.stdout.read()
    return child.returncode, lines, output


def main(arguments: Sequence[str]) -> None:
    """Print a case's measurement as JSON: case, rule, device, rounds, seconds, threads."""
    case_name, rule, device, rounds, seconds, threads = arguments
    torch.set_num_threads(int(threads))
    torch.set_flush_denormal(True)  # random models make denormal numbers, at many times the price

    def tell(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    found = measure(case_name, rule, torch.device(device), int(rounds), float(seconds), tell)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
