"""One exchange with the sites: send a task to each, collect the answers, send again, keep the deadline.

Rules:

- A task is signed each time it is sent, an answer is opened with its site's key (orchestrator.signatures).
- An answer counts when the journal says so: it is fetched to a file, checked (orchestrator.admission), recorded.
- One look asks for all outstanding answers at once; each answer is then fetched by itself, chunk by chunk.
- A site that restarts has lost what it was sent, and the rest of an answer that it was sending: Flower shows a new
  activation, and the task is sent again. The site does it once all the same (its spool is keyed by the task).
- A site that fails says so with a code; it is asked again only where its code says that this may help.
- At the deadline the exchange ends with whoever answered. Who is missing, and why, is part of the outcome. What was not
  answered is withdrawn: a site on a slow line is not kept from the next exchange by the rest of this one.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from federation import files, logs
from federation.errors import Code, FednnunetError
from federation.flower.runner import SITE_LOST, Node
from federation.flower.transfer import Ready, Received, file_array
from federation.patience import pause
from federation.readable import printable
from federation.tasks import Result, Task, parse_result
from orchestrator.admission import check_answer
from orchestrator.journal import Journal
from orchestrator.signatures import Signatures

log = logging.getLogger("fednnunet.rounds")

MAX_ATTEMPTS = 5
LOOK_AT_NODES = 1.0  # seconds between two looks at who is online
RARELY = 60.0
"""Seconds at most until a site that loses what it is sent, again and again, is sent it once more."""
FETCHES = 32
"""Answers that are fetched at a time; one that comes over a slow line takes its place for as long as it is uploaded."""
GRACE = 5.0
"""Seconds after the deadline for which Flower keeps a task: what is answered later is refused where it arrives."""
PATIENCE = 0.01
"""A look for answers comes late by at most this share of what has been waited for one."""
LAST_WORDS = 20.0
"""Seconds that an exchange which cannot succeed any more still listens, so that a person reads the faults of all sites
at once and not of the quickest alone."""


class Carrier(Protocol):
    """What an exchange needs of the network; federation.flower.runner.Run is the real one."""

    def check(self) -> None:
        """Raise when the run is over."""

    def nodes(self) -> dict[str, Node]:
        """Registered sites by name."""

    def push(self, node: Node, group: str, body: str, weights: Any, ttl: float) -> str:
        """Send; returns an id."""

    def ready(self, message_ids: list[str]) -> list[Ready]:
        """Answers that wait."""

    def take(self, ready: Ready, weights: Path, max_weights: int, give_up: Callable[[], bool]) -> Received:
        """Fetch an answer."""

    def withdraw(self, message_id: str) -> None:
        """Take a task back."""


@dataclass(frozen=True)
class Errand:
    """A task for one site and the weights file that goes with it."""

    task: Task
    weights: Path | None = None


@dataclass
class Outcome:
    """Who answered, and why the others did not."""

    answers: dict[str, Result] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


@dataclass
class _Outstanding:
    message_id: str
    nonce: str
    errand: Errand
    activated_at: str
    cut_off: threading.Event = field(default_factory=threading.Event)
    """The site has started anew: what has not come of its answer will not come."""


Accept = Callable[[Task, Result, Path], dict[str, Any]]
"""Checks an answer and its weights file before they count; returns fields for the journal's line."""


class Exchange:
    """Exchanges of one study over one run.

    Parameters
    ----------
    carrier : Carrier
        The network.
    journal : Journal
        The study's journal.
    signatures : Signatures
        Signs what is sent and opens what comes back.
    poll : float
        Seconds between two looks for answers, while one is expected.
    """

    def __init__(self, carrier: Carrier, journal: Journal, signatures: Signatures, poll: float) -> None:
        self._carrier, self._journal, self._signatures, self._poll = carrier, journal, signatures, poll
        self._arrays: dict[Path, Any] = {}

    def await_sites(self, sites: Iterable[str], deadline: float) -> None:
        """Wait until every site is online; raises FNU-501 that names the absent ones.

        Parameters
        ----------
        sites : iterable of str
            Names.
        deadline : float
            Seconds from now.
        """
        end = time.monotonic() + deadline
        reported: set[str] = set()
        while True:
            self._check()
            nodes = self._carrier.nodes()
            absent = [site for site in sites if site not in nodes or not nodes[site].online]
            for site in sorted(set(sites) - set(absent) - reported):
                self._journal.write("online", site=site)
                reported.add(site)
            if not absent:
                return
            if time.monotonic() > end:
                raise FednnunetError(
                    Code.SITE_NEVER_APPEARED, f"not online within {deadline:.0f} s: {', '.join(sorted(absent))}"
                )
            time.sleep(self._poll)

    def ask(
        self,
        sites: Iterable[str],
        errand: Callable[[str, bool], Errand],
        accept: Accept,
        *,
        needed: int,
        deadline: float,
        max_weights: int = 0,
    ) -> Outcome:
        """Ask every site and collect the answers.

        Parameters
        ----------
        sites : iterable of str
            Who is asked.
        errand : callable
            ``errand(site, full)``: the task for a site; `full` asks for weights that need no base.
        accept : callable
            Checks an answer and its weights file; raises FNU-505 to refuse it.
        needed : int
            With fewer the exchange cannot succeed: it ends once all have answered, or after `LAST_WORDS`.
        deadline : float
            Seconds from now.
        max_weights : int
            Most bytes of weights to take in an answer.
        """
        everyone = sorted(sites)
        outcome = Outcome()
        for site in everyone:
            recorded = self._journal.answer(errand(site, False).task)
            if recorded is not None:
                outcome.answers[site] = recorded
        outstanding: dict[str, _Outstanding] = {}
        fetching: dict[concurrent.futures.Future[tuple[Received, Result | None]], tuple[str, _Outstanding]] = {}
        full: set[str] = set()
        not_before: dict[str, float] = {}
        lost: Counter[str] = Counter()
        reasons: dict[str, str] = {}
        nodes: dict[str, Node] = {}
        end, looked, expired = time.monotonic() + deadline, 0.0, threading.Event()
        hopeless, heard = 0.0, time.monotonic()

        def open_sites() -> list[str]:
            return [site for site in everyone if site not in outcome.answers and site not in outcome.missing]

        with concurrent.futures.ThreadPoolExecutor(FETCHES, "fetch") as pool:
            try:
                while open_sites():
                    self._check()
                    now = time.monotonic()
                    if now > end:
                        break
                    if len(everyone) - len(outcome.missing) < needed:
                        hopeless = hopeless or now
                        if not fetching and (not outstanding or now - hopeless > LAST_WORDS):
                            break
                    if now - looked >= LOOK_AT_NODES:
                        nodes, looked = self._carrier.nodes(), now
                        outcome.missing.update(self._not_registered(open_sites()))
                    answering = dict(fetching.values())
                    for site in open_sites():
                        node, sent = nodes.get(site), outstanding.get(site)
                        if site in answering:
                            if node is not None and node.activated_at != answering[site].activated_at:
                                answering[site].cut_off.set()
                            continue
                        if node is None or not node.online:
                            reasons[site] = "offline"
                            continue
                        if sent is not None and sent.activated_at == node.activated_at:
                            reasons[site] = "no answer before the deadline"
                            continue
                        if now < not_before.get(site, 0.0):
                            continue
                        again = "" if sent is None else "the site restarted"
                        outstanding[site] = self._send(node, errand(site, site in full), end - now + GRACE, again)
                        if sent is not None:
                            self._carrier.withdraw(sent.message_id)
                        heard = time.monotonic()
                        reasons[site] = "no answer before the deadline"
                    waiting = {sent.message_id: site for site, sent in outstanding.items()}
                    for ready in self._carrier.ready(list(waiting)) if waiting else []:
                        site = waiting.get(ready.reply_to, "")
                        if not site:
                            continue
                        sent = outstanding.pop(site)
                        future = pool.submit(self._fetch, ready, sent, max_weights, expired)
                        fetching[future] = (site, sent)
                    now = time.monotonic()
                    wait = min(pause(self._poll, now - heard, PATIENCE), max(0.0, end - now))
                    if not fetching:
                        time.sleep(wait)
                    done = concurrent.futures.wait(fetching, wait, concurrent.futures.FIRST_COMPLETED).done
                    for future in done:
                        heard = time.monotonic()
                        site, sent = fetching.pop(future)
                        verdict = self._settle(site, sent, future, accept, outcome)
                        if verdict == "full":
                            full.add(site)
                        elif verdict == "again":
                            not_before[site] = time.monotonic() + min(LOOK_AT_NODES * 2 ** lost[site], RARELY)
                            lost[site] = min(lost[site] + 1, 16)
            finally:
                expired.set()
        for sent in outstanding.values():
            self._carrier.withdraw(sent.message_id)
        for _, sent in fetching.values():  # an answer that was whole just as the time was over
            self._incoming(sent.errand.task).unlink(missing_ok=True)
        for site in open_sites():
            outcome.missing[site] = reasons.get(site, "offline")
        return outcome

    def _check(self) -> None:
        """Raise when the run is over, or when somebody wants the study to stop."""
        self._carrier.check()
        self._journal.check()

    def _not_registered(self, sites: Iterable[str]) -> dict[str, str]:
        """The sites that must not be asked, and why."""
        found = {}
        for site in sites:
            try:
                self._signatures.check_site(site)
            except FednnunetError as error:
                found[site] = error.scrubbed()
        return found

    def _send(self, node: Node, errand: Errand, ttl: float, why: str) -> _Outstanding:
        task, weights = errand.task, None
        if errand.weights is not None:
            if errand.weights not in self._arrays:
                self._arrays = {errand.weights: file_array(errand.weights)} | (
                    {path: array for path, array in self._arrays.items() if path.exists()}
                )
            weights = self._arrays[errand.weights]
        body, nonce = self._signatures.sign_task(task.model_dump_json())
        message_id = self._carrier.push(node, task.key, body, weights, ttl)
        size = len(body) + (task.weights.nbytes if task.weights else 0)
        self._journal.write(
            "asked", site=task.site, key=task.key, attempt=task.attempt, nbytes=size, **({"why": why} if why else {})
        )
        return _Outstanding(message_id, nonce, errand, node.activated_at)

    def _incoming(self, task: Task) -> Path:
        return self._journal.folder / "incoming" / f"{task.key}-{task.site}-{task.attempt}.safetensors"

    def _fetch(
        self, ready: Ready, sent: _Outstanding, max_weights: int, expired: threading.Event
    ) -> tuple[Received, Result | None]:
        task = sent.errand.task

        def give_up() -> bool:
            return expired.is_set() or sent.cut_off.is_set()

        received = self._carrier.take(ready, self._incoming(task), max_weights, give_up)
        if received.error_code is not None:
            return received, None
        return received, parse_result(self._signatures.open_answer(task.site, received.body, sent.nonce))

    def _settle(
        self,
        site: str,
        sent: _Outstanding,
        future: concurrent.futures.Future[tuple[Received, Result | None]],
        accept: Accept,
        outcome: Outcome,
    ) -> str:
        """Record one fetched answer; returns "" when the site is settled, "again" or "full" to ask again."""
        task = sent.errand.task
        incoming = self._incoming(task)
        result: Result | None = None
        fields: dict[str, Any] = {}
        try:
            try:
                received, result = future.result()
                if received.error_code in SITE_LOST:
                    with logs.about(**task.subject):
                        log.info("lost (%s), it is sent again", printable(received.error_reason or ""))
                    return "again"
                if result is None:
                    reason = printable(received.error_reason or f"Flower's error {received.error_code}")
                    self._journal.write("failed_answer", site=site, key=task.key, attempt=task.attempt, reason=reason)
                    outcome.missing[site] = reason
                    return ""
                check_answer(task, result, received.has_weights)
                if result.failure is None:
                    fields = accept(task, result, incoming)
            except FednnunetError as error:
                if error.code is Code.DISK_FULL:  # this machine's fault, not the site's
                    raise
                self._refuse(task, result, incoming, error)
                outcome.missing[site] = printable(str(error))
                return ""
            if result.failure is not None:
                self._journal.write(
                    "failed_answer",
                    site=site,
                    key=task.key,
                    attempt=task.attempt,
                    reason=result.failure.describe(),
                )
                if result.failure.retry and task.attempt < MAX_ATTEMPTS:
                    return "full"
                outcome.missing[site] = result.failure.describe()
                return ""
            size = len(received.body)
            if result.weights is not None:
                size += result.weights.nbytes
                target = self._journal.update_file(task)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(incoming, target)
                files.sync_directory(target.parent)
            self._journal.record(task, result, nbytes=size, **fields)
            outcome.answers[site] = result
            return ""
        finally:
            incoming.unlink(missing_ok=True)

    def _refuse(self, task: Task, result: Result | None, incoming: Path, error: FednnunetError) -> None:
        kept = self._journal.quarantine(task)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if result is not None:
            files.write_bytes(kept.with_suffix(".json"), result.model_dump_json(indent=1).encode())
        if incoming.exists():
            os.replace(incoming, kept.with_suffix(".safetensors"))
        with logs.about(**task.subject):
            log.warning("%s", error)
        self._journal.write("refused", site=task.site, key=task.key, attempt=task.attempt, reason=printable(str(error)))
