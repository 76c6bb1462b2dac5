"""Write book/results.md: every committed table, with the command that repeats it.

Usage::

    python book/result_tables.py            # write the page
    python book/result_tables.py --check    # exit 1 if the page is not what would be written

The page is made from the result files below ``book/results``, from the figures that papers print,
in ``book/published.toml``, and from nothing else.
"""

from __future__ import annotations

import argparse
import math
import sys
import tomllib
from pathlib import Path
from typing import Any

from tabulate import tabulate

from mtl_tutorial import benchmarks, results

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "results.md"
STORE = ROOT / "book" / "results"
PUBLISHED = ROOT / "book" / "published.toml"

INTRODUCTION = """\
# Results

Every table that this repository holds result files for. Means and sample standard deviations over
the seeds; $\\Delta m$ against the single-task row of the same table, negative where sharing helps;
the mean rank is over all metrics of the table and leaves the single-task row out. Methods stand in
the order of their mean rank, which with three seeds is no order of merit: look at the deviations
first.

All methods of a table share one protocol and run with their default settings unless the label
names others. Where a header names several learning rates, each was tried for every method with
seed 0, and the one with the best validation scores trained the other seeds; with label noise a
method keeps the rate that it has without. Cross-learning keeps a copy of the parameters per task:
its row scores the centre of the copies.

The column "vs equal" compares with equal weighting under the same seed: it is $\\Delta m$ against
that run, mean and deviation over the seeds, so what a seed does to all methods alike drops out.

The budgets called `cpu` are small on purpose: all runs of this page were made on two CPU cores,
many at a time on a machine that did other work as well, which shows in the seconds per epoch.
NGDiff is made for forgetting one task while another is kept; its row shows what it does where
both should be learnt.
"""


PUBLISHED_INTRODUCTION = """\
## Published figures

What papers print for data sets that this repository cannot hold. **None of these figures was
obtained here**; each row names the paper and, where it is known, the table. The last column is for
the $\\Delta m$ of a run of this package: it is blank until somebody has run the command below the
table with the data at hand and put the files where the command writes them, and then a full table
of the run stands above. Two papers' rows of one method can lie far apart: see Aligned-MTL on NYUv2.
"""


def options(protocol: dict[str, Any]) -> str:
    """What the command line must say of a protocol that its name does not."""
    said = ""
    if protocol.get("precision", "float32") != "float32":
        said += f" --precision {protocol['precision']}"
    if protocol.get("accumulate", 1) > 1:
        said += f" --accumulate {protocol['accumulate']}"
    return said + (" --channels-last" if protocol.get("channels_last") else "")


def run_command(what: str, labels: list[str], seeds: int, how: str) -> str:
    """The command that trains methods on a benchmark, on several lines."""
    lines = ["methods=" + ",".join(labels[:4])]
    rest = range(4, len(labels), 4)
    lines += ["methods=$methods," + ",".join(labels[i : i + 4]) for i in rest]
    lines.append(f"mtl-tutorial run {what} --methods $methods --seeds {seeds} \\")
    lines.append(f"    {how} --out book/results")
    return "\n".join(lines)


def command(table: results.Table) -> str:
    """The command that repeats a table, on several lines."""
    labels = [row.label for row in table.rows]
    seeds = 1 + max((seed for row in table.rows for seed in row.seeds), default=0)
    noise = f" --noise {table.noise}" if table.noise else ""
    how = f"--budget {table.budget}{noise}{options(table.protocol)}"
    return run_command(table.benchmark, labels, seeds, how)


def published(tables: list[results.Table]) -> str:
    """The figures that papers print, beside Delta m of the tables where there is one."""
    parts = [PUBLISHED_INTRODUCTION]
    text = PUBLISHED.read_text(encoding="utf-8")
    for known in tomllib.loads(text, parse_float=str)["table"]:  # 57.20 stays 57.20
        which = (known["benchmark"], known["protocol"])
        ours = {
            row.label: f"{row.delta_m[0]:.2f}"
            for table in tables
            if (table.benchmark, table.budget) == which
            for row in table.rows
            if not math.isnan(row.delta_m[0])
        }
        body = tabulate(
            [
                [name, source, *values, ours.get(label, "")]
                for name, label, source, *values in known["rows"]
            ],
            headers=["method", "printed in", *known["columns"], "Delta m here"],
            tablefmt="github",
            disable_numparse=True,
        )
        labels = list(dict.fromkeys(label for _, label, *_ in known["rows"] if label))
        part = f"### {known['title']}\n\n{body}\n"
        if known["notes"]:
            part += "\n" + " ".join(known["notes"]) + "\n"
        if known["protocol"]:
            how = run_command(which[0], labels, 3, f"--protocol {which[1]}")
            part += f"\n```bash\n{how}\n```\n"
        parts.append(part)
    return "\n".join(parts)


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
    tables = results.tables(found)
    parts = [section(table, [run for run in found if table.holds(run)]) for table in tables]
    return "\n".join([INTRODUCTION, *parts, published(tables)])


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
