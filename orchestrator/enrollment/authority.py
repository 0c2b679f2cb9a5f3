"""The authority of a federation: its CA, the server's certificate, the control token, the runner's secret.

Rules:

- Private files are made with mode 0600 and never overwritten: a second `create` on the same folder is refused.
- Certificates are NIST P-384, signed with SHA-384; the server's names are what hospitals will dial.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from federation import files
from federation.errors import Code, FednnunetError

DAYS = 825
_PEM = serialization.Encoding.PEM
_PLAIN = serialization.NoEncryption()


@dataclass(frozen=True)
class Authority:
    """The authority's files below one folder."""

    folder: Path

    @property
    def ca(self) -> Path:
        """The CA's certificate: given to every hospital."""
        return self.folder / "ca.crt"

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

    def check(self) -> None:
        """Raise FNU-113 unless every file is there."""
        for path in (self.ca, self.certificate, self.key, self.token, self.secret):
            if not path.is_file():
                raise FednnunetError(
                    Code.STATE_NOT_READY,
                    f"{path} is missing",
                    "Run `fednnunet federation init STATE --name HOST` first.",
                )


def create(folder: Path, names: list[str]) -> Authority:
    """Make an authority whose server answers to `names` (DNS names or IP addresses); raises FNU-113 if there is one."""
    authority = Authority(folder)
    if authority.ca.exists():
        raise FednnunetError(
            Code.STATE_NOT_READY, f"{folder} holds an authority already", "Use it, or choose another folder."
        )
    with files.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FednnU-Net federation CA")])
    server_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0][:64])])
    alternative: list[x509.GeneralName] = []
    for name in names:
        try:
            alternative.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            alternative.append(x509.DNSName(name))
    server = _certificate(server_name, server_key, ca_name, ca_key, x509.SubjectAlternativeName(alternative))
    for path, key in ((folder / "ca.key", ca_key), (authority.key, server_key)):
        files.write_bytes(path, key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN), 0o600)
    files.write_bytes(authority.certificate, server.public_bytes(_PEM))
    files.write_bytes(authority.token, secrets.token_urlsafe(32).encode(), 0o600)
    files.write_bytes(authority.secret, secrets.token_hex(32).encode(), 0o600)
    files.write_bytes(authority.ca, _certificate(ca_name, ca_key, ca_name, ca_key, None).public_bytes(_PEM))
    return authority


def _certificate(
    name: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
    alternative: x509.SubjectAlternativeName | None,
) -> x509.Certificate:
    now = dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(minutes=15))
        .not_valid_after(now + dt.timedelta(days=DAYS))
        .add_extension(x509.BasicConstraints(ca=alternative is None, path_length=None), critical=True)
    )
    if alternative is not None:
        builder = builder.add_extension(alternative, critical=False)
    return builder.sign(issuer_key, hashes.SHA384())
