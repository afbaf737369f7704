"""`mixft finetune --overwrite` and runs that fail: old runs are lost to finished new ones only, other files never."""

import json
import shutil

import pytest
from tiny_bert import rows, save_tiny_bert, write_csv

from mixft.cli import main
from mixft.cli.output_folder import claim


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
    out = tmp_path / "out"
    assert main(command(folder, "--precision", "fp32", "--output", str(out))) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "fp32 seed 1" in error
    assert str(out / "fp32-seed1" / "train.log") in error
    assert "Traceback" in (out / "fp32-seed1" / "train.log").read_text()
    assert not (out / "report.json").exists()


@pytest.mark.usefixtures("broken")
def test_failed_overwrite_brings_the_old_runs_back(folder, tmp_path, capsys):
    out = tmp_path / "out"
    old_run(out, "fp32-seed1")
    before = contents(out)
    assert main(command(folder, "--precision", "fp32", "--output", str(out), "--overwrite")) == 1
    log = out / "fp32-seed1.failed-1" / "train.log"
    assert str(log) in capsys.readouterr().err
    assert "Traceback" in log.read_text()
    assert contents(out) == {**before, log: log.read_bytes()}


def test_interrupted_overwrite_brings_the_old_runs_back(folder, tmp_path, monkeypatch):
    def interrupted(job, on_event):
        (tmp_path / "fp32-seed1").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("mixft.cli.runs.run_in_process", interrupted)
    old_run(tmp_path, "fp32-seed1")
    before = contents(tmp_path)
    assert main(command(folder, "--precision", "fp32", "--output", str(tmp_path), "--overwrite")) == 130
    assert contents(tmp_path) == before


@pytest.fixture
def killed(tmp_path):
    """What is left of an --overwrite whose process was killed: the old runs set aside, and a new one begun."""
    old_run(tmp_path / ".replaced-1", "fp32-seed1")
    (tmp_path / "fp32-seed1").mkdir()
    (tmp_path / "fp32-seed1" / "train.log").write_text("begun")
    return contents(tmp_path)


def test_runs_that_a_killed_overwrite_set_aside_are_named(folder, tmp_path, killed, capsys):
    assert main(command(folder, "--output", str(tmp_path))) == 2
    assert "has old runs in .replaced-1" in capsys.readouterr().err
    assert contents(tmp_path) == killed


def test_an_overwrite_after_a_killed_one_replaces_what_that_set_aside(tmp_path, killed):
    with claim(tmp_path, ["fp32-seed1"], [], overwrite=True) as old_runs:
        assert contents(tmp_path).keys() == {tmp_path / ".replaced-2" / path.relative_to(tmp_path) for path in killed}
        old_runs.discard()
    assert not list(tmp_path.iterdir())


def test_an_overwrite_that_fails_after_a_killed_one_brings_all_back(tmp_path, killed):
    with claim(tmp_path, ["fp32-seed1"], [], overwrite=True):
        pass
    assert contents(tmp_path) == killed
