"""A site's identity: its key pair and its settings file, made at the site."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from appliance import settings as site_settings
from federation import files
from federation.errors import Code, FednnunetError

_SSH = serialization.Encoding.OpenSSH


def create(config: Path, *, name: str, orchestrator: str, data: Path, state: Path, device: str) -> Path:
    """Write site.toml, site.key (mode 0600) and site.pub into `config`; returns the public key's path.

    Raises FNU-113 when there is a key already, FNU-112 when a setting is not valid.
    """
    private, public, toml = config / "site.key", config / "site.pub", config / "site.toml"
    if private.exists():
        raise FednnunetError(
            Code.STATE_NOT_READY, f"{private} is there already", "Keep it, or move it away to make a new identity."
        )
    values = {
        "name": name,
        "orchestrator": orchestrator,
        "data": str(data),
        "state": str(state),
        "ca_certificate": "ca.crt",
        "site_key": "site.key",
        "device": device,
    }
    site_settings.load(None, {}, **values)
    lines = [f"{key} = {_quoted(value)}\n" for key, value in values.items()]
    files.write_bytes(toml, "".join(lines).encode())
    key = ec.generate_private_key(ec.SECP384R1())
    plain = serialization.NoEncryption()
    files.write_bytes(
        private, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, plain), 0o600
    )
    line = key.public_key().public_bytes(_SSH, serialization.PublicFormat.OpenSSH)
    files.write_bytes(public, line + f" {name}\n".encode())
    return public


def fingerprint(public: Path) -> str:
    """SHA-256 fingerprint of a public key, as ssh-keygen -l prints it."""
    blob = base64.b64decode(public.read_bytes().split()[1])
    return "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")


def _quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
