"""``mixft bench --base``: two revisions side by side, on a repository of the test's own."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixft.benchmarks import revision
from mixft.benchmarks.machine import Machine
from mixft.benchmarks.registry import find
from mixft.benchmarks.timing import QUICK
from mixft.cli import main

MACHINE = Machine(1e9, 1e9, {})
ROOT = Path(__file__).parent.parent
COMMAND = (
    "import sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; from mixft.cli import main; sys.exit(main())"
)


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path) -> Path:
    """A copy of mixft whose first commit, "slow", sleeps in every dequantization, and whose last does not."""
    folder = tmp_path / "repository"
    leave = shutil.ignore_patterns("__pycache__", "kernels", "benchmarks")
    shutil.copytree(ROOT / "mixft", folder / "mixft", ignore=leave)
    for part in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    routine = folder / "mixft" / "cpu" / "dequantize.py"
    sound = routine.read_text()
    head = "def dequantize("
    assert head in sound
    start = sound.index(":\n", sound.index("->", sound.index(head))) + 2
    routine.write_text(sound[:start] + "    import time; time.sleep(0.05)\n" + sound[start:])
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "slow")
    git(folder, "tag", "slow")
    routine.write_text(sound)
    git(folder, "commit", "-qam", "quick")
    for part in ("kernels", "benchmarks"):
        (folder / "mixft" / part).symlink_to(folder / part)
    return folder


def test_the_base_is_another_mixft_than_this_one(repository, tmp_path):
    file = tmp_path / "results.json"
    arguments = ["bench", "dequantize/512x4096-fp32", "--quick", "--device", "cpu", "--base", "slow", "--json", file]
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, repository, *arguments],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "faster than mixft slow in 1 of 1 cases: dequantize/512x4096-fp32" in run.stdout
    ours, base = json.loads(file.read_text())["rows"]
    assert (ours["provider"], base["provider"]) == ("mixft", "mixft slow")
    assert base["seconds"] > 0.05
    assert base["speedup"] > 1.5
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert worktrees.count("\n") == 1


def test_a_base_that_there_is_not_is_refused(repository, monkeypatch, capsys):
    monkeypatch.setattr(revision, "checkout", lambda: repository)
    assert main(["bench", "dequantize", "--base", "nosuch"]) == 2
    assert "--base 'nosuch' is no revision of" in capsys.readouterr().err
    monkeypatch.setattr(revision, "checkout", lambda: None)
    assert main(["bench", "dequantize", "--base", "nosuch"]) == 2
    assert "--base 'nosuch' needs git, and a git checkout that mixft is imported from" in capsys.readouterr().err


def test_without_git_there_is_no_checkout(monkeypatch):
    monkeypatch.setattr(revision.shutil, "which", lambda name: None)
    assert revision.checkout() is None
    assert revision.commit() is None


def test_the_routines_of_a_base_are_compiled(repository, monkeypatch):
    monkeypatch.setattr(revision, "checkout", lambda: repository)
    monkeypatch.setattr(revision.native, "available", lambda: True)
    for library in (repository / "mixft" / "cpu").glob("_native_*"):
        library.unlink()
    (repository / "native").mkdir()
    (repository / "native" / "sources.c").touch()
    setup = repository / "setup.py"
    setup.write_text("import sys; open('mixft/cpu/_native_avx2.so', 'w').write(' '.join(sys.argv[1:]))")
    git(repository, "add", "-A")
    git(repository, "commit", "-qm", "compiled")
    with revision.worktree("HEAD") as folder:
        assert "build_ext" in (folder / "mixft" / "cpu" / "_native_avx2.so").read_text()
    setup.write_text("raise SystemExit('no compiler')")
    git(repository, "commit", "-qam", "broken")
    with pytest.raises(ValueError, match="of 'HEAD' do not compile, no compiler"), revision.worktree("HEAD"):
        pass
    monkeypatch.setattr(revision.native, "available", lambda: False)
    with revision.worktree("HEAD") as folder:
        assert not list((folder / "mixft" / "cpu").glob("_native_*"))


def test_the_commit_says_where_files_differ(repository, monkeypatch):
    monkeypatch.setattr(revision, "checkout", lambda: repository)
    clean = revision.commit()
    assert len(clean) == 12
    (repository / "mixft" / "__init__.py").write_text("")
    assert revision.commit() == f"{clean}-dirty"


def test_a_revision_that_fails_has_a_row_and_the_next_case_a_process(without_interpreter, repository, monkeypatch):
    device, case = torch.device("cpu"), find("dequantize/512x4096-fp32")
    with revision.Worker(repository, device) as ours, revision.Worker(repository, device) as base:
        take = base.sample
        monkeypatch.setattr(base, "sample", lambda: (base.process.kill(), take())[1])
        rows = revision.compare(case, [ours, base], "mixft base", QUICK, MACHINE)
        monkeypatch.setattr(base, "sample", take)
        assert [row.status for row in rows] == ["timed", "refused"]
        assert rows[1].reason == "RuntimeError: the process of a revision ended with exit code -9"
        rows = revision.compare(case, [ours, base], "mixft base", QUICK, MACHINE)
        assert [row.status for row in rows] == ["timed", "timed"]
        large = replace(case, needs=10**18)
        monkeypatch.setattr(revision.Worker, "prepare", None)
        rows = revision.compare(large, [ours, base], "mixft base", QUICK, MACHINE)
        assert [row.status for row in rows] == ["refused", "refused"]
        assert "GB of memory" in rows[0].reason


def test_a_process_that_ends_is_an_error_and_not_a_wait(tmp_path):
    with revision.Worker(tmp_path, torch.device("cpu")) as worker:
        worker.process.kill()
        with pytest.raises(RuntimeError, match="exit code -9"):
            worker.sample()
