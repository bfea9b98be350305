"""A Ray cluster of two nodes on this machine, as a process of its own: python -m tests.support.ray_cluster

It prints its address, does what the lines of its standard input say (`remove`: the second node dies), and ends with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPUS = (6, 2)  # logical ones of the nodes


class Cluster:
    """The process, for tests. Use as a context manager."""

    def __enter__(self) -> Cluster:
        command = [sys.executable, "-m", "tests.support.ray_cluster"]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = self._answer()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=120)
        assert self._process.stdout
        self._process.stdout.close()

    def remove_node(self) -> None:
        """The second node is lost, with all that runs there."""
        assert self._process.stdin
        self._process.stdin.write("remove\n")
        self._process.stdin.flush()
        assert self._answer() == "removed"

    def workers(self) -> list[int]:
        """Processes that make pictures."""
        return [pid for pid, title in _below(self._process.pid) if title.startswith("ray::") and "Enlarger" in title]

    def _answer(self) -> str:
        assert self._process.stdout
        line = self._process.stdout.readline().strip()
        if not line:
            raise RuntimeError("the Ray cluster did not start, or ended")
        return line


def _below(ancestor: int) -> Iterator[tuple[int, str]]:
    """Processes that descend from one, and their titles."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended
    for pid in parents:
        above = pid
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor and pid != ancestor:
            try:
                yield pid, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue


def main() -> None:
    from engine.bulk.cluster import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster as RayCluster

    options = {"include_dashboard": False, "object_store_memory": 128 << 20}
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": CPUS[0], **options})
    second = cluster.add_node(num_cpus=CPUS[1], wait=False, **options)
    cluster.wait_for_nodes(timeout=120)
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
            print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
