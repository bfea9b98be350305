"""Serve the engine over HTTP: `python -m engine.serve`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from engine.io import cli
from engine.io.listen import listen
from engine.io.notices import say
from engine.runtime.backends.registry import BACKENDS
from engine.runtime.upscaler import Upscaler

TOKEN = "GDPO_TOKEN"
_FIRST_WORD = 5.0  # seconds that a new connection has for its first request when the service stops


def parser() -> cli.Parser:
    p = cli.Parser(
        prog="python -m engine.serve",
        description="Serve the engine over HTTP: POST /v1/upscale takes a picture and returns the bytes that "
        "python -m engine.upscale would write. /docs describes its fields; /health, /ready and /metrics are for "
        "monitoring.",
        epilog=f"If the environment variable {TOKEN} is set, clients must send its value. On SIGTERM the service "
        "finishes the requests that it has accepted, and ends. Exit codes: 0 stopped, 1 stopped with work "
        "unfinished, 2 bad usage.",
    )
    p.add_argument("-n", "--model", help="engine folder, or a bundled model: tiny, quality or faithful (default: tiny)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on")
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any that is free")
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-mib", type=float, default=64, help="size limit of a request, in MiB")
    limits.add_argument("--max-pixels", type=int, default=16_000_000, help="size limit of an input, and of all that "
                        "are worked on at a time; a result has up to 16 times as many")  # fmt: skip
    limits.add_argument("--at-once", type=int, default=8, help="number of pictures worked on at a time, per device")
    limits.add_argument("--queue", type=int, default=64, help="number of pictures that may wait; more get 429")
    limits.add_argument("--seconds", type=float, default=300, help="time limit of a picture, waiting included")
    limits.add_argument("--body-seconds", type=float, default=60, help="time limit for a request to arrive")
    limits.add_argument("--grace-seconds", type=float, default=300, help="time limit for finishing after SIGTERM")
    served = [name for name, backend in BACKENDS.items() if backend.runs_folders]
    machine = p.add_argument_group("machine")
    machine.add_argument(
        "--backend", default="auto", metavar="NAME", help=f"auto, {', '.join(served)} (auto: the model's own)"
    )
    machine.add_argument("--device", nargs="+", default=[], help="cpu, cuda or cuda:N; several: a worker for each")
    machine.add_argument("--precision", default="auto", choices=("auto", "fp32", "fp16", "bf16"),
                         help="number format of the computation")  # fmt: skip
    machine.add_argument("--batch", type=int, help="number of tiles in a batch (default: the model's largest)")
    machine.add_argument("--threads", type=int, default=0, help="number of CPU threads; 0: all")
    machine.add_argument("--trust-plan", action="store_true", help="load a TensorRT plan that was built elsewhere "
                         "(it is executable code)")  # fmt: skip
    return p


def main() -> int:
    options = parser().parse_args()
    _check(options)
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise RuntimeError(f"{error.name} is not installed; pip install 'gdpo-sr[serve]'") from None
    from uvicorn.protocols.http.h11_impl import H11Protocol

    from engine.serve.app import create_app
    from engine.serve.batches import SharedUpscaler
    from engine.serve.metrics import Metrics
    from engine.serve.protocol import protocol
    from engine.serve.work import Limits

    listener = listen(options.host, options.port)
    metrics = Metrics()
    ups = [
        SharedUpscaler(_load(options, device), options.batch, metrics.batch.observe)
        for device in options.device or [None]
    ]
    for up in ups:
        up.upscale(np.zeros((8, 8, 3), np.uint8))  # a model that cannot run says so now
    limits = Limits(
        int(options.max_mib * 2**20), options.max_pixels, options.at_once, options.queue, options.seconds,
        options.body_seconds,
    )  # fmt: skip
    token = os.environ.get(TOKEN) or None
    app = create_app(ups, limits, metrics=metrics, token=token)

    class Server(uvicorn.Server):
        """Stops when what was accepted is finished; until then it answers that it stops."""

        until = 0.0

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        def handle_exit(self, sig: int, frame: Any) -> None:
            if app.state.service.stopping:  # asked twice: at once
                self.should_exit = self.force_exit = True
            app.state.service.stopping, self.until = True, time.monotonic() + options.grace_seconds

        async def on_tick(self, counter: int) -> bool:
            service = app.state.service
            if service.stopping and (service.open == 0 or time.monotonic() > self.until):
                self.should_exit = True
            return await super().on_tick(counter)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            until = time.monotonic() + _FIRST_WORD
            # Whoever has just connected is told that the service stops; uvicorn would only hang up.
            while time.monotonic() < until and not self.force_exit:
                if not any(isinstance(c, H11Protocol) and c.cycle is None for c in self.server_state.connections):
                    break
                await asyncio.sleep(0.02)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, http=protocol(limits.body_seconds), ws="none", log_level="error", access_log=False, server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=5, limit_concurrency=1024,
    )  # fmt: skip
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    say(f"{ups[0].backend}, {ups[0].precision}: listening on {address} (documentation: /docs)")
    if token is None and not host.startswith("127.") and host != "::1":
        say(f"warning: anyone who reaches {host}:{port} may send pictures; set {TOKEN} to ask for a token")
    Server(config).run(sockets=[listener])
    unfinished = app.state.service.open
    if unfinished:
        with contextlib.suppress(OSError):  # whoever read stderr may be gone
            say(f"stopped; {unfinished} accepted pictures were not finished")
            sys.stderr.flush()
        os._exit(1)  # their threads would go on
    say("stopped; all accepted pictures were finished")
    return 0


def _check(options: Any) -> None:
    for name in ("max_mib", "max_pixels", "at_once", "seconds", "body_seconds"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name.replace('_', '-')} must be more than 0; got {getattr(options, name)}")
    for name in ("queue", "grace_seconds"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name.replace('_', '-')} must be 0 or more; got {getattr(options, name)}")
    if options.backend in BACKENDS and not BACKENDS[options.backend].runs_folders:
        raise ValueError(f"backend {options.backend} is not served; export the model (python -m engine.export)")


def _load(options: Any, device: str | None) -> Upscaler:
    return Upscaler.load(
        options.model,
        options.backend,
        device,
        threads=options.threads,
        trust_plan=options.trust_plan,
        precision=options.precision,
        core=False,
    )


def console() -> None:
    cli.run(main)


if __name__ == "__main__":
    console()
