"""How much memory the worker may use: the machine's, or the container's limit where that is lower.

The bounds are our own judgement: the worker with the default network and nnU-Net's loaders takes 8 to 16 GB.
"""

from __future__ import annotations

import re
from pathlib import Path

from appliance.doctor.context import Context, Machine
from appliance.doctor.finding import Finding, Number, fail, ok, skipped, warn
from federation.errors import Code

LEAST, ENOUGH = 4e9, 15e9


def check(context: Context) -> list[Finding]:
    """Compare the memory, and what of it is available, with the bounds."""
    try:
        text = context.machine.meminfo.read_text()
    except OSError:
        return [skipped("this system does not say how much memory it has")]
    values = {name: int(value) * 1024 for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    total = values["MemTotal"]
    available = values.get("MemAvailable", total)
    limit, used = cgroup_limit(context.machine)
    limited = limit is not None and limit < total
    if limited and limit is not None:
        total, available = limit, max(0, min(available, limit - used))
    whose = "the container may use" if limited else "this machine has"
    found = f"{whose} {total / 1e9:.1f} GB, {available / 1e9:.1f} GB of it available"
    measured: dict[str, Number] = {
        "total_gb": round(total / 1e9, 1),
        "available_gb": round(available / 1e9, 1),
        "container_limit": limited,
    }
    advice = (
        "Give the container more memory (--memory)" if limited else "Use a machine with more memory"
    ) + ", or fewer preprocessing_processes and augmentation_processes in site.toml."
    if total < LEAST or available < LEAST / 2:
        return [
            fail(
                Code.MEMORY_SMALL, f"{found}; {LEAST / 1e9:g} GB are the least to begin with", advice, measured=measured
            )
        ]
    if total < ENOUGH:
        return [warn(f"{found}; the default network wants 16 GB", advice, Code.MEMORY_SMALL, measured=measured)]
    return [ok(found, measured=measured)]


def cgroup_limit(machine: Machine) -> tuple[int | None, int]:
    """The least limit of this process's control group or one above it (v2, else v1), and what it uses now."""
    try:
        lines = machine.own_cgroup.read_text().splitlines()
    except OSError:
        lines = []
    paths = {
        controllers: path for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") > 1)
    }
    found: list[tuple[int, int]] = []
    for root, own, limit, usage in (
        (machine.cgroup, paths.get("", "/"), "memory.max", "memory.current"),
        (machine.cgroup / "memory", paths.get("memory", "/"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        folder = root / own.lstrip("/")
        for place in (folder, *folder.parents):
            bound, used = _number(place / limit), _number(place / usage)
            if bound is not None:
                found.append((bound, used or 0))
            if place == root:
                break
    return min(found, default=(None, 0))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": no limit
        return None
