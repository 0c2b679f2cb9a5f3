"""Flower's SuperNode, with a poll that is ours and a restart that is let in at once.

- Flower keeps what it pulls to itself until a message is whole: here each part is handed on when it is there, records
  first, so that the link writes what is being downloaded, and the SuperLink what is being uploaded.
- Flower sleeps 3 s between two looks, as a literal: its module's `time` is replaced by one that sleeps less at first,
  and not at all after a look that our SuperLink has held (federation.flower.held).
- After a crash Flower refuses the node for up to 60 s ("already active"): we take it off first.
- Flower takes a slow line for a dead one: its client is ours (federation.flower.clients).
- When Flower's loop ends on an error it leaves a process that answers its link but never again the SuperLink:
  we end the process, so that the supervisor starts another. So we do where the link is gone in the middle of its
  answer: the loop, and the coordinator behind it, would wait for the rest for ever.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr.supercore.corestate.in_memory_corestate as corestate
import flwr.supernode.fleet_http_connection as fleet_connection
import flwr.supernode.start_client_internal as loop
import httpx
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.logger import FLOWER_LOGGER, console_handler
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.run import RunNotRunningException

from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.transfer import in_order, parents_first
from federation.patience import SLOWEST, pause

log = logging.getLogger("fednnunet.supernode")

_cli = importlib.import_module("flwr.supernode.cli.flower_supernode")


PATIENCE = 0.02
"""A look for a message comes late by at most this share of what has been waited for it: every look of every site costs
the SuperLink some milliseconds."""

ASK_AGAIN, SAY_AGAIN = 3.0, 600.0
"""Seconds until a site that is not let in asks again, and says so again."""

HELD = 1.0
"""A look that takes so many seconds was held: the next one follows at once."""


def rest(poll: float, waited: float, looked: float) -> float:
    """Seconds from a look at the SuperLink that found nothing to the next.

    Parameters
    ----------
    poll : float
        Seconds between two looks at first.
    waited : float
        Seconds since there was something to do.
    looked : float
        Seconds that the look took.
    """
    return 0.0 if looked >= HELD else pause(poll, waited, PATIENCE)


class _Clock:
    """Stands in for the `time` module in Flower's loop.

    It sleeps Flower's long pause between two looks at the SuperLink, less while there is work, and is woken by whatever
    the link hands over.
    """

    def __init__(self, poll: float) -> None:
        self._poll, self.time = poll, time.time
        self._worked = time.monotonic()
        self._arrived = threading.Event()
        self.looked = 0.0
        """Seconds that the last look took."""

    def sleep(self, seconds: float) -> None:
        """Sleep until the link hands something over, at most the poll; or `rest` after a look that found nothing."""
        if seconds < SLOWEST:
            self._worked = time.monotonic()
            self._wait(min(seconds, self._poll))
        elif (wait := rest(self._poll, time.monotonic() - self._worked, self.looked)) > 0.0:
            self._wait(wait)

    def _wait(self, seconds: float) -> None:
        if self._arrived.wait(seconds):
            self._arrived.clear()

    def waking(self, store: Callable[..., Any]) -> Callable[..., Any]:
        """A function that stores what the link hands over, and wakes the loop once it has."""

        def stored(*arguments: Any, **named: Any) -> Any:
            result = store(*arguments, **named)
            self._arrived.set()
            return result

        return stored


class _Over(Exception):
    """The run has ended while a message of it was fetched.

    Flower's own exception is not an `Exception`: it passes by the place where what has come is thrown away and the task
    ends, and the link would wait for ever for the rest.
    """

    def __str__(self) -> str:
        return "its run has ended"


def _or_over(ask: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which raises `_Over` where Flower says that the run has ended."""

    def asked(*arguments: Any, **named: Any) -> Any:
        try:
            return ask(*arguments, **named)
        except RunNotRunningException as over:
            raise _Over from over

    return asked


def _stream(loop: Any, store: Any, clock: _Clock) -> None:
    """Let Flower's loop move a message part by part, each before its own parts."""
    preregister, put = store.preregister, store.put

    def registered(run_id: int, tree: Any) -> list[str]:
        return in_order(tree, set(preregister(run_id, tree)))

    def pull_into_the_store(object_ids: list[str], pull_object_fn: Callable[[str], bytes]) -> dict[str, bytes]:
        def pull(object_id: str) -> bytes:
            put(object_id, pull_object_fn(object_id))
            return b""

        _or_over(inflatable_utils.pull_objects)(object_ids, pull)
        return {}

    store.preregister, store.put = registered, clock.waking(put)
    loop.pull_objects, loop.iterate_object_tree = pull_into_the_store, parents_first


def _push_what_waits(loop: Any, clock: _Clock) -> None:
    """Let Flower's loop send an answer also where no message has come before it; and time its looks.

    The loop sends one answer for each message that it pulls. After one that was answered twice, by an error and by the
    link, each answer would wait for the message after its own.
    """
    pull = loop._pull_and_store_message

    def pulled(*, state: Any, confirm_message_received: Callable[..., Any], **named: Any) -> int | None:
        if _answer_waits(state):
            return 0
        began = time.monotonic()
        run_id: int | None = pull(state=state, confirm_message_received=_or_over(confirm_message_received), **named)
        clock.looked = time.monotonic() - began
        if run_id is None and _answer_waits(state):
            return 0
        return run_id

    loop._pull_and_store_message = pulled


def _answer_waits(state: Any) -> bool:
    with state.lock_msg_store:
        entries = list(state.msg_store.values())
    return any(entry.message.metadata.reply_to_message_id and not entry.is_retrieved for entry in entries)


def _end_with_half_an_answer(state: Any, store: Any) -> None:
    """End this process when the link's lease runs out before it has handed over all of an answer."""
    link_is_gone = state._on_task_tokens_expired

    def gone(tasks: list[Any]) -> None:
        link_is_gone(tasks)
        runs = {task.run_id for task in tasks}
        with state.lock_msg_store:
            sent = [(name, entry.message.metadata) for name, entry in state.msg_store.items()]
        if any(about.reply_to_message_id and about.run_id in runs and _is_half(store, name) for name, about in sent):
            log.warning("the link is gone in the middle of its answer: starting anew, so that it is asked again")
            os._exit(1)

    state._on_task_tokens_expired = gone


def _is_half(store: Any, message_id: str) -> bool:
    """Whether a part of a message has been announced and has not come."""
    with contextlib.suppress(NoObjectInStoreError):  # it has just been sent
        return any(store.get(part.object_id) == b"" for part in parents_first(store.get_object_tree(message_id)))
    return False


@dataclass(frozen=True)
class SuperNodeFiles:
    """The files a SuperNode needs."""

    ca: Path
    key: Path
    secret: Path
    node_id: Path


def _telling(refused: Callable[[], object]) -> type[clients.FleetClient]:
    """The client of a SuperNode, which says why the orchestrator refuses it.

    Flower's loop ends on a request that is refused with 401, so that whoever reads the log has to find the reason
    there: `refused`, called at the first one, looks for it before the loop hears of it. A site that is not let in (yet)
    asks again, instead of ending: it is approved in a minute, or tomorrow.
    """
    looking, told = threading.Lock(), threading.Event()

    class Telling(clients.FleetClient):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._client.event_hooks = {**self._client.event_hooks, "response": [self._heard]}

        def ActivateNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name
            """Ask to be let in, until we are."""
            said = 0.0
            while True:
                try:
                    answer = super().ActivateNode(request)
                except httpx.HTTPStatusError as error:
                    if not clients.is_not_let_in(error):
                        raise
                    if not said or time.monotonic() - said > SAY_AGAIN:
                        log.error("%s", FednnunetError(Code.NOT_LET_IN))
                        said = time.monotonic()
                    time.sleep(ASK_AGAIN)
                    continue
                if said:
                    log.info("the orchestrator has let this site in")
                return answer

        @staticmethod
        def _heard(response: httpx.Response) -> None:
            if response.status_code != httpx.codes.UNAUTHORIZED:
                return
            with looking:  # whoever is refused meanwhile waits: it would end the process
                if not told.is_set():
                    told.set()
                    try:
                        refused()
                    except Exception:
                        log.exception("why the orchestrator refused a request was not found out")

    return Telling


def run(
    address: str,
    files: SuperNodeFiles,
    runtime_port: int,
    poll: float,
    link_lease: float = 15.0,
    refused: Callable[[], object] = lambda: None,
) -> None:
    """Run a SuperNode until it is ended; never returns.

    Parameters
    ----------
    address : str
        HOST:PORT of the hospitals' listener.
    files : SuperNodeFiles
        The authority's certificate, the site's key, the runner's secret, and where the node id is remembered.
    runtime_port : int
        Loopback port for the link.
    poll : float
        Seconds between two looks for a message.
    link_lease : float
        Seconds without a heartbeat after which the link counts as gone (it beats every 5 s; Flower's own: 60).
    refused : callable
        Called once, when the SuperLink has refused a request (401), before Flower's loop ends on that.
    """
    FLOWER_LOGGER.removeHandler(console_handler)  # what it says is in our log (federation.logs), once
    flower: dict[str, Any] = {"leases": corestate, "fleet": fleet_connection, "loop": loop, "cli": _cli}
    flower["leases"].HEARTBEAT_PATIENCE = link_lease / corestate.HEARTBEAT_DEFAULT_INTERVAL
    flower["fleet"].make_simple_http_retry_invoker = clients.supernode_retry
    flower["fleet"].FleetHttpClient = _telling(refused)
    flower["loop"].time = clock = _Clock(poll)
    for function in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        (function.__kwdefaults__ or {}).update(initial_backoff=0.05, backoff_cap=0.25, max_tries_per_object=None)
    if files.node_id.exists():
        with contextlib.suppress(clients.HTTPError, ValueError):
            fleet = clients.fleet_client(address, files.ca.read_bytes(), files.key, max_time=5.0)
            clients.deactivate(fleet, int(files.node_id.read_text()))
    _push_what_waits(flower["loop"], clock)
    start = flower["cli"].start_client_internal

    def remembering(*, state_factory: Any, **arguments: Any) -> None:
        state = state_factory.state()
        set_node_id = state.set_node_id

        def remember(node_id: int) -> None:
            set_node_id(node_id)
            files.node_id.write_text(str(node_id))

        state.set_node_id = remember
        state.store_message = clock.waking(state.store_message)
        store = state_factory.objectstore_factory.store()
        _stream(flower["loop"], store, clock)
        _end_with_half_an_answer(state, store)
        start(state_factory=state_factory, **arguments)

    flower["cli"].start_client_internal = remembering
    sys.argv = [
        "flower-supernode",
        *("--superlink", address, "--root-certificates", str(files.ca)),
        *("--auth-supernode-private-key", str(files.key), "--port", str(runtime_port)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(files.secret)),
    ]
    try:
        _cli.flower_supernode()
    finally:
        os._exit(1)
