"""The command line: every command, every wrong argument in one line, interruption, terminals."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import Tiny, without_times

import mtl_tutorial
from mtl_tutorial import benchmarks, cli, methods, results, training

pytestmark = pytest.mark.usefixtures("tiny_is_known")
TINY = [sys.executable, str(Path(__file__).with_name("tiny.py"))]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mtl-tutorial", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods, two seeds, trained once for all tests that only read."""
    root = tmp_path_factory.mktemp("results")
    specs = training.parse_specs("single_task,equal")
    cells = [
        training.Cell("tiny", "quick", Tiny.protocols["quick"], spec, seed)
        for spec in specs
        for seed in range(2)
    ]
    benchmarks.CLASSES["tiny"] = Tiny
    try:
        list(training.sweep(cells, root, training.pick_device("cpu")))
    finally:
        del benchmarks.CLASSES["tiny"]
    return root


# ---------------------------------------------------------------------------------- commands


def test_version_and_module_entry():
    command = [sys.executable, "-m", "mtl_tutorial", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"mtl-tutorial {mtl_tutorial.__version__}\n")
    assert done.stderr == ""


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(call, arguments):
    code, out, err = call(*arguments)
    assert code == 0
    assert err == ""
    for command in ("list", "run", "table", "plot", "info"):
        assert re.search(rf"^  {command} ", out, re.MULTILINE)


@pytest.mark.parametrize("command", ["list", "run", "table", "plot", "info"])
def test_every_command_has_help(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert "--json" in out


def test_list(call):
    code, out, err = call("list")
    assert (code, err) == (0, "")
    for name in (*methods.available(), *benchmarks.available()):
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    # Nothing is folded where there is no terminal: one line per row.
    assert len(out.splitlines()) == len(methods.CLASSES) + len(benchmarks.CLASSES) + 5


def test_list_as_json(call):
    code, out, _ = call("list", "--json")
    data = json.loads(out)
    assert code == 0
    assert [row["method"] for row in data["methods"]] == methods.available()
    assert [row["benchmark"] for row in data["benchmarks"]] == benchmarks.available()
    equal = next(row for row in data["methods"] if row["method"] == "equal")
    assert equal["family"] == "loss"
    assert equal["backward passes"] == "1"


@pytest.mark.parametrize("columns", [80, 100, 130])
def test_list_is_folded_to_a_terminal(call, monkeypatch, columns):
    code, whole, _ = call("list")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = call("list")
    assert code == 0
    lines = out.splitlines()
    assert max(map(len, lines)) <= columns
    assert ("(no room for: state, waits for device; see --json)" in lines) == (columns == 80)
    assert len(lines) > len(whole.splitlines())
    for name in methods.available():
        assert any(line.split()[:1] == [name] for line in lines)


def test_run_says_plain_lines_and_the_table(call, tmp_path):
    arguments = ("run", "tiny", "--methods", "single_task,equal", "--seeds", 1, "--device", "cpu")
    code, out, err = call(*arguments, "--out", tmp_path)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    pattern = r"\[{}/2\] {} seed 0: left accuracy \d+\.\d\d, right accuracy \d+\.\d\d \(\d+\.\d s\)"
    assert re.fullmatch(pattern.format(1, "single_task"), lines[0])
    assert re.fullmatch(pattern.format(2, "equal"), lines[1])
    assert lines[2] == f"2 of 2 runs are done; results in {tmp_path}"
    assert lines[4].startswith("tiny, budget quick: 2 epochs, batch 40")
    assert "\x1b" not in out

    code, out, _ = call(*arguments, "--out", tmp_path)
    assert code == 0
    assert out.splitlines()[1].endswith("(done before)")
    assert out.splitlines()[2:] == lines[2:]


def test_run_as_json(call, tmp_path):
    code, out, err = call(
        *("run", "tiny", "--methods", "equal,rlw:seed=3", "--seeds", 2, "--json"),
        *("--device", "cpu", "--out", tmp_path),
    )
    data = json.loads(out)
    assert (code, err) == (0, "")
    assert data["out"] == str(tmp_path)
    assert data["results"] == sorted(map(str, tmp_path.rglob("seed*.json")))
    assert len(data["results"]) == 4
    assert all(results.read_result(Path(path))["finished"] for path in data["results"])


def test_run_of_toy_end_to_end(call, tmp_path, monkeypatch):
    monkeypatch.setattr("mtl_tutorial.benchmarks.toy.STEPS_PER_EPOCH", 20)
    short = {"quick": benchmarks.Protocol(epochs=1, batch_size=1, lr=0.1)}
    monkeypatch.setattr(benchmarks.Toy, "protocols", short)
    code, out, _ = call(
        *("run", "toy", "--methods", "single_task,aligned_mtl", "--seeds", 2),
        *("--device", "cpu", "--out", tmp_path),
    )
    assert code == 0
    assert "4 of 4 runs are done" in out
    assert "toy (synthetic), budget quick" in out
    row = next(x for x in out.splitlines() if x.startswith("aligned_mtl"))
    assert row.count("±") == 2  # no Delta m, losses may be negative


def test_run_leaves_out_what_does_not_fit(call, tmp_path, monkeypatch):
    monkeypatch.setattr(methods.CLASSES["ngdiff"], "n_tasks", 3)
    monkeypatch.setattr(training.methods, "available", lambda: ["equal", "ngdiff"])
    arguments = ("--seeds", 1, "--device", "cpu", "--out", tmp_path)
    code, out, err = call("run", "tiny", "--methods", "all", *arguments)
    assert code == 0
    assert err == "left out: ngdiff needs 3 tasks, this benchmark has 2\n"
    assert "2 of 2 runs are done" in out
    code, _, err = call("run", "tiny", "--methods", "ngdiff", *arguments)
    assert code == 2
    assert "ngdiff needs 3 tasks" in err


def test_run_says_what_failed_and_exits_well(call, tmp_path, monkeypatch):
    def fail(*_):
        raise FloatingPointError("equal: expected finite losses and gradients")

    monkeypatch.setattr(training.Run, "step", fail)
    code, out, _ = call(
        "run", "tiny", "--methods", "equal", "--seeds", 1, "--device", "cpu", "--out", tmp_path
    )
    assert code == 0
    assert "equal seed 0: failed, epoch 1: equal: expected finite" in out
    assert "0 of 1 runs are done" in out


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex"])
def test_table(call, folder, form):
    code, out, err = call("table", folder, "--format", form)
    assert (code, err) == (0, "")
    assert re.search("single.{0,3}task", out)
    assert "±" in out
    assert out == results.render(results.tables(results.load_results(folder)[0])[0], form) + "\n"


def test_table_as_json_is_one_list(call, folder, tmp_path):
    for arguments in (["--json"], ["--format", "json"]):
        code, out, _ = call("table", folder, *arguments)
        assert code == 0
        (table,) = json.loads(out)
        assert [row["label"] for row in table["rows"]] == ["single_task", "equal"]
    one = results.load_results(folder)[0][0]
    results.write_result(tmp_path / "seed0-a.json", one)
    results.write_result(tmp_path / "seed0-b.json", one | {"budget": "full"})
    code, out, _ = call("table", tmp_path, "--json")
    assert [table["budget"] for table in json.loads(out)] == ["quick", "full"]


def test_table_complains_about_a_broken_file_and_goes_on(call, folder, tmp_path):
    one = results.load_results(folder)[0][0]
    results.write_result(tmp_path / "seed0-a.json", one)
    (tmp_path / "seed1-a.json").write_text("{")
    code, out, err = call("table", tmp_path)
    assert code == 0
    assert one["label"] in out
    assert err.count("\n") == 1
    assert "seed1-a.json" in err


def test_plot(call, folder, tmp_path):
    code, out, err = call("plot", folder, "--out", tmp_path / "figures")
    assert (code, err) == (0, "")
    paths = [line.removeprefix("figure written: ") for line in out.splitlines()]
    assert sorted(paths) == sorted(map(str, (tmp_path / "figures").iterdir()))
    assert len(paths) == 4


def test_plot_as_json_next_to_the_results(call, folder, tmp_path):
    one = results.load_results(folder)[0][0]
    results.write_result(tmp_path / "seed0-a.json", one)
    code, out, _ = call("plot", tmp_path, "--json")
    assert code == 0
    assert {Path(path).parent for path in json.loads(out)["figures"]} == {tmp_path / "figures"}


def test_info(call):
    code, out, err = call("info", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["mtl_tutorial"] == mtl_tutorial.__version__
    assert {"python", "torch", "numpy", "platform", "device", "cuda", "threads"} <= set(facts)
    code, out, _ = call("info")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(facts)


# ------------------------------------------------------------------------------ wrong arguments

WRONG = [
    (["nosuch"], "No such command 'nosuch'"),
    (["--nosuch"], "No such option"),
    (["run"], "Missing argument 'BENCHMARK'"),
    (["run", "multidigit"], "multidigits"),
    (["run", "tiny", "more"], "unexpected extra argument"),
    (["run", "tiny", "--methods", "aligned"], "aligned_mtl"),
    (["run", "tiny", "--methods", ""], "at least one method"),
    (["run", "tiny", "--methods", "equal:reduction=max"], "reduction"),
    (["run", "tiny", "--methods", "equal:nosuch=1"], "nosuch"),
    (["run", "tiny", "--methods", "rlw:seed=abc"], "expected settings that rlw takes"),
    (["run", "tiny", "--methods", "equal:level=other"], "expected level parameter or feature"),
    (["run", "tiny", "--methods", "config:preference=(1,2,3)"], "preference"),
    (["run", "toy", "--methods", "mgda:level=feature"], "leave level out"),
    (["run", "tiny", "--seeds", "0"], "expected --seeds of 1 or more, got 0"),
    (["run", "tiny", "--seeds", "-1"], "got -1"),
    (["run", "tiny", "--seeds", "three"], "not a valid integer"),
    (["run", "tiny", "--threads", "0"], "expected --threads of 1 or more, got 0"),
    (["run", "tiny", "--budget", "huge"], "expected budget quick or full, got 'huge'"),
    (["run", "tiny", "--device", "tpu"], "expected device auto, cpu or cuda, got 'tpu'"),
    (["run", "tiny", "--out", "FILE", "--methods", "equal"], "FILE"),
    (["table"], "Missing argument 'FOLDER'"),
    (["table", "NONE"], "does not exist; make one with `mtl-tutorial run`"),
    (["table", "FILE"], "is a file"),
    (["table", "EMPTY"], "found none"),
    (["table", "EMPTY", "--format", "html"], "expected --format text, markdown"),
    (["plot", "NONE"], "does not exist"),
    (["plot", "EMPTY"], "found none"),
    (["list", "--format"], "No such option"),
    (["info", "extra"], "unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "why"), WRONG, ids=[" ".join(a) for a, _ in WRONG])
def test_wrong_arguments_give_one_line_and_exit_code_2(call, tmp_path, monkeypatch, arguments, why):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("kept")
    Path("EMPTY").mkdir()
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("mtl-tutorial: ")
    assert err.count("\n") == 1
    assert why in err
    assert "Traceback" not in err
    assert Path("FILE").read_text() == "kept"


# -------------------------------------------------------------------- interruption, terminals


def environment(**more):
    names = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    return {**names, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more}


def test_ctrl_c_keeps_what_is_done_and_the_same_command_completes(call, tmp_path):
    arguments = ["run", "tiny", "--methods", "equal,dwa", "--seeds", "1", "--budget", "full"]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        TINY + arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # A shell's background job ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 90
        while not list(tmp_path.glob("out/tiny/full/dwa/*.ckpt")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1] == (
        "interrupted; finished runs are kept and the current one goes on from its last checkpoint: "
        "give the same command again"
    )
    assert "[1/2] equal seed 0" in out
    assert "dwa" not in out
    (checkpoint,) = tmp_path.glob("out/tiny/full/dwa/*.ckpt")

    code, out, _ = call(*arguments)
    assert code == 0
    assert "[1/2] equal seed 0" in out
    assert "(done before)" in out.splitlines()[0]
    assert "2 of 2 runs are done" in out
    assert not checkpoint.exists()
    resumed = results.read_result(checkpoint.with_suffix(".json"))
    assert [h["epoch"] for h in resumed["history"]] == list(range(1, 41))
    cell = training.Cell("tiny", "full", Tiny.protocols["full"], training.parse_spec("dwa"), 0)
    (whole,) = training.sweep([cell], tmp_path / "whole", training.pick_device("cpu"))
    assert without_times(resumed) == without_times(json.loads(json.dumps(whole.result)))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_progress_bars_on_a_terminal(tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    arguments = ["run", "tiny", "--methods", "equal,dwa", "--seeds", "1", "--device", "cpu"]
    process = subprocess.Popen(
        [*TINY, *arguments, "--out", str(tmp_path)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment(TERM="xterm-256color"),
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    assert process.stdout is not None
    out = process.stdout.read().decode()
    process.stdout.close()
    assert process.wait(60) == 0
    text = seen.decode()
    assert "\x1b[" in text
    assert "━" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert re.search(r"runs +━+ 2/2 \d:\d\d:\d\d", plain)
    assert re.search(r"dwa seed 0 +━+ 2/2", plain)
    assert re.search(r"equal seed 0: left accuracy \d+\.\d\d", plain)
    # Standard output stays clean: the summary and the table, nothing of the bars.
    assert out.splitlines()[0] == f"2 of 2 runs are done; results in {tmp_path}"
    assert "\x1b" not in out
    assert "━" not in out


def test_the_first_process_of_torchrun_waits_and_prints_what_all_did(call, tmp_path, monkeypatch):
    what = training.Cell("tiny", "quick", Tiny.protocols["quick"], training.parse_spec("equal"), 0)
    arguments = ("run", "tiny", "--methods", "equal", "--seeds", 1, "--device", "cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    held = threading.Event()

    def other():
        with training.claim(what, tmp_path):
            held.set()
            time.sleep(1)

    for rank, said in (
        ("1", "rank 1: 0 of 1 runs were done here\n"),
        ("0", "1 of 1 runs are done"),
    ):
        monkeypatch.setenv("RANK", rank)
        thread = threading.Thread(target=other)
        thread.start()
        held.wait(10)
        code, out, err = call(*arguments, "--out", tmp_path)
        thread.join()
        held.clear()
        assert (code, err) == (0, "")
        assert said in out
        assert ("tiny, budget quick" in out) == (rank == "0")


def test_many_scores_are_averaged_in_the_line_of_a_run():
    few = {"left": {"accuracy": 50.0}, "right": {"accuracy": None}}
    assert cli._scores({"test": few}) == [("left accuracy", 50.0), ("right accuracy", None)]
    many = {f"task {k}": {"error": float(k), "F1": None} for k in range(9)}
    want = [("error, mean of 9 tasks", 4.0), ("F1, mean of 0 tasks", None)]
    assert cli._scores({"test": many}) == want
