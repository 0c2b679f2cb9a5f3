"""HTTP clients of Flower's three APIs, with a retry that never ends the process.

Flower's own retry raises SIGINT in the calling process on a 401, a BaseException on a 403, and gives up on any
error whose text holds "ssl": right for a process that lives for one task, wrong for one that is resident.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from flwr.common.serde import user_config_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, SendTaskHeartbeatRequest
from flwr.supercore.auth import load_superexec_auth_secret
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from federation.flower import lines
from federation.flower.bundle import bundle, bundle_hash
from federation.patience import HOLD

_OUTAGE = (502, 503, 504)
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
HTTPError = httpx.HTTPError

LOOK = "/v1/fleet/pull-messages"
"""Where a site looks for a message."""
SLOWEST_LINE = 10_500.0
"""Bytes a second that an upload is given time for: a chunk of 5 MiB is given up before the SuperLink forgets it."""


def _status(error: Exception) -> int | None:
    return error.response.status_code if isinstance(error, httpx.HTTPStatusError) else None


def task_is_over(error: Exception) -> bool:
    """Whether Flower says with this error that the task or its run has ended (401 or 403)."""
    return _status(error) in (401, 403)


def patient_retry(max_time: float | None = None) -> RetryInvoker:
    """Retry outages (cut-off TLS too) for `max_time` seconds or for ever; every other answer is raised."""
    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=3),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=max_time,
        should_giveup=lambda error: isinstance(error, httpx.HTTPStatusError) and _status(error) not in _OUTAGE,
    )


def supernode_retry() -> RetryInvoker:
    """For the SuperNode's loop: as Flower's own, but an outage never ends the process."""

    def give_up(error: Exception) -> bool:
        if _status(error) == 403:  # the SuperNode drops the message on this
            raise RunNotRunningException
        return isinstance(error, httpx.HTTPStatusError) and _status(error) not in _OUTAGE

    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=3),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=None,
        should_giveup=give_up,
    )


def load_secret(path: Path) -> bytes:
    """The secret between a SuperLink or SuperNode and its runner."""
    return load_superexec_auth_secret(secret_file=str(path)) or b""


def runtime_client(
    address: str,
    ca: bytes | None,
    *,
    secret: bytes | None = None,
    token: str | None = None,
    component: str,
    max_time: float | None = None,
) -> Any:
    """Client of a Runtime API, with the runner's secret (to acquire) or with one task's token."""
    auth = (
        RuntimeTokenHttpInterceptor(token)
        if token
        else SuperExecAuthHttpInterceptor(master_secret=secret or b"", protected_methods=_ACQUIRE)
    )
    return RuntimeHttpClient.from_server_address(
        address,
        ca is None,
        ca,
        interceptors=[RuntimeVersionHttpInterceptor(component_name=component), auth],
        retry_invoker=patient_retry(max_time),
    )


def acquire(client: Any, task_type: str) -> str:
    """One look for a task; its token, or an empty string."""
    token: str = client.AcquireTask(AcquireTaskRequest(supported_task_types=[task_type])).token
    return token


class Heartbeat(threading.Thread):
    """Keeps one task's lease alive; `lost` is set once Flower says that the task is over."""

    def __init__(self, client: Any, every: float = 5.0) -> None:
        super().__init__(daemon=True, name="heartbeat")
        self._client, self._every = client, every
        self.lost, self._stop_now = threading.Event(), threading.Event()

    def run(self) -> None:
        """Beat until stopped or lost."""
        while not self._stop_now.is_set():
            try:
                if not self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    self.lost.set()
            except httpx.HTTPStatusError as error:
                if task_is_over(error):
                    self.lost.set()
            except httpx.HTTPError:
                pass
            if self.lost.is_set():
                return
            self._stop_now.wait(self._every)

    def stop(self) -> None:
        """End the thread soon."""
        self._stop_now.set()


class FleetClient(FleetHttpClient):
    """Flower's, for a line that is slow, or that dies without a word.

    Flower takes a connection for dead when the answer has not begun 30 s after the request has gone into the operating
    system's buffers, or a proxy's. A chunk that is on its way from there for longer is then sent again, from its start,
    for ever: at 1 Mbit/s nothing gets through. Here the time for an answer grows with the request, and a line that is
    dead is told from a slow one by what it takes and acknowledges.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._client.event_hooks = {"request": [_allow_for_the_line]}


def _allow_for_the_line(request: httpx.Request) -> None:
    timeout = request.extensions["timeout"]
    if request.url.path == LOOK:
        timeout["read"] += HOLD
    for wait in ("read", "write"):  # over TLS the whole body is one write
        timeout[wait] += int(request.headers.get("content-length", 0)) / SLOWEST_LINE
    request.extensions["trace"] = _watch


def _watch(event: str, told: dict[str, Any]) -> None:
    """Let the kernel end a new connection that is dead; called by httpcore for each of its steps."""
    if event.endswith("connect_tcp.complete"):
        lines.end_when_dead(told["return_value"].get_extra_info("socket"))


def fleet_client(address: str, ca: bytes, key: Path, max_time: float | None = None) -> Any:
    """Client of the Fleet API, signed with a site's key."""
    private: Any = load_ssh_private_key(key.read_bytes(), None)
    return FleetClient.from_server_address(
        address,
        False,
        ca,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(private, private.public_key()),
        ],
        retry_invoker=patient_retry(max_time),
    )


def _code(error: httpx.HTTPStatusError) -> int | None:
    """Flower's own number for a refusal; None where it is not Flower's."""
    told = FlowerError.from_json(error.response.text)
    return None if told is None else told.code


def is_not_let_in(error: httpx.HTTPStatusError) -> bool:
    """Whether the SuperLink does not take a node: its key is not registered, or is active already."""
    return _code(error) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED


def is_let_in(address: str, ca: bytes, key: Path, max_time: float) -> bool:
    """Ask the SuperLink whether it knows a site's key, and change nothing there.

    We ask to be activated with a heartbeat of 0 s: Flower looks for the key first, and then refuses the heartbeat.
    Raises ``HTTPError`` where another answer comes, or none within `max_time` seconds; ``OSError`` and ``ValueError``
    for a key that cannot be used.
    """
    private: Any = load_ssh_private_key(key.read_bytes(), None)
    try:
        with contextlib.closing(fleet_client(address, ca, key, max_time)) as fleet:
            fleet.ActivateNode(ActivateNodeRequest(public_key=public_key_to_bytes(private.public_key())))
    except httpx.HTTPStatusError as error:
        if _code(error) == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL:
            return True
        if is_not_let_in(error):
            return False
        raise
    except DecodeError:
        pass
    raise httpx.ProtocolError("an answer that is not Flower's")


def deactivate(fleet: Any, node_id: int) -> None:
    """Take a node off that a crash left "online", so that its restart is let in at once."""
    fleet.DeactivateNode(DeactivateNodeRequest(node_id=node_id))


def run_is_over(fleet: Any, node_id: int, run_id: int) -> bool:
    """Ask the SuperLink, as this node, whether a run has been stopped or has finished."""
    try:
        fleet.GetRun(GetRunRequest(node=Node(node_id=node_id), run_id=run_id))
    except httpx.HTTPStatusError as error:
        return _status(error) == 403
    except httpx.HTTPError:
        return False
    return False


@dataclass(frozen=True)
class Registered:
    """A node of the SuperLink.

    Attributes
    ----------
    name, node_id, status : str, int, str
        The site's name, Flower's id, and "registered", "online" or "offline".
    public_key : str
        OpenSSH line, without a comment.
    online_until : float, optional
        When its last sign of life ran out or will, in seconds since 1970; None: it never came.
    """

    name: str
    node_id: int
    status: str
    public_key: str
    online_until: float | None


@dataclass(frozen=True)
class UnderWay:
    """A run that somebody has taken up: its id, and what it was started with."""

    run_id: int
    study_json: str
    submission: str


def ssh_line(public_key: bytes) -> str:
    """A key as Flower keeps it, as an OpenSSH line."""
    return (
        bytes_to_public_key(public_key)
        .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        .decode()
    )


def rename_node(database: Path, public_key: str, name: str) -> None:
    """Give the node with this key (OpenSSH line) another name, in the SuperLink's database.

    Flower's Control API cannot: a key that was unregistered is never taken again, so this is the one change that is
    made in its SQLite file, in one transaction, also while the SuperLink runs.
    """
    key = public_key_to_bytes(load_ssh_public_key(public_key.encode()))  # type: ignore[arg-type]
    with contextlib.closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True, timeout=30)) as opened:
        with opened:
            opened.execute("UPDATE node SET name = ? WHERE public_key = ? AND status != 'unregistered'", (name, key))


class _Bearer:
    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        add_headers(context.request, {"authorization": f"Bearer {self._token}"})
        return call_next(context)


class Control:
    """Registers sites, starts, lists and stops runs, through the control listener and its token.

    Parameters
    ----------
    address : str
        HOST:PORT of the control listener.
    ca : bytes
        PEM certificate of the authority.
    token : str
        The control token.
    """

    def __init__(self, address: str, ca: bytes, token: str) -> None:
        self._client = ControlHttpClient.from_server_address(address, False, ca, [_Bearer(token)])

    def register(self, public_key: bytes, name: str) -> int:
        """Register a site's public key (OpenSSH line) under its name; returns Flower's node id."""
        loaded: Any = load_ssh_public_key(public_key)
        key = public_key_to_bytes(loaded)
        return int(self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        """Take a site out."""
        self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))

    def nodes(self) -> dict[str, tuple[int, str]]:
        """Node id and status ("registered", "online", "offline") of every registered site, by name."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return {node.name: (node.node_id, node.status) for node in nodes if node.status != "unregistered"}

    def sites(self) -> list[Registered]:
        """Every node that is registered now, with its key."""
        nodes = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [
            Registered(node.name, node.node_id, node.status, ssh_line(node.public_key), node.online_until or None)
            for node in nodes
            if node.status != "unregistered"
        ]

    def start(self, study_json: str, submission: str | None = None) -> int:
        """Start a run that carries a study; returns Flower's run id.

        The run also carries a number of its own: where a request had to be repeated and two runs came of it, the
        coordinator sees that both are one submission; so it does of a run that is started in another one's place.
        """
        return int(
            self._client.StartRun(
                StartRunRequest(
                    fab=Fab(hash_str=bundle_hash(), content=bundle()),
                    override_config=user_config_to_proto(
                        {"study": study_json, "submission": submission or secrets.token_hex(8)}
                    ),
                )
            ).run_id
        )

    def active(self) -> list[int]:
        """Runs that have not finished."""
        runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return sorted(run_id for run_id, run in runs.items() if run.status.status != "finished")

    def under_way(self) -> list[UnderWay]:
        """Runs that somebody has taken up and that have not finished."""
        runs = self._client.ListRuns(ListRunsRequest()).run_dict
        found = []
        for run_id, run in sorted(runs.items()):
            if run.status.status in ("starting", "running"):
                config = user_config_from_proto(run.override_config)
                found.append(UnderWay(run_id, str(config.get("study", "")), str(config.get("submission", ""))))
        return found

    def status(self, run_id: int) -> tuple[str, str, str]:
        """Status, sub-status and details of a run."""
        status = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
        return status.status, status.sub_status, status.details

    def stop(self, run_id: int) -> None:
        """Stop a run."""
        self._client.StopRun(StopRunRequest(run_id=run_id))
