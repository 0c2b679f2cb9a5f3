"""How long a round is on the way: latency, and the speed of an upload; what cannot be measured is said to be so.

How it is measured without anything at the server for it: one POST to a path that the hospitals' listener refuses (404),
with a body in pieces that ends after three seconds or 32 MB, and behind it, on the same connection, GET /health. The
server reads the refused body and throws it away, and answers /health after the last byte of it: the time until then is
that of the upload, TLS and all. Something between that answers by itself (an ingress that refuses large bodies) closes
the connection or answers otherwise; then there is latency alone.

A download is not measured: the listener serves nothing large to whoever has no task.
"""

from __future__ import annotations

import http.client
import math
import os
import socket
import ssl
import statistics
import time

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Number, Private, fail, ok, skipped, warn
from federation.errors import Code

PATH = "/doctor"
SECONDS, MOST, PIECE = 3.0, 32 * 2**20, 64 * 2**10
NETWORK = {"full": 125e6, "half": 62e6, "int8": 31e6}
"""Bytes of the default network (31 M parameters) each way."""
CHUNK, AT_A_TIME, CHUNK_SECONDS = 5 * 2**20, 2, 500.0
"""How weights travel, and how long a chunk may take: a little less than federation.flower gives it (clients, state)."""
SLOW = 1800.0
"""Seconds of a round on the way that are worth a warning."""
BUFFER, PATIENCE = 2 * 2**20, 40.0
"""Bytes that wait in this machine's socket at most (at 20 ms there and back: 100 MB/s), and seconds for them."""


def check(context: Context) -> list[Finding]:
    """Time three connections, then an upload."""
    how = network.trust(context.settings)
    try:
        latency = [_latency(context, how) for _ in range(3)]
    except ssl.SSLCertVerificationError:
        return [skipped("the orchestrator's certificate does not hold", "See the check tls.")]
    except network.NotTested as reason:
        return [skipped(str(reason))]
    except (OSError, http.client.HTTPException) as error:
        private = {**network.private_place(context.settings), "error": Private(type(error).__name__, repr(error))}
        return [fail(Code.ORCHESTRATOR_UNREACHABLE, "[orchestrator] does not answer /health: [error]", private=private)]
    odd = {status for *_, status in latency} - {200}
    if odd:
        status = odd.pop()
        return [
            fail(
                Code.ORCHESTRATOR_UNREACHABLE,
                f"[orchestrator] answers /health with {status}, not 200",
                "Something else answers there, or the orchestrator is starting: ask the coordinator.",
                private=network.private_place(context.settings),
                measured={"answer": status},
            )
        ]
    connecting, handshake, request = (
        round(1000 * statistics.median(times[index] for times in latency), 1) for index in range(3)
    )
    findings = [
        ok(
            f"latency: {connecting:g} ms to connect, {handshake:g} ms for TLS, {request:g} ms for a request",
            measured={"connect_ms": connecting, "tls_ms": handshake, "request_ms": request},
        )
    ]
    try:
        findings.append(_judge(context, _upload(context, how), request / 1000))
    except TimeoutError:
        findings.append(
            warn(
                f"speed: not measured, the end of an upload was not confirmed within {PATIENCE:g} s. The line is "
                f"slower than {BUFFER / PATIENCE / 1e6:.2f} MB/s, or something between swallows what is sent",
                "Ask IT how fast this machine may send, and whether anything between holds large requests back.",
            )
        )
    return findings


def _latency(context: Context, how: ssl.SSLContext) -> tuple[float, float, float, int]:
    started = time.perf_counter()
    with network.connect(context) as raw:
        connected = time.perf_counter()
        with how.wrap_socket(raw, server_hostname=network.orchestrator(context.settings).host) as connection:
            secured = time.perf_counter()
            talk = network.session(context, connection)
            talk.request("GET", "/health")
            answer = talk.getresponse()
            answer.read(4096)
            ended = time.perf_counter()
    return connected - started, secured - connected, ended - secured, answer.status


def _upload(context: Context, how: ssl.SSLContext) -> tuple[int, float] | None:
    """Bytes and seconds until the server had taken them; None where that cannot be known."""
    piece = b"%x\r\n" % PIECE + os.urandom(PIECE) + b"\r\n"  # nothing on the way can make random bytes shorter
    host = str(network.orchestrator(context.settings))
    sent = 0
    try:
        with network.secure(context, how) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER // 2)  # the kernel takes twice of it
            connection.settimeout(PATIENCE)
            started = time.perf_counter()
            connection.sendall(
                f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n"
                "Content-Type: application/octet-stream\r\n\r\n".encode()
            )
            while sent < MOST and time.perf_counter() - started < SECONDS:
                connection.sendall(piece)
                sent += PIECE
            connection.sendall(f"0\r\n\r\nGET /health HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            with connection.makefile("rb") as stream:
                statuses = [_answer(stream), _answer(stream)]
            seconds = time.perf_counter() - started
    except TimeoutError:
        raise
    except (OSError, ValueError):
        return None
    return (sent, seconds) if statuses == [404, 200] else None


def _answer(stream: object) -> int:
    """Read one answer of a connection that carries several; raises ``ValueError`` or ``OSError``."""
    assert hasattr(stream, "readline")
    assert hasattr(stream, "read")
    words = stream.readline(1024).split(None, 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.1") or not words[1].isdigit():
        raise ValueError("no answer")
    length = 0
    for _ in range(100):
        line = stream.readline(8192)
        if line in (b"\r\n", b"\n", b""):
            break
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length":
            length = int(value)
        if name.strip().lower() == b"transfer-encoding":
            raise ValueError("an answer in pieces")
    if not 0 <= length <= 65536:
        raise ValueError("a long answer")
    stream.read(length)
    return int(words[1])


def _judge(context: Context, upload: tuple[int, float] | None, request: float) -> Finding:
    wire = context.study.wire if context.study is not None else "full"
    size = NETWORK[wire]
    if upload is None:
        return ok(
            "speed: not measured, for what answers here does not take a body that it refuses (an ingress, perhaps); "
            f"latency alone is known. The default network is {size / 1e6:g} MB each way and round"
        )
    sent, seconds = upload
    speed = sent / seconds
    trips = math.ceil(size / CHUNK) / AT_A_TIME * request
    way = size / speed + trips
    found = (
        f"upload: {_short(speed / 1e6)} MB/s ({sent / 1e6:.0f} MB in {seconds:.1f} s). The default network "
        f"({size / 1e6:g} MB) leaves in about {_duration(way)}; a round is {_duration(2 * way)} on the way if a "
        "download, which was not measured, is as fast"
    )
    measured: dict[str, Number] = {
        "upload_bytes": sent,
        "upload_seconds": round(seconds, 3),
        "upload_megabytes_per_second": round(speed / 1e6, 3),
        "round_seconds": round(2 * way, 1),
    }
    if CHUNK * AT_A_TIME / speed > CHUNK_SECONDS:
        return fail(
            Code.LINE_TOO_SLOW,
            found,
            f"Two chunks of {CHUNK / 2**20:g} MiB must travel within {CHUNK_SECONDS:g} s: ask IT for more bandwidth.",
            measured=measured,
        )
    if 2 * way > SLOW:
        smaller = "Ask IT for more bandwidth, and the coordinator for `wire: half` or `int8`."
        return warn(found, smaller, measured=measured)
    return ok(found, measured=measured)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{max(seconds, 0.1):.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
