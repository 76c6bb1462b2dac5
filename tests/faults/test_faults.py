"""The fault campaign and the attack on the readers in their short form (`make faults`: in full)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import campaign
import pytest
import readers

from mtl_tutorial import benchmarks, matlab

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _known(monkeypatch):
    monkeypatch.setitem(benchmarks.CLASSES, "tiny", campaign.Tiny)
    monkeypatch.setitem(benchmarks.CLASSES, "fragile", campaign.Fragile)


SHORT = {
    "kills": lambda folder: campaign.kills(folder, 2, random.Random(0), ["famo", "individual"]),
    "disk": lambda folder: campaign.disk_full(folder, [1000, 20_000]),
    "tmpfs": lambda folder: campaign.tmpfs_full(folder, [4]),
    "readonly": campaign.read_only,
    "memory": lambda folder: campaign.memory(folder, [7]),
    "nan": lambda folder: campaign.nan_loss(folder, [3], ["aligned_mtl"]),
    "sweeps": lambda folder: campaign.two_sweeps(folder, 1, random.Random(0)),
    "clock": lambda folder: campaign.clock_back(folder, 1, random.Random(0)),
    "results": lambda folder: campaign.results_cut(folder, 900),
    "checkpoints": lambda folder: campaign.checkpoints_cut(folder, 1009, 60),
}


def test_the_short_form_has_every_part(tmp_path):
    assert list(SHORT) == list(campaign.parts(tmp_path, 0))


@pytest.mark.parametrize("part", SHORT)
def test_nothing_is_lost_and_nothing_done_twice(part, tmp_path):
    tally = SHORT[part](tmp_path)
    if not tally.tried:
        pytest.skip(tally.remark)
    assert (tally.lost, tally.double, tally.unclear) == (0, 0, 0), tally


@pytest.mark.parametrize("case", readers.CASES)
def test_readers_take_or_refuse(case):
    assert readers.attack(case, 40) > 20


def test_shares_of_inputs_are_all_of_them():
    assert sum(share for _, _, share in readers.CASES.values()) == pytest.approx(1)


def test_no_source_runs_code_from_a_file_or_lets_an_archive_choose_a_path():
    assert readers.dangerous_calls() == []


def test_matlab_files_are_read_as_scipy_reads_them(tmp_path):
    import numpy as np
    from scipy.io import loadmat, savemat

    cells = np.empty((1, 2), dtype=object)
    cells[0, 0], cells[0, 1] = np.arange(6.0).reshape(2, 3), np.ones((1, 1))
    content = {
        "a": np.arange(12, dtype=np.int16).reshape(3, 4) - 5,
        "b": np.linspace(0, 1, 24).reshape(2, 3, 4).astype(np.float32),
        "x": np.array([[2**60]], dtype=np.int64),
        "empty": np.zeros((0, 3)),
        "cells": cells,
        "text": "left out",
        "complex": np.array([[1j]]),
    }
    for packed in (False, True):
        savemat(tmp_path / "a.mat", content, do_compression=packed)
        expected, found = loadmat(tmp_path / "a.mat"), matlab.load(tmp_path / "a.mat")
        assert list(found) == ["a", "b", "x", "empty", "cells"]
        for name in ("a", "b", "x", "empty"):
            assert found[name].dtype == expected[name].dtype
            assert np.array_equal(found[name], expected[name])
        assert [c.tolist() for c in found["cells"].ravel()] == [
            c.tolist() for c in expected["cells"].ravel()
        ]


def test_a_matlab_file_with_a_type_that_there_is_not_is_refused(tmp_path):
    data = bytearray(readers.surf())
    data[176] = 91  # scipy 1.17 ends here with a segmentation fault
    (tmp_path / "a.mat").write_bytes(data)
    with pytest.raises(ValueError):
        matlab.load(tmp_path / "a.mat")


def test_page_is_that_of_the_report():
    report = json.loads((campaign.BOOK / "faults.json").read_text(encoding="utf-8"))
    assert (campaign.BOOK / "faults.md").read_text(encoding="utf-8") == campaign.page(report)


def test_the_processes_of_torchrun_share_a_grid(tmp_path):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *(str(HERE.parent / "tiny.py"), "run", "tiny", "--methods", "equal,dwa,mgda"),
        *("--seeds", "2", "--device", "cpu", "--out", str(tmp_path)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    lines = done.stdout.splitlines()
    cells = [line.split(": ")[1] for line in lines if line.startswith("rank ") and "(" in line]
    assert sorted(cells) == sorted(
        f"{m} seed {s}" for m in ("equal", "dwa", "mgda") for s in (0, 1)
    )
    counts = [line.split(": ")[1] for line in lines if line.endswith("runs were done here")]
    assert len(counts) == 1
    assert "6 of 6 runs are done" in done.stdout  # the first rank waited for the other
    assert done.stdout.count("tiny, budget quick") == 1
    assert len(list(tmp_path.rglob("seed*.json"))) == 6
