"""deploy/ is run by no test: its paths, commands and addresses are those of the project."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest

from engine.serve.__main__ import parser

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


class Loader(yaml.SafeLoader):
    """YAML with Docker Compose's tags."""


Loader.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def instructions() -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_the_image_holds_what_it_copies():
    rules = [line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[0] != "#"]
    assert rules[0] == "*"
    sources = [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]
    assert {"pyproject.toml", "setup.py", "engine"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists() and f"!{source}" in rules, source
    assert not any(fnmatch.fnmatch("engine/data/tiny/generator.onnx", rule) for rule in rules[1:] if rule[0] != "!")


def test_the_image_starts_the_service():
    found = dict(instructions())
    entry = json.loads(found["ENTRYPOINT"])
    assert entry[:3] == ["python", "-m", "engine.serve"]
    assert parser().parse_args(entry[3:]).host == "0.0.0.0"
    assert f":{found['EXPOSE']}/ready" in found["HEALTHCHECK"] and parser().get_defaults().port == int(found["EXPOSE"])
    assert EXTRAS[dict(i.split("=") for word, i in instructions() if word == "ARG")["EXTRA"]]


def test_the_services_of_the_compose_file_are_started_with_options_that_there_are():
    services = yaml.load((DEPLOY / "compose.yaml").read_text(), Loader)["services"]
    assert services["serve-gpu"]["extends"]["service"] in services
    for service in services.values():
        options = parser().parse_args(service["command"])
        build = service["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert all(extra in EXTRAS for extra in build.get("args", {}).get("EXTRA", "serve").split(","))
        assert service["ports"][0].endswith(f":{options.port}")
    seconds = int(services["serve"]["stop_grace_period"].removesuffix("s"))
    assert seconds > parser().get_defaults().grace_seconds
