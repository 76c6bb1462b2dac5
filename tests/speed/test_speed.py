"""The parts of `mtl-tutorial speed`, on a tiny case, with fake timers; no test asserts a time."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_tutorial import cli
from mtl_tutorial.speed import accuracy, cases, contenders, memory, report, solver_times, steps
from mtl_tutorial.speed.contenders import AGAIN, EW, FEATURES, FLOOR, LIMIT, OURS, Contender

CPU = torch.device("cpu")
HAS_TORCHJD = contenders.missing("torchjd") is None
HAS_LIBMTL = contenders.missing("libmtl") is None


class FakeTimer:
    """Seconds by name; runs the step, and can make every round slower than the last."""

    def __init__(self, seconds: dict[str, float], drift: float = 1.0) -> None:
        self.seconds, self.drift = seconds, drift
        self.calls = 0
        self.names: dict[int, str] = {}

    def __call__(self, step: steps.Step) -> float:
        step()
        factor = self.drift ** (self.calls // len(self.seconds))
        self.calls += 1
        return factor * self.seconds[step.__name__]


def named(name: str, log: list[str] | None = None) -> steps.Step:
    def step() -> None:
        if log is not None:
            log.append(name)

    step.__name__ = name
    return step


# ------------------------------------------------------------------------------------- rounds


def test_each_step_runs_untimed_right_before_it_is_timed_in_an_order_drawn_anew():
    log: list[str] = []
    names = ["one", "two", "three", "four"]
    timer = FakeTimer(dict.fromkeys(names, 1.0))
    table = steps.interleave({n: named(n, log) for n in names}, 6, timer=timer)
    assert [set(row) for row in table] == [set(names)] * 6
    assert log[::2] == log[1::2]  # every run comes twice in a row
    orders = [tuple(log[8 * i : 8 * i + 8 : 2]) for i in range(6)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len(set(orders)) > 1


def test_orders_come_from_the_generator():
    def order(seed: int) -> list[str]:
        log: list[str] = []
        table = {n: named(n, log) for n in "abcdef"}
        steps.interleave(table, 3, timer=lambda s: s() or 1.0, rng=random.Random(seed))
        return log

    assert order(1) == order(1) != order(2)


def test_rounds_stop_after_the_time_but_not_before_the_least_number():
    now = iter(range(0, 1000, 10))
    table = steps.interleave(
        {"ew": named("ew")}, 9, 25.0, least=2, timer=lambda s: 1.0, clock=lambda: next(now)
    )
    assert len(table) == 4  # at 0 (no look), 0 (no look), 10 and 20 seconds; at 30 no more
    now = iter(range(0, 1000, 100))
    table = steps.interleave(
        {"ew": named("ew")}, 9, 25.0, least=3, timer=lambda s: 1.0, clock=lambda: next(now)
    )
    assert len(table) == 3


def test_quick_steps_are_timed_several_times_and_their_median_counts():
    times = {"quick": iter([0.25, 9.0, 0.5, 0.25, 0.125, 0.25]), "slow": iter([2.0, 3.0])}
    calls = []

    def timer(step):
        step()
        return next(times[calls[-1]])

    run = {name: (lambda name=name: calls.append(name)) for name in times}
    table = steps.interleave(run, 2, turn=0.5, timer=timer)
    assert table == [
        {"quick": (0.25 + 9.0) / 2, "slow": 2.0},
        {"quick": 0.5, "slow": 3.0},
    ]


def test_short_steps_are_timed_for_a_share_of_the_longest():
    timed = {"short": 0, "long": 0}

    def timer(step):
        timed[step.__name__] += 1
        return {"short": 1.0, "long": 40.0}[step.__name__]

    steps.interleave({n: named(n) for n in timed}, 3, share=0.1, timer=timer)
    assert timed["long"] == 3
    assert timed["short"] >= 1 + 4 + 4  # in the first round, the long one may not be known yet


def test_a_case_is_timed_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(steps, "measure", lambda *a, **k: pytest.fail("measured here"))
    told = []
    found = steps.in_fresh_process("tiny", "mgda", CPU, 2, 60.0, 1, told.append)
    assert found["case"] == "tiny"
    assert next(row for row in found["rows"] if row["name"] == EW)["rounds"] == 2
    assert told[0] == "case tiny: preparing"


def test_a_process_that_fails_says_why():
    with pytest.raises(OSError, match=r"case x to end with code 0, got 1: .*x"):
        steps.in_fresh_process("x", "mgda", CPU, 1, 60.0, 1)


def test_ratios_are_taken_within_a_round():
    """A machine that becomes slower from round to round leaves them alone."""
    timer = FakeTimer({"ew": 2.0, "ours": 3.0, "peer": 12.0}, drift=1.7)
    table = steps.interleave({n: named(n) for n in timer.seconds}, 5, timer=timer)
    found = steps.summary(table, "peer")
    for key, value in (("ratio", 6), ("low", 6), ("high", 6), ("over_ours", 4)):
        assert found[key] == pytest.approx(value)
    assert found["rounds"] == 5
    assert found["ms"] == pytest.approx(1e3 * 12 * 1.7**2)


def test_a_ratio_is_the_median_over_the_rounds():
    table = [{"ew": 1.0, "x": x, "ours": 1.0} for x in (1.0, 2.0, 9.0)]
    found = steps.summary(table, "x")
    assert (found["low"], found["ratio"], found["high"]) == (1.0, 2.0, 9.0)


def test_noise_is_marked_beyond_five_percent():
    assert [steps.is_noisy(x) for x in (1.0, 1.04, 0.96, 1.06, 0.94, float("nan"))] == [
        False,
        False,
        False,
        True,
        True,
        True,
    ]


def test_settings_close_to_the_best_are_timed_again():
    assert steps.promising({"x": 1.0, "y": 1.05, "z": 1.02, "w": 3.0}) == ["x", "z"]
    assert steps.promising({"x": 1.0, "y": 1.2}) == ["x"]


# ------------------------------------------------------------------------------------- a case


def fake_field(seconds: dict[str, float]) -> tuple[list[Contender], FakeTimer]:
    families = {"ours": "ours", "torchjd": "reference", "libmtl": "reference"}
    found = [
        Contender(name, families.get(name, "reference"), lambda case, rule, name=name: named(name))
        for name in seconds
    ]
    return found, FakeTimer(seconds)


def test_a_case_is_plain_data_and_names_torchjds_best_setting():
    seconds = {
        EW: 1.0,
        AGAIN: 1.01,
        OURS: 2.0,
        "torchjd": 4.0,
        "torchjd chunk=1": 3.0,
        "torchjd ogc": 9.0,
    }
    field, timer = fake_field(seconds)
    found = steps.measure("tiny", "imtl_g", CPU, 3, 60, contenders=field, timer=timer)
    assert json.loads(json.dumps(found)) == found
    assert not found["noisy"]
    assert found["torchjd_best"] == "torchjd chunk=1"
    assert set(found["torchjd_tried_ms"]) == {"torchjd", "torchjd chunk=1", "torchjd ogc"}
    # The slow setting is named with its time alone; default and best are in the table.
    assert [row["name"] for row in found["rows"]] == [
        EW,
        AGAIN,
        OURS,
        "torchjd",
        "torchjd chunk=1",
    ]
    ratio = {row["name"]: row["ratio"] for row in found["rows"]}
    assert ratio == pytest.approx({n: seconds[n] for n in ratio})


def test_a_case_whose_aa_ratio_is_off_is_marked_and_says_so():
    field, timer = fake_field({EW: 1.0, AGAIN: 1.1, OURS: 2.0})
    found = steps.measure("tiny", "mgda", CPU, 3, 60, contenders=field, timer=timer)
    assert found["noisy"]
    assert "NOISY: ew again takes 1.10 times ew; not to be quoted" in text_of(steps=[found])


def test_a_peer_that_wins_is_named():
    field, timer = fake_field({EW: 1.0, AGAIN: 1.0, OURS: 3.0, "torchjd": 2.0})
    field[-1] = Contender("torchjd", "torchjd", field[-1].build)
    found = steps.measure("tiny", "mgda", CPU, 3, 60, contenders=field, timer=timer)
    assert ("faster than ours: torchjd, 1.50 times" in text_of(steps=[found])) == HAS_TORCHJD


def test_a_peer_that_fails_or_is_missing_leaves_a_blank_row_with_the_reason(monkeypatch):
    def broken(case, rule):
        raise RuntimeError("no such\noperator")

    why = "torchjd is not installed; do: pip install x"
    monkeypatch.setattr(steps, "missing", lambda family: why if family == "torchjd" else None)
    field, timer = fake_field({EW: 1.0, AGAIN: 1.0, OURS: 2.0})
    field += [Contender("torchjd", "torchjd", broken), Contender("libmtl x", "libmtl", broken)]
    found = steps.measure("tiny", "mgda", CPU, 3, 60, contenders=field, timer=timer)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["torchjd"]["failed"] == why
    assert rows["libmtl x"]["failed"] == "fails: RuntimeError: no such operator"
    assert rows[OURS]["ratio"] == 2.0
    text = text_of(steps=[found])
    assert f"torchjd: {why}" in text and "libmtl x: fails: RuntimeError" in text


def test_our_own_failure_is_not_hidden():
    def broken(case, rule):
        raise RuntimeError("ours")

    field, _ = fake_field({EW: 1.0, AGAIN: 1.0})
    with pytest.raises(RuntimeError, match="ours"):
        steps.prepare([*field, Contender(OURS, "ours", broken)], "tiny", "mgda", CPU)


def test_a_contender_that_would_not_fit_is_left_out(monkeypatch):
    case = cases.make("tiny")
    monkeypatch.setattr(steps, "free_memory", lambda device: 4 * 3 * case.n_shared * 10)
    assert steps.fits(Contender("x", "libmtl", lambda c, r: named("x"), 7), case, CPU) is None
    assert "are free" in steps.fits(Contender("x", "libmtl", lambda c, r: named("x"), 9), case, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_case_is_timed_and_weighed_on_a_gpu():
    device = torch.device("cuda")
    found = steps.measure("tiny", "aligned_mtl", device, 3, 60)
    assert all(row["ms"] > 0 for row in found["rows"] if "ms" in row)
    assert memory.peak_of_step("tiny", OURS, "aligned_mtl", device) > 0


# ------------------------------------------------------------------------------------- the cases


KNOWN = {"a": 2, "b": 3, "c": 40, "d": 10, "d16": 10, "t": 10, "m": 40, "r": 40, "sq": 5, "vit": 6}


def test_cases_have_the_size_that_they_are_quoted_with():
    assert set(KNOWN) == set(cases.CASES)
    millions = {"b": 11.2, "c": 2.6, "d": 5.2, "t": 4.7, "m": 11.0, "r": 11.2}
    for name, k in KNOWN.items():
        case = cases.make(name)
        assert case.n_tasks == k
        assert case.untuned == (name in ("sq", "vit"))
        if name in millions:
            assert case.n_shared / 1e6 == pytest.approx(millions[name], abs=0.06)


@pytest.mark.parametrize("name", ["a", "b", "c", "d16", "t", "sq", "vit", "tiny"])
def test_cases_compute_finite_losses_that_reach_every_shared_parameter(name: str):
    case = cases.make(name)
    losses, z = case.losses()
    assert len(losses) == case.n_tasks and len(z) == len(case.batch)
    gradients = torch.autograd.grad(torch.stack(losses).sum(), case.shared)
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_a_case_is_the_same_at_every_call_and_leaves_the_generator_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, second = (torch.stack(cases.make("a").losses()[0]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_growing_cases_have_the_tasks_of_their_names():
    assert {int(name.split("k")[1]) for name in cases.GROWTH} >= {2, 40, 139}
    small, large = cases.make("w256k5"), cases.make("w1024k139")
    assert (small.n_tasks, large.n_tasks) == (5, 139)
    assert large.n_shared > 10 * small.n_shared
    assert len(small.losses()[0]) == 5


def test_lists_of_cases_can_hold_groups():
    assert cases.chosen("all") == cases.CASES
    assert cases.chosen("a, growth") == ["a", *cases.GROWTH]
    assert not set(cases.CASES) & set(cases.GROWTH)


def test_an_unknown_case_names_the_others():
    with pytest.raises(ValueError, match=r"no case 'x'; cases: a, b, c"):
        cases.make("x")


# ------------------------------------------------------------------------------------- contenders


@pytest.mark.parametrize("rule", contenders.RULES)
def test_exact_contenders_take_the_same_step(rule: str):
    want = accuracy.references("tiny", CPU)[0][rule]
    tolerance = 1e-2 if rule in ("mgda", "upgrad") else 1e-4  # TorchJD's stop early, or regularise
    seen = []
    for contender in contenders.field(rule):
        if contender.name in (EW, AGAIN, FEATURES, LIMIT, FLOOR) or contenders.missing(
            contender.family
        ):
            continue
        got = accuracy.shared_gradient(contender, "tiny", rule, CPU)
        limit = 1e-5 if contender.family == "ours" else tolerance
        assert (got - want).norm() <= limit * want.norm(), contender.name
        seen.append(contender.family)
    assert set(seen) >= {"ours"} | ({"torchjd"} if HAS_TORCHJD else set())


@pytest.mark.parametrize("relu", [torch.relu, nn.ReLU(), nn.ReLU(inplace=True), torch.relu_])
def test_references_take_the_side_of_zero_that_float32_took(relu):
    x = torch.tensor([-1e-9, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    with accuracy.Sides() as noted:
        relu(1 * x)
    assert [mask.tolist() for mask in noted.seen] == [[False, True, False]]
    with accuracy.Sides([torch.tensor([True, True, False])]) as taken:
        relu(1 * x).sum().backward()
    assert x.grad.tolist() == [1, 1, 0]
    assert torch.equal(taken.seen[0], noted.seen[0])


def test_activations_on_the_other_side_are_counted_and_reported():
    _, other, activations = accuracy.references("tiny", CPU)
    assert (other, activations) == (0, 2 * 4 * 8)
    rows = [{"name": OURS, "family": "ours", "error": 1e-6}]
    part = {"case": "b", "rule": "mgda", "rows": rows, "other_side": 2, "activations": 4898816}
    assert "b: 2 of 4,898,816 activations lie on the other side" in report._accuracy([part])[0]
    assert "other side" not in report._accuracy([part | {"other_side": 0}])[0]


def test_references_take_their_steps():
    """Equal weighting is the sum of the losses; the limit leaves a gradient everywhere."""
    case = cases.make("tiny")
    rows = torch.autograd.grad(torch.stack(case.losses()[0]).sum(), case.shared)
    contenders.equal_step(case, "mgda")()
    for parameter, row in zip(case.shared, rows, strict=True):
        torch.testing.assert_close(parameter.grad, row)
    for name in ("tiny", "a"):  # all tasks at once, and one by one
        case = cases.make(name)
        contenders.limit_step(case, "mgda")()
        contenders.limit_step(case, "mgda")()
        every = [p.grad.clone() for p in case.model.parameters()]
        case = cases.make(name)
        contenders.floor_step(case, "mgda")()
        contenders.floor_step(case, "mgda")()
        for p, grad in zip(case.model.parameters(), every, strict=True):
            torch.testing.assert_close(p.grad, grad)


class Multiplications(TorchDispatchMode):
    """Counts those of products of two matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            a, b = args[-2:]
            self.count += a.numel() * b.shape[-1]
        return func(*args, **(kwargs or {}))


def test_the_floor_makes_the_weights_gradients_of_one_task():
    counts = []
    for build in (contenders.limit_step, contenders.floor_step):
        step = build(cases.make("d16"), "mgda")
        with Multiplications() as counter:
            step()
        counts.append(counter.count)
    assert counts[0] - counts[1] == 9 * 5 * 16 * 1024**2  # nine tasks, five layers, batch 16


def test_steps_barely_move_the_model():
    case = cases.make("tiny")
    step = contenders.our_step(case, "aligned_mtl")
    before = torch.stack(case.losses()[0]).detach()
    for _ in range(20):
        step()
    assert (torch.stack(case.losses()[0]) - before).abs().max() < 1e-3


@pytest.mark.skipif(not HAS_LIBMTL, reason="needs LibMTL")
def test_libmtls_row_says_whose_rule_it_is():
    assert contenders.libmtl_contender("imtl_g").name == "libmtl IMTL"
    assert contenders.libmtl_contender("upgrad").name == "libmtl upgrad (shim)"


def test_a_missing_peer_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "torchjd", raising=False)
    want = "torchjd is not installed; do: pip install 'mtl-tutorial[speed]'"
    assert contenders.missing("torchjd") == want
    assert contenders.missing("ours") is None


# ------------------------------------------------------------------------------------- memory


def test_memory_is_over_equal_weighting_and_in_percent_of_all_rows(monkeypatch):
    peaks = {EW: 10 * 2**20, OURS: 12 * 2**20}
    monkeypatch.setattr(memory, "in_fresh_process", lambda case, name, *rest: peaks[name])
    field = [c for c in contenders.field("mgda") if c.name in peaks]
    found = memory.measure("tiny", "mgda", CPU, 1, contenders=field)
    full = 4 * 3 * cases.make("tiny").n_shared
    assert found["rows"][1]["extra_mb"] == 2
    assert found["rows"][1]["extra_percent"] == pytest.approx(100 * 2 * 2**20 / full)
    assert f"+{100 * 2 * 2**20 / full:.1f}" in text_of(memory=[found])


@pytest.mark.slow
def test_memory_comes_from_a_process_of_its_own():
    assert memory.in_fresh_process("tiny", EW, "mgda", "cpu", 1) >= 0


def test_a_process_that_fails_leaves_a_blank_row(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    field = [c for c in contenders.field("mgda") if c.name == EW]
    found = memory.measure("tiny", "mgda", CPU, 1, contenders=field)
    assert found["rows"][0]["failed"] == "fails: ended with code 1"


@pytest.mark.skipif(not memory.STATUS.exists(), reason="needs /proc")
def test_the_peak_sees_what_is_freed_again():
    """In a process of its own: what other tests freed before would be filled first."""
    code = (
        "import torch\n"
        "from mtl_tutorial.speed import memory\n"
        "before = memory._resident()\n"
        "block = torch.ones(50_000_000 // 4)\n"
        "del block\n"
        "print(memory._peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 45e6 < int(done.stdout) < 80e6


# ------------------------------------------------------------------------------------- solvers


def test_solvers_get_the_same_problem():
    for problem in solver_times.problems(3, 4):
        torch.testing.assert_close(problem.root @ problem.root.T, problem.gram)
    norms = [p.gram.diagonal().sqrt() for p in solver_times.problems(10, 4)]
    assert (norms[0].max() / norms[0].min()) < 1.5 < (norms[2].max() / norms[2].min())


def test_solver_times_without_torchjd_are_ours_alone(monkeypatch):
    monkeypatch.setattr(solver_times, "missing", lambda family: "torchjd is not installed")
    found = solver_times.measure(n=1, sizes=(2,))
    assert {row["solver"] for row in found} == set(solver_times.OURS)
    assert all(row["ours_us"] > 0 and "ratio" not in row for row in found)
    text = text_of(solvers=found)
    assert text.count("torchjd is not installed") == len(found)


@pytest.mark.skipif(not HAS_TORCHJD, reason="needs TorchJD")
@pytest.mark.parametrize("name", ["aligned_mtl", "imtl_g", "cagrad"])
def test_solvers_answer_alike_where_both_are_exact(name: str):
    """The others stop early, regularise, or draw an order."""
    (problem,) = solver_times.problems(3, 1)
    ours = solver_times.our_solver(name)(problem)
    theirs = solver_times.torchjd_solver(name, 3)(problem)
    torch.testing.assert_close(theirs.double(), ours, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------- the whole


def text_of(**parts: list) -> str:
    return report.render({**report.provenance(CPU, "aligned_mtl"), **parts})


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(report, "CASES", ["tiny"])
    monkeypatch.setattr(torch, "set_flush_denormal", lambda on: True)  # it would last


def test_the_command_prints_and_stores_every_part(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(memory, "in_fresh_process", lambda *a: 2**20)
    one = [{"solver": "mgda", "tasks": 2, "ours_us": 100.0, "torchjd_us": 50.0, "ratio": 0.5}]
    monkeypatch.setattr(solver_times, "measure", lambda tell: one)
    out = tmp_path / "speed.json"
    flags = ["--steps", "--memory", "--accuracy", "--solvers", "--device", "cpu"]
    command = ["speed", "--cases", "tiny", "--rounds", "1", *flags, "--out", str(out)]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    stored = json.loads(out.read_text())
    assert stored["kind"] == "speed" and stored["allocator"] == "system"
    assert {"device", "versions", "commit", "date", "load_average"} <= set(stored)
    assert [case["case"] for case in stored["steps"]] == ["tiny"]
    assert {part["rule"] for part in stored["accuracy"]} == set(contenders.RULES)
    assert stored["solvers"] == one
    for text in ("tiny: MLP 2 x 8", "Memory of a step", "against the same step in float64", "0.50"):
        assert text in done.stdout


def test_json_on_standard_output_is_json_alone(tiny):
    command = ["speed", "--cases", "tiny", "--rounds", "1", "--device", "cpu", "--json"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"][0]["case"] == "tiny"


def test_a_preloaded_allocator_is_named(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert report.allocator() == "jemalloc"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "x"], "no case 'x'; cases: a, b"),
        (["--method", "imtl"], "no method 'imtl' to compare on; did you mean imtl_g"),
        (["--rounds", "0"], "expected --rounds of 1 or more, got 0"),
        (["--threads", "0"], "expected --threads of 1 or more, got 0"),
        (["--seconds", "0"], "expected --seconds above 0"),
        (["--out", "no/such/folder/x.json"], "expected --out to be a file in a folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, message, monkeypatch):
    monkeypatch.setattr(steps, "in_fresh_process", lambda *a: pytest.fail("measured"))
    with pytest.raises(ValueError, match=r"expected|no ") as error:
        cli.app(["speed", *arguments], standalone_mode=False)
    assert message in str(error.value)
