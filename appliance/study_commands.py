"""`appliance studies`, `approve`, `rewind`, `report`: what the hospital says of the studies that ask it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from appliance.link.policy import Approvals
    from appliance.settings import Settings

Config = Annotated[Path, typer.Option(help="The site's settings.", envvar="FEDNNUNET_CONFIG")]
StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="Its name, or the beginning of its id.")]
_DEFAULT = Path("/config/site.toml")


def _open(config: Path) -> tuple[Settings, Approvals]:
    from appliance import settings
    from appliance.link.policy import Approvals

    loaded = settings.load(config)
    return loaded, Approvals(loaded.state / "link" / "studies")


def studies(config: Config = _DEFAULT) -> None:
    """List the studies that have asked this site, and whether they may."""
    from rich.console import Console
    from rich.table import Table

    from appliance.link import policy

    loaded, approvals = _open(config)
    rule = policy.load(loaded.policy)
    found = approvals.all()
    if not found:
        typer.echo("no study has asked this site yet")
        return
    table = Table()
    for name in ("study", "id", "sites", "rounds", "may train here"):
        table.add_column(name)
    for study, said in found:
        by_policy = rule.studies == "any" or (isinstance(rule.studies, list) and study.id in rule.studies)
        verdict = said or ("by policy" if by_policy else f"waits: appliance approve {study.id[:12]}")
        rounds = str(study.rounds * len(study.folds))
        table.add_row(study.name, study.id[:12], str(len(study.sites)), rounds, verdict)
    Console().print(table)


def approve(
    study: StudyArgument,
    config: Config = _DEFAULT,
    deny: Annotated[bool, typer.Option("--deny", help="Deny it instead, also after it was approved.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Show a study in plain words, then approve it (or deny it)."""
    from appliance.plain_words import in_plain_words

    loaded, approvals = _open(config)
    found = approvals.find(study)
    typer.echo(in_plain_words(found, loaded.name))
    typer.echo("")
    verb = "Deny" if deny else "Approve"
    if not yes and not typer.confirm(f"{verb} this study for {loaded.name}?"):
        typer.echo("nothing was changed")
        raise typer.Exit(1)
    approvals.say(found, "denied" if deny else "approved")
    typer.echo(f"{found.name} ({found.id[:12]}) is {'denied' if deny else 'approved'}")
    if not deny:
        typer.echo("if it was refused before, the coordinator submits it again")


def rewind(study: StudyArgument, config: Config = _DEFAULT) -> None:
    """Let a study ask for an earlier round once: after the orchestrator was restored from a backup."""
    from appliance.link.trust import allow_rewind

    loaded, approvals = _open(config)
    found = approvals.find(study)
    allow_rewind(loaded.state / "link" / "arrivals.jsonl", found.id)
    typer.echo(f"{found.name} ({found.id[:12]}) may go back to an earlier round, once")


def report(
    study: StudyArgument,
    config: Config = _DEFAULT,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="(worker/STUDY/report.html)")
    ] = None,
) -> None:
    """Write this site's own report of a study anew: scores of our cases, the worst with pictures. It stays here."""
    from appliance import settings
    from appliance.spool import Spool
    from federation.console import require
    from federation.errors import Code, FednnunetError
    from federation.processes import use_cache

    require("appliance", "matplotlib", "jinja2", "nnunetv2")
    loaded = settings.load(config)
    use_cache(loaded.state)
    from appliance.worker import site_report

    spool = Spool(loaded.spool)
    known = site_report.studies(spool)
    chosen = [one for one in known if one.is_called(study)]
    if len(chosen) != 1:
        there = "".join(f"\n  {one.id[:16]}  {one.name}" for one in chosen or known)
        raise FednnunetError(Code.STUDY_NOT_FOUND, f"{study}: {len(chosen)} studies of this site{there}")
    typer.echo(str(site_report.write(spool, loaded.work, chosen[0].id, output)))


def register(app: typer.Typer) -> None:
    """Add the commands to `appliance`."""
    for command in (studies, approve, rewind, report):
        app.command()(command)
