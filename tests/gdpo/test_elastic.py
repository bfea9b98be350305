"""Elastic training: processes come and go (torchrun --nnodes=MIN:MAX), and the model is that of a straight run."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gdpo.train.config import NAOSDConfig
from tests.gdpo.test_train_invariants import distance, weights
from tests.support.training import NAOSD, ROOT, environment, train_here

STEPS = 40
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/training.md


def test_accumulation_follows_from_the_processes():
    for processes, accumulation in ((1, 4), (2, 2), (4, 1)):
        config = NAOSDConfig(train_batch_size=2, global_batch_size=8)
        config.accumulate(processes)
        assert config.gradient_accumulation_steps == accumulation
    for processes in (3, 8):
        with pytest.raises(ValueError, match=rf"global_batch_size must be a multiple of {2 * processes} "):
            NAOSDConfig(train_batch_size=2, global_batch_size=8).accumulate(processes)


RENDEZVOUS = """
import os, sys, threading, time
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

def node(host):
    given = RendezvousParameters("c10d", f"127.0.0.1:{sys.argv[1]}", "test", 1, 2, local_addr="127.0.0.1", is_host=host,
                                 last_call_timeout=1)
    backend, store = create_backend(given)
    return create_handler(store, backend, given)

def join(name, handler):
    found[name] = handler.next_rendezvous()

found, first, second = {}, node(True), node(False)
join("alone", first)
late = threading.Thread(target=join, args=("second", second))
late.start()
while not first.num_nodes_waiting():
    time.sleep(0.05)
join("first", first)
late.join()
print([found["alone"].world_size] + sorted({(found[n].world_size, found[n].bootstrap_store_info.master_port ==
      found["first"].bootstrap_store_info.master_port) for n in ("first", "second")}), flush=True)
os._exit(0)
"""


def test_a_machine_that_comes_later_finds_the_others():
    """torch's rendezvous alone, as docs/training.md has it started: where the agents share their store, the first one
    tells its address once, and who comes later waits for it in vain."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", RENDEZVOUS, str(port)]
    done = subprocess.run(command, env=environment(**OWN_STORE), capture_output=True, text=True, timeout=300)
    assert done.stdout == "[1, (2, True)]\n", done.stderr[-2000:]


def test_the_manual_starts_it_so():
    ((name, value),) = OWN_STORE.items()
    assert f"export {name}={value}\ntorchrun --nnodes 1:4 " in (ROOT / "docs" / "training.md").read_text()


def options(crops: Path, out: Path) -> list[str]:
    common = ["--global_batch_size=2", "--train_batch_size=1", "--checkpointing_steps=5", "--validation_steps=0"]
    return [*NAOSD, f"--data.folder={crops}", f"--output_dir={out}", f"--max_train_steps={STEPS}", *common]


def steps(out: Path) -> list[int]:
    """Of the rows that are written so far."""
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row["step"] for row in rows if "loss" in row]


def wait_until(holds: Callable[[], object], seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.02)


def _pending(pid: int) -> int:
    """Signals that wait for a process, a bit for each."""
    return int(re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)


class Node:
    """torchrun's agent of one machine, with one process."""

    def __init__(self, host: int, port: int, log: Path, *arguments: str):
        conf = f"is_host={host},last_call_timeout=3,keep_alive_interval=1"
        launch = ["-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=9",
                  "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test",
                  f"--rdzv_conf={conf}", "--local_addr=127.0.0.1"]  # fmt: skip
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *launch, "-m", "gdpo.train", *arguments],
                cwd=ROOT, env=environment(**OWN_STORE), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self.log = log

    def kill(self) -> None:
        """As when the machine is switched off: the agent, and its process, which has a session of its own."""
        for pid in (self.process.pid, *self.children()):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def children(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Its training stands still until the agent asks it to end: a node that comes meanwhile is never too late."""
        (worker,) = self.children()
        os.kill(worker, signal.SIGSTOP)
        yield
        wait_until(lambda: _pending(worker) >> signal.SIGTERM - 1 & 1)
        os.kill(worker, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_then_one_then_two_equal_a_straight_run(crops, tmp_path, monkeypatch):
    straight, elastic = tmp_path / "straight", tmp_path / "elastic"
    train_here(monkeypatch, *options(crops, straight))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = (*options(crops, elastic), "--resume_from_checkpoint=auto")
    nodes = [Node(1, port, tmp_path / "first.log", *arguments)]

    def reached(processes: int, step: int) -> bool:
        assert nodes[0].process.poll() is None, nodes[0].log.read_text()[-3000:]
        return max(steps(elastic), default=0) >= step and count() == processes

    def count() -> int:
        return json.loads((elastic / "environment.json").read_text())["processes"]

    try:
        nodes.append(Node(0, port, tmp_path / "second.log", *arguments))
        wait_until(lambda: reached(2, 4))
        nodes[1].kill()
        lost = max(steps(elastic))
        wait_until(lambda: reached(1, lost + 1))
        with nodes[0].held():
            alone = max(steps(elastic))
            nodes.append(Node(0, port, tmp_path / "third.log", *arguments))
        for node in (nodes[0], nodes[2]):
            assert node.process.wait(timeout=600) == 0, node.log.read_text()[-3000:]
        assert 4 <= lost < alone < STEPS
        assert count() == 2
    finally:
        for node in nodes:
            if node.process.poll() is None:
                node.kill()
    assert steps(elastic) == steps(straight) == list(range(1, STEPS + 1))
    assert distance(weights(straight), weights(elastic)) < 2e-5
