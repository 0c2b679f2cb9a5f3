"""Messages with a JSON body and, perhaps, one weights file, moved chunk by chunk from disk to disk.

Rules:

- The file that lies in the outbox is the file that arrives: it travels as the bytes of one Flower `Array`, so its
  SHA-256 is the same in the outbox, in the ledger and at the other side.
- Neither side holds a model in memory: chunks (5 MiB) are read when they are sent and written when they arrive.
  (Flower's own push and pull hold the whole message two to three times over.)
- A message's records go before the chunks of its file, in the order in which they are asked for: the receiver writes
  the first chunk while the last ones are still being sent.
- A message is confirmed when all of it has come, its own envelope too, of which nothing is needed: what is confirmed
  is removed, and its sender would be left with a part that nobody takes any more.
- A receiver says how many bytes it takes at most; more is refused before it is fetched.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_tree,
    no_object_id_recompute,
)

from federation.errors import Code, FednnunetError
from federation.files import replacing
from federation.patience import pause

STYPE = "safetensors"
MAX_BODY = 64 * 2**20
_AT_A_TIME = 2
_HASHED_AT_A_TIME = 4
_FETCHES = threading.BoundedSemaphore(8)
"""Parts that one process fetches at a time, of all messages: each is in memory several times then."""
PATIENCE = 0.05
"""A look for a chunk that is still being uploaded comes late by at most this share of what has been waited for it."""
TRIES = 4
"""How often a part is pushed: a SuperLink whose database is locked for too long says no, and then yes."""


class _FileChunk(ArrayChunk):
    """A chunk that is read from its file when it is sent."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._path, self._start, self._size = path, start, size
        self._id = hashlib.sha256(self.deflate()).hexdigest()

    def deflate(self) -> bytes:
        """The chunk as it travels."""
        with open(self._path, "rb") as stream:
            stream.seek(self._start)
            data = stream.read(self._size)
        if len(data) != self._size:
            raise FednnunetError(Code.WEIGHTS_DAMAGED, f"{self._path} became shorter while it was sent")
        content: bytes = ArrayChunk(memoryview(data)).deflate()
        return content

    @property
    def object_id(self) -> str:
        """SHA-256 of the chunk as it travels, taken once."""
        return self._id


def file_array(path: Path) -> Array:
    """A file as one Flower array of bytes. The file is read once for its chunks' hashes, then chunk by chunk."""
    size = path.stat().st_size
    array = Array("uint8", (size,), STYPE, b"")
    with concurrent.futures.ThreadPoolExecutor(_HASHED_AT_A_TIME) as pool:
        chunks = list(pool.map(lambda start: _FileChunk(path, start, min(CHUNK, size - start)), range(0, size, CHUNK)))
    array.__dict__["_chunks"] = [(chunk.object_id, chunk) for chunk in chunks]
    return array


def content(body: str, weights: Array | None) -> RecordDict:
    """What a message carries: the JSON body and the weights file."""
    records: dict[str, Any] = {"body": ConfigRecord({"json": body})}
    if weights is not None:
        records["weights"] = ArrayRecord()
        records["weights"]["file"] = weights  # the constructor would copy it, without its chunks
    return RecordDict(records)


@dataclass(frozen=True)
class Received:
    """A message as it arrived: its body, or Flower's error."""

    body: str
    has_weights: bool
    error_code: int | None = None
    error_reason: str = ""


@dataclass(frozen=True)
class Ready:
    """A message that waits for us, as Flower announces it: its envelope and the tree of its objects."""

    proto: Any
    tree: Any

    @property
    def message_id(self) -> str:
        """Its id."""
        found: str = self.proto.metadata.message_id
        return found

    @property
    def reply_to(self) -> str:
        """The id of the message that it answers."""
        found: str = self.proto.metadata.reply_to_message_id
        return found


def parents_first(tree: Any) -> Iterator[Any]:
    """The nodes of a tree of objects, level by level: all records, then a file's chunks from its start."""
    level = [tree]
    while level:
        yield from level
        level = [child for node in level for child in node.children]


def in_order(tree: Any, wanted: Collection[str]) -> list[str]:
    """The ids that are wanted of a tree of objects, each once, parents first."""
    return [name for name in dict.fromkeys(node.object_id for node in parents_first(tree)) if name in wanted]


class Unavailable(Exception):
    """The message cannot be fetched any more: its sender or its chunks are gone."""


class Transfer:
    """Pushes and pulls messages of one run for one node, through one Runtime API client.

    Parameters
    ----------
    client : RuntimeHttpClient
        A client that holds a task's token.
    node_id, run_id : int
        Who moves, and for which run.
    back_off : float
        Seconds before a chunk that is still being uploaded is asked for again, at first.
    """

    def __init__(self, client: Any, node_id: int, run_id: int, back_off: float = 0.05) -> None:
        self._client, self._node, self._run_id, self._back_off = client, Node(node_id=node_id), run_id, back_off

    def push(self, message: Message) -> str:
        """Send one message; returns its id. Raises `Unavailable` when a part of it is refused again and again."""
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects: dict[str, InflatableObject] = get_all_nested_objects(message)
            tree = get_object_tree(message)
            response = self._client.PushMessages(
                PushAppMessagesRequest(
                    messages_list=[message_to_proto(remove_content_from_message(message))],
                    message_object_trees=[tree],
                )
            )
            wanted = set(response.objects_to_push)

            def send(object_id: str) -> None:
                for again in range(TRIES):
                    answer = self._client.PushObject(
                        PushObjectRequest(
                            node=self._node,
                            run_id=self._run_id,
                            object_id=object_id,
                            object_content=objects[object_id].deflate(),
                            session_id=response.session_id,
                        )
                    )
                    if answer.stored:
                        return
                    time.sleep(self._back_off * 4**again)
                raise Unavailable(f"object {object_id[:12]} was not stored")

            _each(in_order(tree, wanted), send, threading.Event())
        message_id: str = message.metadata.message_id
        return message_id

    def ready(self, message_ids: list[str] | None = None) -> list[Ready]:
        """Messages that wait for us: replies to `message_ids` (a coordinator), or the task's own message (a link).

        Each is handed out once: what comes back must be taken, or it is lost.
        """
        response = self._client.PullMessages(PullAppMessagesRequest(message_ids=message_ids or []))
        return [Ready(*pair) for pair in zip(response.messages_list, response.message_object_trees, strict=True)]

    def take(self, ready: Ready, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
        """Fetch one message that is ready; waits while its sender is still uploading.

        Parameters
        ----------
        ready : Ready
            What `ready` gave.
        weights : Path
            Where the weights file goes, whole or not at all.
        max_weights : int
            Most bytes to take for it; more is refused (FNU-603).
        give_up : callable
            Asked while waiting for a chunk; True ends the wait with `Unavailable`.
        """
        if ready.proto.HasField("error"):
            received = Received("", False, ready.proto.error.code, ready.proto.error.reason)
        else:
            received = self._take(ready.tree, weights, max_weights, give_up)
        self.withdraw(ready.tree.object_id or ready.message_id)
        return received

    def withdraw(self, message_id: str) -> None:
        """Say that nothing of a message is needed any more, ours or one for us: all of it is removed.

        Whoever is still sending or fetching it is told so at the next part.
        """
        request = ConfirmMessageReceivedRequest(node=self._node, run_id=self._run_id, message_object_id=message_id)
        self._client.ConfirmMessageReceived(request)

    def _take(self, tree: Any, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
        broken_off = threading.Event()

        def fetch(object_id: str) -> bytes:
            began = time.monotonic()
            while True:
                with _FETCHES:
                    answer = self._client.PullObject(
                        PullObjectRequest(node=self._node, run_id=self._run_id, object_id=object_id)
                    )
                    got: bytes = answer.object_content
                if not answer.object_found:
                    raise Unavailable(f"object {object_id[:12]} is gone")
                if answer.object_available:
                    if hashlib.sha256(got).hexdigest() != object_id:
                        raise FednnunetError(Code.WEIGHTS_DAMAGED, "a chunk is not what its name says")
                    return got
                if give_up() or broken_off.is_set():
                    raise Unavailable("gave up while it was being uploaded")
                time.sleep(pause(self._back_off, time.monotonic() - began, PATIENCE))

        body, array = "", None
        limit = MAX_BODY
        stack = [child.object_id for child in tree.children]  # the tree's root is the message itself
        seen = 0
        while stack:
            seen += 1
            if seen > 8:  # RecordDict, ConfigRecord, ArrayRecord, Array: a message of ours has no more
                raise FednnunetError(Code.ENVELOPE_INVALID, "more records than a message of ours has")
            raw = fetch(stack.pop())
            limit -= len(raw)
            if limit < 0:
                raise FednnunetError(Code.ENVELOPE_INVALID, "body too large")
            with _strange("a record"):
                kind, children, _ = get_object_head_values_from_object_content(raw)
                value = ConfigRecord.inflate(raw).get("json") if kind == "ConfigRecord" else None
            if kind == "ConfigRecord":
                if not isinstance(value, str):
                    raise FednnunetError(Code.ENVELOPE_INVALID, "no JSON body")
                body = value
            elif kind == "Array":
                array = (raw, children)
            elif kind in ("RecordDict", "ArrayRecord"):
                stack.extend(children)
            else:
                raise FednnunetError(Code.ENVELOPE_INVALID, f"unexpected {kind[:40]}")
        if array is not None:
            self._take_file(*array, weights, max_weights, fetch, broken_off)
        fetch(tree.object_id)
        return Received(body, array is not None)

    def _take_file(
        self,
        raw: bytes,
        children: list[str],
        path: Path,
        max_bytes: int,
        fetch: Callable[[str], bytes],
        broken_off: threading.Event,
    ) -> None:
        with _strange("head of the weights"):
            head = json.loads(get_object_body(raw, Array))
            (size,) = head["shape"]
            order = [children[index] for index in head["arraychunk_ids"]]
            sound = head["dtype"] == "uint8" and head["stype"] == STYPE and type(size) is int
        if not sound or len(order) != -(-size // CHUNK):
            raise FednnunetError(Code.ENVELOPE_INVALID, f"head of the weights: {str(head)[:200]}")
        if size > max_bytes:
            raise FednnunetError(Code.WEIGHTS_DAMAGED, f"{size} bytes announced, at most {max_bytes} expected")
        with replacing(path) as temporary, open(temporary, "wb") as stream:
            lock = threading.Lock()

            def place(index: int) -> None:
                content = fetch(order[index])
                with _strange("a chunk"):
                    data = get_object_body(content, ArrayChunk)
                if len(data) != min(CHUNK, size - index * CHUNK):
                    raise FednnunetError(Code.WEIGHTS_DAMAGED, "a chunk has the wrong size")
                with lock:
                    stream.seek(index * CHUNK)
                    stream.write(data)

            _each(range(len(order)), place, broken_off)


@contextlib.contextmanager
def _strange(what: str) -> Iterator[None]:
    """Flower's readers raise whatever they meet in bytes that another side has made up: all of it is FNU-605."""
    try:
        yield
    except Exception as error:
        raise FednnunetError(Code.ENVELOPE_INVALID, f"{what}: {error!r}"[:300]) from error


def _each(items: Any, do: Callable[[Any], None], failed: threading.Event) -> None:
    """Do it for every item, two at a time, holding no more than two; the first error, or a signal, ends the rest.

    `failed` is set then: who waits in `do` looks at it.
    """
    iterator, lock = iter(items), threading.Lock()

    def work() -> None:
        while not failed.is_set():
            with lock:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            try:
                do(item)
            except BaseException:
                failed.set()
                raise

    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        try:
            for future in [pool.submit(work) for _ in range(_AT_A_TIME)]:
                future.result()
        except BaseException:
            failed.set()
            raise
