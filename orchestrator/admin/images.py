"""The Docker engine, as far as images go: the only module that imports `docker`.

What the engine says in its own words comes out as a numbered error: no engine FNU-148, no such image FNU-149, refused
FNU-151 to FNU-153.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation.errors import Code, FednnunetError
from orchestrator.bundle.description import REVISION, TITLE, VERSION
from orchestrator.bundle.versions import Key, version_key

TIMEOUT = 3600
"""Seconds that the engine may be silent: it unpacks several gigabytes without a word."""
_OURS = "fednnunet-"
"""How the title of our images begins."""
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Image:
    """An image in the engine.

    Attributes
    ----------
    id : str
        The engine's id, without `sha256:`.
    references : tuple of str
        Its names.
    title, version, revision : str
        Its labels.
    created : str
        As the engine says it.
    size : int
        Bytes, unpacked.
    diff_ids : tuple of str
        SHA-256 of each layer, lowest first.
    """

    id: str
    references: tuple[str, ...]
    title: str
    version: str
    revision: str
    created: str
    size: int
    diff_ids: tuple[str, ...]

    @property
    def ours(self) -> bool:
        """Whether it is an image of this project."""
        return self.title.startswith(_OURS)

    @property
    def key(self) -> Key | None:
        """What to sort it by; None: its version is none."""
        return version_key(self.version)


class Engine:
    """The Docker engine that DOCKER_HOST names; raises FNU-148 where it does not answer."""

    def __init__(self) -> None:
        import docker

        with _errors(Code.ENGINE_UNREACHABLE):
            self._client = docker.from_env(timeout=TIMEOUT)
            self._client.ping()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def images(self) -> list[Image]:
        """All images of this project, newest version first within each title."""
        with _errors(Code.ENGINE_UNREACHABLE):
            found = [_image(image.attrs) for image in self._client.images.list()]
        found = [image for image in found if image.ours]
        return sorted(found, key=lambda image: (image.title, image.key or ((), 0, 0), image.created), reverse=True)

    def image(self, reference: str) -> Image:
        """One image by name or id; raises FNU-149."""
        with _errors(Code.ENGINE_UNREACHABLE):
            return _image(self._client.images.get(reference).attrs)

    def newest(self, title: str) -> Image | None:
        """The image of this title with the highest version; None: there is none."""
        versioned = [image for image in self.images() if image.title == title and image.key is not None]
        return max(versioned, key=lambda image: image.key or ((), 0, 0), default=None)

    def save(self, reference: str, path: Path, advance: Advance) -> None:
        """Write an image into an archive, as `docker save` does."""
        with _errors(Code.ENGINE_UNREACHABLE), open(path, "xb") as stream:
            for piece in self._client.api.get_image(reference):
                stream.write(piece)
                advance(len(piece))

    def load(self, pieces: Iterator[bytes]) -> None:
        """Give an archive to the engine; raises FNU-153 where the engine does not take it.

        An error in `pieces` cuts the connection before the archive's end: the engine has loaded nothing then.
        """
        with _errors(Code.LOAD_FAILED):
            _follow(self._client.api.load_image(pieces), Code.LOAD_FAILED)

    def push(self, reference: str, advance: Advance) -> str:
        """Push an image to the registry that its name begins with; returns the digest there."""
        done: dict[str, int] = {}
        digest = ""
        with _errors(Code.PUSH_FAILED):
            for line in _events(self._client.api.push(reference, stream=True, decode=True), Code.PUSH_FAILED):
                detail = line.get("progressDetail") or {}
                layer, current = str(line.get("id", "")), int(detail.get("current") or 0)
                if current > done.get(layer, 0):
                    advance(current - done.get(layer, 0))
                    done[layer] = current
                digest = str((line.get("aux") or {}).get("Digest", digest))
        return digest

    def remove(self, image: Image) -> bool:
        """Remove an image with all its names; False: a container uses it, and it stays."""
        import docker.errors

        try:
            with _errors(Code.ENGINE_UNREACHABLE):
                if self._client.api.containers(all=True, filters={"ancestor": f"sha256:{image.id}"}):
                    return False  # asked first: of several names, those before the refusal would be gone
                for reference in image.references or (f"sha256:{image.id}",):
                    self._client.api.remove_image(reference)
        except FednnunetError as error:
            cause = error.__cause__
            if isinstance(cause, docker.errors.APIError) and cause.status_code == 409:
                return False
            raise
        return True


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """Connect for the block."""
    connected = Engine()
    try:
        yield connected
    finally:
        connected.close()


def build(dockerfile: str, context: Path, tag: str, arguments: Mapping[str, str]) -> None:
    """Build an image without network, by the `docker` program and BuildKit; raises FNU-151.

    The Dockerfiles mount the wheelhouse with `RUN --mount`, which the builder that the SDK reaches does not know; so
    the program that DOCKER names (else `docker`) is started, and its output shown as it comes.

    Parameters
    ----------
    dockerfile : str
        Its path, seen from the context.
    context : Path
        The repository.
    tag : str
        The image's name.
    arguments : mapping of str to str
        Build arguments.
    """
    program = os.environ.get("DOCKER") or "docker"
    command = [program, "build", "--file", str(context / dockerfile), "--network", "none", "--tag", tag]
    for name, value in arguments.items():
        command += ["--build-arg", f"{name}={value}"]
    try:
        done = subprocess.run([*command, str(context)], env=os.environ | {"DOCKER_BUILDKIT": "1"}, check=False)
    except OSError as error:
        raise FednnunetError(
            Code.BUILD_FAILED, f"{program}: {error.strerror}", "Install Docker, or name the program in DOCKER."
        ) from error
    if done.returncode:
        raise FednnunetError(Code.BUILD_FAILED, f"{' '.join(command)} ended with status {done.returncode}")


def _image(attributes: dict[str, Any]) -> Image:
    labels = (attributes.get("Config") or {}).get("Labels") or {}
    title, version, revision = (str(labels.get(name) or "") for name in (TITLE, VERSION, REVISION))
    return Image(
        id=str(attributes["Id"]).removeprefix("sha256:"),
        references=tuple(attributes.get("RepoTags") or ()),
        title=title,
        version=version,
        revision=revision,
        created=str(attributes.get("Created", "")),
        size=int(attributes.get("Size") or 0),
        diff_ids=tuple(
            str(text).removeprefix("sha256:") for text in (attributes.get("RootFS") or {}).get("Layers") or ()
        ),
    )


def _events(lines: Iterator[dict[str, Any]], code: Code) -> Iterator[dict[str, Any]]:
    for line in lines:
        if "error" in line:
            raise FednnunetError(code, str(line["error"])[:500])
        yield line


def _follow(lines: Iterator[dict[str, Any]], code: Code) -> None:
    for _ in _events(lines, code):
        pass


@contextlib.contextmanager
def _errors(code: Code) -> Iterator[None]:
    """Turn what the SDK raises into a numbered error; `code` where it is none of those with a number of their own."""
    import docker.errors
    import requests

    try:
        yield
    except docker.errors.ImageNotFound as error:
        raise FednnunetError(Code.IMAGE_UNKNOWN, str(error.explanation or error)[:300]) from error
    except docker.errors.APIError as error:
        if error.status_code == 400 and "reference" in str(error.explanation):
            raise FednnunetError(Code.IMAGE_UNKNOWN, str(error.explanation)[:300]) from error
        raise FednnunetError(code, str(error.explanation or error)[:500]) from error
    except (docker.errors.DockerException, requests.exceptions.RequestException) as error:
        raise FednnunetError(Code.ENGINE_UNREACHABLE, str(error)[:300]) from error
