"""The Hub without a network: its cache, its refusals, what is pushed, and the card in huggingface_hub's own schema."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, errors

from gdpo.generator import OneStepGenerator
from gdpo.hub import main
from gdpo.model.hub import download, hub_errors, model_card
from gdpo.model.tiny import TinyUNetConfig

httpx: Any = importlib.import_module(errors.HTTPError.__module__.split(".")[0])  # httpx, or its successor
SHA = "0123456789abcdef0123456789abcdef01234567"
SMALL = TinyUNetConfig(block_out_channels=(8, 16), layers_per_block=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    OneStepGenerator.tiny(SMALL).save_pretrained(folder)
    return folder


def run(*command, **environment: str) -> subprocess.CompletedProcess:
    """A command as a user's, with a network that leads nowhere."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        capture_output=True, text=True, env={**os.environ, **nowhere, **environment},
    )  # fmt: skip


def test_a_model_in_the_cache_is_read_without_a_network(model, tmp_path):
    repo = tmp_path / "cache" / "models--org--name"
    shutil.copytree(model, repo / "snapshots" / SHA)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SHA)
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    code = "import sys; from gdpo.generator import OneStepGenerator as G; G.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-c", code, "hub:org/name"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr


def test_without_a_network_there_is_one_sentence(model, tmp_path):
    done = run("gdpo.merge", "hub:org/name", "--out", tmp_path / "out", HF_HUB_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: hub:org/name: the Hub cannot be reached, and there is no complete copy")


def test_a_push_that_must_be_offline_is_one_sentence(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    command = ["gdpo.hub", tmp_path / "model", "--license=apache-2.0", "--push=org/name"]
    done = run(*command, HF_TOKEN="hf_x", HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "hub:org/name: the Hub cannot be reached, so nothing was pushed; try again with a network" in done.stderr


def test_nothing_but_a_hub_name_touches_the_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a call of the Hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match="org/name: no such folder"):
        OneStepGenerator.from_pretrained("org/name")
    with pytest.raises(AssertionError, match="a call of the Hub"):
        OneStepGenerator.from_pretrained("hub:org/name")


def _response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org"))


REFUSALS = [
    (errors.RepositoryNotFoundError("x", response=_response(404)), ValueError, "no such model, or it is not yours"),
    (errors.GatedRepoError("x", response=_response(403)), ValueError, "asks for an agreement"),
    (errors.RevisionNotFoundError("x", response=_response(404)), ValueError, "no such revision"),
    (errors.HfHubHTTPError("403 no", response=_response(403)), ValueError, "refused .403 no.; .* hf auth login"),
    (errors.HfHubHTTPError("500 oh", response=_response(500)), ValueError, "refused .500 oh.$"),
    (httpx.ConnectTimeout("x"), ConnectionError, "cannot be reached"),
]


@pytest.mark.parametrize(("raised", "kind", "message"), REFUSALS, ids=lambda x: type(x).__name__)
def test_what_the_hub_refuses_is_a_sentence(raised, kind, message):
    with pytest.raises(kind, match=f"hub:org/name: .*{message}") as caught, hub_errors("hub:org/name"):
        raise raised
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none():
    with pytest.raises(ValueError, match="not a name on the Hub; expected hub:ORG/NAME"):
        download("hub:a/b/c")


def test_what_is_pushed_is_what_is_saved(model, tmp_path, monkeypatch):
    def create_repo(self, repo_id, **options):
        assert options == {"private": True, "exist_ok": True}
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    generator = OneStepGenerator.from_pretrained(model)
    address = generator.push_to_hub("org/name", card="# hello", private=True)
    assert address == "https://huggingface.co/org/name"
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path / "hub"))
    back = OneStepGenerator.from_pretrained("hub:org/name")
    assert all(torch.equal(v, back.state_dict()[k]) for k, v in generator.state_dict().items())
    assert (tmp_path / "hub" / "README.md").read_text() == "# hello"


# ---- The card


@pytest.fixture
def evaluation(tmp_path) -> Path:
    row = {"psnr_y": {"mean": 26.5, "low": 26.1, "high": 26.9}, "niqe": {"mean": None, "low": None, "high": None}}
    (tmp_path / "results.json").write_text(json.dumps({"models": {"mine": row, "hr": {}}}))
    return tmp_path


def test_a_card_has_licence_figures_and_credits(model, evaluation, tmp_path):
    entry = {"title": "Aqua", "author": "C. Barbin", "licence": "GPL-2.0-or-later"}
    (tmp_path / "photos.json").write_text(json.dumps([entry]))
    text = model_card(model, licence="apache-2.0", photos=tmp_path, evaluation=evaluation, dataset="RealSR, pairs")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "image-to-image"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("psnr_y", 26.5, "RealSR, pairs")
    assert result.dataset_type == "realsr-pairs" and 'pip install "gdpo-sr[export]"' in text
    assert "| psnr_y | 26.5 (95% interval 26.1 to 26.9) |" in text and "| Aqua | C. Barbin | GPL-2.0-or-later |" in text
    assert "diffusers" not in text


def test_the_card_of_a_published_network_names_what_reads_it(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    unet = {"_class_name": "NetworkUNet", "architecture": "Compact", "source": {"file": "net.pth", "sha256": "ab"}}
    (tmp_path / "model" / "unet" / "config.json").write_text(json.dumps(unet))
    text = model_card(tmp_path / "model", licence="bsd-3-clause")
    assert 'pip install "gdpo-sr[export,spandrel]"' in text and "`net.pth`, sha256 `ab`" in text


def test_a_stable_diffusion_folder_is_a_model_of_diffusers(mini_sd, tmp_path):
    OneStepGenerator.from_pretrained(mini_sd).save_pretrained(tmp_path / "model")
    card = ModelCard(model_card(tmp_path / "model", licence="openrail++"))
    assert card.data.library_name == "diffusers" and "custom_pipeline" in card.text
    assert card.data.eval_results is None


def test_the_command_writes_a_card_and_keeps_one(model, evaluation, tmp_path, monkeypatch):
    def command(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["gdpo.hub", str(tmp_path / "model"), *options])
        main()

    shutil.copytree(model, tmp_path / "model")
    with pytest.raises(ValueError, match="--license must name the licence"):
        command()
    options = ["--license=mit", f"--evaluation={evaluation}"]
    command(*options)
    assert ModelCard.load(tmp_path / "model" / "README.md").data.license == "mit"
    with pytest.raises(FileExistsError, match=r"README\.md exists; --overwrite replaces it"):
        command(*options)
    with pytest.raises(FileNotFoundError, match="no: no such file"):
        command("--license=mit", "--overwrite", f"--evaluation={tmp_path / 'no'}")


def test_an_evaluation_of_other_models(model, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"models": {"a": {}, "b": {}}}))
    with pytest.raises(ValueError, match="has no model 'small'; name one of its rows: a, b"):
        model_card(model, licence="mit", evaluation=tmp_path)
