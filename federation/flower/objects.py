"""Flower's store of objects at the SuperLink, with the large ones in files: a chunk of weights is no row of a database.

In Flower's own, each chunk (5 MiB) goes through SQLite twice, into its log and from there into its file, while no other
writer may write. Here the row says that the object lies in a file, and how long it is.

Rules:

- The file is there before the row says so, and goes before the row goes, in the same transaction.
- A file that is missing or has another length (the machine lost its power) counts as an object that is gone: the
  message is sent again. Nothing is flushed to the disk for it.
- Files without a row are removed at the start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import Any

import flwr.supercore.object_store.object_store_factory as factory
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from flwr.supercore.state.schema.objectstore_models import StoredObject
from sqlalchemy import func, select

SMALL = 64 * 1024
"""Bytes up to which an object stays in the database."""
_MARK = b"\0in a file, bytes: "


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

    def delete(self, object_id: str) -> None:
        """Forget an object, and those of its parts that no other has."""
        with self._mutation_session():
            super().delete(object_id)
            if object_id not in self:
                (self._folder / object_id).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all."""
        super().clear()
        for path in self._folder.iterdir():
            path.unlink(missing_ok=True)


def use() -> None:
    """From here on a SuperLink in this process keeps its objects so."""
    factory.SqlObjectStore = FileObjectStore  # type: ignore[misc]
