"""The page over HTTP, on this machine alone. The only module that needs the libraries of the extra `tune`.

Whoever knows the address may use the page: it holds a random token. Requests with another host in their header are refused, so that no
page of another site can reach it through a name that leads to 127.0.0.1.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import socket
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from crfrefine.errors import BackendUnavailableError, CrfRefineError, InputError

if TYPE_CHECKING:
    from types import FrameType

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from crfrefine.apps.tune.session import Session

HOST = "127.0.0.1"
_HOSTS = [HOST, "localhost"]
_LIBRARIES = ("starlette", "uvicorn")
_ASSETS = files("crfrefine.apps.tune") / "assets"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_MAX_WAIT = 20.0  # s; then the page asks again.
_MAX_BYTES = 1 << 20  # of what the page sends
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def check_libraries() -> None:
    """Raise BackendUnavailableError if the libraries that serve the page are not installed."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f"the page of tune needs {' and '.join(missing)}: pip install 'crfrefine[tune]'")


def serve(session: Session, port: int, tell: Callable[[str], None]) -> None:
    """Serve the page on a port (0: any that is free) until it ends itself; Ctrl-C raises KeyboardInterrupt.

    `tell` is called with the page's address when it can be opened.

    Raises:
        BackendUnavailableError: the extra `tune` is not installed.
        InputError: the port is taken.
    """
    check_libraries()
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            session.wake()  # A page that still waits for news would be cut off, and its traceback printed.
            super().handle_exit(sig, frame)

    token = secrets.token_urlsafe(24)
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror or error}; leave it out, and any free port is taken") from error
    with listener:
        config = uvicorn.Config(
            make_app(session, token, lambda: setattr(server, "should_exit", True)),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            loop="asyncio",
            http="h11",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=2,
        )
        server = Server(config)
        tell(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        server.run(sockets=[listener])


def make_app(session: Session, token: str, end: Callable[[], None]) -> ASGIApp:
    """Return the application; every address begins with the token, and `end` is called when the page asks to end."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Mount, Route

    def as_json(content: dict[str, Any], status: int = 200) -> Response:
        # ASCII: names of cases need not be UTF-8, and their surrogates have no other encoding.
        return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")

    def asset(request: Request) -> Response:
        name = request.path_params.get("name", "page.html")
        found = {item.name: item for item in _ASSETS.iterdir()}.get(name)
        if found is None:
            return PlainTextResponse("not found", 404)
        return Response(found.read_bytes(), media_type=_TYPES[f".{name.rpartition('.')[2]}"])

    def describe(request: Request) -> Response:
        return as_json(session.describe())

    def news(request: Request) -> Response:
        return as_json(session.news(_number(request, "after"), _MAX_WAIT))

    def plane(request: Request) -> Response:
        content = session.plane(*(_number(request, name) for name in ("number", "index", "modality")))
        return Response(content, media_type="application/octet-stream")

    def post(action: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            sent = await _sent(request)
            return as_json(await run_in_threadpool(action, sent))

        return answer

    def close(sent: dict[str, Any]) -> dict[str, Any]:
        end()
        session.wake()
        return {}

    async def refuse(request: Request, error: Exception) -> Response:
        return as_json({"error": str(error)}, 400)

    actions: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "change": lambda sent: session.change(_table(sent, "changes"), _place(sent)),
        "preset": lambda sent: session.take_preset(str(sent.get("name", "")), _place(sent)),
        "save": lambda sent: session.save(),
        "end": close,
    }
    routes = [
        Route("/", asset),
        Route("/describe", describe),
        Route("/news", news),
        Route("/plane", plane),
        *(Route(f"/{name}", post(action), methods=["POST"]) for name, action in actions.items()),
        Route("/{name}", asset),
    ]
    guards = [Middleware(_Guard, token=token), Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False)]
    return Starlette(routes=[Mount(f"/{token}", routes=routes)], middleware=guards, exception_handlers={CrfRefineError: refuse})


class _Guard:
    """Refuses addresses without the token, and adds the headers that every answer has."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        first = str(scope.get("path", "")).split("/")[1:2]
        if scope["type"] != "http" or not first or not secrets.compare_digest(first[0].encode(), self._token):
            from starlette.responses import PlainTextResponse

            await PlainTextResponse("wrong address: take the one that crfrefine tune printed", 403)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)


async def _sent(request: Request) -> dict[str, Any]:
    """Return what the page sent."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > _MAX_BYTES:
            raise InputError(f"expected at most {_MAX_BYTES} bytes")
    try:
        sent = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("expected JSON") from error
    if not isinstance(sent, dict):
        raise InputError("expected a table")
    return sent


def _number(request: Request, name: str) -> int:
    text = request.query_params.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise InputError(f"{name}: expected a whole number")
    return int(text)


def _whole(value: object) -> int:
    if not isinstance(value, int):
        raise InputError("expected a whole number")
    return value


def _table(sent: dict[str, Any], name: str) -> dict[str, Any]:
    found = sent.get(name)
    if not isinstance(found, dict):
        raise InputError(f"{name}: expected a table")
    return found


def _place(sent: dict[str, Any]) -> list[int] | None:
    found = sent.get("place")
    if found is None:
        return None
    if not isinstance(found, list):
        raise InputError("place: expected whole numbers")
    return [_whole(at) for at in found]
