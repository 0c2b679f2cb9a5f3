"""A push whose parts are refused for a while: pushed again, and given up in the end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from federation.flower.transfer import TRIES, Transfer, Unavailable, content


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
