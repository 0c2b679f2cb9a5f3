"""A push whose parts are refused for a while: pushed again, and given up in the end. A message that is not what it
should be: refused by number."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federation.errors import Code, FednnunetError
from federation.flower.transfer import TRIES, Ready, Transfer, Unavailable, content, file_array


class Server:
    """Takes the envelope, and says no to each part so many times."""

    def __init__(self, refusals: int) -> None:
        self._refusals = refusals
        self.asked: dict[str, int] = {}

    def PushMessages(self, request: Any) -> Any:
        def ids(tree: Any) -> list[str]:
            return [tree.object_id, *(one for child in tree.children for one in ids(child))]

        return SimpleNamespace(objects_to_push=ids(request.message_object_trees[0]), session_id="s")

    def PushObject(self, request: Any) -> Any:
        self.asked[request.object_id] = self.asked.get(request.object_id, 0) + 1
        return SimpleNamespace(stored=self.asked[request.object_id] > self._refusals)


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def push(server: Server) -> str:
    message = Message(content("{}", None), 1, "train", group_id="describe", ttl=60.0)
    return Transfer(server, 0, 1, back_off=0.0).push(message)


def test_a_part_that_is_refused_for_a_while_is_pushed_again() -> None:
    server = Server(TRIES - 1)
    assert push(server)
    assert len(server.asked) >= 3
    assert set(server.asked.values()) == {TRIES}


def test_a_part_that_is_always_refused_ends_the_push() -> None:
    with pytest.raises(Unavailable, match="not stored"):
        push(Server(TRIES))


def take(parts: list[bytes], folder: Path) -> None:
    """Fetch a message: its parts by their own ids, each after those it speaks of, the last one its root."""
    stored = {hashlib.sha256(part).hexdigest(): part for part in parts}
    root = parts[-1].partition(b"\0")[0].split(b" ")[1].decode()
    tree = ObjectTree(
        object_id=hashlib.sha256(parts[-1]).hexdigest(),
        children=[ObjectTree(object_id=each) for each in root.split(",")],
    )

    def pull(request: Any) -> Any:
        found = stored.get(request.object_id)
        return SimpleNamespace(object_found=found is not None, object_available=True, object_content=found or b"")

    envelope = remove_content_from_message(Message(RecordDict(), 1, "train", group_id="x", ttl=60.0))
    client = SimpleNamespace(PullObject=pull, ConfirmMessageReceived=lambda _: None)
    Transfer(client, 0, 1, 0.0).take(Ready(message_to_proto(envelope), tree), folder / "taken", 2**20, lambda: True)


def whole(folder: Path) -> list[bytes]:
    """The parts of a message with weights, each after those that it speaks of."""
    (folder / "weights").write_bytes(np.random.default_rng(0).bytes(3000))
    message = Message(content('{"a": 1}', file_array(folder / "weights")), 1, "train", group_id="x", ttl=60.0)
    objects = get_all_nested_objects(message)
    order: list[str] = []

    def walk(node: Any) -> None:
        for child in node.children:
            walk(child)
        order.append(node.object_id)

    walk(get_object_tree(message))
    return [objects[name].deflate() for name in order]


def with_part(parts: list[bytes], place: int, changed: bytes) -> list[bytes]:
    """The same message with one part made up, to which all that speak of it are made to fit."""
    made = list(parts)
    made[place] = changed
    for number, part in enumerate(parts[place + 1 :], place + 1):
        for before, after in zip(parts[:number], made[:number], strict=True):
            part = part.replace(hashlib.sha256(before).hexdigest().encode(), hashlib.sha256(after).hexdigest().encode())
        made[number] = part
    return made


def test_a_message_that_is_what_it_should_be_is_taken(tmp_path: Path) -> None:
    take(whole(tmp_path), tmp_path)
    assert (tmp_path / "taken").read_bytes() == (tmp_path / "weights").read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_message_with_any_part_made_up_is_refused_by_number(tmp_path: Path, data: st.DataObject) -> None:
    """The SuperLink looks at no more than the head of a part: what a hospital sends in it reaches the coordinator."""
    parts = whole(tmp_path)
    place = data.draw(st.integers(0, len(parts) - 2))  # of the envelope nothing is read
    head, _, body = parts[place].partition(b"\0")
    kind, children, _ = head.split(b" ")
    kind = data.draw(st.sampled_from([kind, b"Array", b"ArrayChunk", b"ConfigRecord", b"RecordDict", b"x"]))
    made = bytearray(body)
    for _ in range(data.draw(st.integers(0, 4))):
        made[data.draw(st.integers(0, len(made) - 1)) :] = data.draw(st.binary(max_size=40))
        made = made or bytearray(b"0")
    with contextlib.suppress(FednnunetError, Unavailable):
        take(with_part(parts, place, b"%s %s %d\0%s" % (kind, children, len(made), bytes(made))), tmp_path)


@pytest.mark.parametrize(
    ("kind", "body"),
    [(b"ConfigRecord", b"\xff\xff\xff"), (b"Array", b"{"), (b"Array", b"\xff"), (b"ArrayChunk", b"1 ")],
)
def test_what_no_reader_understands_is_said_so(tmp_path: Path, kind: bytes, body: bytes) -> None:
    parts = whole(tmp_path)
    (place,) = (number for number, part in enumerate(parts) if part.startswith(kind + b" "))
    children = parts[place].partition(b"\0")[0].split(b" ")[1]
    if kind == b"ArrayChunk":
        kind = b"ConfigRecord"  # a chunk that is something else
    with pytest.raises(FednnunetError) as caught:
        take(with_part(parts, place, b"%s %s %d\0%s" % (kind, children, len(body), body)), tmp_path)
    assert caught.value.code is Code.ENVELOPE_INVALID
    assert not (tmp_path / "taken").exists()
