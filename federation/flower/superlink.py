"""Flower's SuperLink behind two listeners: hospitals reach the Fleet API alone, Control wants a token.

Open-source Flower serves its Fleet, Control and Runtime APIs on one port, and its Control API asks nobody who
they are: whoever reaches the port can run code at every site. So:

- hospitals' listener: ``/v1/fleet/*`` and ``/health``, and ``/v1/enroll`` for a POST to a function of ours; nothing
  else;
- control listener (loopback or the cluster's inside): ``/v1/control/*`` with our bearer token, ``/v1/runtime/*``
  with Flower's secret and task tokens, ``/health``, and a page of ours for people with the same token;
- everything else is 404, by path, before Flower sees it.

A site's look for a message is held until there is one (federation.flower.held). What hospitals send and fetch takes a
bounded part of the memory (federation.flower.room). Connections that send nothing, or slowly, are ended
(federation.flower.impatient). A new server certificate is taken up while the SuperLink runs:
connections that are open go on.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import importlib
import logging
import signal
import ssl
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr.supercore.corestate.sql_corestate as corestate
import uvicorn
import uvloop
from flwr.supercore.logger import FLOWER_LOGGER, console_handler
from flwr.superlink.main import create_app

from federation.enrollment import PATH
from federation.flower import asgi, lean, objects, room, state
from federation.flower.held import Held
from federation.flower.impatient import Impatient, open_many_files
from federation.flower.intake import Handler, Intake
from federation.processes import settle

log = logging.getLogger("fednnunet.superlink")

PAGE = "/status"

_cli = importlib.import_module("flwr.superlink.cli.flower_superlink")


@dataclass(frozen=True)
class Listener:
    """Where to listen."""

    host: str
    port: int


@dataclass(frozen=True)
class SuperLinkFiles:
    """The files a SuperLink needs; see orchestrator.enrollment.authority."""

    ca: Path
    certificate: Path
    key: Path
    secret: Path
    token: Path
    database: Path


class Guard:
    """Lets through the listed paths alone, and Control only with the token; `/v1/enroll` goes to the intake.

    The page takes the token as a browser sends it too, as the password of Basic. Control does not: what a browser sends
    by itself to whoever makes it ask must not be able to start a study.
    """

    def __init__(
        self,
        app: Any,
        prefixes: tuple[str, ...],
        token_sha256: bytes = b"",
        intake: Intake | None = None,
        page: Any = None,
    ) -> None:
        self._app, self._prefixes, self._token, self._intake = app, prefixes, token_sha256, intake
        self._page = page

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One ASGI call."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        path = scope.get("path", "")
        if scope["type"] == "http" and path == PATH and self._intake is not None:
            await self._intake(scope, receive, send)
        elif scope["type"] == "http" and self._page is not None and (path == "/" or path.startswith(PAGE)):
            if self._authorised(scope) or self._authorised_person(scope):
                await self._page(scope, receive, send)
            else:
                await self._refuse(
                    scope, send, 401, (b"www-authenticate", b'Basic realm="FednnU-Net: the control token"')
                )
        elif scope["type"] != "http" or not (path == "/health" or path.startswith(self._prefixes)):
            await self._refuse(scope, send, 404)
        elif path.startswith("/v1/control/") and not self._authorised(scope):
            await self._refuse(scope, send, 401)
        else:
            await self._app(scope, receive, send)

    def _authorised(self, scope: Any) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        if not sent.startswith(b"Bearer "):
            return False
        return hmac.compare_digest(hashlib.sha256(sent.removeprefix(b"Bearer ")).digest(), self._token)

    def _authorised_person(self, scope: Any) -> bool:
        sent = dict(scope["headers"]).get(b"authorization", b"")
        if not sent.startswith(b"Basic "):
            return False
        try:
            _, _, password = base64.b64decode(sent.removeprefix(b"Basic "), validate=True).partition(b":")
        except ValueError:
            return False
        return hmac.compare_digest(hashlib.sha256(password).digest(), self._token)

    @staticmethod
    async def _refuse(scope: Any, send: Any, status: int, *headers: tuple[bytes, bytes]) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
            return
        await asgi.answer(send, status, *headers)


class _Server(uvicorn.Server):
    """Two servers in one process: signals are the caller's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def application(files: SuperLinkFiles, control: Listener) -> tuple[Any, Any]:
    """Flower's configuration and its HTTP application, as its own command would make them."""
    sys.argv = [
        "flower-superlink",
        *("--ssl-ca-certfile", str(files.ca), "--ssl-certfile", str(files.certificate)),
        *("--ssl-keyfile", str(files.key), "--enable-supernode-auth"),
        *("--host", control.host, "--port", str(control.port), "--database", str(files.database)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(files.secret)),
    ]
    FLOWER_LOGGER.removeHandler(console_handler)  # what it says is in our log (federation.logs), once
    config = _cli._parse_superlink_lifespan_config()
    return config, create_app(config, _cli.SuperLinkLifespan)


def serve(
    files: SuperLinkFiles,
    fleet: Listener,
    control: Listener,
    task_lease: float = 600.0,
    enroll: Handler | None = None,
    page: Any = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Parameters
    ----------
    files : SuperLinkFiles
        Certificates, secrets and the database.
    fleet, control : Listener
        The hospitals' listener and the control listener.
    task_lease : float
        Seconds without a heartbeat after which a coordinator counts as gone (Flower's own: 60; an outage of the
        SuperLink itself must not kill the run).
    enroll : callable, optional
        ``enroll(body) -> (status, answer)``: takes the requests of hospitals that want to be let in.
    page : ASGI application, optional
        Answers to `/` and below `/status` on the control listener.
    """
    lease: Any = corestate  # the module's constants are integers by type, any number by use
    lease.HEARTBEAT_PATIENCE = task_lease / corestate.HEARTBEAT_DEFAULT_INTERVAL
    open_many_files()
    state.use()
    objects.use()
    room.use()
    config, app = application(files, control)
    lean.slim(app, event_logs=config.event_log_plugin is not None)
    held = Held(room.Room(app, app))
    state.tell(held.sent)
    token = hashlib.sha256(files.token.read_bytes().strip()).digest()
    common: dict[str, Any] = {
        "log_level": "warning",
        "http": Impatient,
        "ssl_keyfile": config.ssl_keyfile,
        "ssl_certfile": config.ssl_certfile,
        "timeout_graceful_shutdown": 1,
    }
    inner = _Server(
        uvicorn.Config(
            Guard(app, ("/v1/control/", "/v1/runtime/"), token, page=page),
            host=control.host,
            port=control.port,
            lifespan="on",
            **common,
        )
    )
    outer = _Server(
        uvicorn.Config(
            Guard(held, ("/v1/fleet/",), intake=Intake(enroll) if enroll else None),
            host=fleet.host,
            port=fleet.port,
            lifespan="off",
            **common,
        )
    )

    async def both() -> None:
        def stop() -> None:
            held.close()
            inner.should_exit = outer.should_exit = True

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop)
        renewing = asyncio.create_task(_take_up_certificates(files, [inner, outer]))
        await asyncio.gather(inner.serve(), outer.serve())
        renewing.cancel()

    settle()
    uvloop.run(both())


async def _take_up_certificates(files: SuperLinkFiles, servers: list[_Server], every: float = 2.0) -> None:
    """Load the server's certificate anew when its file has changed; new connections get it."""
    seen = files.certificate.stat().st_mtime_ns
    while True:
        await asyncio.sleep(every)
        with contextlib.suppress(OSError, ssl.SSLError):  # key and certificate are written one after the other
            now = files.certificate.stat().st_mtime_ns
            if now == seen:
                continue
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
            for server in servers:
                if server.config.ssl is not None:
                    server.config.ssl.load_cert_chain(files.certificate, files.key)
            seen = now
            log.info("a new server certificate is in use")
