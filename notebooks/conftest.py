"""pytest settings for running the chapters with nbval.

A kernel starts in the folder of its notebook, so a relative search path would not find the
package; the environment set here is inherited by every kernel that nbval starts.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = str(Path(__file__).resolve().parent.parent)

_paths = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, *(entry for entry in _paths if entry != ROOT)])
# The toy problems are tiny: more threads only cost time and change the order of additions.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Leave warnings (they carry temporary paths) and SVG (dates, random ids) uncompared."""
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += ("stderr", "image/svg+xml")
