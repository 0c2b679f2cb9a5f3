"""Shakes every Python process of a test run: what is in no order comes in any order. For `make test-shaken`.

A test that assumes an order of threads passes for months on one machine, and fails on a slower one. Here

- a thread, and each piece of work of a thread pool, begins late: one in two by up to `SHAKE` seconds (0.05), one in
  twenty by up to ten times that;
- a folder is listed in another order each time.

Python imports this file by its name when it starts, in the tests' own process and in all that they start.
"""

from __future__ import annotations

import concurrent.futures.thread
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

MOST = float(os.environ.get("SHAKE", "0.05"))
_chance, _sleep, _listdir, _scandir = random.Random(), time.sleep, os.listdir, os.scandir
_chance.seed(os.urandom(8))


def late(run: Callable[..., Any]) -> Callable[..., Any]:
    """The same, a little later; a simulated `time.sleep` of a test is not meant."""

    def begins(*arguments: Any, **options: Any) -> Any:
        throw = _chance.random()
        if throw < 0.55:
            _sleep(_chance.random() * MOST * (1 if throw < 0.5 else 10))
        return run(*arguments, **options)

    return begins


def listdir(*arguments: Any) -> list[Any]:
    found = _listdir(*arguments)
    _chance.shuffle(found)
    return found


class Scan:
    """What os.scandir gives; entries are read when the first is asked for."""

    def __init__(self, *arguments: Any) -> None:
        self._entries = _scandir(*arguments)
        self._shuffled: Iterator[Any] | None = None

    def __enter__(self) -> Scan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Scan:
        return self

    def __next__(self) -> Any:
        if self._shuffled is None:
            entries = list(self._entries)
            _chance.shuffle(entries)
            self._shuffled = iter(entries)
        return next(self._shuffled)

    def close(self) -> None:
        self._entries.close()


class ThreadsOfAnyio(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Starlette's work in threads does not go by way of concurrent.futures."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name != "anyio.to_thread":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        assert found is not None
        self._loader, found.loader = found.loader, self
        return found

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        run_sync = module.run_sync

        async def later(run: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
            return await run_sync(late(run), *arguments, **options)

        module.run_sync = later


threading.Thread.run = late(threading.Thread.run)  # type: ignore[method-assign]
concurrent.futures.thread._WorkItem.run = late(concurrent.futures.thread._WorkItem.run)  # type: ignore[attr-defined]
os.listdir, os.scandir = listdir, Scan  # type: ignore[assignment]
sys.meta_path.insert(0, ThreadsOfAnyio())
