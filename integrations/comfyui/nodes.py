"""The nodes (ComfyUI's V3 schema). All that they need of this project is its run time: the package `engine`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.v0_0_2 import ComfyExtension, io

from engine import Upscaler
from engine.runtime import color
from engine.runtime.resample import resize_window

FOLDER = "gdpo_sr"  # under ComfyUI's models/: engine folders, as engine.export and engine.build write them
BUNDLED = {"bundled": None, "quality": "quality", "faithful": "faithful"}  # as Upscaler.load takes them
FULL = 65535

folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))

UpscalerType = io.Custom("GDPO_SR_UPSCALER")


def engine_folders() -> dict[str, Path]:
    """The engine folders in models/gdpo_sr, by name."""
    found = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        if root.is_dir():
            found |= {f.parent.relative_to(root).as_posix(): f.parent for f in sorted(root.glob("**/manifest.json"))}
    return found


def folder_of(model: str) -> Path | str | None:
    """What Upscaler.load takes for a model's name: a folder, or which of the bundled models.

    Raises:
        ValueError: there is none of this name.
    """
    folders = engine_folders()
    if model in BUNDLED and model not in folders:
        return BUNDLED[model]
    if model not in folders:
        known = ", ".join([*BUNDLED, *folders])
        raise ValueError(f"no engine folder {model!r} in models/{FOLDER}; there are {known}")
    return folders[model]


class LoadUpscaler(io.ComfyNode):
    """An engine folder, loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GDPOSR_LoadUpscaler",
            display_name="Load One-Step Upscaler (GDPO-SR)",
            category="image/upscaling",
            description="Loads a one-step super-resolution model.",
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(dict.fromkeys([*BUNDLED, *engine_folders()])),
                    default="bundled",
                    tooltip="bundled: the small model that comes with GDPO-SR; quality: a larger one that draws more "
                    f"detail; faithful: a small one for clean pictures; or an engine folder in models/{FOLDER}.",
                ),
                io.Combo.Input(
                    "device",
                    options=["auto", "cpu", "cuda"],
                    default="auto",
                    tooltip="Where it runs; auto takes a GPU where the model's backend has one.",
                ),
            ],
            outputs=[UpscalerType.Output(display_name="upscaler")],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, device: str) -> str:
        """A folder that was built anew is loaded anew."""
        folder = folder_of(model)
        manifest = (folder / "manifest.json").read_bytes() if isinstance(folder, Path) else b""
        return f"{model} {device} {hashlib.sha256(manifest).hexdigest()}"

    @classmethod
    def execute(cls, model: str, device: str) -> io.NodeOutput:
        return io.NodeOutput(Upscaler.load(folder_of(model), device=None if device == "auto" else device))


class Upscale(io.ComfyNode):
    """Pictures, enlarged in overlapping tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GDPOSR_Upscale",
            display_name="Upscale Image One-Step (GDPO-SR)",
            category="image/upscaling",
            description="Restores pictures at four times their size. The same seed gives the same pictures.",
            inputs=[
                UpscalerType.Input("upscaler"),
                io.Image.Input("image"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=True,
                    tooltip="Of the noise that the model makes detail of. All pictures of a batch get the same noise.",
                ),
                io.Float.Input(
                    "scale",
                    default=4.0,
                    min=0.25,
                    max=16.0,
                    step=0.25,
                    tooltip="The model makes x4; the rest is resized.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1 is the model's picture, 0 a plain bicubic enlargement, between them a mix of both.",
                ),
                io.Int.Input(
                    "tile",
                    default=0,
                    min=0,
                    max=4096,
                    step=16,
                    tooltip="Side of a tile in input pixels; 0: the model's.",
                ),
                io.Combo.Input(
                    "color",
                    options=list(color.METHODS),
                    default=color.DEFAULT,
                    tooltip="How the colours are matched to the input's.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(
        cls,
        upscaler: Upscaler,
        image: torch.Tensor,
        seed: int,
        scale: float,
        strength: float,
        tile: int,
        color: str,
    ) -> io.NodeOutput:
        bar = comfy.utils.ProgressBar(len(image))  # ComfyAPISync().execution is missing in ComfyUI 0.3.68
        results = []
        for number, picture in enumerate(image):

            def progress(done: int, total: int, number: int = number) -> None:
                comfy.model_management.throw_exception_if_processing_interrupted()  # it ends the picture
                bar.update_absolute(number * total + done, len(image) * total)

            options = {"seed": seed, "scale": scale, "tile": tile or None, "color": color, "progress": progress}
            results.append(enlarge(upscaler, picture.cpu().numpy(), strength, **options))
        return io.NodeOutput(torch.from_numpy(np.stack(results)))


def enlarge(upscaler: Upscaler, picture: np.ndarray, strength: float, **options) -> np.ndarray:
    """picture [H,W,C] float in [0,1] -> [H',W',C] float32.

    One channel is gray; a fourth is transparency, which is enlarged by bicubic.

    Raises:
        ValueError: another number of channels, or an option out of range; the message names it.
    """
    channels = picture.shape[2]
    if channels not in (1, 3, 4):
        raise ValueError(f"image must have 1, 3 or 4 channels; got {channels}")
    samples = np.floor(np.clip(np.nan_to_num(picture), 0, 1) * FULL + 0.5).astype(np.uint16)
    rgb = np.ascontiguousarray(samples[..., :3] if channels > 1 else samples.repeat(3, axis=2))
    result = upscaler.upscale(rgb, **options).astype(np.float32) / FULL
    if strength < 1:
        result = strength * result + (1 - strength) * _bicubic(rgb, result.shape)
    if channels == 4:
        result = np.concatenate([result, _bicubic(samples[..., 3:], result.shape)], axis=2)
    return result[..., :1] if channels == 1 else result


def _bicubic(samples: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[H,W,C] uint16 -> [H',W',C] float32 in [0,1], as the run time enlarges."""
    size = (shape[0], shape[1])
    planes = resize_window(samples, size, (0, size[0]), (0, size[1]))
    return np.clip(planes.transpose(1, 2, 0) / FULL, 0, 1).astype(np.float32)


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [LoadUpscaler, Upscale]


async def comfy_entrypoint() -> ComfyExtension:
    """Where ComfyUI asks for the nodes."""
    return Extension()
