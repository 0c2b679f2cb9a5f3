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

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federation import keypairs
from federation.errors import Code, FednnunetError
from federation.keypairs import PrivateKey, PublicKey

MAX_MESSAGE = 64 * 2**20
"""Characters of a message, body and all: plans and fingerprints stay far below."""
Purpose = Literal["task", "answer"]
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
    raw = keypairs.sign(key, envelope.signed())
    signed = envelope.model_copy(update={"signature": base64.b64encode(raw).decode()})
    return signed.model_dump_json(), envelope.nonce


def open_message(
    text: str, purpose: Purpose, signer: str, trusted: Sequence[PublicKey], answers: str | None = None
) -> Opened:
    """Check a message and take its body out; raises FNU-620.

    Parameters
    ----------
    text : str
        What arrived.
    purpose, signer : str
        What it must be, and who must have signed it.
    trusted : sequence of PublicKey
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
    if not any(keypairs.holds(key, signature, envelope.signed()) for key in trusted):
        raise _refused(f"no key of {signer} has signed it")
    return Opened(envelope.body, envelope.nonce)


def _refused(why: str) -> FednnunetError:
    return FednnunetError(Code.SIGNATURE_REFUSED, why)
