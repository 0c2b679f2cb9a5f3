"""`python -m appliance.worker --config site.toml`: start the worker process.

Rules:

- Variables that nnU-Net and the numerical libraries read when they are imported are set before they are.
- The network is refused before anything else is imported.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from appliance import devices
from appliance import settings as site_settings
from appliance.worker import process
from federation import console, logs
from federation.errors import FednnunetError

log = logging.getLogger("fednnunet.worker")


def environment(settings: site_settings.Settings) -> dict[str, str]:
    """The variables of nnU-Net and of the numerical libraries that follow from a site's settings."""
    variables = {
        "nnUNet_def_n_proc": str(settings.preprocessing_processes),
        "nnUNet_compile": "true" if settings.compiles else "false",
        "nnUNet_wandb_enabled": "0",
    }
    if settings.augmentation_processes is not None:
        variables["nnUNet_n_proc_DA"] = str(settings.augmentation_processes)
    if settings.threads is not None:
        variables["OMP_NUM_THREADS"] = str(settings.threads)
    if (seen := devices.visible(settings.device, os.environ)) is not None:  # nnU-Net trains on the first that it sees
        variables["CUDA_VISIBLE_DEVICES"] = seen
    return variables


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the worker until SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m appliance.worker", description=__doc__)
    parser.add_argument("--config", type=Path, help="site.toml; FEDNNUNET_* variables win over it")
    chosen = parser.parse_args(arguments)
    try:
        settings = site_settings.load(chosen.config)
        logs.configure()
        os.environ.update(environment(settings))
        if settings.compile and settings.device.startswith("cuda") and not settings.compiles:
            log.warning("no C compiler here: torch.compile is off, an epoch takes somewhat longer")
        os.environ.pop("nnUNet_extTrainer", None)
        stop = threading.Event()
        process.lead(stop)
        process.refuse_network()
        from appliance.worker.loop import Worker

        return Worker(settings, stop).run()
    except FednnunetError as error:
        console.show(error)
        return error.exit_status


if __name__ == "__main__":
    status = main()
    process.kill_children()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # torch and CUDA take seconds to come down; everything on the disk is whole
