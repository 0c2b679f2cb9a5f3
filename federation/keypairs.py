"""Private and public keys: read, signed with, checked against; one way for messages, invitations and image bundles.

The coordinator signs with Ed25519, a site with the NIST P-384 key that also proves it to Flower (ECDSA over SHA-384).
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from federation.errors import Code, FednnunetError

PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
UNREADABLE = (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm)
"""What `cryptography` raises for bytes that are no key (a compressed point: NotImplementedError)."""
_BEGIN, _END = b"-----BEGIN PUBLIC KEY-----", b"-----END PUBLIC KEY-----"


def sign(key: PrivateKey, data: bytes) -> bytes:
    """The signature of some bytes."""
    return key.sign(data) if isinstance(key, ed25519.Ed25519PrivateKey) else key.sign(data, ec.ECDSA(hashes.SHA384()))


def holds(key: PublicKey, signature: bytes, data: bytes) -> bool:
    """Whether the owner of a key has signed some bytes."""
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


def pem_blocks(pem: bytes) -> list[bytes]:
    """The public keys of a PEM text, one by one, without what people have written around them."""
    return [part[max(part.find(_BEGIN), 0) :] + _END + b"\n" for part in pem.split(_END)[:-1]]


def load_private(data: bytes, where: str) -> PrivateKey:
    """A private key, PEM or OpenSSH; raises FNU-113 that names `where`."""
    try:
        if b"OPENSSH PRIVATE KEY" in data:
            key: object = serialization.load_ssh_private_key(data, None)
        else:
            key = serialization.load_pem_private_key(data, None)
    except UNREADABLE as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{where} holds no private key") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise FednnunetError(Code.STATE_NOT_READY, f"{where}: neither Ed25519 nor elliptic curve")
    return key


def load_public(data: bytes, where: str) -> list[PublicKey]:
    """Public keys: one OpenSSH line, or PEM blocks one after the other; raises FNU-113 that names `where`.

    Comments may be in any letters: they are no part of a key.
    """
    try:
        found: list[object] = [serialization.load_pem_public_key(block) for block in pem_blocks(data)]
        if not found:
            found = [serialization.load_ssh_public_key(data.strip())]
    except UNREADABLE as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{where} holds no public key") from error
    keys = [key for key in found if isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey)]
    if len(keys) != len(found):
        raise FednnunetError(Code.STATE_NOT_READY, f"{where}: neither Ed25519 nor elliptic curve")
    return keys
