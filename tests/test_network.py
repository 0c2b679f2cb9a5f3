"""The wire for real: Flower's SuperLink behind our two listeners, a supernode and a link; the test coordinates."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest
from flwr.proto.node_pb2 import Node as FlowerNode

from appliance import identity
from appliance.spool import Spool
from federation import audit, files, keypairs, signing, tasks, weights
from federation.errors import FednnunetError
from federation.flower import bundle, clients, runner
from federation.flower.runner import Node, Run, RunLost
from federation.flower.transfer import Received, file_array
from federation.processes import Child, Supervisor, free_port
from federation.study import parse
from federation.tasks import Kind, Result, Task
from orchestrator.enrollment.authority import Authority, create
from orchestrator.server import Server

SITE = "hospital_a"
STUDY = parse(
    {
        "name": "t",
        "dataset": "Dataset001_T",
        "sites": [SITE],
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "x": 1},
    }
)


@dataclass
class Line:
    """A SuperLink, one site's supernode and link, and the site's spool."""

    server: Server
    authority: Authority
    control: clients.Control
    spool: Spool
    state: Path
    supervisor: Supervisor

    def process(self, role: str) -> psutil.Process:
        """The site's supernode or link."""
        site = psutil.Process(self.supervisor.children[1].pid)
        (found,) = (process for process in site.children(recursive=True) if role in process.cmdline())
        return found

    @contextlib.contextmanager
    def supernode(self) -> Iterator[psutil.Process]:
        """The site's supernode, to be suspended; in the end it runs."""
        found = self.process("supernode")
        try:
            yield found
        finally:
            found.resume()

    def coordinate(self, handle: Callable[[Run], None]) -> None:
        """Start a run and be its coordinator."""
        self.control.start(STUDY.model_dump_json())
        address = f"{self.server.control_host}:{self.server.control_port}"
        secret = clients.load_secret(self.authority.secret)
        for ran in runner.serve_runs(address, self.authority.ca.read_bytes(), secret, handle, 0.1):
            if ran:
                return

    def send(self, run: Run, task: Task, file: Path | None = None) -> str:
        """Sign one task and send it to the site."""
        key = keypairs.load_private(self.authority.signing_key.read_bytes(), "coordinator.key")
        message, _ = signing.sign("task", task.model_dump_json(), "coordinator", key)
        node: Node = run.nodes()[SITE]
        return run.push(node, task.key, message, file_array(file) if file else None, 300)

    def exchange(self, run: Run, task: Task, out: Path, file: Path | None = None, most: int = 2**30) -> Received:
        """Sign one task, send it to the site and fetch its answer."""
        sent = self.send(run, task, file)
        end = time.monotonic() + 300
        while time.monotonic() < end:
            for ready in run.ready([sent]):
                return run.take(ready, out, most, lambda: False)
            time.sleep(0.05)
        raise AssertionError("no answer")


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Line]:
    root = tmp_path_factory.mktemp("line")
    authority = create(root / "orchestrator" / "authority", ["127.0.0.1"])
    server = Server(root / "orchestrator", fleet_port=free_port(), control_port=free_port())
    config, state = root / "config", root / "state"
    public = identity.create(
        config,
        name=SITE,
        orchestrator=f"127.0.0.1:{server.fleet_port}",
        data=root,
        state=state,
        device="cpu",
    )
    shutil.copyfile(authority.ca, config / "ca.crt")
    shutil.copyfile(authority.signing_public, config / "coordinator.pub")
    (config / "policy.toml").write_text('studies = "any"\n')
    command = [sys.executable, "-m", "appliance.cli", "start", "--role", "link", "--config", str(config / "site.toml")]
    site = Child("site", command, state / "appliance.log", {"FEDNNUNET_POLL": "0.1"})
    supervisor = Supervisor([server.children()[0], site], grace=15)
    control = clients.Control(
        f"127.0.0.1:{server.control_port}", authority.ca.read_bytes(), authority.token.read_text()
    )
    try:
        supervisor.children[0].start()
        until(lambda: control.nodes() is not None)
        control.register(public.read_bytes(), SITE)
        site.start()
        until(lambda: control.nodes()[SITE][1] == "online")
        yield Line(server, authority, control, Spool(state / "spool"), state, supervisor)
    finally:
        supervisor.stop()


def until(check: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if check():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


class Worker(threading.Thread):
    """A simulated worker: answers each task in the spool with what `answer` makes of it."""

    def __init__(self, spool: Spool, answer: Callable[[Task], tuple[Result, Path | None]]) -> None:
        super().__init__(daemon=True)
        self.spool, self.answer, self.stopped = spool, answer, threading.Event()

    def __enter__(self) -> Worker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        while not self.stopped.wait(0.02):
            for task in self.spool.waiting():
                self.spool.put_result(task, *self.answer(task))


# ---- the listeners ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/docs",
        "/openapi.json",
        "/",
        "/v1/fleet",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
        "/V1/CONTROL/list-runs",
    ],
)
def test_hospitals_reach_the_fleet_api_and_nothing_else(line: Line, path: str) -> None:
    token = {"authorization": f"Bearer {line.authority.token.read_text()}"}
    base = f"https://127.0.0.1:{line.server.fleet_port}"
    with httpx.Client(verify=ssl.create_default_context(cafile=line.authority.ca), headers=token) as client:
        assert client.get(f"{base}/health").status_code == 200
        for method in ("GET", "POST"):
            request = client.build_request(method, base)
            request.url = httpx.URL(base).copy_with(raw_path=path.encode())
            assert client.send(request).status_code in (404, 405), path


@pytest.mark.parametrize("token", ["wrong", "Bearer", "Basic eDp5"])
def test_control_wants_the_token(line: Line, token: str) -> None:
    url = f"https://127.0.0.1:{line.server.control_port}/v1/control/list-runs"
    with httpx.Client(verify=ssl.create_default_context(cafile=line.authority.ca)) as client:
        assert client.post(url, headers={b"authorization": f"Bearer {token}".encode()}).status_code == 401
        assert client.post(url).status_code == 401
        bare = {"authorization": line.authority.token.read_text().strip()}
        assert client.post(url, headers=bare).status_code == 401


def test_the_status_page_wants_the_token_as_a_browser_sends_it_and_control_does_not_take_that(line: Line) -> None:
    token = line.authority.token.read_text().strip()
    base = f"https://127.0.0.1:{line.server.control_port}"
    with httpx.Client(verify=ssl.create_default_context(cafile=line.authority.ca)) as client:
        for path in ("/", "/status/", "/status/events", "/status/live.js"):
            refused = client.get(f"{base}{path}")
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith("Basic ")
            assert client.get(f"{base}{path}", auth=("anybody", f"{token}x")).status_code == 401
        assert client.get(f"{base}/status/", headers={"Authorization": "Basic !"}).status_code == 401
        assert "Sites" in client.get(f"{base}/status/", auth=("anybody", token)).text
        assert client.get(f"{base}/status/", headers={"Authorization": f"Bearer {token}"}).status_code == 200
        assert client.post(f"{base}/v1/control/list-runs", auth=("anybody", token)).status_code == 401
        outside = f"https://127.0.0.1:{line.server.fleet_port}"
        assert client.get(f"{outside}/status/", auth=("anybody", token)).status_code == 404
        assert client.get(f"{outside}/", auth=("anybody", token)).status_code == 404


def test_nobody_without_the_secret_gets_a_coordinators_task(line: Line) -> None:
    thief = clients.runtime_client(
        f"127.0.0.1:{line.server.control_port}",
        line.authority.ca.read_bytes(),
        secret=b"0" * 64,
        component="SuperExec",
    )
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        clients.acquire(thief, "flwr-serverapp")


def test_a_site_whose_key_is_not_registered_stays_outside(line: Line, tmp_path: Path) -> None:
    identity.create(
        tmp_path, name="stranger", orchestrator="127.0.0.1:1", data=tmp_path, state=tmp_path / "s", device="cpu"
    )
    fleet = clients.fleet_client(
        f"127.0.0.1:{line.server.fleet_port}", line.authority.ca.read_bytes(), tmp_path / "site.key", max_time=5
    )
    with pytest.raises(httpx.HTTPStatusError):
        clients.deactivate(fleet, 1)
    assert list(line.control.nodes()) == [SITE]


def test_what_a_stranger_uploads_is_not_kept_in_memory(line: Line) -> None:
    """Flower asks who it is once it has read the whole body."""
    size, superlink = 400 * 2**20, psutil.Process(line.supervisor.children[0].pid)
    before, most = superlink.memory_info().rss, 0

    def body() -> Iterator[bytes]:
        nonlocal most
        for _ in range(size // 2**20):
            yield bytes(2**20)
            most = max(most, superlink.memory_info().rss)

    with httpx.Client(verify=ssl.create_default_context(cafile=line.authority.ca), timeout=60) as client:
        for headers in ({"content-length": str(size)}, {}):
            answer = client.post(
                f"https://127.0.0.1:{line.server.fleet_port}/v1/fleet/push-object",
                content=body(),
                headers={"content-type": "application/protobuf", **headers},
            )
            assert answer.status_code in (401, 413)
    assert most - before < size / 4


# ---- tasks and weights --------------------------------------------------------------------------------------------


def test_weights_arrive_as_they_were_sent_and_the_ledger_says_what_left(line: Line, tmp_path: Path) -> None:
    """13 MB, three chunks each way; what lies in the outbox, what the ledger names and what arrives is one file."""
    random = np.random.default_rng(0)
    digest = weights.save(tmp_path / "global", {"w": random.standard_normal((13, 2**18)).astype(np.float32)})
    header = weights.describe_full(tmp_path / "global", digest)
    task = Task(study=STUDY, site=SITE, kind=Kind.TRAIN, fold="all", round=1, weights=header)
    seen: list[str] = []

    def echo(given: Task) -> tuple[Result, Path]:
        lies = line.spool.task_parcel(given).weights
        assert lies is not None
        seen.append(files.sha256_of(lies))
        shutil.copyfile(lies, tmp_path / "update")
        training = tasks.Training(
            plans_sha256="ab" * 32,
            cases=1,
            epochs=1,
            learning_rate=[0.01],
            train_loss=[1.0],
            val_loss=[1.0],
            pseudo_dice=[[None]],
            seconds={},
        )
        return Result.answering(given, training=training, weights=header), tmp_path / "update"

    got: list[Received] = []
    with Worker(line.spool, echo):
        line.coordinate(lambda run: got.append(line.exchange(run, task, tmp_path / "arrived", tmp_path / "global")))
    assert seen == [digest]
    assert files.sha256_of(tmp_path / "arrived") == digest
    (entry,) = audit.read(line.state / "link" / "ledger.jsonl")[-1:]
    assert (entry["weights_sha256"], entry["kind"], entry["round"]) == (digest, "train", 1)
    assert entry["body_sha256"] == files.sha256_of(line.spool.result_parcel(task).body)
    assert entry["to"] == f"127.0.0.1:{line.server.fleet_port}"


def test_more_bytes_than_expected_are_refused_before_they_are_fetched(line: Line, tmp_path: Path) -> None:
    task = Task(study=STUDY, site=SITE, kind=Kind.DESCRIBE)

    def flood(given: Task) -> tuple[Result, Path]:
        weights.save(tmp_path / "flood", {"w": np.zeros(2**19, np.float32)})
        return Result.answering(
            given, description=tasks.Description(training_cases=1, test_cases=0)
        ), tmp_path / "flood"

    caught: list[str] = []

    def handle(run: Run) -> None:
        with pytest.raises(FednnunetError) as error:
            line.exchange(run, task, tmp_path / "arrived", most=2**20)
        caught.append(str(error.value))

    with Worker(line.spool, flood):
        line.coordinate(handle)
    assert "FNU-603" in caught[0]
    assert not (tmp_path / "arrived").exists()


def test_a_message_whose_announcement_was_lost_with_the_line_is_announced_again(line: Line, tmp_path: Path) -> None:
    """Flower gives a message out once: the site would miss the exchange."""
    task = Task(study=STUDY, site=SITE, kind=Kind.DESCRIBE, attempt=3)
    fleet = clients.fleet_client(
        f"127.0.0.1:{line.server.fleet_port}",
        line.authority.ca.read_bytes(),
        line.state.parent / "config" / "site.key",
        max_time=5,
    )
    lost: list[Any] = []

    def lose(node: int) -> None:
        while not lost:
            time.sleep(0.05)
            lost.extend(fleet.PullMessages(PullMessagesRequest(node=FlowerNode(node_id=node))).messages_list)
        supernode.resume()

    def answer(given: Task) -> tuple[Result, Path | None]:
        return Result.answering(given, description=tasks.Description(training_cases=1, test_cases=0)), None

    got: list[Received] = []

    def handle(run: Run) -> None:
        supernode.suspend()
        thief = threading.Thread(target=lose, args=(run.nodes()[SITE].node_id,), daemon=True)
        thief.start()
        got.append(line.exchange(run, task, tmp_path / "arrived"))
        thief.join()

    with line.supernode() as supernode, Worker(line.spool, answer):
        line.coordinate(handle)
    assert got[0].error_code is None
    assert len(lost) == 1


def test_a_task_that_is_withdrawn_holds_up_nothing_behind_it(line: Line, tmp_path: Path) -> None:
    """A site that comes back late neither fetches nor answers what nobody waits for any more."""
    digest = weights.save(tmp_path / "global", {"w": np.ones((13, 2**18), np.float32)})
    header = weights.describe_full(tmp_path / "global", digest)
    late = Task(study=STUDY, site=SITE, kind=Kind.TRAIN, fold="all", round=7, weights=header)
    next_one = Task(study=STUDY, site=SITE, kind=Kind.DESCRIBE, attempt=4)
    seen: list[str] = []
    got: list[Received] = []

    def answer(given: Task) -> tuple[Result, Path | None]:
        seen.append(given.key)
        return Result.answering(given, description=tasks.Description(training_cases=1, test_cases=0)), None

    def handle(run: Run) -> None:
        supernode.suspend()
        run.withdraw(line.send(run, late, tmp_path / "global"))
        supernode.resume()
        got.append(line.exchange(run, next_one, tmp_path / "arrived"))

    with line.supernode() as supernode, Worker(line.spool, answer):
        line.coordinate(handle)
    assert got[0].error_code is None
    assert late.key not in seen
    assert not line.spool.task_parcel(late).folder.exists()


def test_a_run_that_ends_while_its_task_is_fetched_holds_up_nothing_behind_it(line: Line, tmp_path: Path) -> None:
    """A coordinator that is stopped in the middle of a download goes on in another run."""
    values = np.random.default_rng(0).random((13, 2**18), np.float32)
    digest = weights.save(tmp_path / "global", {"w": values})
    header = weights.describe_full(tmp_path / "global", digest)
    cut_off = Task(study=STUDY, site=SITE, kind=Kind.TRAIN, fold="all", round=8, weights=header)
    next_one = Task(study=STUDY, site=SITE, kind=Kind.DESCRIBE, attempt=5)
    seen: list[str] = []
    got: list[Received] = []
    over = threading.Event()

    def answer(given: Task) -> tuple[Result, Path | None]:
        seen.append(given.key)
        return Result.answering(given, description=tasks.Description(training_cases=1, test_cases=0)), None

    def interrupted(run: Run) -> None:
        push, chunks = run._client.PushObject, itertools.count()

        def push_but_one_chunk(request: Any) -> Any:
            if len(request.object_content) > 2**20 and next(chunks):
                over.wait(600)
            return push(request)

        run._client.PushObject = push_but_one_chunk
        with contextlib.suppress(RunLost, clients.HTTPError):
            line.send(run, cut_off, tmp_path / "global")

    def coordinate() -> None:
        line.coordinate(interrupted)

    with Worker(line.spool, answer):
        first = threading.Thread(target=coordinate)
        first.start()
        try:
            until(lambda: any(line.spool.root.glob("incoming/*")))
            (run_id,) = line.control.active()
            line.control.stop(run_id)
            line.coordinate(lambda run: got.append(line.exchange(run, next_one, tmp_path / "arrived")))
        finally:
            over.set()
            first.join()
    assert got[0].error_code is None
    assert cut_off.key not in seen
    assert not any(line.spool.root.glob("incoming/*"))


@pytest.mark.long
def test_a_link_that_dies_in_the_middle_of_its_answer_is_asked_again(line: Line, tmp_path: Path) -> None:
    """The supernode waits for the rest, and the coordinator with it, until the supernode starts anew."""
    digest = weights.save(tmp_path / "update", {"w": np.random.default_rng(0).random((50, 2**20), np.float32)})
    header = weights.describe_full(tmp_path / "update", digest)
    task = Task(study=STUDY, site=SITE, kind=Kind.FINISH, fold="all")
    got: list[Received] = []
    left = line.spool.root / "incoming" / ".weights.safetensors.writing-1"

    def answer(given: Task) -> tuple[Result, Path | None]:
        update = tmp_path / f"update-{len(got)}"
        shutil.copyfile(tmp_path / "update", update)
        return Result.answering(given, weights=header), update

    def handle(run: Run) -> None:
        before = run.nodes()[SITE].activated_at
        sent = line.send(run, task)
        while not (ready := run.ready([sent])):
            time.sleep(0.002)
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"of a download that it would have been in")
        line.process("link").kill()
        until(lambda: SITE in (nodes := run.nodes()) and nodes[SITE].activated_at != before)
        got.append(run.take(ready[0], tmp_path / "arrived", 2**30, lambda: True))
        got.append(line.exchange(run, task, tmp_path / "arrived"))

    with Worker(line.spool, answer):
        line.coordinate(handle)
    assert got[0].error_code is not None, "it died too late"
    assert got[1].error_code is None
    assert files.sha256_of(tmp_path / "arrived") == digest
    assert not left.exists()


def test_a_task_for_another_site_is_refused_by_the_link(line: Line, tmp_path: Path) -> None:
    task = Task(study=STUDY, site="hospital_b", kind=Kind.DESCRIBE, attempt=7)
    got: list[Received] = []
    line.coordinate(lambda run: got.append(line.exchange(run, task, tmp_path / "o")))
    assert got[0].error_code is not None
    assert got[0].error_reason.startswith("FNU-602")
    assert line.spool.waiting() == []


def test_a_foreign_bundle_is_refused_by_coordinator_and_link_and_never_unpacked(
    line: Line, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.cli.build import build_fab_from_files

    marker = tmp_path / "ran"
    source = f"open({str(marker)!r}, 'w')\napp = None\n".encode()
    foreign: Any = build_fab_from_files({"pyproject.toml": bundle._SHELL, "coordinator.py": source, "link.py": source})
    foreign = foreign[0]
    digest = files.hashlib.sha256(foreign).hexdigest()
    monkeypatch.setattr(clients, "bundle", lambda: foreign)
    monkeypatch.setattr(clients, "bundle_hash", lambda: digest)

    run_id = line.control.start(STUDY.model_dump_json())
    address = f"127.0.0.1:{line.server.control_port}"
    secret = clients.load_secret(line.authority.secret)
    called: list[Run] = []
    next(ran for ran in runner.serve_runs(address, line.authority.ca.read_bytes(), secret, called.append, 0.1) if ran)
    assert called == []
    assert "FNU-601" in line.control.status(run_id)[2]

    monkeypatch.setattr(runner, "bundle_hash", lambda: digest)  # a hostile coordinator that takes its own bundle
    got: list[Received] = []
    line.coordinate(
        lambda run: got.append(
            line.exchange(run, Task(study=STUDY, site=SITE, kind=Kind.FINISH, fold="all"), tmp_path / "o")
        )
    )
    assert got[0].error_code == runner.BUNDLE_REFUSED
    assert not marker.exists()
    assert line.spool.waiting() == []


def test_the_link_sees_no_data_and_loads_no_nnunet(line: Line) -> None:
    site = line.supervisor.children[1].process
    assert site is not None
    (link,) = [child for child in psutil.Process(site.pid).children() if child.cmdline()[3] == "link"]
    mapped = " ".join(entry.path for entry in link.memory_maps())
    assert "torch" not in mapped
    assert "SimpleITK" not in mapped
