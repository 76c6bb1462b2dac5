"""The hand-set tables of book/how_to_run.md say what their committed files say."""

from __future__ import annotations

import json
from pathlib import Path

BOOK = Path(__file__).resolve().parent.parent / "book"
PAGE = (BOOK / "how_to_run.md").read_text(encoding="utf-8")


def record(name: str) -> dict:
    return json.loads((BOOK / name).read_text(encoding="utf-8"))


def significant(x: float) -> str:
    """Two digits, or all before the point."""
    return f"{x:.2g}" if x < 0.1 else f"{x:.2f}" if x < 1 else f"{x:.1f}"


def test_batches_without_a_loader():
    epoch = record("data_speed.json")["epoch"]
    for part, label, form in [
        ("batches alone", "batches alone, seconds", "{:.0f}"),
        ("LeNet", "with a step of LeNet on each, seconds", "{:.2f}"),
    ]:
        found = epoch[part]
        cells = [significant(found["seconds, ours"])]
        for loader in ("DataLoader", "DataLoader, 2 workers"):
            times = form.format(found[f"ratio, {loader}"])
            cells.append(f"{significant(found[f'seconds, {loader}'])} ({times} times)")
        assert f"| {label} | {' | '.join(cells)} |" in PAGE


def test_seeds_side_by_side():
    found = record("together_speed.json")
    assert f"{found['seeds']} seeds" in PAGE
    for benchmark, methods in found["training"].items():
        for method, times in methods.items():
            cells = [
                f"`{benchmark}`",
                f"`{method}`",
                f"{times['seconds, one by one']:.1f}",
                f"{times['seconds, together']:.1f}",
                f"{times['ratio']:.1f}",
            ]
            assert f"| {' | '.join(cells)} |" in PAGE
