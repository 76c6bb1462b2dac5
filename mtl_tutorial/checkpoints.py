"""Checkpoint files: written whole or not at all, checked when read, the one before kept.

A file is one line of text, ``mtl_tutorial checkpoint 1 RUN SHA256``, and behind it what
`torch.save` writes; RUN is the name of the run's result file without its ending. So a file that was
cut, changed or copied from another run is known as such before anything in it is believed.

A new checkpoint pushes the one at hand to the ending ``.previous``; whoever is killed in between
leaves that one.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import torch

from . import results

MAGIC = "mtl_tutorial checkpoint 1"
_LONGEST = 400  # bytes of the first line, at most


def files(result: Path) -> tuple[Path, Path]:
    """The checkpoint beside a result file, and the one before it."""
    return result.with_suffix(".ckpt"), result.with_suffix(".previous")


def write(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint and keep the one that is there.

    Args:
        path: first of `files`.
        state: dicts, lists, numbers, texts and tensors.

    Raises:
        OSError: it cannot be written; the one before is there under one of its two names.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    if path.exists():
        os.replace(path, path.with_suffix(".previous"))
    results.write_atomically(path, header(path, buffer.getbuffer()), buffer.getbuffer())


def header(path: Path, payload: bytes | memoryview) -> bytes:
    """The first line of a checkpoint with these contents."""
    return f"{MAGIC} {path.stem} {hashlib.sha256(payload).hexdigest()}\n".encode()


def read(path: Path, device: torch.device | None = None) -> dict[str, Any]:
    """Read a checkpoint; nothing in it is executed.

    Args:
        path: one of `files`.
        device: where tensors go that were on an accelerator; default: the CPU.

    Raises:
        ValueError: the file is no checkpoint, another run's, cut or changed.
    """
    place = str(device or "cpu")

    def put(storage: Any, saved: str) -> Any:
        where = "cpu" if saved == "cpu" else place
        return torch.serialization.default_restore_location(storage, where)

    try:
        first, _, payload = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
    magic, run, digest = _parts(first)
    if magic != MAGIC:
        raise ValueError("no checkpoint of this version")
    if run != path.stem:
        raise ValueError(f"the checkpoint of {run}")
    if digest != hashlib.sha256(payload).hexdigest():
        raise ValueError("cut or changed: its checksum is another one")
    try:
        state = torch.load(io.BytesIO(payload), map_location=put, weights_only=True)
    except Exception as error:  # whatever a made-up file makes the unpickler stumble on
        raise ValueError(results.one_line(error)) from None
    if not isinstance(state, dict):
        raise ValueError(f"contents of another kind ({type(state).__name__})")
    return state


def _parts(line: bytes) -> tuple[str, str, str]:
    """Kind, run and checksum that a first line names; empty where it names none."""
    if len(line) > _LONGEST or not line.isascii():
        return "", "", ""
    words = line.decode("ascii").split(" ")
    return (" ".join(words[:-2]), words[-2], words[-1]) if len(words) > 2 else ("", "", "")


def remove(result: Path) -> None:
    """Remove the checkpoints beside a result file."""
    for path in files(result):
        path.unlink(missing_ok=True)
