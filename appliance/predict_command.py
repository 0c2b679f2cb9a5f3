"""`appliance predict`: what a person runs on a folder of images, and each pod of a Job on its part of it."""

from __future__ import annotations

import logging
import re
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from federation import console, logs

PREFIX = "FEDNNUNET_PREDICT_"


def predict(
    inputs: Annotated[
        Path, typer.Option("--input", help="Folder of images CASE_0000.nii.gz, ...", envvar=f"{PREFIX}INPUT")
    ],
    outputs: Annotated[Path, typer.Option("--output", help="Folder of the predictions.", envvar=f"{PREFIX}OUTPUT")],
    model: Annotated[
        Path | None,
        typer.Option(
            help="nnU-Net's folder TRAINER__PLANS__CONFIGURATION, one that holds it, or an exported zip.",
            envvar=f"{PREFIX}MODEL",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(help="I/N: part I of N, counted from 0.", show_default="all, or that of an Indexed Job's pod"),
    ] = None,
    folds: Annotated[
        str, typer.Option(help="Folds to average, as 0,1,2.", envvar=f"{PREFIX}FOLDS", show_default="all there are")
    ] = "",
    checkpoint: Annotated[
        str, typer.Option(help="File name of the weights in each fold.", envvar=f"{PREFIX}CHECKPOINT")
    ] = "checkpoint_final.pth",
    previous_stage: Annotated[
        Path | None,
        typer.Option(help="A cascade's predictions of its first stage.", envvar=f"{PREFIX}PREVIOUS_STAGE"),
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write CASE.npz.", envvar=f"{PREFIX}SAVE_PROBABILITIES")
    ] = False,
    disable_tta: Annotated[
        bool,
        typer.Option(
            "--disable-tta", help="Do not predict mirrored images too: faster.", envvar=f"{PREFIX}DISABLE_TTA"
        ),
    ] = False,
    step_size: Annotated[
        float,
        typer.Option(
            help="Step of the sliding window, as a part of the patch.", min=0.05, max=1, envvar=f"{PREFIX}STEP_SIZE"
        ),
    ] = 0.5,
    device: Annotated[str, typer.Option(help="cuda, cuda:N, mps or cpu.", envvar=f"{PREFIX}DEVICE")] = "cuda",
    preprocessing_processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that preprocess ahead.",
            min=0,
            envvar=f"{PREFIX}PREPROCESSING_PROCESSES",
            show_default="2 on a GPU, else 0",
        ),
    ] = None,
    export_processes: Annotated[
        int | None,
        typer.Option(
            help="Processes that export.",
            min=0,
            envvar=f"{PREFIX}EXPORT_PROCESSES",
            show_default="2 on a GPU, else 0",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="CPU threads.", min=1, envvar=f"{PREFIX}THREADS", show_default="one beside a GPU, else torch's choice"
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Remove predictions that were made otherwise.", envvar=f"{PREFIX}OVERWRITE"),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Predict nothing: say what is there, and what is missing.")
    ] = False,
    log_format: Annotated[
        logs.Format,
        typer.Option(help="Lines for people, or one line of JSON for each event.", envvar="FEDNNUNET_LOG_FORMAT"),
    ] = "rich",
) -> None:
    """Predict a folder of images with a trained model, or one shard of it. A start again does what is missing.

    The files are those of nnUNetv2_predict, byte for byte. Ends with FNU-411 (status 14) unless every image of this
    shard, and with --check of the whole folder, has a prediction.
    """
    started = time.perf_counter()
    from appliance import batch, devices
    from federation.errors import Code, FednnunetError

    logs.lead(log_format, "predict")
    if check:
        summary = batch.Outputs(outputs).look(inputs)
        _show(summary, log_format)
        batch.require_complete(summary)
        return
    if model is None:
        raise FednnunetError(Code.SETTINGS_INVALID, "--model is missing", "Give the model's folder or zip.")
    part = batch.shard(shard)
    console.require("appliance", "nnunetv2", "torch")
    if not re.fullmatch(devices.PATTERN, device):
        raise FednnunetError(Code.SETTINGS_INVALID, f"--device {device}: cuda, cuda:N, mps or cpu")
    from appliance import inference

    options = inference.Options(
        inputs=inputs,
        outputs=outputs,
        model=model,
        shard=part,
        device=device,
        folds=tuple(each.strip() for each in folds.split(",") if each.strip()),
        checkpoint=checkpoint,
        previous_stage=previous_stage,
        probabilities=save_probabilities,
        mirroring=not disable_tta,
        step_size=step_size,
        preprocessing_processes=preprocessing_processes,
        export_processes=export_processes,
        threads=threads,
        overwrite=overwrite,
    )
    _hear_sigterm()
    summary = inference.predict(options, started)
    _show(summary, log_format)
    (own,) = (report for report in summary.shards if report.index == part.index)
    if own.failures:
        named = ", ".join(failure.case for failure in own.failures[:5])
        raise FednnunetError(Code.NOT_ALL_PREDICTED, f"{len(own.failures)} of this shard: {named}")


def _show(summary: object, log_format: logs.Format) -> None:
    import sys

    from appliance import batch

    assert isinstance(summary, batch.Summary)
    if log_format == "json":
        typer.echo(summary.model_dump_json())
        return
    lines = batch.table(summary)
    if not sys.stdout.isatty():
        typer.echo("\n".join(lines))
        return
    from rich.console import Console
    from rich.table import Table

    head, *rest = (line.split("\t") for line in lines)
    table = Table(*head)
    for row in rest:
        if len(row) == len(head):
            table.add_row(*row)
    console = Console(highlight=False)
    console.print(table)
    for row in rest:
        if len(row) != len(head):
            console.print("  ".join(row), soft_wrap=True, markup=False)


def _hear_sigterm() -> None:
    """A pod that is moved: nothing half is kept, the next start goes on."""

    def stop(*_: object) -> None:
        logging.getLogger("fednnunet.predict").info("ended by SIGTERM: the same command goes on with what is missing")
        raise SystemExit(143)

    signal.signal(signal.SIGTERM, stop)
