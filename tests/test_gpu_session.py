"""``make gpu``: a stage that crashes or runs too long costs its own figures and no other's."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import conftest
import pytest
import torch
from recordings import recording, row

from mixft.benchmarks import gpu, publish
from mixft.benchmarks.gpu import SHARES, Outcome, Session, benchmark, main, run_all, run_stage

# Stands for mixft: ``bench`` measures one case after another, and does what a case's name says.
STAND_IN = """
import json, os, sys, time
command, *arguments = sys.argv[1:]
file = arguments[arguments.index("--json") + 1] if "--json" in arguments else None
rows = []
for case in arguments[: arguments.index("--device")] if command == "bench" else []:
    if case == "crash":
        os.kill(os.getpid(), 9)
    if case == "error":
        raise RuntimeError("an error of the code")
    if case == "hang":
        time.sleep(60)
    rows.append({"case": case})
    open(file, "w").write(json.dumps({"rows": rows}))
print(command, "ran")
sys.exit(3 if command == "doctor" else 1 if "wrong" in arguments else 0)
"""


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    monkeypatch.setattr(gpu, "MIXFT", [sys.executable, "-c", STAND_IN])
    return Session(tmp_path / "cuda.json", "cuda", 60)


def python(source: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(source)]


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [("print('seen')", "done", 0), ("print('seen'); exit(4)", "failed", 4), ("import os; os.abort()", "failed", -6)],
)
def test_a_stage_says_how_it_ended(source, status, code):
    outcome = run_stage("a", python(source), 60)
    assert (outcome.status, outcome.exit_code) == (status, code)
    assert "abort" in source or outcome.output == "seen\n"


def test_a_stage_out_of_time_is_asked_to_stop_and_then_ended(session, tmp_path):
    mark = tmp_path / "mark"
    source = f"""
        import subprocess, sys, time
        stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", stubborn])
        try:
            print(child.pid, flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            open({str(mark)!r}, "w").write("written in time")
    """
    start = time.monotonic()
    outcome = run_stage("a", python(source), 3)
    assert time.monotonic() - start < 10
    assert (outcome.status, outcome.exit_code) == ("cut off", None)
    assert mark.read_text() == "written in time"
    time.sleep(0.2)
    state = Path(f"/proc/{int(outcome.output.split()[0])}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_process_that_ignores_the_request_is_killed(session):
    source = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    assert run_stage("a", python(source), 1).status == "cut off"
    assert time.monotonic() - start < 10


def test_all_that_a_stage_printed_is_kept_where_it_is_not_done(session, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "OUTPUT", 10)
    whole = tmp_path / "cuda.log"
    session.stage("tests", python("print('x' * 50)"), whole=whole)
    assert not whole.exists()
    session.stage("tests", python("print('x' * 50); exit(1)"), whole=whole)
    assert whole.read_text() == "x" * 50 + "\n"
    assert len(session.document["stages"][1]["output"]) == 10


def test_the_tests_of_a_gpu_name_every_file_that_fails_to_load_and_end_a_process_that_hangs(monkeypatch, session):
    commands = {}

    def stage(name, command, limit, fine=(0,), whole=None):
        commands[name] = command, whole
        return Outcome(name, "done", 1.0, 0, json.dumps({"environment": {}, "cases": []}))

    monkeypatch.setattr(gpu, "run_stage", stage)
    run_all(session, quick=False)
    command, whole = commands["tests"]
    assert {"--continue-on-collection-errors", "--timeout-method=thread"} <= set(command)
    assert whole == session.path.with_suffix(".log")


def test_kernels_are_tested_before_what_calls_them(monkeypatch):
    above, first, second = (
        SimpleNamespace(fixturenames=names) for names in (["native_device"], ["device"], ["device", "monkeypatch"])
    )
    for on_gpu, expected in ((False, [above, first, second]), (True, [first, second, above])):
        monkeypatch.setattr(conftest, "HAS_GPU", on_gpu)
        items = [above, first, second]
        conftest.pytest_collection_modifyitems(items)
        assert items == expected


@pytest.mark.parametrize("worker", [False, True])
def test_a_test_that_breaks_the_gpu_ends_its_process(monkeypatch, worker):
    def broken():
        raise RuntimeError("an illegal memory access was encountered")

    ended = []
    conftest.pytest_runtest_logfinish("before")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    conftest.pytest_runtest_logfinish("sound")
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    if worker:
        monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
        # Stands for the end of the process, which pytest's is in the place of.
        monkeypatch.setattr(pytest, "exit", lambda *_, **__: None)
        conftest.pytest_runtest_logfinish("broken")
        assert ended == [1]
    else:
        with pytest.raises(pytest.exit.Exception, match="broken has broken the GPU for this process: an illegal"):
            conftest.pytest_runtest_logfinish("broken")
        assert not ended


def test_a_stage_leaves_the_shares_of_those_after_it(session):
    whole = sum(SHARES.values())
    assert session.limit("install") == pytest.approx(60 * SHARES["install"] / whole, rel=0.01)
    assert session.limit("tune") == pytest.approx(60, rel=0.01)
    session.deadline = 0
    assert session.limit("bench") == 0


def test_benchmarks_go_on_behind_a_case_that_ends_the_process(session):
    benchmark(session, ["a", "crash", "b", "error", "c"], [])
    assert [found["case"] for found in session.document["recording"]["rows"]] == ["a", "b", "c"]
    stages = session.document["stages"]
    assert [stage["status"] for stage in stages] == ["failed", "failed", "done"]
    assert "crash ended the process with exit code -9" in stages[0]["output"]
    assert "error ended the process with exit code 1" in stages[1]["output"]
    assert json.loads(session.path.read_text()) == session.document
    assert list(session.path.parent.iterdir()) == [session.path]


def test_a_wrong_output_is_no_crash(session):
    benchmark(session, ["a", "wrong"], [])
    assert [stage["status"] for stage in session.document["stages"]] == ["done"]


def test_benchmarks_that_are_cut_off_keep_what_they_have(session):
    session.deadline = time.monotonic() + 3
    benchmark(session, ["a", "hang", "b"], [])
    assert [found["case"] for found in session.document["recording"]["rows"]] == ["a"]
    assert [stage["status"] for stage in session.document["stages"]] == ["cut off"]


def run_with(monkeypatch, session, statuses: dict[str, str]) -> int:
    inventory = json.dumps({"environment": {"commit": "abc"}, "cases": ["a"]})
    ran = []

    def stage(name, command, limit, fine=(0,), whole=None):
        ran.append(name)
        assert limit > 0
        return Outcome(name, statuses.get(name, "done"), 1.0, 0, inventory if name == "inventory" else "")

    monkeypatch.setattr(gpu, "run_stage", stage)
    monkeypatch.setattr(gpu, "collect", lambda document, part: {"a"})
    code = run_all(session, quick=True)
    assert ran == list(SHARES)
    return code


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        ({}, 0),
        ({"bench": "cut off", "tune": "cut off"}, 0),
        ({"tests": "failed"}, 1),
        ({"tests": "cut off"}, 1),
        ({"install": "failed"}, 1),
        ({"tune": "failed"}, 1),
    ],
)
def test_every_stage_runs_and_the_exit_code_says_whether_one_failed(monkeypatch, session, statuses, code):
    assert run_with(monkeypatch, session, statuses) == code
    assert json.loads(session.path.read_text())["environment"] == {"commit": "abc"}


def test_chosen_stages_share_the_time_and_no_other_runs(monkeypatch, tmp_path):
    ran = {}

    def stage(name, command, limit, fine=(0,), whole=None):
        ran[name] = limit
        return Outcome(name, "done", 1.0, 0, json.dumps({"environment": {}, "cases": []}))

    monkeypatch.setattr(gpu, "run_stage", stage)
    assert main(["--results", str(tmp_path), "--budget", "130", "--stages", "tune"]) == 0
    assert list(ran) == ["install", "inventory", "tune"]
    chosen = sum(SHARES[name] for name in ran)
    assert ran["install"] == pytest.approx(130 * SHARES["install"] / chosen, rel=0.02)


def test_an_unknown_stage_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--results", str(tmp_path), "--stages", "tests,benchmarks"])
    assert "there is no stage 'benchmarks'; there are install," in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def inventory(*arguments: str) -> dict:
    run = subprocess.run([sys.executable, "-c", gpu.INVENTORY, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_inventory_takes_one_case_of_each_family_in_turn():
    found = inventory("cpu", "quick", "linear/*", "unscale/*")
    families = [name.split("/")[0] for name in found["cases"]]
    assert families[:4] == ["linear", "unscale", "linear", "unscale"]
    assert set(families[4:]) == {"linear"}
    assert {"torch", "commit"} <= set(found["environment"])


def test_without_the_inventory_the_rest_still_runs(monkeypatch, session):
    ran = []

    def stage(name, command, limit, fine=(0,), whole=None):
        ran.append(name)
        return Outcome(name, "failed", 1.0, 1, "no such module")

    monkeypatch.setattr(gpu, "run_stage", stage)
    assert run_all(session, quick=False) == 1
    assert ran == ["install", "inventory", "doctor", "tests", "tune"]
    assert {stage["name"]: stage["status"] for stage in session.document["stages"]}["bench"] == "skipped"


def test_the_file_is_one_of_the_results(session):
    session.document["recording"] = recording([row("a/1")], device="cuda")
    session.write()
    assert publish.load(session.path.parent).recordings["cuda"]["rows"][0]["case"] == "a/1"


def test_a_request_to_end_leaves_the_file(tmp_path, monkeypatch, capsys):
    def ended(session, quick, patterns):
        session.write()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpu, "run_all", ended)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--results", str(tmp_path / "new"), "--device", "cpu"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    (file,) = (tmp_path / "new").iterdir()
    assert file.name in capsys.readouterr().err


def test_a_request_to_end_the_benchmarks_keeps_what_they_have(monkeypatch, session):
    def ended(name, command, limit, fine):
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"rows": [{"case": "a/1"}]}), encoding="utf-8")
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_stage", ended)
    with pytest.raises(KeyboardInterrupt):
        benchmark(session, ["a/1", "a/2"], [])
    (file,) = session.path.parent.glob("*.json")
    assert json.loads(file.read_text(encoding="utf-8"))["recording"]["rows"] == [{"case": "a/1"}]


def test_the_script_runs_before_mixft_is_installed():
    run = subprocess.run([sys.executable, "-S", gpu.__file__, "--help"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
