"""A file that a command writes: refused before the work where it cannot be written, and never half there."""

import json
import os

import pytest

from mixft.cli.errors import InputError
from mixft.cli.output_file import check_writable, write_whole
from mixft.cli.quantize_folder import write_report
from mixft.nn.quantization_report import QuantizationReport


def test_a_file_that_can_be_written_is_taken(tmp_path):
    check_writable("--json", None)
    check_writable("--json", tmp_path / "new.json")
    assert list(tmp_path.iterdir()) == []


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


def test_the_report_of_quantize_is_written_whole(tmp_path, monkeypatch):
    file, report = tmp_path / "report.json", QuantizationReport("dynamic", [])
    file.write_text("old")

    def refuse(source, target):
        assert json.loads(source.read_text(encoding="utf-8"))["mode"] == "dynamic"
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space left"):
        write_report(report, tmp_path / "model", tmp_path / "int8", file)
    assert file.read_text() == "old"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link, target = tmp_path / "latest.json", tmp_path / "elsewhere" / "report.json"
    link.symlink_to(target)
    for text in ("first", "second"):
        write_whole(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    assert [path.name for path in target.parent.iterdir()] == ["report.json"]


def test_what_is_no_file_is_written_into_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_whole(pipe, "ä, for the reader")
        assert os.read(reader, 100).decode() == "ä, for the reader"
    finally:
        os.close(reader)
    assert pipe.is_fifo()
