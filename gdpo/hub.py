"""A model's card, and its way to the Hugging Face Hub: `python -m gdpo.hub MODEL --license ID [--push ORG/NAME]`.

Without --push nothing leaves the machine: MODEL/README.md is written, to be read and changed.
"""

from __future__ import annotations

from pathlib import Path

from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from gdpo.model.hub import model_card, upload
from gdpo.model.parts import refuse_checkpoint


def main() -> None:
    parser = Parser(prog="python -m gdpo.hub", description="Write a model's card and push the model to the Hub.")
    parser.add_argument("model", type=str, help="a model folder")
    parser.add_argument(
        "--license", type=str | None, help="licence of the weights, as the Hub names it (such as apache-2.0)"
    )
    parser.add_argument(
        "--photos",
        type=str | None,
        help="photos.json of the training photos (titles, authors, licences), or its folder",
    )
    parser.add_argument("--evaluation", type=str | None, help="results.json of python -m gdpo.evaluate, or its folder")
    parser.add_argument("--row", type=str | None, help="name of this model in the evaluation (default: the only one)")
    parser.add_argument("--dataset", type=str, default="a folder of pairs", help="name of the evaluation's data")
    parser.add_argument("--push", type=str | None, metavar="ORG/NAME", help="repository to push to, made if needed")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder's README.md")
    options = parser.parse_args()
    folder = Path(options.model)
    refuse_checkpoint(folder)
    if not (folder / "generator.json").is_file():
        raise FileNotFoundError(f"{folder / 'generator.json'}: no such file; expected a folder that this project saved")
    card = folder / "README.md"
    if options.overwrite or not card.is_file():
        if options.license is None:
            raise ValueError("--license must name the licence of the weights (apache-2.0, openrail++, other, ...)")
        photos, evaluation = (None if p is None else Path(p) for p in (options.photos, options.evaluation))
        text = model_card(
            folder,
            licence=options.license,
            photos=photos,
            evaluation=evaluation,
            row=options.row,
            dataset=options.dataset,
        )
        atomic_write(card, text.replace("ORG/NAME", options.push) if options.push else text)
        print(f"{card}: written")
    elif options.license or options.photos or options.evaluation:
        raise FileExistsError(f"{card} exists; --overwrite replaces it, or leave out --license, --photos, --evaluation")
    if options.push:
        print(upload(folder, options.push, private=options.private))


if __name__ == "__main__":
    run(main)
