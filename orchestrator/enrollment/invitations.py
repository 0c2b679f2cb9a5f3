"""The invitations that were given out: one file STATE/invitations/ID.json for each, used once.

Rules:

- Of a token only the SHA-256 stays here. The proof is checked before all else: who does not have the token learns
  nothing from the answer.
- An invitation is used by one key. It is marked with the key before the key is registered, so an approval that was cut
  off can be repeated with the same request, and with no other.
- Inviting a site again, revoking or refusing it withdraws what was given out before.
"""

from __future__ import annotations

import hmac
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from federation import enrollment, files
from federation.enrollment import Invitation, Request
from federation.errors import Code, FednnunetError
from federation.study import SiteName
from orchestrator.enrollment.authority import Authority
from orchestrator.enrollment.registry import Registry, check_name


class Given(BaseModel):
    """What is kept of an invitation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: enrollment.InvitationId
    site: SiteName
    token_sha256: str
    not_before: str
    not_after: str
    used_by: enrollment.PublicLine | None = None
    withdrawn: bool = False


class Invitations:
    """The invitations of a federation.

    Parameters
    ----------
    state : Path
        The orchestrator's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._folder, self._state = state / "invitations", state

    def give(self, site: str, orchestrator: str, days: float) -> Invitation:
        """Make an invitation for a site that takes no part yet; raises FNU-112 or FNU-124."""
        there = Registry(self._state).site(check_name(site))
        if there is not None and there.state == "approved":
            raise FednnunetError(
                Code.SITE_TAKEN, f"{site} takes part already", "`fednnunet site renew` for a new key, or revoke it."
            )
        if not 0 < days <= 90:
            raise FednnunetError(Code.SETTINGS_INVALID, f"--days {days:g}: more than 0, at most 90")
        authority = Authority(self._state / "authority")
        authority.check()
        invitation = Invitation.make(
            site, orchestrator, authority.ca.read_text(), authority.trusted(), authority.signing(), days
        )
        self.withdraw(site)
        self._write(
            Given(
                id=invitation.id,
                site=site,
                token_sha256=invitation.token_sha256,
                not_before=invitation.not_before,
                not_after=invitation.not_after,
            )
        )
        return invitation

    def check(self, request: Request) -> Given:
        """The invitation of a request that may be let in by it.

        Raises FNU-117 (no invitation, another site's, or a proof that does not hold), FNU-115 (dates) or FNU-116 (used
        by another key, withdrawn, or used up).
        """
        given = self._find(request.invitation or "")
        key = given.token_sha256 if given is not None else "00" * 32
        line = enrollment.proof(key, request.invitation or "", request.site, request.public_key)
        if not hmac.compare_digest(line, request.proof or "") or given is None or given.site != request.site:
            raise FednnunetError(Code.INVITATION_UNKNOWN, f"a request in the name of {request.site}")
        if given.withdrawn:
            raise FednnunetError(Code.INVITATION_USED, f"invitation {given.id} was withdrawn")
        site = Registry(self._state).site(given.site)
        if given.used_by not in (None, request.public_key) or (site is not None and site.by == given.id):
            raise FednnunetError(Code.INVITATION_USED, f"invitation {given.id} of {given.site}")
        enrollment.check_dates(given.not_before, given.not_after)
        return given

    def use(self, given: Given, public_key: str) -> None:
        """Mark an invitation as used by a key."""
        self._write(given.model_copy(update={"used_by": public_key}))

    def withdraw(self, site: str) -> int:
        """Let no invitation of a site count any more that has not been used; how many those were."""
        mine = [given for given in self.all() if given.site == site and given.used_by is None and not given.withdrawn]
        for given in mine:
            self._write(given.model_copy(update={"withdrawn": True}))
        return len(mine)

    def all(self) -> list[Given]:
        """Every invitation that was given out."""
        names = (path.stem for path in self._folder.glob("*.json"))
        return [given for name in sorted(names) if (given := self._find(name)) is not None]

    def _find(self, name: str) -> Given | None:
        if not re.fullmatch(r"[0-9a-f]{16}", name):
            return None
        path = self._folder / f"{name}.json"
        try:
            return Given.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise FednnunetError(Code.REGISTRY_DAMAGED, str(path)) from error

    def _write(self, given: Given) -> None:
        files.write_bytes(self._folder / f"{given.id}.json", given.model_dump_json(indent=1).encode() + b"\n", 0o600)
