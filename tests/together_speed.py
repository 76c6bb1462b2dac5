"""How much sooner seeds are done side by side (`run --together`) than one after the other.

Usage::

    python tests/together_speed.py [--device cpu] [--seeds 8] [--rounds 3] [--out FILE]

Each round trains the seeds of a method both ways, in an order drawn anew, on benchmarks that need
no data: a few epochs of the quick budget, evaluation and files included, as a user would wait for
them. Printed are medians over the rounds, and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from records import hand_out, provenance

from mtl_tutorial import benchmarks, together, training

EPOCHS = {"toy": 20, "multidigits": 2, "helmholtz": 2}
METHODS = "equal,aligned_mtl"


def seconds(benchmark: str, method: str, seeds: int, device: torch.device, side: bool) -> float:
    """Time until all seeds are done."""
    protocol = benchmarks.create(benchmark).protocols["quick"]
    epochs = min(EPOCHS[benchmark], protocol.epochs)
    protocol = dataclasses.replace(protocol, epochs=epochs, rates=())
    specs = training.parse_specs(method)
    grid = training.Grid(benchmark, "quick", protocol, specs, seeds)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start = time.perf_counter()
        if side:
            outcomes = list(together.sweep(grid, root, device))
        else:
            outcomes = list(training.sweep(grid.cells(root), root, device))
        taken = time.perf_counter() - start
    assert [outcome.status for outcome in outcomes] == ["done"] * seeds
    return taken


def compare(
    benchmark: str, method: str, seeds: int, device: torch.device, rounds: int
) -> dict[str, float]:
    """Medians of seconds one by one and together, and of their ratio within a round."""
    draw, times = random.Random(0), []
    for turn in range(rounds + 1):
        row = {}
        for side in draw.sample((False, True), 2):
            row[side] = seconds(benchmark, method, seeds, device, side)
        if turn:  # the first round warms up
            times.append(row)
    return {
        "seconds, one by one": statistics.median(row[False] for row in times),
        "seconds, together": statistics.median(row[True] for row in times),
        "ratio": statistics.median(row[False] / row[True] for row in times),
    }


def main() -> None:
    """Print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(description="Seeds side by side against one by one.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = training.pick_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    record = {
        "seeds": arguments.seeds,
        **provenance(device),
        "training": {
            benchmark: {
                method: compare(benchmark, method, arguments.seeds, device, arguments.rounds)
                for method in METHODS.split(",")
            }
            for benchmark in EPOCHS
        },
    }
    hand_out(record, arguments.out)


if __name__ == "__main__":
    main()
