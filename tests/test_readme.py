"""The README's examples that show what they print."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text()
# A block of Python and, right after it, one of what it prints.
SHOWN = re.findall(r"```python\n([^`]*)```\n\n```\n([^`]*)```", README)


def test_there_are_some():
    assert SHOWN


@pytest.mark.parametrize(("code", "output"), SHOWN)
def test_an_example_prints_what_is_shown(native_device, capsys, code, output):
    exec(code, {})
    assert capsys.readouterr().out == output
