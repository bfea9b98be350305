"""The HTTP service as a process on the loopback."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import requests

ROOT = Path(__file__).parents[2]


class Service:
    """`python -m engine.serve` with these arguments, on a free port; ends with the block."""

    def __init__(self, *arguments: object, **environment: str):
        import os

        command = [sys.executable, "-m", "engine.serve", "--port", "0", *map(str, arguments)]
        env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=env)
        self.lines = []
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"listening on (http://127\.0\.0\.1:(\d+))", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise RuntimeError(f"the service did not start: {''.join(self.lines)}")

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def post(self, data: bytes, name: str = "in.png", **fields: object) -> requests.Response:
        files, values = {"image": (name, data)}, {key: str(value) for key, value in fields.items()}
        return requests.post(f"{self.url}/v1/upscale", files=files, data=values, timeout=120)

    def figures(self) -> dict[str, float]:
        lines = requests.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}

    def resident(self) -> int:
        """Bytes of memory that the process has."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self) -> tuple[int, str]:
        """The exit code, and what came to stderr."""
        rest = self.process.communicate(timeout=120)[1]
        return self.process.returncode, "".join(self.lines) + rest
