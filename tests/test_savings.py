"""Lower precision, another memory layout and batches in pieces train as float32 and whole ones do.

Held on a small dense network: three tasks on one image, as on rooms or NYUv2.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from mtl_tutorial import benchmarks, cli, dense_metrics, metrics, results, savings, training
from mtl_tutorial.benchmarks import Benchmark, Data, Protocol, Task
from mtl_tutorial.benchmarks.rooms import Rooms
from mtl_tutorial.gradients import task_gradients
from mtl_tutorial.models import HardSharing, count_parameters

N, SIDE = 24, 16


class Maps(Benchmark):
    """Squares on a noisy ground: where they are, how far, and which way they face."""

    name = "maps"
    protocols: ClassVar[dict[str, Protocol]] = {"quick": Protocol(epochs=1, batch_size=8, lr=0.01)}
    tasks = (
        Task("segmentation", dense_metrics.cross_entropy, (metrics.VALUE,)),
        Task("depth", dense_metrics.depth_l1, (metrics.VALUE,)),
        Task("normals", dense_metrics.normal_cosine, (metrics.VALUE,)),
    )

    def load(self) -> dict[str, Data]:
        generator = torch.Generator().manual_seed(3)
        x = torch.rand(N, 3, SIDE, SIDE, generator=generator)
        label = torch.zeros(N, SIDE, SIDE, dtype=torch.int64)
        for i, corner in enumerate(torch.randint(2, 8, (N,), generator=generator).tolist()):
            label[i, corner : corner + 6, corner : corner + 6] = 1
            x[i, :, corner : corner + 6, corner : corner + 6] += 0.5
        depth = 1.0 + label + x[:, 0]
        normal = torch.stack([x[:, 0] - 0.5, x[:, 1] - 0.5, torch.ones_like(x[:, 2])], 1)
        normal = nn.functional.normalize(normal, dim=1)
        data = Data(x, (label, depth, normal))
        return {"train": data, "val": data, "test": data}

    def build(self) -> HardSharing:
        trunk = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.ReLU(),
        )
        return HardSharing(trunk, [nn.Conv2d(8, c, 1) for c in (2, 1, 3)])


def run_of(method: str = "equal", **protocol: Any) -> training.Run:
    changed = dataclasses.replace(Maps.protocols["quick"], **protocol)
    cell = training.Cell("maps", "quick", changed, training.parse_spec(method), 0)
    return training.Run(cell, Maps().under(changed).prepare(torch.device("cpu")))


def trained(method: str = "equal", epochs: int = 1, **protocol: Any) -> training.Run:
    run = run_of(method, epochs=epochs, **protocol)
    if run.scaler is not None:  # one that no step of these few is lost to
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for _ in range(epochs):
        run.epoch_of_training()
    return run


def parameters(run: training.Run) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1).double() for p in run.model.parameters()])


# ---------------------------------------------------------------------------- batches in pieces


METHODS = [
    *["equal", "aligned_mtl", "imtl", "imtl_l", "excess_mtl", "pcgrad", "cagrad", "nash_mtl"],
    *["famo", "gradnorm", "db_mtl", "uncertainty", "graddrop", "single_task"],
    *["independent", "individual", "joint", "cross_learning"],
]


@pytest.mark.parametrize("method", METHODS)
def test_pieces_train_as_the_whole_batch_does(method):
    # Adam divides by the gradient's size, so that rounding of a gradient near zero shows; SGD not.
    whole = trained(method, optimizer="sgd", lr=0.05)
    pieces = trained(method, optimizer="sgd", lr=0.05, accumulate=4)
    start = parameters(run_of(method))
    moved = (parameters(whole) - start).norm()
    assert moved > 1e-3
    assert (parameters(whole) - parameters(pieces)).norm() < 1e-4 * moved
    ours, theirs = (run.history[0]["train_losses"] for run in (pieces, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gradients_are_summed_before_the_gram_matrix():
    """The cross terms between pieces are there: Gram matrices of pieces do not add up."""
    run = run_of()
    batch = next(iter(run.benchmark.batches(run.cell.protocol, run.order)))

    def compute(piece):
        return run.benchmark.losses(run.model, piece)[0]

    def gram(losses):
        rows = task_gradients(losses, run.shared)
        return rows @ rows.T

    everything = list(run.model.parameters())
    pieces = savings.losses_in_pieces(compute, batch, 2, everything)
    one = compute(batch)
    torch.testing.assert_close(gram(pieces), gram(one), rtol=1e-4, atol=1e-8)
    halves = sum(gram([loss / 2 for loss in compute(half)]) for half in savings.cut(batch, 2))
    assert not torch.allclose(halves, gram(one), rtol=0.05)


def test_no_graph_outlives_its_piece():
    run = run_of()
    batch = next(iter(run.benchmark.batches(run.cell.protocol, run.order)))
    seen = []

    def compute(piece):
        losses = run.benchmark.losses(run.model, piece)[0]
        seen.append(losses[0].grad_fn)
        return losses

    losses = savings.losses_in_pieces(compute, batch, 4, list(run.model.parameters()))
    assert len(seen) == 4
    nodes, stack = set(), [loss.grad_fn for loss in losses]
    while stack:
        node = stack.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            stack += [parent for parent, _ in node.next_functions]
    assert not nodes & set(seen)
    assert not any("Convolution" in node.name() for node in nodes)


def test_task_absent_from_every_piece_stays_absent():
    weight = torch.ones(3, requires_grad=True)

    def compute(piece):
        return [(weight * piece).sum(), torch.tensor(2.0)]

    first, second = savings.losses_in_pieces(compute, torch.ones(4, 3), 2, [weight])
    assert first.requires_grad
    assert not second.requires_grad
    assert float(second) == 2.0
    first.backward()
    torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))


def test_parameters_that_a_loss_does_not_use_keep_no_gradient():
    used, unused = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    losses = savings.losses_in_pieces(
        lambda piece: [(used * piece).mean()], torch.rand(4, 2), 2, [used, unused]
    )
    losses[0].backward()
    assert used.grad is not None
    assert unused.grad is None


def test_without_gradients_pieces_give_values_alone():
    with torch.no_grad():
        (loss,) = savings.losses_in_pieces(lambda x: [x.mean()], torch.arange(6.0), 3, [])
    assert float(loss) == 2.5


def test_cut_keeps_the_form_and_refuses_what_does_not_fit():
    batch = (torch.arange(6), [torch.arange(12).view(6, 2)])
    pieces = savings.cut(batch, 3)
    assert len(pieces) == 3
    assert isinstance(pieces[1], tuple)
    assert pieces[1][0].tolist() == [2, 3]
    assert pieces[2][1][0].tolist() == [[8, 9], [10, 11]]
    for wrong in (torch.arange(5), torch.tensor(1.0), None, ()):
        with pytest.raises(ValueError, match="expected a batch"):
            savings.cut(wrong, 3)


def test_pieces_and_the_feature_level_exclude_each_other():
    with pytest.raises(ValueError, match="accumulate=1"):
        trained("aligned_mtl:level=feature", accumulate=2)


# ------------------------------------------------------------------------------ lower precision


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "method", ["equal", "aligned_mtl", "aligned_mtl:level=feature", "imtl", "famo", "individual"]
)
def test_lower_precision_trains_as_float32_does(method, precision):
    full = trained(method, epochs=3)
    low = trained(method, epochs=3, precision=precision)
    tolerance = {"bfloat16": 0.05, "float16": 0.02}[precision]
    for ours, theirs in zip(low.history, full.history, strict=True):
        torch.testing.assert_close(
            ours["train_losses"], theirs["train_losses"], rtol=tolerance, atol=0.0
        )
    assert {p.dtype for p in low.model.parameters()} == {torch.float32}
    start = parameters(run_of(method))
    moved = (parameters(full) - start).norm()
    assert (parameters(low) - parameters(full)).norm() < 0.5 * moved


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_convolutions_do_run_in_the_lower_precision_and_losses_in_float32(precision):
    run = run_of(precision=precision)
    seen = []
    for head in run.model.heads:
        head.register_forward_hook(lambda _m, _x, out: seen.append(out.dtype))
    batch = next(iter(run.benchmark.batches(run.cell.protocol, run.order)))
    info = run.step(batch)
    assert seen == [savings.DTYPES[precision]] * 3
    assert info.losses.dtype == torch.float32
    seen.clear()
    run.benchmark.evaluate(run.model, "val")
    assert set(seen) == {torch.float32}


def test_an_overflowing_step_is_skipped_and_the_scale_halved():
    run = run_of("aligned_mtl", precision="float16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = parameters(run)
    batches = iter(run.benchmark.batches(run.cell.protocol, run.order))
    info = run.step(next(batches))
    assert not info.finite
    assert torch.equal(parameters(run), before)
    assert run.scaler.get_scale() == 2.0**39
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    assert run.step(next(batches)).finite
    assert not torch.equal(parameters(run), before)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_pieces_and_lower_precision_go_together(precision):
    whole = trained("aligned_mtl", epochs=2)
    both = trained("aligned_mtl", epochs=2, precision=precision, accumulate=2)
    torch.testing.assert_close(
        both.history[-1]["train_losses"], whole.history[-1]["train_losses"], rtol=0.05, atol=0.0
    )


def test_pieces_hand_out_gradients_without_the_scale():
    weight = torch.ones(3, requires_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    losses = savings.losses_in_pieces(
        lambda piece: [(weight * piece).sum()], torch.ones(4, 3), 2, [weight], scaler
    )
    losses[0].backward()
    torch.testing.assert_close(weight.grad, torch.full((3,), 2.0))


def test_overflow_in_a_piece_skips_the_step():
    run = run_of("aligned_mtl", precision="float16", accumulate=2)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = parameters(run)
    info = run.step(next(iter(run.benchmark.batches(run.cell.protocol, run.order))))
    assert not info.finite
    assert torch.equal(parameters(run), before)


def test_channels_last_trains_as_the_usual_layout_does():
    usual = trained("aligned_mtl", epochs=2)
    last = trained("aligned_mtl", epochs=2, channels_last=True)
    assert last.model.trunk[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not usual.model.trunk[3].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        last.history[-1]["train_losses"], usual.history[-1]["train_losses"], rtol=1e-3, atol=0.0
    )


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("report", [{"average": 2}, {"report": "best"}])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(precision, report):
    straight = run_of("imtl", epochs=4, precision=precision, **report)
    for _ in range(4):
        straight.epoch_of_training()
    first = run_of("imtl", epochs=4, precision=precision, **report)
    for _ in range(3):
        first.epoch_of_training()
    second = run_of("imtl", epochs=4, precision=precision, **report)
    second.load_state_dict(first.state_dict())
    second.epoch_of_training()
    assert torch.equal(parameters(straight), parameters(second))
    assert straight.reported == second.reported
    if precision == "float16":
        assert straight.scaler.state_dict() == second.scaler.state_dict()


@pytest.fixture(scope="module")
def rooms():
    """Rooms with a few frames, prepared once; and a run of three epochs on them."""

    class Few(Rooms):
        counts: ClassVar[dict[str, int]] = {"train": 32, "val": 8, "test": 8}

    base = Protocol(epochs=3, batch_size=8, lr=2e-3, size=(24, 32))
    bench = Few().under(base).prepare(torch.device("cpu"))

    def losses(**protocol):
        changed = dataclasses.replace(base, **protocol)
        spec = training.parse_spec("aligned_mtl")
        again = bench.under(changed)
        again.data = bench.data
        run = training.Run(training.Cell("rooms", "quick", changed, spec, 0), again)
        if run.scaler is not None:
            run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        for _ in range(3):
            run.epoch_of_training()
        return run.history[0]["train_losses"], run.history[-1]["train_losses"]

    return losses, losses()


@pytest.mark.parametrize(
    ("protocol", "tolerance"),
    [
        ({"accumulate": 4}, 1e-3),
        ({"channels_last": True}, 1e-3),
        ({"precision": "bfloat16"}, 0.1),
        ({"precision": "float16"}, 0.05),
        ({"precision": "bfloat16", "accumulate": 2, "channels_last": True}, 0.1),
    ],
    ids=str,
)
def test_rooms_trains_as_in_float32_on_whole_batches(rooms, protocol, tolerance):
    losses, (first, last) = rooms
    assert sum(last) < 0.8 * sum(first)  # it does learn in these three epochs
    ours_first, ours_last = losses(**protocol)
    torch.testing.assert_close(ours_first, first, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(ours_last, last, rtol=tolerance, atol=0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_gpu_lower_precision_and_pieces_train_as_float32(precision):
    def last(**protocol):
        changed = dataclasses.replace(Maps.protocols["quick"], epochs=3, **protocol)
        cell = training.Cell("maps", "quick", changed, training.parse_spec("aligned_mtl"), 0)
        run = training.Run(cell, Maps().under(changed).prepare(torch.device("cuda")))
        for _ in range(3):
            run.epoch_of_training()
        return run.history[-1]["train_losses"]

    full = last()
    torch.testing.assert_close(last(precision=precision), full, rtol=0.05, atol=0.0)
    torch.testing.assert_close(
        last(precision=precision, accumulate=2, channels_last=True), full, rtol=0.05, atol=0.0
    )


# ------------------------------------------------------------------- schedules, epochs, identity


def test_schedules():
    mtan = Protocol(200, 2, 1e-4, schedule="step", steps=(100,))
    assert [mtan.lr_factor(e) for e in (0, 99, 100, 199)] == [1.0, 1.0, 0.5, 0.5]
    often = Protocol(100, 8, 1e-4, schedule="step", steps=(42, 45), decay=0.7)
    assert often.lr_factor(41) == 1.0
    assert often.lr_factor(44) == 0.7
    assert often.lr_factor(99) == pytest.approx(0.49)
    poly = Protocol(10, 8, 1e-4, schedule="poly")
    assert poly.lr_factor(0) == 1.0
    assert poly.lr_factor(5) == pytest.approx(0.5**0.9)


def test_learning_rate_follows_the_schedule():
    run = run_of(epochs=3, schedule="step", steps=(1, 2), decay=0.1)
    seen = []
    for _ in range(3):
        run.epoch_of_training()
        seen.append(run.optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.01, 0.001, 0.0001])


def test_reported_scores_are_those_of_the_epochs_that_count():
    """Test and validation data are the same here, so the history has the scores."""
    run = trained(epochs=4, average=3)
    result = training.describe(run)
    history = [epoch["val"]["depth"]["loss"] for epoch in run.history]
    assert result["test"]["depth"]["loss"] == pytest.approx(sum(history[1:]) / 3)
    last = training.describe(trained(epochs=4))
    assert last["test"]["depth"]["loss"] == history[-1]


def test_best_epoch_is_by_validation_scores(monkeypatch):
    run = run_of(epochs=4, report="best")
    worth = iter([3.0, 1.0, 2.0, 5.0])
    scores = {}

    def evaluate(model, split, examples=0):
        if split == "val":
            scores["now"] = next(worth)
        return {task.name: {"loss": scores["now"]} for task in run.benchmark.tasks}

    monkeypatch.setattr(run.benchmark, "evaluate", evaluate)
    for _ in range(4):
        run.epoch_of_training()
    assert training.describe(run)["test"]["depth"]["loss"] == 1.0


def test_score_to_pick_an_epoch_by():
    higher = {"a": {"iou": True, "x": True}, "b": {"error": False}}
    scores = {"a": {"iou": 4.0, "x": 99.0}, "b": {"error": 1.0}}
    assert metrics.mean_score(scores, higher) == 1.5
    scores["b"]["error"] = float("nan")
    assert metrics.mean_score(scores, higher) == -float("inf")


def test_delta_m_over_metrics_and_over_tasks_as_aligned_mtl_prints_them():
    names = ["miou", "acc"], ["abs", "rel"], ["mean", "median", "11", "22", "30"]
    ups = [True, True], [False, False], [False, False, True, True, True]
    single = [38.30, 63.76, 0.68, 0.28, 25.01, 19.21, 30.14, 57.20, 69.15]
    uniform = [39.29, 65.33, 0.5493, 0.2263, 28.15, 23.96, 22.09, 47.50, 61.08]

    def scores(values):
        values = iter(values)
        return {t: {m: next(values) for m in ms} for t, ms in zip("sdn", names, strict=True)}

    higher = {
        t: dict(zip(ms, up, strict=True)) for t, ms, up in zip("sdn", names, ups, strict=True)
    }
    assert round(metrics.delta_m(scores(uniform), scores(single), higher), 2) == 5.46
    assert round(metrics.delta_m(scores(uniform), scores(single), higher, True), 2) == -1.07


OLD = {
    "epochs": 12,
    "batch_size": 100,
    "lr": 2e-3,
    "optimizer": "adam",
    "weight_decay": 0.0,
    "schedule": "constant",
    "report": "last",
    "note": "",
}
CHANGES: dict[str, Any] = {
    "steps": (3,),
    "decay": 0.1,
    "average": 2,
    "delta_m": "tasks",
    "network": "mtan",
    "single_network": "segnet",
    "size": (4, 6),
    "augment": True,
    "evaluation": "papers",
    "precision": "bfloat16",
    "channels_last": True,
    "accumulate": 2,
}


def test_older_result_files_keep_their_identity():
    protocol = Protocol(12, 100, 2e-3)
    assert protocol.describe() == OLD
    run = {"method": "equal", "settings": {}, "level": "parameter"}
    key = results.identity("multidigits", "quick", OLD, run)
    cell = training.Cell("multidigits", "quick", protocol, training.parse_spec("equal"), 0)
    assert key in cell.path(training.Path("x")).name


@pytest.mark.parametrize("name", CHANGES)
def test_every_later_field_changes_the_identity(name):
    plain = Protocol(12, 100, 2e-3)
    changed = dataclasses.replace(plain, **{name: CHANGES[name]})
    assert changed.describe() == {**OLD, name: CHANGES[name]}


@pytest.mark.parametrize(
    "wrong",
    [
        {"schedule": "warmup"},
        {"precision": "int8"},
        {"accumulate": 3},
        {"accumulate": 0},
        {"average": 13},
        {"average": 0},
        {"average": 2, "report": "best"},
        {"evaluation": "mine"},
    ],
)
def test_wrong_protocols_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Protocol(**{**OLD, **wrong})


def test_a_network_of_branches_needs_a_single_task_network():
    class Branches(Maps):
        def build(self):
            named = self.protocol is not None and self.protocol.network == "plain"
            return super().build() if named else nn.Linear(1, 1)

    bench = Branches().prepare(torch.device("cpu"))
    with pytest.raises(ValueError, match="single_network"):
        bench.model(0, single_task=True)
    protocol = dataclasses.replace(Maps.protocols["quick"], single_network="plain")
    model = bench.under(protocol).model(0, single_task=True)
    assert count_parameters(model.parameters()) == 3 * count_parameters(
        Maps().build().trunk.parameters()
    ) + sum(count_parameters(h.parameters()) for h in Maps().build().heads)


def test_command_line_takes_protocol_precision_and_pieces(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(benchmarks.CLASSES, "maps", Maps)
    words = ["run", "maps", "--methods", "equal", "--seeds", "1", "--device", "cpu"]
    words += ["--protocol", "quick", "--out", str(tmp_path)]
    more = ["--precision", "bfloat16", "--accumulate", "2", "--channels-last"]
    cli.app([*words, *more], standalone_mode=False)
    said = capsys.readouterr().out
    assert "bfloat16" in said
    assert "channels last" in said
    assert "batches in 2 pieces" in said
    (low,) = tmp_path.rglob("seed0-*.json")
    protocol = results.read_result(low)["protocol"]
    assert protocol["precision"] == "bfloat16"
    assert protocol["accumulate"] == 2
    assert protocol["channels_last"] is True
    cli.app([*words, "--json"], standalone_mode=False)
    assert len(list(tmp_path.rglob("seed0-*.json"))) == 2
    with pytest.raises(ValueError, match="expected precision"):
        cli.app([*words, "--precision", "half"], standalone_mode=False)


def test_a_table_says_which_epochs_it_shows():
    def title(**protocol):
        made = training.describe(trained(epochs=3, **protocol))
        return results.tables([made])[0].title

    assert "test scores after the last epoch" in title()
    assert "averaged over the last 2 epochs" in title(average=2)
    assert "after the epoch with the best validation scores" in title(report="best")
    assert "Delta m over tasks" in title(delta_m="tasks")
