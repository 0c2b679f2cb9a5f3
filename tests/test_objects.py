"""The SuperLink's objects in files, and a message that is handed on while it is still arriving."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flwr.server.superlink.linkstate.linkstate_factory as linkstate_factory
import flwr.server.superlink.linkstate.sql_linkstate as linkstate
import flwr.supercore.corestate.sql_corestate as sql_corestate
import numpy as np
import pytest
from flwr.app import Message, Metadata, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.constant import NOOP_FLWR_AID, SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation.noop_federation_manager import NoOpFederationManager
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from sqlalchemy import text

from federation.flower import state, supernode, transfer
from federation.flower.objects import SMALL, FileObjectStore
from federation.flower.transfer import CHUNK, Ready, Transfer, content, file_array, in_order, parents_first

Parts = dict[str, bytes]


@pytest.fixture(autouse=True)
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of two chunks and a bit."""
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(2 * CHUNK + 4096))
    return path


def parts(weights: Path | None, body: str = "{}") -> tuple[Any, Parts]:
    """A message's tree and its parts, by id."""
    message = Message(content(body, file_array(weights) if weights else None), 1, "train", group_id="x", ttl=60.0)
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        return get_object_tree(message), {name: part.deflate() for name, part in objects.items()}


def handed_over(store: SqlObjectStore, weights: Path) -> Parts:
    """A message's parts, all of which lie in a store."""
    tree, made = parts(weights)
    store.preregister(1, tree)
    for name, part in made.items():
        store.put(name, part)
    return made


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "superlink.db")


@pytest.fixture
def store(database: str) -> FileObjectStore:
    made = FileObjectStore(database)
    made.initialize()
    return made


def files_of(database: str) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in Path(f"{database}-objects").iterdir()}


def test_it_answers_as_flowers_own_and_keeps_large_parts_in_files(
    store: FileObjectStore, database: str, tmp_path: Path, weights: Path
) -> None:
    tree, made = parts(weights)
    own = SqlObjectStore(str(tmp_path / "own.db"))
    own.initialize()
    for each in (store, own):
        assert set(each.preregister(1, tree)) == set(made)
        assert all(each.get(name) == b"" for name in made)
        for name, part in made.items():
            each.put(name, part)
            each.put(name, part)  # a second time changes nothing
        assert {name: each.get(name) for name in made} == made
        assert each.preregister(1, tree) == []
        assert each.get("0" * 64) is None
        with pytest.raises(NoObjectInStoreError):
            each.put(*next((name, part) for name, part in parts(None, "x")[1].items()))
        with pytest.raises(ValueError, match="does not match"):
            each.put(tree.object_id, b"anything")
    large = {name: len(part) for name, part in made.items() if len(part) > SMALL}
    assert len(large) == 2
    assert files_of(database) == large

    other, _ = parts(weights, "another body")  # another message with the same file
    store.preregister(1, other)
    store.delete(tree.object_id)
    assert files_of(database) == large
    store.delete(other.object_id)
    assert files_of(database) == {}
    assert len(store) == 0


def rows(each: SqlObjectStore) -> list[list[tuple[Any, ...]]]:
    """Everything that a store's database holds."""
    statements = (
        "SELECT object_id, is_available, ref_count FROM objects",
        "SELECT parent_id, child_id FROM object_children",
        "SELECT run_id, object_id FROM run_objects",
    )
    with each.session() as session:
        return [sorted(map(tuple, session.execute(text(statement)))) for statement in statements]


def nested(tree: ObjectTree) -> Any:
    return tree.object_id, sorted(nested(child) for child in tree.children)


@pytest.mark.parametrize("seed", range(4))
def test_its_database_is_that_of_flowers_own_after_any_messages(
    store: FileObjectStore, tmp_path: Path, seed: int
) -> None:
    """Messages by chance, with parts in common, announced, fetched and removed in any order."""
    chance = random.Random(seed)
    own = SqlObjectStore(str(tmp_path / "own.db"), verify=False)
    own.initialize()
    store._verify = False  # what the parts are does not matter here
    trees: list[ObjectTree] = []
    for number in range(12):
        name = hashlib.sha256(bytes([number])).hexdigest()
        trees.append(ObjectTree(object_id=name, children=chance.sample(trees, chance.randint(0, min(3, len(trees))))))
    for _ in range(40):
        tree, run = chance.choice(trees), chance.choice([1, 2**64 - 1])
        match chance.randrange(4):
            case 0 | 1:
                assert set(store.preregister(run, tree)) == set(own.preregister(run, tree))
            case 2:
                for each in (store, own):
                    each.delete(tree.object_id)
            case _:
                for each in (store, own):
                    with contextlib.suppress(NoObjectInStoreError):
                        each.put(tree.object_id, b"x")
        assert rows(store) == rows(own)
        try:
            expected = nested(own.get_object_tree(tree.object_id))
        except NoObjectInStoreError:
            with pytest.raises(NoObjectInStoreError):
                store.get_object_tree(tree.object_id)
        else:
            assert nested(store.get_object_tree(tree.object_id)) == expected
    for run in (1, 2**64 - 1):
        for each in (store, own):
            each.delete_objects_in_run(run)
    assert rows(store) == rows(own)


@pytest.mark.parametrize(
    "tree",
    [
        ObjectTree(object_id="0" * 63),
        ObjectTree(object_id="0" * 64, children=[ObjectTree(object_id="1" * 64)] * 2),
        ObjectTree(
            object_id="0" * 64,
            children=[
                ObjectTree(object_id="1" * 64),
                ObjectTree(
                    object_id="2" * 64,
                    children=[ObjectTree(object_id="1" * 64, children=[ObjectTree(object_id="3" * 64)])],
                ),
            ],
        ),
        ObjectTree(object_id="4" * 64, children=[ObjectTree(object_id="5" * 64)]),
    ],
    ids=[
        "no hash",
        "the same child twice",
        "one name for two objects",
        "known with other children",
    ],
)
def test_a_message_that_contradicts_itself_or_what_is_known_is_refused_whole(
    store: FileObjectStore, tmp_path: Path, tree: ObjectTree
) -> None:
    own = SqlObjectStore(str(tmp_path / "own.db"))
    own.initialize()
    for each in (store, own):
        each.preregister(1, ObjectTree(object_id="4" * 64))
        before = rows(each)
        with pytest.raises(ValueError, match=r"[Oo]bject"):
            each.preregister(1, tree)
        assert rows(each) == before


def test_a_part_nobody_has_announced_leaves_no_file(store: FileObjectStore, database: str, weights: Path) -> None:
    _, made = parts(weights)
    name, part = max(made.items(), key=lambda pair: len(pair[1]))
    with pytest.raises(NoObjectInStoreError):
        store.put(name, part)
    assert files_of(database) == {}


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_file_that_is_lost_or_cut_short_is_a_part_that_is_gone(
    store: FileObjectStore, database: str, weights: Path, damage: Callable[[Path], None]
) -> None:
    handed_over(store, weights)
    name = next(iter(files_of(database)))
    damage(Path(f"{database}-objects") / name)
    assert store.get(name) is None
    store.delete_objects_in_run(1)
    assert files_of(database) == {}


def test_a_lost_part_is_asked_for_again_of_whoever_sends_another_message_with_it(
    store: FileObjectStore, database: str, weights: Path
) -> None:
    """The weights of a round are in the messages to all sites: the one of another site keeps their rows."""
    made = handed_over(store, weights)
    lost = next(iter(files_of(database)))
    (Path(f"{database}-objects") / lost).unlink()
    other, again = parts(weights, "another body")
    missing = set(store.preregister(1, other))
    assert lost in missing
    assert missing & set(made) == {lost}
    assert store.get(lost) == b"", "announced, and not there yet"
    for name in missing:
        store.put(name, again[name])
    assert {name: store.get(name) for name in made} == made


def test_a_start_keeps_what_is_on_its_way_and_takes_away_what_no_row_speaks_of(
    store: FileObjectStore, database: str, weights: Path
) -> None:
    made = handed_over(store, weights)
    kept = files_of(database)
    for name in ("1" * 64, f"{'2' * 64}.abcd1234"):
        (Path(f"{database}-objects") / name).write_bytes(b"left by a kill")
    again = FileObjectStore(database)
    again.initialize()
    assert files_of(database) == kept
    assert {name: again.get(name) for name in made} == made


@pytest.mark.parametrize("body", [f"[{number}]" for number in range(6)])
def test_records_are_fetched_before_the_chunks(store: FileObjectStore, weights: Path, body: str) -> None:
    """The SuperLink gives a message's records by their hashes: the body's may stand behind that of the weights."""
    tree, made = parts(weights, body)
    store.preregister(1, tree)
    fetched = in_order(store.get_object_tree(tree.object_id), made)
    assert len(fetched) == 5 + 3
    assert max(len(made[name]) for name in fetched[:5]) < SMALL


def test_records_are_pushed_before_the_chunks_and_these_in_their_order(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_AT_A_TIME", 1)  # of two, either may be done first
    pushed = []

    def push_messages(request: Any) -> Any:
        wanted = [node.object_id for node in parents_first(request.message_object_trees[0])]
        return SimpleNamespace(objects_to_push=wanted[::-1], session_id="s")

    def push_object(request: Any) -> Any:
        pushed.append(len(request.object_content))
        return SimpleNamespace(stored=True)

    message = Message(content("{}", file_array(weights)), 1, "train", group_id="x", ttl=60.0)
    Transfer(SimpleNamespace(PushMessages=push_messages, PushObject=push_object), 0, 1).push(message)
    assert max(pushed[:5]) < SMALL  # message, records, head of the array
    assert [size >= CHUNK for size in pushed[5:]] == [True, True, False]


def test_a_supernode_hands_on_each_part_when_it_has_come(weights: Path, tmp_path: Path) -> None:
    """The link reads the records and the first chunk while the last chunk has not come."""
    tree, made = parts(weights)
    memory = InMemoryObjectStore()
    loop = SimpleNamespace()
    supernode._stream(loop, memory, supernode._Clock(0.5))
    order = memory.preregister(1, tree)
    assert order == [node.object_id for node in loop.iterate_object_tree(tree)]
    last, seen = order[-1], []

    def pull(name: str) -> bytes:
        if name == last and seen[-1:] != [set(made) - {last}]:  # it comes when all others have
            seen.append({name for name in made if memory.get(name)})
            raise ObjectUnavailableError(name)
        return made[name]

    assert loop.pull_objects(order, pull_object_fn=pull) == {}
    assert {name: memory.get(name) for name in made} == made
    assert seen[-1] == set(made) - {last}

    def pull_object(request: Any) -> Any:
        return SimpleNamespace(object_found=True, object_available=True, object_content=memory.get(request.object_id))

    client = SimpleNamespace(PullObject=pull_object, ConfirmMessageReceived=lambda request: None)
    message = remove_content_from_message(Message(RecordDict(), 1, "train", group_id="x", ttl=60.0))
    ready = Ready(message_to_proto(message), tree)
    received = Transfer(client, 0, 1).take(ready, tmp_path / "taken", 2**30, lambda: False)
    assert received.body == "{}"
    assert (tmp_path / "taken").read_bytes() == weights.read_bytes()


def test_a_message_is_confirmed_only_when_its_sender_has_handed_over_all_of_it(tmp_path: Path) -> None:
    tree, made = parts(None)
    arrived, looks, confirmed = dict(made), [0], []
    envelope = arrived.pop(tree.object_id)

    def pull_object(request: Any) -> Any:
        if request.object_id == tree.object_id:
            looks[0] += 1
            if looks[0] > 1:
                arrived[tree.object_id] = envelope
        found = arrived.get(request.object_id, b"")
        return SimpleNamespace(object_found=True, object_available=found != b"", object_content=found)

    client = SimpleNamespace(PullObject=pull_object, ConfirmMessageReceived=lambda _: confirmed.append(len(arrived)))
    message = remove_content_from_message(Message(RecordDict(), 1, "train", group_id="x", ttl=60.0))
    Transfer(client, 0, 1, 0.01).take(Ready(message_to_proto(message), tree), tmp_path / "x", 0, lambda: False)
    assert confirmed == [len(made)]


def test_a_signal_ends_the_wait_for_a_chunk_and_leaves_nothing_half_written(weights: Path, tmp_path: Path) -> None:
    """A supervisor would have to kill the link, and half a file would stay."""

    class Ended(SystemExit):
        pass

    def end(*_: object) -> None:
        raise Ended

    tree, made = parts(weights)
    asked = itertools.count()

    def pull_object(request: Any) -> Any:
        found = made.get(request.object_id, b"")
        if len(found) > SMALL and next(asked) == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        available = 0 < len(found) <= SMALL
        return SimpleNamespace(
            object_found=True, object_available=available, object_content=found if available else b""
        )

    client = SimpleNamespace(PullObject=pull_object)
    message = remove_content_from_message(Message(RecordDict(), 1, "train", group_id="x", ttl=60.0))
    before = signal.signal(signal.SIGUSR1, end)
    try:
        with pytest.raises(Ended):
            Transfer(client, 0, 1, 0.01).take(
                Ready(message_to_proto(message), tree), tmp_path / "x", 2**30, lambda: False
            )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert list(tmp_path.iterdir()) == []


def test_an_answer_is_sent_also_where_no_message_came_before_it() -> None:
    """Answered twice, a message would leave the answer to the next one behind."""
    node = InMemoryNodeState(InMemoryObjectStore())
    loop = SimpleNamespace(_pull_and_store_message=lambda *, state, confirm_message_received: None)
    supernode._push_what_waits(loop, supernode._Clock(0.5))
    pull = functools.partial(loop._pull_and_store_message, state=node, confirm_message_received=None)
    assert pull() is None
    about = Metadata(1, "asked", 1, 2, "", "x", time.time(), 60.0, "train")
    asked = make_message(metadata=about, content=RecordDict())
    node.store_message(asked)
    assert pull() is None
    answer = Message(RecordDict(), reply_to=asked)
    answer.metadata.__dict__["_message_id"] = "answer"
    node.store_message(answer)
    assert pull() is not None
    assert [one.metadata.message_id for one in node.get_messages_legacy(is_reply=True)] == ["answer"]
    assert pull() is None


def test_a_run_that_ends_before_its_message_is_confirmed_leaves_no_task_behind() -> None:
    """Flower clears away after an `Exception`, and what it raises here is none."""
    cleared = []

    def confirm(run_id: int, message_id: str) -> None:
        raise RunNotRunningException

    def pull(*, state: Any, confirm_message_received: Callable[[int, str], None]) -> int | None:
        try:
            confirm_message_received(1, "asked")
        except Exception as error:  # noqa: BLE001 - as Flower does
            cleared.append(str(error))
            return None
        return 1

    loop = SimpleNamespace(_pull_and_store_message=pull)
    supernode._push_what_waits(loop, supernode._Clock(0.5))
    node = InMemoryNodeState(InMemoryObjectStore())
    assert loop._pull_and_store_message(state=node, confirm_message_received=confirm) is None
    assert cleared == ["its run has ended"]


def test_a_line_that_is_away_for_minutes_costs_nothing_that_was_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower takes the message back when the node's heartbeat is a minute late, and sends it again in whole."""
    for module, name in (
        (linkstate, "check_node_availability_for_in_message"),
        (sql_corestate, "OBJECT_PUSH_SESSION_TTL_SECONDS"),
        (linkstate_factory, "SqlLinkState"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back at the end
    state.use()
    now = time.time()
    asked = make_message(metadata=Metadata(1, "asked", 1, 2, "", "x", now, 6000.0, "train"), content=RecordDict())

    def lost(silent: float) -> dict[str, Message]:
        found: dict[str, Message] = linkstate.check_node_availability_for_in_message(
            inquired_in_message_ids={"asked"},
            found_in_message_dict={"asked": asked},
            node_id_to_online_until={2: now - silent},
            current_time=now,
        )
        return found

    assert lost(300.0) == {}
    assert set(lost(state.SILENCE + 1.0)) == {"asked"}
    assert sql_corestate.OBJECT_PUSH_SESSION_TTL_SECONDS > 300


def test_a_node_that_was_silent_is_online_again_without_a_new_activation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator takes a new activation for a restart, and sends again what the node still has."""
    made = state.SparingLinkState(str(tmp_path / "superlink.db"), NoOpFederationManager(), InMemoryObjectStore())
    made.initialize()
    node = made.create_node("owner", "owner", b"key", 30.0)
    assert made.activate_node(node, 30.0)
    (active,) = made.get_node_info(node_ids=[node])
    later = time.time() + 300.0
    monkeypatch.setattr(linkstate, "now", lambda: dt.datetime.fromtimestamp(later, tz=dt.UTC))
    (silent,) = made.get_node_info(node_ids=[node])
    assert silent.status == "offline"
    monkeypatch.setattr(time, "time", lambda: later)
    assert made.acknowledge_node_heartbeat(node, 30.0)
    (again,) = made.get_node_info(node_ids=[node])
    assert again.status == "online"
    assert again.last_activated_at == active.last_activated_at
    assert again.online_until == pytest.approx(later + 60.0)
    assert not made.acknowledge_node_heartbeat(node + 1, 30.0)
    assert made.deactivate_node(node)
    assert made.activate_node(node, 30.0)
    assert made.get_node_info(node_ids=[node])[0].last_activated_at != active.last_activated_at


def test_what_was_withdrawn_does_not_stand_before_what_waits(tmp_path: Path) -> None:
    """Flower finds the one, answers with nothing, and a site would be held with a task waiting."""
    store = InMemoryObjectStore()
    made = state.SparingLinkState(str(tmp_path / "superlink.db"), NoOpFederationManager(), store)
    made.initialize()
    node = made.create_node("owner", "owner", b"key", 30.0)
    assert made.activate_node(node, 30.0)
    run = made.create_run(None, None, "hash", {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
    session = made.start_session(run)
    for number, name in enumerate(("1" * 64, "2" * 64)):
        about = Metadata(run, name, SUPERLINK_NODE_ID, node, "", "x", time.time() - 10.0 + number, 60.0, "train")
        message = make_message(metadata=about, content=RecordDict())
        assert made.store_message_and_object_tree(message, ObjectTree(object_id=name), session)[0]
    store.delete("1" * 64)
    assert [one.metadata.message_id for one in made.get_message_ins(node, 1)] == ["2" * 64]


def test_a_part_that_is_sent_again_because_the_answer_was_lost_is_taken(
    tmp_path: Path, store: FileObjectStore, weights: Path
) -> None:
    """Flower refuses it, and the supernode then gives the whole message up."""
    made = state.SparingLinkState(str(tmp_path / "superlink.db"), NoOpFederationManager(), store)
    made.initialize()
    tree, all_parts = parts(weights)
    store.preregister(1, tree)
    first, second, *_ = all_parts
    store.put(first, all_parts[first])
    assert made.store_object(1, "a session that has ended", first, all_parts[first])
    assert not made.store_object(1, "a session that has ended", second, all_parts[second])
