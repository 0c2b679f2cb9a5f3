"""Resident runners: one process that takes task after task from Flower, instead of one process for each message.

Rules:

- A bundle is compared by its hash and never unpacked; any other hash is refused (FNU-601).
- Only what runs at the moment is kept alive: a heartbeat thread holds the task's lease while the work goes on.
- A run that has been stopped is noticed by asking the SuperLink, every two seconds, whether it still runs.
- SIGTERM ends a runner with a last answer to Flower, so that the other side knows at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, Message, MessageType, RecordDict
from flwr.app.error import Error
from flwr.app.message import make_message
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, fab_from_proto, run_from_proto
from flwr.common.serde_utils import metadata_from_proto
from flwr.proto.runtime_pb2 import GetNodesRequest, PullTaskInputRequest, PushTaskOutputRequest
from flwr.supercore.task_identity import TaskIdentity

from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.bundle import bundle_hash
from federation.flower.transfer import Ready, Received, Transfer, Unavailable, content

log = logging.getLogger("fednnunet.runner")

RUN_LOOK = 2.0  # seconds between two looks whether a run has ended, while a task of it is done
IDLE_LOOK = 4.0  # the same between two tasks, which may be long where other sites are slow
RUN_GRACE = 6.0
"""Seconds after a run's end in which another run of the same study may ask on: a coordinator that was restarted."""
SITE_LOST = frozenset(
    {
        ErrorCode.MESSAGE_UNAVAILABLE,
        ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
        ErrorCode.NODE_UNAVAILABLE,
        ErrorCode.CLIENT_APP_CRASHED,
    }
)
"""Flower's error codes after which the same task is sent again once the site is back."""

BUNDLE_REFUSED = ErrorCode.INVALID_FAB


class Stop(SystemExit):
    """SIGTERM arrived while a task was in progress."""


class RunLost(Exception):
    """The run was stopped, or its lease expired: its study goes on in another run."""


@dataclass(frozen=True)
class Node:
    """A site as Flower sees it."""

    node_id: int
    online: bool
    activated_at: str


class Run:
    """What a coordinator can do within one run: see the sites, send a task, fetch an answer."""

    def __init__(
        self, run_id: int, study_json: str, submission: str, client: Any, node_id: int, lost: threading.Event
    ) -> None:
        self.run_id = run_id
        self.study_json = study_json
        self.submission = submission
        self._client, self._lost = client, lost
        self._transfer = Transfer(client, node_id, run_id)

    def check(self) -> None:
        """Raise `RunLost` once Flower has said that the run is over."""
        if self._lost.is_set():
            raise RunLost

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        self.check()
        try:
            yield
        except clients.HTTPError as error:
            if clients.task_is_over(error):
                raise RunLost from error
            raise

    def nodes(self) -> dict[str, Node]:
        """Every registered site, by name."""
        with self._guarded():
            found = self._client.GetNodes(GetNodesRequest()).nodes
        return {node.name: Node(node.node_id, node.status == "online", node.last_activated_at) for node in found}

    def push(self, node: Node, group: str, body: str, weights: Array | None, ttl: float) -> str:
        """Send a task to a site; returns the id under which its answer is fetched."""
        with self._guarded():
            message = Message(content(body, weights), node.node_id, MessageType.TRAIN, group_id=group, ttl=ttl)
            try:
                return self._transfer.push(message)
            except Unavailable as error:  # the study goes on in another run
                raise RunLost from error

    def ready(self, message_ids: list[str]) -> list[Ready]:
        """Answers that wait for us; each is handed out once and must be taken."""
        with self._guarded():
            return self._transfer.ready(message_ids)

    def take(self, ready: Ready, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
        """Fetch one answer; a sender or chunks that are gone count as a site that was lost.

        Of an answer that is not taken the rest is refused: its site stops sending at the next chunk.
        """
        with self._guarded():
            try:
                return self._transfer.take(ready, weights, max_weights, give_up)
            except (Unavailable, FednnunetError) as error:
                self._transfer.withdraw(ready.message_id)
                if isinstance(error, FednnunetError):
                    raise
                return Received("", False, ErrorCode.MESSAGE_UNAVAILABLE, str(error))

    def withdraw(self, message_id: str) -> None:
        """Take back a task that nobody waits for any more: a site that is fetching it stops at the next chunk."""
        with self._guarded():
            self._transfer.withdraw(message_id)


def serve_runs(address: str, ca: bytes, secret: bytes, handle: Callable[[Run], None], poll: float) -> Iterator[int]:
    """Take run after run from a SuperLink; yields once for every look, with the run's id or 0.

    Parameters
    ----------
    address : str
        HOST:PORT of the control listener, which also serves the Runtime API.
    ca, secret : bytes
        The authority's certificate and the runner's secret.
    handle : callable
        Does a run; a `FednnunetError` ends the run as failed with its text.
    poll : float
        Seconds between two looks.
    """
    acquiring = clients.runtime_client(address, ca, secret=secret, component="SuperExec")
    while True:
        try:
            token = clients.acquire(acquiring, "flwr-serverapp")
        except clients.HTTPError as error:
            log.warning("the SuperLink does not answer: %s", str(error).splitlines()[0])
            token = ""
        if not token:
            time.sleep(poll)
            yield 0
            continue
        yield _serve_run(address, ca, token, handle)


def _serve_run(address: str, ca: bytes, token: str, handle: Callable[[Run], None]) -> int:
    client = clients.runtime_client(address, ca, token=token, component="flwr-serverapp")
    beat = clients.Heartbeat(clients.runtime_client(address, ca, token=token, component="flwr-serverapp"))
    status, details, run_id = SubStatus.FAILED, "the coordinator failed", 0
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        beat.start()
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        run, fab = run_from_proto(given.run), fab_from_proto(given.fab)
        run_id = run.run_id
        if hashlib.sha256(fab.content).hexdigest() != bundle_hash():
            raise FednnunetError(Code.BUNDLE_REFUSED)
        config = get_fused_config_from_fab(fab.content, run)
        study_json, submission = str(config["study"]), str(config["submission"])
        handle(Run(run_id, study_json, submission, client, given.context.node_id, beat.lost))
        status, details = SubStatus.COMPLETED, ""
    except Stop:
        status, details = SubStatus.STOPPED, "the coordinator was shut down"
        raise
    except RunLost:
        details = "the run was stopped, or its lease expired"
    except FednnunetError as error:
        details = str(error)
    except clients.HTTPError as error:
        details = str(error)
        log.warning("run %s broke off: %s", run_id, details.splitlines()[0])
    finally:
        beat.stop()
        with contextlib.suppress(clients.HTTPError):
            closing = clients.runtime_client(address, ca, token=token, component="flwr-serverapp", max_time=3)
            closing.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
            closing.close()
        client.close()
    return run_id


@dataclass(frozen=True)
class Asked:
    """A task as it reached a site: its body and where its weights lie."""

    body: str
    weights: Path | None


@dataclass(frozen=True)
class Answer:
    """What goes back: a body and, perhaps, a weights file."""

    body: str
    weights: Array | None


def serve_tasks(
    address: str,
    secret: bytes,
    handle: Callable[[Asked, threading.Event], Answer],
    run_over: Callable[[int, int], bool],
    idle: Callable[[], None],
    incoming: Path,
    max_weights: int,
    poll: float,
) -> None:
    """Take task after task from a site's SuperNode, for ever.

    Parameters
    ----------
    address : str
        Loopback HOST:PORT of the SuperNode's Runtime API.
    secret : bytes
        The runner's secret.
    handle : callable
        Does a task; its second argument is set when the run is over. A `FednnunetError` is answered with its
        scrubbed text.
    run_over : callable
        ``run_over(node_id, run_id)``: whether the run has ended, asked every two seconds.
    idle : callable
        Called once when a run has ended and no task of another came within `RUN_GRACE` seconds.
    incoming : Path
        Where a task's weights file is put; `handle` moves it away.
    max_weights : int
        Most bytes of weights to take.
    poll : float
        Seconds between two looks.
    """
    acquiring = clients.runtime_client(address, None, secret=secret, component="SuperExec")
    last: tuple[int, int] | None = None  # node and run of the task before, until the run has been seen to end
    looked, over_since = 0.0, 0.0
    while True:
        try:
            token = clients.acquire(acquiring, "flwr-clientapp")
        except clients.HTTPError as error:
            log.warning("the SuperNode does not answer: %s", str(error).splitlines()[0])
            token = ""
        if token:
            last = _serve_task(address, token, handle, run_over, incoming, max_weights) or last
            over_since = 0.0
            continue
        now = time.monotonic()
        if last is not None and over_since == 0.0 and now - looked >= IDLE_LOOK:
            looked = now
            over_since = now if run_over(*last) else 0.0
        if over_since and now - over_since >= RUN_GRACE:
            last, over_since = None, 0.0
            idle()
        time.sleep(poll)


def _serve_task(
    address: str,
    token: str,
    handle: Callable[[Asked, threading.Event], Answer],
    run_over: Callable[[int, int], bool],
    incoming: Path,
    max_weights: int,
) -> tuple[int, int] | None:
    """Serve one task; returns its node and run, where they became known."""
    client = clients.runtime_client(address, None, token=token, component="flwr-clientapp")
    beat = clients.Heartbeat(clients.runtime_client(address, None, token=token, component="flwr-clientapp"))
    beat.start()
    ended, over = threading.Event(), threading.Event()
    context = asked = reply = None
    status, details = SubStatus.FAILED, "the link failed"
    try:
        given = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = given.context.node_id
        context = context_from_proto(given.context)
        transfer = Transfer(client, context.node_id, context.run_id)
        for ready in transfer.ready():
            asked = make_message(metadata=metadata_from_proto(ready.proto.metadata), content=RecordDict())
            received = transfer.take(ready, incoming, max_weights, beat.lost.is_set)
            if hashlib.sha256(fab_from_proto(given.fab).content).hexdigest() != bundle_hash():
                raise FednnunetError(Code.BUNDLE_REFUSED)

            def watch(node_id: int = context.node_id, run_id: int = context.run_id) -> None:
                while not ended.wait(RUN_LOOK):
                    if beat.lost.is_set() or run_over(node_id, run_id):
                        over.set()
                        return

            threading.Thread(target=watch, daemon=True, name="run-watch").start()
            answer = handle(Asked(received.body, incoming if received.has_weights else None), over)
            reply = Message(content(answer.body, answer.weights), reply_to=asked)
            status, details = SubStatus.COMPLETED, ""
    except Stop:
        details = "the link was shut down"
        if asked is not None:
            reply = Message(Error(ErrorCode.CLIENT_APP_CRASHED, details), reply_to=asked)
        raise
    except FednnunetError as error:
        details = error.scrubbed()
        log.warning("task refused: %s", error)
        code = BUNDLE_REFUSED if error.code is Code.BUNDLE_REFUSED else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        if asked is not None:
            reply = Message(Error(code, details), reply_to=asked)
    except (clients.HTTPError, Unavailable) as error:
        log.warning("task lost: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
    finally:
        ended.set()
        try:
            if reply is not None and context is not None:
                Transfer(client, context.node_id, context.run_id).push(reply)
            client.PushTaskOutput(
                PushTaskOutputRequest(
                    context=context_to_proto(context) if context else None, sub_status=status, details=details
                )
            )
        except (clients.HTTPError, Unavailable) as error:
            log.warning("answer not taken: %s", str(error).splitlines()[0] if str(error) else type(error).__name__)
        beat.stop()
        client.close()
        incoming.unlink(missing_ok=True)
    return (context.node_id, context.run_id) if context is not None else None
