"""How a hospital gets in and out: the ceremony by files and online, real TLS on loopback, and the attacks by name.

Real: the authority, the documents, the registry, the SuperLink behind its two listeners, a supernode, the commands
(run in this process, since there are many: `command`; tests/test_documents.py runs them as processes).
Simulated, where a test says `FlowerInMemory`: the SuperLink's list of nodes, with its rule that a key which was
unregistered never comes back.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import http.server
import importlib
import io
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import hypothesis.strategies
import pytest
import typer.main
import yaml
from commands import APPLIANCE, COLUMNS, FEDNNUNET, Done, begin, end, good, refused
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import NameOID

from appliance import identity, settings
from federation import audit, endpoint, enrollment, files
from federation.enrollment import Invitation, Request, Statement, fingerprint
from federation.errors import Code, FednnunetError
from federation.flower import clients
from federation.flower.intake import Intake
from federation.flower.superlink import Guard
from federation.processes import Child, Supervisor, free_port
from federation.words import WORDS
from orchestrator.enrollment import ceremony
from orchestrator.enrollment.authority import Authority, create
from orchestrator.enrollment.invitations import Invitations
from orchestrator.enrollment.record import record
from orchestrator.enrollment.registry import Registry
from orchestrator.enrollment.waiting import Waiting
from orchestrator.server import Server

SITE = "hospital_a"
HOST = "127.0.0.1"
ENDPOINT = f"{HOST}:8443"


@dataclass
class FlowerInMemory:
    """Simulated: the SuperLink's list of nodes."""

    nodes: dict[int, clients.Registered] = field(default_factory=dict)
    ever: set[str] = field(default_factory=set)

    def sites(self) -> list[clients.Registered]:
        return list(self.nodes.values())

    def register(self, public_key: bytes, name: str) -> int:
        line = enrollment.public_line(public_key)
        assert line not in self.ever, "Flower: public key already in use"
        self.ever.add(line)
        number = len(self.ever)
        self.nodes[number] = clients.Registered(name, number, "registered", line, None)
        return number

    def unregister(self, node_id: int) -> None:
        del self.nodes[node_id]


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("authority")
    create(state / "authority", [HOST, "localhost"])
    return state


@pytest.fixture
def state(made_once: Path, tmp_path: Path) -> Path:
    """A state folder with an authority of its own."""
    shutil.copytree(made_once / "authority", tmp_path / "federation" / "authority")
    return tmp_path / "federation"


def command(module: str, *arguments: object, cwd: Path, **environment: str) -> Done:
    """Run a command of ours in this process, from its arguments to its exit status."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", [module, *map(str, arguments)])
        patch.setenv("COLUMNS", str(COLUMNS))
        for name, value in environment.items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                importlib.import_module(module).main()
            except SystemExit as end:
                status = int(end.code or 0)
    return Done(status, out.getvalue(), err.getvalue())


def invite(state: Path, site: str = SITE, orchestrator: str = ENDPOINT, days: float = 7) -> Invitation:
    return Invitations(state).give(site, orchestrator, days)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


@contextlib.contextmanager
def numbered(*codes: Code) -> Iterator[list[FednnunetError]]:
    """The block raises one of these numbered errors."""
    caught: list[FednnunetError] = []
    with pytest.raises(FednnunetError) as raised:
        yield caught
    caught.append(raised.value)
    assert raised.value.code in codes, raised.value


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# ---- the whole ceremony, with the commands, against a real SuperLink ------------------------------------------------


@dataclass
class Federation:
    """A real SuperLink behind its two listeners."""

    server: Server
    control: clients.Control
    folder: Path

    @property
    def state(self) -> Path:
        return self.server.state

    @property
    def fleet(self) -> str:
        return f"{HOST}:{self.server.fleet_port}"

    @property
    def base(self) -> str:
        return f"https://{self.fleet}"

    def client(self) -> httpx.Client:
        return httpx.Client(verify=ssl.create_default_context(cafile=self.server.authority.ca), timeout=10)

    def site_command(self, *arguments: object) -> Any:
        where = ("--state", self.state, "--control", f"{HOST}:{self.server.control_port}")
        return command(FEDNNUNET, "site", *arguments, *where, cwd=self.folder)

    def enroll(self, file: Path, *arguments: object) -> Any:
        place = self.folder / file.name.split(".")[0]
        folders = ("--data", self.folder, "--config", place / "config", "--state", place / "state")
        return command(APPLIANCE, "enroll", file, *folders, "--device", "cpu", *arguments, cwd=self.folder)

    def invite(self, name: str) -> Path:
        made = command(
            FEDNNUNET,
            *("site", "invite", name, "--state", self.state, "--orchestrator", self.fleet),
            cwd=self.folder,
        )
        assert "compare over the phone" in good(made).out
        return self.folder / f"{name}.invitation.json"

    def nodes(self) -> dict[str, str]:
        return {node.name: node.status for node in self.control.sites()}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    authority = create(folder / "state" / "authority", [HOST])
    server = Server(folder / "state", fleet_port=free_port(), control_port=free_port())
    control = clients.Control(f"{HOST}:{server.control_port}", authority.ca.read_bytes(), authority.token.read_text())
    supervisor = Supervisor([server.children()[0]], grace=10)
    try:
        supervisor.start()
        until(lambda: control.nodes() is not None)
        yield Federation(server, control, folder)
    finally:
        supervisor.stop()


def until(check: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if check():
                return
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def test_by_files_a_site_is_invited_enrolled_approved_comes_online_and_is_refused_at_once_when_revoked(
    federation: Federation,
) -> None:
    file = federation.invite(SITE)
    assert mode(file) == 0o600
    said = good(federation.enroll(file)).out
    config = federation.folder / SITE / "config"
    assert {path.name: mode(path) for path in config.iterdir() if mode(path) != 0o644} == {"site.key": 0o600}
    request = config / f"{SITE}.request.json"
    words = fingerprint((config / "site.pub").read_bytes())
    assert words in said
    assert json.loads(file.read_bytes())["token"] not in request.read_text()
    assert b"PRIVATE" not in request.read_bytes()
    shown = good(command(APPLIANCE, "identity", "--config", config / "site.toml", cwd=federation.folder)).out
    assert words in shown
    assert fingerprint(federation.server.authority.signing_public.read_bytes()) in shown

    refused(federation.site_command("approve", request), 125)  # nobody to ask
    wrong = " ".join([*words.split()[:5], "zebra" if words.split()[5] != "zebra" else "acorn", *words.split()[6:]])
    refused(federation.site_command("approve", request, "--fingerprint", wrong), 125)
    assert federation.nodes() == {}
    assert Registry(federation.state).all() == []
    good(federation.site_command("approve", request, "--fingerprint", words.upper().replace(" ", "-")))
    refused(federation.site_command("approve", request, "--yes"), 116)  # used twice
    assert Registry(federation.state).public_key(SITE) is not None

    link = [sys.executable, "-m", "appliance.cli", "start", "--role", "link", "--config", str(config / "site.toml")]
    site = Supervisor([Child("site", link, config / "log", {"FEDNNUNET_POLL": "0.1"}, restart=False)], grace=10)
    site.start()
    try:
        until(lambda: federation.nodes() == {SITE: "online"})
        row = good(federation.site_command("list")).out.split("\n")[0].split("\t")
        assert row == [SITE, "approved", "online", words, "-", "-"]
        fleet = clients.fleet_client(
            federation.fleet, federation.server.authority.ca.read_bytes(), config / "site.key", max_time=5
        )
        (node,) = federation.control.sites()
        good(federation.site_command("revoke", SITE))
        with pytest.raises(httpx.HTTPStatusError, match="401"):
            clients.deactivate(fleet, node.node_id)
        assert Registry(federation.state).public_key(SITE) is None
        assert federation.nodes() == {}
        assert good(federation.site_command("list")).out.startswith(f"{SITE}\trevoked\t-")
        until(lambda: "401" in (federation.folder / SITE / "state" / "logs" / "supernode.log").read_text())
    finally:
        site.stop()
    # its old key does not come back, by an invitation or by hand
    file.unlink()
    again = federation.enroll(federation.invite(SITE), "--offline")
    assert "send this file" in good(again).out
    refused(federation.site_command("approve", request, "--yes"), 124)
    refused(federation.site_command("add", SITE, config / "site.pub"), 124)
    assert federation.nodes() == {}


def test_online_a_request_waits_is_listed_approved_renewed_renamed_and_touches_no_other_site(
    federation: Federation,
) -> None:
    good(federation.enroll(federation.invite("hospital_b"), "--online"))
    good(federation.enroll(federation.invite("hospital_c"), "--online"))
    waiting = good(command(FEDNNUNET, "site", "requests", "--state", federation.state, cwd=federation.folder)).out
    assert [line.split("\t")[0] for line in waiting.splitlines()] == ["hospital_b", "hospital_c"]
    assert mode(federation.state / "requests" / "hospital_b.json") == 0o600
    good(federation.site_command("approve", "hospital_b", "--yes"))
    entry = federation.state / "sites" / "hospital_b.json"
    before = entry.read_bytes()
    good(federation.site_command("approve", "hospital_c", "--yes"))
    assert entry.read_bytes() == before
    assert mode(entry) == 0o600
    assert list((federation.state / "requests").iterdir()) == []

    config = federation.folder / "hospital_b" / "config"
    old = (config / "site.key").read_bytes()
    good(command(APPLIANCE, "enroll", "--renew", "--config", config, cwd=federation.folder))
    good(federation.site_command("renew", "hospital_b", config / "hospital_b.renewal.json", "--yes"))
    (node,) = [node for node in federation.control.sites() if node.name == "hospital_b"]
    good(command(APPLIANCE, "enroll", "--renewed", "--config", config, cwd=federation.folder))
    assert node.public_key == identity.public_of(config / "site.key").decode()
    assert Registry(federation.state).public_key("hospital_b") == node.public_key.encode()
    assert (config / "site.key").read_bytes() != old
    (kept,) = config.glob("site.key.before-*")
    ca = federation.server.authority.ca.read_bytes()
    with pytest.raises(httpx.HTTPStatusError, match="401"):  # the key before
        clients.deactivate(clients.fleet_client(federation.fleet, ca, kept, max_time=5), node.node_id)
    refused(federation.site_command("renew", "hospital_c", config / "hospital_b.renewal.json", "--yes"), 118)

    other = Registry(federation.state).site("hospital_c")
    good(command(FEDNNUNET, *("site", "rename", "hospital_b", "clinic", "--state", federation.state), cwd=config))
    assert set(federation.nodes()) == {"clinic", "hospital_c"}
    assert Registry(federation.state).public_key("hospital_b") is None
    assert Registry(federation.state).public_key("clinic") == node.public_key.encode()
    assert Registry(federation.state).site("hospital_c") == other
    events = [line["event"] for line in audit.read(federation.state / "audit.jsonl")]
    for event in ("site invite", "request", "site approve", "site renew", "site renew refused", "site rename"):
        assert event in events
    shown = good(command(FEDNNUNET, "audit", "show", "--state", federation.state, cwd=config)).out
    assert "site rename" in shown
    verified = good(command(FEDNNUNET, "audit", "verify", "--state", federation.state, cwd=config)).out
    assert f"{len(events)} lines hold" in verified
    secret = [federation.server.authority.token.read_text(), federation.server.authority.secret.read_text()]
    secret += [json.loads(path.read_bytes())["token"] for path in federation.folder.glob("*.invitation.json")]
    log = (federation.state / "audit.jsonl").read_text()
    assert not any(text in log for text in secret)


def test_hospitals_reach_the_enrollment_path_by_post_and_still_neither_control_nor_runtime(
    federation: Federation,
) -> None:
    control = f"https://{HOST}:{federation.server.control_port}"
    token = {"authorization": f"Bearer {federation.server.authority.token.read_text()}"}
    stranger = Request.make(Invitation.read(a_foreign_invitation().file()), new_key())
    with federation.client() as client:
        for method in ("GET", "PUT", "DELETE", "HEAD"):
            assert client.request(method, f"{federation.base}/v1/enroll").status_code == 405
        for body in (b"", b"{}", b"\x00" * 100, stranger.file()):
            answer = client.post(f"{federation.base}/v1/enroll", content=body)
            assert answer.status_code in (400, 403), body
        assert client.post(f"{federation.base}/v1/enroll", content=b"x" * 20_000).status_code == 413
        assert client.post(f"{federation.base}/v1/enroll", content=iter([b"x" * 9_000] * 3)).status_code == 413
        assert client.post(f"{control}/v1/enroll", content=stranger.file(), headers=token).status_code == 404
        for path in (
            *("/v1/control/list-nodes", "/v1/runtime/acquire-task", "/v1/enroll/", "/v1/enroll/x", "/v1/enrollments"),
            *("/v1/enroll/../control/list-nodes", "/v1/enroll%2f..%2fcontrol", "/V1/ENROLL", "//v1/enroll"),
        ):
            request = client.build_request("POST", federation.base, headers=token)
            request.url = httpx.URL(federation.base).copy_with(raw_path=path.encode())
            assert client.send(request).status_code == 404, path
    assert not (federation.state / "requests" / f"{stranger.site}.json").exists()


def test_a_key_that_is_not_registered_is_refused_by_the_superlink(federation: Federation, tmp_path: Path) -> None:
    identity.create(tmp_path, name="x", orchestrator="h:1", data=tmp_path, state=tmp_path / "s", device="cpu")
    ca = federation.server.authority.ca.read_bytes()
    fleet = clients.fleet_client(federation.fleet, ca, tmp_path / "site.key", max_time=5)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        clients.deactivate(fleet, 1)


def test_an_appliance_that_is_started_before_it_is_let_in_says_so_waits_and_comes_online(
    federation: Federation,
) -> None:
    invitation = federation.invite("early")
    good(federation.enroll(invitation))
    config = federation.folder / "early" / "config"
    process = begin(
        APPLIANCE, "start", "--config", config / "site.toml", "--role", "link", "--no-follow", cwd=federation.folder
    )
    log = federation.folder / "early" / "state" / "logs" / "supernode.log"

    def the_doctor_says(status: str, found: str) -> None:
        asked = ("doctor", "--config", config / "site.toml", "--only", "enrollment", "--json")
        (finding,) = json.loads(good(command(APPLIANCE, *asked, cwd=federation.folder)).out)["findings"]
        assert (finding["status"], finding["found"]) == (status, f"the orchestrator {found}")

    try:
        until(lambda: "FNU-617" in log.read_text() if log.exists() else False)
        assert "early" not in federation.nodes()
        the_doctor_says("warn", "does not let this site in (yet)")
        good(federation.site_command("approve", config / "early.request.json", "--yes"))
        until(lambda: federation.nodes()["early"] == "online")
        the_doctor_says("ok", "lets this site in")
        assert federation.nodes()["early"] == "online", "the doctor's question changes nothing"
        assert log.read_text().count("FNU-617") == 1
        good(federation.site_command("revoke", "early"))
        until(lambda: log.read_text().count("FNU-617") == 2)
        the_doctor_says("warn", "does not let this site in (yet)")
    finally:
        process.terminate()
        assert end(process, 180).status == 0


def test_a_running_superlink_takes_up_a_new_certificate_and_old_trust_holds(federation: Federation) -> None:
    def serial() -> int:
        context = ssl.create_default_context(cafile=federation.server.authority.ca)
        with socket.create_connection((HOST, federation.server.fleet_port), timeout=5) as raw:
            with context.wrap_socket(raw, server_hostname=HOST) as secure:
                der = secure.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der).serial_number

    before, ca = serial(), federation.server.authority.ca.read_bytes()
    good(command(FEDNNUNET, "federation", "rotate", federation.state, "certificate", cwd=federation.folder))
    until(lambda: serial() != before)
    assert federation.server.authority.ca.read_bytes() == ca
    federation.control.nodes()


# ---- attacks on invitation and request -------------------------------------------------------------------------------


def a_foreign_invitation(site: str = SITE) -> Invitation:
    """Well made, but by somebody else's key."""
    key = ed25519.Ed25519PrivateKey.generate()
    return Invitation.make(site, ENDPOINT, ANY_CA, enrollment.pem(key), key)


def self_signed(name: str) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = new_key()
    return issue(name, key, name, key, None), key


def issue(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: str,
    issuer_key: ec.EllipticCurvePrivateKey,
    held: str | None,
    begin: float = -1,
    end: float = 1,
) -> x509.Certificate:
    """A certificate from `begin` to `end`, in days from now."""
    now = dt.datetime.now(dt.UTC)

    def common(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    builder = (
        x509.CertificateBuilder()
        .subject_name(common(name))
        .issuer_name(common(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days=begin))
        .not_valid_after(now + dt.timedelta(days=end))
        .add_extension(x509.BasicConstraints(ca=held is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if held is not None:
        general: x509.GeneralName = x509.DNSName(held)
        with contextlib.suppress(ValueError):
            general = x509.IPAddress(ipaddress.ip_address(held))
        builder = builder.add_extension(x509.SubjectAlternativeName([general]), critical=False)
    return builder.sign(issuer_key, hashes.SHA384())


PEM = serialization.Encoding.PEM
FUZZ_KEY = new_key()
FUZZ_VALUES = [
    *("ecdsa-sha2-nistp384 " + "A" * 120, "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "../x"),
    *("ecdsa-sha2-nistp384 " + base64.b64encode(bytes(range(100))).decode(), "0" * 64, "9999-12-31T23:59:59+00:00"),
    *(
        "\u202e",
        "x" * 9000,
        "0000-00-00T00:00:00+00:00",
        "h:99999",
        "[::]:1",
        "\ud800".encode("utf-8", "replace").decode(),
    ),
]
ANY_PUBLIC = enrollment.pem(ed25519.Ed25519PrivateKey.generate())
ANY_CA = self_signed("any")[0].public_bytes(PEM).decode()


def every_change(data: bytes) -> Iterator[bytes]:
    """The document with one byte changed, at every place of it, and cut off or added to."""
    for place in range(0, len(data.rstrip()), 3):
        yield data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    yield data[:-10]
    yield data + b"{}"
    yield b"\xef\xbb\xbf" + data
    yield b""


def test_a_changed_byte_anywhere_in_an_invitation_is_found(state: Path) -> None:
    data = invite(state).file()
    assert Invitation.read(data).site == SITE
    for changed in every_change(data):
        with numbered(Code.INVITATION_INVALID):
            Invitation.read(changed)


def test_a_changed_byte_anywhere_in_a_request_is_found(state: Path) -> None:
    invitation = invite(state)
    data = Request.make(invitation, new_key()).file()
    Invitations(state).check(Request.read(data))
    for changed in every_change(data):
        with numbered(Code.REQUEST_INVALID):
            Request.read(changed)


def test_a_request_with_somebody_elses_key_in_it_lacks_the_proof_of_possession(state: Path) -> None:
    request, other = Request.make(invite(state), new_key()), new_key()
    line = enrollment.public_line(
        other.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    with numbered(Code.REQUEST_INVALID):
        Request.read(request.model_copy(update={"public_key": line}).file())


def resigned(request: Request, key: ec.EllipticCurvePrivateKey, **changes: object) -> Request:
    """What an attacker who knows the format makes of a request: changed, and signed anew with a key of theirs."""
    changed = request.model_copy(update=changes)
    raw = key.sign(changed.data(), ec.ECDSA(hashes.SHA384()))
    return Request.read(changed.model_copy(update={"signature": base64.b64encode(raw).decode()}).file())


def test_a_man_in_the_middle_cannot_put_his_key_into_a_request(state: Path) -> None:
    """He sees the request but never the token: the proof is over the hospital's key."""
    key, his = new_key(), new_key()
    request = Request.make(invite(state), key)
    with numbered(Code.INVITATION_UNKNOWN):
        Invitations(state).check(resigned(request, his, public_key=enrollment._line_of(his)))


def test_another_sites_token_and_a_request_for_another_name_are_refused(state: Path) -> None:
    mine, other = invite(state, "hospital_a"), invite(state, "hospital_b")
    key = new_key()
    line = enrollment._line_of(key)
    for site, number, token in (
        ("hospital_a", mine.id, other.token_sha256),
        ("hospital_a", other.id, other.token_sha256),
        ("hospital_b", mine.id, mine.token_sha256),
        ("hospital_c", mine.id, mine.token_sha256),
        ("hospital_a", "0" * 16, "00" * 32),
    ):
        forged = resigned(
            Request.make(mine, key),
            key,
            site=site,
            invitation=number,
            proof=enrollment.proof(token, number, site, line),
        )
        with numbered(Code.INVITATION_UNKNOWN):
            Invitations(state).check(forged)
        assert Waiting(state).receive(forged.file())[0] == 403
    assert not (state / "requests").exists()


def test_an_invitation_counts_between_its_two_moments_alone(state: Path) -> None:
    invitation = invite(state, days=1)
    now = dt.datetime.now(dt.UTC)
    invitation.check_dates(now - dt.timedelta(minutes=10))  # a clock that is off by ten minutes
    for at in (now - dt.timedelta(minutes=20), now + dt.timedelta(days=1, minutes=1)):
        with numbered(Code.INVITATION_EXPIRED):
            invitation.check_dates(at)


@pytest.mark.parametrize("begin", [-8, 1])
def test_an_expired_and_a_not_yet_valid_invitation_are_refused_on_both_sides(
    state: Path, tmp_path: Path, begin: int
) -> None:
    authority = Authority(state / "authority")
    start = enrollment.now() + dt.timedelta(days=begin)
    invitation = Invitation.make(SITE, ENDPOINT, ANY_CA, authority.trusted(), authority.signing(), 7, start)
    file = tmp_path / "invitation.json"
    file.write_bytes(invitation.file())
    refused(command(APPLIANCE, "enroll", file, "--config", tmp_path / "config", cwd=tmp_path), 115)
    assert not (tmp_path / "config").exists()
    given = invite(state)  # the same at the orchestrator: as if the clock had moved
    path = state / "invitations" / f"{given.id}.json"
    dates = {"not_before": invitation.not_before, "not_after": invitation.not_after}
    path.write_text(json.dumps({**json.loads(path.read_text()), **dates}))
    request = Request.make(given, new_key())
    with numbered(Code.INVITATION_EXPIRED):
        ceremony.approve(state, FlowerInMemory(), request)
    assert Waiting(state).receive(request.file())[0] == 410
    assert Registry(state).all() == []


def test_an_invitation_is_used_once_by_one_key(state: Path) -> None:
    flower, invitation = FlowerInMemory(), invite(state)
    first = Request.make(invitation, new_key())
    ceremony.approve(state, flower, first)
    for request in (first, Request.make(invitation, new_key())):
        with numbered(Code.INVITATION_USED):
            ceremony.approve(state, flower, request)
        assert Waiting(state).receive(request.file())[0] == 410
    assert len(flower.nodes) == 1


def test_a_second_invitation_withdraws_the_first_and_only_its_token_hash_is_kept(state: Path) -> None:
    first, second = invite(state), invite(state)
    with numbered(Code.INVITATION_USED):
        Invitations(state).check(Request.make(first, new_key()))
    Invitations(state).check(Request.make(second, new_key()))
    for path in (state / "invitations").iterdir():
        assert mode(path) == 0o600
        assert first.token not in path.read_text()
        assert second.token not in path.read_text()
    ceremony.approve(state, FlowerInMemory(), Request.make(second, new_key()))
    with numbered(Code.SITE_TAKEN):
        invite(state)


def test_an_invitation_on_stdout_is_the_invitation_alone(state: Path, tmp_path: Path) -> None:
    """So it leaves a pod by `kubectl exec ... >FILE`, and lies on no disk there."""
    where = ("--state", state, "--orchestrator", ENDPOINT, "--output", "-")
    done = good(command(FEDNNUNET, "site", "invite", SITE, *where, cwd=tmp_path))
    (tmp_path / "file").write_text(done.out)
    assert Invitation.read(enrollment.read_capped(tmp_path / "file", Code.INVITATION_INVALID)).site == SITE
    assert "compare over the phone" in done.err
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize(
    "name", ["../x", "..", "/etc/passwd", "a/b", "A", "", "a\n", "a\x00", "x" * 64, ".lock", "a.json", "ä"]
)
def test_a_path_for_a_name_is_refused_everywhere_and_writes_nothing(state: Path, name: str) -> None:
    def listing() -> set[Path]:
        return {path for path in state.parent.rglob("*") if path.suffix == ".json"}

    key = new_key()
    line = enrollment._line_of(key).encode()
    valid = Request.make(invite(state), key)
    before = listing()
    registry = Registry(state)
    assert registry.public_key(name) is None
    for attempt in (
        lambda: invite(state, name),
        lambda: registry.approve(name, line, "hand"),
        lambda: registry.site(name),
        lambda: registry.revoke(name),
        lambda: Waiting(state).read(name),
        lambda: Waiting(state).remove(name),
        lambda: ceremony.let_in(state, FlowerInMemory(), name, line),
        lambda: ceremony.rename(state, SITE, name, lambda *_: None),
    ):
        with numbered(Code.SETTINGS_INVALID, Code.SITE_UNKNOWN):
            attempt()
    forged = valid.model_copy(update={"site": name})
    signature = base64.b64encode(key.sign(forged.data(), ec.ECDSA(hashes.SHA384()))).decode()
    body = forged.model_copy(update={"signature": signature}).file()
    assert Waiting(state).receive(body)[0] == 400
    foreign = json.loads(a_foreign_invitation().file())
    with numbered(Code.INVITATION_INVALID):
        Invitation.read(files.canonical_json({**foreign, "site": name}))
    assert listing() == before


def test_a_date_that_no_calendar_has_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    invitation = Invitation.make(SITE, ENDPOINT, ANY_CA, enrollment.pem(key), key)
    changed = invitation.model_copy(update={"not_after": "2026-02-31T00:00:00+00:00"})
    signed = changed.model_copy(update={"signature": base64.b64encode(key.sign(changed.data())).decode()})
    with numbered(Code.INVITATION_INVALID):
        Invitation.read(signed.file())


@pytest.mark.parametrize("body", [b"[" * 16000, b'{"a":' * 3000, b"1" * 16000, b"\xff" * 99, b"null", b"[]", b'"x"'])
def test_malformed_documents_are_numbered_errors(state: Path, body: bytes) -> None:
    with numbered(Code.INVITATION_INVALID):
        Invitation.read(body)
    with numbered(Code.REQUEST_INVALID):
        Request.read(body)
    assert Waiting(state).receive(body)[0] == 400


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(data=hypothesis.strategies.data())
def test_whatever_bytes_arrive_the_decoders_end_in_a_numbered_error(
    data: hypothesis.strategies.DataObject, made_once: Path
) -> None:
    """Any bytes, and well-made documents with any value in any field."""
    some = hypothesis.strategies
    key = ed25519.Ed25519PrivateKey.generate()
    documents = (
        (Invitation, a_foreign_invitation()),
        (Request, Request.make(a_foreign_invitation(), FUZZ_KEY)),
        (Statement, Statement.make(key, key)),
    )
    kind, document = data.draw(some.sampled_from(documents))
    value = some.recursive(
        some.none() | some.booleans() | some.integers() | some.text() | some.sampled_from(FUZZ_VALUES),
        some.lists,
        max_leaves=4,
    )
    fields = json.loads(document.file())
    fields[data.draw(some.sampled_from(sorted(fields)))] = data.draw(value)
    for body in (data.draw(some.binary(max_size=300)), files.canonical_json(fields) + b"\n"):
        if body == document.file():
            continue
        with numbered(Code.INVITATION_INVALID, Code.REQUEST_INVALID):
            if kind is Statement:
                Statement.read(body, ANY_PUBLIC)
            else:
                kind.read(body)
        assert Waiting(made_once).receive(body)[0] in (400, 403)
    assert not (made_once / "requests").exists()


def test_an_oversize_file_is_refused_before_it_is_read(state: Path, tmp_path: Path) -> None:
    with open(tmp_path / "huge.json", "wb") as stream:
        stream.truncate(2**32)  # sparse: 4 GiB
    with numbered(Code.INVITATION_INVALID):
        enrollment.read_capped(tmp_path / "huge.json", Code.INVITATION_INVALID)
    refused(command(APPLIANCE, "enroll", tmp_path / "huge.json", "--config", tmp_path / "c", cwd=tmp_path), 114)
    with numbered(Code.REQUEST_INVALID):
        Request.read(Request.make(invite(state), new_key()).file() + b" " * 2**14)


def test_swapped_names_two_hospitals_keys_are_not_exchanged(state: Path) -> None:
    flower = FlowerInMemory()
    keys = {name: enrollment._line_of(new_key()).encode() for name in ("hospital_a", "hospital_b")}
    for name, key in keys.items():
        ceremony.let_in(state, flower, name, key)
    for name, other in (("hospital_a", "hospital_b"), ("hospital_c", "hospital_a")):
        with numbered(Code.SITE_TAKEN):
            ceremony.let_in(state, flower, name, keys[other])
    path = state / "sites" / "hospital_a.json"
    shutil.copyfile(state / "sites" / "hospital_b.json", path)  # the files themselves are exchanged
    with numbered(Code.REGISTRY_DAMAGED):
        Registry(state).public_key("hospital_a")


def test_a_pending_request_is_never_overwritten_by_one_of_another_key(state: Path) -> None:
    invitation = invite(state)
    first, second = Request.make(invitation, new_key()), Request.make(invitation, new_key())
    waiting = Waiting(state)
    assert waiting.receive(first.file())[0] == 202
    assert waiting.receive(first.file())[0] == 202  # a hospital that repeats itself
    assert waiting.receive(second.file()) == (409, b'{"code": 119}')
    assert waiting.read(SITE).public_key == first.public_key
    good(command(FEDNNUNET, "site", "refuse", SITE, "--state", state, cwd=state))
    assert waiting.receive(second.file())[0] == 410
    events = [(line["event"], line.get("code")) for line in audit.read(state / "audit.jsonl")]
    assert events == [("request", None), ("request refused", 119), ("site refuse", None), ("request refused", 116)]


def test_a_flood_of_requests_is_slowed_and_does_not_grow_the_disk(state: Path) -> None:
    invitation = invite(state)
    bodies = [Request.make(invitation, new_key()).file() for _ in range(20)]
    bodies += [Request.make(a_foreign_invitation(), new_key()).file() for _ in range(20)] + [b"x" * 16000] * 20
    waiting = Waiting(state)
    asked: list[int] = []

    def handler(body: bytes) -> tuple[int, bytes]:
        asked.append(len(body))
        return waiting.receive(body)

    async def flood(intake: Intake) -> list[int]:
        app = Guard(None, ("/v1/fleet/",), intake=intake)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://x") as client:
            return [(await client.post("/v1/enroll", content=bodies[n % 60])).status_code for n in range(240)]

    def size() -> int:
        return sum(path.stat().st_size for path in state.rglob("*") if path.is_file())

    slowed = asyncio.run(flood(Intake(handler, clock=lambda: 0.0)))
    assert slowed.count(429) == 210
    assert len(asked) == 30
    before = size()
    let_through = asyncio.run(flood(Intake(handler, per_minute=10**6)))  # as if it went on for days
    assert let_through.count(202) == 4
    assert set(let_through) == {202, 409, 403, 400}
    assert size() == before
    assert len(list((state / "requests").iterdir())) == 1


# ---- the endpoint and its certificate --------------------------------------------------------------------------------


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def listening(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey, folder: Path) -> Iterator[str]:
    """A real TLS listener with this certificate; yields HOST:PORT."""
    plain = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "listener.pem").write_bytes(plain + certificate.public_bytes(PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "listener.pem")
    server = http.server.ThreadingHTTPServer((HOST, 0), Health)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CASES = {
    "right": (None, {}, ""),
    "wrong CA": (Code.CERTIFICATE_UNTRUSTED, {"issuer": "MegaInspect Proxy CA"}, "MegaInspect Proxy CA"),
    "same name, another CA": (Code.CERTIFICATE_UNTRUSTED, {"issuer": "the CA", "forged": True}, "the CA"),
    "expired": (Code.CERTIFICATE_DATES, {"begin": -9, "end": -1}, "valid 20"),
    "not yet valid": (Code.CERTIFICATE_DATES, {"begin": 1, "end": 9}, "valid 20"),
    "another address": (Code.CERTIFICATE_NAME, {"held": "127.0.0.9"}, "127.0.0.9"),
    "another name": (Code.CERTIFICATE_NAME, {"held": "other.example.org"}, "other.example.org"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_certificate_that_the_endpoint_shows(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    code, how, named = CASES[case]
    ca, ca_key = self_signed("the CA")
    key = new_key()
    issuer_key = new_key() if "issuer" in how else ca_key
    dates = {name: value for name, value in how.items() if name in ("begin", "end")}
    shown = issue("server", key, str(how.get("issuer", "the CA")), issuer_key, str(how.get("held", HOST)), **dates)  # type: ignore[arg-type]
    with listening(shown, key, tmp_path) as address:
        trusted = ca.public_bytes(PEM).decode()
        if code is None:
            assert 'signed by "the CA"' in endpoint.check(address, trusted)
            return
        with numbered(code) as caught:
            endpoint.check(address, trusted)
        assert named in caught[0].found
        signing = ed25519.Ed25519PrivateKey.generate()
        file = tmp_path / "invitation.json"
        file.write_bytes(Invitation.make(SITE, address, trusted, enrollment.pem(signing), signing).file())
        if case == "wrong CA":  # the command stops before it makes anything, and a middlebox's CA can be added
            options = ("--config", tmp_path / "config", "--data", tmp_path, "--state", tmp_path / "s")
            refused(command(APPLIANCE, "enroll", file, *options, cwd=tmp_path, no_proxy="*"), 606, "MegaInspect")
            assert not (tmp_path / "config").exists()
            box = issue("MegaInspect Proxy CA", issuer_key, "MegaInspect Proxy CA", issuer_key, None)
            (tmp_path / "box.crt").write_bytes(box.public_bytes(PEM))
            options = (*options, "--ca", tmp_path / "box.crt")
            good(command(APPLIANCE, "enroll", file, *options, cwd=tmp_path, no_proxy="*"))
            written = x509.load_pem_x509_certificates((tmp_path / "config" / "ca.crt").read_bytes())
            assert written == [ca, box]


def test_nobody_there_is_said_with_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    address = f"{HOST}:{free_port()}"
    with numbered(Code.ORCHESTRATOR_UNREACHABLE) as caught:
        endpoint.check(address, ANY_CA)
    assert address in caught[0].found


def test_a_proxy_of_the_environment_carries_the_connection_and_tls_ends_at_the_orchestrator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, ca_key = self_signed("the CA")
    key, lines = new_key(), []
    with listening(issue("server", key, "the CA", ca_key, "orchestrator.test"), key, tmp_path) as address:
        proxy = socket.create_server((HOST, 0))

        def carry() -> None:
            near, _ = proxy.accept()
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(4096)
            lines.append(head.decode())
            far = socket.create_connection((HOST, int(address.rpartition(":")[2])))
            near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            pair = [threading.Thread(target=pump, args=way, daemon=True) for way in ((near, far), (far, near))]
            for thread in pair:
                thread.start()

        def pump(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(4096):
                    sink.sendall(data)

        threading.Thread(target=carry, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://user:pass%20word@{HOST}:{proxy.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "")
        seen = endpoint.check("orchestrator.test:443", ca.public_bytes(PEM).decode())
        proxy.close()
    assert 'signed by "the CA"' in seen
    assert lines[0].startswith("CONNECT orchestrator.test:443 ")
    assert base64.b64encode(b"user:pass word").decode() in lines[0]


# ---- keys, fingerprints, registry -----------------------------------------------------------------------------------


def test_the_words_are_256_short_ones_that_cannot_be_mistaken_by_a_letter() -> None:
    assert len(WORDS) == len(set(WORDS)) == 256
    assert all(word.isascii() and word.islower() and 3 <= len(word) <= 8 for word in WORDS)
    for one in WORDS:
        assert not any(other != one and other.startswith(one) for other in WORDS), one


def test_a_fingerprint_is_of_the_key_and_not_of_its_spelling() -> None:
    key = new_key()
    line = enrollment._line_of(key).encode()
    words = fingerprint(line)
    assert fingerprint(line + b" hospital_a\n") == words
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    assert fingerprint(key.public_key().public_bytes(PEM, info)) == words
    assert [len(words.split()[:6]), *map(len, words.split()[6:])] == [6, 3, 3]
    assert enrollment.same_fingerprint(words.upper().replace(" ", " - "), words)
    assert not enrollment.same_fingerprint(words[:-1], words)
    assert fingerprint(enrollment._line_of(new_key()).encode()) != words


@pytest.mark.parametrize("kind", ["rsa", "ed25519", "p256", "nonsense"])
def test_a_key_of_another_kind_is_no_sites_key(state: Path, kind: str) -> None:
    from cryptography.hazmat.primitives.asymmetric import rsa

    made: dict[str, Callable[[], Any]] = {
        "rsa": lambda: rsa.generate_private_key(65537, 1024),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    }
    line = b"ssh-x AAAA"
    if kind in made:
        public = made[kind]().public_key()
        line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    with numbered(Code.REQUEST_INVALID):
        ceremony.let_in(state, FlowerInMemory(), SITE, line)


def test_a_revoked_key_never_comes_back_and_a_new_one_does(state: Path) -> None:
    flower, old, new = FlowerInMemory(), *(enrollment._line_of(new_key()).encode() for _ in range(2))
    ceremony.let_in(state, flower, SITE, old)
    invited = invite(state, "hospital_b")
    ceremony.disconnect(flower, ceremony.revoke(state, SITE))
    assert Registry(state).public_key(SITE) is None
    assert flower.nodes == {}
    for name in (SITE, "hospital_b"):
        with numbered(Code.SITE_TAKEN):
            ceremony.let_in(state, flower, name, old)
    ceremony.let_in(state, flower, SITE, new)
    assert Registry(state).public_key(SITE) == new
    ceremony.approve(state, flower, Request.make(invited, new_key()))  # another site's invitation was not touched
    with numbered(Code.SITE_UNKNOWN):
        ceremony.revoke(state, "nobody")


def test_a_revocation_that_did_not_reach_the_superlink_is_made_good(state: Path) -> None:
    flower, old, new = FlowerInMemory(), *(enrollment._line_of(new_key()).encode() for _ in range(2))
    ceremony.let_in(state, flower, SITE, old)
    away = ("--state", state, "--control", f"{HOST}:{free_port()}")
    refused(command(FEDNNUNET, "site", "revoke", SITE, *away, cwd=state), 604, "no answer of it counts")
    assert Registry(state).public_key(SITE) is None
    events = [line["event"] for line in audit.read(state / "audit.jsonl")]
    assert events == ["site revoke", "site disconnect refused"]
    assert ceremony.put_out_revoked(state, flower) == [SITE]  # at the coordinator's next start
    assert flower.sites() == []
    flower.register(enrollment._line_of(new_key()).encode(), "hospital_b")
    assert ceremony.put_out_revoked(state, flower) == []
    ceremony.let_in(state, flower, SITE, new)
    assert [node.public_key for node in flower.sites() if node.name == SITE] == [new.decode()]


def test_sites_that_a_new_superlink_does_not_know_are_those_that_are_in(state: Path) -> None:
    flower, keys = FlowerInMemory(), [enrollment._line_of(new_key()).encode() for _ in range(3)]
    for name, key in zip((SITE, "hospital_b", "hospital_c"), keys, strict=True):
        ceremony.let_in(state, flower, name, key)
    ceremony.disconnect(flower, ceremony.revoke(state, "hospital_b"))
    assert ceremony.forgotten(Registry(state), flower) == []
    names = [site.name for site in ceremony.forgotten(Registry(state), FlowerInMemory())]
    assert names == [SITE, "hospital_c"]


def test_a_renewal_needs_the_present_key_and_the_new_one(state: Path) -> None:
    flower, present, new, thief = FlowerInMemory(), new_key(), new_key(), new_key()
    ceremony.let_in(state, flower, SITE, enrollment._line_of(present).encode())
    with numbered(Code.REQUEST_INVALID):  # signed by a key that the site does not have
        ceremony.renew(state, flower, SITE, Request.renewal(SITE, thief, new))
    with numbered(Code.REQUEST_INVALID):  # the present key is named, but has not signed
        forged = Request.renewal(SITE, thief, new).model_copy(update={"renews": enrollment._line_of(present)})
        raw = new.sign(forged.data(), ec.ECDSA(hashes.SHA384()))
        Request.read(forged.model_copy(update={"signature": base64.b64encode(raw).decode()}).file())
    renewal = Request.read(Request.renewal(SITE, present, new).file())
    assert Waiting(state).receive(renewal.file())[0] == 400  # by file alone
    for _ in range(2):  # the second time nothing is left to do
        entry = ceremony.renew(state, flower, SITE, renewal)
    assert [node.public_key for node in flower.sites()] == [enrollment._line_of(new)]
    assert [earlier.public_key for earlier in entry.earlier_keys] == [enrollment._line_of(present)]
    with numbered(Code.SITE_TAKEN):  # and not back
        ceremony.renew(state, flower, SITE, Request.renewal(SITE, new, present))


@pytest.mark.parametrize("end", ["done", "failed", "stopped"])
def test_a_site_is_not_renamed_in_the_middle_of_a_study_nor_onto_another(state: Path, end: str) -> None:
    flower = FlowerInMemory()
    for name in ("hospital_a", "hospital_b"):
        ceremony.let_in(state, flower, name, enrollment._line_of(new_key()).encode())
    study = state / "studies" / "0123"
    study.mkdir(parents=True)
    (study / "study.json").write_text(json.dumps({"name": "liver", "sites": ["hospital_a"]}))
    chain = audit.Chain(study / "journal.jsonl")
    chain.append("opened")
    with numbered(Code.SITE_BUSY) as caught:
        ceremony.rename(state, "hospital_a", "clinic", lambda *_: None)
    assert "liver" in caught[0].found
    chain.append(end)
    chain.close()
    with numbered(Code.SITE_TAKEN):
        ceremony.rename(state, "hospital_a", "hospital_b", lambda *_: None)
    ceremony.rename(state, "hospital_a", "clinic", lambda *_: None)
    assert [site.name for site in Registry(state).all()] == ["clinic", "hospital_b"]


# ---- the authority ---------------------------------------------------------------------------------------------------


def test_private_files_are_private_and_the_folder_is_made_once(tmp_path: Path) -> None:
    authority = create(tmp_path / "authority", ["orchestrator.example.org"])
    private = {"ca.key", "server.key", "control.token", "runtime.secret", "coordinator.key"}
    assert {path.name for path in authority.folder.iterdir() if mode(path) == 0o600} == private
    assert mode(authority.folder) == 0o700
    assert {path.name for path in authority.folder.iterdir()} - private == {"ca.crt", "server.crt", "coordinator.pub"}
    with numbered(Code.STATE_NOT_READY):
        create(tmp_path / "authority", ["x"])
    authority.check()
    authority.signing_public.unlink()
    authority.check()  # it follows from the private key
    authority.signing_key.unlink()
    with numbered(Code.STATE_NOT_READY) as caught:
        authority.check()
    assert "coordinator.key" in caught[0].found
    for name in ("host:8443", "a b", "https://x", ""):
        with numbered(Code.SETTINGS_INVALID):
            create(tmp_path / "other", [name])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("name", "part"), [("control.token", "token"), ("runtime.secret", "secret")])
@pytest.mark.parametrize("empty", [b"", b"\n", b"changeme"])
def test_a_secret_that_anybody_could_guess_is_not_used(state: Path, name: str, part: str, empty: bytes) -> None:
    """A Kubernetes Secret made of a variable that was not set."""
    authority = Authority(state / "authority")
    (authority.folder / name).write_bytes(empty)
    with numbered(Code.STATE_NOT_READY) as caught:
        authority.check()
    assert name in caught[0].found
    good(
        command(
            FEDNNUNET, *caught[0].advice.rpartition("fednnunet ")[2].replace("STATE", str(state)).split(), cwd=state
        )
    )
    authority.check()


def test_an_authority_of_a_version_that_signed_nothing_gets_a_signing_key_and_keeps_the_rest(state: Path) -> None:
    authority = Authority(state / "authority")
    authority.signing_key.unlink()
    authority.signing_public.unlink()
    before = {path.name: path.read_bytes() for path in authority.folder.iterdir()}
    with numbered(Code.STATE_NOT_READY) as caught:
        authority.check()
    assert "rotate STATE signing-key" in caught[0].advice
    good(command(FEDNNUNET, "federation", "rotate", state, "signing-key", cwd=state))
    authority.check()
    assert {name: (authority.folder / name).read_bytes() for name in before} == before
    assert mode(authority.signing_key) == 0o600


def test_kubernetes_secrets_hold_what_the_orchestrator_needs_and_never_the_cas_key(state: Path) -> None:
    printed = good(command(FEDNNUNET, "federation", "init", state, "--as-secret", cwd=state)).out
    documents = list(yaml.safe_load_all(printed))
    assert [(each["apiVersion"], each["kind"], each["metadata"]["name"]) for each in documents] == [
        ("v1", "Secret", "fednnunet-authority"),
        ("v1", "Secret", "fednnunet-keys"),
    ]
    held = {name: base64.b64decode(value) for each in documents for name, value in each["data"].items()}
    assert "ca.key" not in held
    folder = state.parent / "mounted"
    folder.mkdir()
    for name, data in held.items():
        (folder / name).write_bytes(data)
    Authority(folder).check()
    assert (state / "authority" / "ca.key").read_text() not in printed


def test_expiry_is_warned_of_thirty_days_ahead_with_an_exit_status(state: Path) -> None:
    authority = Authority(state / "authority")
    assert "days left" in good(command(FEDNNUNET, "federation", "status", state, cwd=state)).out
    authority.rotate_certificate(days=29)
    refused(command(FEDNNUNET, "federation", "status", state, cwd=state), 127, "server: 28 days left")
    authority.rotate_certificate(days=-1)
    refused(command(FEDNNUNET, "federation", "status", state, cwd=state), 127, "server: expired")
    good(command(FEDNNUNET, "federation", "rotate", state, "all", cwd=state))
    good(command(FEDNNUNET, "federation", "status", state, cwd=state))
    assert [expiry.names for expiry in authority.expiries()] == [[], [HOST, "localhost"]]


def test_certificates_hold_under_the_strict_rules_of_newer_pythons(state: Path, tmp_path: Path) -> None:
    authority = Authority(state / "authority")
    context = ssl.create_default_context(cafile=authority.ca)
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    certificate = x509.load_pem_x509_certificate(authority.certificate.read_bytes())
    key: Any = serialization.load_pem_private_key(authority.key.read_bytes(), None)
    with listening(certificate, key, tmp_path) as address:
        with socket.create_connection((HOST, int(address.rpartition(":")[2])), timeout=5) as raw:
            context.wrap_socket(raw, server_hostname=HOST).close()


def enrolled(state: Path, folder: Path) -> settings.Settings:
    """A hospital's folder, enrolled."""
    identity.enroll(folder, invite(state), data=folder, state=folder / "s", device="cpu")
    return settings.load(folder / "site.toml", {})


def test_the_signing_key_is_rotated_in_two_steps_and_a_site_that_took_it_in_goes_on(
    state: Path, tmp_path: Path
) -> None:
    from federation import keypairs, signing

    site = enrolled(state, tmp_path / "site")
    authority = Authority(state / "authority")

    def believes() -> bool:
        message, _ = signing.sign("task", "{}", "coordinator", authority.signing())
        keys = keypairs.load_public(site.coordinator_key.read_bytes(), "")
        try:
            signing.open_message(message, "task", "coordinator", keys)
        except FednnunetError:
            return False
        return True

    rotate = ("federation", "rotate", state, "signing-key")
    refused(command(FEDNNUNET, *rotate, "--finish", cwd=state), 113)
    good(command(FEDNNUNET, *rotate, cwd=state))
    statement = authority.statement.read_bytes()
    assert authority.begin_signing_key().read_bytes() == statement  # asked again, the same
    assert believes()
    joined = Invitations(state).give("hospital_b", ENDPOINT, 7)  # who comes in between trusts both
    assert len(enrollment.coordinator_keys(joined.coordinator)) == 2
    Invitation.read(joined.file())
    identity.trust(site, statement, drop_old=False)
    assert believes()
    good(command(FEDNNUNET, *rotate, "--finish", cwd=state))
    assert believes()
    toml = tmp_path / "site" / "site.toml"
    last = authority.last_statement
    good(command(APPLIANCE, "trust", last, "--drop-old", "--config", toml, cwd=state))
    assert believes()
    assert len(enrollment.coordinator_keys(site.coordinator_key.read_text())) == 1
    assert mode(authority.signing_key) == 0o600


def test_a_site_that_did_not_take_the_new_signing_key_in_believes_no_task_signed_with_it(
    state: Path, tmp_path: Path
) -> None:
    site = enrolled(state, tmp_path / "site")
    authority = Authority(state / "authority")
    authority.begin_signing_key()
    authority.finish_signing_key()
    held = enrollment.coordinator_keys(site.coordinator_key.read_text())
    assert authority.signing().public_key().public_bytes_raw() not in [key.public_bytes_raw() for key in held]


def test_a_statement_by_a_stranger_or_a_changed_one_is_not_trusted(state: Path, tmp_path: Path) -> None:
    site = enrolled(state, tmp_path / "site")
    before = site.coordinator_key.read_bytes()
    one, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    mine = Authority(state / "authority").signing()
    true = Statement.make(mine, one)
    forged = true.model_copy(update={"coordinator": enrollment.pem(other)})
    for statement in (Statement.make(one, other), forged):
        with numbered(Code.INVITATION_INVALID):
            identity.trust(site, statement.file(), drop_old=True)
    assert site.coordinator_key.read_bytes() == before


# ---- killed in the middle --------------------------------------------------------------------------------------------


def killed_at(number: int, action: Callable[[], object]) -> bool:
    """Run `action` in a child that dies, as with kill -9, before its n-th rename, link or removal; whether it died."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            left = [number]
            for name in ("replace", "rename", "link", "unlink"):
                real = getattr(os, name)

                def counting(*arguments: Any, _real: Any = real, **options: Any) -> Any:
                    if left[0] == 0:
                        os._exit(9)
                    left[0] -= 1
                    return _real(*arguments, **options)

                setattr(os, name, counting)
            action()
            status = 0
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 9), f"the action failed: {status}"
    return status == 9


def at_every_kill(folder: Path, action: Callable[[Path], object], sound: Callable[[Path], None]) -> int:
    """Kill `action(copy of folder)` at every step; each time it must be `sound` after it has been repeated."""
    for number in range(60):
        copy = folder.with_name(f"{folder.name}-{number}")
        shutil.copytree(folder, copy)
        died = killed_at(number, lambda copy=copy: action(copy))  # type: ignore[misc]
        if died:
            action(copy)
        sound(copy)
        if not died:
            return number
    raise AssertionError("it never ends")


def test_a_kill_in_the_middle_of_a_rotation_leaves_key_and_certificate_that_fit(state: Path) -> None:
    def sound(folder: Path) -> None:
        authority = Authority(folder / "authority")
        authority.check()
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(authority.certificate, authority.key)
        assert authority.signing_public.read_text() == enrollment.pem(authority.signing())
        assert list(authority.folder.glob("[!.]*.next.*")) == []

    for number in range(20):  # without a repetition: what `check` finds must fit already
        copy = state.with_name(f"alone-{number}")
        shutil.copytree(state, copy)
        died = killed_at(number, Authority(copy / "authority").rotate_certificate)
        sound(copy)
        if not died:
            break

    def both(folder: Path) -> None:
        authority = Authority(folder / "authority")
        authority.check()
        if not authority.last_statement.exists():
            authority.begin_signing_key()
            authority.finish_signing_key()

    assert at_every_kill(state, both, sound) > 4


def test_a_kill_in_the_middle_of_enrolling_leaves_nothing_half_and_the_same_command_goes_on(
    state: Path, tmp_path: Path
) -> None:
    invitation = invite(state)
    (tmp_path / "site").mkdir()

    def action(folder: Path) -> None:
        identity.enroll(folder, invitation, data=folder, state=folder / "s", device="cpu")

    def sound(folder: Path) -> None:
        request = Request.read((folder / f"{SITE}.request.json").read_bytes())
        assert request.public_key == identity.public_of(folder / "site.key").decode()
        assert (folder / "site.pub").read_bytes().startswith(request.public_key.encode())
        assert mode(folder / "site.key") == 0o600
        assert settings.load(folder / "site.toml", {}).coordinator_key.is_file()
        Invitations(state).check(request)

    assert at_every_kill(tmp_path / "site", action, sound) > 5


def test_a_kill_in_the_middle_of_an_approval_is_made_good_by_the_same_request_and_no_other(state: Path) -> None:
    invitation = invite(state)
    request, other = Request.make(invitation, new_key()), Request.make(invitation, new_key())
    assert Waiting(state).receive(request.file())[0] == 202
    steps = []
    for number in range(20):
        copy = state.with_name(f"copy-{number}")
        shutil.copytree(state, copy)
        flower = FlowerInMemory()  # lives on in this process; the child's is lost with it, as an answer would be
        died = killed_at(number, lambda copy=copy: ceremony.approve(copy, FlowerInMemory(), request))  # type: ignore[misc]
        if not died:
            break
        steps.append(number)
        if Registry(copy).site(SITE) is None:
            with contextlib.suppress(FednnunetError):
                ceremony.approve(copy, flower, request)
        assert Registry(copy).public_key(SITE) == request.public_key.encode()
        with numbered(Code.INVITATION_USED):
            ceremony.approve(copy, flower, other)
    assert len(steps) >= 3


def test_a_kill_in_the_middle_of_a_renaming_is_made_good_by_the_same_command(state: Path) -> None:
    ceremony.let_in(state, FlowerInMemory(), SITE, enrollment._line_of(new_key()).encode())

    def action(folder: Path) -> None:
        if Registry(folder).site(SITE) is not None:
            ceremony.rename(folder, SITE, "clinic", lambda *_: None)

    def sound(folder: Path) -> None:
        assert [site.name for site in Registry(folder).all()] == ["clinic"]

    assert at_every_kill(state, action, sound) >= 2


def test_a_new_key_is_taken_into_use_in_one_step_and_no_key_is_overwritten(state: Path, tmp_path: Path) -> None:
    site = enrolled(state, tmp_path / "site")
    first = site.site_key.read_bytes()
    invited = invite(state)
    identity.enroll(tmp_path / "site", invited, data=tmp_path, state=tmp_path / "s", device="cpu")
    assert site.site_key.read_bytes() == first  # the same site, the same federation: its key is used again
    with numbered(Code.STATE_NOT_READY):
        identity.enroll(tmp_path / "site", a_foreign_invitation(), data=tmp_path, state=tmp_path / "s", device="cpu")
    with numbered(Code.STATE_NOT_READY):
        identity.create(
            tmp_path / "site", name=SITE, orchestrator=ENDPOINT, data=tmp_path, state=tmp_path, device="cpu"
        )
    with numbered(Code.STATE_NOT_READY):
        identity.take_renewed(site)
    assert site.site_key.read_bytes() == first
    _, request = identity.renew(site)
    assert identity.renew(site)[1].public_key == request.public_key
    assert site.site_key.read_bytes() == first
    kept = identity.take_renewed(site)
    assert kept.read_bytes() == first
    assert identity.public_of(site.site_key).decode() == request.public_key
    assert [mode(path) for path in (kept, site.site_key)] == [0o600, 0o600]


def test_a_mistyped_state_folder_is_not_made(tmp_path: Path) -> None:
    typo = tmp_path / "typo"
    refused(command(FEDNNUNET, "site", "invite", SITE, "--state", typo, "--orchestrator", ENDPOINT, cwd=tmp_path), 113)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_write_one_audit_chain_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    pids = []
    for name in ("one", "two", "three"):
        pid = os.fork()
        if pid == 0:
            try:
                for number in range(15):
                    record(tmp_path, "event", who=name, number=number)
            finally:
                os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    path = tmp_path / "audit.jsonl"
    assert audit.verify(path) == 45
    with open(path, "ab") as stream:
        stream.write(b'{"torn')
    record(tmp_path, "after")
    assert audit.verify(path) == 46
    assert mode(path) == 0o600
    record(tmp_path, "long", text="x" * 200_000)  # longer than the piece that is read from the end
    record(tmp_path, "last")
    assert [line["event"] for line in audit.read(path)][-2:] == ["long", "last"]
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:3], *lines[4:]]))
    refused(command(FEDNNUNET, "audit", "verify", "--state", tmp_path, cwd=tmp_path), 504, "line 4")


# ---- the document ----------------------------------------------------------------------------------------------------


def test_every_command_and_option_in_the_document_exists() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "how-to" / "enroll-a-hospital.md").read_text("utf-8")
    programs = {
        name: typer.main.get_command(importlib.import_module(module).app)
        for name, module in (("fednnunet", FEDNNUNET), ("appliance", APPLIANCE), ("orchestrator", "orchestrator.cli"))
    }
    lines = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [line for block in lines for line in block.replace("\\\n", " ").splitlines()]
    seen = set()
    for line in [*lines, *re.findall(r"`((?:fednnunet|appliance|orchestrator) [^`]+)`", text)]:
        name, *words = line.split()
        if name not in programs:  # ssh-keygen
            continue
        at: Any = programs[name]
        path = [name]
        while getattr(at, "commands", None) and words and words[0] in at.commands:
            at = at.commands[words[0]]
            path.append(words.pop(0))
        assert not getattr(at, "commands", None), f"{line}: {words[:1]} is no command"
        known = {option for parameter in at.params for option in parameter.opts}
        for option in (word for word in words if word.startswith("-")):
            assert option in known, f"{option} of `{line}`"
        seen.add(" ".join(path[1:]))
    assert {"federation init", "site invite", "enroll", "site approve", "start", "site revoke", "trust"} <= seen
