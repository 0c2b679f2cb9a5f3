"""Flower's SQL state of the SuperLink, with fewer writes: SQLite has one writer at a time, and every site polls.

Flower claims a node's messages by an UPDATE at each look of each site, waiting message or not, and tidies up expired
claims by two UPDATEs at each chunk that comes or goes. With many sites these queue for the one write lock, and a round
takes as much longer (benchmarks/scale.py). Here a look reads first and writes only where something waits, tidying is
done once a second, and connections are kept open for as many threads as the server has.

Flower answers a message for its node once the node's heartbeat is 60 s late: then what was half downloaded would be
thrown away and sent again, for a line that is away for a minute; and it forgets an answer of which no part has come for
three minutes. Here both stay for `SILENCE` seconds more; who is online is said as before, and a node that starts again
is known by its activation.

Flower gives a message out once: where the answer that names it is lost with the line, the node never fetches it, and
the coordinator waits for it until the round's deadline. Here it is given out again.

Who holds the nodes' looks (federation.flower.held) is told of each message once it is in the database.
"""

from __future__ import annotations

import datetime as dt
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import flwr.server.superlink.linkstate.linkstate_factory as factory
import flwr.server.superlink.linkstate.sql_linkstate as linkstate
import flwr.supercore.corestate.sql_corestate as sql_corestate
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
from flwr.supercore.constant import NodeStatus
from flwr.supercore.state.schema.linkstate_models import MessageIns, Node
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import select, update

from federation.patience import UNHEARD

THREADS = 40
"""anyio's limit of threads, which the server's handlers run in."""
SILENCE = 600.0
"""Seconds for which a node that is offline keeps what it was sent, and what it has uploaded of an answer."""
TIMES = 3
"""How often a message is given out again."""
TIDY = 1.0
"""Seconds between two looks for claims that have expired; they live for minutes."""


class SparingLinkState(SqlLinkState):
    """Flower's state; it answers the same, and writes less."""

    _tidied = 0.0
    sent: Callable[[int], None] = staticmethod(lambda node: None)
    """Told of each node to which a message is sent."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._given_again: Counter[str] = Counter()

    def initialize(self, log_queries: bool = False, **engine: Any) -> list[str]:
        """Open the database."""
        tables: list[str] = super().initialize(log_queries, **({"pool_size": THREADS} | engine))
        return tables

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Messages that wait for a node, and those whose delivery it cannot have heard of."""
        with self.session() as session:
            rows = session.execute(
                select(MessageIns.message_id, MessageIns.delivered_at).where(
                    MessageIns.dst_node_id == uint64_to_int64(node_id),
                    MessageIns.created_at + MessageIns.ttl > time.time(),
                )
            ).all()
        moments = {str(name): moment or "" for name, moment in rows}
        if not moments:
            return []
        # Flower would find one that was withdrawn, answer with nothing, and leave what is behind it to the next look
        withdrawn = {name for name, given in moments.items() if not given and name not in self.object_store}
        if withdrawn:
            self.delete_messages(withdrawn)
            moments = {name: given for name, given in moments.items() if name not in withdrawn}
        if all(moments.values()) and not self._wait_again(node_id, moments):
            return []
        found: list[Message] = super().get_message_ins(node_id, limit, run_id=run_id)
        return found

    def _wait_again(self, node_id: int, moments: dict[str, str]) -> bool:
        """Let messages wait again that were given out, and that their node does not know; whether there are any.

        A node looks for the next message once it has fetched the last one and confirmed it, whereupon the object goes
        from the store. One that looks while the object is there has lost our answer with its line, or could not fetch a
        part. One that cannot be fetched at all is lost, whereupon the coordinator sends another. What was given out
        before the node started is the coordinator's to send again.
        """
        late = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=UNHEARD)).isoformat()
        with self.session() as session:
            started = session.scalar(select(Node.last_activated_at).where(Node.node_id == uint64_to_int64(node_id)))
            again = [
                name for name, given in moments.items() if (started or "") < given < late and name in self.object_store
            ]
            self._given_again.update(again)
            useless = {name for name in again if self._given_again[name] > TIMES}
            again = [name for name in again if name not in useless]
            if again:
                session.execute(update(MessageIns).where(MessageIns.message_id.in_(again)).values(delivered_at=""))
        if useless:
            self.delete_messages(useless)
        return bool(again)

    def store_message_and_object_tree(self, message: Message, *arguments: Any, **named: Any) -> tuple[bool, list[str]]:
        """Keep a message, and say to whom it goes."""
        stored: tuple[bool, list[str]] = super().store_message_and_object_tree(message, *arguments, **named)
        if stored[0] and not message.metadata.reply_to_message_id:
            self.sent(message.metadata.dst_node_id)
        return stored

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """A node is there; where it was silent, that is no new activation: it still has what it was sent."""
        beats = (
            update(Node)
            .where(Node.node_id == uint64_to_int64(node_id), Node.status != NodeStatus.UNREGISTERED)
            .values(
                online_until=time.time() + HEARTBEAT_PATIENCE * heartbeat_interval,
                heartbeat_interval=heartbeat_interval,
                status=NodeStatus.ONLINE,
            )
            .returning(Node.node_id)
        )
        with self.session() as session:
            return session.scalar(beats) is not None

    def store_object(self, run_id: int, session_id: str, object_id: str, object_content: bytes) -> bool:
        """Keep a part of a message. One that is here already is kept: it is sent again where our answer was lost."""
        stored: bool = super().store_object(run_id, session_id, object_id, object_content)
        return stored or bool(self.object_store.get(object_id))

    def _cleanup_expired_task_tokens(self) -> None:
        if time.monotonic() - self._tidied >= TIDY:
            self._tidied = time.monotonic()
            super()._cleanup_expired_task_tokens()

    def store_traffic(self, run_id: int, *, bytes_sent: int, bytes_recv: int) -> None:
        """Nothing: a write for each chunk, for a number that nobody here reads (the journal has the bytes)."""


def tell(sent: Callable[[int], None]) -> None:
    """From here on a SuperLink in this process tells `sent` of each node to which a message is sent."""
    SparingLinkState.sent = staticmethod(sent)


def use() -> None:
    """From here on a SuperLink in this process keeps its state so."""
    factory.SqlLinkState = SparingLinkState  # type: ignore[misc]
    module: Any = linkstate
    check = module.check_node_availability_for_in_message

    def later(*, current_time: float, **named: Any) -> Any:
        return check(current_time=current_time - SILENCE, **named)

    module.check_node_availability_for_in_message = later
    corestate: Any = sql_corestate
    corestate.OBJECT_PUSH_SESSION_TTL_SECONDS = SILENCE
