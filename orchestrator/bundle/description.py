"""The two small members that say what a bundle holds: `SHA256SUMS` and `bundle.json`; and the image's configuration."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from federation.enrollment import Moment
from federation.errors import Code, FednnunetError
from federation.files import canonical_json
from orchestrator.bundle.versions import version_key

SUMS, SIGNATURE, DESCRIPTION, CONFIG, SBOM = (
    "SHA256SUMS",
    "SHA256SUMS.sig",
    "bundle.json",
    "config.json",
    "sbom.cdx.json",
)
SIGNATURE_BYTES = 64
MAX_SMALL = 4 * 2**20
"""Bytes of the manifest, the description or the configuration; real ones stay below 100 KiB."""
TITLE, VERSION, REVISION = (f"org.opencontainers.image.{name}" for name in ("title", "version", "revision"))

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Text = Annotated[str, Field(max_length=200, pattern=r"^[ -~]*$")]
Reference = Annotated[str, Field(max_length=300, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]*$")]
Size = Annotated[int, Field(ge=0, lt=2**50)]
_LINE = re.compile(rf"([0-9a-f]{{64}})  ({DESCRIPTION}|{CONFIG}|layers/[0-9a-f]{{64}}\.tar\.gz|{SBOM})\n")


def layer_member(diff_id: str) -> str:
    """The member that holds a layer."""
    return f"layers/{diff_id}.tar.gz"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Layer(_Part):
    """One layer of the image.

    Attributes
    ----------
    diff_id : str
        SHA-256 of the layer's tar file, in hex.
    size : int
        Its bytes, unpacked.
    included : bool
        Whether it is in the bundle; else it comes from the base.
    """

    diff_id: Hex
    size: Size
    included: bool


class Since(_Part):
    """The image that a bundle of changed layers builds on."""

    image: Hex
    version: Text
    references: Annotated[list[Reference], Field(max_length=20)]


class Description(_Part):
    """`bundle.json`."""

    format: Literal["fednnunet image bundle 1"] = "fednnunet image bundle 1"
    references: Annotated[list[Reference], Field(max_length=20)]
    image: Hex
    title: Text
    version: Text
    revision: Text
    platform: Text
    created: Moment
    expires: Moment
    signer: Hex | None
    layers: Annotated[list[Layer], Field(max_length=1000)]
    since: Since | None

    def data(self) -> bytes:
        """The member's bytes: readable, one spelling."""
        return (json.dumps(self.model_dump(), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, data: bytes, where: str) -> Self:
        """Parse the member; raises FNU-140 where it is of another format, which a later version may write."""
        try:
            read = cls.model_validate_json(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise FednnunetError(
                Code.BUNDLE_UNREADABLE,
                f"{where}: bundle.json is not of this format: {field}: {first['msg']}",
                "Use the `fednnunet` of the version that wrote the bundle, or a later one.",
            ) from error
        return read

    @property
    def included(self) -> list[Layer]:
        """The layers that are in the bundle."""
        return [layer for layer in self.layers if layer.included]


def sums_of(hashes: dict[str, str]) -> bytes:
    """The manifest's bytes, for hashes by member name."""
    return "".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()


def read_sums(data: bytes, where: str) -> dict[str, str]:
    """Hashes by member name; raises FNU-142 unless it is such a manifest as `sums_of` writes."""
    found = {match[2]: match[1] for match in _LINE.finditer(data.decode("ascii", "replace"))}
    if sums_of(found) != data or list(found)[:2] != [DESCRIPTION, CONFIG]:
        raise FednnunetError(Code.BUNDLE_MANIFEST_CHANGED, f"{where}: {SUMS} is not such a manifest")
    return found


@dataclass(frozen=True)
class ImageConfig:
    """What an image's configuration says.

    Attributes
    ----------
    diff_ids : tuple of str
        SHA-256 of each layer's tar file, lowest first, in hex; one may stand there twice.
    title, version, revision : str
        From the image's labels; empty where there is none.
    platform : str
        `linux/amd64` and the like.
    """

    diff_ids: tuple[str, ...]
    title: str
    version: str
    revision: str
    platform: str

    @classmethod
    def read(cls, data: bytes, where: str) -> Self:
        """Parse a configuration; raises FNU-150."""
        try:
            value: Any = json.loads(data)
            labels = (value.get("config") or {}).get("Labels") or {}
            diff_ids = tuple(str(text) for text in value["rootfs"]["diff_ids"])
            platform = f"{value.get('os', '')}/{value.get('architecture', '')}"
            title, version, revision = (str(labels.get(name) or "") for name in (TITLE, VERSION, REVISION))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FednnunetError(Code.IMAGE_UNSUITABLE, f"{where}: its configuration cannot be read") from error
        if not diff_ids or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in diff_ids):
            raise FednnunetError(Code.IMAGE_UNSUITABLE, f"{where}: its configuration names no layers by SHA-256")
        return cls(tuple(text.removeprefix("sha256:") for text in diff_ids), title, version, revision, platform)

    @property
    def layers(self) -> list[str]:
        """Each diff id once, lowest first."""
        return list(dict.fromkeys(self.diff_ids))

    def check_labels(self, where: str) -> None:
        """Raise FNU-150 unless title and version are there: without them no downgrade can be seen."""
        if not self.title or version_key(self.version) is None:
            raise FednnunetError(
                Code.IMAGE_UNSUITABLE,
                f"{where}: label {TITLE} is {self.title!r}, label {VERSION} is {self.version!r}",
            )


def docker_manifest(description: Description, config: ImageConfig) -> bytes:
    """`manifest.json` of the archive that `docker load` reads."""
    entry = {
        "Config": f"{description.image}.json",
        "RepoTags": description.references,
        "Layers": [f"{diff_id}.tar" for diff_id in config.diff_ids],
    }
    return canonical_json([entry])
