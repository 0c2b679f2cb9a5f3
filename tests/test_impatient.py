"""Connections that hold the listener open for nothing, and those that only take their time: both sides' patience."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from commands import wait_for
from flwr.supernode.fleet_http_client import FleetHttpClient

from federation.flower import clients, impatient, lines
from federation.processes import free_port
from orchestrator.enrollment.authority import create

SLOW = 1.0
"""Seconds until an answer begins: longer than a head may take."""
REQUEST = b"POST /echo HTTP/1.1\r\nhost: here\r\ncontent-length: 4\r\n\r\n"


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with the body, after a while."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message["more_body"]
    await asyncio.sleep(SLOW)
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": bytes(body)})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[uvicorn.Server]:
    monkeypatch.setattr(impatient, "HEAD", 0.5)
    monkeypatch.setattr(impatient, "BODY", 1.5)
    server = uvicorn.Server(
        uvicorn.Config(echo, port=free_port(), http=impatient.Impatient, lifespan="off", log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server
    server.should_exit = True
    thread.join()


@pytest.fixture
def port(server: uvicorn.Server) -> int:
    return int(server.config.port)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch, port: int) -> int:
    """The port, for requests that are waited for, however slow the machine."""
    monkeypatch.setattr(impatient, "HEAD", 60.0)
    monkeypatch.setattr(impatient, "BODY", 60.0)
    return port


def connection(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def is_ended(held: socket.socket) -> bool:
    """The other side ends it, without an answer."""
    try:
        return held.recv(1) == b""
    except ConnectionResetError:
        return True


def answer(held: socket.socket) -> bytes:
    told = b""
    while not told.endswith(b"body"):
        more = held.recv(1)  # and nothing of the next one
        assert more, told
        told += more
    return told


@pytest.mark.parametrize("sent", [b"", b"POST /e", b"\r\n", REQUEST[:-2]])
def test_a_head_that_does_not_end_is_not_waited_for(port: int, sent: bytes) -> None:
    with connection(port) as held:
        held.sendall(sent)
        assert is_ended(held)


def test_a_head_that_comes_byte_by_byte_is_not_waited_for(port: int) -> None:
    with connection(port) as held:
        try:
            for number in range(len(REQUEST)):
                held.sendall(REQUEST[number : number + 1])
                time.sleep(0.1)
        except OSError:
            return
        assert is_ended(held)


def test_a_body_that_does_not_end_is_not_waited_for(port: int) -> None:
    with connection(port) as held:
        held.sendall(REQUEST + b"bo")
        assert is_ended(held)


def test_a_slow_body_and_a_slow_answer_are_waited_for_and_the_connection_stays(
    unhurried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(impatient, "HEAD", 1.5)
    monkeypatch.setattr(sys.modules[__name__], "SLOW", 2.0)
    with connection(unhurried) as held:
        for _ in range(2):
            held.sendall(REQUEST + b"bo")
            time.sleep(2.0)
            held.sendall(b"dy")
            assert answer(held).startswith(b"HTTP/1.1 200")


def test_an_answer_that_is_not_taken_is_not_kept(server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 32 * 2**20  # more than the operating system's buffers hold
    monkeypatch.setattr(impatient, "HEAD", 60.0)
    with connection(server.config.port) as held:
        monkeypatch.setattr(impatient, "BODY", 60.0)  # the body itself may take its time
        held.sendall(REQUEST.replace(b" 4", b" %d" % size))
        held.sendall(bytes(size - 1))
        monkeypatch.setattr(impatient, "BODY", 1.5)
        held.sendall(b".")
        wait_for(lambda: not server.server_state.connections, 60, "the end of the connection")
        taken = 0
        with contextlib.suppress(ConnectionResetError):
            while piece := held.recv(2**20):
                taken += len(piece)
        assert taken < size


@pytest.mark.parametrize("flood", ["heads", "address", "trailers"])
def test_what_has_no_end_is_not_kept(port: int, flood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(impatient, "HEAD", 60.0)
    monkeypatch.setattr(impatient, "BODY", 60.0)
    begin, piece = {
        "heads": (b"POST /echo HTTP/1.1\r\n", b"a:\r\n"),
        "address": (b"POST /", b"a"),
        "trailers": (b"POST /echo HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n", b"a: b\r\n"),
    }[flood]
    with connection(port) as held, pytest.raises(OSError):
        held.sendall(begin)
        for _ in range(3000):  # more than the operating system's buffers hold
            held.sendall(piece * (16_000 // len(piece)))


def test_one_request_may_wait_for_the_answer_to_the_one_before_and_no_more(unhurried: int) -> None:
    """A client whose answer is there all but for its end, which is empty, sends the next one."""
    with connection(unhurried) as held:
        held.sendall((REQUEST + b"body") * 2)
        assert answer(held).startswith(b"HTTP/1.1 200")
        assert answer(held).startswith(b"HTTP/1.1 200")
        held.sendall((REQUEST + b"body") * 3)
        assert is_ended(held)


@pytest.mark.parametrize("sent", [b"\r\n", b"G"])
def test_what_follows_an_answer_has_to_become_a_request(
    unhurried: int, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connection(unhurried) as held:
        held.sendall(REQUEST + b"body")
        answer(held)
        monkeypatch.setattr(impatient, "HEAD", 0.5)
        held.sendall(sent)
        assert is_ended(held)


def test_a_site_waits_longer_for_the_answer_to_a_larger_upload(unhurried: int) -> None:
    """Flower gives up 30 s after the last byte has gone into a buffer: a slow line would never be done with a chunk."""
    body, here = bytes(100_000), f"http://127.0.0.1:{unhurried}"
    with pytest.raises(httpx.ReadTimeout):
        FleetHttpClient(here, timeout=0.3)._client.post(here, content=body)
    patient = clients.FleetClient(here, timeout=0.3)
    assert patient._client.post(here, content=body).content == body
    with pytest.raises(httpx.ReadTimeout):
        patient._client.post(here, content=b"x")


@pytest.fixture
def slow_reader(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    """A TLS server that takes in 4 MB a second, and answers then; its port and the authority's certificate."""
    authority = create(tmp_path / "authority", ["127.0.0.1"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**14)
    listening.bind(("127.0.0.1", 0))
    listening.listen()

    def serve() -> None:
        while True:
            try:
                plain, _ = listening.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as held:
                taken = held.recv(2**14)
                end = taken.index(b"\r\n\r\n") + 4 + int(re.findall(rb"(?i)content-length: (\d+)", taken)[0])
                size = len(taken)
                while size < end and (piece := held.recv(2**14)):
                    size += len(piece)
                    time.sleep(len(piece) / 4e6)
                held.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening.getsockname()[1], authority.ca.read_bytes()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


def test_over_tls_a_body_is_one_write_and_has_time_for_its_size(slow_reader: tuple[int, bytes]) -> None:
    """Python's TLS takes the time limit of a write for the whole of it, however much has gone by then."""
    port, ca = slow_reader
    context = ssl.create_default_context(cadata=ca.decode())
    body, here, most = bytes(12_000_000), f"https://127.0.0.1:{port}", httpx.Timeout(1.0, connect=60.0)
    with pytest.raises(httpx.WriteTimeout):
        FleetHttpClient(here, timeout=most, verify=context)._client.post(here, content=body)
    assert clients.FleetClient(here, timeout=most, verify=context)._client.post(here, content=body).content == b"ok"


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux")
def test_the_kernel_ends_a_sites_connection_whose_other_side_acknowledges_nothing(
    unhurried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, int]] = []
    watch = clients._watch

    def look(event: str, told: dict[str, Any]) -> None:
        watch(event, told)
        if event == "connection.connect_tcp.complete":
            connected = told["return_value"].get_extra_info("socket")
            lost = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
            found.append((connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), lost))

    monkeypatch.setattr(clients, "_watch", look)
    here = f"http://127.0.0.1:{unhurried}"
    assert clients.FleetClient(here)._client.post(here, content=b"x").content == b"x"
    assert found == [(1, lines.DEAD * 1000)]
