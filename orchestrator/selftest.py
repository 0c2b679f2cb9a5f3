"""An empty round: what `orchestrator selftest` asks for over the network, and what the coordinator does for it.

Rules:

- Everything on the way is real: both listeners, the token, a run of the SuperLink, the coordinator, a journal, an
  exchange with nobody, an average of one made-up tensor. No site is asked, and nothing stays on the disk.
- The coordinator does one run after another: while a study is under way the round is left out, and said to be.
- The listeners are dialled through a port of this machine: the certificate always names 127.0.0.1, while the names that
  a cluster gives to the Services are nobody's business outside it. TLS goes all the way.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from federation import audit, endpoint
from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.runner import Run
from federation.processes import reach_loopback_directly
from federation.study import Aggregation, parse
from federation.weights import Spec, TensorFile, write_tensors
from orchestrator.aggregation.mean import Update
from orchestrator.aggregation.rules import aggregate
from orchestrator.journal import Journal
from orchestrator.rounds import Errand, Exchange
from orchestrator.signatures import Signatures

STUDY = "selftest"
"""What a run carries in the place of a study when it asks for an empty round."""

_LOOK = 0.2  # seconds between two looks at the run
_STUDY = {
    "name": STUDY,
    "dataset": "Dataset999_Selftest",
    "sites": [STUDY],
    "channel_names": {"0": "none"},
    "labels": {"background": 0, "none": 1},
}


def run(fleet: str, control: str, ca: Path, token: Path, timeout: float) -> Iterator[str]:
    """Ask for an empty round; yields a line for each thing that holds.

    Parameters
    ----------
    fleet, control : str
        HOST:PORT of the two listeners, as their Services are dialled.
    ca, token : Path
        The authority's certificate and the control token.
    timeout : float
        Seconds to wait for the round.

    Raises
    ------
    FednnunetError
        FNU-112 or 604 to 608 (a listener is not reached, or its certificate does not hold), FNU-723 (anything else).
    """
    reach_loopback_directly()
    try:
        authority, secret = ca.read_text(), token.read_text().strip()
    except OSError as error:
        raise FednnunetError(Code.SETTINGS_INVALID, f"{error.filename}: {error.strerror}") from error
    with _forwarded(fleet) as near_fleet, _forwarded(control) as near_control:
        endpoint.check(near_fleet, authority)
        yield f"ok\thospitals' listener {fleet} answers, with a certificate of the authority"
        for path in ("/v1/control/ListRuns", "/v1/runtime/AcquireTask"):
            _expect(near_fleet, authority, path, 404)
        yield "ok\thospitals reach neither control nor runtime there"
        endpoint.check(near_control, authority)
        _expect(near_control, authority, "/v1/control/ListRuns", 401)
        yield f"ok\tcontrol listener {control} answers, and wants the token"
        try:
            client = clients.Control(near_control, authority.encode(), secret)
            yield f"ok\tthe token holds; {len(client.nodes())} sites are registered"
            busy = client.active()
            if busy:
                yield f"left out\tthe empty round: run {busy[0]} is under way, and the coordinator does one at a time"
                return
            started = time.monotonic()
            _await(client, client.start(STUDY), timeout)
        except clients.HTTPError as error:
            raise FednnunetError(Code.NOT_READY, f"control listener {control}: {str(error).splitlines()[0]}") from error
        yield f"ok\tthe coordinator did an empty round in {time.monotonic() - started:.1f} s"


def _await(client: clients.Control, run_id: int, timeout: float) -> None:
    end = time.monotonic() + timeout
    while True:
        status, how, details = client.status(run_id)
        if status == "finished":
            break
        if time.monotonic() > end:
            client.stop(run_id)
            raise FednnunetError(
                Code.NOT_READY, f"the round is {status} after {timeout:.0f} s", "Look at the coordinator's log."
            )
        time.sleep(_LOOK)
    if how != "completed":
        raise FednnunetError(Code.NOT_READY, f"the round ended as {how}: {details}", "Look at the coordinator's log.")


def _expect(address: str, ca: str, path: str, wanted: int) -> None:
    host, port = endpoint.split(address)
    context = ssl.create_default_context(cadata=ca)
    connection = http.client.HTTPSConnection(host, port, timeout=endpoint.TIMEOUT, context=context)
    try:
        connection.request("POST", path)
        status = connection.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        raise FednnunetError(Code.NOT_READY, f"POST {path}: {error}") from error
    finally:
        connection.close()
    if status != wanted:
        raise FednnunetError(Code.NOT_READY, f"POST {path} is answered with {status} where {wanted} is right")


@contextlib.contextmanager
def _forwarded(address: str) -> Iterator[str]:
    """A port of this machine that leads to `address`, for as long as the context lasts; raises FNU-604."""
    host, port = endpoint.split(address)
    try:
        socket.create_connection((host, port), endpoint.TIMEOUT).close()
    except OSError as error:
        raise FednnunetError(Code.ORCHESTRATOR_UNREACHABLE, f"{address}: {error.strerror or error}") from error
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    near, _ = server.accept()
                except OSError:  # closed: the end
                    return
                try:
                    far = socket.create_connection((host, port), endpoint.TIMEOUT)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=(one, other), daemon=True).start()

        threading.Thread(target=accept, daemon=True, name="forward").start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


# at the coordinator


def empty_round(state: Path, run: Run, signatures: Signatures, poll: float) -> None:
    """Do a round that asks no site, in a folder of its own below `state`; raises what keeps the coordinator from it."""
    shutil.rmtree(state / STUDY, ignore_errors=True)  # of one that was cut off
    study = parse(_STUDY, STUDY)
    folder = state / STUDY / str(run.run_id)
    try:
        journal = Journal(folder, study)
        try:
            journal.write("opened", run=run.run_id, submission=run.submission)
            run.nodes()
            outcome = Exchange(run, journal, signatures, poll).ask(
                [], _nobody, lambda *_: {}, needed=0, deadline=study.round_deadline
            )
            journal.write("closed", fold="all", round=1, participants=[], missing=outcome.missing, seconds=0.0)
            digest = _average(journal, study.aggregation)
            journal.write("weights", fold="all", round=1, digest=digest)
            journal.write("done")
        finally:
            journal.close()
        audit.verify(folder / "journal.jsonl")
    finally:
        shutil.rmtree(state / STUDY, ignore_errors=True)


def _nobody(site: str, full: bool) -> Errand:
    raise AssertionError(f"an empty round asks nobody, not {site} ({full})")


def _average(journal: Journal, rule: Aggregation) -> str:
    """The mean of one made-up update, which must be that update; returns the digest of the new weights."""
    spec = {"weight": Spec(np.dtype("<f4"), (64,))}
    base, out = journal.global_file("all", 0), journal.global_file("all", 1)
    update = out.parent / "updates" / f"{STUDY}.safetensors"
    for path, values in ((base, np.zeros(64, "<f4")), (update, np.arange(64, dtype="<f4"))):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, spec, {"weight": values}.__getitem__)
    digest = aggregate(
        rule,
        {STUDY: Update(update, 1.0, None)},
        base,
        out,
        journal.optimizer_file("all", 0),
        journal.optimizer_file("all", 1),
    )
    if not np.array_equal(TensorFile(out).read("weight"), np.arange(64, dtype="<f4")):
        raise FednnunetError(Code.NOT_READY, "the mean of one update is not that update")
    return digest
