"""Letting sites in and out: the registry and Flower's SuperLink, kept in step.

Rules:

- Everything is checked before anything is changed. Each step can be cut off and the same command repeated.
- In: Flower first, then the registry, whose word counts for every answer. Out: the registry first, so that a site is
  out at once, also while the orchestrator does not answer.
- Out, when the orchestrator did not run: the coordinator makes it good when it starts. It also registers again who is
  in by the registry and unknown to the SuperLink, whose database is a new one then.
- Flower never takes a key again that was unregistered, and so neither do we: who was out comes back with a new key.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from federation.enrollment import Request, public_line
from federation.errors import Code, FednnunetError
from orchestrator.enrollment.invitations import Invitations
from orchestrator.enrollment.registry import Registry, Site, check_name
from orchestrator.enrollment.waiting import Waiting
from orchestrator.journal import under_way

HAND = "hand"


class Node(Protocol):
    """A node as Flower knows it; federation.flower.clients.Registered is the real one."""

    @property
    def name(self) -> str:
        """The site's name."""

    @property
    def node_id(self) -> int:
        """Flower's id."""

    @property
    def public_key(self) -> str:
        """The key as an OpenSSH line."""


class Flower(Protocol):
    """What the ceremony needs of a running SuperLink; federation.flower.clients.Control is the real one."""

    def sites(self) -> Sequence[Node]:
        """The nodes that are registered now."""

    def register(self, public_key: bytes, name: str) -> int:
        """Register a key under a name."""

    def unregister(self, node_id: int) -> None:
        """Take a node out."""


def let_in(state: Path, flower: Flower, name: str, public_key: bytes, by: str = HAND) -> Site:
    """Register a site's key with Flower and in the registry; a site that is in with this key stays as it is.

    Raises FNU-112 (name), FNU-118 (not a site's key) or FNU-124 (name or key taken).
    """
    registry = Registry(state)
    with registry.changing():
        return _let_in(registry, flower, check_name(name), public_key, by)


def _let_in(registry: Registry, flower: Flower, name: str, public_key: bytes, by: str) -> Site:
    line = registry.check_free(name, public_key)
    known, registered = registry.site(name), False
    for node in flower.sites():
        if node.public_key == line:
            if node.name != name:
                raise FednnunetError(Code.SITE_TAKEN, f"this key is that of {node.name}")
            registered = True
        elif node.name == name:
            if known is None or not known.has_had(node.public_key):
                raise FednnunetError(Code.SITE_TAKEN, f"{name} is registered with another key")
            flower.unregister(node.node_id)  # a revocation that never reached the SuperLink
    if not registered:
        flower.register(line.encode(), name)
    return registry.approve(name, line.encode(), by)


def approve(state: Path, flower: Flower, request: Request) -> Site:
    """Let in the site of a request, by its invitation; see `let_in` and `Invitations.check` for what is raised."""
    registry, invitations = Registry(state), Invitations(state)
    with registry.changing():
        given = invitations.check(request)
        registry.check_free(request.site, request.public_key.encode())
        invitations.use(given, request.public_key)
        site = _let_in(registry, flower, request.site, request.public_key.encode(), given.id)
    waiting = Waiting(state)
    if waiting.has(request.site) and waiting.read(request.site).public_key == request.public_key:
        waiting.remove(request.site)
    return site


def revoke(state: Path, name: str) -> Site:
    """Put a site out: no answer of it counts from now on; `disconnect` is what follows. Raises FNU-123."""
    registry = Registry(state)
    with registry.changing():
        site = registry.revoke(check_name(name))
    Invitations(state).withdraw(name)
    Waiting(state).remove(name)
    return site


def disconnect(flower: Flower, site: Site) -> None:
    """Have the SuperLink refuse a site that was revoked."""
    for node in flower.sites():
        if node.name == site.name or site.has_had(node.public_key):
            flower.unregister(node.node_id)


def put_out_revoked(state: Path, flower: Flower) -> list[str]:
    """Make good, at the coordinator's start, the revocations that did not reach the SuperLink; whose those were."""
    out = {site.name: site for site in Registry(state).all() if site.state == "revoked"}
    found = sorted(
        {node.name for node in flower.sites() if node.name in out and out[node.name].has_had(node.public_key)}
    )
    for name in found:
        disconnect(flower, out[name])
    return found


def forgotten(registry: Registry, flower: Flower) -> list[Site]:
    """Sites that are in by the registry, and of which the SuperLink knows nothing: its database is a new one."""
    known = {node.public_key for node in flower.sites()}
    return [site for site in registry.all() if site.state == "approved" and site.public_key not in known]


def check_renewal(state: Path, name: str, request: Request) -> None:
    """Raise FNU-118, FNU-123 or FNU-124 unless a request may put a new key in the place of the site's key."""
    if request.renews is None:
        raise FednnunetError(
            Code.REQUEST_INVALID, "this request is not a renewal", "Use `fednnunet site approve` for it."
        )
    if request.site != check_name(name):
        raise FednnunetError(Code.REQUEST_INVALID, f"a request of {request.site}, not of {name}")
    held = Registry(state).public_key(name)
    if held is None:
        raise FednnunetError(Code.SITE_UNKNOWN, f"{name} takes no part", "Invite it with `fednnunet site invite`.")
    if held.decode() not in (request.renews, request.public_key):
        raise FednnunetError(Code.REQUEST_INVALID, f"it renews a key that {name} does not have")


def renew(state: Path, flower: Flower, name: str, request: Request) -> Site:
    """Put a new key in the place of a site's key: the earlier one stops working; see `check_renewal`."""
    registry = Registry(state)
    with registry.changing():
        check_renewal(state, name, request)
        assert request.renews is not None
        registered = False
        for site in registry.all():
            if site.has_had(request.public_key) and (site.name, site.public_key) != (name, request.public_key):
                raise FednnunetError(Code.SITE_TAKEN, "the new key is, or once was, in use")
        for node in flower.sites():
            if node.public_key == request.renews:
                flower.unregister(node.node_id)
            registered |= node.public_key == request.public_key
        if not registered:
            flower.register(request.public_key.encode(), name)
        return registry.renew(name, request.public_key.encode())


def rename(state: Path, old: str, new: str, in_flower: Callable[[str, str], None]) -> Site:
    """Give a site another name, in Flower by `in_flower(public key, new name)`; raises FNU-123, FNU-124 or FNU-128."""
    registry = Registry(state)
    with registry.changing():
        line = registry.public_key(check_name(old))
        if line is None:
            raise FednnunetError(Code.SITE_UNKNOWN, old)
        there = registry.site(check_name(new))
        if there is not None and there.public_key != line.decode():
            raise FednnunetError(Code.SITE_TAKEN, f"{new} is, or once was, a site")
        busy = studies_under_way(state, old)
        if busy:
            raise FednnunetError(Code.SITE_BUSY, f"{old}: {', '.join(busy)}")
        in_flower(public_line(line), new)
        return registry.rename(old, new)


def studies_under_way(state: Path, site: str) -> list[str]:
    """Names of the studies with this site that have begun and not ended."""
    found = []
    for journal in under_way(state / "studies"):
        try:
            study = json.loads((journal.parent / "study.json").read_bytes())
        except (OSError, ValueError):
            continue
        if site in study.get("sites", ()):
            found.append(str(study.get("name")))
    return found
