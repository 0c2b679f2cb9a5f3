"""`fednnunet site`: invite hospitals, let them in, put them out; nothing is let in that a person has not confirmed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from federation.enrollment import Request
    from federation.flower.clients import Control, Registered

site = typer.Typer(help="Invite sites into a federation, let them in, put them out.", no_args_is_help=True)

State = Annotated[Path, typer.Option(help="The orchestrator's state folder.")]
ControlAddress = Annotated[
    str, typer.Option("--control", help="HOST:PORT of the control listener.", envvar="FEDNNUNET_CONTROL")
]
SiteName = Annotated[str, typer.Argument(metavar="NAME", help="The site's name.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask: for scripts. Nobody compares the key then.")]
Words = Annotated[
    str | None, typer.Option(help="What the hospital read aloud: the key must have these words and digits.")
]
_CONTROL = "127.0.0.1:8100"


@site.command()
def invite(
    name: SiteName,
    state: State,
    orchestrator: Annotated[str, typer.Option(help="HOST:PORT that the hospital will dial.")],
    days: Annotated[float, typer.Option(help="Days that the invitation is valid.")] = 7,
    output: Annotated[
        Path | None, typer.Option(help="File to write; - for stdout.", show_default="NAME.invitation.json")
    ] = None,
) -> None:
    """Write an invitation for a hospital: to be used once. An earlier one that was not used is withdrawn."""
    from federation import endpoint, files
    from federation.enrollment import fingerprint
    from federation.errors import Code, FednnunetError
    from orchestrator.enrollment.invitations import Invitations
    from orchestrator.enrollment.record import recorded

    path = output or Path(f"{name}.invitation.json")
    shown = path == Path("-")
    if path.exists() and not shown:
        raise FednnunetError(Code.STATE_NOT_READY, f"{path} is there already", "Choose another --output, or move it.")
    endpoint.split(orchestrator)
    with recorded(state, "site invite", site=name):
        invitation = Invitations(state).give(name, orchestrator, days)
        if shown:
            typer.echo(invitation.file().decode(), nl=False)
        else:
            files.write_new(path, invitation.file(), 0o600)
    told = f"{'an invitation' if shown else f'wrote {path}'}, valid until {invitation.not_after}"
    typer.echo(f"{told}; send it to {name}: it is a secret until it is used", err=shown)
    words = fingerprint(invitation.coordinator.encode())
    typer.echo(f"your key, for the hospital to compare over the phone: {words}", err=shown)


@site.command()
def approve(
    request: Annotated[str, typer.Argument(help="The hospital's request: a file, or the name of one that waits.")],
    state: State,
    control_address: ControlAddress = _CONTROL,
    yes: Yes = False,
    fingerprint: Words = None,
) -> None:
    """Let a site in after its key has been compared over the phone. The orchestrator must run."""
    from federation.errors import Code, FednnunetError
    from orchestrator.admin.reach import reaching
    from orchestrator.enrollment import ceremony
    from orchestrator.enrollment.invitations import Invitations
    from orchestrator.enrollment.record import recorded, refusals
    from orchestrator.enrollment.registry import Registry

    with refusals(state, "site approve", request=Path(request).name):
        asked = _request(state, request)
        if asked.invitation is None:
            raise FednnunetError(
                Code.REQUEST_INVALID, "this request renews a key", f"`fednnunet site renew {asked.site} FILE`."
            )
        Invitations(state).check(asked)
        Registry(state).check_free(asked.site, asked.public_key.encode())
    with recorded(state, "site approve", site=asked.site, key=asked.fingerprint, compared=_how(yes, fingerprint)):
        _confirm(f"{asked.site} asks to be let in", asked, yes, fingerprint)
        with reaching(control_address):
            ceremony.approve(state, _flower(state, control_address), asked)
    typer.echo(f"{asked.site} is registered")


@site.command()
def refuse(
    name: SiteName,
    state: State,
) -> None:
    """Take a waiting request away and withdraw the site's invitation."""
    from federation.errors import Code, FednnunetError
    from orchestrator.enrollment.invitations import Invitations
    from orchestrator.enrollment.record import recorded
    from orchestrator.enrollment.waiting import Waiting

    with recorded(state, "site refuse", site=name):
        waited = Waiting(state).remove(name)
        withdrawn = Invitations(state).withdraw(name)
        if not waited and not withdrawn:
            raise FednnunetError(Code.SITE_UNKNOWN, f"{name} neither waits nor is invited")
    typer.echo(f"{name}: {'request removed, ' if waited else ''}{withdrawn} invitation(s) withdrawn")


@site.command()
def requests(
    state: State,
) -> None:
    """List the requests that came online and wait: site, key, when. Lines of a request: TAB between."""
    from orchestrator.enrollment.waiting import Waiting, describe

    for request in Waiting(state).all():
        typer.echo(describe(request))


@site.command()
def add(
    name: Annotated[str, typer.Argument(help="The site's name, as in its site.toml.")],
    public_key: Annotated[Path, typer.Argument(help="The site's site.pub. Compare its fingerprint over the phone.")],
    state: State,
    control_address: ControlAddress = _CONTROL,
) -> None:
    """Register a site's public key under its name by hand, without an invitation."""
    from federation.errors import Code, FednnunetError
    from orchestrator.admin.reach import reaching
    from orchestrator.enrollment import ceremony
    from orchestrator.enrollment.record import recorded
    from orchestrator.enrollment.registry import Registry, check_name

    with recorded(state, "site add", site=name):
        check_name(name)
        try:
            key = public_key.read_bytes()
        except OSError as error:
            raise FednnunetError(Code.SETTINGS_INVALID, f"{public_key}: {error.strerror}") from error
        Registry(state).check_free(name, key)
        with reaching(control_address):
            entry = ceremony.let_in(state, _flower(state, control_address), name, key)
    typer.echo(f"{name} is registered")
    typer.echo(f"its key: {entry.fingerprint}")


@site.command("list")
def show(
    state: State,
    control_address: ControlAddress = _CONTROL,
) -> None:
    """List the sites, TAB between: name, approved or revoked, online or last seen, key, version, bundle hash."""
    from federation.enrollment import fingerprint
    from orchestrator.admin.reach import reaching
    from orchestrator.enrollment.registry import Registry

    with reaching(control_address):
        nodes = {(node.name, node.public_key): node for node in _flower(state, control_address).sites()}
    for entry in Registry(state).all():
        node = nodes.pop((entry.name, entry.public_key), None)
        typer.echo("\t".join((entry.name, entry.state, _seen(node), entry.fingerprint, *_versions(state, entry.name))))
    for (name, key), node in sorted(nodes.items()):  # nobody approved it here: no answer of it counts
        typer.echo("\t".join((name, "not approved", _seen(node), fingerprint(key.encode()), "-", "-")))


@site.command()
def revoke(
    name: SiteName,
    state: State,
    control_address: ControlAddress = _CONTROL,
) -> None:
    """Put a site out, at once, also in the middle of a study. Its key never comes back."""
    from federation.errors import Code, FednnunetError
    from orchestrator.admin.reach import reaching
    from orchestrator.enrollment import ceremony
    from orchestrator.enrollment.record import recorded

    with recorded(state, "site revoke", site=name):
        out = ceremony.revoke(state, name)
    try:
        with recorded(state, "site disconnect", site=name), reaching(control_address):
            ceremony.disconnect(_flower(state, control_address), out)
    except FednnunetError as error:
        if error.code is not Code.ORCHESTRATOR_UNREACHABLE:
            raise
        raise FednnunetError(
            error.code,
            f"{name} is revoked in the registry, and no answer of it counts. {error.found}",
            "Start the orchestrator: it then refuses the site's connection too. Or repeat this command.",
        ) from error
    typer.echo(f"{name} is revoked")


@site.command()
def renew(
    name: SiteName,
    request: Annotated[Path, typer.Argument(help="The request that `appliance enroll --renew` wrote.")],
    state: State,
    control_address: ControlAddress = _CONTROL,
    yes: Yes = False,
    fingerprint: Words = None,
) -> None:
    """Put a site's new key in the place of its present one, which stops working. The site keeps its name."""
    from federation.enrollment import Request, read_capped
    from federation.errors import Code
    from orchestrator.admin.reach import reaching
    from orchestrator.enrollment import ceremony
    from orchestrator.enrollment.record import recorded

    with recorded(state, "site renew", site=name):
        asked = Request.read(read_capped(request, Code.REQUEST_INVALID))
        ceremony.check_renewal(state, name, asked)
        _confirm(f"{name} asks for a new key, signed by the present one", asked, yes, fingerprint)
        with reaching(control_address):
            ceremony.renew(state, _flower(state, control_address), name, asked)
    typer.echo(f"{name} has the new key; tell the hospital to run: appliance enroll --renewed")


@site.command()
def rename(
    name: SiteName,
    new_name: Annotated[str, typer.Argument(help="The name it shall have.")],
    state: State,
) -> None:
    """Give a site another name. Not while it takes part in a study that is under way."""
    from orchestrator.enrollment import ceremony
    from orchestrator.enrollment.record import recorded

    def in_flower(public_key: str, to: str) -> None:
        from federation.console import require

        database = state / "superlink.db"
        if database.exists():
            require("orchestrator", "flwr")
            from federation.flower.clients import rename_node

            rename_node(database, public_key, to)

    with recorded(state, "site rename", site=name, to=new_name):
        ceremony.rename(state, name, new_name, in_flower)
    typer.echo(f'{name} is now {new_name}; the hospital writes name = "{new_name}" into site.toml and starts again')


def _flower(state: Path, address: str) -> Control:
    from orchestrator.admin.reach import control

    return control(state, address)


def _request(state: Path, given: str) -> Request:
    """The request of a name that waits, or of a file."""
    from federation.enrollment import Request, read_capped
    from federation.errors import Code
    from orchestrator.enrollment.waiting import Waiting

    waiting = Waiting(state)
    if waiting.has(given):
        return waiting.read(given)
    return Request.read(read_capped(Path(given), Code.REQUEST_INVALID))


def _how(yes: bool, words: str | None) -> str:
    return "words" if words is not None else "nobody (--yes)" if yes else "asked"


def _confirm(what: str, request: Request, yes: bool, words: str | None) -> None:
    """Have a person compare the key; raises FNU-125."""
    from federation.enrollment import same_fingerprint
    from federation.errors import Code, FednnunetError

    typer.echo(f"{what}; its key:\n\n    {request.fingerprint}\n")
    if words is not None:
        if not same_fingerprint(words, request.fingerprint):
            raise FednnunetError(Code.FINGERPRINT_DIFFERS, "the words given are not those of the key")
        return
    if yes:
        return
    if not sys.stdin.isatty():
        raise FednnunetError(Code.FINGERPRINT_DIFFERS, "nobody to ask: give --fingerprint, or --yes")
    if not typer.confirm("Call the hospital. Does it read the same words and digits?"):
        raise FednnunetError(Code.FINGERPRINT_DIFFERS, "it was not the same")


def _versions(state: Path, site: str) -> tuple[str, str]:
    """Version and bundle hash that a site told with its newest answer to Describe; `-` for what is not known."""
    from federation.tasks import parse_result

    answers = sorted(state.glob(f"studies/*/answers/describe/{site}.json"), key=lambda path: path.stat().st_mtime_ns)
    told = parse_result(answers[-1].read_bytes()).description if answers else None
    versions = told.versions if told else {}
    return versions.get("fednnunet", "-"), versions.get("bundle", "-")[:12]


def _seen(node: Registered | None) -> str:
    """`online`, `last seen 2026-11-23T22:58Z`, `never seen`, or `-` for a site that Flower does not know."""
    import datetime as dt

    if node is None:
        return "-"
    if node.status == "online":
        return "online"
    if node.online_until is None:
        return "never seen"
    return f"last seen {dt.datetime.fromtimestamp(node.online_until, dt.UTC):%Y-%m-%dT%H:%MZ}"
