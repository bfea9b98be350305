"""Scripts end as the project's commands do: one line on bad input, exit codes, no traceback where a reader leaves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def commands(source: str) -> bool | None:
    """Whether a script's last block calls engine.io.cli.run; None: it is no script."""
    tree = ast.parse(source)
    blocks = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    if not blocks:
        return None
    names = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "engine.io.cli"
        for alias in node.names
        if alias.name == "run"
    }
    imported = any(
        isinstance(node, ast.ImportFrom) and ast.unparse(node) == "from engine.io import cli" for node in tree.body
    )
    names |= {"cli.run"} if imported else set()
    called = {ast.unparse(node.func) for node in ast.walk(blocks[-1]) if isinstance(node, ast.Call)}
    return bool(names & called)


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_every_script_goes_through_the_command_line_of_the_project(folder):
    found = {path.name: commands(path.read_text("utf-8")) for path in (ROOT / folder).glob("*.py")}
    assert True in found.values() and [name for name, through in found.items() if through is False] == []


def test_a_script_that_does_not_is_seen():
    rest = 'if __name__ == "__main__":\n    '
    assert commands(f"from engine.io import cli\n{rest}cli.run(main)")
    assert commands(f"from engine.io.cli import run as command\n{rest}command(main)")
    assert commands(f"from engine.io import cli\n{rest}main()") is False
    assert commands(f"from subprocess import run\n{rest}run(main)") is False
    assert commands("import cli") is None


@pytest.mark.parametrize("options", [["--list"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(options):
    """`| head -3`; here the reader is gone before the first line."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu", *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and said == b""
