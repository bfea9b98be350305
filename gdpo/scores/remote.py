"""A reward that another process computes: `http://host:port/score`, as `python -m gdpo.rewards serve NAME` answers it.

    GET  URL   {"name": "musiq", "kind": "perceptual"}
    POST URL   safetensors: samples [B,G,3,H,W], target [B,3,H,W], fp32 in [-1,1]  ->  safetensors: scores [B,G] fp32

The floats travel as they are, so a score is the one that the same function gives in this process.
"""

from __future__ import annotations

import json
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, IncompleteRead, InvalidURL
from typing import Any, cast
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from gdpo.scores.registry import Kind

_MOST = 16 << 20  # bytes of an answer
_PART = 1 << 16  # bytes that are read at a time
_BUSY = (408, 425, 429)  # codes below 500 of a server that may answer later
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # seconds between tries
STOPPING = threading.Event()  # set while the program is asked to end: nobody waits for a server that is away


@dataclass(frozen=True)
class Patience:
    """`timeout`: seconds for one answer; `wait`: seconds until a server that does not answer is given up."""

    timeout: float = 60.0
    wait: float = 600.0


class _Stay(urllib.request.HTTPRedirectHandler):
    """A POST that is sent elsewhere would arrive there as a GET, without its pictures."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = urllib.request.build_opener(_Stay).open


class RemoteReward:
    """A reward behind a URL.

    Raises:
        ValueError: nobody answers there within the patience, or what answers is no reward.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url, self.patience = url, patience
        try:
            reason = "" if urlsplit(url).hostname and urlsplit(url).port != 0 else "it names no host"
        except ValueError as error:  # brackets, a port out of range
            reason = str(error)
        if reason:
            raise ValueError(f"{url} is not the address of a reward ({reason})")
        told = self._asked(None)
        try:
            about = json.loads(told)
            self.name, kind = str(about["name"]), about["kind"]
        except (ValueError, KeyError, TypeError, RecursionError):
            kind = None
        if kind not in ("fidelity", "perceptual") or not self.name.isprintable():
            raise ValueError(f"reward {url!r}: no reward answers there, but {told[:60]!r}")
        self.kind = cast(Kind, kind)

    def start(self, samples: Tensor, target: Tensor) -> Callable[[], Tensor]:
        """Send [B,G,3,H,W] and [B,3,H,W]; the function that comes back waits for the scores [B,G], on their device.

        It raises ValueError where the server is given up, refuses, or answers with something else.
        """
        tensors = {"samples": samples, "target": target}
        body = save({k: v.detach().float().cpu().contiguous() for k, v in tensors.items()})
        answer: list[bytes | BaseException] = []

        def ask() -> None:
            try:
                answer.append(self._asked(body))
            except BaseException as error:
                answer.append(error)

        thread = threading.Thread(target=ask, daemon=True)  # a program that ends does not wait for it
        thread.start()

        def scores() -> Tensor:
            thread.join()
            if isinstance(answer[0], BaseException):
                raise answer[0]
            return self._read(answer[0], tuple(samples.shape[:2])).to(samples.device)

        return scores

    def _read(self, content: bytes, shape: tuple[int, ...]) -> Tensor:
        try:
            values = load(content)["scores"]
        except (SafetensorError, KeyError):
            raise ValueError(f"{self.url} must answer safetensors with scores; got {content[:60]!r}") from None
        if values.shape != shape or not values.is_floating_point():
            raise ValueError(
                f"{self.url} must answer one number per picture, scores {list(shape)}; "
                f"got {values.dtype} {list(values.shape)}"
            )
        return values.float()

    def _asked(self, body: bytes | None) -> bytes:
        """The answer to GET (None) or POST; a server that is away is asked again until the patience or the run ends."""
        end, pause, told = time.monotonic() + self.patience.wait, _FIRST_PAUSE, False
        while True:
            try:
                return self._once(body)
            except urllib.error.HTTPError as error:
                reason = _detail(error)
                if error.code in range(300, 400):
                    to = f" ({error.headers['Location']})" if error.headers["Location"] else ""
                    raise ValueError(f"{self.url} is elsewhere: {reason}{to}; name the address itself") from None
                if error.code < 500 and error.code not in _BUSY:
                    raise ValueError(f"{self.url} refuses: {reason}") from None
            except (InvalidURL, UnicodeError, OverflowError) as error:
                raise ValueError(f"{self.url} is not the address of a reward ({error})") from None
            except (OSError, HTTPException) as error:  # URLError and timeouts are OSErrors
                reason = " ".join(str(getattr(error, "reason", error)).split())[:200] or type(error).__name__
            if STOPPING.is_set():
                raise ValueError(f"{self.url} did not answer before the run was to stop ({reason})") from None
            if time.monotonic() + pause > end:
                raise ValueError(f"{self.url} did not answer for {self.patience.wait:g} s ({reason})") from None
            if not told:
                told = True
                tqdm.write(f"waiting for the reward at {self.url} ({reason})", file=sys.stderr)
            STOPPING.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _once(self, body: bytes | None) -> bytes:
        request = urllib.request.Request(self.url, data=body, headers={"Content-Type": "application/octet-stream"})
        timeout, content = self.patience.timeout, bytearray()
        end = time.monotonic() + timeout
        with _open(request, timeout=timeout) as response:
            while part := response.read1(_PART):
                content += part
                if len(content) > _MOST:
                    raise ValueError(f"{self.url} answers more than {_MOST >> 20} MiB")
                if time.monotonic() > end:  # the socket's own time-out begins anew with every byte
                    raise TimeoutError("timed out")
            if response.length:  # it ended before what it promised
                raise IncompleteRead(bytes(content), response.length)
        return bytes(content)


def _detail(error: urllib.error.HTTPError) -> str:
    """What a server says about a request that it refused or failed at, in one line."""
    try:
        text = error.read(1000).decode("utf-8", "replace")
        told: Any = json.loads(text)["detail"]
    except (ValueError, KeyError, TypeError, OSError):
        told = error.reason
    return f"{error.code} {' '.join(str(told).split())}"[:300]


def answer(content: bytes, score: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> bytes:
    """The server's side: the body of a POST -> the body of its answer.

    Raises:
        ValueError: the body is not what the module's docstring says, or the reward fails.
    """
    try:
        tensors = load(content)
        samples, target = tensors["samples"], tensors["target"]
    except (SafetensorError, KeyError):
        raise ValueError("the body must be safetensors with samples and target") from None
    if samples.dtype != torch.float32 or target.dtype != torch.float32:
        raise ValueError(f"samples and target must be float32; got {samples.dtype} and {target.dtype}")
    with torch.no_grad():
        scores = score(samples.to(device), target.to(device))
    return save({"scores": scores.float().cpu().contiguous()})
