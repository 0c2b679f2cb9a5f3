"""Build the project's images from a checkout: names, labels, and the wheels that `make wheelhouse` has collected."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import tomllib
from pathlib import Path

from federation.errors import Code, FednnunetError
from orchestrator.admin import images

WHEELS = Path("build", "wheels")
"""Where the Dockerfiles mount the wheels from, seen from the repository."""


def build(
    role: str,
    torch: str,
    tag: str | None,
    base_image: str | None,
    tools_image: str | None,
    source: str | None,
    context: Path,
) -> str:
    """Build `images/ROLE.Dockerfile`; raises FNU-151.

    Parameters
    ----------
    role : str
        `appliance` or `orchestrator`.
    torch : str
        `cpu` or `cuda`.
    tag, base_image, tools_image, source : str, optional
        The image's name; the images that the Dockerfile starts from; where the source code is, for the label.
    context : Path
        The repository.

    Returns
    -------
    str
        The image's name.
    """
    dockerfile = f"images/{role}.Dockerfile"
    version = _version(context, dockerfile)
    if not any((context / WHEELS / torch).glob("*/*.whl")):
        raise FednnunetError(
            Code.BUILD_FAILED,
            f"no wheels in {context / WHEELS / torch}",
            f"Collect them: make wheelhouse TORCH={torch}",
        )
    revision, seconds = _git(context, "rev-parse", "HEAD"), os.environ.get("SOURCE_DATE_EPOCH")
    seconds = seconds or _git(context, "log", "-1", "--format=%ct")
    created = dt.datetime.fromtimestamp(int(seconds), dt.UTC) if seconds else dt.datetime.now(dt.UTC)
    arguments = {
        "TORCH": torch,
        "VERSION": version,
        "REVISION": revision or "unknown",
        "CREATED": f"{created:%Y-%m-%dT%H:%M:%SZ}",
    }
    given = {"BASE_IMAGE": base_image, "TOOLS_IMAGE": tools_image, "SOURCE": source}
    arguments |= {name: value for name, value in given.items() if value}
    name = tag or f"fednnunet/{role}:{version}-{torch}"
    images.build(dockerfile, context, name, arguments)
    return name


def _version(context: Path, dockerfile: str) -> str:
    try:
        version = tomllib.loads((context / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
        if not (context / dockerfile).is_file():
            raise FileNotFoundError(2, "No such file or directory", str(context / dockerfile))
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise FednnunetError(
            Code.BUILD_FAILED, f"{context} is not the repository: {error}", "Name it with --context."
        ) from error
    return str(version)


def _git(context: Path, *words: str) -> str:
    """What git says; empty where there is no git or no repository."""
    try:
        done = subprocess.run(["git", "-C", str(context), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
