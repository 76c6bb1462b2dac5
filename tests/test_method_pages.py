"""Each method's reference page, and each method's file run by itself as the page says."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mtl_tutorial.methods import CLASSES

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mtl_tutorial"
FILES = sorted(path.stem for path in (PACKAGE / "methods").glob("[!_]*.py"))


@pytest.fixture(scope="module")
def pages():
    pytest.importorskip("sphinx", reason="the extension belongs to the book's tools")
    sys.path.insert(0, str(ROOT / "book" / "_ext"))
    try:
        yield importlib.import_module("method_pages")
    finally:
        sys.path.remove(str(ROOT / "book" / "_ext"))


def test_every_file_has_a_page_and_every_page_a_file():
    found = {
        path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "book/methods").iterdir()
    }
    assert found == {name: f"<!-- method: {name} -->\n" for name in FILES}


def test_pages_are_in_the_table_of_contents():
    toc = yaml.safe_load((ROOT / "book/_toc.yml").read_text(encoding="utf-8"))
    entries = [entry for part in toc["parts"] for entry in part["chapters"]]
    parent = next(entry for entry in entries if entry["file"] == "book/api_methods")
    assert parent["sections"] == [{"glob": "book/methods/*"}]


def test_every_method_is_on_a_page_with_its_name_paper_and_file(pages):
    shown = [cls for name in FILES for cls in pages.classes(name)]
    assert sorted(cls.name for cls in shown) == sorted(CLASSES)
    for name in FILES:
        text = pages.page(name)
        for cls in pages.classes(name):
            assert f"| `{cls.name}` | {cls.title} | {cls.paper} |" in text
            assert cls.title in text.splitlines()[0]
        assert f"literalinclude}} ../../mtl_tutorial/methods/{name}.py\n" in text
        assert "MIT" in text
        for file in pages.neighbours(name):
            assert f"<../../mtl_tutorial/{file}>" in text


def test_files_say_themselves_what_they_need(pages):
    for name in FILES:
        source = (PACKAGE / "methods" / f"{name}.py").read_text(encoding="utf-8")
        said = "needs torch, gradients.py and solvers.py" in source
        assert said == ("solvers.py" in pages.neighbours(name)), name
        assert set(pages.neighbours(name)) <= {"gradients.py", "solvers.py"}, name


def test_chapters_named_for_methods_are_of_known_files_and_shown_once_written(pages):
    for chapter, covered in pages.CHAPTERS.items():
        assert set(covered) <= set(FILES), chapter
    written = pages.written_chapters()
    for chapter in written & set(pages.CHAPTERS):
        for name in pages.CHAPTERS[chapter]:
            assert f"{{doc}}`../../notebooks/{chapter}`" in pages.page(name)
    assert "32_imtl" in written


def test_mark_of_no_file_is_refused(pages):
    with pytest.raises(pages.ExtensionError, match="got 'imtk'"):
        pages.fill_marks(None, "book/methods/imtk", ["<!-- method: imtk -->\n"])


def copy(pages, name, cls, folder, flat=False):
    """What the page of a file tells its reader to do."""
    home = folder if flat else folder / "balance"
    (home if flat else home / "methods").mkdir(parents=True)
    target = (home if flat else home / "methods") / f"{name}.py"
    shutil.copy(PACKAGE / "methods" / f"{name}.py", target)
    for file in pages.neighbours(name):
        shutil.copy(PACKAGE / file, home / file)
    script = pages.loop(name, cls)
    if flat:
        source = target.read_text(encoding="utf-8")
        target.write_text(re.sub(r"^from \.\.", "from ", source, flags=re.M), encoding="utf-8")
        script = script.replace("from balance.methods.", "from ")
    (folder / "train.py").write_text(script, encoding="utf-8")


def test_every_file_runs_alone(pages, tmp_path):
    expected = {}
    for name in FILES:
        for cls in pages.classes(name) or [None]:
            label = cls.name if cls else name
            copy(pages, name, cls, tmp_path / label)
            beside = [f"balance.{Path(file).stem}" for file in pages.neighbours(name)]
            expected[label] = sorted([*beside, f"balance.methods.{name}"])
        copy(pages, name, None, tmp_path / f"flat-{name}", flat=True)
        expected[f"flat-{name}"] = sorted([*(Path(f).stem for f in pages.neighbours(name)), name])
    command = [
        sys.executable,
        "-W",
        "error",
        "-I",
        str(ROOT / "tests/method_copies.py"),
        str(tmp_path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected
