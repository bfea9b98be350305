"""Throughput of the HTTP service: many requests at a time against one at a time, in the same run.

    python -m benchmarks.serve [--requests 60] [--concurrency 16] [--rounds 3] [--model FOLDER] [--dry]

The service is a process on the loopback. The same pictures of mixed sizes are sent one after another, then
`--concurrency` at a time; the two take turns. Every answer must be the same both ways. Prints pictures a second, the
latency that a client sees, and how many tiles the batches had; appends a row to benchmarks/results/serve.jsonl.
`--dry`: no row.
"""

from __future__ import annotations

import io
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import requests
from PIL import Image
from skimage import data

from engine.io import cli
from engine.io.rows import ROOT, append_row, require_clean

_SIDES = (24, 40, 64, 96, 128)


def pictures(count: int) -> list[bytes]:
    """Crops of a photo, of mixed sizes, as PNG."""
    photo, rng, out = data.astronaut(), np.random.default_rng(0), []
    for i in range(count):
        height, width = _SIDES[i % 5], _SIDES[rng.integers(5)]
        top, left = rng.integers(0, 512 - height), rng.integers(0, 512 - width)
        file = io.BytesIO()
        Image.fromarray(photo[top : top + height, left : left + width]).save(file, "PNG")
        out.append(file.getvalue())
    return out


def send(url: str, files: list[bytes], concurrency: int) -> tuple[float, list[float], list[bytes]]:
    """Seconds in all, seconds of each request, and the answers."""

    def one(file: bytes) -> tuple[float, bytes]:
        begin = time.perf_counter()
        answer = requests.post(f"{url}/v1/upscale", files={"image": ("in.png", file)}, timeout=600)
        answer.raise_for_status()
        return time.perf_counter() - begin, answer.content

    begin = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as clients:
        done = list(clients.map(one, files))
    return time.perf_counter() - begin, [seconds for seconds, _ in done], [content for _, content in done]


def batches(url: str) -> dict[str, int]:
    """Batches so far by the number of tiles that they had at most."""
    text = requests.get(f"{url}/metrics", timeout=30).text
    found = re.findall(r'^gdpo_batch_tiles_bucket{le="([\d.]+)"} (\S+)$', text, re.M)
    totals = [int(float(value)) for _, value in found]
    return {f"{float(le):g}": total - before for (le, _), total, before in zip(found, totals, [0, *totals])}


def main() -> int:
    p = cli.Parser(prog="python -m benchmarks.serve", description=__doc__.partition("\n")[0])
    p.add_argument("--requests", type=int, default=60, help="number of pictures")
    p.add_argument("--concurrency", type=int, default=16, help="requests at a time")
    p.add_argument("--rounds", type=int, default=3, help="turns of each kind")
    p.add_argument("-n", "--model", help="an engine folder (default: the bundled model)")
    p.add_argument("--dry", action="store_true", help="no row")
    options = p.parse_args()
    if not options.dry:
        require_clean()
    files = pictures(options.requests)
    more = ["--model", options.model] if options.model else []
    command = [sys.executable, "-m", "engine.serve", "--port", "0", "--queue", str(options.requests), *more]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        url = next((m[1] for line in process.stderr if (m := re.search(r"(http://\S+)", line))), None)
        if url is None:
            raise RuntimeError("the service did not start")
        send(url, files[:8], 1)
        alone, together, seconds, shared = [], [], [], {}
        for _ in range(options.rounds):
            total, _, expected = send(url, files, 1)
            alone.append(len(files) / total)
            before = batches(url)
            total, each, answers = send(url, files, options.concurrency)
            together.append(len(files) / total)
            seconds += each
            shared = {le: shared.get(le, 0) + n - before[le] for le, n in batches(url).items()}
            if answers != expected:
                raise RuntimeError("answers differ between one and many at a time")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
    one, many = statistics.median(alone), statistics.median(together)
    p50, p99 = np.quantile(seconds, (0.5, 0.99))
    print(f"one at a time  {one:.2f} pictures/s")
    print(f"{options.concurrency} at a time   {many:.2f} pictures/s ({many / one:.2f}x), "
          f"p50 {p50:.2f} s, p99 {p99:.2f} s")  # fmt: skip
    most = max(shared.values())
    for le, n in shared.items():
        if n:
            print(f"  batches of up to {le:>2} tiles {n:6d} {'#' * round(40 * n / most)}")
    if not options.dry:
        path = append_row("serve", what="serve", requests=len(files), concurrency=options.concurrency,
                          rounds=options.rounds, model=options.model or "bundled", one_per_s=one, many_per_s=many,
                          ratio=many / one, ratios=[m / a for m, a in zip(together, alone)], p50_s=float(p50),
                          p99_s=float(p99), batches=shared, same_bytes=True)  # fmt: skip
        print(f"row: {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
