"""What test_page.py runs of book/many_processes.md, and a process of its sharded example."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import relative_error, rng, sgd
from torch import Tensor, nn

from mtl_tutorial.methods import create

PAGE = Path(__file__).resolve().parents[2] / "book" / "many_processes.md"


def blocks() -> dict[str, str]:
    """The page's Python code by the first function that is no method."""
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return {re.search(r"^def (\w+)", block, re.MULTILINE)[1]: block for block in code}


def functions() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks().values():
        exec(block, names)
    return names


def network() -> nn.Module:
    """Of the page, in float64; five columns do not divide by two processes."""
    model = functions()["Network"]()
    model.trunk = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 16), nn.Tanh())
    model = model.double()
    g = rng(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, dtype=p.dtype, generator=g))
    return model


def data() -> tuple[Tensor, Tensor]:
    g = rng(1)
    return (
        torch.randn(12, 8, dtype=torch.float64, generator=g),
        torch.randn(3, 12, 1, dtype=torch.float64, generator=g),
    )


def losses_of(model: nn.Module, rows: slice) -> list[Tensor]:
    inputs, targets = data()
    outputs = model(inputs[rows])
    return [((o - t[rows]) ** 2).mean() for o, t in zip(outputs, targets, strict=True)]


def sharded(rank: int, size: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    mesh = init_device_mesh("cpu", (size,))
    step = functions()["sharded_step"]
    mine = slice(rank * 12 // size, (rank + 1) * 12 // size)
    for name in ("aligned_mtl", "upgrad", "imtl_g", "mgda"):
        model, whole = network(), network()
        fully_shard(model.trunk, mesh=mesh)
        fully_shard(model, mesh=mesh)
        parameters, shared = list(model.parameters()), list(model.trunk.parameters())
        optimizer, other = sgd(parameters, lr=0.1), sgd(whole.parameters(), lr=0.1)
        method, alone = (create(name, head_gradients="raw") for _ in range(2))
        alone.group = None

        for _ in range(3):
            step(method, optimizer, losses_of(model, mine), shared)
            alone.step(
                lambda w=whole: losses_of(w, slice(None)),
                other,
                shared=list(whole.trunk.parameters()),
            )
        for p, q in zip(parameters, whole.parameters(), strict=True):
            assert relative_error(p.full_tensor().detach(), q.detach()) < 1e-9
        for told in (True, False):
            shards = {"shared": shared} if told else {}
            try:
                method.step(lambda m=model: losses_of(m, mine), optimizer, **shards)
            except ValueError as error:
                assert "sharded" in str(error)
            else:
                raise AssertionError("sharded parameters were taken")
    Path(folder, f"{rank}.txt").write_text("passed", encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
