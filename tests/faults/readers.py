"""Hostile input: what is handed to each reader, and what it may answer.

A reader may accept an input or refuse it with the exception that its documentation names, in one
line that can be printed. Anything else is a crash. `CASES` holds a strategy and a check for each.
"""

from __future__ import annotations

import ast
import atexit
import io
import json
import re
import shutil
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from tiny import cell

import mtl_tutorial
from mtl_tutorial import checkpoints, methods, noise, results, training
from mtl_tutorial.benchmarks import class_streams, office_caltech10, office_images, school

# --------------------------------------------------------------------------------- strategies


@st.composite
def damaged(draw, original: bytes) -> bytes:
    """A file with a few places cut out, changed, doubled or put in."""
    data = bytearray(original)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(("change", "insert", "delete", "repeat", "cut", "zeros")))
        n = draw(st.integers(1, 16))
        if kind == "change":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del data[at : at + n]
        elif kind == "repeat":
            data[at:at] = data[at : at + 64 * n]
        elif kind == "cut":
            del data[at:]
        else:
            data[at : at + n] = bytes(n)
    return bytes(data)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([10**400, -1, 0, 1e308, "\x1b[2J", "../..", "\ud800", "a\nb"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@st.composite
def changed(draw, tree: object) -> object:
    """Plain data with something else in up to three places, or nothing in one."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        parent, key = None, None
        here = tree
        while isinstance(here, dict | list) and here and draw(st.integers(0, 3)):
            keys = sorted(here) if isinstance(here, dict) else range(len(here))
            parent, key = here, draw(st.sampled_from(keys))
            here = parent[key]
        if parent is None:
            continue
        if draw(st.booleans()):
            parent[key] = draw(TREES)
        elif isinstance(parent, dict):
            del parent[key]
    return tree


# ------------------------------------------------------------------------------------ samples


@cache
def folder() -> Path:
    """Where inputs are written, in memory where the system has such a place."""
    memory = Path("/dev/shm")
    made = tempfile.mkdtemp(prefix="readers", dir=memory if memory.is_dir() else None)
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def sample_result() -> dict:
    scores = {"left": {"accuracy": 90.0}, "right": {"accuracy": 80.0, "loss": 0.5}}
    epoch = {"epoch": 1, "val": scores, "weights": [0.5, 0.5], "train_losses": [1.0, 2.0]}
    return {
        "format": results.FORMAT,
        "benchmark": "made",
        "budget": "quick",
        "protocol": cell().protocol.describe(),
        "lr": 0.004,
        "label": "equal:reduction=sum",
        "seed": 1,
        "metrics": {"left": {"accuracy": True}, "right": {"accuracy": True, "loss": False}},
        "finished": True,
        "failed": None,
        "test": scores,
        "history": [epoch | {"cosine": 0.1}, epoch | {"epoch": 2}],
        "device": {"name": "CPU one", "threads": 1},
        "versions": {"mtl_tutorial": "0.1.0", "torch": "2.15"},
        "seconds_per_epoch": 0.5,
        "peak_memory_mb": 400.0,
    }


@cache
def sample_checkpoint() -> bytes:
    path = folder() / "seed0-sample.ckpt"
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}
    checkpoints.write(path, {"model": {"w": torch.ones(2, 3)}, "optimizer": optimizer, "epoch": 1})
    return path.read_bytes()


def sample_mat(content: dict) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, content)
    return buffer.getvalue()


@cache
def surf() -> bytes:
    counts = np.arange(3 * office_caltech10.BINS, dtype=np.uint8).reshape(3, -1)
    return sample_mat({"fts": counts, "labels": np.array([[1.0], [2], [10]])})


@cache
def schools() -> bytes:
    cells = np.empty((1, 3), dtype=object)
    scores = np.empty((1, 3), dtype=object)
    for k in range(3):
        cells[0, k], scores[0, k] = np.ones((2, school.N_FEATURES)), np.ones((2, 1))
    return sample_mat({"X": cells, "Y": scores})


@cache
def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = (np.arange(32 * 32 * 3) % 251).astype(np.uint8).reshape(32, 32, 3)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


MEMBERS = ("train/cat/1.jpg", "test/dog/1.jpg", "../outside.jpg", "/outside.jpg", "a/b/../../../c")


@cache
def archive(compression: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as tar:
        for name in MEMBERS:
            member = tarfile.TarInfo(name)
            member.size = len(picture("jpeg"))
            tar.addfile(member, io.BytesIO(picture("jpeg")))
        link = tarfile.TarInfo("train/cat/2.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "../../../../etc/passwd"
        tar.addfile(link)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------- checks


def refusal(error: BaseException, own: bool = False) -> None:
    """A refusal is one line that says something; a file has no say in what a terminal does."""
    text = " ".join(str(error).split())
    assert text, f"{type(error).__name__} without a text"
    assert own or "\x1b" not in text


def file_with(data: bytes, name: str) -> Path:
    path = folder() / name
    path.write_bytes(data)
    return path


def only_known_files() -> None:
    """Nothing was written beside what the checks write, nor above their folder."""
    known = re.compile(r"(seed0-\w+\.(json|ckpt|previous)|input\.\w+)$")
    assert [p for p in folder().rglob("*") if not known.match(p.name)] == []
    assert not (folder().parent / "outside.jpg").exists()


def result_file(data: bytes) -> None:
    path = file_with(data, "seed0-input.json")
    try:
        read = results.read_result(path)
    except ValueError as error:
        refusal(error)
        return
    others = [sample_result() | {"label": results.BASELINE}, sample_result() | {"lr": 0.1}]
    for table in results.tables([read, *others]):
        for form in results.TABLE_FORMATS:
            text = results.render(table, form)
            assert text.replace("\n", "").replace("\r", "").isprintable() or form == "csv"


def result_tree(tree: object) -> None:
    try:
        data = json.dumps(tree).encode()
    except ValueError:  # a number that Python itself does not print
        return
    result_file(data)


def checkpoint_file(data: bytes) -> None:
    path = file_with(data, "seed0-sample.ckpt")
    try:
        state = checkpoints.read(path)
    except ValueError as error:
        refusal(error)
        return
    assert data == sample_checkpoint()
    assert isinstance(state, dict)


def checkpoint_payload(payload: bytes) -> None:
    """What a forger would do: another payload, with the checksum that belongs to it."""
    path = folder() / "seed0-forged.ckpt"
    path.write_bytes(checkpoints.header(path, payload) + payload)
    try:
        checkpoints.read(path)
    except ValueError as error:
        refusal(error)


def spec(text: str) -> None:
    try:
        for read in training.parse_specs(text):
            made = training.Cell("tiny", "quick", cell().protocol, read, 0)
            inside(made.path(folder()), 3)
    except ValueError as error:
        refusal(error, own=True)


def noise_text(text: str) -> None:
    try:
        read = noise.parse_noise(text)
    except ValueError as error:
        refusal(error, own=True)
    else:
        assert 0 <= read.fraction <= 1


def inside(path: Path, depth: int) -> None:
    """A file lies so many folders below the output folder, by names that a disk can hold."""
    relative = path.resolve().relative_to(folder().resolve())
    assert len(relative.parts) == depth + 1
    assert all(len(part.encode()) < 256 and part[0] != "." for part in relative.parts)


def names(texts: tuple[str, str, str]) -> None:
    path = results.result_path(folder(), *texts, 0, "0a1b2c3d")
    inside(path, 3)


def refused_or_read(read: Callable[[Path], object], name: str) -> Callable[[bytes], None]:
    def check(data: bytes) -> None:
        path = file_with(data, name)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # pillow warns of odd files
                read(path)
        except ValueError as error:
            refusal(error)
        only_known_files()

    return check


def settings_of(name: str) -> list[str]:
    return [*training.methods.create(name).settings, "level", "nosuch"]


WORDS = st.sampled_from(
    ["", "-1", "0", "1e400", "nan", "None", "True", "[]", "(0.5,0.5)", "[1,'a']"]
)
VALUES = st.one_of(
    WORDS,
    st.sampled_from(
        ["{}", "((((", "-" * 3000 + "1", "9" * 5000, "'" * 7, "\\d", "1if 2", "b''", "..."]
    ),
    st.integers().map(str),
    st.floats().map(str),
    st.text(max_size=12),
    TREES.map(repr),
)


@st.composite
def specs(draw) -> str:
    """Method names with settings that exist, mostly, and values of any kind."""
    name = draw(st.sampled_from([*methods.available(), results.BASELINE, "all", "nosuch"]))
    known = settings_of(name) if name in methods.CLASSES else ["level"]
    keys = draw(st.lists(st.sampled_from(known) | st.text(max_size=4), max_size=3))
    return ":".join([name, *(f"{key}={draw(VALUES)}" for key in keys)])


TEXTS = st.text(max_size=300) | st.sampled_from(["", ".", "..", "../..", "/", "a/../b", "\0"])

Case = tuple[Callable[[], st.SearchStrategy], Callable, float]

# Strategy, check, share of all inputs.
CASES: dict[str, Case] = {
    "result files, bytes": (
        lambda: damaged(json.dumps(sample_result()).encode()) | st.binary(max_size=64),
        result_file,
        0.12,
    ),
    "result files, values": (lambda: changed(sample_result()), result_tree, 0.18),
    "checkpoints, bytes": (
        lambda: damaged(sample_checkpoint()) | st.binary(max_size=64),
        checkpoint_file,
        0.12,
    ),
    "checkpoints, forged": (
        lambda: damaged(sample_checkpoint().partition(b"\n")[2]),
        checkpoint_payload,
        0.1,
    ),
    "method specifications": (lambda: specs() | st.text(max_size=30), spec, 0.2),
    "noise specifications": (
        lambda: st.text(max_size=20) | st.tuples(st.text(max_size=4), VALUES).map(":".join),
        noise_text,
        0.03,
    ),
    "names of runs": (lambda: st.tuples(TEXTS, TEXTS, TEXTS), names, 0.05),
    "MATLAB files, histograms": (
        lambda: damaged(surf()),
        refused_or_read(office_caltech10.read_domain, "input.mat"),
        0.05,
    ),
    "MATLAB files, cells": (
        lambda: damaged(schools()),
        refused_or_read(school.read_school, "input.mat"),
        0.05,
    ),
    "images": (
        lambda: st.sampled_from(["png", "jpeg", "bmp"]).flatmap(lambda k: damaged(picture(k))),
        refused_or_read(lambda path: office_images.read_images([path], 8), "input.img"),
        0.04,
    ),
    "archives": (
        lambda: st.sampled_from(["", "xz"]).flatmap(lambda k: damaged(archive(k))),
        refused_or_read(class_streams._read_jpeg_copy, "input.tar"),
        0.04,
    ),
    "split lists": (
        lambda: damaged(b"Art/Alarm_Clock/1.jpg 0\nArt/Bike/2.jpg 3\n") | st.binary(max_size=40),
        refused_or_read(office_images.read_list, "input.txt"),
        0.02,
    ),
}


def attack(name: str, n: int) -> int:
    """Hand up to n inputs of a case to its reader; returns how many there were.

    Raises:
        AssertionError and others: a crash, with the smallest input that hypothesis found.
    """
    strategy, check, _ = CASES[name]
    seen = 0

    @settings(
        max_examples=n,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy())
    def run(value: object) -> None:
        nonlocal seen
        seen += 1
        check(value)

    run()
    return seen


# --------------------------------------------------------------------------- what the source says

DANGEROUS = {
    "eval": "a text is run",
    "exec": "a text is run",
    "extractall": "a name in an archive chooses where a file is written",
    "extract": "a name in an archive chooses where a file is written",
}


def dangerous_calls() -> list[str]:
    """Places of the package that would run code from a file or write where a file says."""
    found = []
    root = Path(mtl_tutorial.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
                if {"pickle", "shelve", "marshal"} & set(module):
                    found.append(f"{path.name}:{node.lineno} imports a reader that runs code")
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            owner = getattr(getattr(node.func, "value", None), "id", "")
            given_ = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            plain = isinstance(node.func, ast.Name)
            if name in DANGEROUS and (plain or name.startswith("extract")):
                found.append(f"{path.name}:{node.lineno} {name}: {DANGEROUS[name]}")
            if name == "load" and owner == "torch" and given_.get("weights_only") is not True:
                found.append(f"{path.name}:{node.lineno} torch.load without weights_only=True")
            if name == "load" and owner == "np" and given_.get("allow_pickle") is not False:
                found.append(f"{path.name}:{node.lineno} np.load without allow_pickle=False")
    return found
