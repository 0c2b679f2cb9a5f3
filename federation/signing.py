"""Signed messages: a task by the coordinator's key, an answer by the site's; TLS alone may end at a proxy.

Rules:

- What is signed names its purpose, the signer, a nonce, the nonce that it answers, and the SHA-256 of the body; the
  body names study, site, task, fold and round, and the SHA-256 of the weights file that travels beside it. So a
  signature fits one message of one kind from one signer, and an answer fits one sending of one task.
- The body travels as the text that was signed, never re-serialised: nothing is parsed before its signature holds.
- No clock takes part: a message is not too old by its date but by its nonce and its round, so a site whose clock is
  wrong trains on.
- The coordinator signs with Ed25519, a site with the NIST P-384 key that also proves it to Flower.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federation.errors import Code, FednnunetError

MAX_MESSAGE = 64 * 2**20
"""Characters of a message, body and all: plans and fingerprints stay far below."""
Purpose = Literal["task", "answer"]
PrivateKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey
PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey
Nonce = Field(pattern=r"^[0-9a-f]{32}$")


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    purpose: Purpose
    signer: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    nonce: str = Nonce
    answers: str | None = Field(None, pattern=r"^[0-9a-f]{32}$")
    body: str
    signature: str = Field(max_length=256)

    def signed(self) -> bytes:
        """The bytes that the signature is over."""
        digest = hashlib.sha256(self.body.encode()).hexdigest()
        parts = ("fednnunet message 1", self.purpose, self.signer, self.nonce, self.answers or "-", digest)
        return "\n".join(parts).encode()


@dataclass(frozen=True)
class Opened:
    """A message whose signature holds.

    Attributes
    ----------
    body : str
        The text that was signed.
    nonce : str
        Names this message.
    """

    body: str
    nonce: str


def sign(purpose: Purpose, body: str, signer: str, key: PrivateKey, answers: str | None = None) -> tuple[str, str]:
    """Sign a body.

    Parameters
    ----------
    purpose : str
        `task` or `answer`.
    body : str
        JSON text.
    signer : str
        `coordinator`, or the site's name.
    key : PrivateKey
        Ed25519 or NIST P-384.
    answers : str, optional
        The nonce of the task that an answer is to.

    Returns
    -------
    tuple of str
        The message to send, and its nonce.
    """
    envelope = _Envelope(
        purpose=purpose, signer=signer, nonce=secrets.token_hex(16), answers=answers, body=body, signature=""
    )
    data = envelope.signed()
    raw = key.sign(data) if isinstance(key, ed25519.Ed25519PrivateKey) else key.sign(data, ec.ECDSA(hashes.SHA384()))
    signed = envelope.model_copy(update={"signature": base64.b64encode(raw).decode()})
    return signed.model_dump_json(), envelope.nonce


def open_message(
    text: str, purpose: Purpose, signer: str, keys: Sequence[PublicKey], answers: str | None = None
) -> Opened:
    """Check a message and take its body out; raises FNU-620.

    Parameters
    ----------
    text : str
        What arrived.
    purpose, signer : str
        What it must be, and who must have signed it.
    keys : sequence of PublicKey
        The signer's keys; one must fit (during a rotation there are two).
    answers : str, optional
        The nonce of the task that it must answer.
    """
    if len(text) > MAX_MESSAGE:
        raise _refused(f"a message of {len(text)} characters")
    try:
        envelope = _Envelope.model_validate_json(text)
        signature = base64.b64decode(envelope.signature, validate=True)
    except (ValidationError, binascii.Error, ValueError) as error:
        raise _refused("not a signed message") from error
    if (envelope.purpose, envelope.signer) != (purpose, signer):
        raise _refused(f"a {envelope.purpose} of {envelope.signer}, not a {purpose} of {signer}")
    if envelope.answers != answers:
        raise _refused("an answer to another message")
    if not any(_holds(key, signature, envelope.signed()) for key in keys):
        raise _refused(f"no key of {signer} has signed it")
    return Opened(envelope.body, envelope.nonce)


def _refused(why: str) -> FednnunetError:
    return FednnunetError(Code.SIGNATURE_REFUSED, why)


def _holds(key: PublicKey, signature: bytes, data: bytes) -> bool:
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(signature, data)
        else:
            key.verify(signature, data, ec.ECDSA(hashes.SHA384()))
    except InvalidSignature:
        return False
    return True


# keys


def load_private(data: bytes, where: str) -> PrivateKey:
    """A private key, PEM or OpenSSH; raises FNU-113 that names `where`."""
    try:
        if b"OPENSSH PRIVATE KEY" in data:
            key: object = serialization.load_ssh_private_key(data, None)
        else:
            key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{where} holds no private key") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise FednnunetError(Code.STATE_NOT_READY, f"{where}: neither Ed25519 nor elliptic curve")
    return key


def load_public(data: bytes, where: str) -> list[PublicKey]:
    """Public keys: one OpenSSH line, or PEM blocks one after the other; raises FNU-113 that names `where`."""
    blocks = [part + b"-----END PUBLIC KEY-----\n" for part in data.split(b"-----END PUBLIC KEY-----")[:-1]]
    try:
        found: list[object] = [serialization.load_pem_public_key(block.lstrip()) for block in blocks]
        if not found:
            found = [serialization.load_ssh_public_key(data.strip())]
    except (ValueError, TypeError, NotImplementedError, UnsupportedAlgorithm) as error:
        raise FednnunetError(Code.STATE_NOT_READY, f"{where} holds no public key") from error
    keys = [key for key in found if isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey)]
    if len(keys) != len(found):
        raise FednnunetError(Code.STATE_NOT_READY, f"{where}: neither Ed25519 nor elliptic curve")
    return keys
