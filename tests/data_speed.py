"""How much device-resident batches save against a ``DataLoader`` over the same tensors.

Usage::

    python tests/data_speed.py [--device cpu] [--rounds 5] [--threads 2] [--out FILE]

One epoch of MultiMNIST at a time, the contenders in an order drawn anew each round: our batches,
a loader in this process, and a loader with two workers; once with nothing done to a batch, once
with a step of equal weighting on the benchmark's LeNet, whose channels lie last. Where MNIST is not
at hand, random images of its size.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from records import hand_out, provenance
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from mtl_tutorial import benchmarks, training
from mtl_tutorial.benchmarks import Data
from mtl_tutorial.benchmarks.multimnist import lenet

SIZE = 256
Batches = Iterable[tuple[Tensor, ...]]


def images() -> tuple[Data, str]:
    """MultiMNIST's training pairs, or random ones of the same size, and which."""
    bench = benchmarks.create("multimnist")
    if bench.here():
        return bench.load()["train"], "MultiMNIST"
    inputs = torch.randint(256, (50_000, 1, 36, 36), dtype=torch.uint8)
    return Data(inputs, (torch.randint(10, (50_000,)), torch.randint(10, (50_000,)))), "random"


def loaders(data: Data, device: torch.device) -> dict[str, Callable[[], Batches]]:
    """What gives the batches of an epoch, by name."""
    tensors = TensorDataset(data.inputs, *data.targets)
    resident = data.to(device)
    order = torch.Generator().manual_seed(0)

    def ours() -> Batches:
        return ((x, *targets) for x, targets in resident.batches(SIZE, order))

    def loader(workers: int) -> Callable[[], Batches]:
        pin = device.type == "cuda"

        def epoch() -> Batches:
            batches = DataLoader(
                tensors, SIZE, shuffle=True, drop_last=True, num_workers=workers, pin_memory=pin
            )
            return (tuple(t.to(device, non_blocking=pin) for t in batch) for batch in batches)

        return epoch

    return {"ours": ours, "DataLoader": loader(0), "DataLoader, 2 workers": loader(2)}


def step_on_lenet(device: torch.device) -> Callable[[tuple[Tensor, ...]], None]:
    """A training step of equal weighting."""
    torch.manual_seed(0)
    model = lenet((10, 10)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step(batch: tuple[Tensor, ...]) -> None:
        outputs = model(batch[0])
        loss = sum(F.cross_entropy(out, y) for out, y in zip(outputs, batch[1:], strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def seconds(
    epoch: Callable[[], Batches], step: Callable[[tuple[Tensor, ...]], None], device: torch.device
) -> float:
    """Time of one epoch."""
    start = time.perf_counter()
    for batch in epoch():
        step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def compare(data: Data, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Epochs per second of ours over those of each contender: medians of paired ratios."""
    contenders = loaders(data, device)
    draw = random.Random(0)
    table: dict[str, dict[str, float]] = {}
    kinds = {"batches alone": lambda batch: None, "LeNet": step_on_lenet(device)}
    for what, step in kinds.items():
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(rounds + 1):
            for name in draw.sample(list(contenders), len(contenders)):
                taken = seconds(contenders[name], step, device)
                if turn:  # the first round warms up
                    times[name].append(taken)
        table[what] = {f"seconds, {name}": statistics.median(t) for name, t in times.items()}
        for name, taken in times.items():
            ratios = [a / b for a, b in zip(taken, times["ours"], strict=True)]
            if name != "ours":
                table[what][f"ratio, {name}"] = statistics.median(ratios)
    return table


def main() -> None:
    """Print the table, and write it where asked to."""
    parser = argparse.ArgumentParser(description="Device-resident batches against a DataLoader.")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = training.pick_device(arguments.device)
    torch.set_num_threads(arguments.threads)
    data, what = images()
    record = {
        "data": what,
        **provenance(device),
        "epoch": compare(data, device, arguments.rounds),
    }
    hand_out(record, arguments.out)


if __name__ == "__main__":
    main()
