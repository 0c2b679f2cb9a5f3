"""Who may take part: one file STATE/sites/NAME.json for each site.

Rules:

- A site is approved or revoked; only an approved one has a public key here.
- Adding, changing or removing one site touches no other's file; each file is written whole.
- What is asked is read anew from the disk: a revocation counts with the next question.
- A key belongs to one site, once: a key that was revoked or replaced never comes back, under no name.
- One change at a time: `changing` holds a lock file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federation import files
from federation.enrollment import PublicLine, fingerprint, now, public_line
from federation.errors import Code, FednnunetError
from federation.study import SITE_NAME, SiteName

FOLDER = "sites"


class EarlierKey(BaseModel):
    """A key that the site had once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    public_key: PublicLine
    until: str


class Site(BaseModel):
    """One site of the federation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: SiteName
    public_key: PublicLine
    state: Literal["approved", "revoked"]
    added_at: str
    by: Annotated[str, Field(description="Id of the invitation, or `hand`.")]
    changed_at: str
    earlier_keys: tuple[EarlierKey, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Words and digits of its key."""
        return fingerprint(self.public_key.encode())

    def has_had(self, line: str) -> bool:
        """Whether a key is, or once was, this site's."""
        return line == self.public_key or any(line == earlier.public_key for earlier in self.earlier_keys)


def check_name(name: str) -> str:
    """The name, when it is a site's; raises FNU-112 for anything else, above all a path."""
    if not re.fullmatch(SITE_NAME, name):
        raise FednnunetError(Code.SETTINGS_INVALID, f"site name {name[:80]!r}: lower case, digits, - and _")
    return name


class Registry:
    """The sites of a federation.

    Parameters
    ----------
    state : Path
        The orchestrator's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._folder = state / FOLDER

    def public_key(self, name: str) -> bytes | None:
        """The OpenSSH line of an approved site's key, read anew; None for a site that is unknown or revoked."""
        if not re.fullmatch(SITE_NAME, name):
            return None
        site = self.site(name)
        return site.public_key.encode() if site is not None and site.state == "approved" else None

    def site(self, name: str) -> Site | None:
        """A site as it stands now, None where there is none; raises FNU-126 for a file that cannot be read."""
        path = self._path(name)
        try:
            site = Site.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (ValidationError, OSError) as error:
            raise FednnunetError(Code.REGISTRY_DAMAGED, str(path)) from error
        if site.name != name:
            raise FednnunetError(Code.REGISTRY_DAMAGED, f"{path} speaks of {site.name}")
        return site

    def all(self) -> list[Site]:
        """Every site, in the order of names."""
        names = sorted(path.stem for path in self._folder.glob("*.json") if re.fullmatch(SITE_NAME, path.stem))
        return [site for name in names if (site := self.site(name)) is not None]

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the right to change the registry, against other processes; wait for it."""
        with files.locked(self._folder / ".lock"):
            yield

    def check_free(self, name: str, public_key: bytes) -> str:
        """The key as one line, when `name` may have it as a new or its present one; raises FNU-118 or FNU-124."""
        line = public_line(public_key)
        for site in self.all():
            if site.name != name and site.has_had(line):
                raise FednnunetError(Code.SITE_TAKEN, f"this key is or was that of {site.name}")
        there = self.site(name)
        if there is not None and there.state == "approved" and there.public_key != line:
            raise FednnunetError(Code.SITE_TAKEN, f"{name} takes part with another key: {there.fingerprint}")
        if there is not None and there.has_had(line) and not (there.state == "approved" and there.public_key == line):
            raise FednnunetError(
                Code.SITE_TAKEN,
                f"this key of {name} was revoked or replaced",
                "Have the hospital make a new key: move its old site.key away and enroll again.",
            )
        return line

    def approve(self, name: str, public_key: bytes, by: str) -> Site:
        """Let a site in, or leave it as it is when it is in with this key; raises FNU-118 or FNU-124."""
        line = self.check_free(check_name(name), public_key)
        there, at = self.site(name), now().isoformat()
        if there is not None and there.state == "approved":
            return there
        earlier = (*there.earlier_keys, EarlierKey(public_key=there.public_key, until=at)) if there else ()
        added = there.added_at if there else at
        return self._write(
            Site(
                name=name,
                public_key=line,
                state="approved",
                added_at=added,
                by=by,
                changed_at=at,
                earlier_keys=earlier,
            )
        )

    def revoke(self, name: str) -> Site:
        """Take a site out, from now on; raises FNU-123."""
        site = self._known(name)
        return self._write(site.model_copy(update={"state": "revoked", "changed_at": now().isoformat()}))

    def renew(self, name: str, public_key: bytes) -> Site:
        """Put a new key in the place of an approved site's key; raises FNU-118, FNU-123 or FNU-124."""
        site, at = self._approved(name), now().isoformat()
        line = public_line(public_key)
        if line == site.public_key:
            return site
        if any(other.has_had(line) for other in self.all()):
            raise FednnunetError(Code.SITE_TAKEN, "this key is, or once was, in use")
        earlier = (*site.earlier_keys, EarlierKey(public_key=site.public_key, until=at))
        return self._write(site.model_copy(update={"public_key": line, "changed_at": at, "earlier_keys": earlier}))

    def rename(self, old: str, new: str) -> Site:
        """Give an approved site another name; raises FNU-123 or FNU-124. Cut off in the middle, it can be repeated."""
        site, there = self._approved(old), self.site(check_name(new))
        if there is not None and there.public_key != site.public_key:
            raise FednnunetError(Code.SITE_TAKEN, f"{new} is a site already")
        renamed = self._write(site.model_copy(update={"name": new, "changed_at": now().isoformat()}))
        self._path(old).unlink()
        files.sync_directory(self._folder)
        return renamed

    def _known(self, name: str) -> Site:
        site = self.site(name)
        if site is None:
            raise FednnunetError(Code.SITE_UNKNOWN, name)
        return site

    def _approved(self, name: str) -> Site:
        site = self._known(name)
        if site.state != "approved":
            raise FednnunetError(Code.SITE_UNKNOWN, f"{name} was revoked", "Invite it again; it needs a new key.")
        return site

    def _path(self, name: str) -> Path:
        return self._folder / f"{check_name(name)}.json"

    def _write(self, site: Site) -> Site:
        data = site.model_dump_json(indent=1).encode() + b"\n"
        files.write_bytes(self._path(site.name), data, 0o600)
        return site
