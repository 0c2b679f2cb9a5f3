"""The link: takes a task from Flower, lays it into the spool, sends what the outbox holds, writes the ledger.

Rules:

- It sees no data and loads no nnU-Net: what it knows of a task is its body and its weights file.
- A task counts when the coordinator has signed it for this site and it is new (appliance.link.trust), and goes on when
  the hospital's policy allows it (appliance.link.policy). The policy is read anew for every task.
- An answer is signed with the site's key, and names the very message that it answers.
- A task that is asked for again finds its work in progress or its answer in the outbox.
- When a run ends while the worker works, the worker goes on for a short grace: a coordinator that was restarted asks
  for the same task again at once. After the grace the task is cancelled.
- When a run ends and no other asks within that grace, the worker is told to free its device.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from appliance.link import policy
from appliance.link.ledger import Ledger
from appliance.link.policy import Approvals, Policy
from appliance.link.trust import Trust
from appliance.settings import Settings
from appliance.spool import Spool
from federation import files, keypairs, logs, signing
from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.bundle import bundle_hash
from federation.flower.runner import RUN_GRACE, Answer, Asked, Stop, serve_tasks
from federation.flower.transfer import file_array
from federation.tasks import Task

log = logging.getLogger("fednnunet.link")

LOOK = 0.05
HOURS_LOOK = 20.0
MAX_WEIGHTS = 16 * 2**30


class Link:
    """What the link does with one task after the other.

    Parameters
    ----------
    site : str
        The site's name.
    key : keypairs.PrivateKey
        The site's key.
    trust : Trust
        Which tasks are believed.
    policy : callable
        The hospital's policy as it is now.
    approvals : Approvals
        What was said of each study.
    spool : Spool
        The wall to the worker.
    ledger : Ledger
        Where everything that leaves is written down.
    """

    def __init__(
        self,
        site: str,
        key: keypairs.PrivateKey,
        trust: Trust,
        policy: Callable[[], Policy],
        approvals: Approvals,
        spool: Spool,
        ledger: Ledger,
    ) -> None:
        self._site, self._key, self._trust = site, key, trust
        self._policy, self._approvals = policy, approvals
        self._spool, self._ledger = spool, ledger
        self._cancelling: dict[str, threading.Timer] = {}

    def handle(self, asked: Asked, over: threading.Event) -> Answer:
        """Do one task; raises what `Trust.open` and the policy raise, or FNU-409 when the run ended first."""
        task, nonce = self._trust.open(asked.body)
        with logs.about(**task.subject):
            return self._do(task, nonce, asked, over)

    def _do(self, task: Task, nonce: str, asked: Asked, over: threading.Event) -> Answer:
        self._permit(task, over)
        if (timer := self._cancelling.pop(task.study.id + task.key, None)) is not None:
            timer.cancel()
        log.info("%s: asked, attempt %d", task.study.name, task.attempt)
        self._spool.put_task(task, asked.weights)
        self._forget_earlier(task)
        while (result := self._spool.result(task)) is None:
            if over.wait(LOOK):
                timer = threading.Timer(RUN_GRACE, self._spool.cancel, (task,))
                timer.daemon = True
                timer.start()
                self._cancelling[task.study.id + task.key] = timer
                raise FednnunetError(Code.CANCELLED, f"the run ended during {task.key}")
        with self._judged(task):
            policy = self._policy()
            policy.check_task(task, self._approvals.meet(task.study))
            policy.check_answer(result)
        parcel = self._spool.result_parcel(task)
        self._ledger.leaving(result, parcel.body, parcel.weights)
        log.info("%s: %s", task.study.name, result.failure.describe() if result.failure else "done")
        message, _ = signing.sign("answer", parcel.body.read_text(encoding="utf-8"), self._site, self._key, nonce)
        return Answer(message, file_array(parcel.weights) if parcel.weights else None)

    def _permit(self, task: Task, over: threading.Event) -> None:
        """Let a task pass the policy as it is when the task begins; outside its hours wait for them."""
        while True:
            with self._judged(task):
                policy = self._policy()
                policy.check_task(task, self._approvals.meet(task.study))
            if policy.is_open(dt.datetime.now().time()):  # noqa: DTZ005 - the hospital's own clock
                return
            log.info("%s waits: hours %s", task.study.name, policy.hours)
            if over.wait(HOURS_LOOK):
                raise FednnunetError(Code.CANCELLED, f"the run ended before the hours of {task.key}")

    @contextlib.contextmanager
    def _judged(self, task: Task) -> Iterator[None]:
        """What the policy refuses, at the entrance or at the exit, is written down."""
        try:
            yield
        except FednnunetError as error:
            self._trust.refuse(task, error)
            raise

    def _forget_earlier(self, task: Task) -> None:
        """A new task of a fold means that the round before it is recorded at the orchestrator: free its weights."""
        if task.fold is not None:
            self._spool.forget_rounds(
                task.study.id, task.fold, task.study.rounds + 1 if task.round is None else task.round
            )


def runner_secret(settings: Settings) -> Path:
    """The secret between this site's supernode and link; made at the first start."""
    path = settings.state / "link" / "runtime.secret"
    if not path.exists():
        files.write_bytes(path, secrets.token_hex(32).encode(), 0o600)
    return path


def main(settings: Settings, runtime_port: int) -> None:
    """Run the link until SIGTERM.

    Parameters
    ----------
    settings : Settings
        The site's settings.
    runtime_port : int
        The supernode's loopback port.
    """

    def stop(*_: object) -> None:
        raise Stop(0)

    signal.signal(signal.SIGTERM, stop)
    spool = Spool(settings.spool)
    shutil.rmtree(spool.root / "incoming", ignore_errors=True)  # what was on its way when the last link was killed
    spool.announce(bundle_hash())
    here = settings.state / "link"
    trusted = keypairs.load_public(settings.coordinator_key.read_bytes(), str(settings.coordinator_key))
    link = Link(
        settings.name,
        keypairs.load_private(settings.site_key.read_bytes(), str(settings.site_key)),
        Trust(settings.name, trusted, here / "arrivals.jsonl"),
        lambda: policy.load(settings.policy),
        Approvals(here / "studies"),
        spool,
        Ledger(here / "ledger.jsonl", settings.orchestrator),
    )
    ca = settings.ca_certificate.read_bytes()
    fleet = clients.fleet_client(settings.orchestrator, ca, settings.site_key, max_time=5.0)
    log.info("link of %s ready", settings.name)
    serve_tasks(
        f"127.0.0.1:{runtime_port}",
        clients.load_secret(runner_secret(settings)),
        link.handle,
        lambda node_id, run_id: clients.run_is_over(fleet, node_id, run_id),
        spool.release,
        spool.root / "incoming" / "weights.safetensors",
        MAX_WEIGHTS,
        min(settings.poll, 0.2),
    )
