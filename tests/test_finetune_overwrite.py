"""`mixft finetune --overwrite` and runs that fail: old runs are lost to finished new ones only, other files never."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_bert import rows, save_tiny_bert, write_csv

from mixft.cli import main
from mixft.cli.output_folder import claim
from mixft.cli.process import run_in_process


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overwrite")
    save_tiny_bert(folder / "model")
    write_csv(folder / "train.csv", rows(40))
    return folder


def command(folder, *more):
    files = ("--model", str(folder / "model"), "--train", str(folder / "train.csv"))
    return ["finetune", *files, "--device", "cpu", "--batch-size", "8", "--max-length", "24", *more]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def old_run(out, name):
    (out / name).mkdir(parents=True)
    (out / name / "train.log").write_text("old")
    (out / "report.json").write_text("old")


@pytest.mark.parametrize("option", ["--model", "--train", "--eval"])
def test_overwrite_spares_what_it_reads(folder, tmp_path, capsys, option):
    out = tmp_path / "out"
    old_run(out, "fp32-seed3")
    shutil.copytree(folder / "model", out / "fp32-seed3", dirs_exist_ok=True)
    write_csv(out / "fp32-seed3" / "rows.csv", rows(20))
    (tmp_path / "link").symlink_to(out / "fp32-seed3")
    before = contents(out)
    for run in (out / "fp32-seed3", tmp_path / "link"):
        given = run if option == "--model" else run / "rows.csv"
        assert main(command(folder, "--output", str(out), "--overwrite", option, str(given))) == 2
        error = capsys.readouterr().err
        assert str(given) in error
        assert error.count("\n") == 1
        assert contents(out) == before


def test_overwrite_replaces_runs_and_nothing_else(folder, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    old_run(out, "int8-seed1")
    old_run(elsewhere, "fp32-seed1")
    (out / "fp32-seed1").symlink_to(elsewhere / "fp32-seed1")
    (out / "bf16-seed1").mkdir()
    (out / "bf16-seed1" / "notes.txt").write_text("mine")
    arguments = command(folder, "--precision", "fp32", "--max-steps", "2", "--output", str(out))
    assert main([*arguments, "--overwrite"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["bf16-seed1", "fp32-seed1", "loss.png", "report.json"]
    assert (out / "bf16-seed1" / "notes.txt").read_text() == "mine"
    assert (elsewhere / "fp32-seed1" / "train.log").read_text() == "old"
    assert not (out / "fp32-seed1").is_symlink()
    assert json.loads((out / "report.json").read_text())["runs"][0]["steps"] == 2


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_folder_of_a_runs_name_that_is_none_is_refused(folder, tmp_path, capsys, options):
    (tmp_path / "fp32-seed1").mkdir()
    (tmp_path / "fp32-seed1" / "notes.txt").write_text("mine")
    assert main(command(folder, "--output", str(tmp_path), *options)) == 2
    assert "fp32-seed1 is not of mixft finetune" in capsys.readouterr().err
    assert list(contents(tmp_path)) == [tmp_path / "fp32-seed1" / "notes.txt"]


@pytest.fixture
def broken(monkeypatch):
    """A run that fails."""
    monkeypatch.setattr("mixft.cli.process.CHILD", "raise RuntimeError('broken')")


@pytest.mark.usefixtures("broken")
def test_failed_run_is_one_line_and_its_log_stays(folder, tmp_path, capsys):
    """In one file, however often the run fails, and until it does not."""
    out = tmp_path / "out"
    log = out / "fp32-seed1.failed.log"
    for _ in range(2):
        assert main(command(folder, "--precision", "fp32", "--output", str(out))) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.endswith(f"the run fp32 seed 1 failed: RuntimeError: broken; its log is {log}\n")
        assert "Traceback" in log.read_text()
        assert list(contents(out)) == [log]
        log.write_text("of the run before")


def test_the_log_of_a_failed_run_goes_once_the_run_finishes(folder, tmp_path):
    other = tmp_path / "int8-seed1.failed.log"
    for log in (tmp_path / "fp32-seed1.failed.log", other):
        log.write_text("Traceback")
    assert main(command(folder, "--precision", "fp32", "--max-steps", "1", "--output", str(tmp_path))) == 0
    expected = ["fp32-seed1", other.name, "loss.png", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected
    assert "train.log" in {path.name for path in (tmp_path / "fp32-seed1").iterdir()}


@pytest.mark.usefixtures("broken")
def test_failed_overwrite_brings_the_old_runs_back(folder, tmp_path, capsys):
    out = tmp_path / "out"
    old_run(out, "fp32-seed1")
    before = contents(out)
    assert main(command(folder, "--precision", "fp32", "--output", str(out), "--overwrite")) == 1
    log = out / "fp32-seed1.failed.log"
    assert f"{log}; {out} has back what was to be replaced: fp32-seed1, report.json\n" in capsys.readouterr().err
    assert "Traceback" in log.read_text()
    assert contents(out) == {**before, log: log.read_bytes()}


WRITES_HALF_A_MODEL = """
import json, pathlib, sys, time
output = pathlib.Path(json.load(sys.stdin)["output"])
for name in ("config.json", "model.safetensors"):
    (output / name).write_text("{}")
print(json.dumps({"event": "phase", "name": "saving"}), flush=True)
time.sleep(60)
"""


@pytest.fixture
def interrupted(monkeypatch, tmp_path):
    """Ctrl-C while a run saves its model. Gives what the folder "out" holds then."""
    seen = []

    def on_event(progress, event):
        assert event == {"event": "phase", "name": "saving"}
        seen.append({path.name for path in (tmp_path / "out").iterdir()})
        raise KeyboardInterrupt

    monkeypatch.setattr("mixft.cli.process.CHILD", WRITES_HALF_A_MODEL)
    monkeypatch.setattr("mixft.cli.progress.RunProgress.on_event", on_event)
    return seen


def test_an_interrupted_run_leaves_nothing(folder, tmp_path, capsys, interrupted):
    out = tmp_path / "out"
    assert main(command(folder, "--precision", "fp32", "--output", str(out))) == 130
    assert capsys.readouterr().err.endswith("mixft: stopped during fp32 seed 1, of which nothing is kept\n")
    assert not out.exists()
    assert "fp32-seed1" not in interrupted[0]


def test_interrupted_overwrites_bring_the_old_runs_back_and_leave_no_others(folder, tmp_path, capsys, interrupted):
    out = tmp_path / "out"
    old_run(out, "fp32-seed1")
    before = contents(out)
    for _ in range(3):
        assert main(command(folder, "--precision", "fp32", "--output", str(out), "--overwrite")) == 130
        assert f"{out} has back what was to be replaced: fp32-seed1, report.json\n" in capsys.readouterr().err
        assert contents(out) == before
        assert sorted(path.name for path in out.iterdir()) == ["fp32-seed1", "report.json"]
    assert all("fp32-seed1" not in names for names in interrupted)


def test_what_finished_before_an_interrupted_run_stays(folder, tmp_path, capsys, monkeypatch):
    def run(job, on_event):
        if job.precision == "bf16":
            raise KeyboardInterrupt
        return run_in_process(job, on_event)

    monkeypatch.setattr("mixft.cli.runs.run_in_process", run)
    old_run(tmp_path, "bf16-seed1")
    options = ("--precision", "fp32,bf16", "--max-steps", "1", "--overwrite")
    assert main(command(folder, *options, "--output", str(tmp_path))) == 130
    assert f"of which nothing is kept; what finished before it is in {tmp_path}\n" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32-seed1", "loss.png", "report.json"]


def test_an_interrupted_deletion_of_old_runs_is_finished_and_not_undone(tmp_path, monkeypatch):
    old_run(tmp_path, "fp32-seed1")
    remove = shutil.rmtree

    def half(path, **options):
        (path / "report.json").unlink()
        monkeypatch.setattr(shutil, "rmtree", remove)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", half)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, ["int8-seed1"], [], overwrite=True) as old_runs:
        old_runs.discard()
    assert not list(tmp_path.iterdir())


def test_a_new_run_that_is_whole_and_the_old_one_both_stay_where_neither_was_let_go(tmp_path):
    old_run(tmp_path, "fp32-seed1")
    with claim(tmp_path, ["fp32-seed1"], [], overwrite=True):
        (tmp_path / "fp32-seed1").mkdir()
        (tmp_path / "fp32-seed1" / "train.log").write_text("new")
    assert {str(path.relative_to(tmp_path)): text.decode() for path, text in contents(tmp_path).items()} == {
        "fp32-seed1/train.log": "new",
        ".replaced-1/fp32-seed1/train.log": "old",
        "report.json": "old",
    }


def test_old_runs_that_cannot_be_set_aside_stay(tmp_path, monkeypatch):
    old_run(tmp_path, "fp32-seed1")
    before = contents(tmp_path)
    rename = Path.rename

    def failing(path, target):
        if path.name == "report.json" and path.parent == tmp_path:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(KeyboardInterrupt), claim(tmp_path, ["fp32-seed1"], [], overwrite=True):
        pass
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fp32-seed1", "report.json"]


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_folder_that_another_command_is_at_work_in_is_refused(folder, tmp_path, capsys, options):
    draft = tmp_path / ".int8-seed1.a1b2c3d4.part" / "int8-seed1"
    with claim(tmp_path, ["int8-seed1"], [], overwrite=False):
        draft.mkdir(parents=True)
        (draft / "train.log").write_text("begun")
        before = contents(tmp_path)
        assert main(command(folder, "--output", str(tmp_path), *options)) == 2
        assert f"--output {tmp_path} is in use by another mixft finetune" in capsys.readouterr().err
        assert contents(tmp_path) == before


@pytest.fixture
def killed(tmp_path):
    """What is left of an --overwrite whose process was killed: the old runs set aside, and a new one begun."""
    old_run(tmp_path / ".replaced-1", "fp32-seed1")
    draft = tmp_path / ".fp32-seed1.a1b2c3d4.part" / "fp32-seed1"
    draft.mkdir(parents=True)
    (draft / "train.log").write_text("begun")
    return contents(tmp_path)


def old_ones(killed):
    return {path: text for path, text in killed.items() if ".replaced-1" in path.parts}


def test_runs_that_a_killed_overwrite_set_aside_are_named(folder, tmp_path, killed, capsys):
    assert main(command(folder, "--output", str(tmp_path))) == 2
    assert "has old runs in .replaced-1" in capsys.readouterr().err
    assert contents(tmp_path) == killed


def test_an_overwrite_after_a_killed_one_replaces_what_that_set_aside(tmp_path, killed):
    with claim(tmp_path, ["fp32-seed1"], [], overwrite=True) as old_runs:
        aside = {tmp_path / ".replaced-2" / path.relative_to(tmp_path) for path in old_ones(killed)}
        assert contents(tmp_path).keys() == aside
        old_runs.discard()
    assert not list(tmp_path.iterdir())


def test_an_overwrite_that_fails_after_a_killed_one_brings_the_old_runs_back(tmp_path, killed):
    with claim(tmp_path, ["fp32-seed1"], [], overwrite=True):
        pass
    assert contents(tmp_path) == old_ones(killed)
    assert [path.name for path in tmp_path.iterdir()] == [".replaced-1"]


def test_a_run_that_a_killed_command_began_goes_with_the_next_one(folder, tmp_path, capsys):
    draft = tmp_path / ".int8-seed1.a1b2c3d4.part" / "int8-seed1"
    draft.mkdir(parents=True)
    shutil.copytree(folder / "model", draft, dirs_exist_ok=True)
    assert main(["predict", str(tmp_path), "a dull actor"]) == 2
    assert f"the model folder {tmp_path} has no config.json" in capsys.readouterr().err
    with claim(tmp_path, ["fp32-seed1"], [], overwrite=False):
        assert not list(tmp_path.iterdir())
