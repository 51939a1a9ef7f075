"""The commands of ``docs/kernel_notes.md`` name tests and programs that there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTES = ROOT / "docs" / "kernel_notes.md"
if not NOTES.exists():
    pytest.skip("tests beside no docs", allow_module_level=True)
COMMANDS = sorted(set(re.findall(r"`((?:pytest|python|make) [^`]+)`", NOTES.read_text())))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_of_something(command):
    files = [ROOT / name for name in re.findall(r"\S+\.py", command)]
    assert all(file.exists() for file in files)
    _, _, selection = command.partition(" -k ")
    words = set(re.findall(r"\w+", selection)) - {"and", "or", "not"}
    for file in files:
        tests = re.findall(r"def (test_\w+)", file.read_text())
        assert not words or any(word in test for word in words for test in tests)


def test_there_are_commands():
    assert len(COMMANDS) >= 15
    assert "python -m quietstar.ops.tune" in COMMANDS
