"""A file that a command writes: refused before the work where it cannot be written, and never half there."""

import os

import pytest

from mixft.cli.errors import InputError
from mixft.cli.output_file import check_writable, write_whole


def test_a_file_that_can_be_written_is_taken(tmp_path):
    check_writable("--json", None)
    check_writable("--json", tmp_path / "new.json")


def test_a_folder_and_a_file_in_a_folder_that_there_is_not_are_refused(tmp_path):
    for file in (tmp_path, tmp_path / "absent" / "new.json"):
        with pytest.raises(InputError, match=rf"--json {file} cannot be written; a file in a folder that exists"):
            check_writable("--json", file)


def test_what_was_there_stays_until_the_new_text_is_whole(tmp_path, monkeypatch):
    file = tmp_path / "report.json"
    write_whole(file, "ä, old")

    def refuse(source, target):
        assert source.read_text(encoding="utf-8") == "new"
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(KeyboardInterrupt):
        write_whole(file, "new")
    assert file.read_text(encoding="utf-8") == "ä, old"
    monkeypatch.undo()
    write_whole(file, "new")
    assert file.read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
