"""The link: takes a task from Flower, lays it into the spool, sends what the outbox holds, writes the ledger.

Rules:

- It sees no data and loads no nnU-Net: what it knows of a task is its body and its weights file.
- A task that names another site is refused (FNU-602).
- A task that is asked for again finds its work in progress or its answer in the outbox.
- When a run ends while the worker works, the worker goes on for a short grace: a coordinator that was restarted asks
  for the same task again at once. After the grace the task is cancelled.
"""

from __future__ import annotations

import logging
import secrets
import signal
import threading
from pathlib import Path

from appliance.link.ledger import Ledger
from appliance.settings import Settings
from appliance.spool import Spool
from federation import files
from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.runner import Answer, Asked, Stop, serve_tasks
from federation.flower.transfer import file_array
from federation.tasks import Kind, Task, parse_task

log = logging.getLogger("fednnunet.link")

GRACE = 8.0
LOOK = 0.05
MAX_WEIGHTS = 16 * 2**30


class Link:
    """What the link does with one task after the other.

    Parameters
    ----------
    site : str
        The site's name.
    spool : Spool
        The wall to the worker.
    ledger : Ledger
        Where everything that leaves is written down.
    """

    def __init__(self, site: str, spool: Spool, ledger: Ledger) -> None:
        self._site, self._spool, self._ledger = site, spool, ledger
        self._cancelling: dict[str, threading.Timer] = {}

    def handle(self, asked: Asked, over: threading.Event) -> Answer:
        """Do one task; raises FNU-602, FNU-605, or FNU-409 when the run ended first."""
        task = parse_task(asked.body)
        if task.site != self._site:
            raise FednnunetError(Code.TASK_REFUSED, f"a task for {task.site} reached {self._site}")
        if (timer := self._cancelling.pop(task.study.id + task.key, None)) is not None:
            timer.cancel()
        log.info("%s %s, attempt %d", task.study.name, task.key, task.attempt)
        self._spool.put_task(task, asked.weights)
        self._forget_earlier(task)
        while (result := self._spool.result(task)) is None:
            if over.wait(LOOK):
                timer = threading.Timer(GRACE, self._spool.cancel, (task,))
                timer.daemon = True
                timer.start()
                self._cancelling[task.study.id + task.key] = timer
                raise FednnunetError(Code.CANCELLED, f"the run ended during {task.key}")
        parcel = self._spool.result_parcel(task)
        self._ledger.leaving(result, parcel.body, parcel.weights)
        log.info("%s %s: %s", task.study.name, task.key, result.failure.describe() if result.failure else "done")
        return Answer(parcel.body.read_text(encoding="utf-8"), file_array(parcel.weights) if parcel.weights else None)

    def _forget_earlier(self, task: Task) -> None:
        """A new task of a fold means that the round before it is recorded at the orchestrator: free its weights."""
        if task.fold is not None:
            before = task.study.rounds if task.round is None else task.round - 1
            self._spool.forget(task.model_copy(update={"kind": Kind.TRAIN, "round": before}))


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
    ledger = Ledger(settings.state / "link" / "ledger.jsonl", settings.orchestrator)
    link = Link(settings.name, spool, ledger)
    ca = settings.ca_certificate.read_bytes()
    fleet = clients.fleet_client(settings.orchestrator, ca, settings.site_key, max_time=5.0)
    log.info("link of %s ready", settings.name)
    serve_tasks(
        f"127.0.0.1:{runtime_port}",
        clients.load_secret(runner_secret(settings)),
        link.handle,
        lambda node_id, run_id: clients.run_is_over(fleet, node_id, run_id),
        spool.root / "incoming" / "weights.safetensors",
        MAX_WEIGHTS,
        min(settings.poll, 0.2),
    )
