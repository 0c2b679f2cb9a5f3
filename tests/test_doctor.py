"""`appliance doctor`: every fault is named with its number and what to do, nothing hangs, nothing private leaves.

TLS, HTTP and the CONNECT proxy are real, on loopback; the orchestrator's listener is uvicorn behind our own Guard where
a test says so. Machines that are not at hand (a tiny /dev/shm, a full disk, a GPU) are numbers handed in.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import http.server
import ipaddress
import json
import os
import select
import shutil
import socket
import ssl
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import yaml
from commands import APPLIANCE, command, refused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from worker_site import LABELS, NAME, SITE, write_site

from appliance.doctor import (
    clock,
    dataset,
    device,
    disk,
    dns,
    enrollment,
    memory,
    mounts,
    network,
    proxy,
    report,
    shared_memory,
    tcp,
    throughput,
    tls,
    training,
    user,
    versions,
)
from appliance.doctor.context import Context, Machine
from appliance.doctor.finding import Finding, Private, Status, fail, ok, warn
from appliance.doctor.run import CHECKS, Check, choose, examine, exit_status, limited
from appliance.link.policy import write_default
from appliance.settings import Settings
from federation.errors import FednnunetError
from federation.flower import clients, superlink
from federation.processes import free_port, reach_loopback_directly
from federation.study import Study, parse

CANARY = "Zyklop77"
STUDY = {
    "name": "blobs",
    "dataset": NAME,
    "sites": [SITE],
    "channel_names": {0: "MR"},
    "labels": LABELS,
}
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


# ---- certificates and servers ---------------------------------------------------------------------------------------

DAY = dt.timedelta(days=1)


class Ca:
    """A certificate authority of a test."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.file = folder, folder / f"{name}.crt"
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._make(self.name, self.key, (-DAY, 400 * DAY), ca=True)
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def _make(
        self, name: x509.Name, key: ec.EllipticCurvePrivateKey, valid: tuple[dt.timedelta, dt.timedelta], ca: bool
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + valid[0])
            .not_valid_after(now + valid[1])
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if not ca:
            host = name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
            try:
                names: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(str(host)))
            except ValueError:
                names = x509.DNSName(str(host))
            builder = builder.add_extension(x509.SubjectAlternativeName([names]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def server(
        self, host: str = "127.0.0.1", valid: tuple[dt.timedelta, dt.timedelta] = (-DAY, 300 * DAY)
    ) -> tuple[Path, Path]:
        """Certificate and key files of a server."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = self._make(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]), key, valid, ca=False)
        certificate, private = self.folder / f"{made.serial_number}.crt", self.folder / f"{made.serial_number}.key"
        certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return certificate, private


@contextlib.contextmanager
def https(files: tuple[Path, Path], ahead: float = 0.0, status: int = 200) -> Iterator[int]:
    """An HTTPS server whose clock is `ahead` seconds ahead; it closes the connection when something is posted."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def do_POST(self) -> None:
            self.send_error(404)
            self.close_connection = True

        def date_time_string(self, timestamp: float | None = None) -> str:
            return super().date_time_string(time.time() + ahead)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def listener(files: tuple[Path, Path], guarded: bool = True) -> Iterator[int]:
    """The hospitals' listener: uvicorn behind our Guard; behind that, in the place of Flower, 200 for everything."""

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(
            superlink.Guard(application, ("/v1/fleet/",)) if guarded else application,
            port=port,
            ssl_certfile=files[0],
            ssl_keyfile=files[1],
            log_level="critical",
            lifespan="off",
            ws="none",
        )
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


class Proxy:
    """A CONNECT proxy on loopback. It notes the first line of each request; `answer` other than 200 refuses."""

    def __init__(self, answer: int = 200) -> None:
        self.answer, self.asked = answer, list[str]()
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://secretive:hush@127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self._one, args=(self.socket.accept()[0],), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := client.recv(4096)):  # who only looked whether somebody listens
                    return
                head += piece
            line = head.split(b"\r\n")[0].decode()
            self.asked.append(line)
            if self.answer != 200 or not line.startswith("CONNECT "):
                client.sendall(
                    b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % (self.answer if self.answer > 200 else 403)
                )
                return
            host, _, port = line.split()[1].rpartition(":")
            with socket.create_connection((host, int(port))) as other:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                while True:
                    for end in select.select([client, other], [], [])[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        (other if end is client else client).sendall(data)


@dataclass
class House:
    """A site's folders and its federation's authority."""

    root: Path
    ca: Ca

    def context(self, port: int = 1, host: str = "127.0.0.1", **changes: Any) -> Context:
        values: dict[str, Any] = {
            "name": SITE,
            "orchestrator": f"{host}:{port}",
            "data": self.root / "data",
            "state": self.root / "state",
            "ca_certificate": self.ca.file,
            "site_key": self.root / "site.key",
            "device": "cpu",
            "threads": 1,
            "fingerprint_processes": 1,
            **changes,
        }
        return Context(Settings(**values), timeout=60.0)


@pytest.fixture
def house(tmp_path: Path) -> House:
    (tmp_path / "state").mkdir()
    key = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (tmp_path / "site.key").write_bytes(key)
    (tmp_path / "site.key").chmod(0o600)
    return House(tmp_path, Ca(tmp_path, "Our federation"))


def failed(findings: list[Finding], *numbers: int) -> str:
    """The failures have these numbers, and each says what to do; returns what the house reads."""
    failures = [finding for finding in findings if finding.status is Status.FAIL]
    assert [finding.code.number for finding in failures if finding.code] == list(numbers), findings
    assert all(len(finding.text("advice", house=True)) > 10 for finding in failures), findings
    return "\n".join(
        f"{finding.text('found', house=True)} -> {finding.text('advice', house=True)}" for finding in failures
    )


def passed(findings: list[Finding]) -> str:
    """Nothing failed, nothing was skipped."""
    assert {finding.status for finding in findings} <= {Status.OK, Status.WARN}, findings
    return "\n".join(finding.text("found", house=True) for finding in findings)


# ---- the network -----------------------------------------------------------------------------------------------------


def test_an_orchestrator_that_is_well_passes_every_network_check(house: House) -> None:
    with https(house.ca.server()) as port:
        context = house.context(port)
        for check in (dns, tcp, proxy, tls, clock, throughput):
            passed(check.check(context))


def test_a_name_that_does_not_exist(house: House) -> None:
    assert "name.invalid" in failed(dns.check(house.context(host="name.invalid")), 610)


def test_a_port_where_nothing_listens(house: House) -> None:
    assert "refuses" in failed(tcp.check(house.context(free_port())), 611)


def test_an_expired_certificate(house: House) -> None:
    with https(house.ca.server(valid=(-9 * DAY, -2 * DAY))) as port:
        said = failed(tls.check(house.context(port)), 607)
    assert "ended on" in said
    assert "clock" in said


def test_a_certificate_that_is_not_valid_yet(house: House) -> None:
    with https(house.ca.server(valid=(2 * DAY, 9 * DAY))) as port:
        assert "not valid before" in failed(tls.check(house.context(port)), 607)


def test_a_certificate_for_another_name_names_its_names(house: House) -> None:
    with https(house.ca.server(host="other.example")) as port:
        assert "other.example" in failed(tls.check(house.context(port)), 608)


def test_a_certificate_for_another_name_that_is_expired_is_both(house: House) -> None:
    with https(house.ca.server(host="other.example", valid=(-9 * DAY, -2 * DAY))) as port:
        failed(tls.check(house.context(port)), 608, 607)


def test_a_certificate_that_ends_soon_is_a_warning(house: House) -> None:
    with https(house.ca.server(valid=(-DAY, 10 * DAY))) as port:
        assert "ends in 9 days" in passed(tls.check(house.context(port)))


def test_a_proxy_that_inspects_tls_is_named_in_the_house_and_not_outside(house: House) -> None:
    inspecting = Ca(house.root, f"Proxy of {CANARY}")
    with https(inspecting.server()) as port:
        (finding,) = tls.check(house.context(port))
        said = failed([finding], 606)
        assert f"signed by CN=Proxy of {CANARY}, not by the federation's CA (CN=Our federation)" in said
        assert f"let 127.0.0.1:{port} pass" in said
    assert CANARY not in finding.text("found", house=False) + finding.text("advice", house=False)
    assert "another authority" in finding.text("found", house=False)


def test_a_proxys_authority_added_to_ours_lets_flower_through_and_is_a_warning(house: House) -> None:
    inspecting = Ca(house.root, f"Proxy of {CANARY}")
    house.ca.file.write_bytes(house.ca.file.read_bytes() + inspecting.file.read_bytes())
    with https(inspecting.server()) as port:
        context = house.context(port)
        flower_dials(context, context.settings.site_key)
        findings = tls.check(context)
    assert f"signed by CN=Proxy of {CANARY}" in passed(findings)
    assert [finding.status for finding in findings] == [Status.OK, Status.WARN]


def test_an_authority_with_our_name_and_another_key(house: House) -> None:
    with https(Ca(house.root / "..", "Our federation").server()) as port:
        assert "with another key" in failed(tls.check(house.context(port)), 606)


@pytest.mark.parametrize("content", [None, b"", b"no certificate"])
def test_a_missing_or_broken_ca_certificate(house: House, content: bytes | None) -> None:
    house.ca.file.unlink()
    if content is not None:
        house.ca.file.write_bytes(content)
    assert str(house.ca.file) in failed(tls.check(house.context()), 614)


def test_a_server_that_takes_the_connection_and_says_nothing_ends_in_time(house: House) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        context = replace(house.context(silent.getsockname()[1]), timeout=1.0)
        assert "says nothing for 1 s" in failed(tls.check(context), 615)
        failed(clock.check(context), 604)
        failed(throughput.check(context), 604)


def test_a_server_without_tls(house: House) -> None:
    plain = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=plain.handle_request, daemon=True).start()
    with contextlib.closing(plain.socket):
        failed(tls.check(replace(house.context(plain.server_address[1]), timeout=1.0)), 615)


@pytest.mark.parametrize(
    ("server_ahead", "status"),
    [(600, "fail"), (-600, "fail"), (-30, "fail"), (-4.9, "warn"), (100, "warn"), (30, "ok"), (0, "ok")],
)
def test_a_clock_is_judged_by_what_flower_takes(house: House, server_ahead: float, status: str) -> None:
    """Flower takes a time up to 5 s ahead of the SuperLink's and up to 305 s behind it (measured against 1.41.0)."""
    with https(house.ca.server(), ahead=server_ahead) as port:
        (finding,) = clock.check(house.context(port))
    assert finding.status == status, finding
    ahead, doubt = finding.measured["seconds_ahead"], finding.measured["doubt"]
    assert isinstance(ahead, float)
    assert isinstance(doubt, float)
    assert abs(ahead + server_ahead) < doubt + 0.02, "to the second decimal"
    if status != "ok":
        assert finding.code is not None
        assert finding.code.number == 708


def test_a_clock_that_is_off_is_seen_although_the_certificate_seems_not_valid_yet(house: House) -> None:
    with https(house.ca.server(valid=(2 * DAY, 9 * DAY)), ahead=3 * 86400) as port:
        assert "could not prove who it is" in failed(clock.check(house.context(port)), 708)


def test_the_upload_is_measured_against_our_own_listener(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "MOST", 8 * 2**20)
    monkeypatch.setattr(throughput, "SECONDS", 60.0)  # a busy machine takes longer than three for these few
    with listener(house.ca.server()) as port:
        latency, upload = throughput.check(house.context(port))
    assert latency.status is Status.OK
    assert upload.measured["upload_bytes"] == 8 * 2**20
    assert "125 MB" in upload.found


def test_where_the_upload_cannot_be_measured_the_doctor_says_so(house: House) -> None:
    with https(house.ca.server()) as port:
        latency, speed = throughput.check(house.context(port))
    assert latency.measured["request_ms"]
    assert speed.found.startswith("speed: not measured")
    assert not speed.measured


def test_an_upload_that_is_not_refused_as_our_listener_does_is_not_taken_for_a_measurement(house: House) -> None:
    with listener(house.ca.server(), guarded=False) as port:
        speed = throughput.check(house.context(port))[1]
    assert speed.found.startswith("speed: not measured")
    assert not speed.measured


def test_a_line_on_which_no_chunk_arrives_in_time_fails(house: House) -> None:
    slow = throughput._judge(house.context(), (60_000, 3.0), 0.1)
    failed([slow], 616)
    assert throughput._judge(house.context(), (90_000, 3.0), 0.1).status is Status.WARN


def test_something_else_that_answers_there(house: House) -> None:
    with https(house.ca.server(), status=503) as port:
        assert "503" in failed(throughput.check(house.context(port)), 604)


# ---- proxies: the doctor takes the way that Flower's own client takes ------------------------------------------------


def test_what_does_not_answer_as_flower_does_cannot_say_whether_the_site_is_let_in(house: House) -> None:
    with https(house.ca.server()) as port:
        assert "404" in failed(enrollment.check(house.context(port)), 604)
    with listener(house.ca.server(), guarded=False) as port:
        assert "not Flower's" in failed(enrollment.check(house.context(port)), 604)
    failed(enrollment.check(replace(house.context(free_port()), timeout=1.0)), 604)
    for kept in (house.root / "site.key", house.ca.file):
        content = kept.read_bytes()
        kept.write_bytes(b"x")
        assert [finding.status for finding in enrollment.check(house.context())] == [Status.SKIPPED], kept
        kept.write_bytes(content)


def flower_dials(context: Context, key: Path) -> None:
    """Flower's own client asks the orchestrator something; whatever it answers."""
    ca = context.settings.ca_certificate.read_bytes()
    with contextlib.suppress(httpx.HTTPStatusError):
        clients.deactivate(clients.fleet_client(context.settings.orchestrator, ca, key, max_time=0.1), 1)


def test_flower_and_the_doctor_take_the_proxy_of_the_environment(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    between = Proxy()
    monkeypatch.setenv("HTTPS_PROXY", between.url)
    with https(house.ca.server()) as port:
        context = house.context(port)
        flower_dials(context, context.settings.site_key)
        assert between.asked == [f"CONNECT 127.0.0.1:{port} HTTP/1.1"]
        said = passed(proxy.check(context))
        assert "opens the way" in said
        assert "hush" not in said
        for check in (dns, tcp, tls, clock, throughput):
            passed(check.check(context))
        assert len(between.asked) > 5
        seen = len(between.asked)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        flower_dials(context, context.settings.site_key)
        passed(tls.check(context))
        assert len(between.asked) == seen


def test_a_proxy_that_refuses(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for answer, word in ((403, "Ask IT"), (407, "a name and a password")):
        monkeypatch.setenv("HTTPS_PROXY", Proxy(answer).url)
        assert word in failed(proxy.check(house.context()), 612)


def test_flower_and_the_doctor_trust_the_federations_ca_alone(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    inspecting = Ca(house.root, "Inspecting")
    monkeypatch.setenv("SSL_CERT_FILE", str(inspecting.file))
    with https(inspecting.server()) as port:
        context = house.context(port)
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            flower_dials(context, context.settings.site_key)
        failed(tls.check(context), 606)
        assert "without effect" in proxy.check(context)[-1].found


def test_what_stays_on_this_machine_is_kept_off_a_proxy(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    between = Proxy()
    monkeypatch.setenv("HTTP_PROXY", between.url)
    link = clients.runtime_client("127.0.0.1:9", None, secret=b"0" * 64, component="x", max_time=0.1)
    with pytest.raises(httpx.HTTPStatusError):
        clients.acquire(link, "flwr-clientapp")
    assert between.asked.pop().startswith("POST http://127.0.0.1:9/")  # what Flower's client would do
    monkeypatch.setenv("NO_PROXY", "intranet.example")
    monkeypatch.setenv("no_proxy", "")
    reach_loopback_directly()
    assert os.environ["NO_PROXY"] == "intranet.example,127.0.0.1,localhost"
    link = clients.runtime_client("127.0.0.1:9", None, secret=b"0" * 64, component="x", max_time=0.1)
    with pytest.raises(httpx.ConnectError):
        clients.acquire(link, "flwr-clientapp")
    assert not between.asked


def test_a_range_in_no_proxy_is_a_warning(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "10.0.0.0/8")
    assert any("range" in finding.found for finding in proxy.check(house.context()))
    assert network.proxy(house.context().settings) is None


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_a_key_that_others_may_read(house: House) -> None:
    assert not [finding for finding in user.key(house.context()) if finding.status is not Status.OK]
    (house.root / "site.key").chmod(0o644)
    assert "chmod 600" in failed(user.key(house.context()), 714)


def test_a_key_that_is_missing_or_of_another_kind(house: House) -> None:
    (house.root / "site.key").write_bytes(b"no key")
    failed(user.key(house.context()), 715)
    (house.root / "site.key").unlink()
    failed(user.key(house.context()), 113)


@pytest.mark.parametrize("line", ["max_round = 3", 'hours = "19-6"', "studies = "])
def test_a_policy_that_start_would_refuse(house: House, line: str) -> None:
    file = house.root / "policy.toml"
    context = house.context(policy=file)
    assert "no policy.toml" in passed([user.policy(context)])
    write_default(file)
    assert str(file) in passed([user.policy(context)])
    file.write_text(line + "\n")
    told = failed([one for one in user.check(context) if one.code is None or one.code.number != 720], 112)
    assert str(file) in told
    assert str(file) not in user.policy(context).text("found", house=False)


def test_data_that_is_missing_or_could_be_written(house: House) -> None:
    failed(mounts.check(house.context()), 201)
    (house.root / "data").mkdir()
    (finding,) = [one for one in mounts.check(house.context()) if one.status is Status.WARN]
    assert finding.code is not None
    assert finding.code.number == 716
    assert list((house.root / "data").iterdir()) == []
    assert list((house.root / "state").iterdir()) == []


def test_data_mounted_read_only_is_well(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    (house.root / "data").mkdir()
    real = os.access
    monkeypatch.setattr(  # simulated: what the kernel says of a read-only mount
        mounts.os, "access", lambda path, mode: real(path, mode) and not (mode & os.W_OK and path.name == "data")
    )
    passed(mounts.check(house.context()))


def test_a_state_that_cannot_be_written(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    (house.root / "data").mkdir()
    monkeypatch.setattr(mounts.os, "fsync", full)  # simulated: a disk without a byte left
    failed(mounts.check(house.context()), 702)
    assert list((house.root / "state").iterdir()) == []


def test_a_state_that_is_not_there_yet_is_well_only_where_it_can_be_made(house: House) -> None:
    (house.root / "data").mkdir()
    before = everything(house.root)
    assert "can be made" in passed(mounts.check(house.context(state=house.root / "new" / "state")))
    assert everything(house.root) == before
    (house.root / "file").write_text("")
    (house.root / "link").symlink_to(house.root / "nowhere")
    for state in (house.root / "file", house.root / "file" / "state", house.root / "link", Path("/proc/nope")):
        assert str(state) in failed(mounts.check(house.context(state=state)), 702)


def test_a_disk_that_is_nearly_full(house: House) -> None:
    for free, status in ((5e8, Status.FAIL), (2e9, Status.WARN), (9e9, Status.OK)):
        machine = Machine(free_bytes=lambda _, free=free: int(free))  # type: ignore[misc]
        (finding,) = disk.check(replace(house.context(), machine=machine))
        assert finding.status is status, finding


def test_the_64_megabytes_that_docker_gives_are_too_little_shared_memory(house: House) -> None:
    assert "--shm-size" in failed([shared_memory.judge(house.context(), 64 * 2**20, 64 * 2**20)], 712)
    assert shared_memory.judge(house.context(), 8 * 2**30, 8 * 2**30).status is Status.OK
    alone = house.context(augmentation_processes=0)
    assert shared_memory.judge(alone, 64 * 2**20, 64 * 2**20).status is Status.OK


def test_the_containers_memory_limit_counts_and_not_the_machines(house: House) -> None:
    meminfo, own = house.root / "meminfo", house.root / "own"
    meminfo.write_text("MemTotal:       65000000 kB\nMemAvailable:   60000000 kB\n")
    own.write_text("0::/box/inner\n")
    (house.root / "cgroup" / "box" / "inner").mkdir(parents=True)
    (house.root / "cgroup" / "box" / "inner" / "memory.max").write_text("max\n")
    machine = Machine(meminfo=meminfo, cgroup=house.root / "cgroup", own_cgroup=own)
    context = replace(house.context(), machine=machine)
    passed(memory.check(context))
    (house.root / "cgroup" / "box" / "memory.max").write_text(f"{3 * 10**9}\n")
    (house.root / "cgroup" / "box" / "memory.current").write_text("1000000\n")
    assert "--memory" in failed(memory.check(context), 711)


def test_versions_that_cannot_take_part_and_versions_that_are_only_other() -> None:
    installed = dict.fromkeys(versions.NEEDED, "1.0") | {"flwr": "1.40.0", "torch": "2.0+cpu"}
    constraints = dict.fromkeys(versions.NEEDED, "1.0") | {"flwr": "1.41.0", "torch": "2.0"}
    assert "flwr is 1.40.0, tested with 1.41.0" in failed(versions.compare(constraints, installed), 709)
    findings = versions.compare(constraints, installed | {"flwr": "1.41.0", "numpy": "3"})
    assert [finding.status for finding in findings] == [Status.WARN, Status.OK]
    failed(versions.compare(constraints, {}), 704)


def test_this_installation_is_what_the_release_was_tested_with(house: House) -> None:
    from federation.flower.bundle import bundle_hash

    findings = versions.check(house.context())
    passed(findings)
    assert findings[-1].measured["bundle_sha256"] == bundle_hash()


def test_the_wheel_carries_the_constraints_beside_the_package(repository: Path) -> None:
    build = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert build["targets"]["wheel"]["force-include"]["constraints.txt"] == "appliance/constraints.txt"
    assert versions.FILES[0].parent.name == "appliance"


def a_gpu(total: float, free: float) -> dict[str, Any]:
    gpu = {"name": "NVIDIA T", "total": total, "free": free}
    return {"torch": "2", "cuda": "13.0", "mps": False, "threads": 4, "gpus": [gpu]}


def test_a_gpu_is_held_to_what_the_plan_may_fill(house: House) -> None:
    context = house.context(device="cuda")
    driver = {"driver": "580.1", "gpus": "NVIDIA T"}
    assert "driver 580.1" in passed(device.judge(context, a_gpu(24e9, 23e9), driver))
    assert "gpu_memory_target 5" in failed(device.judge(context, a_gpu(6e9, 6e9), driver), 710)
    assert device.judge(context, a_gpu(24e9, 2e9), driver)[0].status is Status.WARN
    large = replace(context, study=parse(STUDY | {"planner": "nnUNetPlannerResEncXL"}))
    failed(device.judge(large, a_gpu(24e9, 24e9), driver), 710)


def test_a_machine_without_a_gpu_says_why(house: House) -> None:
    context = replace(house.context(device="cuda"), machine=Machine(devices=house.root))
    nothing = {"torch": "2", "cuda": "13.0", "mps": False, "threads": 4, "gpus": []}
    assert "--gpus all" in failed(device.judge(context, nothing, None), 706)
    assert "Update the driver" in failed(device.judge(context, nothing, {"driver": "450", "gpus": "T"}), 706)
    assert "without CUDA" in failed(device.judge(context, nothing | {"cuda": None}, None), 706)
    assert "cuda:0" in failed(device.judge(house.context(device="cuda:3"), a_gpu(9e9, 9e9), None), 706)


def test_a_gpu_that_is_not_there_is_found_by_torch_itself(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # also where there is one
    failed(device.check(house.context(device="cuda")), 706)


def test_an_ordinary_user_is_well_and_root_is_a_warning() -> None:
    assert user._user(1000).status is Status.OK
    assert user._user(0).status is Status.WARN


def test_one_iteration_of_the_default_network_is_timed_in_a_process_of_the_worker(house: House) -> None:
    (finding,) = training.check(house.context())
    assert finding.status is Status.OK, finding.text("found", house=True)
    seconds, peak = finding.measured["seconds_per_iteration"], finding.measured["peak_gb"]
    assert isinstance(seconds, float)
    assert isinstance(peak, float)
    assert 0 < seconds < 120
    assert 0.3 < peak < 8


def test_training_is_not_tried_while_the_appliance_runs(house: House) -> None:
    from federation.processes import Lock

    lock = Lock(house.root / "state" / "role-all")
    assert training.check(house.context())[0].status is Status.SKIPPED
    lock.release()
    assert not training.worker_runs(house.context())


# ---- the dataset -----------------------------------------------------------------------------------------------------


def everything(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*"))


def test_a_dataset_that_fits_the_study_passes_and_is_not_touched(house: House) -> None:
    data = write_site(house.root / "data", cases=5, test_cases=1, size=12)
    before = everything(data)
    said = passed(dataset.check(replace(house.context(), study=parse(STUDY))))
    assert "5 training cases and 1 test cases" in said
    assert everything(data) == before


def test_without_a_study_only_dataset_json_is_looked_at_and_its_words_stay_in_the_house(house: House) -> None:
    (house.root / "data").mkdir()
    assert str(house.root) in failed(limited(lambda: dataset.check, house.context(), 60), 201)
    (house.root / "data" / "dataset.json").write_text(json.dumps({"numTraining": CANARY}))
    (finding,) = dataset.check(house.context())
    assert finding.status is Status.OK
    assert CANARY not in finding.text("found", house=False)


# ---- the runner ------------------------------------------------------------------------------------------------------


def runs(house: House, **checks: Callable[[Context], list[Finding]]) -> list[Finding]:
    class Stub(Check):
        def load(self) -> Callable[[Context], list[Finding]]:
            return checks[self.name]

    limits = {"hangs": 0.5}
    return examine(house.context(), [Stub(name, "test", limits.get(name, 60)) for name in checks]).findings


def test_a_check_that_hangs_ends_in_time_and_the_others_go_on(house: House) -> None:
    forever = threading.Event()

    def hangs(_: Context) -> list[Finding]:
        forever.wait()
        return []

    findings = runs(house, hangs=hangs, well=lambda _: [ok("well")])
    forever.set()
    failed(findings, 719)
    assert findings[1].status is Status.OK


def test_a_check_that_crashes_is_a_numbered_finding_and_its_words_stay_in_the_house(house: House) -> None:
    def crashes(_: Context) -> list[Finding]:
        raise RuntimeError(CANARY)

    findings = runs(house, crashes=crashes)
    assert CANARY in failed(findings, 718)
    assert CANARY not in report.as_html(examine(house.context(), [])) + findings[0].text("found", house=False)


def test_a_check_that_waits_for_a_failed_one_is_skipped(house: House) -> None:
    context = house.context(host="name.invalid")
    findings = examine(context, choose(["dns", "tcp", "tls"], [])).findings
    assert [(one.name, one.status.value) for one in findings] == [
        ("dns", "fail"),
        ("tcp", "skipped"),
        ("tls", "skipped"),
    ]


def test_checks_are_chosen_by_name_and_by_group() -> None:
    assert [check.name for check in choose(["network"], ["throughput", "clock"])] == [
        *("dns", "tcp", "proxy", "tls", "enrollment")
    ]
    assert [check.name for check in choose(["shared-memory,dns"], [])] == ["dns", "shared_memory"]
    with pytest.raises(FednnunetError, match="FNU-112"):
        choose(["teeth"], [])
    names = {check.name for check in CHECKS}
    assert all(set(check.needs) <= names for check in CHECKS)
    assert all(callable(check.load()) for check in CHECKS)


def test_the_exit_status_is_that_of_the_first_failure() -> None:
    from federation.errors import Code

    good, bad = ok("well"), fail(Code.DISK_SMALL, "small")
    careful = warn("so so", "look")
    assert exit_status([good, careful], strict=False) == 0
    assert exit_status([good, careful], strict=True) == 1
    assert exit_status([good, bad, fail(Code.TLS_FAILED, "none")], strict=True) == 17
    with pytest.raises(AssertionError):
        Finding(Status.FAIL, "a failure without a number")


def test_a_numbered_error_of_a_check_keeps_what_it_found_in_the_house(house: House) -> None:
    def raises(_: Context) -> list[Finding]:
        from federation.errors import Code

        raise FednnunetError(Code.DISK_FULL, f"/{CANARY}", f"Look at /{CANARY}.")

    (finding,) = limited(lambda: raises, house.context(), 5)
    assert failed([finding], 702).count(CANARY) == 2
    assert CANARY not in finding.text("found", house=False) + finding.text("advice", house=False)


# ---- the command, and what may leave the house ----------------------------------------------------------------------


@pytest.fixture
def hospital(tmp_path: Path) -> tuple[Path, Path]:
    """A hospital whose every name is the canary, with a dataset that breaks the contract: site.toml, and the study."""
    root = tmp_path / CANARY
    data = write_site(root / f"{CANARY}-data", cases=5, test_cases=0, size=12)
    for path in sorted(data.rglob("case_*.nii.gz")):
        path.rename(path.with_name(path.name.replace("case_", f"{CANARY}_")))
    next(data.glob(f"labelsTr/{CANARY}_02*")).unlink()
    shutil.copyfile(data / "dataset.json", data / "imagesTr" / f"{CANARY}_03_0000.nii.gz")
    described = json.loads((data / "dataset.json").read_text())
    described["channel_names"] = {"0": CANARY}
    (data / "dataset.json").write_text(json.dumps(described))
    study = root / f"{CANARY}.yaml"
    study.write_text(yaml.safe_dump(STUDY))
    config = root / "site.toml"
    config.write_text(
        f'name = "{SITE}"\norchestrator = "{CANARY.lower()}.invalid:9443"\ndata = "{data}"\n'
        f'state = "{root / "state"}"\n'
        f'ca_certificate = "{CANARY}.crt"\nsite_key = "{CANARY}.key"\ndevice = "cpu"\nfingerprint_processes = 1\n'
    )
    return config, study


def test_json_and_the_page_name_nothing_of_the_hospital(hospital: tuple[Path, Path], tmp_path: Path) -> None:
    config, study = hospital
    before = everything(config.parent)
    page = tmp_path / "report.html"
    done = command(
        APPLIANCE,
        *("doctor", "--config", config, "--study", study, "--skip", "training", "--json", "--report", page),
        cwd=tmp_path,
        USER=CANARY,
        HTTPS_PROXY=f"http://{CANARY}.invalid:3128",
    )
    assert everything(config.parent) == before, "the doctor left something behind"
    assert done.status == 11, done  # the first failure: the site's key is missing
    assert done.err == f"wrote {page}: it may be mailed to the coordinator\n"
    value = json.loads(done.out)
    numbers = {finding["code"] for finding in value["findings"]}
    assert {"FNU-113", "FNU-610", "FNU-203", "FNU-207", "FNU-210"} <= numbers, numbers
    text = page.read_text()
    for name in (CANARY.lower(), socket.gethostname().lower(), str(tmp_path).lower()):
        assert name not in done.out.lower(), name
        assert name not in text.lower(), name
    assert "FNU-610" in text
    assert "What to do: " in text
    assert "src=" not in text
    assert "href=" not in text


def test_private_details_stand_under_their_own_key_and_nowhere_else(house: House) -> None:
    key = house.root / CANARY
    shutil.copyfile(house.root / "site.key", key)
    key.chmod(0o644)
    context = house.context(host=f"{CANARY}.invalid", data=house.root / f"{CANARY}-data", site_key=key)
    examination = examine(context, choose(["dns", "mounts", "user"], []))
    advice = [finding.text("advice", house=True) for finding in examination.findings]
    assert any(CANARY in text for text in advice)
    assert CANARY not in report.as_html(examination)
    open_value = json.loads(report.as_json(examination, strict=False, private=True))
    hidden = [finding.pop("private") for finding in open_value["findings"]]
    assert CANARY in json.dumps(hidden)
    assert CANARY not in json.dumps(open_value)
    assert open_value == json.loads(report.as_json(examination, strict=False))


def test_a_private_value_that_looks_like_a_marker_is_not_read_as_one() -> None:
    finding = ok("see [a] and [b]", private={"a": Private("x", "[b]"), "b": Private("y", CANARY)})
    assert finding.text("found", house=True) == f"see [b] and {CANARY}"
    assert finding.text("found", house=False) == "see x and y"


def test_the_table_fits_80_columns_and_says_what_to_do(hospital: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(APPLIANCE, "doctor", "--config", hospital[0], "--only", "user,dns,tls", cwd=tmp_path, COLUMNS=None)
    assert done.status == 11, done
    assert max(map(len, done.out.splitlines())) <= 80, done
    assert "FNU-610" in done.out
    assert "What to do: " in done.out
    assert f"{CANARY.lower()}.invalid" in done.out.replace("\n", "").replace(" ", "")
    assert "exit status 11" in done.out


def test_the_study_file_and_the_options_are_checked_first(hospital: tuple[Path, Path], tmp_path: Path) -> None:
    config, _ = hospital
    assert command(APPLIANCE, "doctor", "--config", config, "--only", "teeth", cwd=tmp_path).status == 11
    assert "FNU-101" in command(APPLIANCE, "doctor", "--config", config, "--study", "none", cwd=tmp_path).err
    for page in (tmp_path / "nowhere" / "page.html", tmp_path):
        refused(command(APPLIANCE, "doctor", "--config", config, "--report", page, cwd=tmp_path), 702, str(page))
    assert not (tmp_path / "nowhere").exists()


def test_the_doctor_says_where_the_page_lies(hospital: tuple[Path, Path], tmp_path: Path) -> None:
    done = command(APPLIANCE, "doctor", "--config", hospital[0], "--only", "dns", "--report", "p.html", cwd=tmp_path)
    assert done.out.splitlines()[-1].startswith(f"wrote {tmp_path / 'p.html'}")
    assert (tmp_path / "p.html").is_file()


def test_a_study_is_what_the_type_says() -> None:
    assert isinstance(parse(STUDY), Study)
