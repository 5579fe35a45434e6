"""The web server of the page: this machine only, one answer at a time, nothing of the file system.

A page of another site, open in the same browser, can neither ask nor read: requests must name this host,
come from this page, and be JSON.
"""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import anyio
import uvicorn
from anyio.to_thread import run_sync
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lora_gpt2.errors import UserError
from lora_gpt2.playground.models import Playground
from lora_gpt2.playground.openapi import described

HOST = "127.0.0.1"

_BYTES, _SECONDS, _WAITING = 64 * 1024, 10, 8
"""Of a request: its size, the time to send it, and how many may wait for the one before."""

_FILES = {"/": ("page.html", "text/html"), "/page.js": ("page.js", "text/javascript"),
          "/page.css": ("page.css", "text/css")}  # fmt: skip

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def application(playground: Playground) -> Starlette:
    """GET / is the page, GET /about what it offers, GET /openapi.json how to ask; POST /decode asks."""
    turn, waiting = anyio.Lock(), anyio.CapacityLimiter(_WAITING)
    offered = described(playground)

    async def openapi(request: Request) -> Response:
        return JSONResponse(offered, headers=_HEADERS)

    async def about(request: Request) -> Response:
        return JSONResponse(playground.about(), headers=_HEADERS)

    async def decode(request: Request) -> Response:
        _check_origin(request)
        asked = await _body(request)
        try:
            waiting.acquire_on_behalf_of_nowait(request)
        except anyio.WouldBlock:
            raise HTTPException(503, "others are waiting already; ask again later") from None
        try:
            async with turn:
                answer = await run_sync(playground.decode, asked)
        except UserError as error:
            raise HTTPException(422, str(error)) from None
        except TimeoutError:
            raise HTTPException(503, f"took longer than {playground.seconds:g} seconds") from None
        finally:
            waiting.release_on_behalf_of(request)
        return JSONResponse(answer, headers=_HEADERS)

    async def failed(request: Request, error: Exception) -> Response:
        status, told = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "")
        return JSONResponse({"error": told or "an error inside the server"}, status, headers=_HEADERS)

    return Starlette(
        routes=[
            *(Route(path, _file(*file)) for path, file in _FILES.items()),
            Route("/about", about),
            Route("/openapi.json", openapi),
            Route("/decode", decode, methods=["POST"]),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
        exception_handlers={HTTPException: failed, Exception: failed},
    )


def serve(playground: Playground, port: int, told: Callable[[str], None]) -> None:
    """Answers until it is interrupted; `told` hears the address. Port 0: any that is free.

    Raises UserError for a port that is taken.
    """
    try:
        listening = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise UserError("--port", f"{port} cannot be had ({error})", "choose another, or 0 for any") from None
    with listening:
        told(f"http://{HOST}:{listening.getsockname()[1]}")
        config = uvicorn.Config(
            application(playground), log_level="warning", server_header=False, limit_concurrency=64,
            timeout_keep_alive=_SECONDS, timeout_graceful_shutdown=1,
        )  # fmt: skip
        uvicorn.Server(config).run(sockets=[listening])


def _file(name: str, kind: str) -> Callable[[Request], Response]:
    content = (Path(__file__).parent / name).read_bytes()
    return lambda request: Response(content, media_type=kind, headers=_HEADERS)


def _check_origin(request: Request) -> None:
    """Raises HTTPException unless our own page asks, or a program that is no browser."""
    origin, host = request.headers.get("origin"), request.headers.get("host")
    if origin is not None and origin.partition("://")[2] != host:
        raise HTTPException(403, "another site's page asks")
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "application/json was expected")


async def _body(request: Request) -> object:
    """The request as JSON. Raises HTTPException for one that is too long, too slow, or no JSON."""
    body = b""
    try:
        with anyio.fail_after(_SECONDS):
            async for part in request.stream():
                body += part
                if len(body) > _BYTES:
                    raise HTTPException(413, f"more than {_BYTES} bytes")
    except TimeoutError:
        raise HTTPException(408, f"took longer than {_SECONDS} seconds to send") from None
    except ClientDisconnect:
        raise HTTPException(400, "was not sent to its end") from None
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "no JSON") from None
