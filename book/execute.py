"""Execute chapters in place, so that running one twice changes no byte of it.

Usage::

    python book/execute.py notebooks/02_conflicting_gradients.ipynb ...
    python book/execute.py              # every chapter in notebooks/, in order

Chapters run one after the other, each in a fresh kernel and with the environment of this process:
``MTL_TUTORIAL_BUDGET=full python book/execute.py`` reaches the training runs inside. Seconds per
chapter are printed. A chapter that raises is left as it was on disk; the others still run, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
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
            print(f"{path.name}  {execute(path, options.timeout):.1f} s", flush=True)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"{path.name}  failed; its file is unchanged\n{error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
