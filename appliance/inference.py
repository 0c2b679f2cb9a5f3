"""One shard of a batch: nnU-Net's prediction of many cases, so that a kill loses no more than the cases in work.

Rules:

- nnU-Net's own functions preprocess, predict and export, in the order and with the arguments of `nnUNetv2_predict`: the
  files are the same bytes. (Probabilities differ in the last bit where another number of threads computes them.)
- Preprocessing of the next cases, prediction, and export of the last ones overlap in processes of their own (spawned,
  since a process that has used CUDA must not be forked); with 0 of them all happens in this process, and no /dev/shm is
  needed. Arrays go through pipes.
- A file that is cut short is refused: its reader would fill it up with zeros, and nnU-Net predict on them.
- A case that cannot be read or predicted is a failure of its own: the others go on. What breaks the machine (a process
  that was killed, a GPU that does not answer) ends the shard: a new start goes on.
- A model may come from anywhere: its checkpoints are loaded as tensors and plain types alone, its plans may name what
  is nnU-Net's alone, and of a zip nothing is written outside the folder it is unpacked into.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import io
import json
import logging
import multiprocessing
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot, determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from appliance import devices
from appliance.batch import Case, Failure, Outputs, PredictionSettings, Report, Shard, Summary, cases, mine
from appliance.worker import nifti
from federation import files, native
from federation.errors import Code, FednnunetError
from federation.plans import check_names
from federation.processes import Lock, end_with_parent

log = logging.getLogger("fednnunet.predict")

_MODEL = re.compile(r"[A-Za-z0-9_]+__[A-Za-z0-9_.-]+__[A-Za-z0-9_]+")
_NEEDED = re.compile(r"(plans|dataset)\.json|fold_(\d+|all)/[A-Za-z0-9_.-]+\.pth")
_FOLD = re.compile(r"\d+|all")


@dataclass(frozen=True)
class Options:
    """What a person or a Job asks for.

    Attributes
    ----------
    inputs, outputs, model : Path
        Images, predictions; nnU-Net's model folder, a folder that holds a single one, or an exported zip.
    shard : Shard
        Which of the cases.
    device : str
        cuda, cuda:N, mps or cpu.
    folds : tuple of str
        Folds to average; empty: 0 to 4 as far as they are there, else `all`.
    checkpoint : str
        File name of the weights in each fold.
    previous_stage : Path or None
        Predictions of the first stage of a cascade.
    probabilities, mirroring : bool
        Also write probabilities; predict mirrored images too (nnU-Net's test-time augmentation).
    step_size : float
        Step of the sliding window, as a part of the patch.
    preprocessing_processes, export_processes : int or None
        Processes beside this one; None: 2 on a GPU, else 0.
    threads : int or None
        CPU threads; None: one beside a GPU, else torch's choice.
    overwrite : bool
        Remove predictions that were made otherwise.
    """

    inputs: Path
    outputs: Path
    model: Path
    shard: Shard = field(default_factory=lambda: Shard(0, 1))
    device: str = "cuda"
    folds: tuple[str, ...] = ()
    checkpoint: str = native.CHECKPOINT
    previous_stage: Path | None = None
    probabilities: bool = False
    mirroring: bool = True
    step_size: float = 0.5
    preprocessing_processes: int | None = None
    export_processes: int | None = None
    threads: int | None = None
    overwrite: bool = False

    @property
    def beside(self) -> tuple[int, int]:
        """Processes for preprocessing and for export."""
        usual = 2 if self.device.startswith("cuda") else 0
        asked = (self.preprocessing_processes, self.export_processes)
        before, after = (usual if number is None else number for number in asked)
        return before, after


# ---- the model


@contextmanager
def model_folder(given: Path) -> Iterator[Path]:
    """nnU-Net's folder `TRAINER__PLANS__CONFIGURATION` of what was given; a zip is unpacked for as long as this lasts.

    Raises FNU-156 (none, several, or a zip that is none) and FNU-702.
    """
    if given.is_dir():
        yield _single(given)
        return
    if not given.is_file():
        raise FednnunetError(Code.MODEL_UNUSABLE, f"{given} is not there")
    with tempfile.TemporaryDirectory(prefix="fednnunet-model-") as folder:
        with files.disk_errors(Path(folder)):
            _unpack(given, Path(folder))
        yield _single(Path(folder))


def _single(folder: Path) -> Path:
    if (folder / "plans.json").is_file():
        return folder
    found = sorted({path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/plans.json")})
    found = [path for path in found if _MODEL.fullmatch(path.name)]
    if len(found) != 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found) or "none"
        raise FednnunetError(Code.MODEL_UNUSABLE, f"{folder} holds {len(found)} models: {names}")
    return found[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Write what prediction needs of an exported zip; a member that leads elsewhere is refused."""
    try:
        with zipfile.ZipFile(archive) as content:
            members = []
            for member in content.infolist():
                path = PurePosixPath(member.filename)
                if path.is_absolute() or ".." in path.parts or "\\" in member.filename:
                    raise FednnunetError(Code.MODEL_UNUSABLE, f"{archive}: {member.filename!r} leads out of the zip")
                parts = path.parts
                model = next((at for at, part in enumerate(parts[:-1]) if _MODEL.fullmatch(part)), None)
                if model is not None and _NEEDED.fullmatch("/".join(parts[model + 1 :])):
                    members.append((member, folder.joinpath(*parts[model:])))
            size, room = sum(member.file_size for member, _ in members), shutil.disk_usage(folder).free
            if size > room:
                raise FednnunetError(Code.DISK_FULL, f"{folder}: {size} bytes to unpack, {room} free")
            for member, target in members:
                target.parent.mkdir(parents=True, exist_ok=True)
                with content.open(member) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink, 2**20)
                if target.stat().st_size != member.file_size:
                    raise FednnunetError(Code.MODEL_UNUSABLE, f"{archive}: {member.filename} is cut off")
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise FednnunetError(Code.MODEL_UNUSABLE, f"{archive}: {error}") from error


@dataclass
class Model:
    """A model that is ready to predict, and what identifies it."""

    predictor: Any
    settings: PredictionSettings
    files: dict[str, bytes]


def load(folder: Path, options: Options) -> Model:
    """Load a model; raises FNU-156, 303, 305, 403, 706.

    Parameters
    ----------
    folder : Path
        nnU-Net's folder of the model.
    options : Options
        Its folds, checkpoint, device and the rest.
    """
    devices.require(torch, options.device)
    native.use_threads(torch, options.device, options.threads)
    plans, dataset_json = _json(folder / "plans.json"), _json(folder / "dataset.json")
    folds = _folds(folder, options)
    digest = hashlib.sha256()
    for name in ("plans.json", "dataset.json"):
        digest.update(files.sha256_of(folder / name).encode())
    first: dict[str, Any] = {}
    parameters = []
    for fold in folds:
        path = folder / f"fold_{fold}" / options.checkpoint
        try:
            digest.update(files.sha256_of(path).encode())
            loaded = native.load_checkpoint(torch, path)
            parameters.append(loaded["network_weights"])
        except (*native.BAD_CHECKPOINT, KeyError, TypeError) as error:
            said = (str(error).strip().splitlines() or [repr(error)])[0][:300]
            raise FednnunetError(Code.MODEL_UNUSABLE, f"{path}: {said}") from error
        first = first or loaded
    try:
        trainer, configuration = str(first["trainer_name"]), str(first["init_args"]["configuration"])
        axes = first.get("inference_allowed_mirroring_axes")
        check_names(plans, configuration)
        manager = PlansManager(plans)
        configured = manager.get_configuration(configuration)
        channels = determine_num_input_channels(manager, configured, dataset_json)
        heads = manager.get_label_manager(dataset_json).num_segmentation_heads
        network = native.build_network(native.trainer_class(trainer), manager, configured, channels, heads, deep=False)
        network.load_state_dict(parameters[0])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [repr(error)])[0][:300]
        raise FednnunetError(Code.MODEL_UNUSABLE, f"{folder}: {type(error).__name__}: {said}") from error
    if configured.previous_stage_name is not None and options.previous_stage is None:
        raise FednnunetError(
            Code.MODEL_UNUSABLE,
            f"{configuration} is the second stage of a cascade",
            f"Predict with {configured.previous_stage_name} first, and give that folder as --previous-stage.",
        )
    predictor = nnUNetPredictor(
        tile_step_size=options.step_size,
        use_gaussian=True,
        use_mirroring=options.mirroring,
        perform_everything_on_device=options.device.startswith("cuda"),
        device=torch.device(options.device),
        verbose=False,
        allow_tqdm=False,
    )
    predictor.manual_initialization(network, manager, configured, parameters, dataset_json, trainer, axes)
    network.to(predictor.device)
    settings = PredictionSettings(
        model=digest.hexdigest(),
        name=f"{trainer}__{plans['plans_name']}__{configuration}",
        folds=folds,
        checkpoint=options.checkpoint,
        mirroring=options.mirroring,
        step_size=options.step_size,
        probabilities=options.probabilities,
        previous_stage=str(options.previous_stage) if options.previous_stage else None,
        channels=len(dataset_json.get("channel_names", dataset_json.get("modality", {}))),
        file_ending=str(dataset_json["file_ending"]),
        nnunetv2=version("nnunetv2"),
    )
    shown = {name: (folder / name).read_bytes() for name in ("plans.json", "dataset.json")}
    return Model(predictor, settings, shown)


def _json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FednnunetError(Code.MODEL_UNUSABLE, f"{path}: {error}") from error
    return value


_NO_WEIGHTS = "Give --checkpoint the name of the file with the weights in each fold_..., or the model's folder."


def _folds(folder: Path, options: Options) -> tuple[str, ...]:
    there = sorted(
        path.parent.name.removeprefix("fold_")
        for path in folder.glob(f"fold_*/{options.checkpoint}")
        if _FOLD.fullmatch(path.parent.name.removeprefix("fold_"))
    )
    wanted = options.folds or tuple(fold for fold in there if fold != "all") or tuple(there)
    if not wanted or not set(wanted) <= set(there):
        raise FednnunetError(
            Code.MODEL_UNUSABLE,
            f"{folder}: folds with {options.checkpoint}: {', '.join(there) or 'none'}; "
            f"wanted: {', '.join(wanted) or 'any'}",
            f"Leave --folds out, or give some of those that are there: {', '.join(there)}." if there else _NO_WEIGHTS,
        )
    return tuple(wanted)


# ---- what the processes beside this one do


@dataclass(frozen=True)
class _Job:
    """A model's settings as a spawned process needs them."""

    plans: dict[str, Any]
    dataset_json: dict[str, Any]
    configuration: str
    threads: int


_job: _Job


def _begin(job: _Job) -> None:
    global _job
    _job = job
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        end_with_parent(signal.SIGKILL)
        torch.set_num_threads(1)


@dataclass(frozen=True)
class _Prepared:
    """A case that is ready for the network.

    Attributes
    ----------
    data : ndarray of float32, shape (channels, z, y, x)
        What nnU-Net's preprocessing makes of the images.
    properties : dict
        What its export asks for.
    not_finite : int
        Voxels that were NaN or infinite; the reader has made zeros of them.
    seconds : float
        How long it took.
    """

    data: np.ndarray[Any, Any]
    properties: dict[str, Any]
    not_finite: int
    seconds: float


def _preprocess(images: tuple[str, ...], previous: str | None) -> _Prepared:
    """As nnU-Net's `preprocess_fromfiles_save_to_queue`, for one case; raises FNU-210 for a file that is cut short."""
    started, not_finite = time.perf_counter(), 0
    for image in images:
        try:
            not_finite += nifti.count_not_finite(Path(image))
        except nifti.DamagedFile as error:
            raise FednnunetError(Code.FILE_UNREADABLE, f"{Path(image).name}: {error}") from error
    manager = PlansManager(_job.plans)
    configured = manager.get_configuration(_job.configuration)
    data, seg, properties = configured.preprocessor_class(verbose=False).run_case(
        list(images), previous, manager, configured, _job.dataset_json
    )
    if previous is not None:
        labels = manager.get_label_manager(_job.dataset_json).foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
    data = np.ascontiguousarray(data, dtype=np.float32)
    return _Prepared(data, properties, not_finite, time.perf_counter() - started)


def _export(logits: np.ndarray[Any, Any], properties: dict[str, Any], target: str, probabilities: bool) -> float:
    """nnU-Net's export to `target` without an ending; seconds."""
    started = time.perf_counter()
    manager = PlansManager(_job.plans)
    configured = manager.get_configuration(_job.configuration)
    export_prediction_from_logits(
        logits, properties, configured, manager, _job.dataset_json, target, probabilities, _job.threads
    )
    return time.perf_counter() - started


class _Here(concurrent.futures.Executor):
    """Does at once, in this process, what it is given."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        """Do it."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - as an executor's future has it
            future.set_exception(error)
        return future


def _executor(processes: int, job: _Job) -> concurrent.futures.Executor:
    if processes == 0:
        return _Here()
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(processes, context, _begin, (job,))


# ---- the shard


def predict(options: Options, started: float) -> Summary:
    """Predict a shard, and say how the whole batch stands.

    Parameters
    ----------
    options : Options
        What is asked for.
    started : float
        `time.perf_counter()` at the start of the process: for the share of the start.

    Returns
    -------
    Summary
        Of the whole batch. Raises the numbered errors of bad input before anything is written, and FNU-703 where a
        process was killed; failures of single cases are in the summary.
    """
    with contextlib.redirect_stdout(_Nowhere()):  # nnU-Net prints about every case
        return _predict(options, started)


class _Nowhere(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


def _predict(options: Options, started: float) -> Summary:
    outputs = Outputs(options.outputs)
    for option, folder in (("--input", options.inputs), ("--previous-stage", options.previous_stage)):
        if folder is not None and outputs.folder.exists() and folder.exists() and outputs.folder.samefile(folder):
            raise FednnunetError(
                Code.SETTINGS_INVALID, f"--output is the folder of {option}: {folder}", "Give a folder of its own."
            )
    with model_folder(options.model) as folder:
        model = load(folder, options)
    everything = cases(options.inputs, model.settings.file_ending)
    if options.previous_stage is not None and not options.previous_stage.is_dir():
        raise FednnunetError(Code.NOTHING_TO_PREDICT, f"--previous-stage {options.previous_stage} is no folder")
    outputs.agree(model.settings, options.overwrite, model.files, [case.name for case in everything])
    lock = Lock(outputs.shard(options.shard))
    try:
        report = _Work(options, model, outputs, everything).run(started)
        outputs.report(report)
        return outputs.summarise(options.inputs, options.shard)
    finally:
        lock.release()


class _Work:
    """The cases of a shard, one after the other."""

    def __init__(self, options: Options, model: Model, outputs: Outputs, everything: Sequence[Case]) -> None:
        self._options, self._model, self._outputs = options, model, outputs
        self._settings = model.settings
        self._mine = mine(everything, options.shard)
        self._failures: list[Failure] = []
        self._seconds = {"start": 0.0, "preprocess": 0.0, "predict": 0.0, "export": 0.0, "total": 0.0}
        self._done = 0

    def run(self, started: float) -> Report:
        """Predict what is not whole yet."""
        part, outputs = self._options.shard, self._outputs
        shutil.rmtree(outputs.partial(part), ignore_errors=True)
        with files.disk_errors(outputs.own):
            outputs.partial(part).mkdir(parents=True)
        todo = [case for case in self._mine if not outputs.whole(case.name, self._settings)]
        skipped = len(self._mine) - len(todo)
        self._seconds["start"] = time.perf_counter() - started
        log.info(
            "shard %d/%d: %d cases, %d of them whole already; %s on %s",
            *(part.index, part.count, len(self._mine), skipped, self._settings.name, self._options.device),
        )
        if todo:
            self._predict(todo)
        shutil.rmtree(outputs.partial(part), ignore_errors=True)
        self._seconds["total"] = time.perf_counter() - started
        return Report(
            index=part.index,
            count=part.count,
            predicted=self._done,
            skipped=skipped,
            failures=tuple(self._failures),
            seconds={name: round(value, 3) for name, value in self._seconds.items()},
        )

    def _predict(self, todo: Sequence[Case]) -> None:
        predictor = self._model.predictor
        job = _Job(
            predictor.plans_manager.plans,
            predictor.dataset_json,
            self._settings.name.rpartition("__")[2],
            self._options.threads or default_num_processes,
        )
        _begin(job)
        before, after = self._options.beside
        with _ended(_executor(before, job)) as preparing, _ended(_executor(after, job)) as exporting:
            coming: deque[tuple[Case, concurrent.futures.Future[Any]]] = deque()
            leaving: deque[tuple[Case, float, concurrent.futures.Future[Any]]] = deque()
            rest = iter(todo)
            total = len(todo)
            while True:
                while len(coming) <= before and (case := next(rest, None)) is not None:
                    coming.append((case, self._prepare(preparing, case)))
                while leaving and (len(leaving) > after or leaving[0][2].done()):
                    self._finish(*leaving.popleft(), total)
                if not coming:
                    break
                case, future = coming.popleft()
                with self._case(case):
                    prepared: _Prepared = future.result()
                    del future
                    self._seconds["preprocess"] += prepared.seconds
                    if prepared.not_finite:
                        log.warning("%s: %d voxels are no number: read as 0", case.name, prepared.not_finite)
                    begun, properties = time.perf_counter(), prepared.properties
                    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(prepared.data))
                    logits = logits.cpu().detach().numpy()
                    del prepared
                    self._seconds["predict"] += time.perf_counter() - begun
                    target = str(self._outputs.partial(self._options.shard) / case.name)
                    sent = exporting.submit(_export, logits, properties, target, self._settings.probabilities)
                    leaving.append((case, begun, sent))
                    del logits
            while leaving:
                self._finish(*leaving.popleft(), total)

    def _prepare(self, preparing: concurrent.futures.Executor, case: Case) -> concurrent.futures.Future[Any]:
        """Begin to preprocess a case, or fail as it would."""
        previous = None
        failed: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if len(case.images) != self._settings.channels:
            found = f"{len(case.images)} files, {self._settings.channels} channels"
            failed.set_exception(FednnunetError(Code.CHANNEL_MISSING, found))
            return failed
        if self._options.previous_stage is not None:
            path = self._options.previous_stage / f"{case.name}{self._settings.file_ending}"
            if not path.is_file():
                failed.set_exception(FednnunetError(Code.FIRST_STAGE_CASES, f"{path.name} is not there"))
                return failed
            previous = str(path)
        return preparing.submit(_preprocess, tuple(map(str, case.images)), previous)

    def _finish(self, case: Case, begun: float, future: concurrent.futures.Future[Any], total: int) -> None:
        with self._case(case):
            self._seconds["export"] += future.result()
            self._outputs.keep(self._options.shard, case.name, self._settings)
            self._done += 1
            took = time.perf_counter() - begun
            log.info("%s: predicted in %.1f s (%d of %d)", case.name, took, self._done + len(self._failures), total)

    @contextmanager
    def _case(self, case: Case) -> Iterator[None]:
        """What goes wrong with one case is its failure; what would go wrong with the next ones too is raised."""
        try:
            yield
        except FednnunetError as error:
            if error.code is Code.DISK_FULL:
                raise
            self._fail(case, error.code, error.found)
        except concurrent.futures.process.BrokenProcessPool as error:
            raise FednnunetError(
                Code.PROCESS_DIED,
                f"{case.name}: a process beside this one was killed",
                "Most likely for want of memory: give more, or fewer --preprocessing-processes.",
            ) from error
        except OSError as error:
            if (numbered := files.disk_error(error, self._outputs.folder)) is not None:
                raise numbered from error
            self._fail(case, Code.FILE_UNREADABLE, f"{error.strerror or error}")
        except Exception as error:
            lines = str(error).strip().splitlines() or [repr(error)]
            if devices.is_lost(error):
                raise FednnunetError(Code.PREDICTION_FAILED, f"{case.name}: the GPU fails: {lines[0][:300]}") from error
            if devices.is_out_of_memory(error):
                torch.cuda.empty_cache()  # which does nothing where no GPU is in use
                self._fail(case, Code.OUT_OF_MEMORY, lines[0][:300])
            else:
                self._fail(case, Code.PREDICTION_FAILED, f"{type(error).__name__}: {lines[-1][:300]}")

    def _fail(self, case: Case, code: Code, reason: str) -> None:
        self._failures.append(Failure(case=case.name, code=code.number, reason=reason))
        log.error("%s: FNU-%d %s: %s", case.name, code.number, code.title, reason)


@contextmanager
def _ended(executor: concurrent.futures.Executor) -> Iterator[concurrent.futures.Executor]:
    """An executor whose processes are gone afterwards; what is not begun yet is not done any more."""
    try:
        yield executor
    finally:
        processes = list((getattr(executor, "_processes", None) or {}).values())
        executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill() if sys.exc_info()[0] is not None else None
        for process in processes:
            with contextlib.suppress(AssertionError):
                process.join(30)
