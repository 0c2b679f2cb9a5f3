"""Dials the hospitals' listener while a CA certificate is all the trust there is: is it there, and the right one.

Rules:

- A proxy of the environment (`https_proxy`, `no_proxy`) is used, through CONNECT: TLS ends at the orchestrator.
- A certificate that does not hold is named: who signed it, for whom, for which days. So a hospital sees at once that a
  middlebox has opened its TLS.
- What the other side says is read up to a cap, and never shown as it is.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Iterator

from cryptography import x509
from cryptography.x509.oid import NameOID

from federation.errors import Code, FednnunetError
from federation.readable import printable

TIMEOUT = 15.0
_ANSWER = 4096
_EXPIRED, _NOT_YET, _NAME, _ADDRESS = 10, 9, 62, 64  # X509_V_ERR_*


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[ADDRESS]:PORT`; raises FNU-112."""
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise FednnunetError(Code.SETTINGS_INVALID, f"{endpoint!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def check(endpoint: str, ca: str) -> str:
    """See that the orchestrator answers there with a certificate of this CA; returns who signed the certificate.

    Raises FNU-604 (nobody answers), FNU-606 (another CA), FNU-607 (dates) or FNU-608 (name).
    """
    with _connected(endpoint, ca) as connection:
        assert isinstance(connection.sock, ssl.SSLSocket)
        seen = _describe(connection.sock.getpeercert(binary_form=True))
        status, _ = _ask(connection, endpoint, "GET", "/health", b"")
    if status != 200:
        raise FednnunetError(Code.ORCHESTRATOR_UNREACHABLE, f"{endpoint}: /health says {status}")
    return seen


def post(endpoint: str, ca: str, path: str, body: bytes) -> None:
    """POST a document; raises the numbered error that the other side names, FNU-609 where it names none."""
    with _connected(endpoint, ca) as connection:
        status, answer = _ask(connection, endpoint, "POST", path, body)
    if status in (200, 202):
        return
    try:
        code = Code.of(int(json.loads(answer)["code"]))
    except (ValueError, KeyError, TypeError):
        code = Code.ENROLLMENT_REFUSED
    raise FednnunetError(code, f"{endpoint} says {status}", f"Call the coordinator, who is told: {code.advice}")


def _ask(
    connection: http.client.HTTPSConnection, endpoint: str, method: str, path: str, body: bytes
) -> tuple[int, bytes]:
    try:
        connection.request(method, path, body or None, {"content-type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read(_ANSWER)
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(endpoint, error) from error


@contextlib.contextmanager
def _connected(endpoint: str, ca: str) -> Iterator[http.client.HTTPSConnection]:
    host, port = split(endpoint)
    context = ssl.create_default_context(cadata=ca)
    connection = _dial(host, port, context)
    try:
        connection.connect()
    except ssl.SSLCertVerificationError as error:
        connection.close()
        raise _distrusted(endpoint, error) from error
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        raise _unreachable(endpoint, error) from error
    try:
        yield connection
    finally:
        connection.close()


def _dial(host: str, port: int, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    proxy = urllib.request.getproxies().get("https")
    if not proxy or urllib.request.proxy_bypass(f"{host}:{port}"):
        return http.client.HTTPSConnection(host, port, timeout=TIMEOUT, context=context)
    parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = http.client.HTTPSConnection(parts.hostname or "", parts.port or 3128, timeout=TIMEOUT, context=context)
    headers = {}
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    return connection


def _unreachable(endpoint: str, error: Exception) -> FednnunetError:
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    if isinstance(error, socket.gaierror):
        said = f"the name is not known here ({said})"
    proxy = urllib.request.getproxies().get("https")
    through = f", through the proxy {urllib.parse.urlsplit(proxy).hostname or proxy}" if proxy else ""
    return FednnunetError(Code.ORCHESTRATOR_UNREACHABLE, f"{endpoint}{through}: {said}")


def _distrusted(endpoint: str, error: ssl.SSLCertVerificationError) -> FednnunetError:
    """Dial once more, trusting nobody and sending nothing, to name the certificate that was shown."""
    host, port = split(endpoint)
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
    connection = _dial(host, port, blind)
    try:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        seen = _describe(connection.sock.getpeercert(binary_form=True))
    except (OSError, http.client.HTTPException, ValueError):
        seen = "a certificate that cannot be read"
    finally:
        connection.close()
    code = {
        _EXPIRED: Code.CERTIFICATE_DATES,
        _NOT_YET: Code.CERTIFICATE_DATES,
        _NAME: Code.CERTIFICATE_NAME,
        _ADDRESS: Code.CERTIFICATE_NAME,
    }.get(error.verify_code, Code.CERTIFICATE_UNTRUSTED)
    return FednnunetError(code, f"{endpoint} shows {seen} ({error.verify_message})")


def _describe(der: bytes | None) -> str:
    """Whom a certificate is for, who signed it, for which days: text of theirs, cut to plain characters."""
    if not der:
        return "no certificate"
    certificate = x509.load_der_x509_certificate(der)
    try:
        held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names = ", ".join(str(name.value) for name in list(held)[:4])
    except (x509.ExtensionNotFound, ValueError):
        names = _name(certificate.subject)
    days = f"{certificate.not_valid_before_utc:%Y-%m-%d} to {certificate.not_valid_after_utc:%Y-%m-%d}"
    return printable(f"a certificate for {names}, signed by {_name(certificate.issuer)}, valid {days}")


def _name(name: x509.Name) -> str:
    for kind in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME):
        found = name.get_attributes_for_oid(kind)
        if found:
            return f'"{found[0].value!s}"'
    return "somebody without a name"
