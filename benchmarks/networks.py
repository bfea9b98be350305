"""Published networks tuned by GDPO on the free photos, as docs/integrations.md says it, and what that changed.

    python -m benchmarks.networks animevideov3 dat-light --write-rows

For each: gdpo.convert, a short NAOSD, gdpo.merge (or, with --noise, gdpo.convert --noise alone), GDPO, and the
comparison on held-out crops; with --write-rows, a row in benchmarks/results/networks.jsonl. After an interruption the
same command goes on where it stopped. The crops are those of configs/tiny-naosd.yaml.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveFloat, PositiveInt

from benchmarks.peers import dat_light
from engine.io import rows
from engine.io.cli import Parser, run
from engine.io.files import atomic_write
from gdpo.evaluation.before_after import Options, measure, table
from gdpo.generator import OneStepGenerator
from gdpo.train.pictures import read_metrics

NETWORKS = {  # what gdpo.convert takes
    "animevideov3": lambda: "real-esrgan-animevideov3",
    "x4plus": lambda: "real-esrgan-x4plus",
    "realsr-df2k": lambda: "realsr-df2k",
    "dat-light": dat_light,
}


def command(*words: Any) -> None:
    """Run a module of gdpo; its errors are its own. Ctrl-C reaches it too, and it saves a checkpoint."""
    process = subprocess.Popen([sys.executable, "-m", *map(str, words)])
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    if status:
        sys.exit(status)


def train(stage: str, model: Path, out: Path, options: dict[str, Any]) -> None:
    """A stage of configs/network-*.yaml, or the rest of it.

    Raises:
        ValueError: `out` holds a run with other options.
    """
    if (out / "config.json").is_file():
        found = json.loads((out / "config.json").read_text("utf-8"))
        for name, value in {"model.pretrained": str(model), **options}.items():
            had = functools.reduce(lambda part, key: part[key], name.split("."), found)
            if had != value:
                raise ValueError(f"{out} was trained with {name} {had}, not {value}; give another --out")
    if not (out / "model").is_dir():
        words = ["--config", f"configs/network-{stage}.yaml", "--model.pretrained", model, "--output_dir", out]
        words += [word for name, value in options.items() for word in (f"--{name}", json.dumps(value))]
        command("gdpo.train", stage, *words, "--resume_from_checkpoint", "auto")


def options(args: Any, stage: int) -> dict[str, Any]:
    """What both stages take."""
    return {
        "data.crop_size": args.crop,
        "max_train_steps": args.steps[stage],
        "train_batch_size": args.batch[stage],
    }


def step_time(out: Path) -> float:
    """Seconds of a step, the median of a run's log."""
    return statistics.median(r["step_time"] for r in read_metrics(out / "metrics.jsonl") if "step_time" in r)


def main() -> int:
    p = Parser(prog="python -m benchmarks.networks", description=__doc__)
    p.add_argument("names", nargs="+", choices=NETWORKS, help="networks to tune")
    p.add_argument("--out", type=Path, default=Path("runs/networks"), help="folder of the runs")
    p.add_argument("--steps", type=PositiveInt, nargs=2, default=[200, 200], help="of NAOSD and of GDPO")
    p.add_argument("--crop", type=PositiveInt, default=128, help="side of the training crops")
    p.add_argument("--batch", type=PositiveInt, nargs=2, default=[2, 2], help="pictures of a step of NAOSD and of GDPO")
    p.add_argument("--group", type=PositiveInt, default=6, help="samples of a picture in GDPO")
    p.add_argument("--learning-rate", type=PositiveFloat, default=1e-4, help="of GDPO; transformers want a smaller one")
    p.add_argument("--rewards", nargs="+", default=["psnr_y", "naturalness"], help="of GDPO and of the comparison")
    p.add_argument("--beta", type=PositiveFloat, default=5000, help="of GDPO; a smaller one where samples differ much")
    p.add_argument(
        "--noise", type=PositiveFloat | None, help="the network sees so much noise on its LR (8-bit levels): no NAOSD"
    )
    p.add_argument("--crops", type=PositiveInt, default=64, help="held-out crops of the comparison")
    p.add_argument("--noises", type=PositiveInt, default=4, help="samples of each model per crop")
    p.add_argument("--write-rows", action="store_true", help="append to benchmarks/results/networks.jsonl")
    args = p.parse_args()
    if args.write_rows:
        rows.require_clean()
    for name in args.names:
        folder = args.out / name
        start, naosd, gdpo = (folder / part for part in ("start", "naosd", "gdpo"))
        noisy = folder / (f"noise-{args.noise:g}" if args.noise else "noisy")
        if args.noise and not noisy.is_dir():
            command("gdpo.convert", NETWORKS[name](), "--noise", args.noise, "--out", noisy)
        elif not noisy.is_dir():
            if not start.is_dir():
                command("gdpo.convert", NETWORKS[name](), "--out", start)
            train("naosd", start, naosd, options(args, 0))
            command("gdpo.merge", naosd / "model", "--out", noisy)
        more = {"num_generations": args.group, "learning_rate": args.learning_rate, "beta": args.beta}
        train("gdpo", noisy, gdpo, options(args, 1) | more | {"reward_funcs": args.rewards})
        generator = OneStepGenerator.from_pretrained(gdpo / "model")
        how = {"out": str(folder), "crops": args.crops, "noises": args.noises, "reward_funcs": tuple(args.rewards)}
        result = measure(generator, Options(str(gdpo / "model"), **how))
        text = table(result)
        atomic_write(folder / "table.md", text)
        print(f"\n{name}\n\n{text}")
        about = {"network": name, "parameters": parameters(noisy), "steps": args.steps[1], "crop": args.crop}
        about |= {"gdpo_batch": args.batch[1], "group": args.group, "gdpo_learning_rate": args.learning_rate}
        about |= {"beta": args.beta, "rewards": args.rewards, "gdpo_step_s": step_time(gdpo)}
        if args.noise:
            about |= {"noise": args.noise}
        else:
            about |= {"naosd_steps": args.steps[0], "naosd_batch": args.batch[0], "naosd_step_s": step_time(naosd)}
        if args.write_rows:
            rows.append_row("networks", **about, **result)
    return 0


def parameters(folder: Path) -> int:
    """Of the network in a generator's folder."""
    network = OneStepGenerator.from_pretrained(folder).unet.network
    return sum(p.numel() for p in network.parameters())


if __name__ == "__main__":
    run(main)
