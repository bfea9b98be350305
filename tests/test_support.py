"""What the tests themselves rest on."""

import os

from tests.support import commands


def test_a_variable_that_a_library_set_here_makes_no_command_a_true_start(monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/tmp/elsewhere")  # as torch does, the first time it compiles
    monkeypatch.setenv("COLUMNS", "72")
    variables = commands.environment()
    assert commands._read(variables) == commands._read(commands.AT_FIRST)
    assert variables["COLUMNS"] == "72" and variables["PATH"] == os.environ["PATH"]
    assert commands._read(commands.environment(LD_PRELOAD="library.so")) != commands._read(commands.AT_FIRST)
