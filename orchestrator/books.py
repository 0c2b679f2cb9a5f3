"""Every journal below a state folder, read on from where it was, and who is registered: for metrics and status page."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from federation.audit import Tail
from federation.study import Study
from orchestrator.history import History
from orchestrator.registered import online_until


@dataclass(frozen=True)
class Site:
    """A registered site: its name, and whether its last sign of life holds."""

    name: str
    online: bool
    until: float


class Books:
    """The journals of an orchestrator, and who is registered; may be asked from several threads.

    Parameters
    ----------
    state : Path
        The orchestrator's state folder.
    database : Path
        The SuperLink's database.
    """

    def __init__(self, state: Path, database: Path) -> None:
        self._studies, self._database = state / "studies", database
        self._known: dict[str, tuple[History, Tail]] = {}
        self._one = threading.Lock()

    def by_folder(self) -> dict[str, History]:
        """Every study as it stands now, by the name of its folder (its id)."""
        with self._one:
            for path in sorted(self._studies.glob("*/journal.jsonl")):
                name = path.parent.name
                if name not in self._known:
                    with contextlib.suppress(OSError, ValueError):  # half written, or of another version
                        study = Study.model_validate_json((path.parent / "study.json").read_bytes())
                        self._known[name] = History(study), Tail(path)
            for history, tail in self._known.values():
                for line in tail.lines():
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # `health --ready` names damage
                        history.take(line)
            return {name: history for name, (history, _) in self._known.items()}

    def histories(self) -> list[History]:
        """Every study as it stands now, the newest first."""
        return sorted(self.by_folder().values(), key=lambda history: history.began or "", reverse=True)

    def history(self, study_id: str) -> History | None:
        """One study by its whole id."""
        return next((one for one in self.histories() if one.study.id == study_id), None)

    def folder(self, history: History) -> Path:
        """Where a study lies."""
        return self._studies / history.study.id

    def sites(self) -> list[Site]:
        """Every registered site."""
        now = time.time()
        return [Site(name, until > now, until) for name, until in online_until(self._database).items()]
