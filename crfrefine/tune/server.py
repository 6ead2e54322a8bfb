"""The page over HTTP, on this machine.

Its address holds a random token; only this module needs the libraries of the extra `tune`.

Requests with another host in their header are refused: no page of another site can reach it through
a name that leads to 127.0.0.1.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, get_args, get_type_hints
from urllib.parse import unquote

from crfrefine.errors import BackendUnavailableError, CrfRefineError, InputError
from crfrefine.tune.session import Session
from crfrefine.tune.tools import Tools
from crfrefine.tune.values import Json
from crfrefine.tune.worklist import NoSuchCaseError, Worklist

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import (
        BaseHTTPMiddleware,
        DispatchFunction,
        RequestResponseEndpoint,
    )
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, RedirectResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from starlette.types import ASGIApp
except ImportError as error:
    raise BackendUnavailableError(
        f"the page of tune needs starlette and uvicorn: pip install 'crfrefine[tune]' ({error})"
    ) from error

HOST = "127.0.0.1"
_HOSTS = [HOST, "localhost"]
_MAX_BODY = 16 << 20  # bytes of a request; the longest are strokes
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def serve(worklist: Worklist, port: int, tell: Callable[[str, str], None]) -> None:
    """Serve the page on a port (0: any free one) until it ends itself or Ctrl-C.

    `tell` gets its address, and another that leads there a single time. InputError: port taken.
    """

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # A page that still waits for a result would be cut off, and its traceback printed.
            worklist.end()
            _be_silent()
            super().handle_exit(sig, frame)

    def end() -> None:
        _be_silent()
        server.should_exit = True

    kept_port, token = worklist.kept.address or (0, secrets.token_urlsafe(24))
    ticket = secrets.token_urlsafe(24)
    app = make_app(worklist, token, end, [ticket])
    server = Server(
        uvicorn.Config(app, log_config=None, server_header=False, timeout_graceful_shutdown=2)
    )
    with _listen(port, kept_port) as listener:
        # Connections inherit it; else the end of an answer waits 40 ms for the browser to confirm
        # its beginning.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        present_port = listener.getsockname()[1]
        worklist.kept.use_address(present_port, token)
        root = f"http://{HOST}:{present_port}"
        tell(f"{root}/{token}/", f"{root}/{ticket}/")
        server.run(sockets=[listener])


def _listen(port: int, kept_port: int) -> socket.socket:
    """Take a port; with 0 the earlier one of the folder, if it is free, or any free one."""
    if not port:
        with suppress(OSError, OverflowError):
            return socket.create_server((HOST, kept_port))
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        raise InputError(
            f"--port {port}: {error.strerror or error}; leave it out, and any free port is taken"
        ) from error


def _be_silent() -> None:
    """Say nothing of requests that the end of the program cuts off."""
    logging.getLogger("uvicorn.error").disabled = True


def make_app(
    worklist: Worklist, token: str, end: Callable[[], None], tickets: list[str]
) -> ASGIApp:
    """Return the application.

    Every address begins with the token, and `end` is called when the page asks to end. A ticket in
    its place leads to the page once: other users may read the command line of a browser.
    """

    def describe(request: Request) -> Response:
        return _as_json(worklist.session(_case_number(request)).describe())

    def plane(request: Request) -> Response:
        view = _checked(_parsed(unquote(request.url.query)), _kinds_of(Session.plane))
        content = worklist.session(_case_number(request)).plane(**view)
        return Response(content, media_type="application/octet-stream")

    def projection(request: Request) -> Response:
        view = _checked(_parsed(unquote(request.url.query)), _kinds_of(Tools.projection))
        content = worklist.session(_case_number(request)).tools.projection(**view)
        return Response(content, media_type="image/png")

    def search(number: int, act: Callable[..., Json], **asked: Any) -> Json:
        return act(worklist.session(number).tools, **asked)

    def close() -> Json:
        worklist.end()
        end()
        return {}

    def post(name: str, act: Callable[..., Json], do: Callable[..., Json] | None = None) -> Route:
        """Return the route of a request that sends the arguments of an action.

        `do` does the action with the case of a number, which is in the address.
        """
        kinds = _kinds_of(act)
        if "{number}" in name:
            kinds.pop("number", None)
        action = act if do is None else partial(do, act=act)

        async def answer(request: Request) -> Response:
            sent = _parsed(await _body(request))
            case_id = sent.pop("case", None)
            values = _checked(sent, kinds)
            if request.path_params:
                values["number"] = _case_number(request)
            if case_id is not None:  # The number may be that of an earlier start.
                values["number"] = worklist.number_of(case_id)
            return _as_json(await run_in_threadpool(action, **values))

        return Route(f"/{name}", answer, methods=["POST"])

    assets = StaticFiles(packages=[("crfrefine.tune", "assets")], html=True)
    routes = [
        Route("/cases", lambda request: _as_json(worklist.describe())),
        Route("/alive", lambda request: _as_json({})),
        Route("/case/{number}/describe", describe),
        Route("/case/{number}/plane/{version}", plane),
        Route("/case/{number}/projection/{version}", projection),
        post("case/{number}/find", Tools.find, search),
        post("case/{number}/refine", Session.refine, worklist.ask),
        post("case/{number}/choose", worklist.choose),
        post("case/{number}/draw", Session.draw, worklist.edit),
        post("case/{number}/undo", Session.undo, worklist.edit),
        post("case/{number}/redo", Session.redo, worklist.edit),
        post("case/{number}/look", worklist.look),
        post("case/{number}/save", Session.save, worklist.ask),
        post("case/{number}/save-case", Session.save_case, worklist.in_case),
        post("open", worklist.open),
        post("read-ahead", worklist.read_ahead),
        post("count-changes", worklist.count_changes),
        post("keep", worklist.keep),
        post("review", worklist.review),
        post("save-all", worklist.save_all),
        post("save-anew", worklist.save_anew),
        post("end", close),
        Mount("/", assets),
    ]
    guards = [
        Middleware(BaseHTTPMiddleware, dispatch=_guard(token, tickets)),
        Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False),
    ]
    refusals = {
        CrfRefineError: lambda request, error: _as_json({"error": str(error)}, 400),
        NoSuchCaseError: lambda request, error: _as_json({"error": str(error)}, 404),
    }
    return Starlette(
        routes=[Mount(f"/{token}", routes=routes)], middleware=guards, exception_handlers=refusals
    )


def _case_number(request: Request) -> int:
    """Return the number of the case in an address."""
    sent = request.path_params["number"]
    if re.fullmatch("[0-9]{1,9}", sent) is None:
        raise InputError("no such case")
    return int(sent)


def _as_json(content: Json, status: int = 200) -> Response:
    # ASCII: names of cases need not be UTF-8, and their surrogates have no other encoding.
    return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")


def _guard(token: str, tickets: list[str]) -> DispatchFunction:
    """Return what refuses addresses without the token, and adds the headers of every answer."""

    async def dispatch(request: Request, answer: RequestResponseEndpoint) -> Response:
        sent_token = request.url.path.split("/")[1]
        # That of this page; None without a page.
        origin = request.headers.get("origin")
        is_own = origin in (None, f"http://{request.headers.get('host')}")
        response: Response
        if sent_token in tickets:
            tickets.remove(sent_token)
            response = RedirectResponse(f"/{token}/", 303)
        elif not secrets.compare_digest(sent_token.encode(), token.encode()):
            response = PlainTextResponse(
                "wrong address: take the one that crfrefine tune printed", 403
            )
        elif not is_own:
            response = PlainTextResponse("a page of another site may not ask this one", 403)
        else:
            response = await answer(request)
        response.headers.update(_HEADERS)
        return response

    return dispatch


async def _body(request: Request) -> bytes:
    """Return the content of a request; raise InputError if it is too long."""
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > _MAX_BODY:
            raise InputError(f"expected at most {_MAX_BODY} bytes")
    return bytes(content)


def _parsed(content: str | bytes) -> Json:
    """Return the table that the page sent as JSON."""
    try:
        sent = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("expected JSON") from error
    if not isinstance(sent, dict):
        raise InputError("expected a table")
    return sent


def _kinds_of(act: Callable[..., object]) -> Json:
    """Return the kinds of the values that an action takes, by their names."""
    kinds = {}
    for name, kind in get_type_hints(act).items():
        if name != "return":
            kinds[name] = getattr(kind, "__origin__", kind)  # that of a list, without its entries
    return kinds


def _checked(sent: Json, kinds: Json) -> Json:
    """Return the values that the page sent if each is of its kind; lists have whole numbers."""
    is_fit = sent.keys() == kinds.keys()
    for name, kind in kinds.items():
        # Numbers need no decimal point.
        allowed = (float, int) if kind is float else get_args(kind) or (kind,)
        is_fit = is_fit and type(sent[name]) in allowed
    if not is_fit:
        texts = [f"{name} ({getattr(kind, '__name__', kind)})" for name, kind in kinds.items()]
        expected = ", ".join(texts)
        raise InputError(f"expected {expected or 'an empty table'}")
    for name, value in sent.items():
        if isinstance(value, list) and not all(type(entry) is int for entry in value):
            raise InputError(f"{name}: expected whole numbers")
    return sent
