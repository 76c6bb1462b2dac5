"""The files at the root agree with each other, and the repository holds nothing it should not."""

import re
import shutil
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import mtl_tutorial

ROOT = Path(__file__).resolve().parents[1]

TOP_LEVEL = {
    "book",
    "mtl_tutorial",
    "notebooks",
    "tests",
    "_config.yml",
    "environment.yml",
    # what a repository normally has at its root
    ".ci",
    ".gitattributes",
    ".github",
    ".gitignore",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "README.md",
    "pyproject.toml",
}

# A folder of somebody's machine, not part of a longer path, of an address or of a pattern. Found
# also as kernels' temporary folders, which notebooks keep in committed warnings. The user "ada"
# is made up: tests of such checks need an example.
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])(?<!:/)/(?:root|work|home|Users|mnt)/(?!ada\b)\w"
    r"|/tmp/ipykernel_\d"
    r"|\b[A-Z]:\\+Users\\+\w"
)


def _read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


PYPROJECT = tomllib.loads(_read("pyproject.toml"))
PROJECT = PYPROJECT["project"]


def _requirements() -> list[Requirement]:
    """Every dependency of the project, core and extras, without the project itself."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    requirements = [Requirement(text) for group in groups for text in group]
    return [r for r in requirements if canonicalize_name(r.name) != PROJECT["name"]]


@cache
def _tested_versions() -> dict[str, str]:
    """Package name to the version environment.yml pins."""
    dependencies = yaml.safe_load(_read("environment.yml"))["dependencies"]
    (from_pip,) = [entry["pip"] for entry in dependencies if isinstance(entry, dict)]
    lines = [line for line in from_pip if not line.startswith("-e ")]
    pairs = [re.sub(r"\[.*\]", "", line).split("==") for line in lines]
    assert all(len(pair) == 2 for pair in pairs), "expected 'name==version' in each line of pip"
    return {canonicalize_name(name): version for name, version in pairs}


@cache
def _tracked() -> list[str]:
    """Paths git knows, relative to the root."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone: lists the tracked files")
    # safe.directory: a clone owned by another user, as in containers, is read all the same.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in listed.stdout.split("\0") if path]


@pytest.mark.parametrize("requirement", _requirements(), ids=lambda r: r.name)
def test_each_dependency_is_pinned_within_its_bound(requirement: Requirement):
    pinned = _tested_versions().get(canonicalize_name(requirement.name))
    assert pinned, f"expected {requirement.name} in environment.yml"
    assert requirement.specifier.contains(Version(pinned), prereleases=True)


def test_environment_pins_nothing_else():
    declared = {canonicalize_name(requirement.name) for requirement in _requirements()}
    assert set(_tested_versions()) == declared


def test_environment_installs_this_clone_on_the_oldest_python():
    environment = yaml.safe_load(_read("environment.yml"))
    assert f"python={PROJECT['requires-python'].removeprefix('>=')}" in environment["dependencies"]
    assert "-e ." in environment["dependencies"][-1]["pip"]


def test_each_bound_has_its_reason_beside_it():
    array_line = re.compile(r'^    "(?P<text>[^"]+)",(?P<rest>.*)$', re.MULTILINE)
    comment_of = {m["text"]: m["rest"] for m in array_line.finditer(_read("pyproject.toml"))}
    texts = [
        *PYPROJECT["build-system"]["requires"],
        *PROJECT["dependencies"],
        *(text for extra in PROJECT["optional-dependencies"].values() for text in extra),
    ]
    for text in texts:
        assert text in comment_of, f"expected {text!r} on a line of its own in pyproject.toml"
        assert re.match(r"  # \S.{7,}", comment_of[text]), f"expected a reason behind {text!r}"


def test_each_dependency_has_a_bound():
    assert [r.name for r in _requirements() if not r.specifier] == []


def test_extras_are_spelt_as_metadata_spells_them():
    # The pip that comes with Python 3.11 takes `a_b` for an extra other than `a-b`, warns, and
    # installs neither.
    extras = [extra for requirement in _requirements() for extra in requirement.extras]
    assert extras
    assert [extra for extra in extras if extra != canonicalize_name(extra)] == []


def test_version_is_the_same_everywhere():
    assert "version" in PROJECT["dynamic"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "mtl_tutorial.__version__"
    }
    citation = yaml.safe_load(_read("CITATION.cff"))
    assert str(citation["version"]) == mtl_tutorial.__version__
    assert f"## [{mtl_tutorial.__version__}]" in _read("CHANGELOG.md")


def test_citation_agrees_with_pyproject():
    citation = yaml.safe_load(_read("CITATION.cff"))
    assert citation["license"] == PROJECT["license"]
    assert citation["repository-code"] == PROJECT["urls"]["Homepage"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]


def test_changelog_opens_with_unreleased():
    sections = re.findall(r"^## (.+)$", _read("CHANGELOG.md"), re.MULTILINE)
    assert sections[0] == "[Unreleased]"


def test_readme_names_commands_the_makefile_has():
    readme, makefile = _read("README.md"), _read("Makefile")
    named = set(re.findall(r"\bmake ([a-z]+)\b", readme))
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert {"demo", "test"} <= named
    assert named <= targets


def test_ci_runs_the_same_checks_in_both_places():
    local = re.search(r"^exec make ((?:[a-z]+ ?)+)", _read(".ci/run"), re.MULTILINE)
    assert local
    jobs = yaml.safe_load(_read(".github/workflows/ci.yml"))["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert commands == {f"make {target}" for target in local[1].split()}


def test_ci_tests_each_python_the_metadata_names():
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    jobs = yaml.safe_load(_read(".github/workflows/ci.yml"))["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python-version"] == named


def test_top_level_holds_only_what_it_may():
    assert {path.split("/")[0] for path in _tracked()} - TOP_LEVEL == set()


def test_files_that_must_be_there_are_tracked():
    missing = {"LICENSE", "README.md", "mtl_tutorial/py.typed", ".ci/run"} - set(_tracked())
    assert missing == set()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111, "expected .ci/run to be executable"


def test_no_file_names_a_path_of_some_machine():
    found = []
    for path in _tracked():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture; a file removed, not committed
            continue
        found += [f"{path}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("/".join(["see ", "root", "x"]), True),
        ("/".join(["file://", "home", "adam", "x.py"]), True),
        ("/".join(["https:", "", "home", "x"]), False),  # the host of an address
        ("/".join(['"', "home", "adam"]), True),
        ("/".join(['"', "home", "ada", "x.py"]), False),
        ("/".join(["https://example.org", "work", "x"]), False),
        ("/".join(["~", "work", "x"]), False),
        ("/".join(["", "tmp", "ipykernel_12", "1.py:3"]), True),
        ("\\".join(["C:", "Users", "ada"]), True),
    ],
)
def test_what_counts_as_a_path_of_some_machine(text: str, is_one: bool):
    assert bool(MACHINE_PATH.search(text)) is is_one


def _workflow(name: str) -> dict:
    return yaml.safe_load(_read(f".github/workflows/{name}.yml"))


def test_workflows_use_make_targets_that_exist_and_ask_for_no_more_than_they_need():
    targets = set(re.findall(r"^([a-z]+):", _read("Makefile"), re.MULTILINE))
    for path in sorted((ROOT / ".github/workflows").glob("*.yml")):
        workflow = _workflow(path.stem)
        assert workflow["permissions"] == {"contents": "read"}, path.name
        for job in workflow["jobs"].values():
            assert job["timeout-minutes"] <= 60, path.name
            for step in job["steps"]:
                command = step.get("run", "")
                if command.startswith("make "):
                    assert set(command.split()[1:]) <= targets, command


def test_release_is_published_by_trust_in_the_workflow_and_pages_from_the_built_book():
    release = _workflow("release")
    assert release[True]["push"]["tags"] == ["v*"]  # YAML reads a bare `on` as true
    assert release["jobs"]["pypi"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in _read(".github/workflows/release.yml")
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+"$', _read("mtl_tutorial/__init__.py"), re.M)
    built, deployed = _workflow("pages")["jobs"]["build"], _workflow("pages")["jobs"]["deploy"]
    assert {"run": "make book"} in built["steps"]
    assert deployed["permissions"] == {"pages": "write", "id-token": "write"}


@pytest.mark.parametrize("name", ["bug", "question", "method"])
def test_issue_forms_ask_for_what_an_answer_needs(name):
    form = yaml.safe_load(_read(f".github/ISSUE_TEMPLATE/{name}.yml"))
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert any(field.get("validations", {}).get("required") for field in form["body"])
