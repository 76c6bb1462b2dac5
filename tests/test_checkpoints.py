"""Checkpoint files: written and read, refused where damaged, and then the one before is used."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from tiny import cell, prepared, without_times

from mtl_tutorial import checkpoints, results, training

STATE = {"w": torch.arange(6.0), "list": [1, None, "a"], "nan": float("nan")}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "seed0-0a1b2c3d.ckpt"


def test_what_is_written_is_read_and_the_one_before_is_kept(path):
    newest, before = checkpoints.files(path.with_suffix(".json"))
    assert newest == path
    for n in range(3):
        checkpoints.write(path, STATE | {"n": n})
    assert checkpoints.read(newest)["n"] == 2
    assert checkpoints.read(before)["n"] == 1
    assert torch.equal(checkpoints.read(newest)["w"], STATE["w"])
    assert sorted(p.name for p in path.parent.iterdir()) == [newest.name, before.name]
    checkpoints.remove(path.with_suffix(".json"))
    assert list(path.parent.iterdir()) == []


def test_a_write_that_fails_leaves_the_last_one(path, monkeypatch):
    checkpoints.write(path, STATE | {"n": 0})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match=r"expected to write .*No space left on device; make room"):
        checkpoints.write(path, STATE | {"n": 1})
    assert checkpoints.read(path.with_suffix(".previous"))["n"] == 0


class Dangerous:
    def __reduce__(self):
        return os.system, ("touch was_here",)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no checkpoint of this version"),
        (pickle.dumps({"n": 1}), "no checkpoint of this version"),
        (b"mtl_tutorial checkpoint 2 seed0-0a1b2c3d 00\n", "no checkpoint of this version"),
        (b"mtl_tutorial checkpoint 1 seed1-0a1b2c3d 00\n", "the checkpoint of seed1-0a1b2c3d"),
        (b"mtl_tutorial checkpoint 1 seed0-0a1b2c3d 00\n", "checksum"),
        ("code", "eights only load failed"),
        ("list", "another kind"),
    ],
)
def test_a_file_that_is_none_is_refused_and_runs_nothing(content, why, path, monkeypatch):
    monkeypatch.chdir(path.parent)
    if isinstance(content, str):  # forged, with the checksum that belongs to it
        made = path.with_name("made")
        torch.save(Dangerous() if content == "code" else [1], made)
        content = checkpoints.header(path, made.read_bytes()) + made.read_bytes()
        made.unlink()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=why):
        checkpoints.read(path)
    assert [p.name for p in Path().iterdir()] == [path.name]


def test_one_that_cannot_be_opened_is_refused(path):
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        checkpoints.read(path)


def test_the_checkpoint_before_is_used_where_the_newest_is_damaged(tmp_path, capsys):
    what, bench = cell("famo", epochs=4), prepared()
    whole = training.train(what, bench, tmp_path / "whole")

    def stop(done, _):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(what, bench, tmp_path, stop)
    newest, _ = checkpoints.files(what.path(tmp_path))
    newest.write_bytes(newest.read_bytes()[:-1])
    seen = []
    result = training.train(what, bench, tmp_path, lambda done, _: seen.append(done))
    assert seen == [3, 4]  # two epochs came from the checkpoint before
    assert without_times(result) == without_times(whole)
    said = capsys.readouterr().err
    assert said.startswith(f"checkpoint {newest} unreadable (cut or changed")
    assert said.endswith("); trying the one before it\n")
    assert [p.suffix for p in what.path(tmp_path).parent.iterdir()] == [".json"]


def test_checkpoints_beside_a_finished_result_are_removed(tmp_path, tiny_is_known):
    what, cpu = cell(epochs=1), torch.device("cpu")
    list(training.sweep([what], tmp_path, cpu))
    for file in checkpoints.files(what.path(tmp_path)):  # of a process killed before its last act
        file.write_bytes(b"old")
    assert [o.status for o in training.sweep([what], tmp_path, cpu)] == ["kept"]
    assert [p.suffix for p in what.path(tmp_path).parent.iterdir()] == [".json"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_of_another_accelerator_come_to_this_one(path):
    checkpoints.write(path, {"here": torch.ones(2, device="cuda"), "host": torch.ones(2)})
    assert checkpoints.read(path)["here"].device.type == "cpu"
    back = checkpoints.read(path, torch.device("cuda", 0))
    assert (back["here"].device.type, back["host"].device.type) == ("cuda", "cpu")
