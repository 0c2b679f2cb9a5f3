"""Flower's HTTP application with what a request does not need left out of its way.

Flower puts nine middlewares before every handler. Each costs a task, a task group and a stream for every request,
though most look at the path and pass it on: with many sites that is a third of what a SuperLink does
(benchmarks/scale.py).

Rules:

- Each middleware sees the requests of its own API alone; the event logs, which have no plugin in open-source Flower,
  and tracing, where it is off, see none.
- Where an answer is one message, which is so at all routes of the Fleet and the Runtime API that are used here, it is
  taken whole from what is behind a middleware: in the same task, without a stream between them.
"""

from __future__ import annotations

import os
from typing import Any

from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES, ProtobufTranslationMiddleware
from flwr.supercore.routers.runtime.tracing import RuntimeTracingMiddleware
from flwr.superlink.routers.control.middlewares import (
    ControlAuthenticationMiddleware,
    ControlEventLogMiddleware,
    ControlLicenseMiddleware,
    ControlSensitiveResponseMiddleware,
)
from flwr.superlink.routers.fleet.middlewares import FleetEventLogMiddleware
from flwr.superlink.routers.fleet.node_auth import NodeAuthMiddleware
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, _CachedRequest
from starlette.responses import Response

_CONTROL, _FLEET, _RUNTIME = "/v1/control/", "/v1/fleet/", "/v1/runtime/"
_WHOLE = frozenset(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith((_FLEET, _RUNTIME)))
"""Paths at which request and answer are one message each."""
_OWN: dict[Any, str] = {
    BaseHTTPMiddleware: "",
    ProtobufTranslationMiddleware: "",
    RuntimeTracingMiddleware: "",
    ControlSensitiveResponseMiddleware: _CONTROL,
    ControlAuthenticationMiddleware: _CONTROL,
    ControlLicenseMiddleware: _CONTROL,
    ControlEventLogMiddleware: _CONTROL,
    NodeAuthMiddleware: _FLEET,
    FleetEventLogMiddleware: _FLEET,
}
"""Flower's middlewares, and where the paths begin outside of which each of them passes a request on unseen."""


class _Lean:
    """A middleware of Flower's for the paths that begin so."""

    def __init__(self, app: Any, inner: Any, prefix: str, **options: Any) -> None:
        self._app, self._inner, self._prefix = app, inner(app, **options), prefix
        self._has_dispatch = isinstance(self._inner, BaseHTTPMiddleware)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
        elif not scope["path"].startswith(self._prefix):
            await self._app(scope, receive, send)
        elif self._has_dispatch and scope["path"] in _WHOLE:
            await self._whole(scope, receive, send)
        else:
            await self._inner(scope, receive, send)

    async def _whole(self, scope: Any, receive: Any, send: Any) -> None:
        """As Starlette's own, for an answer that is there at once."""
        request = _CachedRequest(scope, receive)

        async def behind(_: Any) -> Response:
            head: dict[str, Any] = {}
            parts = []

            async def take(message: Any) -> None:
                if message["type"] == "http.response.start":
                    head.update(message)
                elif message["type"] == "http.response.body":
                    parts.append(message.get("body", b""))

            await self._app(scope, request.wrapped_receive, take)
            if not head:
                raise RuntimeError("No response returned.")
            response = Response(parts[0] if len(parts) == 1 else b"".join(parts), head["status"])
            response.raw_headers = list(head["headers"])
            return response

        response = await self._inner.dispatch_func(request, behind)
        await response(scope, request.wrapped_receive, send)


def slim(app: Any, event_logs: bool) -> None:
    """Let each middleware of an application that has not served yet see its own paths alone, and at less cost.

    Parameters
    ----------
    app : FastAPI
        Flower's application.
    event_logs : bool
        Whether there is a plugin that writes them.
    """
    lean: Any = _Lean
    found = []
    for each in app.user_middleware:
        if each.cls in (FleetEventLogMiddleware, ControlEventLogMiddleware) and not event_logs:
            continue
        if each.cls is RuntimeTracingMiddleware and os.getenv("FLWR_TRACING_ENABLED") != "1":
            continue
        own = each.cls in _OWN
        found.append(Middleware(lean, each.cls, _OWN[each.cls], *each.args, **each.kwargs) if own else each)
    app.user_middleware = found
