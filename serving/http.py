"""A request's way in: who may ask, how large and how slow it may be; and every error as an answer of one line."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from serving import RequestError
from serving.metrics import Metrics

log = logging.getLogger("uvicorn.error")

JSON = "application/json"
STATUS_NOBODY_WAITS = 499
"""In the metrics: the client went away before its request was complete (nginx's number for it)."""

Handler = Callable[[Request, bytes], Awaitable[Response]]
"""Request without and with its body -> response; raises RequestError."""
ErrorBody = Callable[[str], object]
"""What a refusal says -> its JSON."""


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    body_bytes: int = 16 * 2**20
    timeout_s: float = 30
    token: str = ""
    """Secret that `Authorization: Bearer` has to show; empty: everyone may ask."""


class Endpoint:
    """An ASGI application around one handler: limits before it, errors and metrics after it."""

    def __init__(
        self,
        name: str,
        handler: Handler,
        limits: Limits,
        metrics: Metrics,
        *,
        public: bool = False,
        error_body: ErrorBody = lambda message: {"error": message},
    ) -> None:
        """`name` is the endpoint's in the metrics; a `public` one needs no token."""
        self._name, self._handler, self._limits, self._metrics = name, handler, limits, metrics
        self._token = b"" if public else f"Bearer {limits.token}".encode() * bool(limits.token)
        self._error_body = error_body
        self._in_progress = metrics.in_progress.labels(name)
        self._seconds = metrics.seconds.labels(name)
        self._answered = metrics.requests.labels(name, "200")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, response = time.perf_counter(), None
        self._in_progress.inc()
        try:
            response = await self._respond(scope, receive)
        except ConnectionError:
            self._metrics.requests.labels(self._name, str(STATUS_NOBODY_WAITS)).inc()
            return
        except RequestError as error:
            response = self._refusal(error)
        except Exception:
            log.exception("%s %s", scope["method"], scope["path"])
            response = self._refusal(RequestError("internal error; the service's log has it", 500))
        finally:
            self._in_progress.dec()
        self._seconds.observe(time.perf_counter() - started)
        if response.status_code == 200:
            self._answered.inc()
        else:
            self._metrics.requests.labels(self._name, str(response.status_code)).inc()
        await response(scope, receive, send)

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        if self._token and not hmac.compare_digest(header(scope, b"authorization"), self._token):
            raise RequestError("give the header 'Authorization: Bearer TOKEN'", 401)
        body, late = None, False
        task = asyncio.current_task()
        assert task is not None

        def give_up() -> None:
            nonlocal late
            late = True
            task.cancel()

        # asyncio.timeout would do the same, and takes 5 us of the 100 that a whole request takes.
        timer = asyncio.get_running_loop().call_later(self._limits.timeout_s, give_up)
        try:
            body = await read_body(scope, receive, self._limits.body_bytes)
            return await self._handler(Request(scope), body)
        except asyncio.CancelledError:
            if not late or task.uncancel():
                raise
            if body is None:
                message, status = "the body did not arrive", 408
            else:
                message, status = "the service is too busy for an answer", 504
            raise RequestError(f"{message} within {self._limits.timeout_s:g} s", status) from None
        finally:
            timer.cancel()

    def _refusal(self, error: RequestError) -> Response:
        if error.status in (400, 413, 415):
            self._metrics.bad_inputs.labels(self._name).inc()
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        if error.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(orjson.dumps(self._error_body(str(error))), error.status, headers, JSON)


class Shortcuts(Router):
    """A router that looks for whole paths in a table before it tries its patterns one after the other."""

    def __init__(self, shortcuts: Mapping[tuple[str, str], tuple[ASGIApp, dict[str, str]]], *args: Any, **others: Any):
        """`shortcuts` gives for a method and a path what its pattern would: the application, and what it captured."""
        super().__init__(*args, **others)
        self._shortcuts = shortcuts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = self._shortcuts.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        if found is None:
            await super().__call__(scope, receive, send)
        else:
            application, scope["path_params"] = found
            await application(scope, receive, send)


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of that (lower-case) name, or nothing."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The whole body, decompressed; RequestError 413 as soon as it is seen to be larger than `most` bytes."""
    length = header(scope, b"content-length")
    if length.isdigit() and (len(length) > 18 or int(length) > most):
        raise _too_large(most)
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the client went away")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _too_large(most)
        more = message.get("more_body", False)
    body = parts[0] if len(parts) == 1 else b"".join(parts)
    encoding = header(scope, b"content-encoding").lower()
    return body if encoding in (b"", b"identity") else _decompress(body, encoding, most)


def _decompress(body: bytes, encoding: bytes, most: int) -> bytes:
    if encoding not in (b"gzip", b"deflate"):
        raise RequestError("Content-Encoding: allowed are gzip and deflate", 415)
    decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header
    try:
        plain = decoder.decompress(body, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not {encoding.decode()}: {error}") from None
    if len(plain) > most:
        raise _too_large(most)
    if not decoder.eof:
        raise RequestError("the compressed body is cut short")
    return plain


def _too_large(most: int) -> RequestError:
    return RequestError(f"the body is larger than {most} bytes, the most that is taken", 413)
