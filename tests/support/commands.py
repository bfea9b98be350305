"""`python -m MODULE ...` to its end, without the seconds in which a new process imports torch and its friends.

Each command is a process of its own: a fork of a server that has imported those libraries, and nothing of ours. Its
interpreter ends as after any program: exit code, signals, traceback, `atexit`. What differs from a true start is what
happens before our code does; so start-up, blocked imports, kills and signals are tested with true ones.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "torch", "torch.utils.data", "torch.utils.checkpoint", "torch._dynamo", "accelerate", "peft", "jsonargparse",
    "matplotlib.figure", "matplotlib.backends.backend_agg",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_tiny", "diffusers.schedulers.scheduling_ddpm",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip", "onnx", "PIL.Image",
    "scipy.ndimage", "scipy.signal", "safetensors.torch", "tqdm", "yaml",
)  # fmt: skip
PLACES = ("engine/*.py", "engine/*/__main__.py", "gdpo/*.py", "gdpo/*/__main__.py")
COMMANDS = sorted(  # python -m NAME, found in the tree
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for place in PLACES
    for file in ROOT.glob(place)
    if '\nif __name__ == "__main__":' in file.read_text("utf-8")
)
READ = ("ACCELERATE_", "CUDA", "DIFFUSERS_", "HF_", "HOME", "LD_", "MPL", "OMP_", "PYTHON", "TORCH", "TRANSFORMERS_",
        "TRITON_", "XDG_CACHE")  # how variables begin that the libraries read when they are imported  # fmt: skip


AT_FIRST = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def environment(**extra: str) -> dict[str, str]:
    """What our commands are started with. What the libraries read is as this process found it: torch sets
    TORCHINDUCTOR_CACHE_DIR once something was compiled here, and every later command would be a true start. A test that
    wants such a variable to differ gives it as `extra`."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(READ)}
    return {**ours, **{k: v for k, v in AT_FIRST.items() if k.startswith(READ)}, **extra}


def run(module: str, *arguments: object, cwd: Path = ROOT, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m module arguments` with further environment variables, and wait for its end.

    Where one differs that the server's libraries have read, it is a true start.
    """
    variables, words = environment(**extra), list(map(str, arguments))
    if _read(variables) == _read(AT_FIRST):
        return _server().run(module, words, [variables], cwd)
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def run_ranks(count: int, module: str, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """The same command in `count` processes that find each other, with the variables that torchrun gives them.

    As with torchrun, the others are told to end when one fails, and are killed after a minute. Output and exit code are
    of all, one after the other.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    shared |= {"LOCAL_WORLD_SIZE": str(count)}
    each = [environment(**extra, **shared, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(count)]
    assert _read(each[0]) == _read(AT_FIRST), "ranks are forks"
    return _server().run(module, list(map(str, arguments)), each, ROOT)


def _read(variables: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in variables.items() if k.startswith(READ) and k != "PYTHONPATH"}


@functools.cache
def _server() -> Server:
    server = Server()
    atexit.register(server.close)
    return server


class Server:
    """Takes one command at a time, of one or several processes: a JSON line in, their ids and the exit code out."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.commands"],
            cwd=ROOT, env=AT_FIRST, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def run(
        self, module: str, words: list[str], each: list[dict[str, str]], cwd: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run it once for each environment, at the same time."""
        with tempfile.TemporaryDirectory() as folder:
            outs, errs = ([Path(folder, f"{name}{i}") for i in range(len(each))] for name in ("out", "err"))
            requests = [
                [module, words, variables, str(cwd), str(out), str(err)]
                for variables, out, err in zip(each, outs, errs)
            ]
            self.process.stdin.write(json.dumps(requests) + "\n")
            self.process.stdin.flush()
            pids = json.loads(self.process.stdout.readline())
            try:
                code = int(self.process.stdout.readline())
            except BaseException:  # Ctrl-C, or pytest's own time limit
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                _server.cache_clear()
                self.process.kill()
                self.close()
                raise
            out, err = ("".join(file.read_text() for file in files) for files in (outs, errs))
            return subprocess.CompletedProcess([module, *words], code, out, err)


def serve() -> str:
    """Fork for the requests of each line of stdin. Returns in a child alone: the module that it is to run."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # an extra that is not installed
            importlib.import_module(name)
    deadline = time.monotonic() + 60  # matplotlib's timer, while it makes its list of fonts on a new machine
    while len(os.listdir("/proc/self/task")) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/task")) == 1, "a library started a thread (onnxruntime does): a fork may hang"
    gc.freeze()
    for line in sys.stdin:
        running = []
        for request in json.loads(line):
            running.append(os.fork())
            if not running[-1]:
                return become(*request)
        print(running, flush=True)
        failed, until = 0, 0.0
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG if failed else 0)
            if not pid:
                if time.monotonic() > until:  # it waits for one that has ended
                    for other in running:
                        os.kill(other, signal.SIGKILL)
                time.sleep(0.05)
                continue
            running.remove(pid)
            if (code := os.waitstatus_to_exitcode(status)) and not failed:
                failed, until = code, time.monotonic() + 60
                for other in running:
                    os.kill(other, signal.SIGTERM)
        print(failed, flush=True)
    sys.exit()


def become(module: str, words: list[str], variables: dict[str, str], cwd: str, out: str, err: str) -> str:
    """Take what a new process would have been given."""
    for place, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, out, os.O_WRONLY | os.O_CREAT),
        (2, err, os.O_WRONLY | os.O_CREAT),
    ):
        opened = os.open(name, flags)
        os.dup2(opened, place)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = [module, *words]
    sys.path[:1] = [cwd, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    return module


def main() -> None:
    status = 0

    def leave() -> None:
        """The last thing of all: an interpreter would now free what the libraries hold, object by object."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # before the libraries register theirs, for the last one comes first
    module = serve()
    status = 1  # an exception that nobody catches
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


if __name__ == "__main__":
    main()
