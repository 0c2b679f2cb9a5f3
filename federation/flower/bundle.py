"""The app bundle: Flower wants one for every run; ours names the version and carries no code that is ever run.

Rules:

- The same version gives the same bytes, so the bundle's SHA-256 is allowlist and version handshake in one.
- Neither the coordinator nor a link ever unpacks a bundle: they compare the hash.
"""

from __future__ import annotations

import functools
import hashlib

from flwr.cli.build import build_fab_from_files

from federation.tasks import PROTOCOL

_SHELL = f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "fednnunet"
version = "{PROTOCOL}.0.0"
description = "Shell bundle: names the protocol of FednnU-Net Appliance, carries no code that is ever run"
license = "Apache-2.0"
dependencies = ["flwr==1.41.0"]
[tool.flwr.app]
publisher = "fednnunet"
[tool.flwr.app.components]
serverapp = "coordinator:app"
clientapp = "link:app"
[tool.flwr.app.config]
study = ""
submission = ""
""".encode()
_NOTHING = b"app = None\n"


@functools.cache
def bundle() -> bytes:
    """The bundle's bytes."""
    content: bytes = build_fab_from_files({"pyproject.toml": _SHELL, "coordinator.py": _NOTHING, "link.py": _NOTHING})[
        0
    ]
    return content


@functools.cache
def bundle_hash() -> str:
    """SHA-256 of the bundle, in hex."""
    return hashlib.sha256(bundle()).hexdigest()
