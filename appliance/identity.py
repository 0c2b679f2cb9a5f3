"""A site's identity: its key pair, its settings file and what it trusts, made and kept at the site.

Rules:

- The private key is made here and never leaves; a key that is there is never overwritten.
- `enroll` can be cut off anywhere and repeated: a key that it has made for this very federation is used again.
- A new key for the same site lies beside (`site.key.next`) until the coordinator has approved it; taking it into use is
  one rename, and the key before is kept beside until somebody deletes it.
"""

from __future__ import annotations

import base64
import datetime as dt
import hashlib
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance import settings as site_settings
from appliance.settings import Settings
from federation import enrollment, files
from federation.enrollment import Invitation, Request, Statement
from federation.errors import Code, FednnunetError

_SSH = serialization.Encoding.OpenSSH


def create(config: Path, *, name: str, orchestrator: str, data: Path, state: Path, device: str) -> Path:
    """Write site.toml, site.key (mode 0600) and site.pub into `config`; returns the public key's path.

    ca.crt and coordinator.pub are to be laid beside them. Raises FNU-113 when there is a key already, FNU-112 when a
    setting is not valid.
    """
    private = config / "site.key"
    if private.exists():
        raise FednnunetError(
            Code.STATE_NOT_READY, f"{private} is there already", "Keep it, or move it away to make a new identity."
        )
    toml = _toml(name, orchestrator, data, state, device)
    files.write_bytes(config / "site.toml", toml)
    _new_key(private)
    return _write_public(private, name)


def enroll(
    config: Path, invitation: Invitation, *, data: Path, state: Path, device: str, extra_ca: bytes = b""
) -> tuple[Path, Request]:
    """Write all that the appliance needs into `config`, and the request that goes back to the coordinator.

    Parameters
    ----------
    config : Path
        Folder for site.toml, site.key, site.pub, ca.crt, coordinator.pub and the request.
    invitation : Invitation
        One that has been read and checked.
    data, state : Path
        Settings of the site.
    device : str
        Setting of the site.
    extra_ca : bytes
        PEM certificates to trust besides the invitation's: those of a middlebox that opens TLS.

    Returns
    -------
    Path, Request
        The request's file, and what it says.

    Raises
    ------
    FednnunetError
        FNU-113 when there is the key of another identity, FNU-112 when a setting or a certificate is not valid.
    """
    private, public_file = config / "site.key", config / "coordinator.pub"
    toml = _toml(invitation.site, invitation.orchestrator, data, state, device)
    ca = invitation.ca.encode() + _certificates(extra_ca)
    if private.exists():
        _check_ours(config, invitation)
    else:
        files.write_bytes(config / "site.toml", toml)
        files.write_bytes(public_file, invitation.coordinator.encode())
        _new_key(private)
    files.write_bytes(config / "ca.crt", ca)
    files.write_bytes(public_file, invitation.coordinator.encode())
    _write_public(private, invitation.site)
    request = Request.make(invitation, load_key(private))
    path = config / f"{invitation.site}.request.json"
    files.write_bytes(path, request.file())
    return path, request


def _check_ours(config: Path, invitation: Invitation) -> None:
    """Raise FNU-113 unless the key that is there was made for this site of this federation."""
    there = config / "site.key"
    other = FednnunetError(
        Code.STATE_NOT_READY,
        f"{there} is the key of another identity",
        "Keep it and enroll into another folder, or move it away. A new key for this site: `appliance enroll --renew`.",
    )
    if not (config / "site.toml").is_file():
        raise other
    settings = site_settings.load(config / "site.toml", {})
    if (settings.name, settings.orchestrator) != (invitation.site, invitation.orchestrator):
        raise other
    if settings.coordinator_key.is_file():
        held = enrollment.coordinator_keys(settings.coordinator_key.read_text())
        new = enrollment.coordinator_keys(invitation.coordinator)
        if not {key.public_bytes_raw() for key in held} & {key.public_bytes_raw() for key in new}:
            raise other


def renew(settings: Settings) -> tuple[Path, Request]:
    """Make a new key beside the present one, and the request to put it in its place; again, the same key."""
    coming = _beside(settings.site_key, ".next")
    if not coming.exists():
        _new_key(coming)
    request = Request.renewal(settings.name, load_key(settings.site_key), load_key(coming))
    path = settings.site_key.parent / f"{settings.name}.renewal.json"
    files.write_bytes(path, request.file())
    return path, request


def take_renewed(settings: Settings) -> Path:
    """Put the new key in use, which the coordinator has approved; returns where the key before is kept.

    Raises FNU-113 when there is no new key. Cut off at any point, there is always one whole key in use.
    """
    coming, key = _beside(settings.site_key, ".next"), settings.site_key
    if not coming.is_file():
        raise FednnunetError(
            Code.STATE_NOT_READY, f"no new key: {coming} is missing", "Make one: `appliance enroll --renew`."
        )
    load_key(coming)
    kept = _beside(key, f".before-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}")
    with files.disk_errors(key):
        os.link(key, kept)
        os.replace(coming, key)
        files.sync_directory(key.parent)
    _write_public(key, settings.name)
    return kept


def trust(settings: Settings, data: bytes, drop_old: bool) -> str:
    """Take in the coordinator's next key by its statement; returns the key's fingerprint. Raises FNU-114.

    Parameters
    ----------
    settings : Settings
        The site's.
    data : bytes
        The statement's file.
    drop_old : bool
        Trust the new key alone; else both, until the coordinator has switched.
    """
    path = settings.coordinator_key
    held = path.read_text(encoding="utf-8")
    statement = Statement.read(data, held)
    known = {key.public_bytes_raw() for key in enrollment.coordinator_keys(held)}
    (new,) = enrollment.coordinator_keys(statement.coordinator)
    if drop_old:
        files.write_bytes(path, statement.coordinator.encode())
    elif new.public_bytes_raw() not in known:
        files.write_bytes(path, (statement.replaces + statement.coordinator).encode())
    return enrollment.fingerprint(statement.coordinator.encode())


def fingerprint(public: Path) -> str:
    """SHA-256 fingerprint of a public key, as ssh-keygen -l prints it."""
    blob = base64.b64decode(public.read_bytes().split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A site's private key; raises FNU-113."""
    try:
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} cannot be read as a site's key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} is another kind of key")
    return key


def public_of(path: Path) -> bytes:
    """The public half of a private key, as an OpenSSH line."""
    return load_key(path).public_key().public_bytes(_SSH, serialization.PublicFormat.OpenSSH)


def _new_key(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    plain = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    try:
        files.write_new(path, plain, 0o600)
    except FileExistsError as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} is there already", "Keep it.") from error


def _write_public(private: Path, name: str) -> Path:
    public = private.with_name("site.pub")
    files.write_bytes(public, public_of(private) + f" {name}\n".encode())
    return public


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def _certificates(pem: bytes) -> bytes:
    if not pem:
        return b""
    try:
        found = x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise FednnunetError(Code.SETTINGS_INVALID, "--ca holds no PEM certificate") from error
    return b"".join(certificate.public_bytes(serialization.Encoding.PEM) for certificate in found)


def _toml(name: str, orchestrator: str, data: Path, state: Path, device: str) -> bytes:
    values = {
        "name": name,
        "orchestrator": orchestrator,
        "data": str(data),
        "state": str(state),
        "ca_certificate": "ca.crt",
        "site_key": "site.key",
        "coordinator_key": "coordinator.pub",
        "policy": "policy.toml",
        "device": device,
    }
    site_settings.load(None, {}, **values)
    return "".join(f"{key} = {_quoted(value)}\n" for key, value in values.items()).encode()


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
