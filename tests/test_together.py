"""Seeds side by side: the same runs as one by one, for every method that can go together."""

import dataclasses
import json

import pytest
import torch
from click.testing import CliRunner
from tiny import Tiny, apart, cell, without_times
from torch import nn

from mtl_tutorial import benchmarks, checkpoints, cli, methods, results, together, training
from mtl_tutorial.models import HardSharing

pytestmark = pytest.mark.usefixtures("tiny_is_known")
CPU = torch.device("cpu")
ALONE = {"cross_learning", "famo", "independent", "individual", "joint"}
TOGETHER = [
    name
    for name in [results.BASELINE, *methods.available()]
    if name not in ALONE
    and (name == results.BASELINE or methods.CLASSES[name].n_tasks in (None, 2))
]


class Double(Tiny):
    """In float64, where two ways to sum differ by nothing that a method could amplify."""

    def build(self):
        return super().build().double()

    def prepare(self, device):
        super().prepare(device)
        self.data = {
            name: dataclasses.replace(split, inputs=split.inputs.double())
            for name, split in self.data.items()
        }
        return self


class Normed(Double):
    """With running statistics beside the parameters."""

    def build(self):
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(100, 16), nn.BatchNorm1d(16), nn.ReLU())
        return HardSharing(trunk, [nn.Linear(16, 10), nn.Linear(16, 10)]).double()


class Dropping(Tiny):
    """With a random layer."""

    def build(self):
        trunk = nn.Sequential(nn.Flatten(), nn.Linear(100, 16), nn.Dropout(0.5))
        return HardSharing(trunk, [nn.Linear(16, 10), nn.Linear(16, 10)])


class Restless(Tiny):
    """Whose batches draw from torch's global generator."""

    def batches(self, protocol, generator):
        for inputs, targets in super().batches(protocol, generator):
            yield inputs + torch.rand_like(inputs), targets


def both_ways(cells, bench, epochs=1):
    one_by_one = [training.Run(what, bench) for what in cells]
    for run in one_by_one:
        for _ in range(epochs):
            run.epoch_of_training()
    side_by_side = [training.Run(what, bench) for what in cells]
    for _ in range(epochs):
        together.Stack(side_by_side).epoch_of_training()
    return side_by_side, one_by_one


def rounded(value):
    """A result's numbers, for a comparison up to rounding."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value


# ----------------------------------------------------------------------------- the same runs


def test_every_method_goes_together_or_says_why_not():
    every = [results.BASELINE, *methods.available()]
    alone = {name for name in every if together.why_alone(training.Spec(name))}
    assert alone == ALONE
    assert together.why_alone(training.Spec("mgda", level="feature"))


@pytest.mark.parametrize("method", TOGETHER)
def test_seeds_take_the_steps_that_they_take_one_by_one(method):
    bench = Double().prepare(CPU)
    cells = [cell(method, seed, batch_size=80) for seed in (0, 3)]
    ours, theirs = both_ways(cells, bench)
    assert apart(ours, theirs) < 1e-11
    assert apart(ours[:1], theirs[1:]) > 1e-3  # the seeds themselves differ
    for a, b in zip(ours, theirs, strict=True):
        assert a.method.state_dict().keys() == b.method.state_dict().keys()
        for what in ("train_losses", "weights", "val"):
            assert a.history[0][what] == rounded(b.history[0][what])


@pytest.mark.parametrize("method", ["aligned_mtl", "equal:head_gradients=raw"])
def test_float32_agrees_to_rounding(method, bench):
    assert apart(*both_ways([cell(method, seed) for seed in range(3)], bench)) < 1e-5


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_running_statistics_momentum_and_the_schedule_go_along(optimizer):
    bench = Normed().prepare(CPU)
    rates = {"optimizer": optimizer, "lr": 1e-2, "schedule": "cosine", "weight_decay": 1e-3}
    cells = [cell("mgda", seed, epochs=3, **rates) for seed in range(2)]
    ours, theirs = both_ways(cells, bench, epochs=2)  # the second from the first's state
    assert apart(ours, theirs) < 1e-11
    for a, b in zip(ours, theirs, strict=True):
        for ours_, theirs_ in zip(a.model.buffers(), b.model.buffers(), strict=True):
            assert torch.allclose(ours_, theirs_, rtol=1e-11, atol=0)


def test_points_and_equations_go_together():
    for name in ("toy", "helmholtz"):
        bench = benchmarks.create(name).prepare(CPU)
        spec = training.parse_spec("aligned_mtl")
        cells = [training.Cell(name, "quick", bench.protocols["quick"], spec, s) for s in (0, 1)]
        ours, theirs = ([training.Run(what, bench) for what in cells] for _ in range(2))
        stack = together.Stack(ours)
        batches = [run.batches_left() for run in ours]
        for _ in range(3):
            assert None not in stack.step([next(each) for each in batches])
        stack.give_back()
        for run in theirs:
            left = run.batches_left()
            for _ in range(3):
                run.step(next(left))
        assert apart(ours, theirs) < 1e-5


# ----------------------------------------------------------------------------- result files


def test_results_are_those_of_runs_one_by_one_also_after_a_kill(tmp_path):
    bench = Double().prepare(CPU)
    cells = [cell("excess_mtl", seed, epochs=3) for seed in (0, 1, 2)]
    whole = [training.train(what, bench, tmp_path / "single") for what in cells]

    def stop(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        together.train(cells, bench, tmp_path / "group", progress=stop)
    paths = [what.path(tmp_path / "group") for what in cells]
    assert all(checkpoints.files(path)[0].exists() for path in paths)
    # One run is ended by itself, from the checkpoint of the group; the others together again.
    alone = training.train(cells[0], bench, tmp_path / "group")
    rest = together.train(cells[1:], bench, tmp_path / "group")
    assert [r["together"] for r in rest] == [2, 2]
    for theirs, ours, path in zip(whole, [alone, *rest], paths, strict=True):
        assert results.read_result(path)["finished"]
        assert without_times(ours) == rounded(without_times(theirs))
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)


def test_runs_at_different_places_go_on_in_groups(bench, tmp_path):
    cells = [cell("equal", seed, epochs=2) for seed in (0, 1, 2)]
    ahead = training.Run(cells[1], bench)
    ahead.epoch_of_training()
    checkpoints.write(checkpoints.files(cells[1].path(tmp_path))[0], ahead.state_dict())
    found = together.train(cells, bench, tmp_path)
    assert [r["seed"] for r in found] == [0, 1, 2]
    assert [r["together"] for r in found] == [2, 1, 2]
    assert [len(r["history"]) for r in found] == [2, 2, 2]


@pytest.mark.parametrize("method", ["equal", "mgda"])
def test_a_run_that_fails_leaves_the_others_alone(method, bench, tmp_path, monkeypatch):
    cells = [cell(method, seed) for seed in (0, 1, 2)]
    whole = [training.Run(what, bench) for what in cells]
    for run in whole:
        run.epoch_of_training()
    broken = [training.Run(what, bench) for what in cells]
    with torch.no_grad():
        broken[1].model.heads[0].bias.fill_(float("nan"))
    stack = together.Stack(broken)
    assert stack.epoch_of_training() == [broken[0], broken[2]]
    assert "epoch 1" in stack.failed[1]
    assert [len(run.history) for run in broken] == [1, 0, 1]
    assert apart([broken[0], broken[2]], [whole[0], whole[2]]) < 1e-5
    monkeypatch.setattr(
        together, "Stack", lambda runs: stack if len(runs) == 3 else type(stack)(runs)
    )
    stack.failed.clear()
    found = together.train(cells, bench, tmp_path)
    assert [bool(r["failed"]) for r in found] == [False, True, False]
    assert not checkpoints.files(cells[1].path(tmp_path))[0].exists()


# ----------------------------------------------------------------------------- grids


def test_a_grid_goes_by_methods_and_tries_rates_first(tmp_path):
    protocol = dataclasses.replace(Tiny.protocols["quick"], epochs=1, rates=(4e-3, 1e-3))
    specs = training.parse_specs("equal,joint")
    grid = training.Grid("tiny", "quick", protocol, specs, 3)
    seen = [
        [(o.cell.spec.name, o.cell.seed, o.status) for o in together.sweep(grid, tmp_path, CPU)]
        for _ in range(2)
    ]
    order = [("equal", 0), ("equal", 0), ("equal", 1), ("equal", 2)]
    order += [("joint", 0), ("joint", 0), ("joint", 1), ("joint", 2)]
    assert seen == [[(*what, status) for what in order] for status in ("done", "kept")]
    assert len(seen[0]) == len(grid)
    files = [json.loads(path.read_text()) for path in tmp_path.rglob("seed[12]-*.json")]
    counts = sorted((f["method"], f.get("together")) for f in files)
    assert counts == [("equal", 2), ("equal", 2), ("joint", None), ("joint", None)]
    assert {p for p in grid.cells(tmp_path) if training.finished(p.path(tmp_path)) is None} == set()


def test_a_run_that_somebody_else_holds_is_left_to_them(tmp_path):
    protocol = dataclasses.replace(Tiny.protocols["quick"], epochs=1)
    grid = training.Grid("tiny", "quick", protocol, training.parse_specs("equal"), 3)
    with training.claim(grid.cell(grid.specs[0], 1, protocol.lr), tmp_path):
        found = {o.cell.seed: o.status for o in together.sweep(grid, tmp_path, CPU)}
    assert found == {0: "done", 1: "elsewhere", 2: "done"}


def test_too_little_memory_fails_the_group_and_the_next_one_follows(tmp_path, monkeypatch):
    protocol = dataclasses.replace(Tiny.protocols["quick"], epochs=1)
    grid = training.Grid("tiny", "quick", protocol, training.parse_specs("equal,mgda"), 2)
    whole = together.train

    def train(cells, *arguments):
        if cells[0].spec.name == "equal":
            raise MemoryError("no room")
        return whole(cells, *arguments)

    monkeypatch.setattr(together, "train", train)
    outcomes = list(together.sweep(grid, tmp_path, CPU))
    assert [o.status for o in outcomes] == ["failed", "failed", "done", "done"]
    assert "leave --together out" in outcomes[0].result["failed"]


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("benchmark", "why"), [(Dropping, "torch.func can stack"), (Restless, "global generator")]
)
def test_random_layers_and_batches_are_refused(benchmark, why, tmp_path):
    bench = benchmark().prepare(CPU)
    with pytest.raises(ValueError, match=rf"{why}.*leave"):
        together.train([cell("equal", 0), cell("equal", 1)], bench, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_methods_and_protocols_that_cannot_are_refused(bench, tmp_path):
    with pytest.raises(ValueError, match="joint: the method has a step of its own"):
        together.train([cell("joint")], bench, tmp_path)
    others = ({"precision": "bfloat16"}, {"accumulate": 2}, {"channels_last": True})
    for asked in (*others, {"cuda_graph": True}):
        with pytest.raises(ValueError, match="leave --together out"):
            together.train([cell("equal", **asked)], bench, tmp_path)


def test_the_command(tmp_path, monkeypatch):
    command = ["run", "tiny", "--methods", "equal,joint", "--seeds", "2", "--together"]
    command += ["--device", "cpu", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert "one by one: joint, the method has a step of its own" in done.output
    assert "4 of 4 runs are done" in done.output
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--together in one process, got 2"):
        CliRunner().invoke(cli.app, command, catch_exceptions=False)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["equal", "aligned_mtl", "pcgrad", "excess_mtl"])
def test_gpu_seeds_take_the_steps_of_the_cpu(method):
    cells = [cell(method, seed) for seed in range(2)]
    on_cpu = [training.Run(what, Double().prepare(CPU)) for what in cells]
    for run in on_cpu:
        run.epoch_of_training()
    bench = Double().prepare(torch.device("cuda"))
    on_gpu = [training.Run(what, bench) for what in cells]
    together.Stack(on_gpu).epoch_of_training()
    assert apart(on_gpu, on_cpu) < 1e-9
