"""Flower's HTTP application with what a request does not need left out of its way.

Flower puts nine middlewares before every handler. Each costs a task group and a stream for every request, though most
look at the path and pass it on: with many sites that is most of what a SuperLink does (benchmarks/scale.py). Here each
of them sees the requests of its own API alone; the event logs, which have no plugin in open-source Flower, and tracing,
where it is off, see none.
"""

from __future__ import annotations

import os
from typing import Any

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

_CONTROL, _FLEET = "/v1/control/", "/v1/fleet/"
_OWN = {
    ControlSensitiveResponseMiddleware: _CONTROL,
    ControlAuthenticationMiddleware: _CONTROL,
    ControlLicenseMiddleware: _CONTROL,
    ControlEventLogMiddleware: _CONTROL,
    NodeAuthMiddleware: _FLEET,
    FleetEventLogMiddleware: _FLEET,
}
"""Paths outside of which a middleware of Flower's passes a request on unseen."""


class _Only:
    """A middleware for the paths that begin so."""

    def __init__(self, app: Any, inner: Any, prefix: str, **options: Any) -> None:
        self._app, self._inner, self._prefix = app, inner(app, **options), prefix

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        own = scope["type"] != "http" or scope["path"].startswith(self._prefix)
        await (self._inner if own else self._app)(scope, receive, send)


def slim(app: Any, event_logs: bool) -> None:
    """Let each middleware of an application that has not served yet see its own paths alone.

    Parameters
    ----------
    app : FastAPI
        Flower's application.
    event_logs : bool
        Whether there is a plugin that writes them.
    """
    only: Any = _Only
    found = []
    for each in app.user_middleware:
        if each.cls in (FleetEventLogMiddleware, ControlEventLogMiddleware) and not event_logs:
            continue
        if each.cls is RuntimeTracingMiddleware and os.getenv("FLWR_TRACING_ENABLED") != "1":
            continue
        prefix = _OWN.get(each.cls)
        found.append(Middleware(only, each.cls, prefix, *each.args, **each.kwargs) if prefix else each)
    app.user_middleware = found
