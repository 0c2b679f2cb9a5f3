"""Charts as helm renders them, and what every pod of ours must keep. Used by several test files.

helm 3, helm 4 and kubectl lie in build/helm (`helm/tools.sh`), or where HELM_TOOLS says.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from commands import REPOSITORY

CHARTS = REPOSITORY / "helm"
TOOLS = Path(os.environ.get("HELM_TOOLS", REPOSITORY / "build" / "helm"))
HELMS = ("helm3", "helm4")


def helm(*arguments: object, program: str = "helm4") -> subprocess.CompletedProcess[str]:
    """Run helm to its end, with no configuration of this machine's user."""
    environment = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "HELM_CACHE_HOME": "/nonexistent"}
    return subprocess.run(
        [TOOLS / program, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
        check=False,
    )


def flags(values: Mapping[str, Any] | Sequence[Path]) -> list[str]:
    """Values, by dotted name or as files, as arguments of helm."""
    if isinstance(values, Mapping):
        return [part for name, value in values.items() for part in ("--set-json", f"{name}={json.dumps(value)}")]
    return [part for file in values for part in ("--values", str(file))]


def text(
    chart: Path,
    values: Mapping[str, Any] | Sequence[Path] = (),
    *arguments: str,
    release: str = "fednnunet",
    program: str = "helm4",
) -> str:
    """What `helm template` prints."""
    done = helm("template", release, chart, "--namespace", "federation", *flags(values), *arguments, program=program)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(
    chart: Path,
    values: Mapping[str, Any] | Sequence[Path] = (),
    *arguments: str,
    release: str = "fednnunet",
    program: str = "helm4",
) -> list[dict[str, Any]]:
    """The objects of a chart."""
    return [
        each for each in yaml.safe_load_all(text(chart, values, *arguments, release=release, program=program)) if each
    ]


def refused(chart: Path, values: Mapping[str, Any], *named: str, program: str = "helm4") -> None:
    """helm refuses these values, and names each of these words."""
    done = helm("template", "fednnunet", chart, *flags(values), program=program)
    assert done.returncode != 0, f"{values} were taken"
    for word in named:
        assert word in done.stderr, f"{word!r} is not named: {done.stderr}"


def pods(documents: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every pod of every object: KIND/NAME, its metadata, its spec."""
    for document in documents:
        name = f"{document['kind']}/{document['metadata']['name']}"
        spec = document.get("spec", {})
        if document["kind"] == "Pod":
            yield name, document["metadata"], spec
        elif document["kind"] == "CronJob":
            template = spec["jobTemplate"]["spec"]["template"]
            yield name, template["metadata"], template["spec"]
        elif "template" in spec:
            yield name, spec["template"]["metadata"], spec["template"]["spec"]


_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
    "image",
}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}
_SELINUX = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def broken_rules(metadata: Mapping[str, Any], spec: Mapping[str, Any]) -> list[str]:
    """The rules of PodSecurity's profile "restricted" (with those of "baseline") that a pod breaks.

    Source: kubernetes.io, Pod Security Standards, v1.36.
    """
    whole = spec.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    found += [
        f"volume {volume['name']}" for volume in spec.get("volumes", []) if not set(volume) - {"name"} <= _VOLUMES
    ]
    found += [f"sysctl {each['name']}" for each in whole.get("sysctls", []) if each["name"] not in _SYSCTLS]
    found += [
        f"annotation {name}"
        for name, value in metadata.get("annotations", {}).items()
        if "apparmor.security" in name and value != "runtime/default" and not value.startswith("localhost/")
    ]
    found += [f"pod: {rule}" for rule in _context(whole)]
    containers = [
        each for kind in ("initContainers", "containers", "ephemeralContainers") for each in spec.get(kind, [])
    ]
    for container in containers:
        name, own = container["name"], container.get("securityContext", {})
        effective = {**{key: whole[key] for key in ("runAsNonRoot", "seccompProfile") if key in whole}, **own}
        rules = _context(own)
        capabilities = own.get("capabilities", {})
        if capabilities.get("drop") != ["ALL"]:
            rules.append("capabilities.drop")
        if not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}:
            rules.append("capabilities.add")
        if own.get("allowPrivilegeEscalation") is not False:
            rules.append("allowPrivilegeEscalation")
        if effective.get("runAsNonRoot") is not True:
            rules.append("runAsNonRoot")
        if effective.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            rules.append("seccompProfile")
        if any(port.get("hostPort") for port in container.get("ports", [])):
            rules.append("hostPort")
        for probe in ("startupProbe", "livenessProbe", "readinessProbe", "lifecycle"):
            if '"host"' in json.dumps(container.get(probe, {})):
                rules.append(f"{probe}.host")
        found += [f"{name}: {rule}" for rule in rules]
    return found


def _context(context: Mapping[str, Any]) -> list[str]:
    """What neither a pod nor a container may say."""
    found = []
    if context.get("privileged"):
        found.append("privileged")
    if context.get("runAsUser") == 0:
        found.append("runAsUser")
    if context.get("procMount", "Default") != "Default":
        found.append("procMount")
    if context.get("windowsOptions", {}).get("hostProcess"):
        found.append("hostProcess")
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
        found.append("appArmorProfile")
    selinux = context.get("seLinuxOptions", {})
    if selinux.get("type", "") not in _SELINUX or selinux.get("user") or selinux.get("role"):
        found.append("seLinuxOptions")
    if context.get("runAsNonRoot") is False:
        found.append("runAsNonRoot")
    if context.get("seccompProfile", {}).get("type") == "Unconfined":
        found.append("seccompProfile")
    return found
