"""Serve rewards to training runs: `python -m gdpo.rewards serve musiq maniqa`.

Served rewards have their own environment and device, so they may use packages that would break training (pyiqa's
torchvision beside a CPU build of torch). A run names them as `http://HOST:PORT/score/musiq`.

This is the command alone: what rewards there are says gdpo.scores.registry, gdpo.scores.rewards makes them from their
names, and gdpo.scores.remote is what travels.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from engine.io.cli import Parser, run
from engine.io.listen import listen


def parser() -> Parser:
    """The command line."""
    top = Parser(prog="python -m gdpo.rewards", description="Serve rewards to training runs over HTTP.")
    commands = top.add_subcommands(dest="command")
    p = Parser(prog="python -m gdpo.rewards serve", description="Serve rewards to training runs over HTTP.")
    p.add_argument("names", nargs="+", metavar="NAME", help="a score of the registry, or module:function of your own")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on")
    p.add_argument("--port", type=int, default=8000, help="port to listen on; 0: any that is free")
    p.add_argument("--device", default="cpu", help="device of the rewards' networks: cpu, cuda or cuda:N")
    prog = p.prog
    commands.add_subcommand("serve", p, help="answer POST /score/NAME with a number for each picture")
    p.prog = prog  # jsonargparse puts "[options]" into it, which no shell takes
    return top


def application(names: list[str], device: str) -> Any:
    """The ASGI application.

    Raises:
        ValueError: a reward that is unknown, or that training takes from statistics of its step.
    """
    import torch
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    from gdpo.scores.registry import SCORES
    from gdpo.scores.remote import answer
    from gdpo.scores.rewards import build_rewards

    for name in names:
        if name in SCORES and SCORES[name].statistic is not None:
            raise ValueError(
                f"reward {name!r} is not served: training takes it from its step's own statistics, at no cost, so name "
                f"it there without a URL; served are {', '.join(n for n, s in SCORES.items() if s.statistic is None)}, "
                "and module:function"
            )
    rewards = dict(zip(names, build_rewards(names, device), strict=True))  # an old name is an address too
    one_at_a_time = threading.Lock()

    def scored(name: str, content: bytes) -> bytes:
        with one_at_a_time:  # so that the device holds the maps of one request
            return answer(content, lambda x, y: rewards[name].score(x, y, None), torch.device(device))

    async def endpoint(request: Request) -> Response:
        name = request.path_params.get("name") or (next(iter(rewards)) if len(rewards) == 1 else "")
        if name not in rewards:
            there = ", ".join(f"/score/{known}" for known in rewards)
            return JSONResponse({"detail": f"no such reward here; there is {there}"}, 404)
        if request.method == "GET":
            return JSONResponse({"name": rewards[name].name, "kind": rewards[name].kind})
        try:
            content = await run_in_threadpool(scored, name, await request.body())
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 422)
        return Response(content, media_type="application/octet-stream")

    paths = ("/score", "/score/{name:path}")
    return Starlette(routes=[Route(path, endpoint, methods=["GET", "POST"]) for path in paths])


def main() -> None:
    options = parser().parse_args()
    if options.command is None:
        raise ValueError("say what to do: python -m gdpo.rewards serve NAME...")
    options = options[options.command]
    try:
        import uvicorn
    except ImportError as error:
        raise ValueError("serving needs starlette and uvicorn; pip install 'gdpo-sr[train,serve]'") from error
    app = application(options.names, options.device)
    with listen(options.host, options.port) as listening:
        port = listening.getsockname()[1]
        for name in options.names:
            print(f"http://{options.host}:{port}/score/{name}", file=sys.stderr, flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


if __name__ == "__main__":
    run(main)
