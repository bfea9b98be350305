"""How long `make demo` and `make test` take whoever has just cloned the project, set-up included.

    python -m benchmarks.fresh_clone demo test      # on a quiet machine; the output goes to runs/fresh-clone/TARGET.log

Each target runs in a clone of its own of this commit; a row in benchmarks/results/fresh_clone.jsonl says how it ended.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from engine.io import rows
from engine.io.cli import Parser, run


def measure(target: str, log: Path) -> tuple[float, int]:
    """Seconds and exit status of `make TARGET` in a new clone."""
    with tempfile.TemporaryDirectory(prefix="fresh-clone-") as folder:
        subprocess.run(["git", "clone", "--quiet", rows.ROOT, f"{folder}/clone"], check=True)
        started = time.perf_counter()
        with log.open("wb") as output:
            done = subprocess.run(["make", "-C", f"{folder}/clone", target], stdout=output, stderr=subprocess.STDOUT)
        return time.perf_counter() - started, done.returncode


def main() -> int:
    parser = Parser(prog="python -m benchmarks.fresh_clone", description=__doc__)
    parser.add_argument("targets", nargs="+", choices=["setup", "lint", "demo", "test", "test-all"])
    parser.add_argument("--out", type=Path, default=Path("runs/fresh-clone"), help="the folder of the logs")
    args = parser.parse_args()
    rows.require_clean()
    args.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for target in args.targets:
        seconds, status = measure(target, args.out / f"{target}.log")
        rows.append_row("fresh_clone", target=target, seconds=round(seconds, 1), status=status)
        print(f"make {target}: {seconds:.0f} s, exit {status}; {args.out / target}.log")
        failed |= status
    return failed


if __name__ == "__main__":
    run(main)
