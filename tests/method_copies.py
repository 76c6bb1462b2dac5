"""Run copied method files, each in a folder of its own; for tests/test_method_pages.py.

Usage: python method_copies.py FOLDER, where every FOLDER/*/ holds train.py and what it imports.
Prints a JSON object: folder -> names of the loaded modules that lie in it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def run(folder: Path) -> list[str]:
    """Run one folder's train.py; names of what it loaded from there. Forgets them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        exec(compile((folder / "train.py").read_text(encoding="utf-8"), "train.py", "exec"), {})
    finally:
        sys.path.remove(str(folder))
    files = {name: str(getattr(sys.modules[name], "__file__", "")) for name in set(sys.modules)}
    loaded = [name for name in set(files) - before if files[name].startswith(str(folder))]
    for name in set(files) - before:
        if name in loaded or name.split(".")[0] == "balance":
            del sys.modules[name]
    return sorted(loaded)


def main() -> None:
    import torch  # noqa: F401  # once, so that only what lies in the folders is loaded later

    found = {folder.name: run(folder) for folder in sorted(Path(sys.argv[1]).resolve().iterdir())}
    assert "mtl_tutorial" not in sys.modules, "the package itself was imported"
    print(json.dumps(found))


if __name__ == "__main__":
    main()
