"""Export a generator's folder to ONNX: `python -m engine.export MODEL --out DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from engine.export.descriptors import geometry_of, profile_of
from engine.export.generator import PRECISIONS, export_generator
from engine.export.weights import STORED
from engine.io import cli
from gdpo.generator import OneStepGenerator


def main() -> int:
    parser = cli.Parser(prog="python -m engine.export", description="Export a generator's folder to ONNX.")
    parser.add_argument("model", help="a generator's folder, or hub:ORG/NAME")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--precision", default="fp32", choices=PRECISIONS, help="number format of the graphs")
    parser.add_argument(
        "--weights",
        default="fp32",
        choices=STORED,
        help="how an fp32 graph stores its weights; fp16 halves the file, int8 quarters it",
    )
    parser.add_argument(
        "--on-cpu",
        default="fp32",
        choices=("fp32", "bf16"),
        help="number format in which a CPU computes an fp32 graph; bf16: where OpenVINO and the CPU have it",
    )
    parser.add_argument("--opset", type=int, default=23, help="ONNX opset version")
    parser.add_argument(
        "--split", action="store_true", help="write three graphs (encoder, unet, decoder) instead of one"
    )
    parser.add_argument("--static", action="store_true", help="fix the batch and tile size, for a faster plan")
    parser.add_argument("--batch", type=int, default=1, help="typical batch size")
    parser.add_argument("--max-batch", type=int, default=8, help="largest batch size")
    parser.add_argument("--tile", type=int, default=512, help="typical tile side, in output pixels")
    parser.add_argument("--max-tile", type=int, default=1024, help="largest tile side, in output pixels")
    parser.add_argument(
        "--image-to-image", action="store_true", help="also write one graph from picture to picture, for other programs"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the noise in the --image-to-image graph")
    parser.add_argument("--no-check", action="store_true", help="skip the comparison with torch")
    parser.add_argument("--t-noise", type=int, help="override the folder's noise timestep")
    parser.add_argument("--t-diffusion", type=int, help="override the folder's diffusion timestep")
    options = parser.parse_args()
    generator = OneStepGenerator.from_pretrained(options.model, options.t_noise, options.t_diffusion)
    geometry = geometry_of(generator)
    sizes = {k: options[k] for k in ("batch", "max_batch", "tile", "max_tile", "static")}
    if getattr(generator.unet, "windowed", False) and not options.static:
        name = generator.unet.architecture
        print(f"note: {name} works on windows: the graph is for tiles of one size, as by --static", file=sys.stderr)
        sizes["static"] = True
    manifest = export_generator(
        generator,
        Path(options.out),
        precision=options.precision,
        weights=options.weights,
        on_cpu=options.on_cpu,
        opset=options.opset,
        split=options.split,
        profile=profile_of(geometry, **sizes),
        image_to_image=options.image_to_image,
        seed=options.seed,
        check=not options.no_check,
        model={"name": Path(options.model).name},
    )
    from engine.info import describe

    print(describe(Path(options.out), manifest))
    return 0


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
