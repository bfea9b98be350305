"""Models on the Hugging Face Hub: fetched and pushed only where a user names one, with a card.

`hub:ORG/NAME` or `hub:ORG/NAME@REVISION` stands for a model folder wherever one is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.io.files import naming
from gdpo.model.parts import first_line, read_json

PREFIX = "hub:"
# What a model folder is made of; what else a repository holds (pickles, other frameworks' weights) stays there.
_FILES = ["*.json", "*.safetensors", "*.txt", "*.md", "*.bin", "*.py"]
_TASK = "image-to-image"


def download(name: str) -> Path:
    """The local copy of a model of the Hub, from huggingface_hub's cache where it is already.

    Args:
        name: "hub:ORG/NAME", with "@REVISION" if it is not main.

    Raises:
        ValueError: no such name, model or revision, or no right to it. ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    repo, _, revision = name.removeprefix(PREFIX).partition("@")
    with hub_errors(name):
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=_FILES))


def upload(folder: Path, repo: str, *, private: bool = False, message: str = "Upload model") -> str:
    """Push a model folder as it is; the repository is made if it is not there. Returns its address.

    Raises:
        ValueError: a bad name, or no right to it. ConnectionError: the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with hub_errors(f"{PREFIX}{repo}", "so nothing was pushed; try again"):
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
    return str(made)


_NO_COPY = "and there is no complete copy in the cache; name a local folder, or try again"


@contextmanager
def hub_errors(name: str, without: str = _NO_COPY) -> Iterator[None]:
    """Inside, what huggingface_hub raises becomes one sentence; `without` ends that of a Hub that cannot be reached."""
    from huggingface_hub import errors

    unreachable = (errors.HTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)
    try:
        yield
    except errors.HFValidationError as error:
        raise ValueError(f"{name}: not a name on the Hub; expected hub:ORG/NAME ({first_line(error)})") from None
    except errors.GatedRepoError:
        raise ValueError(
            f"{name}: its owner asks for an agreement; accept it on the Hub, then: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: the model has no such revision") from None
    except (errors.RepositoryNotFoundError, errors.LocalTokenNotFoundError):
        raise ValueError(f"{name}: no such model, or it is not yours to see; if it is private: hf auth login") from None
    except errors.HfHubHTTPError as error:
        remedy = "; to be allowed to: hf auth login" if _status(error) in (401, 403) else ""
        raise ValueError(f"{name}: the Hub refused ({first_line(error)}){remedy}") from None
    except unreachable:
        raise ConnectionError(
            f"{name}: the Hub cannot be reached, {without} with a network (HF_HUB_OFFLINE must not be 1)"
        ) from None


def _status(error: Any) -> int | None:
    return getattr(error.response, "status_code", None)


def model_card(
    folder: Path,
    *,
    licence: str,
    photos: Path | None = None,
    evaluation: Path | None = None,
    row: str | None = None,
    dataset: str = "a folder of pairs",
) -> str:
    """The README.md of a model folder on the Hub, with its metadata in the card's own schema.

    Args:
        folder: the model.
        licence: of the weights, an identifier of the Hub's list ("apache-2.0", "openrail++", "other").
        photos: a photos.json as gdpo.assets writes it, or a folder that holds one: title, author, licence of each.
        evaluation: a results.json of gdpo.evaluate, or the folder that holds it.
        row: which of its models this is; None: the only one, or the one of the folder's name.
        dataset: what the evaluation was made on.

    Raises:
        FileNotFoundError, ValueError: naming the file and what in it is wrong.
    """
    from huggingface_hub import ModelCard, ModelCardData

    unet, about = read_json(folder / "unet" / "config.json"), read_json(folder / "generator.json")
    figures = [] if evaluation is None else _figures(_inside(evaluation, "results.json"), row or folder.name, dataset)
    credits = [] if photos is None else _credits(_inside(photos, "photos.json"))
    pipeline = (folder / "pipeline.py").is_file()
    data = ModelCardData(
        license=licence,
        library_name="diffusers" if pipeline else "gdpo-sr",
        pipeline_tag=_TASK,
        tags=["super-resolution", "image-upscaling", "one-step-diffusion"],
        model_name=folder.name if figures else None,
        eval_results=figures or None,
    )
    source = unet.get("source") or {}
    lines = [f"# {folder.name}", "", "One-step x4 super-resolution, made with GDPO-SR.", ""]
    lines += [f"- **Network**: {_network(unet)}", f"- **Noise** added at t={about.get('t_noise')}; one step."]
    if source:
        lines.append(f"- **Starting weights**: `{source.get('file')}`, sha256 `{source.get('sha256')}`.")
    extras = "export,spandrel" if unet.get("_class_name") == "NetworkUNet" else "export"
    lines += ["", "```bash", f'pip install "gdpo-sr[{extras}]"', "python -m engine.export hub:ORG/NAME --out onnx"]
    lines += ["python -m engine.upscale photo.jpg out.png --model onnx", "```", ""]
    if pipeline:
        lines += ["With diffusers:", "", "```python", "from diffusers import DiffusionPipeline", ""]
        lines += ['pipe = DiffusionPipeline.from_pretrained("ORG/NAME", custom_pipeline="ORG/NAME", '
                  "trust_remote_code=True)", "pipe(image).images[0]", "```", ""]  # fmt: skip
    if figures:
        lines += [f"Means on {dataset}, with 95% intervals:", "", "| metric | value |", "|---|---|"]
        lines += [f"| {f.metric_type} | {f.metric_value:.4g} ({f.metric_name.partition(', ')[2]}) |" for f in figures]
        lines.append("")
    if credits:
        lines += ["Trained on these pictures, none of which it contains:", "", "| picture | author | licence |"]
        lines += ["|---|---|---|", *credits]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines).rstrip() + "\n"))


def _inside(path: Path, name: str) -> Path:
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    return file


def _network(unet: dict) -> str:
    kind = unet.get("_class_name", "")
    return f"{unet.get('architecture')} (published, with noise)" if kind == "NetworkUNet" else str(kind)


def _figures(file: Path, row: str, dataset: str) -> list[Any]:
    from huggingface_hub import EvalResult

    models = read_json(file).get("models")
    rows = {k: v for k, v in models.items() if k != "hr"} if isinstance(models, dict) else {}
    found = rows.get(row) or (next(iter(rows.values())) if len(rows) == 1 else None)
    if not isinstance(found, dict):
        raise ValueError(f"{file}: has no model {row!r}; name one of its rows: {', '.join(rows) or 'none'}")
    return [
        EvalResult(
            task_type=_TASK,
            task_name="x4 super-resolution",
            dataset_type="-".join(re.findall(r"\w+", dataset.lower())) or "pairs",
            dataset_name=dataset,
            metric_type=name,
            metric_name=f"{name}, 95% interval {value['low']:.4g} to {value['high']:.4g}",
            metric_value=value["mean"],
        )
        for name, value in found.items()
        if isinstance(value, dict) and value.get("mean") is not None
    ]


def _credits(file: Path) -> list[str]:
    try:
        with naming(file):
            entries = json.loads(file.read_text("utf-8"))
        return [f"| {e['title']} | {e['author']} | {e['licence']} |" for e in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: must list title, author and licence of each picture ({error!r:.80})") from None
