"""Flower's application with less in a request's way (federation.flower.lean) answers as it does without."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from fleet_site import Site
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, RegisterNodeResponse
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, RegisterNodeFleetRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from federation.flower import lean
from federation.flower.superlink import Listener, SuperLinkFiles, application
from orchestrator.enrollment.authority import create

VERSION = dict(RuntimeVersionMetadata.from_local_component("flower-supernode").as_metadata())


class Caller:
    """Flower's application, called as a server calls it."""

    def __init__(self, app: Any, state: dict[str, Any]) -> None:
        self._app, self._state = app, state

    async def call(
        self,
        path: str,
        body: bytes | Iterable[bytes] = b"",
        headers: dict[str, str] | None = None,
        method: str = "POST",
        media: str = PROTOBUF_MEDIA_TYPE,
        cut: bool = False,
    ) -> tuple[Any, ...]:
        """Status, headers and body of the answer; or what the call raised."""
        parts = [body] if isinstance(body, bytes) else list(body)
        waiting = [{"type": "http.request", "body": part, "more_body": cut or part is not parts[-1]} for part in parts]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return waiting.pop(0) if waiting else {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        fields = {"content-type": media, "host": "localhost", **VERSION, **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 443),
            "state": dict(self._state),
        }
        try:
            await asyncio.wait_for(self._app(scope, receive, send), 30)
        except Exception as error:  # noqa: BLE001 - compared
            return type(error).__name__, str(error)
        head, *rest = sent
        return head["status"], sorted(head["headers"]), b"".join(part.get("body", b"") for part in rest)


async def answers(files: SuperLinkFiles, slim: bool) -> dict[str, tuple[Any, ...]]:
    """What the application answers to requests of every kind."""
    config, app = application(files, Listener("127.0.0.1", 8100))
    if slim:
        lean.slim(app, event_logs=config.event_log_plugin is not None)
    site, stranger = Site(), Site()
    async with app.router.lifespan_context(app) as state:
        call = Caller(app, state or {}).call
        status, _, body = await call(
            "/v1/control/register-node", RegisterNodeRequest(public_key=site.public).SerializeToString()
        )
        assert status == 200, body
        number = RegisterNodeResponse.FromString(body).node_id
        node = Node(node_id=number)
        alive = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30).SerializeToString()
        activate = ActivateNodeRequest(public_key=site.public, heartbeat_interval=30).SerializeToString()
        unknown = ActivateNodeRequest(public_key=stranger.public, heartbeat_interval=30).SerializeToString()
        look = PullMessagesRequest(node=node).SerializeToString()
        part = PullObjectRequest(node=node, run_id=7, object_id="0" * 64).SerializeToString()
        register = RegisterNodeFleetRequest(public_key=site.public).SerializeToString()
        acquire = "/v1/runtime/acquire-task"
        beat, mine = "/v1/fleet/send-node-heartbeat", site.headers()
        return {
            "a site comes online": (await call("/v1/fleet/activate-node", activate, mine))[0],
            "a sign of life": await call(beat, alive, mine),
            "in three parts": await call(beat, [alive[:3], alive[3:5], alive[5:]], mine),
            "nothing waits": await call("/v1/fleet/pull-messages", look, mine),
            "a part of a run that is not there": await call("/v1/fleet/pull-object", part, mine),
            "the handler refuses": await call("/v1/fleet/register-node", register, mine),
            "a key that is not registered": (await call("/v1/fleet/activate-node", unknown, stranger.headers()))[0],
            "another's number": await call(beat, alive, stranger.headers()),
            "no signature": await call(beat, alive),
            "a signature of yesterday": await call(beat, alive, site.headers(age=86_400)),
            "not a protobuf": await call(beat, b"\xff\xff\xff", mine),
            "another media type": await call(beat, alive, mine, media="application/json"),
            "cut off in the middle": await call(beat, [alive[:3]], mine, cut=True),
            "GET": await call(beat, b"", mine, method="GET"),
            "HEAD": await call(beat, b"", mine, method="HEAD"),
            "no such path": await call("/v1/fleet/nothing", alive, mine),
            "a coordinator without the secret": await call(acquire, AcquireTaskRequest().SerializeToString()),
            "control": (await call("/v1/control/list-nodes", ListNodesRequest().SerializeToString()))[0],
            "health": await call("/health", b"", method="GET"),
        }


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Any, ...]]]:
    found = []
    for slim in (False, True):
        folder = tmp_path_factory.mktemp("superlink")
        authority = create(folder / "authority", ["127.0.0.1"])
        files = SuperLinkFiles(
            authority.ca,
            authority.certificate,
            authority.key,
            authority.secret,
            authority.token,
            folder / "superlink.db",
        )
        found.append(asyncio.run(answers(files, slim)))
    return found


def test_every_request_is_answered_as_by_flowers_own(both: list[dict[str, tuple[Any, ...]]]) -> None:
    flowers, ours = both
    assert ours == flowers


def test_the_requests_are_of_every_kind(both: list[dict[str, tuple[Any, ...]]]) -> None:
    """Otherwise the comparison above would compare one refusal with another."""
    statuses: dict[int, set[str]] = {}
    for name, answer in both[1].items():
        statuses.setdefault(answer if isinstance(answer, int) else answer[0], set()).add(name)
    assert statuses == {
        200: {"a site comes online", "a sign of life", "in three parts", "nothing waits", "control", "health"},
        400: {"not a protobuf"},
        401: {"another's number", "no signature", "a signature of yesterday", "a coordinator without the secret"},
        404: {"no such path"},
        405: {"GET", "HEAD"},
        412: {"the handler refuses", "a key that is not registered"},
        415: {"another media type"},
        500: {"a part of a run that is not there", "cut off in the middle"},
    }
