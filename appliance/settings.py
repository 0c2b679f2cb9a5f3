"""A site's settings: `site.toml` and the environment, checked at start.

Rules:

- An environment variable `FEDNNUNET_NAME` wins over the file; the file wins over the default.
- A key that is not known is an error (FNU-112), never ignored.
- A folder that is given for the file stands for the site.toml in it.
- Nothing here comes from the network: what a study may choose stands in the study.
"""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance import devices
from federation import logs
from federation import study as studies
from federation.errors import Code, FednnunetError
from federation.faults import faults
from federation.study import SITE_NAME

PREFIX = "FEDNNUNET_"
ADDRESS = r"^[^/\s]+:[0-9]{1,5}$"
PATHS = ("data", "state", "ca_certificate", "site_key", "coordinator_key", "policy")

PATTERNS = {
    SITE_NAME: studies.PATTERNS[SITE_NAME],
    ADDRESS: "`HOST:PORT`",
    devices.PATTERN: "device: cuda, cuda:N, mps or cpu",
}
"""Patterns of text in words."""


class Settings(BaseModel):
    """Everything that one site decides for itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=SITE_NAME, description="The site's enrolled name.")
    orchestrator: str = Field(pattern=ADDRESS, description="HOST:PORT of the orchestrator's listener for hospitals.")
    data: Path = Field(
        Path("/data"),
        description="The dataset in nnU-Net's raw format, mounted read-only: the folder that holds dataset.json, or "
        "one that holds a single DatasetNNN_Name.",
    )
    state: Path = Field(Path("/state"), description="Folder for everything the appliance writes.")
    ca_certificate: Path = Field(Path("/config/ca.crt"), description="PEM certificate of the orchestrator's authority.")
    site_key: Path = Field(Path("/config/site.key"), description="The site's private key (OpenSSH format, NIST P-384).")
    coordinator_key: Path = Field(
        Path("/config/coordinator.pub"), description="PEM public key of the coordinator, from the invitation."
    )
    policy: Path = Field(Path("/config/policy.toml"), description="What this hospital allows (appliance.link.policy).")
    device: str = Field("cuda", pattern=devices.PATTERN, description="Device to train on (-device).")
    preprocessing_processes: int = Field(4, ge=1, description="Processes for preprocessing and export (-np).")
    fingerprint_processes: int = Field(4, ge=1, description="Processes for reading the dataset (-npfp).")
    augmentation_processes: int | None = Field(
        None,
        ge=0,
        description="Processes that load and augment patches; 0: none but the worker; empty: nnU-Net's choice.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of the worker; empty: one beside a GPU, else torch's choice."
    )
    compile: bool = Field(True, description="torch.compile on a GPU (nnU-Net's nnUNet_compile).")
    supernode_port: int = Field(
        0, ge=0, le=65535, description="Loopback port between supernode and link; 0: any that is free."
    )
    poll: float = Field(0.5, gt=0, le=10, description="Seconds between two looks for a new task.")
    log_format: logs.Format = Field(
        "rich", description="What `appliance start` prints: lines for people, or one line of JSON for each event."
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of the metrics for the hospital's own Prometheus; 0: none."
    )
    metrics_host: str = Field("127.0.0.1", description="Address of the metrics.")
    strict_mounts: bool = Field(
        False,
        description="Refuse to start as root, with data that could be written, or with a small /dev/shm. The "
        "image sets it.",
    )

    @property
    def spool(self) -> Path:
        """The spool's folder."""
        return self.state / "spool"

    @property
    def work(self) -> Path:
        """The worker's folder: preprocessed data, checkpoints, models, reports. The link never reads it."""
        return self.state / "worker"

    @property
    def compiles(self) -> bool:
        """Whether torch.compile is used: asked for, on a GPU, and there is the C compiler that Triton needs for it."""
        compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
        return self.compile and self.device.startswith("cuda") and any(map(shutil.which, compilers))


@dataclass(frozen=True)
class Resolved:
    """Settings, and where each came from.

    Attributes
    ----------
    settings : Settings
        The effective settings.
    sources : dict
        For each setting `default`, the path of the file, the name of the variable, or `command line`.
    """

    settings: Settings
    sources: dict[str, str]


def site_toml(given: Path) -> Path:
    """The file that `--config` means: of a folder the site.toml in it; raises FNU-112 where it holds none."""
    if not os.path.isdir(given):
        return given
    if not os.path.isfile(given / "site.toml"):
        raise FednnunetError(
            Code.SETTINGS_INVALID, f"{given} is a folder, and holds no site.toml", "Give the file: --config SITE.toml."
        )
    return given / "site.toml"


def load(file: Path | None, environment: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
    """Settings from a TOML file, the environment and the command line, in rising order; raises FNU-112 or FNU-131."""
    return resolve(file, environment, **overrides).settings


def resolve(file: Path | None, environment: Mapping[str, str] = os.environ, **overrides: Any) -> Resolved:
    """What `load` returns, with where each setting came from.

    An empty variable stands for "empty" where a setting may be empty, and for nothing elsewhere.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(Settings.model_fields, "default")
    found = False
    if file is not None:
        file = site_toml(file)
        try:
            values.update(tomllib.loads(file.read_text(encoding="utf-8")))
            found = True
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError as error:
            raise FednnunetError(Code.MOUNT_UNREADABLE, f"{file}: uid {os.geteuid()} may not read it") from error
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FednnunetError(Code.SETTINGS_INVALID, f"{file}: {error}") from error
        sources.update(dict.fromkeys(values, str(file)))
        for key in PATHS:  # relative to the file they stand in
            if isinstance(values.get(key), str):
                values[key] = file.parent / values[key]
    for key, field in Settings.model_fields.items():
        value = environment.get(PREFIX + key.upper())
        if value == "" and field.default is not None:
            continue
        if value is not None:
            values[key], sources[key] = value or None, PREFIX + key.upper()
    given = {key: value for key, value in overrides.items() if value is not None}
    values.update(given)
    sources.update(dict.fromkeys(given, "command line"))
    if file is not None and not found and not {"name", "orchestrator"} <= set(values):
        raise FednnunetError(Code.CONFIG_MISSING, str(file))
    try:
        return Resolved(Settings.model_validate(values), sources)
    except ValidationError as error:
        said = "; ".join(faults(error, Settings, PATTERNS))
        raise FednnunetError(Code.SETTINGS_INVALID, f"{file or 'environment'}: {said}") from error
