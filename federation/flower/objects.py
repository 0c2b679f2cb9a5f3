"""Flower's store of objects at the SuperLink, with the large ones in files: a chunk of weights is no row of a database.

In Flower's own, each chunk (5 MiB) goes through SQLite twice, into its log and from there into its file, while no other
writer may write. Here the row says that the object lies in a file, and how long it is.

Rules:

- The file is there before the row says so, and goes before the row goes, in the same transaction.
- A file that is missing or has another length (the machine lost its power) counts as an object that is gone: the
  message is sent again, and it with it. Nothing is flushed to the disk for it.
- Files without a row are removed at the start.

Flower announces a message object by object and removes it so, with four statements for each, while no other writer may
write; and reads its tree by two for each. Here all objects of a message take one statement of each kind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flwr.supercore.object_store.object_store_factory as factory
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id, is_valid_sha256_hash, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import ObjectChild, RunObject, StoredObject
from flwr.supercore.utils import uint64_to_int64
from sqlalchemy import delete, func, insert, literal, select, update

SMALL = 64 * 1024
"""Bytes up to which an object stays in the database."""
_MARK = b"\0in a file, bytes: "
_MARKED = len(_MARK) + 20
"""Bytes of a row that speaks of a file, at most."""


class FileObjectStore(SqlObjectStore):
    """Flower's store; it answers the same.

    Parameters
    ----------
    database_path : str
        The database; the files lie beside it, in a folder of its name with `-objects`.
    """

    def __init__(self, database_path: str, verify: bool = True) -> None:
        super().__init__(database_path, verify=False)
        self._verify = verify
        self._folder = Path(f"{database_path}-objects").resolve()

    def initialize(self, log_queries: bool = False, **engine: Any) -> list[str]:
        """Open the database; take away files that no row speaks of."""
        tables: list[str] = super().initialize(log_queries, **engine)
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self.session() as session:
            marked = func.substr(StoredObject.content, 1, len(_MARK)) == _MARK
            known = set(session.scalars(select(StoredObject.object_id).where(marked)))
        for path in self._folder.iterdir():
            if path.name not in known:
                path.unlink()
        return tables

    def preregister(self, run_id: int, object_tree: ObjectTree) -> list[str]:
        """Announce a message's objects; returns those that are missing, raises what Flower's own raises."""
        children: dict[str, list[str]] = {}
        for node in iterate_object_tree(object_tree):
            name, below = node.object_id, [child.object_id for child in node.children]
            if not is_valid_sha256_hash(name):
                raise ValueError(f"Invalid object ID format: {name}")
            if len(below) != len(set(below)):
                raise ValueError(f"Object {name} has duplicate children.")
            if set(children.setdefault(name, below)) != set(below):
                raise ValueError(f"Object {name} was preregistered with different children.")
        run = uint64_to_int64(run_id)
        with self._mutation_session() as session:
            head = func.substr(StoredObject.content, 1, _MARKED)
            rows = session.execute(
                select(StoredObject.object_id, StoredObject.is_available, head).where(
                    StoredObject.object_id.in_(children)
                )
            ).all()
            known = {str(name): bool(available) for name, available, _ in rows}
            lost = [str(name) for name, available, content in rows if available and self._is_lost(name, content)]
            if lost:  # whoever sends this message is asked for them
                known |= dict.fromkeys(lost, False)
                session.execute(
                    update(StoredObject).where(StoredObject.object_id.in_(lost)).values(is_available=0, content=b"")
                )
            there = defaultdict(set)
            for parent, child in session.execute(
                select(ObjectChild.parent_id, ObjectChild.child_id).where(ObjectChild.parent_id.in_(known))
            ):
                there[parent].add(child)
            for name in known:
                if there[name] != set(children[name]):
                    raise ValueError(f"Object {name} was preregistered with different children.")
            new = [name for name in children if name not in known]
            if new:
                session.execute(
                    insert(StoredObject),
                    [{"object_id": name, "content": b"", "is_available": 0, "ref_count": 0} for name in new],
                )
            links = [(name, child) for name in new for child in children[name]]
            if links:
                session.execute(insert(ObjectChild), [{"parent_id": name, "child_id": child} for name, child in links])
            for times, names in _by_times(child for _, child in links):
                session.execute(
                    update(StoredObject)
                    .where(StoredObject.object_id.in_(names))
                    .values(ref_count=StoredObject.ref_count + times)
                )
            mapped: Any = self.dialect_insert(RunObject)
            session.execute(mapped.on_conflict_do_nothing(), [{"run_id": run, "object_id": name} for name in children])
        return [name for name in children if not known.get(name)]

    def get_object_tree(self, object_id: str) -> ObjectTree:
        """A message's objects, by their ids; raises what Flower's own raises."""
        below = select(literal(object_id).label("name")).cte("below", recursive=True)
        below = below.union(select(ObjectChild.child_id).where(ObjectChild.parent_id == below.c.name))
        links = select(ObjectChild.parent_id, ObjectChild.child_id).join(below, ObjectChild.parent_id == below.c.name)
        with self.session() as session:
            if session.scalar(select(StoredObject.object_id).where(StoredObject.object_id == object_id)) is None:
                raise NoObjectInStoreError(f"Object {object_id} was not pre-registered.")
            children = defaultdict(list)
            for parent, child in session.execute(links):
                children[parent].append(child)

        def tree(name: str) -> ObjectTree:
            return ObjectTree(object_id=name, children=[tree(child) for child in children[name]])

        return tree(object_id)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep an object that was announced; raises what Flower's own raises."""
        if self._verify:
            if get_object_id(object_content) != object_id:
                raise ValueError(f"Object ID {object_id} does not match content hash")
            validate_object_content(content=object_content)
        if len(object_content) <= SMALL:
            super().put(object_id, object_content)
            return
        path = self._folder / object_id
        temporary = path.with_name(f"{object_id}.{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(object_content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        try:
            super().put(object_id, _MARK + str(len(object_content)).encode())
        except Exception:
            if object_id not in self:
                path.unlink(missing_ok=True)
            raise

    def get(self, object_id: str) -> bytes | None:
        """An object; empty where it was announced and has not come, None where it is not known or gone."""
        content: bytes | None = super().get(object_id)
        if content is None or not content.startswith(_MARK):
            return content
        found = b""
        with contextlib.suppress(OSError):
            found = (self._folder / object_id).read_bytes()
        return found if len(found) == int(content.removeprefix(_MARK)) else None

    def _is_lost(self, object_id: str, content: bytes) -> bool:
        """Whether a row speaks of a file that is not there, or not whole."""
        if not content.startswith(_MARK):
            return False
        try:
            return (self._folder / object_id).stat().st_size != int(content.removeprefix(_MARK))
        except OSError:
            return True

    def delete(self, object_id: str) -> None:
        """Forget an object, and those of its parts that no other has."""
        with self._mutation_session() as session:
            level = [object_id]
            while level:
                unheld = StoredObject.object_id.in_(level), StoredObject.ref_count == 0
                gone = list(session.scalars(select(StoredObject.object_id).where(*unheld)))
                if not gone:
                    break
                below = list(session.scalars(select(ObjectChild.child_id).where(ObjectChild.parent_id.in_(gone))))
                session.execute(delete(StoredObject).where(StoredObject.object_id.in_(gone)))
                for times, names in _by_times(below):
                    session.execute(
                        update(StoredObject)
                        .where(StoredObject.object_id.in_(names), StoredObject.ref_count >= times)
                        .values(ref_count=StoredObject.ref_count - times)
                    )
                for name in gone:
                    (self._folder / str(name)).unlink(missing_ok=True)
                level = list(dict.fromkeys(below))

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)


def _by_times(names: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Names by how often each occurs."""
    found = defaultdict(list)
    for name, times in Counter(names).items():
        found[times].append(name)
    yield from found.items()


def use() -> None:
    """From here on a SuperLink in this process keeps its objects so."""
    factory.SqlObjectStore = FileObjectStore  # type: ignore[misc]
