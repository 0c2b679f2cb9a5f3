"""Whether the device of site.toml is there, which driver drives it, and whether its memory is what the plan fills."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from appliance.doctor import child
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Number, fail, ok, warn
from federation.errors import Code

TARGETS = {"nnUNetPlannerResEncL": 24.0, "nnUNetPlannerResEncXL": 40.0, "SmallUNetPlanner": 1.0}
"""GB that nnU-Net's planners fill by themselves; the others: 8."""
SECONDS = 120.0


def check(context: Context) -> list[Finding]:
    """Ask torch in a child process, and nvidia-smi where there is one."""
    return judge(context, child.ask(context, "device", SECONDS), nvidia_smi())


def nvidia_smi() -> dict[str, str] | None:
    """Driver and GPUs as nvidia-smi says them; None where it is not there or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--query-gpu=driver_version,name", "--format=csv,noheader"],
            capture_output=True,
            timeout=20,
            encoding="utf-8",
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    return {"driver": rows[0][0], "gpus": ", ".join(row[1] for row in rows)} if rows else None


def target(context: Context) -> float:
    """GB that the plan may fill."""
    if context.study is None:
        return 8.0
    return context.study.gpu_memory_target or TARGETS.get(context.study.planner, 8.0)


def judge(context: Context, torch: dict[str, Any], driver: dict[str, str] | None) -> list[Finding]:
    """Findings from what torch and nvidia-smi say."""
    kind, _, index = context.settings.device.partition(":")
    measured: dict[str, Number] = {"device": kind, "torch": torch["torch"], "cuda": torch["cuda"]}
    if driver is not None:
        measured["driver"] = driver["driver"]
    if kind == "cpu":
        spare = f"; a GPU is there ({torch['gpus'][0]['name']})" if torch["gpus"] else ""
        found = f"device = cpu (threads: {torch['threads']}){spare}"
        if spare:
            return [warn(found, "Set device = cuda in site.toml to train on the GPU.", measured=measured)]
        return [ok(f"{found}: enough for small networks; the default one takes days without a GPU", measured=measured)]
    if kind == "mps":
        if torch["mps"]:
            return [ok("device = mps is there", measured=measured)]
        return [
            fail(Code.DEVICE_MISSING, "device = mps is not there", "Set device = cpu in site.toml.", measured=measured)
        ]
    number = int(index or 0)
    if number >= len(torch["gpus"]):
        return [_missing(context, torch, driver, number, measured)]
    gpu = torch["gpus"][number]
    total, free, wanted = gpu["total"] / 1e9, gpu["free"] / 1e9, target(context)
    shown = f", driver {driver['driver']}" if driver else ""
    measured |= {"gpu": gpu["name"], "total_gb": round(total, 1), "free_gb": round(free, 1), "target_gb": wanted}
    found = f"{gpu['name']}, {free:.1f} of {total:.1f} GB free, CUDA {torch['cuda']}{shown}"
    if total < wanted:
        return [
            fail(
                Code.GPU_TOO_SMALL,
                f"{found}; the plan may fill {wanted:g} GB",
                f"Ask the coordinator for gpu_memory_target {max(int(total) - 1, 1)} or less, or use a larger GPU.",
                measured=measured,
            )
        ]
    if free < wanted:
        return [
            warn(
                f"{found}; the plan may fill {wanted:g} GB",
                "Something else uses this GPU (nvidia-smi says what): end it before the study starts.",
                Code.GPU_TOO_SMALL,
                measured=measured,
            )
        ]
    without = "" if context.settings.compiles or not context.settings.compile else "; no C compiler: no torch.compile"
    return [ok(f"{found}; the plan may fill {wanted:g} GB{without}", measured=measured)]


def _missing(
    context: Context, torch: dict[str, Any], driver: dict[str, str] | None, number: int, measured: dict[str, Number]
) -> Finding:
    if torch["gpus"]:
        found = f"device = cuda:{number}, but there are {len(torch['gpus'])} GPUs"
        advice = f"Set device to cuda:0 up to cuda:{len(torch['gpus']) - 1} in site.toml."
    elif torch["cuda"] is None:
        found = f"device = cuda, but this torch ({torch['torch']}) was built without CUDA"
        advice = "Install the CUDA build of torch, or set device = cpu in site.toml."
    elif driver is not None:
        found = f"nvidia-smi sees a GPU (driver {driver['driver']}), torch (CUDA {torch['cuda']}) does not"
        advice = "Update the driver to one that knows this CUDA; look at CUDA_VISIBLE_DEVICES."
    elif any(context.machine.devices.glob("nvidia[0-9]*")):
        found = "a GPU is there, but its driver does not answer"
        advice = "Let IT look at the driver (dmesg, nvidia-smi on the host), then start the container again."
    else:
        found = "device = cuda, and no GPU is to be seen"
        advice = (
            "Start the container with --gpus all (the host needs NVIDIA's container toolkit), or set device = cpu in "
            "site.toml."
        )
    return fail(Code.DEVICE_MISSING, found, advice, measured=measured)
