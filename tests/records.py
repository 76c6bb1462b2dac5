"""What the measuring scripts of this folder say beside their numbers, and how they print them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from mtl_tutorial import training
from mtl_tutorial.results import write_atomically


def provenance(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": training.describe_device(device),
        "versions": training.versions(),
        "commit": training.git_commit(),
    }


def hand_out(record: dict[str, Any], out: Path | None) -> None:
    """Print a record, and write it where asked to."""
    text = json.dumps(record, indent=1) + "\n"
    sys.stdout.write(text)
    if out is not None:
        write_atomically(out, text.encode())
