"""`fednnunet image`: build, bundle, sign, verify and load the images; nothing is loaded that was not verified first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from orchestrator.bundle.description import Description

image = typer.Typer(help="Build images, and carry them to hospitals that no registry reaches.", no_args_is_help=True)

Bundle = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that `fednnunet image save` wrote.")]
Trusted = Annotated[list[Path], typer.Option("--key", help="Public key to trust; may be given several times.")]
Signing = Annotated[Path, typer.Option("--key", help="Private key to sign with.")]
BaseBundle = Annotated[
    list[Path] | None,
    typer.Option("--base", help="Bundle or archive with the layers that BUNDLE leaves out; several may be given."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


@image.command()
def keygen(
    private: Annotated[
        Path, typer.Argument(metavar="FILE", help="Private key to write; the public one has the ending .pub.")
    ],
) -> None:
    """Make the pair of keys that signs bundles and verifies them."""
    from orchestrator.bundle import keys

    public = keys.generate(private)
    typer.echo(f"wrote {private}: keep it where bundles are signed, and nowhere else")
    typer.echo(f"wrote {public}: send it to the hospitals")
    [key] = keys.load_public([public])
    typer.echo(f"for them to compare over the phone: {keys.words(key)}")
    typer.echo(f"or, with openssl alone: {keys.key_id(key)}")


@image.command()
def build(
    role: Annotated[Literal["appliance", "orchestrator"], typer.Argument(help="Which image.")],
    torch: Annotated[Literal["cpu", "cuda"], typer.Option(help="Which torch it carries.")] = "cpu",
    tag: Annotated[str | None, typer.Option(help="Its name.", show_default="fednnunet/ROLE:VERSION-TORCH")] = None,
    base_image: Annotated[str | None, typer.Option(help="Image to start from.", show_default="Dockerfile's")] = None,
    tools_image: Annotated[str | None, typer.Option(help="Image that builds.", show_default="Dockerfile's")] = None,
    source: Annotated[str | None, typer.Option(help="Address of the source code, for the label.")] = None,
    context: Annotated[Path, typer.Option(help="The repository.")] = Path("."),
) -> None:
    """Build an image from the repository and the wheels that `make wheelhouse` has collected, without network."""
    from orchestrator.admin import image_build

    name = image_build.build(role, torch, tag, base_image, tools_image, source, context)
    typer.echo(f"built {name}")


@image.command("list")
def show() -> None:
    """List this project's images, TAB between: name, version, title, size, id, created."""
    from orchestrator.admin.images import engine
    from orchestrator.admin.transfer import megabytes

    with engine() as docker:
        for item in docker.images():
            names = ",".join(item.references) or "-"
            typer.echo(
                "\t".join((names, item.version, item.title, megabytes(item.size), item.id[:12], item.created[:19]))
            )


@image.command()
def inspect(
    name: Annotated[str, typer.Argument(metavar="IMAGE|BUNDLE", help="An image in the engine, or a bundle's file.")],
) -> None:
    """Show what an image or a bundle is, as JSON. Of a bundle nothing is verified."""
    import dataclasses
    import json

    from orchestrator.admin.images import engine
    from orchestrator.bundle.description import SBOM
    from orchestrator.bundle.verify import open_file, read_front

    if Path(name).is_file():
        with open_file(Path(name)) as stream:
            front, _ = read_front(stream, name)
        value = front.description.model_dump() | {
            "signed": front.signature is not None,
            "sbom": SBOM in front.sums,
            "verified": False,
        }
    else:
        with engine() as docker:
            value = dataclasses.asdict(docker.image(name))
    typer.echo(json.dumps(value, indent=1))


@image.command()
def save(
    reference: Annotated[str, typer.Argument(metavar="IMAGE", help="The image's name.")],
    key: Annotated[
        Path | None, typer.Option(help="Private key to sign with; without it the bundle is unsigned.")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Archive of `docker save` to take the image from; no engine is needed then.")
    ] = None,
    since: Annotated[
        str | None, typer.Option(metavar="OLD", help="Only layers that this bundle, archive or image has not.")
    ] = None,
    days: Annotated[int, typer.Option(min=0, max=3650, help="Days that the bundle may be loaded.")] = 90,
    output: Annotated[Path | None, typer.Option(help="File.", show_default="NAME-VERSION.fnubundle.tar")] = None,
) -> None:
    """Write an image into one file for a hospital: layers, manifest, signature and, by syft, the parts list."""
    from orchestrator.admin import image_transfer

    path, description = image_transfer.save(reference, key, archive, since, days, output)
    signed = "signed" if description.signer else "NOT SIGNED: sign it with `fednnunet image sign`"
    typer.echo(f"wrote {path}, valid until {description.expires}, {signed}")
    typer.echo(_what(description))


@image.command()
def sign(
    bundle: Bundle,
    key: Signing,
    output: Annotated[Path | None, typer.Option(help="File to write.", show_default="BUNDLE")] = None,
) -> None:
    """Sign a bundle, in place of any signature that it has; it is checked to be whole on the way."""
    from orchestrator.admin.image_transfer import check_output
    from orchestrator.admin.transfer import transfer
    from orchestrator.bundle import keys
    from orchestrator.bundle.verify import open_file
    from orchestrator.bundle.write import sign as sign_bundle

    check_output(output)
    private = keys.load_private(key)
    with open_file(bundle):
        total = bundle.stat().st_size
    with transfer("sign", total) as advance:
        description = sign_bundle(bundle, output or bundle, private, advance)
    typer.echo(f"signed {output or bundle} by {keys.words(private.public_key())}")
    typer.echo(_what(description))


@image.command()
def verify(bundle: Bundle, key: Trusted, base: BaseBundle = None) -> None:
    """Verify a bundle: signature, dates, every byte, every layer. Needs no engine and loads nothing."""
    from orchestrator.admin import image_transfer

    with image_transfer.verified(bundle, key, base or []) as checked:
        typer.echo(f"{bundle}: whole, signed by {checked.words}, valid until {checked.front.description.expires}")
        typer.echo(_what(checked.front.description))


@image.command()
def load(
    bundle: Bundle,
    key: Trusted,
    base: BaseBundle = None,
    to_archive: Annotated[
        Path | None, typer.Option(help="Write an archive for `docker load`, `podman load` or `ctr`, without engine.")
    ] = None,
    installed: Annotated[
        str | None, typer.Option(metavar="VERSION", help="With --to-archive: the version that is installed.")
    ] = None,
    allow_downgrade: Annotated[bool, typer.Option(help="Load even what is older than the installed version.")] = False,
) -> None:
    """Verify a bundle, then load it into the engine; an older version than the installed one is refused."""
    from federation.errors import Code, FednnunetError
    from orchestrator.admin import image_transfer

    if installed is not None and to_archive is None:
        raise FednnunetError(Code.SETTINGS_INVALID, "--installed goes with --to-archive: the engine is asked itself")
    with image_transfer.verified(bundle, key, base or []) as checked:
        typer.echo(f"{bundle}: whole, signed by {checked.words}")
        if to_archive is not None:
            image_transfer.to_archive(checked, to_archive, installed, allow_downgrade)
            typer.echo(f"wrote {to_archive}")
        else:
            image_transfer.load(checked, allow_downgrade)
            typer.echo(f"loaded {', '.join(checked.front.description.references)}")
        typer.echo(_what(checked.front.description))


@image.command()
def push(
    reference: Annotated[str, typer.Argument(metavar="IMAGE", help="Its name, which begins with the registry's.")],
) -> None:
    """Push an image to the registry that its name begins with; `docker login` first."""
    from orchestrator.admin.images import engine
    from orchestrator.admin.transfer import transfer

    with engine() as docker:
        size = docker.image(reference).size
        with transfer("push", size) as advance:
            digest = docker.push(reference, advance)
    typer.echo(f"pushed {reference} {digest}".rstrip())


@image.command()
def prune(
    keep: Annotated[int, typer.Option(min=1, help="Versions of each image to keep.")] = 2,
    title: Annotated[
        str | None, typer.Option(help="Only this image: fednnunet-appliance or fednnunet-orchestrator.")
    ] = None,
    yes: Yes = False,
) -> None:
    """Remove this project's images without a name and all but the newest versions; those in use stay."""
    from federation.errors import Code, FednnunetError
    from orchestrator.admin.images import engine
    from orchestrator.admin.transfer import megabytes

    with engine() as docker:
        kept: dict[str, list[str]] = {}
        old = []
        for item in docker.images():
            if title not in (None, item.title):
                continue
            versions = kept.setdefault(item.title, [])
            if item.references and (item.version in versions or len(versions) < keep):
                if item.version not in versions:
                    versions.append(item.version)
            else:
                old.append(item)
        for item in old:
            typer.echo(f"{','.join(item.references) or item.id[:12]}\t{item.version}\t{megabytes(item.size)}")
        if not old:
            typer.echo("nothing to remove")
            return
        if not yes and not sys.stdin.isatty():
            raise FednnunetError(
                Code.SETTINGS_INVALID, "nobody is there to confirm", "Look at what is listed, then say --yes."
            )
        if not yes and not typer.confirm("Remove these?"):
            return
        for item in old:
            done = "removed" if docker.remove(item) else "in use by a container, stays:"
            typer.echo(f"{done} {','.join(item.references) or item.id[:12]}")


def _what(description: Description) -> str:
    """One line of what a bundle holds."""
    names = ", ".join(description.references) or "no name"
    text = f"{description.title} {description.version} ({names}), image {description.image[:12]}"
    missing = len(description.layers) - len(description.included)
    if description.since is not None:
        text += f"; {missing} of {len(description.layers)} layers come from {description.since.version}"
    return text
