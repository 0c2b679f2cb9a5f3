"""Requests that came online and wait for the coordinator: one file STATE/requests/NAME.json for each.

Rules:

- Only a request with the proof of an invitation's token is written, at most one for each invited site: however many
  come, the disk does not fill.
- What waits is never overwritten by a request of another key (FNU-119).
- Who has no proof leaves no line in the audit chain either, but a count in the log, once a minute at most.
- The answer to a stranger is always the same.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from pathlib import Path

from federation import files
from federation.enrollment import Request, fingerprint
from federation.errors import Code, FednnunetError
from federation.study import SITE_NAME
from orchestrator.enrollment.invitations import Invitations
from orchestrator.enrollment.record import record
from orchestrator.enrollment.registry import Registry, check_name

log = logging.getLogger("fednnunet.enrollment")

_STATUS = {
    Code.REQUEST_INVALID: 400,
    Code.INVITATION_UNKNOWN: 403,
    Code.SITE_TAKEN: 409,
    Code.REQUEST_WAITING: 409,
    Code.INVITATION_EXPIRED: 410,
    Code.INVITATION_USED: 410,
}
_STRANGERS = (Code.REQUEST_INVALID, Code.INVITATION_UNKNOWN)


class Waiting:
    """The requests that wait.

    Parameters
    ----------
    state : Path
        The orchestrator's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._state, self._folder = state, state / "requests"
        self._lock = threading.Lock()
        self._recorded: set[tuple[str, int]] = set()
        self._refused, self._said = 0, 0.0

    def receive(self, body: bytes) -> tuple[int, bytes]:
        """Take one request that came over the network; the HTTP status and what to answer. Never raises."""
        with self._lock:
            try:
                self._take(body)
            except FednnunetError as error:
                number = error.code.number
                if error.code in _STRANGERS:
                    self._count()
                return _STATUS.get(error.code, 503), json.dumps({"code": number}).encode()
            except OSError as error:
                log.warning("a request could not be kept: %s", error.strerror)
                return 503, json.dumps({"code": Code.ENROLLMENT_REFUSED.number}).encode()
        return 202, b'{"waiting":true}'

    def _take(self, body: bytes) -> None:
        request = Request.read(body)
        if request.invitation is None:
            raise FednnunetError(Code.REQUEST_INVALID, "a renewal goes by file")
        try:
            given = Invitations(self._state).check(request)
            Registry(self._state).check_free(request.site, request.public_key.encode())
            if not self._put(request):
                return
        except FednnunetError as error:
            if error.code not in _STRANGERS and (request.site, error.code.number) not in self._recorded:
                self._recorded.add((request.site, error.code.number))
                record(self._state, "request refused", site=request.site, code=error.code.number, way="online")
            raise
        record(self._state, "request", site=request.site, key=request.fingerprint, invitation=given.id, way="online")

    def _put(self, request: Request) -> bool:
        """Write it; False when it lay there already."""
        path = self._folder / f"{check_name(request.site)}.json"
        try:
            files.write_new(path, request.file(), 0o600)
        except FileExistsError:
            if self.read(request.site).public_key != request.public_key:
                raise FednnunetError(Code.REQUEST_WAITING, request.site) from None
            return False
        return True

    def _count(self) -> None:
        self._refused += 1
        if time.monotonic() - self._said > 60:
            log.warning("%d requests without a proof were refused", self._refused)
            self._refused, self._said = 0, time.monotonic()

    def all(self) -> list[Request]:
        """What waits, in the order of names."""
        names = sorted(path.stem for path in self._folder.glob("*.json") if re.fullmatch(SITE_NAME, path.stem))
        return [self.read(name) for name in names]

    def has(self, name: str) -> bool:
        """Whether a request of this site waits."""
        return re.fullmatch(SITE_NAME, name) is not None and (self._folder / f"{name}.json").is_file()

    def read(self, name: str) -> Request:
        """The request of a site; raises FNU-123 when none waits, FNU-118 when it was changed."""
        path = self._folder / f"{check_name(name)}.json"
        try:
            return Request.read(path.read_bytes())
        except FileNotFoundError as error:
            raise FednnunetError(
                Code.SITE_UNKNOWN, f"no request of {name} waits", "`fednnunet site requests` lists those that do."
            ) from error

    def remove(self, name: str) -> bool:
        """Take a request away; whether there was one."""
        path = self._folder / f"{check_name(name)}.json"
        there = path.is_file()
        path.unlink(missing_ok=True)
        return there


def describe(request: Request) -> str:
    """A request in one line: site, words and digits of its key."""
    return f"{request.site}\t{fingerprint(request.public_key.encode())}\t{request.made_at}"
