"""Write book/deviations.md: where papers and code differ, method by method.

Usage::

    python book/deviations.py            # write the page
    python book/deviations.py --check    # exit 1 if the page is not what would be written

What is written lies beside the tests that show it, in ``tests/methods/deviations_*.py``: a list
DEVIATIONS of entries with the keys of `FIELDS` and, where a method has several, a `topic`.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path

from tabulate import tabulate

from mtl_tutorial.methods import CLASSES

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "book" / "deviations.md"
SOURCES = ROOT / "tests" / "methods"

# Key of an entry -> who speaks, in the order of the table.
SPEAKERS = {
    "paper": "Paper",
    "official": "Official code",
    "torchjd": "TorchJD",
    "libmtl": "LibMTL",
    "ours": "**Here**",
}
FIELDS = ("method", *SPEAKERS, "test")
FAMILIES = {
    "loss": "Loss balancing",
    "gradient": "Gradient balancing",
    "schedule": "Schedules",
}
INTRODUCTION = """\
# Where papers and code differ

Two programs that carry the name of one method often take different steps. A paper leaves a case
open, its authors' code decides it, and libraries decide it again. This page lists, method by
method, what the paper says, what its authors' code does, what two widely used libraries do
([TorchJD](https://github.com/SimplexLab/TorchJD) and
[LibMTL](https://github.com/median-research-group/LibMTL)), and what this package does. Under each
table stands the test that shows our choice.

An empty cell means that there is nothing to report: no such code, no word on this point, or not
known to us. The libraries are described as of TorchJD 0.18 and LibMTL's repository of May 2025 or,
where a test runs it, its release 1.1.5; they may have changed since.
"""

Entry = dict[str, str]


def load(folder: Path = SOURCES) -> list[Entry]:
    """All entries of the data files in a folder, files in alphabetical order.

    Raises:
        ValueError: a file has no list DEVIATIONS, or an entry lacks a field, has an unknown one,
            or names an unknown method.
    """
    entries: list[Entry] = []
    for path in sorted(folder.glob("deviations_*.py")):
        found = runpy.run_path(str(path)).get("DEVIATIONS")
        if not isinstance(found, list):
            raise ValueError(f"{path.name}: expected a list DEVIATIONS, got {type(found).__name__}")
        for entry in found:
            if set(entry) - {"topic"} != set(FIELDS):
                raise ValueError(
                    f"{path.name}: expected the fields {', '.join(FIELDS)} (and topic), got "
                    f"{', '.join(entry)}"
                )
            if entry["method"] not in CLASSES:
                raise ValueError(f"{path.name}: expected a method, got {entry['method']!r}")
        entries += found
    return entries


def escape(text: str) -> str:
    """Text as a cell of a Markdown table: shown as it is, with `code` left alone."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([\\|*$<\[_{])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def section(entry: Entry) -> str:
    """Topic, table and test of one entry."""
    rows = [[speaker, escape(entry[key])] for key, speaker in SPEAKERS.items()]
    table = tabulate(rows, headers=["", "What it does"], tablefmt="pipe")
    topic = entry.get("topic", "")
    title = f"**{escape(topic[:1].upper() + topic[1:])}**\n\n" if topic else ""
    file, name = entry["test"].split("::")
    return f"{title}{table}\n\nShown by `{name}` in `{file}`.\n"


def page(entries: list[Entry]) -> str:
    """The page in Markdown, methods by family and title."""
    parts = [INTRODUCTION]
    for family, heading in FAMILIES.items():
        members = [cls for cls in CLASSES.values() if cls.family == family]
        written = [
            (cls, [entry for entry in entries if entry["method"] == cls.name])
            for cls in sorted(members, key=lambda cls: cls.title.lower())
        ]
        if any(found for _, found in written):
            parts.append(f"## {heading}\n")
        for cls, found in written:
            if found:
                parts.append(f"### {cls.title} (`{cls.name}`)\n")
                parts += [section(entry) for entry in found]
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or check that it is fresh."""
    parser = argparse.ArgumentParser(description="Write book/deviations.md.")
    parser.add_argument("--check", action="store_true", help="exit 1 if the page is stale")
    options = parser.parse_args(arguments)
    text = page(load())
    if options.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print(
            f"expected {PAGE.name} to be up to date; do: python book/deviations.py", file=sys.stderr
        )
        return 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
