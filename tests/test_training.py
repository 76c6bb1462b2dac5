"""The training loop: every method trains and resumes exactly; sweeps lose and repeat nothing."""

import copy
import dataclasses
import json
import multiprocessing
import random
import subprocess
import sys
import time

import pytest
import torch
from helpers import assert_equal_state
from tiny import Tiny, cell, sweep_all, without_times
from torch.nn import functional as F

from mtl_tutorial import benchmarks, checkpoints, methods, results, training
from mtl_tutorial.benchmarks import Task
from mtl_tutorial.metrics import ACCURACY
from mtl_tutorial.training import Spec, fitting, parse_spec, parse_specs

pytestmark = pytest.mark.usefixtures("tiny_is_known")
CPU = torch.device("cpu")
EVERY = [results.BASELINE, *methods.available()]


class Stop(Exception):
    pass


def stop_after(epoch, error):
    def progress(done, total):
        if done == epoch:
            raise error

    return progress


def stopping_after(n, bench):
    """The benchmark, but there is no batch after the n-th."""
    left = iter(range(n))

    def batches(protocol, generator):
        for batch in type(bench).batches(bench, protocol, generator):
            if next(left, None) is None:
                raise KeyboardInterrupt
            yield batch

    broken = copy.copy(bench)
    broken.batches = batches
    return broken


# ----------------------------------------------------------------------------- every method

# Methods whose summed training loss need not fall, with the reason.
MAY_RISE = {"ngdiff": "it raises the loss of the task that is to be forgotten"}


@pytest.mark.parametrize("method", EVERY)
def test_every_method_trains_and_resumes_exactly(method, bench, tmp_path):
    what = cell(method)
    need = None if method == results.BASELINE else methods.CLASSES[what.spec.name].n_tasks
    if need not in (None, 2):
        pytest.skip(f"{method} needs {need} tasks, MultiDigits has 2")
    whole = training.train(what, bench, tmp_path / "whole")
    assert whole["finished"]
    assert [h["epoch"] for h in whole["history"]] == [1, 2]
    first, last = (sum(h["train_losses"]) for h in whole["history"])
    if what.spec.name in MAY_RISE:
        forgotten = [h["train_losses"] for h in whole["history"]]
        assert any(forgotten[1][k] > forgotten[0][k] for k in range(2)), MAY_RISE[what.spec.name]
    else:
        assert last < first

    with pytest.raises(KeyboardInterrupt):
        training.train(what, stopping_after(9, bench), tmp_path / "broken", every=0)
    path = what.path(tmp_path / "broken")
    assert not path.exists()
    newest, before = (checkpoints.read(file) for file in checkpoints.files(path))
    assert (newest["epoch"], newest["batch"], before["batch"]) == (1, 3, 2)
    torch.manual_seed(987)  # whatever happened in between
    resumed = training.train(what, bench, tmp_path / "broken")
    assert without_times(resumed) == without_times(whole)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("method", ["aligned_mtl", "imtl", "graddrop"])
def test_feature_level_trains(method, bench, tmp_path):
    feature = training.train(cell(f"{method}:level=feature"), bench, tmp_path)
    parameter = training.train(cell(method), bench, tmp_path)
    assert feature["level"] == "feature"
    assert feature["finished"]
    assert feature["test"] != parameter["test"] or feature["history"] != parameter["history"]


def test_feature_level_needs_a_shared_representation(tmp_path, monkeypatch):
    toy = benchmarks.create("toy").prepare(CPU)
    what = training.Cell(
        "toy", "quick", toy.protocols["quick"], parse_spec("mgda:level=feature"), 0
    )
    with pytest.raises(ValueError, match="level=feature"):
        training.train(what, toy, tmp_path)


def test_random_rules_draw_with_the_seed_of_the_run(bench, tmp_path):
    drawn = [training.Run(cell("rlw", seed), bench).method.settings["seed"] for seed in (0, 3)]
    assert drawn == [0, 3]
    assert training.Run(cell("rlw:seed=7", 3), bench).method.settings["seed"] == 7
    weights = [
        training.train(cell("rlw", s, epochs=1), bench, tmp_path)["history"][0]["weights"]
        for s in (0, 1)
    ]
    assert weights[0] != weights[1]


def test_same_seed_same_result_other_seed_other_result(bench, tmp_path):
    runs = [
        training.train(cell("pcgrad", seed), bench, tmp_path / folder)
        for seed, folder in ((0, "a"), (0, "b"), (1, "a"))
    ]
    assert without_times(runs[0]) == without_times(runs[1])
    assert runs[0]["history"][0]["train_losses"] != runs[2]["history"][0]["train_losses"]


def test_equal_weights_train_as_plain_pytorch_does(bench, tmp_path):
    """The loop adds nothing: the same numbers as the usual loop written by hand."""
    what = cell("equal:reduction=sum", seed=5)
    result = training.train(what, bench, tmp_path)
    torch.manual_seed(5)
    model = bench.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    order = torch.Generator().manual_seed(5)
    data = bench.data["train"]
    for epoch in range(2):
        losses = []
        for index in torch.randperm(240, generator=order).split(40):
            outputs = model(data.inputs[index])
            loss = torch.stack(
                [F.cross_entropy(o, t[index]) for o, t in zip(outputs, data.targets, strict=True)]
            )
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach().double())
        expected = torch.stack(losses).mean(0).tolist()
        assert result["history"][epoch]["train_losses"] == pytest.approx(expected, rel=1e-5)
    assert result["test"] == bench.evaluate(model, "test")


def test_learning_rate_follows_the_schedule(bench, monkeypatch):
    run = training.Run(cell("equal", epochs=4, schedule="cosine"), bench)
    rates = []
    step = run.step
    monkeypatch.setattr(
        run, "step", lambda b: (rates.append(run.optimizer.param_groups[0]["lr"]), step(b))[1]
    )
    for _ in range(4):
        run.epoch_of_training()
    expected = [4e-3 * f for f in (1, 0.853553, 0.5, 0.146447)]
    assert rates[::6] == pytest.approx(expected, rel=1e-5)


def test_looking_at_conflict_changes_nothing(bench):
    run = training.Run(cell("equal"), bench)
    before = run.state_dict()["model"]
    kept = {k: v.clone() for k, v in before.items()}
    rng = torch.get_rng_state()
    seen = run.probe()
    assert torch.equal(torch.get_rng_state(), rng)
    assert_equal_state(dict(run.model.state_dict()), kept)
    assert all(p.grad is None for p in run.model.parameters())
    losses, _ = bench.losses(run.model, bench.probe())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(x, run.shared, retain_graph=True)])
        for x in losses
    ]
    expected = F.cosine_similarity(rows[0].double(), rows[1].double(), dim=0)
    assert seen["cosine"] == pytest.approx(expected.item(), abs=1e-6)
    assert seen["norms"] == pytest.approx([r.norm().item() for r in rows], rel=1e-5)
    assert seen["conflict_share"] == float(expected < 0)


# ------------------------------------------------------------------------------ result files


def test_result_file_holds_what_it_promises(bench, tmp_path):
    what = cell("rlw", seed=2)
    returned = training.train(what, bench, tmp_path)
    path = what.path(tmp_path)
    assert path.parent == tmp_path / "tiny" / "quick" / "rlw"
    assert path.name.startswith("seed2-")
    result = results.read_result(path)
    assert result == json.loads(json.dumps(returned))
    assert result["format"] == results.FORMAT
    assert result["protocol"] == what.protocol.describe()
    assert (result["method"], result["label"], result["level"]) == ("rlw", "rlw", "parameter")
    assert result["settings"]["seed"] == 2
    assert result["metrics"] == {t: {"accuracy": True} for t in ("left", "right")}
    assert result["parameters"] == {"shared": 3328, "total": 3988}
    assert result["data"] == bench.checksums()
    assert set(result["versions"]) == {"mtl_tutorial", "python", "torch", "torchvision", "numpy"}
    assert set(result["device"]) == {"type", "name", "threads"}
    assert result["device"]["type"] == "cpu"
    memory = result["peak_memory_mb"]  # where the system tells
    assert memory is None or 100 < memory < 1e5
    assert result["finished"] is True
    assert result["failed"] is None
    assert result["seconds_per_epoch"] == pytest.approx(result["seconds"] / 2)
    for entry in result["history"]:
        assert set(entry) == {
            *("epoch", "seconds", "train_losses", "weights", "val"),
            *("cosine", "conflict_share", "norms", "condition_number"),
        }
        assert set(entry["val"]) == {"left", "right"}
        assert len(entry["train_losses"]) == len(entry["weights"]) == 2
    assert result["date"].endswith("+00:00")


def test_single_task_baseline_shares_nothing(bench, tmp_path):
    result = training.train(cell("single_task"), bench, tmp_path)
    assert result["parameters"] == {"shared": 0, "total": 2 * (3328 + 330)}
    assert "cosine" not in result["history"][0]


def test_file_name_changes_with_everything_but_the_seed(tmp_path):
    base = cell("rlw")
    cells = [
        base,
        cell("rlw:seed=1"),
        cell("rlw:level=feature"),
        cell("equal"),
        cell("rlw", epochs=3),
        cell("rlw", lr=1e-2),
        cell("rlw", note="other"),
        dataclasses.replace(base, benchmark="multidigits"),
        dataclasses.replace(base, budget="full"),
    ]
    keys = [c.path(tmp_path).stem.partition("-")[2] for c in cells]
    assert len(set(keys)) == len(keys)
    assert cell("rlw", seed=4).path(tmp_path).name == f"seed4-{keys[0]}.json"
    one, other = (cell(f"famo:{s}") for s in ("lr=0.1:decay=0.2", "decay=0.2:lr=0.1"))
    assert one.path(tmp_path) == other.path(tmp_path)


def test_file_name_is_one_folder_whatever_the_settings_hold(tmp_path):
    spec = Spec("stch", {"preference": "../../up/[0.1, 0.9]"})
    path = dataclasses.replace(cell(), spec=spec).path(tmp_path)
    assert path.resolve().parents[2] == tmp_path.resolve() / "tiny"


# ------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("content", ["garbage", "empty", "cut", "other model", "other method"])
def test_unusable_checkpoint_starts_anew_and_says_so(content, bench, tmp_path, capsys):
    what = cell("dwa")
    whole = training.train(what, bench, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        training.train(what, bench, tmp_path, stop_after(1, KeyboardInterrupt()))
    checkpoint = what.path(tmp_path).with_suffix(".ckpt")
    data = checkpoint.read_bytes()
    if content.startswith("other"):
        state = checkpoints.read(checkpoint)
        if content == "other model":
            state["model"]["trunk.0.weight"] = torch.zeros(3)
        else:
            state["method"]["method"] = "equal"
        checkpoints.write(checkpoint, state)
        checkpoint.with_suffix(".previous").unlink()
    else:
        checkpoint.write_bytes(
            {"garbage": b"no checkpoint", "empty": b"", "cut": data[:999]}[content]
        )
    capsys.readouterr()
    result = training.train(what, bench, tmp_path)
    said = capsys.readouterr()
    assert said.out == ""  # standard output is for results
    assert said.err.startswith(f"checkpoint {checkpoint} unreadable (")
    assert said.err.endswith("starting this run anew\n")
    assert said.err.count("\n") == 1
    assert without_times(result) == without_times(whole)


# ---------------------------------------------------------------------------------- sweeps


def statuses(cells, root):
    return [o.status for o in training.sweep(cells, root, CPU)]


def test_finished_runs_are_not_repeated(tmp_path, monkeypatch):
    cells = [cell("equal", seed) for seed in (0, 1)]
    assert statuses(cells[:1], tmp_path) == ["done"]
    before = cells[0].path(tmp_path).read_bytes()
    assert statuses(cells, tmp_path) == ["kept", "done"]
    assert cells[0].path(tmp_path).read_bytes() == before
    monkeypatch.setattr(training, "train", None)  # nothing left to train
    outcomes = list(training.sweep(cells, tmp_path, CPU))
    assert [o.status for o in outcomes] == ["kept", "kept"]
    assert outcomes[0].result == json.loads(before)


@pytest.mark.parametrize(
    "content", ["", "{", '{"format": 1}', "[]", "null", '{"format": 999}', "\0", "cut"]
)
def test_broken_result_file_is_moved_aside_and_run_again(content, tmp_path, capsys):
    what = cell("equal", epochs=1)
    assert statuses([what], tmp_path) == ["done"]
    path = what.path(tmp_path)
    good = path.read_text(encoding="utf-8")
    bad = good[:-20] if content == "cut" else content
    path.write_text(bad, encoding="utf-8")
    assert statuses([what], tmp_path) == ["done"]
    assert path.with_suffix(".broken").read_text(encoding="utf-8") == bad
    assert path.with_suffix(".broken").name in capsys.readouterr().err
    assert without_times(json.loads(path.read_text(encoding="utf-8"))) == without_times(
        json.loads(good)
    )


class Sick(Tiny):
    """Tiny, whose second task has a loss of NaN from the third batch on, while it is ill."""

    name = "sick"
    ill = True
    calls = 0

    @staticmethod
    def cough(output, target):
        Sick.calls += 1
        factor = float("nan") if Sick.ill and Sick.calls > 2 else 1.0
        return factor * F.cross_entropy(output, target)

    tasks = (Task("left", F.cross_entropy, (ACCURACY,)), Task("right", cough, (ACCURACY,)))


def test_failed_run_is_recorded_the_sweep_goes_on_and_tries_again(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmarks.CLASSES, "sick", Sick)
    monkeypatch.setattr(Sick, "calls", 0)
    monkeypatch.setattr(Sick, "ill", True)
    sick = dataclasses.replace(cell("aligned_mtl"), benchmark="sick")
    cells = [sick, cell("equal")]
    assert statuses(cells, tmp_path) == ["failed", "done"]
    result = results.read_result(sick.path(tmp_path))
    assert result["finished"] is False
    assert result["test"] is None
    assert result["failed"].startswith("epoch 1: aligned_mtl: expected finite")
    assert "task 1" in result["failed"]
    assert result["history"] == []
    assert not sick.path(tmp_path).with_suffix(".ckpt").exists()
    assert training.finished(sick.path(tmp_path)) is None

    monkeypatch.setattr(Sick, "ill", False)
    assert statuses(cells, tmp_path) == ["done", "kept"]
    assert results.read_result(sick.path(tmp_path))["failed"] is None


def test_bad_input_of_another_kind_is_not_swallowed(bench, tmp_path):
    with pytest.raises(Stop):
        training.train(cell("equal"), bench, tmp_path, stop_after(1, Stop()))


def test_interrupted_sweep_goes_on_where_it_was(tmp_path):
    cells = [cell("equal", 0), cell("dwa", 0, epochs=3)]
    whole = {
        c: o.result for c, o in zip("ab", training.sweep(cells, tmp_path / "w", CPU), strict=True)
    }

    def interrupt(what, done, total):
        if what.spec.name == "dwa" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(training.sweep(cells, tmp_path / "i", CPU, interrupt))
    epochs = []
    outcomes = list(
        training.sweep(cells, tmp_path / "i", CPU, lambda c, done, total: epochs.append(done))
    )
    assert [o.status for o in outcomes] == ["kept", "done"]
    assert epochs == [3]  # two epochs came from the checkpoint
    assert without_times(outcomes[1].result) == without_times(whole["b"])


@pytest.fixture(scope="module")
def spawn():
    """Starts child processes that have torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mtl_tutorial.training"])

    def start(*arguments):
        process = context.Process(target=sweep_all, args=arguments)
        process.start()
        return process

    start.context = context
    return start


def test_killed_at_random_moments_the_result_is_the_same(spawn, tmp_path):
    cells = [cell("famo", 0, epochs=15), cell("pcgrad", 1, epochs=15)]
    expected = [o.result for o in training.sweep(cells, tmp_path / "whole", CPU)]
    root = tmp_path / "killed"
    chance = random.Random(0)
    kills = 0
    for _ in range(6):
        child = spawn(cells, root)
        began = time.monotonic()
        # Count from the first sign of life, so that a slow machine is killed at work too.
        while child.is_alive() and not root.exists() and time.monotonic() - began < 60:
            time.sleep(0.005)
        child.join(chance.uniform(0.02, 0.5))
        if child.is_alive():
            child.kill()
            kills += 1
        child.join()
    assert kills >= 2
    last = spawn(cells, root, tmp_path / "log")
    last.join(120)
    assert last.exitcode == 0
    for what, whole in zip(cells, expected, strict=True):
        result = results.read_result(what.path(root))
        assert without_times(result) == without_times(json.loads(json.dumps(whole)))
        assert not what.path(root).with_suffix(".ckpt").exists()
    assert results.load_results(root)[1] == []


def test_two_processes_never_do_the_same_cell(spawn, tmp_path):
    cells = [cell(method, seed, epochs=3) for seed in range(4) for method in ("equal", "dwa")]
    gate = spawn.context.Barrier(2)
    logs = [tmp_path / "one", tmp_path / "two"]
    children = [spawn(cells, tmp_path / "out", log, gate) for log in logs]
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    outcomes = [json.loads(log.read_text(encoding="utf-8")) for log in logs]
    done = [tuple(o[:2]) for log in outcomes for o in log if o[2] == "done"]
    assert sorted(done) == sorted((c.spec.label, c.seed) for c in cells)  # each exactly once
    others = {o[2] for log in outcomes for o in log} - {"done"}
    assert others <= {"kept", "elsewhere"}
    assert others  # they did meet
    assert len(list((tmp_path / "out").rglob("seed*.json"))) == len(cells)


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path):
    cells = [cell("equal"), cell("dwa")]
    with training.claim(cells[0], tmp_path):
        assert [o.status for o in training.sweep(cells, tmp_path, CPU)] == ["elsewhere", "done"]
    assert [o.status for o in training.sweep(cells, tmp_path, CPU)] == ["done", "kept"]


@pytest.mark.parametrize("error", [NotImplementedError("no flock here"), OSError(30, "Read-only")])
def test_a_folder_in_which_nothing_can_be_claimed_is_said(error, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(training.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match=r"expected to claim a run in .*; choose another folder"):
        statuses([cell()], tmp_path)


def test_a_patient_sweep_does_what_a_dead_process_left(tmp_path):
    cells = [cell("equal"), cell("dwa")]
    held = training.claim(cells[0], tmp_path)
    held.__enter__()
    sweep = training.sweep(cells, tmp_path, CPU, patient=True)
    first = next(sweep)
    assert (first.cell, first.status) == (cells[1], "done")
    held.__exit__(None, None, None)  # as the system does for a process that died
    assert [(o.cell, o.status) for o in sweep] == [(cells[0], "done")]


def test_lack_of_memory_ends_one_run_and_the_next_sweep_goes_on(tmp_path, monkeypatch):
    step, steps = training.Run.step, iter(range(99))

    def hungry(run, batch):
        if run.cell.spec.name == "equal" and next(steps) == 8:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return step(run, batch)

    cells = [cell("equal"), cell("dwa")]
    monkeypatch.setattr(training.Run, "step", hungry)
    assert statuses(cells, tmp_path) == ["failed", "done"]
    failed = results.read_result(cells[0].path(tmp_path))["failed"]
    assert failed == "epoch 2: out of memory: CUDA out of memory. Tried to allocate"
    epochs = []
    sweep = training.sweep(cells, tmp_path, CPU, lambda _, done, __: epochs.append(done))
    assert [o.status for o in sweep] == ["done", "kept"]
    assert epochs == [2]  # from the checkpoint of the first

    monkeypatch.setattr(Tiny, "build", lambda _: torch.empty(2**60))  # not even the network fits
    others = [cell("mgda"), cells[1]]
    (outcome, kept) = training.sweep(others, tmp_path, CPU)
    assert (outcome.status, kept.status) == ("failed", "kept")
    assert "out of memory" in outcome.result["failed"]


# -------------------------------------------------------------------------- specifications


def test_specification_with_settings_reads_back():
    text = "independent:group_size=1:optimizers=individual"
    spec = parse_spec(text)
    assert spec.settings == {"group_size": 1, "optimizers": "individual"}
    assert spec.label == text
    assert parse_spec(spec.label) == spec
    feature = parse_spec("mgda:level=feature")
    assert (feature.settings, feature.level) == ({}, "feature")
    assert parse_spec(feature.label) == feature
    listed = parse_specs("aligned_mtl:preference=[0.3, 0.7], equal,equal")
    assert [s.label for s in listed] == ["aligned_mtl:preference=[0.3, 0.7]", "equal"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no method ''"),
        ("aligned", "aligned_mtl"),
        ("nosuch", "also single_task and all"),
        ("equal:reduction", "expected setting=value after 'equal', got 'reduction'"),
        ("equal:=sum", "expected setting=value"),
        ("equal:reduction=sum:reduction=mean", "once"),
        ("equal:reductoin=sum", "reduction"),
        ("equal:reduction=max", "max"),
        ("famo:lr=abc", "expected settings that famo takes, got lr=abc"),
        ("rlw:seed=abc", "expected settings that rlw takes"),
        ("nash_mtl:update_every=1e400", "expected settings that nash_mtl takes"),
        ("aligned_mtl:preference=5", "expected settings that aligned_mtl takes"),
        ("equal:level=shared", "expected level parameter or feature, got 'shared'"),
        ("single_task:reduction=sum", "expected no settings for single_task"),
        ("single_task:level=feature", "expected no settings for single_task"),
    ],
)
def test_wrong_specification_names_the_cure(text, why):
    with pytest.raises(ValueError) as error:
        parse_spec(text)
    assert why in str(error.value)


@pytest.mark.parametrize("text", ["", " , ", ","])
def test_no_method_is_an_error(text):
    with pytest.raises(ValueError, match="at least one method"):
        parse_specs(text)


def test_all_is_every_method_and_the_baseline():
    assert [s.label for s in parse_specs("all")] == EVERY
    assert parse_specs("equal,all")[0].label == "equal"


def test_methods_that_need_another_number_of_tasks(monkeypatch):
    specs = parse_specs("all")
    kept, left_out = fitting(specs, 3, "all")
    fixed = [n for n, c in methods.CLASSES.items() if c.n_tasks not in (None, 3)]
    assert "ngdiff" in fixed
    assert {s.name for s in specs} - {s.name for s in kept} == set(fixed)
    assert "left out: ngdiff needs 2 tasks, this benchmark has 3" in left_out
    with pytest.raises(ValueError, match="ngdiff needs 2 tasks"):
        fitting(parse_specs("equal,ngdiff"), 3, "equal,ngdiff")
    assert fitting(specs, 2, "all") == (specs, [])


# ------------------------------------------------------------------------------- provenance


def test_devices():
    assert training.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="expected device auto, cpu or cuda, got 'tpu'"):
        training.pick_device("tpu")
    assert training.pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_processes_of_torchrun_know_their_number_and_take_a_gpu_each(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert training.launched() == (0, 1)
    assert training.pick_device("auto") == torch.device("cuda")
    for name, value in (("RANK", "7"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert training.launched() == (7, 8)
    assert training.pick_device("cuda") == torch.device("cuda", 1)  # two share a GPU
    assert training.pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_missing_cuda_device_is_said():
    with pytest.raises(ValueError, match="found none; use --device cpu"):
        training.pick_device("cuda")


def git(folder, *arguments):
    identity = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_is_that_of_the_package_and_marks_changes(tmp_path, monkeypatch):
    package = tmp_path / "mtl_tutorial"
    package.mkdir()
    monkeypatch.setattr(training, "__file__", str(package / "training.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert training.git_commit() is None  # no checkout
    git(tmp_path, "init", "-q")
    (tmp_path / "other.txt").write_text("a")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-q", "-m", "a")
    (package / "__init__.py").write_text("")
    assert training.git_commit() is None  # installed into somebody else's checkout
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "b")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert training.git_commit() == head
    (tmp_path / "other.txt").write_text("b")
    assert training.git_commit() == head
    (package / "__init__.py").write_text("changed")
    assert training.git_commit() == head + "+"


def test_importing_the_package_imports_no_torch():
    code = "import sys, mtl_tutorial.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
