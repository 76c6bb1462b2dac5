"""The code of book/many_processes.md runs and does what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial

import page_worker
import pytest
import torch
import torch.distributed as dist
from helpers import relative_error, sgd

from mtl_tutorial.gradients import task_gradients
from mtl_tutorial.methods import create

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def test_torchrun_example_is_the_same_for_any_number_of_processes(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(page_worker.blocks()["train"], encoding="utf-8")
    numbers = []
    for size in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        done = subprocess.run(
            [*command, "--nproc-per-node", str(size), str(script)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        (line,) = re.findall(r"^\d+\.\d{4} (-?\d+\.\d{6})$", done.stdout, re.MULTILINE)
        numbers.append(float(line))
    assert numbers[1] == pytest.approx(numbers[0], abs=2e-4)


@pytest.mark.parametrize("name", ["equal", "upgrad", "gradnorm", "imtl_g"])
def test_accumulated_step_is_that_of_the_joined_batch(name):
    step = page_worker.functions()["accumulated_step"]
    results = []
    for parts in (1, 3):
        model = page_worker.network()
        shared, heads = list(model.trunk.parameters()), list(model.heads.parameters())
        method, optimizer = create(name, head_gradients="raw"), sgd(model.parameters(), lr=0.1)
        batches = [slice(i * 12 // parts, (i + 1) * 12 // parts) for i in range(parts)]

        losses_of = partial(page_worker.losses_of, model)
        for _ in range(3):
            if parts > 1:
                step(method, optimizer, batches, losses_of, shared, heads)
            else:
                method.step(partial(losses_of, slice(None)), optimizer, shared=shared)
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert relative_error(results[1], results[0]) < 1e-9


def test_sum_of_micro_batches_gram_matrices_is_another():
    model = page_worker.network()

    def gram(rows):
        losses = page_worker.losses_of(model, rows)
        j = task_gradients(losses, model.trunk.parameters())
        return j @ j.T

    joined = gram(slice(None))
    parts = [gram(slice(0, 6)) / 4, gram(slice(6, 12)) / 4]
    assert relative_error(sum(parts), joined) > 0.05


def test_sharded_step_is_that_of_one_process(tmp_path):
    torch.multiprocessing.spawn(page_worker.sharded, (2, str(tmp_path)), nprocs=2)
    assert sorted(f.read_text() for f in tmp_path.glob("*.txt")) == ["passed", "passed"]
