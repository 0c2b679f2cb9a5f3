"""`fednnunet federation`: make a federation's authority, look after it, rotate what it holds."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from orchestrator.enrollment.authority import Authority

federation = typer.Typer(help="Make a federation, and keep its keys fresh.", no_args_is_help=True)

StateArgument = Annotated[Path, typer.Argument(metavar="STATE", help="The orchestrator's state folder.")]


class Part(StrEnum):
    """What can be rotated."""

    CERTIFICATE = "certificate"
    TOKEN = "token"  # noqa: S105
    SECRET = "secret"  # noqa: S105
    SIGNING_KEY = "signing-key"
    ALL = "all"


@federation.command()
def init(
    state: Annotated[Path, typer.Argument(help="The orchestrator's state folder; it is made.")],
    name: Annotated[
        list[str] | None, typer.Option(help="A name or address that hospitals dial; give it again for several.")
    ] = None,
    as_secret: Annotated[
        bool,
        typer.Option("--as-secret", help="Print Kubernetes Secrets on stdout, also of an authority that is there."),
    ] = False,
) -> None:
    """Make the authority: CA, server certificate, signing key, control token, runner's secret. Private files: 0600."""
    from federation.errors import Code, FednnunetError
    from orchestrator.enrollment.authority import Authority, create
    from orchestrator.enrollment.record import recorded

    authority = Authority(state / "authority")
    if not (as_secret and authority.ca.is_file()):
        if not name:
            raise FednnunetError(Code.SETTINGS_INVALID, "--name is missing", "Give a name that hospitals will dial.")
        names = [*name, *(["127.0.0.1"] if "127.0.0.1" not in name else [])]
        with recorded(state, "federation init", names=names):
            authority = create(state / "authority", names)
        typer.echo(f"wrote {authority.folder}", err=as_secret)
        typer.echo(
            f"give {authority.ca} and {authority.signing_public.name} to every site, or an invitation; keep the rest",
            err=as_secret,
        )
    if as_secret:
        with recorded(state, "federation secrets printed"):
            typer.echo(authority.secrets_yaml(), nl=False)


@federation.command()
def status(
    state: StateArgument,
    days: Annotated[int, typer.Option(help="Warn so many days ahead.")] = 30,
) -> None:
    """Show the certificates' names and last days. Ends with FNU-127 (status 11) when one expires soon: for cron."""
    from federation.enrollment import fingerprint
    from federation.errors import Code, FednnunetError
    from orchestrator.enrollment.authority import Authority

    authority = Authority(state / "authority")
    authority.check()
    soon = []
    for expiry in authority.expiries():
        what, names, until = expiry
        left = expiry.days_left()
        typer.echo(
            f"{what:<7} until {until:%Y-%m-%d}, {left} days left" + (f", for {', '.join(names)}" if names else "")
        )
        if left < days:
            soon.append(f"{what}: {left} days left" if left >= 0 else f"{what}: expired")
    typer.echo(f"signing key  {fingerprint(authority.signing_public.read_bytes())}")
    if authority.next_key.is_file():
        typer.echo(f"a new signing key is under way: sites take in {authority.statement}")
    if soon:
        raise FednnunetError(Code.CERTIFICATE_EXPIRES, "; ".join(soon))


@federation.command()
def rotate(
    state: StateArgument,
    part: Annotated[Part, typer.Argument(help="What to make anew.")] = Part.CERTIFICATE,
    name: Annotated[
        list[str] | None, typer.Option(help="certificate: other names that hospitals dial; else those of today.")
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="signing-key: every site trusts the new key; sign with it from now on.")
    ] = False,
) -> None:
    """Make the server certificate, the token, the runner's secret or the signing key anew. Sites stay enrolled.

    The signing key takes two steps: the first writes a statement that every site takes in with `appliance trust`; the
    second, --finish, switches. A key that was stolen cannot be replaced this way: then invite every site anew.
    """
    from federation.errors import Code, FednnunetError
    from orchestrator.enrollment.authority import Authority
    from orchestrator.enrollment.record import recorded

    authority = Authority(state / "authority")
    if finish and part is not Part.SIGNING_KEY:
        raise FednnunetError(Code.SETTINGS_INVALID, "--finish goes with signing-key alone")
    if not authority.ca.is_file():
        authority.check()
    with recorded(state, "federation rotate", part=part.value, finish=finish):
        if part in (Part.CERTIFICATE, Part.ALL):
            authority.rotate_certificate([*name, *({"127.0.0.1"} - set(name))] if name else None)
            typer.echo("new server certificate: a running orchestrator takes it up within seconds")
        if part in (Part.TOKEN, Part.ALL):
            authority.rotate_token()
            typer.echo("new control token: start `orchestrator start` again")
        if part in (Part.SECRET, Part.ALL):
            authority.rotate_secret()
            typer.echo("new runner's secret: start `orchestrator start` again")
        if part in (Part.SIGNING_KEY, Part.ALL):
            _signing_key(authority, finish)


def _signing_key(authority: Authority, finish: bool) -> None:
    from federation.enrollment import fingerprint

    if finish:
        authority.finish_signing_key()
        typer.echo(f"signed with the new key from now on: {fingerprint(authority.signing_public.read_bytes())}")
        typer.echo(f"start `orchestrator start` again; the statement is kept as {authority.last_statement}")
        typer.echo("sites then run: appliance trust STATEMENT --drop-old")
        return
    path = authority.begin_signing_key()
    if path == authority.signing_public:
        typer.echo(f"wrote {authority.signing_key} and {path}: give the latter to every site")
        return
    typer.echo(f"wrote {path}: send it to every site, which runs: appliance trust {path.name}")
    typer.echo(f"new key, to compare over the phone: {fingerprint(_public_of(path))}")
    typer.echo("when all have: fednnunet federation rotate STATE signing-key --finish")


def _public_of(statement: Path) -> bytes:
    import json

    text: str = json.loads(statement.read_bytes())["coordinator"]
    return text.encode()
