"""The service's addresses and their documentation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.exceptions import HTTPException

from engine.io.formats import BY_SUFFIX, KINDS, SUFFIXES, kind_of
from engine.runtime import color as colors
from engine.runtime.upscaler import Upscaler
from engine.serve.guard import Guard, State, refusal
from engine.serve.metrics import Metrics
from engine.serve.work import Limits, Refused, Task, Works
from engine.settings import Settings

_POLL = 0.5  # seconds between looks whether the client is still there


def _kind(value: object) -> object:
    return kind_of(value) if isinstance(value, str) else value


class Upscale(BaseModel):
    """The fields of a request. All but `image` are options of `python -m engine.upscale` and mean the same."""

    model_config = ConfigDict(extra="forbid")

    image: UploadFile = Field(description="the picture, as a file")
    seed: int = Field(0, description="random seed of the noise; the same seed gives the same picture")
    scale: float | None = Field(None, description="factor (default: 4); any other factor resizes the x4 result")
    width: int | None = Field(None, description="largest width in pixels, instead of a factor")
    height: int | None = Field(None, description="largest height in pixels, instead of a factor")
    longest: int | None = Field(None, description="length of the longer side in pixels, instead of a factor")
    tile: int = Field(0, ge=0, description="longest tile side in input pixels; 0: the model's choice")
    color: Literal[colors.METHODS] = Field(  # type: ignore[valid-type]
        colors.DEFAULT, description="method that matches the colours to the input's"
    )
    background: str | None = Field(None, description="colour under transparent pixels (white, #ff8800)")
    wrap: Literal["none", "both", "horizontal"] = Field("none", description="edges that join")
    format: Annotated[Literal[KINDS] | None, BeforeValidator(_kind)] = Field(  # type: ignore[valid-type]
        None, description="of the result (default: the input's)"
    )
    quality: int = Field(95, description="quality of lossy formats, 1 to 100")
    lossless: bool = Field(False, description="lossless WebP and JPEG XL")
    strip_metadata: bool = Field(False, description="leave out EXIF, XMP and text; keep the colour profile")


def create_app(
    ups: Sequence[Upscaler], limits: Limits | None = None, *, metrics: Metrics | None = None, token: str | None = None
) -> FastAPI:
    """The service as an ASGI application.

    Args:
        ups: one loaded model for each device, which threads may share.
        limits: what it takes on.
        metrics: where its figures go; the models' batches may go there too.
        token: asked of whoever sends pictures; None lets everybody in.

    Returns:
        The application; `app.state.service` is its State, `app.state.works` its Works.
    """
    limits, metrics = limits or Limits(), metrics or Metrics()
    state, works = State(), Works(ups, limits, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        works.close()

    app = FastAPI(title="GDPO-SR", summary="One-step image super-resolution, x4", lifespan=lifespan, redoc_url=None)
    app.state.service, app.state.works = state, works
    app.add_middleware(Guard, works=works, limits=limits, metrics=metrics, state=state, token=token)  # type: ignore[arg-type]
    _add_refusals(app)

    @app.post("/v1/upscale", response_class=Response, responses=_answers())
    async def upscale(form: Annotated[Upscale, Form(media_type="multipart/form-data")], request: Request) -> Response:
        """Upscale one picture; the bytes are those of `python -m engine.upscale` with the same options."""
        if request.query_params:
            raise Refused(422, "options are fields of the form, beside the picture; the address has none (see /docs)")
        if len((await request.form()).getlist("image")) > 1:
            raise Refused(422, "image: one picture a request; send the others in requests of their own")
        options = form.model_dump(exclude={"image", "format"})
        try:
            settings = Settings.of(**options, max_pixels=limits.max_pixels)
            ups[0].check_tiling(settings.tile)
        except ValueError as error:
            raise Refused(422, str(error)) from None
        name = PurePath(form.image.filename or "image").name[:100]
        name = "".join(c if c.isprintable() else "_" for c in name) or "image"
        data = await form.image.read()
        task = Task(name, data, settings, form.format, time.monotonic())
        kind, made = await _unless_gone(task, works, request)
        file = quote(f"{PurePath(name).stem}.{kind}")
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{file}"}
        return Response(made, media_type=BY_SUFFIX[f".{kind}"].media, headers=headers)

    @app.head("/health", include_in_schema=False)
    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> str:
        """200 as long as the process answers."""
        return "ok"

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready", response_class=PlainTextResponse, responses={503: {"description": "stopping"}})
    async def ready() -> Response:
        """200 while pictures are accepted."""
        return PlainTextResponse("stopping" if state.stopping else "ready", 503 if state.stopping else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def figures() -> Response:
        """Figures for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def _unless_gone(task: Task, works: Works, request: Request) -> tuple[str, bytes]:
    """The result; the work ends early when the client leaves."""
    making = asyncio.ensure_future(works.make(task))
    try:
        while not (await asyncio.wait({making}, timeout=_POLL))[0]:
            if await request.is_disconnected():
                task.cancelled.set()
        return making.result()
    except asyncio.CancelledError:  # the server's grace has ended
        task.cancelled.set()
        raise


def _add_refusals(app: FastAPI) -> None:
    """Every answer that is no picture is {"error": "one sentence"}."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return refusal(error.code, str(error), error.retry)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        unread = error.status_code in (408, 413)
        answer = refusal(error.status_code, str(error.detail), close=unread)
        answer.headers.update(error.headers or {})  # such as which methods an address takes
        return answer

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        words = {
            "extra_forbidden": "there is no such field (see /docs)",
            "missing": "this field is missing (see /docs)",
        }
        faults = [
            f"{f['loc'][-1]}: "
            + ("send the picture as a file, with a name" if f["loc"][-1] == "image" and f["type"] == "value_error"
               else words.get(f["type"], f["msg"]))
            for f in error.errors()[:5]
        ]  # fmt: skip
        return refusal(422, "; ".join(faults))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal(500, f"the picture could not be made ({type(error).__name__})")


def _answers() -> dict[int | str, dict[str, Any]]:
    """What else than a picture may come, for the documentation."""
    error = {"application/json": {"schema": {"type": "object", "properties": {"error": {"type": "string"}}}}}
    reasons = {
        401: "the token is missing or wrong",
        408: "the request took too long to arrive",
        413: "too many bytes or pixels",
        415: "not multipart, or not a picture of a kind that is read",
        422: "an option that is not what it should be, or a damaged picture",
        429: "too many pictures are waiting; Retry-After says when to come back",
        503: "the service is stopping",
        504: "not finished within the time limit",
    }
    media = dict.fromkeys(BY_SUFFIX[suffix].media for suffix in SUFFIXES)
    picture = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in media}
    refusals: dict[int | str, dict[str, Any]] = {
        code: {"description": reason, "content": error} for code, reason in reasons.items()
    }
    return {200: {"description": "the result", "content": picture}, **refusals}
