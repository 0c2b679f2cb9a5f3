"""The authority of a federation: CA, server's certificate, coordinator's signing key, control token, runner's secret.

Rules:

- Private files have mode 0600. The folder appears whole or not at all, and a second `create` on it is refused.
- Certificates are NIST P-384, signed with SHA-384; the server's names are what hospitals will dial. The CA lives ten
  years, since every hospital holds it; the server's certificate 825 days, and never longer than the CA.
- The coordinator signs with Ed25519.
- What takes two files to change is first written whole as one (`server.next.pem`, `coordinator.next.key`); what
  was cut off in the middle is finished by the next `check`.

How each is rotated, and what the sites notice:

- certificate: a new key and certificate of the same CA. A running SuperLink takes it up; sites notice nothing.
- token, secret: `orchestrator start` must be started again; sites reconnect by themselves.
- signing key: in two steps. The first makes the next key and a statement about it, signed by the key of today; each
  site takes the statement in (`appliance trust`) and then trusts both. The second (`finish`) signs with the new one.
  A site that has not taken it in refuses every task from then on. A signing key that was *stolen* cannot be replaced
  this way, since the thief can make such statements too: then every site needs a new invitation.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import ipaddress
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from federation import enrollment, files
from federation.errors import Code, FednnunetError

DAYS = 825
CA_DAYS = 3650
SHORTEST = 32
"""Characters of a token or a secret, at least: `rotate` makes 43 and 64."""
_PEM = serialization.Encoding.PEM
_PLAIN = serialization.NoEncryption()


class Expiry(NamedTuple):
    """One certificate and its last day."""

    what: str
    names: list[str]
    until: dt.datetime

    def days_left(self, at: dt.datetime | None = None) -> int:
        """Whole days until it expires; negative afterwards."""
        return (self.until - (at or dt.datetime.now(dt.UTC))).days


@dataclass(frozen=True)
class Authority:
    """The authority's files below one folder."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The CA's certificate: given to every hospital."""
        return self.folder / "ca.crt"

    @property
    def ca_key(self) -> Path:
        """The CA's private key: needed by `rotate certificate` alone."""
        return self.folder / "ca.key"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.folder / "server.crt"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.folder / "server.key"

    @property
    def token(self) -> Path:
        """The control token."""
        return self.folder / "control.token"

    @property
    def secret(self) -> Path:
        """The secret between SuperLink and coordinator."""
        return self.folder / "runtime.secret"

    @property
    def signing_key(self) -> Path:
        """The coordinator's private signing key."""
        return self.folder / "coordinator.key"

    @property
    def signing_public(self) -> Path:
        """The coordinator's public key: given to every hospital."""
        return self.folder / "coordinator.pub"

    @property
    def next_key(self) -> Path:
        """The coordinator's next signing key, while a rotation is under way."""
        return self.folder / "coordinator.next.key"

    @property
    def statement(self) -> Path:
        """What sites take in to trust the next key, while a rotation is under way."""
        return self.folder / "coordinator.next.json"

    @property
    def last_statement(self) -> Path:
        """The statement about the key of today, for sites that trust the key before."""
        return self.folder / "coordinator.last.json"

    @property
    def _next_server(self) -> Path:
        return self.folder / "server.next.pem"

    def check(self) -> None:
        """Finish what was cut off; raise FNU-113 unless every file is there."""
        self._finish_certificate()
        self._finish_signing_key()
        needed = (self.ca, self.certificate, self.key, self.token, self.secret, self.signing_key, self.signing_public)
        for path in needed:
            if not path.is_file():
                mended = path in (self.signing_key, self.signing_public) and self.ca.is_file()
                raise FednnunetError(
                    Code.STATE_NOT_READY,
                    f"{path} is missing",
                    "Made by an earlier version: run `fednnunet federation rotate STATE signing-key` once."
                    if mended
                    else "Run `fednnunet federation init STATE --name HOST` first.",
                )

        for path, what in ((self.token, "token"), (self.secret, "secret")):
            if len(path.read_bytes().strip()) < SHORTEST:
                raise FednnunetError(
                    Code.STATE_NOT_READY,
                    f"{path} is empty or too short: whoever reaches the listener could guess it",
                    f"Make another: fednnunet federation rotate STATE {what}",
                )

    def signing(self) -> ed25519.Ed25519PrivateKey:
        """The coordinator's signing key, loaded."""
        return _ed25519(self.signing_key)

    def trusted(self) -> str:
        """PEM of what a new site shall trust: the coordinator's key and, during a rotation, the next one."""
        keys = [enrollment.pem(self.signing())]
        if self.next_key.is_file():
            keys.append(enrollment.pem(_ed25519(self.next_key)))
        return "".join(keys)

    def expiries(self) -> list[Expiry]:
        """CA and server certificate with their names and last days; raises FNU-113 where one cannot be read."""
        found = []
        for what, path in (("CA", self.ca), ("server", self.certificate)):
            certificate = _certificate_at(path)
            found.append(Expiry(what, _names(certificate) if what == "server" else [], certificate.not_valid_after_utc))
        return found

    # ---- rotation ----

    def rotate_certificate(self, names: list[str] | None = None, days: int = DAYS) -> None:
        """A new server key and certificate, by the same CA, for `names` or those of today.

        Raises FNU-112 for a name that is none, FNU-113 without the CA's key.
        """
        self._finish_certificate()
        ca = _certificate_at(self.ca)
        key, held = ec.generate_private_key(ec.SECP384R1()), names or _names(_certificate_at(self.certificate))
        new = _server_certificate(ca, _ec(self.ca_key), key, held, days)
        both = key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN) + new.public_bytes(_PEM)
        files.write_bytes(self._next_server, both, 0o600)
        self._finish_certificate()

    def _finish_certificate(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # another process may finish it at the same time
            key, mark, certificate = self._next_server.read_bytes().partition(b"-----BEGIN CERTIFICATE-----")
            files.write_bytes(self.key, key, 0o600)
            files.write_bytes(self.certificate, mark + certificate)
            self._next_server.unlink()

    def rotate_token(self) -> None:
        """A new control token."""
        files.write_bytes(self.token, secrets.token_urlsafe(32).encode(), 0o600)

    def rotate_secret(self) -> None:
        """A new secret between SuperLink and coordinator."""
        files.write_bytes(self.secret, secrets.token_hex(32).encode(), 0o600)

    def begin_signing_key(self) -> Path:
        """Make the coordinator's next key and the statement about it; again, the same. Returns the statement's path."""
        self._finish_signing_key()
        if not self.signing_key.is_file():  # an authority of a version that signed nothing
            _write_signing_key(self, ed25519.Ed25519PrivateKey.generate())
            return self.signing_public
        if not self.next_key.is_file():
            key = ed25519.Ed25519PrivateKey.generate()
            files.write_bytes(self.next_key, _pkcs8(key), 0o600)
        if not self.statement.is_file():
            statement = enrollment.Statement.make(self.signing(), _ed25519(self.next_key))
            files.write_bytes(self.statement, statement.file())
        return self.statement

    def finish_signing_key(self) -> None:
        """Sign with the next key from now on; raises FNU-113 when none was begun."""
        if not self.next_key.is_file():
            raise FednnunetError(
                Code.STATE_NOT_READY,
                "no rotation of the signing key is under way",
                "Begin it: `fednnunet federation rotate STATE signing-key`.",
            )
        self._switch(self.next_key.read_bytes())

    def _switch(self, key: bytes) -> None:
        files.write_bytes(self.signing_key, key, 0o600)
        files.write_bytes(self.signing_public, enrollment.pem(_ed25519(self.signing_key)).encode())
        with contextlib.suppress(FileNotFoundError):
            self.statement.replace(self.last_statement)
        self.next_key.unlink(missing_ok=True)

    def _finish_signing_key(self) -> None:
        if self.signing_key.is_file() and not self.signing_public.is_file():
            files.write_bytes(self.signing_public, enrollment.pem(self.signing()).encode())
        with contextlib.suppress(FileNotFoundError):
            if self.next_key.read_bytes() == self.signing_key.read_bytes():
                self._switch(self.next_key.read_bytes())

    # ---- Kubernetes ----

    def secrets_yaml(self) -> str:
        """Two Kubernetes Secrets: `fednnunet-authority` for TLS, `fednnunet-keys` for the rest; never the CA's key."""
        self.check()
        groups = {
            "fednnunet-authority": (self.ca, self.certificate, self.key),
            "fednnunet-keys": (self.token, self.secret, self.signing_key, self.signing_public),
        }
        lines = [f"# ca.key is in neither: it stays in {self.folder.name}/ and makes the next server certificate."]
        for name, paths in groups.items():
            lines += ["---", "apiVersion: v1", "kind: Secret", "metadata:", f"  name: {name}", "  labels:"]
            lines += ["    app.kubernetes.io/part-of: fednnunet", "type: Opaque", "data:"]
            lines += [f"  {path.name}: {base64.b64encode(path.read_bytes()).decode()}" for path in paths]
        return "\n".join(lines) + "\n"


def create(folder: Path, names: list[str]) -> Authority:
    """Make an authority whose server answers to `names` (DNS names or IP addresses); raises FNU-112 or FNU-113.

    Nothing is left of it when it is cut off: the folder appears in one rename.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FednnunetError(
            Code.STATE_NOT_READY, f"{folder} holds an authority already", "Use it, or choose another folder."
        )
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = _ca_certificate(ca_key)
    server = _server_certificate(ca, ca_key, server_key, names, DAYS)
    with files.disk_errors(folder), files.new_directory(folder) as beside:
        beside.chmod(0o700)
        made = Authority(beside)
        for path, key in ((made.ca_key, ca_key), (made.key, server_key)):
            files.write_bytes(path, key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN), 0o600)
        files.write_bytes(made.certificate, server.public_bytes(_PEM))
        made.rotate_token()
        made.rotate_secret()
        _write_signing_key(made, ed25519.Ed25519PrivateKey.generate())
        files.write_bytes(made.ca, ca.public_bytes(_PEM))
    return Authority(folder)


def _write_signing_key(authority: Authority, key: ed25519.Ed25519PrivateKey) -> None:
    files.write_bytes(authority.signing_key, _pkcs8(key), 0o600)
    files.write_bytes(authority.signing_public, enrollment.pem(key).encode())


def _pkcs8(key: ed25519.Ed25519PrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if not re.fullmatch(r"[A-Za-z0-9*]([A-Za-z0-9._-]{0,252})", name):
            raise FednnunetError(
                Code.SETTINGS_INVALID,
                f"--name {name!r} is neither a DNS name nor an address",
                "Give the name alone, without a port.",
            ) from None
        return x509.DNSName(name)


def _names(certificate: x509.Certificate) -> list[str]:
    held = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in held]


def _ca_certificate(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FednnU-Net federation CA")])
    builder = _certificate(name, name, key.public_key(), key.public_key(), _days_from_now(CA_DAYS))
    usage = {**dict.fromkeys(_USAGES, False), "key_cert_sign": True, "crl_sign": True}
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .sign(key, hashes.SHA384())
    )


def _server_certificate(
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePrivateKey,
    names: list[str],
    days: int,
) -> x509.Certificate:
    held = x509.SubjectAlternativeName([_general(each) for each in names])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    until = min(_days_from_now(days), ca.not_valid_after_utc)
    builder = _certificate(name, ca.subject, key.public_key(), ca_key.public_key(), until)
    usage = {**dict.fromkeys(_USAGES, False), "digital_signature": True}
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(held, critical=False)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


_USAGES = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


def _days_from_now(days: int) -> dt.datetime:
    return dt.datetime.now(dt.UTC) + dt.timedelta(days=days)


def _certificate(
    name: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    until: dt.datetime,
) -> x509.CertificateBuilder:
    """What CA and server have in common; key identifiers, since Python 3.13 refuses certificates without them."""
    start = min(dt.datetime.now(dt.UTC) - dt.timedelta(minutes=15), until - dt.timedelta(minutes=30))
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _certificate_at(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} cannot be read as a certificate") from error


def _ec(path: Path) -> ec.EllipticCurvePrivateKey:
    key = _private(path)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} is another kind of key")
    return key


def _ed25519(path: Path) -> ed25519.Ed25519PrivateKey:
    key = _private(path)
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} is another kind of key")
    return key


def _private(path: Path) -> object:
    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise FednnunetError(
            Code.STATE_NOT_READY, f"{path} cannot be read as a private key", "Restore it from a backup."
        ) from error
