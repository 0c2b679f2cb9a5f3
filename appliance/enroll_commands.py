"""`appliance enroll`, `identity` and `trust`: how a hospital gets into a federation, and whom it believes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from federation.enrollment import Request

Config = Annotated[Path, typer.Option(help="The site's settings.", envvar="FEDNNUNET_CONFIG")]
_SITE_TOML = Path("/config/site.toml")


def enroll(
    invitation: Annotated[
        Path | None, typer.Argument(help="The invitation that the coordinator sent.", show_default=False)
    ] = None,
    data: Annotated[Path, typer.Option(help="The dataset in nnU-Net's raw format.")] = Path("/data"),
    config: Annotated[Path, typer.Option(help="Folder for site.toml, the site's keys and the request.")] = Path(
        "/config"
    ),
    state: Annotated[Path, typer.Option(help="Folder for everything the appliance writes.")] = Path("/state"),
    device: Annotated[str, typer.Option(help="cuda, cuda:N, mps or cpu.")] = "cuda",
    online: Annotated[bool, typer.Option("--online", help="Send the request to the orchestrator at once.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not dial the orchestrator to check it.")] = False,
    ca: Annotated[
        Path | None,
        typer.Option(help="PEM certificates to trust besides: those of a middlebox that opens TLS here."),
    ] = None,
    renew: Annotated[
        bool,
        typer.Option("--renew", help="A new key for a site that takes part: makes it, and a request signed by both."),
    ] = False,
    renewed: Annotated[
        bool, typer.Option("--renewed", help="The coordinator has approved the new key: put it in use.")
    ] = False,
) -> None:
    """Make the site's keys and a request to be let in. The private key stays here; the request is no secret."""
    from appliance import identity
    from appliance import settings as site_settings
    from federation.errors import Code, FednnunetError

    if (invitation is None) == (not (renew or renewed)) or (renew and renewed) or (online and offline):
        raise FednnunetError(
            Code.SETTINGS_INVALID,
            "give an invitation, or --renew, or --renewed; and not both --online and --offline",
        )
    if invitation is not None:
        _enroll(invitation, data, config, state, device, online, offline, ca)
        return
    settings = site_settings.load(config / "site.toml")
    if renewed:
        kept = identity.take_renewed(settings)
        typer.echo(f"the new key is in use: start the appliance again; then delete {kept}")
        return
    path, request = identity.renew(settings)
    typer.echo(f"wrote {path}: send it to the coordinator (`fednnunet site renew {settings.name} FILE`)")
    _read_aloud(request)
    typer.echo("the present key stays in use until you are told to run `appliance enroll --renewed`")


def _enroll(
    file: Path, data: Path, config: Path, state: Path, device: str, online: bool, offline: bool, ca: Path | None
) -> None:
    from appliance import identity
    from appliance.link import policy
    from federation import endpoint
    from federation.enrollment import PATH, Invitation, fingerprint, read_capped
    from federation.errors import Code

    invited = Invitation.read(read_capped(file, Code.INVITATION_INVALID))
    invited.check_dates()
    typer.echo(f"invitation for {invited.site}, to {invited.orchestrator}, valid until {invited.not_after}")
    typer.echo(f"coordinator's key, compare it over the phone:  {fingerprint(invited.coordinator.encode())}")
    extra = read_capped(ca, Code.SETTINGS_INVALID) if ca is not None else b""
    trusted = invited.ca + extra.decode(errors="replace")
    if not offline:
        typer.echo(f"{invited.orchestrator} shows {endpoint.check(invited.orchestrator, trusted)}")
    path, request = identity.enroll(
        config.resolve(), invited, data=data.resolve(), state=state.resolve(), device=device, extra_ca=extra
    )
    policy.write_default(config / "policy.toml")
    typer.echo(f"wrote {config / 'site.toml'}, the site's keys and {config / 'policy.toml'}")
    if online:
        endpoint.post(invited.orchestrator, trusted, PATH, request.file())
        typer.echo("the request waits at the orchestrator for the coordinator's approval")
    else:
        typer.echo(f"send this file to the coordinator: {path}")
    _read_aloud(request)
    typer.echo(f"once approved: appliance start --config {shlex.quote(str(config / 'site.toml'))}")


def _read_aloud(request: Request) -> None:
    typer.echo(f"this site's key, to read over the phone:       {request.fingerprint}")


def identity(config: Config = _SITE_TOML) -> None:
    """Show who this site is, and whom it trusts: words and digits to compare over the phone."""
    from appliance import identity as own
    from appliance import settings as site_settings
    from federation import enrollment, keypairs

    settings = site_settings.load(config)
    typer.echo(f"site          {settings.name}, dials {settings.orchestrator}")
    public = own.public_of(settings.site_key)
    typer.echo(f"its key       {enrollment.fingerprint(public)}")
    coming = settings.site_key.with_name(settings.site_key.name + ".next")
    if coming.is_file():
        typer.echo(f"its next key  {enrollment.fingerprint(own.public_of(coming))}")
    if not settings.coordinator_key.is_file():
        typer.echo(f"coordinator   unknown: {settings.coordinator_key} is missing")
        return
    for block in keypairs.pem_blocks(settings.coordinator_key.read_bytes()):
        typer.echo(f"coordinator   {enrollment.fingerprint(block)}")


def trust(
    statement: Annotated[Path, typer.Argument(help="The coordinator's statement about its next key.")],
    config: Config = _SITE_TOML,
    drop_old: Annotated[
        bool, typer.Option("--drop-old", help="The coordinator has switched: trust the new key alone.")
    ] = False,
) -> None:
    """Trust the coordinator's next signing key, which the present one vouches for. Then start the appliance again."""
    from appliance import identity as own
    from appliance import settings as site_settings
    from federation.enrollment import read_capped
    from federation.errors import Code

    settings = site_settings.load(config)
    words = own.trust(settings, read_capped(statement, Code.INVITATION_INVALID), drop_old)
    typer.echo(f"{settings.coordinator_key} trusts {'' if drop_old else 'also '}{words}")
    typer.echo("compare it over the phone, then start the appliance again")


def register(app: typer.Typer) -> None:
    """Put the commands into the program."""
    for function in (enroll, identity, trust):
        app.command()(function)
