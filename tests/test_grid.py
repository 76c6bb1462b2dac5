"""A grid: each method's learning rate by validation, several processes, and limited examples."""

import dataclasses
import threading

import pytest
import torch
from filelock import FileLock
from tiny import Tiny, cell, prepared

from mtl_tutorial import results, training
from mtl_tutorial.benchmarks import streams
from mtl_tutorial.noise import LabelNoise

pytestmark = pytest.mark.usefixtures("tiny_is_known")
CPU = torch.device("cpu")


def grid(methods="equal,mgda", seeds=2, rates=(4e-3, 1e-2)):
    protocol = dataclasses.replace(Tiny.protocols["quick"], epochs=1, rates=rates)
    return training.Grid("tiny", "quick", protocol, training.parse_specs(methods), seeds)


def plan(cells):
    return [(c.spec.name, c.seed, c.rate) for c in cells]


def test_grid_tries_every_rate_with_seed_0_and_trains_the_other_seeds_with_the_best(tmp_path):
    g = grid(seeds=3)
    assert len(g) == 2 * (2 + 2)
    outcomes = list(training.sweep(g.cells(tmp_path), tmp_path, CPU))
    assert [o.status for o in outcomes] == ["done"] * len(g)
    taken = plan(o.cell for o in outcomes)
    trials = [(m, 0, lr) for m in ("equal", "mgda") for lr in (4e-3, 1e-2)]
    assert taken[:4] == trials
    best = {}
    for spec in g.specs:
        runs = [o.result for o in outcomes[:4] if o.cell.spec == spec]
        best[spec.name] = results.best_rate(runs)
    assert taken[4:] == [(m, s, best[m]) for s in (1, 2) for m in ("equal", "mgda")]
    again = list(training.sweep(g.cells(tmp_path), tmp_path, CPU))
    assert [o.status for o in again] == ["kept"] * len(g)


def test_rate_is_used_and_the_protocols_own_keeps_its_file(tmp_path):
    g = grid("equal", seeds=1)
    own, other = g.trials(g.specs[0], tmp_path)
    plain = cell(epochs=1)
    assert own.path(tmp_path) == plain.path(tmp_path) != other.path(tmp_path)
    run = training.Run(other, prepared())
    run.epoch_of_training()
    assert run.optimizer.param_groups[0]["lr"] == 1e-2
    assert training.describe(run)["lr"] == 1e-2


def test_grid_trains_a_trial_again_whose_process_died(tmp_path):
    g = grid("equal")
    cells = g.cells(tmp_path)
    first = [next(cells), next(cells)]
    list(training.sweep(first[:1], tmp_path, CPU))  # the second was left to a process that died
    assert plan([next(cells)]) == plan(first[1:])


def test_grid_waits_for_a_trial_that_another_process_is_running(tmp_path):
    g = grid("equal")
    list(training.sweep(g.trials(g.specs[0], tmp_path)[:1], tmp_path, CPU))
    cells = g.cells(tmp_path)
    second = [next(cells), next(cells)][1]
    took = []
    with FileLock(training.lock_path(second, tmp_path)):
        thread = threading.Thread(target=lambda: took.append(next(cells)))
        thread.start()
        thread.join(0.5)
        assert not took
        training.train(second, prepared(), tmp_path)
    thread.join(30)
    assert [c.seed for c in took] == [1]


def test_with_noise_a_method_keeps_the_rate_that_it_has_on_clean_labels(tmp_path):
    clean = grid("equal", seeds=2)
    noisy = dataclasses.replace(clean, noise=LabelNoise("left", 0.5))
    assert plan(noisy.trials(noisy.specs[0], tmp_path)) == [("equal", 0, r) for r in clean.rates]
    list(training.sweep(clean.cells(tmp_path), tmp_path, CPU))
    best = clean.choose(clean.specs[0], tmp_path)
    outcomes = list(training.sweep(noisy.cells(tmp_path), tmp_path, CPU))
    assert plan(o.cell for o in outcomes) == [("equal", 0, best), ("equal", 1, best)]
    assert all(o.result["noise"] == "left:0.5" for o in outcomes)


def test_protocol_wants_its_rate_among_those_tried():
    with pytest.raises(ValueError, match="among the rates"):
        dataclasses.replace(Tiny.protocols["quick"], rates=(1.0,))


def test_examples_limit_training_and_validation(tmp_path):
    bench = prepared()
    few = dataclasses.replace(Tiny.protocols["quick"], batch_size=20, examples=60)
    seen = torch.cat([x for x, _ in bench.batches(few, torch.Generator().manual_seed(0))])
    first = bench.data["train"].inputs[:60]
    assert sorted(x.sum().item() for x in seen) == sorted(x.sum().item() for x in first)
    model = bench.model(0)
    some = bench.evaluate(model, "val", 20)
    assert {(v["accuracy"] / 5) % 1 for v in some.values()} == {0}  # twentieths


def test_history_of_many_tasks_keeps_every_number_of_the_first_and_last_epoch():
    def epoch(n, k):
        val = {f"t{i}": {"error": float(i + n)} for i in range(k)}
        return {"epoch": n, "weights": [0.1] * k, "norms": [1.0] * k, "train_losses": [2.0] * k} | {
            "val": val,
            "cosine": 0.5,
        }

    few = [epoch(n, 16) for n in range(3)]
    assert training.thinned(few) == few
    many = [epoch(n, 17) for n in range(4)]
    thin = training.thinned(many)
    assert (thin[0], thin[-1]) == (many[0], many[-1])
    assert thin[1] == {"epoch": 1, "cosine": 0.5, "val": {"mean of 17 tasks": {"error": 9.0}}}
    assert training.thinned(many[:1]) == many[:1]
    assert training.thinned([]) == []


def test_streams_have_one_checksum_per_split():
    parts = {"train/0": "a", "train/1": "b", "test/0": "c"}
    joined = streams.joined_checksums(parts)
    assert set(joined) == {"train", "test"}
    assert joined["train"] != streams.joined_checksums({**parts, "train/1": "x"})["train"]
    assert joined["test"] == streams.joined_checksums({**parts, "train/1": "x"})["test"]
