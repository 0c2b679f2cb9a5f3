"""The way to the orchestrator, as the appliance itself goes it: directly or through the proxy that Flower would take.

Rules:

- Flower's client is httpx, which reads HTTPS_PROXY, ALL_PROXY and NO_PROXY from the environment; httpx is asked, so
  that the doctor takes the same way (tests/test_doctor.py holds Flower's own client to it).
- The orchestrator's certificate is checked as Flower checks it: against `ca_certificate` and nothing else.
  SSL_CERT_FILE and the system's authorities have no say.
- No step waits longer than the context's timeout.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass

from cryptography import x509

from appliance.doctor.context import Context
from appliance.doctor.finding import Private
from appliance.settings import Settings
from federation.errors import Code, FednnunetError

_MOST_HEADER = 16384


@dataclass(frozen=True)
class Place:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_address(self) -> bool:
        """Whether the host is an IP address: there is no name to look up."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True


class ProxyRefused(OSError):
    """The proxy did not open a way; `status` is its answer, 0 when it gave none."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"the proxy answered {status} {reason}" if status else f"the proxy gave no answer: {reason}")
        self.status = status


class NotTested(Exception):
    """The doctor cannot go this way, the appliance can; says why."""


def orchestrator(settings: Settings) -> Place:
    """The hospitals' listener, from site.toml."""
    host, _, port = settings.orchestrator.rpartition(":")
    return Place(host.strip("[]"), int(port))


def private_place(settings: Settings) -> dict[str, Private]:
    """The marker ``[orchestrator]``."""
    return {"orchestrator": Private("the orchestrator's address", str(orchestrator(settings)))}


def proxy_for(url: str) -> str | None:
    """The proxy that Flower's client takes for a URL; None: none. Raises FNU-704 without httpx."""
    try:
        import httpx
        from httpx._utils import URLPattern, get_environment_proxies
    except ImportError as error:
        raise FednnunetError(Code.EXTRA_MISSING, f"not installed: {error.name}") from error
    proxies = get_environment_proxies()
    for pattern in sorted(map(URLPattern, proxies)):  # as httpx.Client does
        if pattern.matches(httpx.URL(url)):
            return proxies[pattern.pattern]
    return None


def proxy(settings: Settings) -> str | None:
    """The proxy on the way to the orchestrator."""
    return proxy_for(f"https://{orchestrator(settings)}")


def proxy_place(url: str) -> Place:
    """Where a proxy listens."""
    parts = urllib.parse.urlsplit(url)
    return Place(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))


def first_stop(settings: Settings) -> Place:
    """What this machine itself has to reach: the proxy where there is one, else the orchestrator."""
    way = proxy(settings)
    return proxy_place(way) if way else orchestrator(settings)


def connect(context: Context) -> socket.socket:
    """A TCP connection to the orchestrator, through the proxy where one is set.

    Raises ``OSError``, `ProxyRefused`, or `NotTested` for a proxy that is itself behind TLS or speaks SOCKS.
    """
    place, way = orchestrator(context.settings), proxy(context.settings)
    if way is None:
        return socket.create_connection((place.host, place.port), context.timeout)
    parts = urllib.parse.urlsplit(way)
    if parts.scheme != "http":
        raise NotTested("the doctor speaks to http:// proxies alone, and another kind is set")
    stop = proxy_place(way)
    connection = socket.create_connection((stop.host, stop.port), context.timeout)
    try:
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}"]
        if parts.username is not None:
            given = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(given.encode()).decode()}")
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        _read_answer(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _read_answer(connection: socket.socket) -> None:
    head = b""
    try:
        while b"\r\n\r\n" not in head and len(head) < _MOST_HEADER:
            piece = connection.recv(1)  # not a byte more: what follows is TLS
            if not piece:
                break
            head += piece
    except TimeoutError:
        raise ProxyRefused(0, "timed out") from None
    words = head.split(b"\r\n")[0].decode("latin-1").split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
        raise ProxyRefused(0, "it does not speak HTTP")
    if not words[1].startswith("2"):
        raise ProxyRefused(int(words[1]), words[2] if len(words) > 2 else "")


def authorities(settings: Settings) -> list[x509.Certificate]:
    """The certificates of `ca_certificate`; raises FNU-614."""
    try:
        found = x509.load_pem_x509_certificates(settings.ca_certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise FednnunetError(Code.CA_CERTIFICATE_UNUSABLE, f"{settings.ca_certificate}: {error}") from error
    return found


def trust(settings: Settings) -> ssl.SSLContext:
    """How Flower's client checks the orchestrator; raises FNU-614."""
    authorities(settings)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=settings.ca_certificate.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise FednnunetError(Code.CA_CERTIFICATE_UNUSABLE, f"{settings.ca_certificate}: {error}") from error
    return context


def no_trust() -> ssl.SSLContext:
    """For one purpose: to look at a certificate that does not verify. Nothing is sent that has a meaning."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@contextlib.contextmanager
def secure(context: Context, how: ssl.SSLContext) -> Iterator[ssl.SSLSocket]:
    """A TLS connection to the orchestrator."""
    with connect(context) as raw:
        with how.wrap_socket(raw, server_hostname=orchestrator(context.settings).host) as connection:
            yield connection


def shown_certificate(context: Context) -> x509.Certificate:
    """The certificate that is shown on this way, without a check of it."""
    with secure(context, no_trust()) as connection:
        return x509.load_der_x509_certificate(connection.getpeercert(True) or b"")


def session(context: Context, connection: ssl.SSLSocket) -> http.client.HTTPConnection:
    """HTTP over a connection that is there."""
    place = orchestrator(context.settings)
    talk = http.client.HTTPConnection(place.host, place.port, timeout=context.timeout)
    talk.sock = connection
    return talk
