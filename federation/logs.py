"""What our processes say, as events: one form in the log files, two on the screen (for people, for machines).

Rules:

- Every process writes its log as text lines: time (UTC), level, logger, in braces what it is about (`about`: study,
  site, fold, round, task), message. Whatever else it prints, nnU-Net's lines and tracebacks among it, goes to the
  same file as it is.
- The supervisor follows these files and shows each event: a line for people, or one line of JSON for machines. A
  traceback belongs to its event, and so do the three lines of a numbered error.
- What is shown to people is printable: a message can hold what another side has sent.
- A log file that has grown to `LIMIT` is copied to `NAME.1` and emptied: its writers append, and go on.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime as dt
import io
import json
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from federation.errors import FednnunetError
from federation.readable import printable

Format = Literal["rich", "json"]
LIMIT = 20 * 2**20
_LINE = re.compile(
    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (DEBUG|INFO|WARNING|ERROR|CRITICAL) (\S+)"
    r"(?: \{([a-z]+=[^ {}]+(?: [a-z]+=[^ {}]+)*)\})?: (.*)",
    re.DOTALL,
)
_subject: contextvars.ContextVar[Mapping[str, str | int]] = contextvars.ContextVar("subject")
_COLOURS = {"DEBUG": "dim", "INFO": "green", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold red"}
_errors = ""
_TRACEBACK = "Traceback (most recent call last):"
_CHAIN = ("The above exception was the direct cause", "During handling of the above exception")


@dataclass
class Event:
    """Something that a process has said.

    Attributes
    ----------
    time : str
        ISO 8601, UTC; when it was read, for what came without a time.
    level : str
        As logging names it.
    process : str
        supervisor, supernode, link, worker, superlink, coordinator, metrics or predict.
    logger : str
        Who said it; `output` for what was printed.
    message : str
        One line, or several for a traceback.
    fields : dict
        More of it, for machines.
    """

    time: str
    level: str
    process: str
    logger: str
    message: str
    fields: dict[str, str | int] = field(default_factory=dict)

    def as_json(self) -> str:
        """One line."""
        value = {
            "time": self.time,
            "level": self.level,
            "process": self.process,
            "logger": self.logger,
            "message": self.message,
            **self.fields,
        }
        return json.dumps(value)


def now() -> str:
    """The time as events have it."""
    return stamp(time.time())


def stamp(seconds: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC, with milliseconds."""
    moment = dt.datetime.fromtimestamp(seconds, dt.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


@contextlib.contextmanager
def about(**fields: str | int | None) -> Iterator[None]:
    """What this thread logs in this block is about this study, site, fold, round, task; None says nothing.

    Values hold no blank and no brace: ids, names, numbers and keys of tasks; never a case, never a path.
    """
    told = {key: value for key, value in fields.items() if value is not None}
    token = _subject.set({**_subject.get({}), **told})
    try:
        yield
    finally:
        _subject.reset(token)


class _Lines(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        told = " ".join(f"{key}={value}" for key, value in _subject.get({}).items())
        record.subject = f" {{{told}}}" if told else ""
        return super().formatMessage(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802 - logging's name
        return stamp(record.created)


def configure() -> None:
    """A process that a supervisor follows: text lines to stderr."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.INFO)  # Flower's logger lets its debug lines through, several each second
    handler.addFilter(lambda record: bool(record.getMessage()))  # Flower's empty lines
    handler.setFormatter(_Lines("%(asctime)s %(levelname)s %(name)s%(subject)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for name in ("alembic", "httpx"):  # a line for each step of a new database, and for each request
        logging.getLogger(name).setLevel(logging.WARNING)


class Screen:
    """Shows events on a stream: for people with Rich, or as lines of JSON."""

    def __init__(self, form: Format, stream: IO[str] | None = None) -> None:
        from rich.console import Console

        class Lasting(Console):
            def on_broken_pipe(self) -> None:
                """Rich would end the process."""
                raise BrokenPipeError

        self.form = form
        self._stream = stream or sys.stdout
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")
        self._console = Lasting(file=self._stream, highlight=False)

    def show(self, event: Event) -> None:
        """Show one event; a reader that has gone is no reason to stop."""
        try:
            if self.form == "json":
                self._stream.write(event.as_json() + "\n")
                self._stream.flush()
                return
            from rich.text import Text

            line = Text.assemble(
                (event.time[11:19], "dim"),
                " ",
                (f"{event.process:<11}", "cyan"),
                " ",
                (f"{event.level:<7}", _COLOURS.get(event.level, "")),
                " ",
                "\n".join(printable(line.expandtabs(), len(line) * 8) for line in event.message.split("\n")),
            )
            if (about := " ".join(str(event.fields[key]) for key in ("site", "task") if key in event.fields)) != "":
                line.append(f"  {about}", "dim")
            self._console.print(line, soft_wrap=True)
        except (OSError, ValueError):
            return


def errors_as(form: str) -> None:
    """From here on this process shows a numbered error (federation.console) as one line of JSON where form is json."""
    global _errors
    _errors = form


def error_line(error: FednnunetError) -> str | None:
    """A numbered error as one line of JSON, where `errors_as` asked for it; else None."""
    if _errors != "json":
        return None
    more: dict[str, str | int] = {"code": error.code.number, "found": error.found, "advice": error.advice}
    return Event(now(), "ERROR", "supervisor", "fednnunet", error.scrubbed(), more).as_json()


class _ToScreen(logging.Handler):
    def __init__(self, screen: Screen, process: str) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter())  # the message alone, and a traceback
        self._screen, self._process = screen, process

    def emit(self, record: logging.LogRecord) -> None:
        event = Event(stamp(record.created), record.levelname, self._process, record.name, self.format(record))
        self._screen.show(event)


def lead(form: Format, process: str = "supervisor") -> Screen:
    """The process that a person or a cluster watches: what it logs and its numbered errors are shown as events."""
    errors_as(form)
    screen = Screen(form)
    logging.basicConfig(level=logging.INFO, handlers=[_ToScreen(screen, process)])
    return screen


class Follower:
    """Reads what a process appends to its log file, as events.

    Parameters
    ----------
    path : Path
        The log file; what lies in it already is not read.
    process : str
        Whose it is.
    """

    def __init__(self, path: Path, process: str) -> None:
        self._path, self._process = path, process
        self._position = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._open: Event | None = None

    def read(self, last: bool = False) -> Iterator[Event]:
        """Events that are new; `last`: also one that may not be complete yet."""
        data = self._new()
        while last and (more := self._new()):
            data += more
        lines, self._rest = (self._rest + data).split(b"\n"), b""
        if last:
            lines = [line for line in lines if line]
        else:
            self._rest = lines.pop()
        for line in lines:
            yield from self._take(line.decode(errors="replace").rstrip("\r"))
        if self._open is not None and (last or not data):
            yield self._close()
        self._trim()

    def _new(self) -> bytes:
        try:
            with open(self._path, "rb") as stream:
                if os.fstat(stream.fileno()).st_size < self._position:
                    self._position = 0
                stream.seek(self._position)
                data = stream.read(4 * 2**20)
        except OSError:
            return b""
        self._position += len(data)
        return data

    def _take(self, line: str) -> Iterator[Event]:
        if not line.strip():
            return
        match = _LINE.fullmatch(line)
        if line == _TRACEBACK and self._open is not None and self._open.level in ("DEBUG", "INFO"):
            yield self._close()
        if match is None and self._open is not None and self._belongs(line):
            self._open.message += "\n" + line
            return
        if self._open is not None:
            yield self._close()
        if match is not None:
            fields: dict[str, str | int] = {}
            for part in (match[4] or "").split():
                key, _, value = part.partition("=")
                fields[key] = int(value) if key == "round" and value.isdigit() else value
            self._open = Event(match[1], match[2], self._process, match[3], match[5], fields)
        elif line == _TRACEBACK:
            self._open = Event(now(), "ERROR", self._process, "output", line)
        elif (numbered := re.match(r"FNU-(\d{3}) ", line)) is not None:
            self._open = Event(now(), "ERROR", self._process, "output", line, {"code": int(numbered[1])})
        else:
            yield Event(now(), "INFO", self._process, "output", line)

    def _belongs(self, line: str) -> bool:
        """Whether a line that is no event of its own goes on with the one that is open."""
        assert self._open is not None
        said = self._open.message.splitlines()
        if "code" in self._open.fields:
            return not said[-1].startswith("What to do: ")
        if line.startswith((" ", "\t", _TRACEBACK, *_CHAIN)):
            return True
        return _TRACEBACK in said and said[-1].startswith((" ", _TRACEBACK))

    def _close(self) -> Event:
        event, self._open = self._open, None
        assert event is not None
        return event

    def _trim(self) -> None:
        if self._position < LIMIT:
            return
        earlier = self._path.with_name(self._path.name + ".1")
        try:
            shutil.copyfile(self._path, earlier)
        except OSError:  # a full disk: the room is needed more than the old lines
            earlier.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.truncate(self._path, 0)
            self._position = 0


Shown = Callable[[Event], None]
