"""Whether the packages are those that this version was tested with, and which bundle it accepts.

The constraints are `constraints.txt`: beside the package in an installation, at the root of a checkout. Flower and
nnU-Net must be exactly those: the wire and the plans hang on them. Another version of anything else is a warning.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import appliance
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Number, fail, ok, warn
from federation.errors import Code
from federation.tasks import PROTOCOL

EXACT = ("flwr", "nnunetv2")
NEEDED = (*EXACT, "torch", "numpy", "safetensors", "simpleitk", "cryptography", "pydantic", "httpx")
_PACKAGE = Path(appliance.__file__).parent
FILES = (_PACKAGE / "constraints.txt", _PACKAGE.parent / "constraints.txt")
_LINE = re.compile(r"^([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)\s*$", re.MULTILINE)


def check(context: Context) -> list[Finding]:
    """Compare what is installed with the constraints; name the bundle."""
    installed = {
        _plain(distribution.metadata["Name"] or ""): distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return [_program(installed), *compare(_constraints(), installed), *_bundle(installed)]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _constraints() -> dict[str, str] | None:
    for path in FILES:
        if path.is_file():
            return {_plain(name): version for name, version in _LINE.findall(path.read_text(encoding="utf-8"))}
    return None


def _program(installed: dict[str, str]) -> Finding:
    own = installed.get("fednnunet", "not installed, from a checkout")
    system = f"{platform.system()} {platform.machine()}"
    return ok(
        f"FednnU-Net Appliance {own}, Python {platform.python_version()}, {system}",
        measured={"fednnunet": own, "python": platform.python_version(), "system": system},
    )


def compare(constraints: dict[str, str] | None, installed: dict[str, str]) -> list[Finding]:
    """What differs from the constraints (names as PyPI spells them in small letters, with hyphens)."""
    missing = [name for name in NEEDED if name not in installed]
    findings = []
    if missing:
        findings.append(
            fail(
                Code.EXTRA_MISSING,
                f"not installed: {', '.join(missing)}",
                "Install the extra: pip install -c constraints.txt '.[appliance]'",
            )
        )
    if constraints is None:
        findings.append(
            warn("the list of versions that this release was tested with is not there", "Install from a release.")
        )
        return findings
    differ = {
        name: (version, constraints[name])
        for name, version in sorted(installed.items())
        if name in constraints and version.partition("+")[0] != constraints[name]
    }
    exact = {name: differ.pop(name) for name in EXACT if name in differ}
    if exact:
        findings.append(
            fail(
                Code.VERSION_DIFFERS,
                f"{_listed(exact)}: another version cannot take part",
                "Install with pip install -c constraints.txt, or use the image of this release.",
            )
        )
    if differ:
        findings.append(
            warn(
                f"not the versions that this release was tested with: {_listed(differ)}",
                "Install with pip install -c constraints.txt, or use the image of this release.",
                Code.VERSION_DIFFERS,
            )
        )
    versions: dict[str, Number] = {name: installed[name] for name in NEEDED if name in installed}
    same = sum(1 for name in installed if name in constraints) - len(exact) - len(differ)
    shown = ", ".join(f"{name} {installed[name]}" for name in (*EXACT, "torch") if name in installed)
    findings.append(ok(f"{same} packages as tested; {shown}", measured=versions))
    return findings


def _listed(differ: dict[str, tuple[str, str]]) -> str:
    shown = [f"{name} is {version}, tested with {wanted}" for name, (version, wanted) in differ.items()]
    return "; ".join(shown[:8]) + (f"; and {len(shown) - 8} more" if len(shown) > 8 else "")


def _bundle(installed: dict[str, str]) -> list[Finding]:
    if "flwr" not in installed:
        return []
    from federation.flower.bundle import bundle_hash

    return [
        ok(
            f"protocol {PROTOCOL}, bundle {bundle_hash()[:16]}: must be the same at the orchestrator",
            measured={"protocol": PROTOCOL, "bundle_sha256": bundle_hash()},
        )
    ]
