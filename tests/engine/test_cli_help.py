"""Help texts and --version of every command: what a reader of them needs, and nothing of Python."""

import importlib
import re
import sys

import pytest

from engine.io import cli
from engine.io.version import version

ENGINE = [
    "engine.upscale",
    "engine.info",
    "engine.bench",
    "engine.build.__main__",
    "engine.export.__main__",
    "engine.app",
]
ENGINE += ["engine.serve.__main__", "engine.bulk.__main__"]
GDPO = [
    "train.__main__",
    "prepare",
    "evaluate",
    "merge",
    "convert",
    "assets",
    "targets",
    "rewards",
    "hub",
    "random_folder",
]


def said(module: str, *arguments: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setenv("COLUMNS", "2000")
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module}: {error}")
    with pytest.raises(SystemExit) as end:
        cli.run(found.main)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("module", [*ENGINE, *(f"gdpo.{name}" for name in GDPO)])
def test_every_command_says_its_version_and_speaks_no_python(module, monkeypatch, capsys):
    shown = said(module, "--version", monkeypatch=monkeypatch, capsys=capsys)
    name = module.removesuffix(".__main__")
    assert shown == f"python -m {name} {version()}\n"
    text = said(module, "--help", monkeypatch=monkeypatch, capsys=capsys)
    assert "--version" in text
    check_words(text)


def check_words(text: str) -> None:
    assert not re.search(r"type: |\| null|Literal|Optional\[|<class|<function|default: (null|\{\}|\[\])|\(\)", text), (
        text
    )


@pytest.mark.parametrize("method", ["naosd", "gdpo"])
def test_the_options_of_training_speak_no_python(method, monkeypatch, capsys):
    text = said("gdpo.train.__main__", method, "--help", monkeypatch=monkeypatch, capsys=capsys)
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
