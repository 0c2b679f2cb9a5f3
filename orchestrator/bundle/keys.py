"""Keys that sign bundles: Ed25519, in PEM files that openssl reads. Trust is a public key that a person compared."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from federation import keypairs
from federation.enrollment import fingerprint
from federation.errors import Code, FednnunetError
from federation.files import write_new

PRIVATE_MODE = 0o600


def generate(private: Path) -> Path:
    """Make a pair: `private` (PKCS8, mode 0600) and the public key beside it with the ending `.pub`.

    Returns
    -------
    Path
        The public key's file.
    """
    public = private.with_suffix(".pub")
    if public == private:
        raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, f"{private}: .pub is for the public key", "Choose another name.")
    for path in (private, public):
        if path.exists():
            raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, f"{path} is there already", "Choose another name.")
    key = ed25519.Ed25519PrivateKey.generate()
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_new(public, public_pem(key.public_key()))
    write_new(private, secret, PRIVATE_MODE)
    return public


def load_private(path: Path) -> ed25519.Ed25519PrivateKey:
    """The key to sign with; raises FNU-154."""
    try:
        key = keypairs.load_private(_read(path), str(path))
    except FednnunetError as error:
        raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, error.found) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, f"{path}: not an Ed25519 key")
    return key


def load_public(paths: Sequence[Path]) -> list[ed25519.Ed25519PublicKey]:
    """The keys that are trusted; raises FNU-154."""
    keys: list[ed25519.Ed25519PublicKey] = []
    for path in paths:
        try:
            found = keypairs.load_public(_read(path), str(path))
        except FednnunetError as error:
            raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, error.found) from error
        for key in found:
            if not isinstance(key, ed25519.Ed25519PublicKey):
                raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, f"{path}: not an Ed25519 key")
            keys.append(key)
    return keys


def public_pem(key: ed25519.Ed25519PublicKey) -> bytes:
    """The public key as PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def key_id(key: ed25519.Ed25519PublicKey) -> str:
    """SHA-256 of the public key (DER), in hex: how a bundle names its signer."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def words(key: ed25519.Ed25519PublicKey) -> str:
    """Six words and six digits of the key, for the phone."""
    return fingerprint(public_pem(key))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FednnunetError(Code.BUNDLE_KEY_UNUSABLE, f"{path}: {error.strerror}") from error
