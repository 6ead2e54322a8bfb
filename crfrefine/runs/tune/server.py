"""The page over HTTP, on this machine.

Its address holds a random token; only this module needs the libraries of the extra `tune`.

Requests with another host in their header are refused: no page of another site can reach it through
a name that leads to 127.0.0.1.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from crfrefine.errors import BackendUnavailableError, CrfRefineError, InputError
from crfrefine.runs.tune.view import View

if TYPE_CHECKING:
    from types import FrameType

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp

    from crfrefine.runs.tune.session import Session

HOST = "127.0.0.1"
_HOSTS = [HOST, "localhost"]
_LIBRARIES = ("starlette", "uvicorn")
_PARAMETERS: dict[str, type] = {"preset": str, "changes": dict}
_STROKE: dict[str, type] = {"plane": int, "place": list, "voxels": list, "value": int}
_VIEW: dict[str, type] = {
    "plane": int,
    "place": list,
    "modality": int,
    "size": list,
    "shown": list,
    "hidden": list,
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def check_libraries() -> None:
    """Raise BackendUnavailableError if the libraries that serve the page are not installed."""
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(
            f"the page of tune needs {' and '.join(missing)}: pip install 'crfrefine[tune]'"
        )


def serve(session: Session, port: int, tell: Callable[[str], None]) -> None:
    """Serve the page on a port (0: any free one) until it ends itself or Ctrl-C.

    `tell` gets its address. InputError: port taken.
    """
    import uvicorn

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # A page that still waits for a result would be cut off, and its traceback printed.
            session.end()
            super().handle_exit(sig, frame)

    token = secrets.token_urlsafe(24)
    app = make_app(session, token, lambda: setattr(server, "should_exit", True))
    server = Server(
        uvicorn.Config(app, log_config=None, server_header=False, timeout_graceful_shutdown=2)
    )
    try:
        listener = socket.create_server((HOST, port))
    except OSError as error:
        raise InputError(
            f"--port {port}: {error.strerror or error}; leave it out, and any free port is taken"
        ) from error
    with listener:
        # Connections inherit it; else the end of an answer waits 40 ms for the browser to confirm
        # its beginning.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        tell(f"http://{HOST}:{listener.getsockname()[1]}/{token}/")
        server.run(sockets=[listener])


def make_app(session: Session, token: str, end: Callable[[], None]) -> ASGIApp:
    """Return the application.

    Every address begins with the token, and `end` is called when the page asks to end.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles

    def as_json(content: dict[str, Any], status: int = 200) -> Response:
        # ASCII: names of cases need not be UTF-8, and their surrogates have no other encoding.
        return Response(json.dumps(content, allow_nan=False), status, media_type="application/json")

    def plane(request: Request) -> Response:
        view = View(**_checked(unquote(request.url.query), _VIEW))
        return Response(session.plane(view), media_type="image/png")

    def post(name: str, action: Callable[..., dict[str, Any]], kinds: dict[str, type]) -> Route:
        async def answer(request: Request) -> Response:
            values = _checked(await request.body(), kinds)
            return as_json(await run_in_threadpool(action, **values))

        return Route(f"/{name}", answer, methods=["POST"])

    def close() -> dict[str, Any]:
        session.end()
        end()
        return {}

    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Refuse addresses without the token, and add the headers that every answer has."""
        sent_token = request.url.path.split("/")[1]
        response: Response
        if secrets.compare_digest(sent_token.encode(), token.encode()):
            response = await call_next(request)
        else:
            response = PlainTextResponse(
                "wrong address: take the one that crfrefine tune printed", 403
            )
        response.headers.update(_HEADERS)
        return response

    state = {"counter": int, **_PARAMETERS, "place": list, "is_whole": bool}
    assets = StaticFiles(packages=[("crfrefine.runs.tune", "assets")], html=True)
    routes = [
        Route("/describe", lambda request: as_json(session.describe())),
        Route("/plane/{version}", plane),
        post("refine", session.refine, state),
        post("draw", session.draw, _STROKE),
        post("undo", session.undo, {}),
        post("save", session.save, _PARAMETERS),
        post("save-case", session.save_case, _PARAMETERS),
        post("end", close, {}),
        Mount("/", assets),
    ]
    guards = [
        Middleware(BaseHTTPMiddleware, dispatch=guard),
        Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False),
    ]
    refusals = {CrfRefineError: lambda request, error: as_json({"error": str(error)}, 400)}
    return Starlette(
        routes=[Mount(f"/{token}", routes=routes)], middleware=guards, exception_handlers=refusals
    )


def _checked(content: str | bytes, kinds: dict[str, type]) -> dict[str, Any]:
    """Return the values that the page sent as JSON, each of its kind.

    Lists have whole numbers, or words.
    """
    try:
        sent: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError("expected JSON") from error
    if not isinstance(sent, dict) or {name: type(value) for name, value in sent.items()} != kinds:
        expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
        raise InputError(f"expected {expected or 'an empty table'}")
    for name, value in sent.items():
        entry_type = str if name == "shown" else int
        if isinstance(value, list) and not all(type(entry) is entry_type for entry in value):
            raise InputError(f"{name}: expected another kind of value")
    return dict(sent)
