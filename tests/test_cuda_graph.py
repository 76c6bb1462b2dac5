"""Recorded steps: what cannot be recorded says so; what can trains as the plain loop does."""

import contextlib
import types

import pytest
import torch
from click.testing import CliRunner
from tiny import Tiny, apart, cell, prepared

from mtl_tutorial import cli, cuda_graph, gradients, methods, training

pytestmark = pytest.mark.usefixtures("tiny_is_known")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def recorded() -> list[str]:
    """Methods whose step can be recorded."""
    found = []
    for name in methods.available():
        with contextlib.suppress(ValueError):
            cuda_graph.check(methods.create(name), cell().protocol, CUDA)
            found.append(name)
    return found


RECORDED = recorded()


# ----------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("method", "asked", "why"),
    [
        ("cagrad", {}, "the rule of cagrad waits for the device"),
        ("config_momentum", {}, "config_momentum has a step of its own"),
        ("pcgrad", {}, "pcgrad draws random numbers on the host"),
        ("famo", {}, "famo has a step of its own"),
        ("equal", {"precision": "float16"}, "a gradient scaler"),
        ("equal", {"accumulate": 2}, "pieces of a batch"),
    ],
)
def test_what_cannot_be_recorded_is_refused(method, asked, why):
    protocol = cell(**asked).protocol
    with pytest.raises(ValueError, match=f"{why}.*leave --cuda-graph or the method out"):
        cuda_graph.check(methods.create(method), protocol, CUDA)


def test_methods_that_can_be_recorded():
    """Every rule on the device that needs nothing of the host."""
    assert {"equal", "uncertainty", "dwa", "excess_mtl", "gradnorm", "mgda", "nash_mtl"} <= set(
        RECORDED
    )
    assert not {"cagrad", "pcgrad", "graddrop", "famo", "joint"} & set(RECORDED)


def test_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match="got another one: the device is cpu"):
        training.train(cell("equal", cuda_graph=True), prepared(), tmp_path)
    command = ["run", "tiny", "--methods", "equal", "--device", "cpu", "--cuda-graph"]
    with pytest.raises(ValueError, match="the device is cpu"):
        CliRunner().invoke(cli.app, [*command, "--out", str(tmp_path)], catch_exceptions=False)
    assert not list(tmp_path.rglob("*.json"))


# ----------------------------------------------------------------------------- uploads


def test_uploads_come_back_in_their_order_and_no_others():
    a, b = torch.arange(3.0), torch.ones(2)
    with gradients.Constants() as constants:
        assert torch.equal(gradients.upload(a, CPU), a)
        gradients.upload(b, CPU).zero_()  # what the caller does with its copy
    with constants.again():
        assert torch.equal(gradients.upload(a, CPU), a)
        assert torch.equal(gradients.upload(b, CPU), b)
        with pytest.raises(RuntimeError, match="other numbers"):
            gradients.upload(b, CPU)
    with constants.again(), pytest.raises(RuntimeError, match="other numbers"):
        gradients.upload(b, CPU)
    assert gradients.upload(b, CPU) is b  # nothing is kept outside


# ----------------------------------------------------------------------------- replays


def stand_in_for_cuda(monkeypatch, run):
    """A recording that computes nothing, and a replay that does the recorded step on the host."""

    def snapshot():
        state = run.optimizer.state
        numbers = [v for s in state.values() for v in s.values()]
        return [*run.model.parameters(), *stepper._state.values(), *numbers]

    class Graph:
        def replay(self):
            for key, value in vars(self.stepper._step()).items():
                if isinstance(value, torch.Tensor):
                    getattr(self.stepper._info, key).copy_(value)

    @contextlib.contextmanager
    def graph(what):
        kept = [(x, x.detach().clone()) for x in snapshot()]
        inside.append(True)
        yield
        inside.clear()
        with torch.no_grad():
            for x, before in kept:
                x.copy_(before)

    inside = []
    nothing = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "Stream": lambda: nothing,
        "current_stream": lambda: nothing,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graph, "check", lambda *_: None)
    stepper = cuda_graph.GraphedStep(run)
    Graph.stepper = stepper
    for group in run.optimizer.param_groups:
        group["capturable"] = False
    return stepper


@pytest.mark.parametrize("method", ["equal", "uncertainty", "excess_mtl"])
def test_replays_take_each_batch_and_keep_the_state(method, monkeypatch):
    bench = prepared()
    plain, recorded = (training.Run(cell(method, epochs=4), bench) for _ in range(2))
    step = stand_in_for_cuda(monkeypatch, recorded)
    infos = []
    for batch, same in zip(plain.batches_left(), recorded.batches_left(), strict=True):
        infos.append((plain.step(batch), step(same)))
    assert len(infos) == 6 > cuda_graph.WARM_UP + 2
    assert apart([recorded], [plain]) == 0
    for ours, theirs in infos:  # none was overwritten by a later one
        assert torch.equal(ours.losses, theirs.losses)
        assert torch.equal(ours.weights, theirs.weights)
    for key, value in plain.method._state.items():
        assert torch.equal(recorded.method._state[key], value)
    with pytest.raises(ValueError, match="batches of one shape"):
        step((same[0][:5], same[1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("method", RECORDED)
def test_gpu_twenty_steps_are_those_of_the_plain_loop(method, optimizer):
    bench = Tiny().prepare(CUDA)
    cells = [
        cell(method, epochs=4, optimizer=optimizer, schedule="cosine", cuda_graph=recorded)
        for recorded in (False, True)
    ]
    plain, recorded = (training.Run(what, bench) for what in cells)
    for _ in range(4):  # 24 steps: each epoch three of them as ever, then three replays
        plain.epoch_of_training()
        recorded.epoch_of_training()
    assert apart([recorded], [plain]) < 1e-4
    for ours, theirs in zip(recorded.history, plain.history, strict=True):
        assert ours["train_losses"] == pytest.approx(theirs["train_losses"], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["uncertainty", "gradnorm", "gradnorm:level=feature"])
def test_gpu_a_replay_that_meets_nan_changes_nothing_and_tells(method):
    run = training.Run(cell(method, cuda_graph=True), Tiny().prepare(CUDA))
    step = cuda_graph.GraphedStep(run)
    batches = list(run.batches_left())
    for inputs, targets in batches[:5]:
        step((inputs, targets))
    before = [p.detach().clone() for p in run.method._state.values()]
    step((batches[5][0] * float("nan"), batches[5][1]))
    torch.cuda.synchronize()
    after = list(run.method._state.values())
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with pytest.raises(FloatingPointError, match="earlier step"):
        step(batches[0])
