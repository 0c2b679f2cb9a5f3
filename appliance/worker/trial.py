"""`python -m appliance.worker.trial device|dataset|training`: what `appliance doctor` asks the worker's half.

Rules:

- The question is JSON on standard input (`settings`, `study`), the answer one line of JSON on standard output:
  ``{"answer": ...}`` or ``{"error": {number, found, advice}}``.
- As in the worker, the network is refused before torch or nnU-Net is imported, and nothing is written into the data.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import threading
import time
from typing import Any

from appliance import devices
from appliance.settings import Settings
from appliance.worker import process
from appliance.worker.__main__ import environment
from federation import native
from federation.errors import Code, FednnunetError
from federation.study import Study

GPU_PATCH, GPU_BATCH = (128, 128, 128), 2
CPU_PATCH, CPU_BATCH = (64, 32, 32), 1  # the least that this network takes
STAGES = 6
SLOW = 1.0
"""Seconds of a first iteration that are taken as the measurement on a CPU."""


def device(settings: Settings, study: Study | None) -> dict[str, Any]:
    """What torch sees."""
    import torch

    gpus = []
    for number in range(torch.cuda.device_count()) if torch.cuda.is_available() else ():
        free, total = torch.cuda.mem_get_info(number)
        gpus.append({"name": torch.cuda.get_device_name(number), "free": free, "total": total})
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "mps": torch.backends.mps.is_available(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def dataset(settings: Settings, study: Study | None) -> dict[str, Any]:
    """Problems and warnings by number, with file names; without a study, what dataset.json says of itself."""
    from appliance.worker import contents
    from appliance.worker.dataset import examine, find_dataset

    folder = find_dataset(settings.data)
    if study is None:
        listed = contents.dataset_json_of(folder).get("numTraining")
        return {"problems": [], "warnings": [], "training_cases": listed, "test_cases": None}
    found = examine(folder, study, settings.fingerprint_processes)
    return {
        "problems": _grouped(found.problems),
        "warnings": _grouped(found.warnings),
        "training_cases": len(found.cases),
        "test_cases": len(found.test_cases),
    }


def _grouped(findings: list[Any]) -> list[dict[str, Any]]:
    groups: dict[int, list[str]] = {}
    for item in findings:
        groups.setdefault(item.code.number, []).append(f"{item.file}: {item.detail}")
    return [{"number": number, "count": len(lines), "lines": lines[:20]} for number, lines in sorted(groups.items())]


def training(settings: Settings, study: Study | None) -> dict[str, Any]:
    """Time iterations of nnU-Net's default 3D network on the device.

    Returns
    -------
    dict
        device, patch_size (voxels), batch_size, seconds of one iteration, peak_bytes.
    """
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from torch import nn

    kind = settings.device.partition(":")[0]
    devices.require(torch, kind)
    patch, batch = (GPU_PATCH, GPU_BATCH) if kind == "cuda" else (CPU_PATCH, CPU_BATCH)
    native.use_threads(torch, settings.device, settings.threads)
    torch.backends.cudnn.benchmark = kind == "cuda"
    where = torch.device(kind)
    strides = [1, *[2] * (STAGES - 1)]
    try:
        network: Any = PlainConvUNet(
            input_channels=1,
            n_stages=STAGES,
            features_per_stage=[32, 64, 128, 256, 320, 320],
            conv_op=nn.Conv3d,
            kernel_sizes=3,
            strides=strides,
            n_conv_per_stage=2,
            num_classes=3,
            n_conv_per_stage_decoder=2,
            conv_bias=True,
            norm_op=nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True},
            nonlin=nn.LeakyReLU,
            nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        ).to(where)
        loss = DeepSupervisionWrapper(
            DC_and_CE_loss(
                {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False},
                {},
                dice_class=MemoryEfficientSoftDiceLoss,
            ),
            [0.5**level for level in range(STAGES - 1)],
        )
        optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.99, nesterov=True)
        image = torch.randn(batch, 1, *patch, device=where)
        sizes = [[length // 2**level for length in patch] for level in range(STAGES - 1)]
        target = [torch.randint(0, 3, (batch, 1, *size), device=where).float() for size in sizes]

        def iteration() -> float:
            started = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(kind, enabled=kind == "cuda"):
                value = loss(network(image), target)
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12)
            optimizer.step()
            value.item()  # waits for the device
            return time.perf_counter() - started

        times = [iteration()]  # it allocates and chooses algorithms: on a slow device that is nothing beside the rest
        if times[0] < SLOW or kind == "cuda":
            times = [iteration() for _ in range(5)]
    except (RuntimeError, MemoryError) as error:
        if devices.is_out_of_memory(error):
            raise FednnunetError(Code.OUT_OF_MEMORY, str(error).splitlines()[0]) from error
        raise
    peak = (
        torch.cuda.max_memory_reserved()
        if kind == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    )
    return {
        "device": kind,
        "patch_size": list(patch),
        "batch_size": batch,
        "seconds": sorted(times)[len(times) // 2],
        "peak_bytes": peak,
    }


QUESTIONS = {"device": device, "dataset": dataset, "training": training}


def main() -> int:
    """Answer one question; returns the exit status."""
    question = json.loads(sys.stdin.buffer.read())
    settings = Settings.model_validate(question["settings"])
    study = None if question["study"] is None else Study.model_validate(question["study"])
    if sys.argv[1] == "device":  # all of them are looked at, whichever the site chose
        settings = settings.model_copy(update={"device": settings.device.partition(":")[0]})
    os.environ.update(environment(settings))
    process.lead(threading.Event())
    process.refuse_network()
    try:
        answer = {"answer": QUESTIONS[sys.argv[1]](settings, study)}
    except FednnunetError as error:
        answer = {"error": {"number": error.code.number, "found": error.found, "advice": error.advice}}
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    status = main()
    process.kill_children()
    os._exit(status)
