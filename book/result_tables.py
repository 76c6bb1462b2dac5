"""Write book/results.md: every committed table, with the command that repeats it.

Usage::

    python book/result_tables.py            # write the page
    python book/result_tables.py --check    # exit 1 if the page is not what would be written

The page is made from the result files below ``book/results`` and nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from mtl_tutorial import benchmarks, results

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "results.md"
STORE = ROOT / "book" / "results"

INTRODUCTION = """\
# Results

Every table that this repository holds result files for. Means and sample standard deviations over
the seeds; $\\Delta m$ against the single-task row of the same table, negative where sharing helps;
the mean rank is over all metrics of the table and leaves the single-task row out. Methods stand in
the order of their mean rank, which with three seeds is no order of merit: look at the deviations
first.

All methods of a table share one protocol, its learning rate included, and run with their default
settings unless the label names others. A method whose steps have another length, or which steps
more often per batch, may want another learning rate; these tables do not tune it. Cross-learning
keeps a copy of the parameters per task: its row scores the centre of the copies.
"""


def command(table: results.Table) -> str:
    """The command that repeats a table, on several lines."""
    labels = [row.label for row in table.rows]
    seeds = 1 + max((seed for row in table.rows for seed in row.seeds), default=0)
    lines = ["methods=" + ",".join(labels[:4])]
    rest = range(4, len(labels), 4)
    lines += ["methods=$methods," + ",".join(labels[i : i + 4]) for i in rest]
    noise = f" --noise {table.noise}" if table.noise else ""
    lines.append(f"mtl-tutorial run {table.benchmark} --methods $methods --seeds {seeds} \\")
    lines.append(f"    --budget {table.budget}{noise} --out book/results")
    return "\n".join(lines)


def section(table: results.Table, runs: list[dict[str, Any]]) -> str:
    """Heading, provenance, table and command."""
    title = benchmarks.CLASSES[table.benchmark].title
    noise = f", noise {table.noise}" if table.noise else ""
    dates = sorted(run["date"][:10] for run in runs)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    body = results.render(table, "markdown")
    return (
        f"## {title}, {table.budget} budget{noise}\n\n{body}\n\n"
        f"{len(runs)} runs, {when}. Source: {benchmarks.CLASSES[table.benchmark].source}.\n\n"
        f"```bash\n{command(table)}\n```\n"
    )


def page() -> str:
    """The whole page.

    Raises:
        ValueError: a result file cannot be read.
    """
    found, complaints = results.load_results(STORE)
    if complaints:
        raise ValueError("; ".join(complaints))
    parts = [
        section(table, [run for run in found if table.holds(run)])
        for table in results.tables(found)
    ]
    return "\n".join([INTRODUCTION, *parts])


def main(arguments: list[str] | None = None) -> int:
    """Write or check the page; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    wanted = page()
    if parser.parse_args(arguments).check:
        if PAGE.exists() and PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{PAGE.name} is stale; do: python book/result_tables.py", file=sys.stderr)
        return 1
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
