"""Stands in for signatures where a test is about something else; tests/test_trust.py has the real ones."""

from __future__ import annotations


class Unsigned:
    """Messages that nobody signs (orchestrator.signatures.Signatures)."""

    def check_site(self, site: str) -> None:
        """Everybody is registered."""

    def sign_task(self, body: str) -> tuple[str, str]:
        """The body itself."""
        return body, ""

    def open_answer(self, site: str, text: str, nonce: str) -> str:
        """The text itself."""
        return text
