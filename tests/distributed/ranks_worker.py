"""What the processes of a group do in the tests: every check for every method, in one launch.

`work` runs in each process; the outcomes of each rank go to a file that test_ranks.py reads.
"""

from __future__ import annotations

import copy
import datetime
import json
import sys
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import BadGradient, assert_equal_state, gaussian, relative_error, rng, sgd
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_tutorial.gradients import gram_matrix, task_gradients
from mtl_tutorial.methods import CLASSES, GeNLR, available, create
from mtl_tutorial.parallel import Ranks, joined_losses

EXAMPLES, STEPS = 12, 20
NAN = float("nan")


class Parts(nn.Module):
    """Trunk and K heads, and twenty joined batches of which each rank takes some rows.

    Losses are means over the labelled rows, not a number where there are none.
    """

    def __init__(self, k: int) -> None:
        super().__init__()
        g = rng(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=g)

        self.trunk = nn.Linear(4, 6, dtype=torch.float64)
        self.tasks = nn.ModuleList(nn.Linear(6, 1, dtype=torch.float64) for _ in range(k))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * draw(*parameter.shape))
        self.inputs = [draw(EXAMPLES, 4) for _ in range(STEPS)]
        self.targets = [
            draw(k, EXAMPLES, 1) * (1 + torch.arange(k))[:, None, None] for _ in range(STEPS)
        ]

    def forward(
        self, step: int, rows: slice, labelled: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        z = torch.tanh(self.trunk(self.inputs[step][rows]))
        losses = []
        for k, head in enumerate(self.tasks):
            error = ((head(z) - self.targets[step][k, rows]) ** 2).squeeze(1)
            known = slice(None) if labelled is None else labelled[k, rows]
            losses.append(error[known].mean() + 0.1)
        return losses, z

    def told(self) -> dict[str, Any]:
        return {
            "shared": list(self.trunk.parameters()),
            "heads": [list(head.parameters()) for head in self.tasks],
        }


def tasks_of(name: str) -> int:
    return CLASSES[name].n_tasks or 3


def even(rank: int, size: int) -> slice:
    n = EXAMPLES // size
    return slice(rank * n, (rank + 1) * n)


def uneven(rank: int, size: int, step: int) -> slice:
    """Batches of different size; at some steps the last rank has no example at all."""
    bounds = {2: [0, 5, 12], 4: [0, 3, 4, 9, 12]}[size]
    if step % 5 == 3:
        bounds = [*bounds[:-2], 12, 12]
    return slice(bounds[rank], bounds[rank + 1])


def labels(k: int, step: int) -> Tensor:
    """Which rows have a label of which task: (K, examples), bool."""
    known = torch.ones(k, EXAMPLES, dtype=torch.bool)
    known[0, step % 3 :: 4] = False
    if step % 4 == 1:
        known[1, EXAMPLES // 4 :] = False  # on the first rank, and with two ranks there alone
    if step % 7 == 5 and k > 2:
        known[2] = False  # nobody has it
    return known


def numbers(tree: Any) -> Iterator[bytes]:
    """Everything in a nested state, in order, as bytes."""
    if isinstance(tree, Tensor):
        yield tree.detach().contiguous().numpy().tobytes()
    elif isinstance(tree, dict):
        for key in tree:
            yield str(key).encode()
            yield from numbers(tree[key])
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from numbers(each)
    else:
        yield repr(tree).encode()


def same_on_all_ranks(*trees: Any) -> None:
    mine = zlib.crc32(b"".join(numbers(trees)))
    everyone = Ranks().exchange([mine], torch.device("cpu"))
    assert len({crc for (crc,) in everyone}) == 1


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def take(method, model, optimizer, closure, scaler=None, told=True):
    return method.step(closure, optimizer, scaler=scaler, **(model.told() if told else {}))


def train(
    name: str,
    part: Callable[[Any, int], Any],
    steps: int,
    group: str | None,
    told: bool,
    wrap: bool,
    settings: dict[str, Any],
) -> tuple[Parts, Any, Any]:
    model, method = Parts(tasks_of(name)), create(name, **settings)
    method.group = group
    optimizer = sgd(model.parameters(), lr=0.01, momentum=0.9)
    forward = DistributedDataParallel(model) if wrap else model
    for step in range(steps):
        info = take(method, model, optimizer, lambda s=step: part(forward, s), told=told)
        assert info.finite
        if step % 8 == 7:
            method.next_epoch()
    return model, method, info


class DoesNotApply(Exception):
    """A check that is of no meaning for a method, on any rank; the text says why."""


# What is left to do after all checks, by one rank each: other ranks would only wait meanwhile.
later: list[Callable[[], None]] = []


def compare(
    name: str,
    mine: Callable[[Any, int], Any],
    whole: Callable[[Any, int], Any],
    steps: int,
    told: bool = True,
    wrap: bool = False,
    settings: dict[str, Any] | None = None,
) -> None:
    """Train on the ranks' parts and, in one process alone, on the joined batches."""
    settings = settings or {}
    model, method, info = train(name, mine, steps, "auto", told, wrap, settings)
    same_on_all_ranks(list(model.parameters()), method.state_dict(), info.losses, info.weights)

    def with_one_process() -> None:
        model_1, _, info_1 = train(name, whole, steps, None, told, False, settings)
        assert relative_error(flat(model), flat(model_1)) < 1e-9
        assert relative_error(info.losses, info_1.losses) < 1e-9
        if info.weights is not None:
            assert relative_error(info.weights, info_1.weights) < 1e-6

    later.append(with_one_process)


# ------------------------------------------------------------------------ checks of every method


def check_equal_parts(name: str, rank: int, size: int) -> None:
    compare(
        name,
        lambda f, s: f(s, even(rank, size))[0],
        lambda f, s: f(s, slice(None))[0],
        STEPS,
    )


def check_wrapped_in_ddp(name: str, rank: int, size: int) -> None:
    """The reducer's hooks do not average once more; parameters are found in the graph."""
    compare(
        name,
        lambda f, s: f(s, even(rank, size))[0],
        lambda f, s: f(s, slice(None))[0],
        4,
        told=False,
        wrap=True,
    )


def uneven_losses(f: Any, step: int, rank: int, size: int, k: int, whole: bool) -> Any:
    rows = slice(None) if whole else uneven(rank, size, step)
    known = labels(k, step)
    losses, z = f(step, rows, known)
    counts = known[:, rows].sum(1).tolist()
    return joined_losses(losses, counts, None if whole else "auto"), z


def check_uneven_parts(name: str, rank: int, size: int) -> None:
    """Batches of different size, ranks without labels of a task, a rank without examples."""
    k = tasks_of(name)
    compare(
        name,
        lambda f, s: uneven_losses(f, s, rank, size, k, False)[0],
        lambda f, s: uneven_losses(f, s, rank, size, k, True)[0],
        STEPS,
    )


def check_features(name: str, rank: int, size: int) -> None:
    """The columns of dL/dz belong to examples, and each rank has its own."""
    if not CLASSES[name].feature_level or CLASSES[name].family == "schedule":
        raise DoesNotApply("no feature level")
    k = tasks_of(name)
    compare(
        name,
        lambda f, s: uneven_losses(f, s, rank, size, k, False),
        lambda f, s: uneven_losses(f, s, rank, size, k, True),
        6,
    )


def check_other_head_gradients(name: str, rank: int, size: int) -> None:
    method = create(name)
    if "head_gradients" not in method.settings:
        raise DoesNotApply("no setting head_gradients")
    other = {"raw": "weighted", "weighted": "raw"}[method.head_gradients]
    k = tasks_of(name)
    compare(
        name,
        lambda f, s: uneven_losses(f, s, rank, size, k, False)[0],
        lambda f, s: uneven_losses(f, s, rank, size, k, True)[0],
        3,
        settings={"head_gradients": other},
    )


def spoiled(losses: list[Tensor], fault: str, tasks: Any) -> list[Tensor]:
    change = BadGradient.apply if fault == "gradient" else lambda loss: loss * NAN
    return [change(loss) if k in tasks else loss for k, loss in enumerate(losses)]


def faults_of(name: str) -> list[str]:
    losses_alone = CLASSES[name].sees == "losses" and CLASSES[name].family != "schedule"
    return ["loss"] if losses_alone else ["loss", "gradient"]


def check_error_on_one_rank_is_an_error_on_all(name: str, rank: int, size: int) -> None:
    k = tasks_of(name)
    for fault in faults_of(name):
        model, method = Parts(k), create(name)
        optimizer = sgd(model.parameters(), lr=0.01)

        def closure(step, model=model):
            return model(step, even(rank, size))[0]

        for step in range(k + 1):  # a method that takes the tasks in turns has come to task 1
            take(method, model, optimizer, lambda s=step: closure(s))
        before, state = flat(model), copy.deepcopy(method.state_dict())
        bad = [1] if rank == size - 1 else []
        try:
            take(method, model, optimizer, lambda f=fault, b=bad: spoiled(closure(7), f, b))
        except FloatingPointError as error:
            assert name in str(error)
            assert "1" in str(error)
        else:
            raise AssertionError(f"no error with a bad {fault} on one rank")
        assert_equal_state(method.state_dict(), state)
        if CLASSES[name].family != "schedule":  # which has stepped for earlier groups by then
            assert torch.equal(flat(model), before)
        assert take(method, model, optimizer, lambda: closure(8)).finite
        same_on_all_ranks(list(model.parameters()), method.state_dict())


def check_overflow_on_one_rank_is_skipped_on_all(name: str, rank: int, size: int) -> None:
    k = tasks_of(name)
    schedule = CLASSES[name].family == "schedule"
    for fault in faults_of(name):
        model, method = Parts(k), create(name)
        optimizer = sgd(model.parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

        def closure(step, model=model):
            return model(step, even(rank, size))[0]

        for step in range(k + 1):
            assert take(method, model, optimizer, lambda s=step: closure(s), scaler).finite
        before, state = flat(model), copy.deepcopy(method.state_dict())
        # A schedule steps once per group: one bad task would skip that group's step alone.
        bad = (range(k) if schedule else [1]) if rank == size - 1 else []
        bad_step = take(
            method, model, optimizer, lambda f=fault, b=bad: spoiled(closure(7), f, b), scaler
        )
        assert not bad_step.finite
        assert torch.equal(flat(model), before)
        assert_equal_state(method.state_dict(), state)
        assert scaler.get_scale() in ({512.0, 1024.0 / 2**k} if schedule else {512.0})
        assert take(method, model, optimizer, lambda: closure(8), scaler).finite
        assert not torch.equal(flat(model), before)
        same_on_all_ranks(list(model.parameters()), method.state_dict(), scaler.state_dict())


# ------------------------------------------------------------------------------- checks by itself


def check_average_of_gram_matrices_is_another(rank: int, size: int) -> None:
    """Averaged Gram matrices lack the products of one rank's rows with another's."""
    model = Parts(3)
    shared = list(model.trunk.parameters())
    mine = gram_matrix(task_gradients(model(0, even(rank, size))[0], shared))
    joined = gram_matrix(task_gradients(model(0, slice(None))[0], shared))
    dist.all_reduce(mine)
    info = create("upgrad").backward(model(0, even(rank, size))[0], **model.told())
    assert relative_error(info.gram, joined) < 1e-12
    assert relative_error(mine / size, joined) > 0.05


def check_large_model_takes_the_rows(rank: int, size: int) -> None:
    """Over several ranks a Gram matrix without rows lacks products, as an average of them does."""
    k, wide = 3, 700

    def losses_of(model: nn.Module, rows: slice) -> list[Tensor]:
        z = model[:-k](x[rows])
        return [
            ((head(z) - y[rows]) ** 2).mean() for head, y in zip(model[-k:], targets, strict=True)
        ]

    grads = []
    for name in ("upgrad", "aligned_mtl", "mgda"):
        for group, rows in (("auto", even(rank, size)), (None, slice(None))):
            torch.manual_seed(1)
            layers = [nn.Linear(8, wide), nn.ReLU(), nn.Linear(wide, wide), nn.ReLU()]
            model = nn.Sequential(*layers, *(nn.Linear(wide, 1) for _ in range(k))).double()
            x, targets = gaussian(EXAMPLES, 8, 0), gaussian(k, EXAMPLES, 1)[:, :, None]
            method = create(name)
            method.group = group
            method.path = "gram" if group else "rows"  # a wish that cannot be met
            info = method.backward(losses_of(model, rows), shared=model[:-k].parameters())
            assert info.path == "rows"
            assert ("several processes" in info.reason) == (group is not None)
            grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        assert relative_error(grads[-2], grads[-1]) < 1e-9


def check_group_can_be_switched_off_or_chosen(rank: int, size: int) -> None:
    alone = Parts(3)
    method = create("upgrad")
    method.group = None
    method.backward(alone(0, even(rank, size))[0], **alone.told())
    everyone = [torch.empty_like(alone.trunk.weight) for _ in range(size)]
    dist.all_gather(everyone, alone.trunk.weight.grad)
    assert not torch.equal(everyone[0], everyone[1])
    # Groups of two: the ranks of one agree, and take the step of their own joined batch.
    pairs = [dist.new_group([i, i + 1]) for i in range(0, size, 2)]
    mine = pairs[rank // 2]
    half = EXAMPLES // 2
    start = (rank // 2 * 3) % (half + 1)
    paired, joined = Parts(3), Parts(3)
    method = create("upgrad")
    method.group = mine
    inner = rank % 2
    method.backward(paired(0, slice(start + inner * 3, start + inner * 3 + 3))[0], **paired.told())
    method = create("upgrad")
    method.group = None
    method.backward(joined(0, slice(start, start + 6))[0], **joined.told())
    assert relative_error(paired.trunk.weight.grad, joined.trunk.weight.grad) < 1e-12
    if size > 2:
        method.group = pairs[1 - rank // 2]
        try:
            method.backward(paired(0, even(rank, size))[0], **paired.told())
        except ValueError as error:
            assert "process group" in str(error)
        else:
            raise AssertionError("a foreign group was taken")


def check_other_layout_is_an_error_on_all(rank: int, size: int) -> None:
    model = Parts(3)
    told = model.told()
    if rank == 1:
        told["shared"] = told["shared"][:1]
    for name in ("upgrad", "independent", "equal"):
        method = create(name)
        try:
            losses = model(0, even(rank, size))[0]
            if name == "independent":
                optimizer = sgd(list(model.parameters())[: 3 if rank == 1 else None], lr=0.1)
                losses = [
                    x.detach() if (k == 1) != (rank == 1) else x for k, x in enumerate(losses)
                ]
                method.step(lambda x=losses: x, optimizer)
            else:
                method.backward(losses, **told)
        except ValueError as error:
            assert "on every rank" in str(error)
        else:
            raise AssertionError("different parameters were taken")


def check_absent_on_one_rank_needs_told_parameters(rank: int, size: int) -> None:
    for name in ("upgrad", "uncertainty", "joint"):
        losses = Parts(3)(0, even(rank, size))[0]
        if rank == 1:
            losses[1] = losses[1].detach()
        try:
            create(name).backward(losses)
        except ValueError as error:
            assert "pass shared= and heads=" in str(error)
        else:
            raise AssertionError("parameters were guessed")
    model = Parts(3)
    losses = model(0, even(rank, size))[0]
    if rank == 1:
        losses[1] = losses[1].detach()
    create("joint").backward(losses, **model.told())
    same_on_all_ranks([p.grad for p in model.parameters()])


def check_unused_on_all_ranks_gets_no_gradient(rank: int, size: int) -> None:
    """Used on one rank alone: a gradient everywhere. Used on none: none, so no weight decay."""
    for name in ("upgrad", "uncertainty"):
        model = Parts(2)
        extra = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
        losses = model(0, even(rank, size))[0]
        if rank == 1:
            losses = [x + extra[0].sum() for x in losses]
        told = model.told()
        told["shared"] += extra
        create(name).backward(losses, **told)
        assert extra[0].grad is not None
        assert extra[1].grad is None
        same_on_all_ranks([p.grad for p in model.parameters()], extra[0].grad)


def check_learning_rate_by_a_parabola(rank: int, size: int) -> None:
    rates = []
    for group, rows in (("auto", even(rank, size)), (None, slice(None))):
        model, method = Parts(2), create("equal")
        gen = GeNLR(every=1, clip=1e6, smooth=0.5)  # unclipped, so that every digit counts
        method.group = gen.group = group
        optimizer = sgd(model.parameters(), lr=0.05)
        for step in range(5):
            optimizer.zero_grad()
            method.backward(model(step, rows)[0], **model.told())
            gen.update(lambda m=model, s=step, r=rows: m(s, r)[0][0], optimizer, model)
            optimizer.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] != 0.05
    assert abs(rates[0] - rates[1]) < 1e-9 * rates[1]
    same_on_all_ranks(rates[0])


def check_famo_by_hand(rank: int, size: int) -> None:
    """`backward`, the optimiser's step, `update`."""
    logits = []
    for group, rows in (("auto", even(rank, size)), (None, slice(None))):
        model, method = Parts(3), create("famo")
        method.group = group
        optimizer = sgd(model.parameters(), lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            method.backward(model(step, rows)[0], **model.told())
            optimizer.step()
            with torch.no_grad():
                method.update(model(step, rows)[0])
        logits.append(method.state_dict()["state"]["logits"])
    assert relative_error(*logits) < 1e-9
    assert logits[0].abs().max() > 0.01
    same_on_all_ranks(logits[0])


# ---------------------------------------------------------------------------------------- running


def checks(prefix: str = "check_") -> dict[str, Callable[..., None]]:
    found = {k.removeprefix(prefix): v for k, v in globals().items() if k.startswith(prefix)}
    return {name: check for name, check in found.items() if callable(check)}


def cells(size: int) -> list[tuple[str, str]]:
    """(check, method) in the order of running; no method for a check by itself.

    Four ranks add to two ranks what concerns the averages, and little to the rest.
    """
    every = []
    for name, check in checks().items():
        per_method = check.__code__.co_varnames[0] == "name"
        if size == 2 or not per_method or name in ("equal_parts", "uneven_parts"):
            every += [(name, method) for method in (available() if per_method else [""])]
    return every


def outcome_of(check: Callable[..., None], *args: Any) -> str:
    try:
        check(*args)
    except DoesNotApply as why:
        return f"skipped: {why}"
    except Exception:
        return traceback.format_exc()
    return "passed"


def work(rank: int, size: int, folder: str) -> None:
    """Run every check; after a check that the ranks did not leave together, none is run."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=180),
    )
    outcomes: dict[str, str] = {}
    comparisons: list[tuple[str, Callable[[], None]]] = []
    try:
        for number, (name, method) in enumerate(cells(size)):
            key = f"{name}-{method}"
            later.clear()
            outcomes[key] = outcome_of(checks()[name], *([method] if method else []), rank, size)
            arrived = Ranks().exchange([number], torch.device("cpu"))
            assert arrived == [[number]] * size
            if number % size == rank:
                comparisons += [(key, comparison) for comparison in later]
        for key, comparison in comparisons:
            if outcomes[key] == "passed":
                outcomes[key] = outcome_of(comparison)
    except Exception:
        sys.stderr.write(traceback.format_exc())
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def work_on_gpu(rank: int, size: int, folder: str, backend: str) -> None:
    """A few steps of every method, each rank on a device of its own, beside one process."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=180),
    )

    def check(name: str) -> None:
        results = []
        for group, rows in (("auto", even(rank, size)), (None, slice(None))):
            model, method = Parts(tasks_of(name)).cuda(), create(name)
            model.inputs = [x.cuda() for x in model.inputs]
            model.targets = [y.cuda() for y in model.targets]
            method.group = group
            optimizer = sgd(model.parameters(), lr=0.01, momentum=0.9)
            for step in range(5):
                take(method, model, optimizer, lambda m=model, s=step, r=rows: m(s, r)[0])
            results.append(flat(model).cpu())
        assert relative_error(*results) < 1e-9

    outcomes = {name: outcome_of(check, name) for name in available()}
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    dist.destroy_process_group()
