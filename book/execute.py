"""Execute chapters in place, so that running one twice changes no byte of it.

Usage::

    python book/execute.py notebooks/02_conflicting_gradients.ipynb ...
    python book/execute.py              # every chapter in notebooks/, in order

Chapters run one after the other, each in a fresh kernel and with the environment of this process:
``MTL_TUTORIAL_BUDGET=full python book/execute.py`` reaches the training runs inside. Seconds per
chapter are printed. A chapter that raises is left as it was on disk; the others still run, and the
exit status is 1.

What was run when, where and for how long is kept in ``book/status.json``, for the chapters of this
book alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import nbformat
from filelock import FileLock
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
STATUS = ROOT / "book" / "status.json"
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
# The version of Python is left out: it differs between machines and says nothing about a chapter.
LANGUAGE = {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"}
# Set by front ends while somebody edits; of no meaning in a stored chapter.
TRANSIENT = ("execution", "collapsed", "scrolled", "ExecuteTime")


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Remove from a notebook what depends on the machine, the editor or the time.

    Args:
        notebook: executed notebook; changed in place.

    Returns:
        The same notebook, with fixed kernel and language metadata.
    """
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    for cell in notebook.cells:
        for key in TRANSIENT:
            cell.metadata.pop(key, None)
    return notebook


def execute(path: Path, timeout: float) -> float:
    """Run one chapter from top to bottom and store its outputs in place.

    Args:
        path: the notebook.
        timeout: longest time for one cell, in seconds.

    Returns:
        Seconds that the run took, start of the kernel included.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell raises; the file keeps its old content.
        nbclient.exceptions.CellTimeoutError: if a cell takes longer than ``timeout``; likewise.
    """
    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    seconds = time.perf_counter() - start
    nbformat.validate(normalise(notebook))
    # Written beside the chapter and then moved: an interrupted write loses nothing.
    temporary = path.with_suffix(".ipynb.tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)
    return seconds


def fingerprint(notebook: NotebookNode) -> str:
    """Hash of a notebook's code cells: the same as long as it would run the same code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def record(path: Path, seconds: float, status: Path) -> None:
    """Note in a status file that a chapter ran just now; other chapters' entries stay."""
    import torch  # here: to say how a chapter failed needs no torch

    from mtl_tutorial import training

    machine = training.describe_device(torch.device("cpu"))["name"]
    versions = training.versions()
    entry = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "seconds": round(seconds, 1),
        "machine": f"{machine}, {os.cpu_count()} cores",
        "python": versions["python"],
        "torch": versions["torch"],
        "code": fingerprint(nbformat.read(path, as_version=4)),
    }
    with FileLock(status.with_suffix(".lock")):  # chapters may run in several terminals
        found = json.loads(status.read_text(encoding="utf-8")) if status.is_file() else {}
        text = json.dumps(found | {path.stem: entry}, indent=1, sort_keys=True) + "\n"
        temporary = status.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(status)


def main(arguments: list[str] | None = None) -> int:
    """Execute the chapters named on the command line; all of them by default."""
    parser = argparse.ArgumentParser(description="Execute chapters in place.")
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: notebooks/*.ipynb")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds per cell (900)")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.notebooks] or sorted(NOTEBOOKS.glob("*.ipynb"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        parser.error(f"expected notebooks, got no file {', '.join(missing)}; check the path")

    # Kernels start in the chapter's folder: the package is found by an absolute path. One thread
    # keeps the order of additions, hence the last digits, the same everywhere.
    search = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(search))
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    failed = 0
    for path in paths:
        try:
            seconds = execute(path, options.timeout)
            print(f"{path.name}  {seconds:.1f} s", flush=True)
            if path.parent == NOTEBOOKS:
                record(path, seconds, STATUS)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"{path.name}  failed; its file is unchanged\n{error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
