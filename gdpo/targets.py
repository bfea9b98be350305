"""`python -m gdpo.targets --config F.yaml`: the teacher's targets of a NAOSD config, made before training.

Existing targets are checked and kept, so an interrupted run can simply be repeated. Several processes can share the
work: `--part 1/2` and `--part 2/2`.
"""

from __future__ import annotations

import re
import sys

from engine.io.cli import Parser, run


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"--part must be K/N with 1 <= K <= N, such as 1/2; got {text}")
    return int(found[1]), int(found[2])


def main() -> None:
    from gdpo.train.__main__ import ConfigFile
    from gdpo.train.config import NAOSDConfig
    from gdpo.train.options import several

    parser = Parser(prog="python -m gdpo.targets", description="Compute the pictures of NAOSD's teacher beforehand.")
    parser.add_argument("--config", action=ConfigFile, help="YAML file of `gdpo.train naosd`")
    parser.add_argument("--part", type=str, default="1/1", help="K/N: the K-th of N processes that share the work")
    parser.add_class_arguments(NAOSDConfig, nested_key=None)
    values = parser.instantiate(parser.parse_args())
    part, parts = _part(values.part)
    config = NAOSDConfig(**{k: v for k, v in vars(values).items() if k not in ("config", "part")})
    config.validate()
    if not config.teacher.name:
        raise ValueError("teacher.name is empty: this config has no teacher, and needs no targets")
    if config.teacher.is_generator:
        raise ValueError(f"teacher.name is {config.teacher.name}, a generator: it draws while the other trains")

    import torch
    from tqdm import tqdm

    from gdpo.degradation import Degradation
    from gdpo.train.teacher import Targets

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = config.teacher.crops(several(config.data.folder))
    targets = Targets(config.teacher, folder, Degradation(config.degradation), config.seed, device)
    made, mine = 0, range(part - 1, config.teacher.count, parts)
    for number in tqdm(mine, desc="targets", file=sys.stderr):
        made += not targets.file(number).is_file()
        targets.get(number)
    print(f"{targets.folder}: {made} targets made, {len(mine) - made} were there")


if __name__ == "__main__":
    run(main)
