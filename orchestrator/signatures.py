"""The coordinator's side of signed messages: it signs tasks, and opens answers with the keys of the registry.

Rules:

- A site that is not registered is not asked: a round does not wait for one that was revoked.
- Every answer is checked against the registry as it is at that moment: a site that is revoked in mid-study is out with
  its next answer.
- An answer must name the very sending of the task that it answers: what a site has said before cannot be said again
  for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from federation import keypairs, signing
from federation.errors import Code, FednnunetError

COORDINATOR = "coordinator"


class Signatures(Protocol):
    """What an exchange needs to know of signatures."""

    def check_site(self, site: str) -> None:
        """Raise FNU-508 for a site that is not registered, or was revoked."""

    def sign_task(self, body: str) -> tuple[str, str]:
        """The message to send, and its nonce."""

    def open_answer(self, site: str, text: str, nonce: str) -> str:
        """The body of an answer to the message with this nonce; raises FNU-508 or FNU-620."""


class CoordinatorSignatures:
    """Signs with the authority's key; knows the sites by the registry.

    Parameters
    ----------
    key : keypairs.PrivateKey
        The coordinator's signing key.
    public_key : callable
        ``public_key(site)``: the OpenSSH line of a site's key, None for a site that is unknown or revoked.
    """

    def __init__(self, key: keypairs.PrivateKey, public_key: Callable[[str], bytes | None]) -> None:
        self._key, self._public_key = key, public_key

    def check_site(self, site: str) -> None:
        """Raise FNU-508 for a site that is not registered, or was revoked."""
        self._key_of(site)

    def sign_task(self, body: str) -> tuple[str, str]:
        """The message to send, and its nonce."""
        return signing.sign("task", body, COORDINATOR, self._key)

    def open_answer(self, site: str, text: str, nonce: str) -> str:
        """The body of an answer to the message with this nonce; raises FNU-508 or FNU-620."""
        keys = keypairs.load_public(self._key_of(site), f"the registry's entry of {site}")
        return signing.open_message(text, "answer", site, keys, nonce).body

    def _key_of(self, site: str) -> bytes:
        line = self._public_key(site)
        if line is None:
            raise FednnunetError(Code.SITE_NOT_REGISTERED, site)
        return line
