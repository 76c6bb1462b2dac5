"""Two and four processes take the steps of one process on the joined batch.

The processes of a group are started once; each test below reads what they wrote down.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
import ranks_worker
import torch
import torch.distributed as dist
from filelock import FileLock

LIMIT = 1800  # seconds for a group's checks, many times what they take; a hang ends by itself

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def launch(size: int, folder: Path) -> None:
    """Run all checks in `size` processes, which end by themselves or are ended."""
    context = torch.multiprocessing.spawn(
        ranks_worker.work, (size, str(folder)), nprocs=size, join=False
    )
    deadline = time.monotonic() + LIMIT
    try:
        while not context.join(5) and time.monotonic() < deadline:
            pass
    finally:
        for process in context.processes:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def outcomes_of(tmp_path_factory):
    """Rank by rank what became of each check; one launch also where xdist runs several workers."""
    workers = os.environ.get("PYTEST_XDIST_WORKER") is not None
    base = tmp_path_factory.getbasetemp()
    root = base.parent if workers else base

    def outcomes(size: int) -> list[dict[str, str]]:
        folder = root / f"ranks_{size}"
        with FileLock(root / f"ranks_{size}.lock"):
            if not folder.exists():
                folder.mkdir()
                launch(size, folder)
        files = [folder / f"{rank}.json" for rank in range(size)]
        return [json.loads(f.read_text(encoding="utf-8")) if f.exists() else {} for f in files]

    return outcomes


@pytest.mark.parametrize(
    ("size", "check", "method"), [(n, *cell) for n in (2, 4) for cell in ranks_worker.cells(n)]
)
def test_ranks(outcomes_of, size, check, method):
    missing = "not run: an earlier check was left by some ranks alone"
    found = [each.get(f"{check}-{method}", missing) for each in outcomes_of(size)]
    if found[0].startswith("skipped: ") and len(set(found)) == 1:
        pytest.skip(found[0].removeprefix("skipped: "))
    failures = [f"rank {r}: {what}" for r, what in enumerate(found) if what != "passed"]
    assert not failures, "\n".join(failures)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
def test_gpu_ranks_take_the_steps_of_one_process(tmp_path, backend):
    torch.multiprocessing.spawn(ranks_worker.work_on_gpu, (2, str(tmp_path), backend), nprocs=2)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    failures = {name: why for each in found for name, why in each.items() if why != "passed"}
    assert not failures
