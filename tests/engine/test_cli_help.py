"""Help texts and --version of every command: what a reader of them needs, and nothing of Python."""

import importlib
import re
import sys
from importlib.util import find_spec

import pytest

from engine.io import cli
from engine.io.version import version
from tests.support.commands import COMMANDS


def said(module: str, *arguments: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setenv("COLUMNS", "2000")
    try:
        main = importlib.import_module(
            f"{module}.__main__" if find_spec(module).submodule_search_locations else module
        ).main
    except ImportError as error:
        pytest.skip(f"{module}: {error}")
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_says_its_version_and_speaks_no_python(module, monkeypatch, capsys):
    shown = said(module, "--version", monkeypatch=monkeypatch, capsys=capsys)
    assert shown == f"python -m {module} {version()}\n"
    text = said(module, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert "--version" in text
    check_words(text)
    check_options(text)


@pytest.mark.parametrize("module", ["gdpo.train naosd", "gdpo.train gdpo", "gdpo.rewards serve"])
def test_so_does_every_subcommand(module, monkeypatch, capsys):
    module, name = module.split()
    text = said(module, name, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert text.startswith(f"usage: python -m {module} {name} ")
    check_words(text)
    check_options(text)


def check_options(text: str) -> None:
    """Each option says what it is, not only its default, and its default once."""
    names = r"^  (-\S(?:(?!  ).)*)"
    assert not re.findall(names + r"(?:(?: +|\n {10,})\([^()\n]*\))?$(?!\n {10,}\S)", text, re.MULTILINE), text
    assert not re.search(r"\(default[^()]*\) \([^()]*default", text), text


WORDLESS = [
    "  --seed SEED",
    "  --seed SEED     (integer, default: 0)",
    "  --long-name NAME\n                (default: 0)",
    "  --a A           side (default 5) (integer, default: 5)",
]


@pytest.mark.parametrize("line", WORDLESS)
def test_options_without_words_are_found(line):
    good = "  --b B           length\n  --long-name NAME\n                length (default: 0)\n  -c              go\n"
    check_options(good)
    with pytest.raises(AssertionError):
        check_options(f"{good}{line}\n  --b B           length\n")


def check_words(text: str) -> None:
    assert not re.search(r"type: |\| null|Literal|Optional\[|<class|<function|default: (null|\{\}|\[\])|\(\)", text), (
        text
    )


@pytest.mark.parametrize("method", ["naosd", "gdpo"])
def test_the_options_of_training_speak_no_python(method, monkeypatch, capsys):
    text = said("gdpo.train", method, "--help", monkeypatch=monkeypatch, capsys=capsys)
    check_words(text)
    assert re.search(r"peak learning rate of AdamW\. \(number, default: 5e-05\)", text)
    assert re.search(r"random seed of the whole run\. \(integer, default: 0\)", text)
    assert "--data.version" not in text and "--model.version" not in text


def test_evaluate_has_two_forms(monkeypatch, capsys):
    text = said("gdpo.evaluate", "--help", monkeypatch=monkeypatch, capsys=capsys)
    forms = (
        "usage: python -m gdpo.evaluate --lr DIR --hr DIR --out DIR .*\n +python -m gdpo.evaluate --before-after MODEL"
    )
    assert re.match(forms, text)
    assert re.search(r"none of the options below:\n +--before-after MODEL", text)
    own = said("gdpo.evaluate", "--before-after", "model", "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert "--lr" not in own
    check_words(own)
