"""The coordinator: the state machine of a study, and the resident process that drives it.

Rules:

- Every step first asks the journal whether it has been done; a coordinator that is killed at any point goes on from
  the last line, in a new Flower run.
- Describe, fingerprint and prepare need every site: there is never a silent subset. A round of training, a validation
  and finishing need the quorum; the participation record says who was missing and why.
- Nothing here imports torch: planning and model building are child processes.

- Between rounds there is one store of all that is shared; every site gets its view of it (orchestrator.views). With
  `asymfedavg` each site has planned for itself, told its network with its answer to Prepare, and keeps the rest.

States: enrolling -> describing -> fingerprinting -> planning -> preparing -> (training -> validating -> finishing
[-> comparing], for each fold) -> exporting -> done, failed(why) or stopped(by). With `asymfedavg` nothing is
fingerprinted or planned here.
"""

from __future__ import annotations

import json
import logging
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import audit, files, keypairs, logs, weights
from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint, check, merge, plan_tolerance, to_nnunet
from federation.flower import clients
from federation.flower.runner import Run, RunLost, Stop, serve_runs
from federation.study import KRUM, Study, parse
from federation.tasks import Kind, Network, Plan, Preparation, Result, Task, Validation, Weights
from federation.weights import TensorFile
from orchestrator import model, planning, selftest, shared_export, stages
from orchestrator.admission import admit
from orchestrator.aggregation.mean import Update
from orchestrator.aggregation.robust import select
from orchestrator.aggregation.rules import aggregate
from orchestrator.aggregation.shared_layers import SharedLayers, check_networks, share
from orchestrator.enrollment.authority import Authority
from orchestrator.enrollment.ceremony import forgotten, put_out_revoked
from orchestrator.enrollment.registry import Registry
from orchestrator.journal import ENDED, Journal, StopRequested, read_study, withdraw_stop
from orchestrator.rounds import Accept, Carrier, Errand, Exchange, Outcome
from orchestrator.signatures import CoordinatorSignatures, Signatures
from orchestrator.views import Views
from orchestrator.workshop import Workshop

log = logging.getLogger("fednnunet.coordinator")

DISK_PAUSE = 5.0
"""Seconds before a disk that did not take a study's journal is tried again."""

_PHASES = {
    Kind.DESCRIBE: "describing",
    Kind.FINGERPRINT: "fingerprinting",
    Kind.PREPARE: "preparing",
    Kind.TRAIN: "training",
    Kind.VALIDATE: "validating",
    Kind.FINISH: "finishing",
    Kind.COMPARE: "comparing",
}
_OF_A_START = ("opened", "asked", "interrupted")  # lines that a study which makes no progress writes too


def _nothing(task: Task, result: Result, update: Path) -> dict[str, Any]:
    """Accepts an answer that needs no further check."""
    return {}


@dataclass(frozen=True)
class Scored:
    """What the sites said of a fold's global weights, and who said nothing."""

    scores: dict[str, Validation]
    missing: dict[str, str]


class Conductor:
    """Drives one study from wherever its journal stands to its end.

    Parameters
    ----------
    carrier : Carrier
        The run that reaches the sites.
    journal : Journal
        The study's journal.
    pretrained : Path
        Folder of pretrained checkpoints, named by their SHA-256.
    signatures : Signatures
        The coordinator's key, and those of the sites.
    workshop : Workshop
        Where torch is.
    poll : float
        Seconds between two looks for answers.
    """

    def __init__(
        self,
        carrier: Carrier,
        journal: Journal,
        pretrained: Path,
        signatures: Signatures,
        workshop: Workshop,
        poll: float,
    ) -> None:
        self.journal, self.study = journal, journal.study
        self._exchange = Exchange(carrier, journal, signatures, poll)
        self._pretrained = pretrained
        self._workshop = workshop
        self._plans: dict[str, str] = {}
        self._cases: dict[str, int] = {}
        self._views: Views

    def conduct(self) -> None:
        """Go on until the study is done; raises what made it fail."""
        self._steps()
        self.journal.write("done")

    def _steps(self) -> None:
        study = self.study
        stages.first_stage(study, self.journal.folder.parent)  # a cascade without one fails before a site is asked
        if self.journal.state.layers is None and study.stop_after not in ("describe", "fingerprint"):
            self._workshop.open()
        self.journal.phase("enrolling")
        self._exchange.await_sites(study.sites, study.appear_deadline)
        self._everyone(Kind.DESCRIBE)
        if study.stop_after == "describe":
            return
        plan = None
        if study.mode == "ffe":
            self._fingerprint()
            if study.stop_after == "fingerprint":
                return
            plan = self._plan()
            if study.stop_after == "plan":
                return
        prepared = self._prepare(plan)
        if study.mode == "asymfedavg" or study.stop_after == "finish":
            self._views = Views(self.journal, self._share(plan, prepared))
        if study.stop_after != "finish":
            return
        validation: dict[str, Scored] = {}
        unfinished: dict[str, str] = {}
        for fold in study.folds:
            self._cases = {site: answer.training_cases[fold] for site, answer in prepared.items()}
            self._train(fold)
            validation[fold] = self._validate(fold)
            finished = self._everyone(Kind.FINISH, fold=fold, weights=self._held(fold), needed=study.needed)
            unfinished |= finished.missing
            if study.compare == "local":
                self._everyone(Kind.COMPARE, fold=fold, accept=self._accept_comparison, needed=study.needed)
        self._export(plan, validation, unfinished)

    # asking

    def _task(self, site: str, kind: Kind, fold: str | None, number: int | None, **carried: Any) -> Task:
        task = Task(
            study=self.study,
            site=site,
            kind=kind,
            fold=fold,
            round=number,
            plans_sha256=self._plans.get(site, self.journal.state.plans_sha256),
            **carried,
        )
        return task.model_copy(update={"attempt": self.journal.attempt(task)})

    def _everyone(
        self,
        kind: Kind,
        fold: str | None = None,
        plan: Plan | None = None,
        weights: Callable[[str, bool], tuple[Weights | None, Path | None]] | None = None,
        accept: Accept = _nothing,
        needed: int | None = None,
    ) -> Outcome:
        """A step that every site must do, or `needed` of them; raises FNU-502 that names who did not and why."""

        def errand(site: str, full: bool) -> Errand:
            header, file = weights(site, full) if weights else (None, None)
            return Errand(self._task(site, kind, fold, None, plan=plan, weights=header), file)

        closed = self._closed(kind, fold, errand)
        if closed is not None:
            return closed
        self._enter(kind, errand)
        outcome = self._exchange.ask(
            self.study.sites,
            errand,
            accept,
            needed=needed or len(self.study.sites),
            deadline=self.study.step_deadline,
        )
        if len(outcome.answers) < (needed or len(self.study.sites)):
            raise FednnunetError(Code.SITE_FAILED, f"{kind}: {_who(outcome)}")
        self._close(kind, fold, outcome)
        return outcome

    def _closed(self, kind: Kind, fold: str | None, errand: Callable[[str, bool], Errand]) -> Outcome | None:
        """The outcome of a step that may lack sites, where it has been closed: nobody is asked for it again."""
        missing = self.journal.state.steps.get((str(kind), fold or ""))
        if missing is None:
            return None
        answers = {site: self.journal.answer(errand(site, False).task) for site in self.study.sites}
        return Outcome({site: answer for site, answer in answers.items() if answer is not None}, missing)

    def _close(self, kind: Kind, fold: str | None, outcome: Outcome) -> None:
        if kind in (Kind.VALIDATE, Kind.FINISH, Kind.COMPARE):
            self.journal.write("step", kind=str(kind), fold=fold, missing=outcome.missing)

    def _enter(self, kind: Kind, errand: Callable[[str, bool], Errand]) -> None:
        """Enter a step's phase, unless every site has answered it before."""
        if any(self.journal.answer(errand(site, False).task) is None for site in self.study.sites):
            self.journal.phase(_PHASES[kind])

    # steps

    def _fingerprint(self) -> None:
        def accept(task: Task, result: Result, update: Path) -> dict[str, Any]:
            if result.fingerprint is not None:
                check(result.fingerprint, len(self.study.channel_names), self.study.fingerprint_min_cases)
            return {}

        answers = self._everyone(Kind.FINGERPRINT, accept=accept).answers
        pooled = self.journal.folder / "fingerprint.json"
        if self.journal.state.pooled is None:
            merged = merge([result.fingerprint for _, result in sorted(answers.items()) if result.fingerprint])
            files.write_bytes(pooled, merged.model_dump_json(indent=1).encode())
            self.journal.write("pooled", sha256=files.sha256_of(pooled), tolerance=plan_tolerance(merged))

    def _pooled(self) -> SiteFingerprint:
        return SiteFingerprint.model_validate_json((self.journal.folder / "fingerprint.json").read_bytes())

    def _plan(self) -> Plan:
        path = self.journal.folder / "plan.json"
        if self.journal.state.plans_sha256 is None:
            self.journal.phase("planning")
            plan = stages.plan_of_first_stage(self.study, self.journal.folder.parent)
            if plan is None:
                planned = planning.plan(self._pooled(), self.study, self.journal.folder / "planning", self._workshop)
                plan = Plan(plans=planned.plans, plans_sha256=planned.plans_sha256, dataset_json=planned.dataset_json)
            files.write_bytes(path, plan.model_dump_json(indent=1).encode())
            self.journal.write("planned", plans_sha256=plan.plans_sha256)
        return Plan.model_validate_json(path.read_bytes())

    def _prepare(self, plan: Plan | None) -> dict[str, Preparation]:
        def accept(task: Task, result: Result, update: Path) -> dict[str, Any]:
            if result.preparation is not None and result.preparation.network is not None:
                self._first_weights(None, result.preparation.network)  # what cannot be built is refused, by name
            return {}

        prepared = {}
        for site, result in self._everyone(Kind.PREPARE, plan=plan, accept=accept).answers.items():
            answer = result.preparation
            if answer is None or set(answer.training_cases) != set(self.study.folds):
                raise FednnunetError(Code.RESULT_REFUSED, f"{site} declared its cases for other folds")
            prepared[site] = answer
            self._plans[site] = answer.plans_sha256
        return prepared

    def _share(self, plan: Plan | None, prepared: dict[str, Preparation]) -> SharedLayers:
        """Who shares which layers; builds each network once, for its layers and its first weights."""
        path = self.journal.folder / "layers.json"
        if self.journal.state.layers is None:
            networks = {site: answer.network for site, answer in prepared.items() if answer.network is not None}
            check_networks(networks)
            files_of = {site: self._first_weights(plan, networks.get(site)) for site in self.study.sites}
            specs = {site: TensorFile(file).specs for site, file in files_of.items()}
            layers = share(specs, self.study)
            files.write_json(path, layers.to_json())
            self.journal.write(
                "layers",
                sha256=files.sha256_of(path),
                shared={site: [layers.shared(site), layers.totals[site]] for site in self.study.sites},
                common=layers.common,
                cases={site: answer.training_cases for site, answer in prepared.items()},
                first={site: file.name for site, file in files_of.items()},
                plans_name=plan.plans["plans_name"] if plan else next(iter(networks.values())).plans_name,
            )
        return SharedLayers.from_json(files.read_json(path))

    def _first_weights(self, plan: Plan | None, network: Network | None) -> Path:
        """The first weights of a network, made once for all sites and folds that have it."""
        study = self.study
        if plan is not None:
            plans, dataset_json = plan.plans, plan.dataset_json
        else:
            assert network is not None
            plans, dataset_json = network.plans(study), study.dataset_json(0)
        architecture = plans["configurations"][study.configuration].get("architecture", {})
        out = self.journal.first_weights / f"{files.sha256_json(architecture)[:16]}.safetensors"
        if not out.exists():
            pretrained = self._pretrained / f"{study.pretrained_weights}.pth" if study.pretrained_weights else None
            model.initial_weights(plans, dataset_json, study, out, pretrained, self._workshop)
        return out

    def _train(self, fold: str) -> None:
        journal, study = self.journal, self.study
        if fold not in journal.state.weights:
            assert journal.state.layers is not None
            first = {site: journal.first_weights / name for site, name in journal.state.layers["first"].items()}
            digest = self._views.begin(fold, first)
            journal.write("weights", fold=fold, round=0, digest=digest)
        journal.forget_round(fold, journal.state.weights[fold][0])  # a kill after the line may have kept them
        while (done := journal.state.weights[fold][0]) < study.rounds:
            self._round(fold, done + 1)
        if fold == study.folds[-1] and journal.state.exported is None and study.one_model:
            self._workshop.open()

    def _carried(self, fold: str, number: int) -> Callable[[str, bool], tuple[Weights, Path | None]]:
        """How the weights after round `number` reach a site: held, as a difference to what it holds, or in full."""

        def carried(site: str, full: bool) -> tuple[Weights, Path | None]:
            path = self._views.weights(fold, number, site)
            digest = self._views.digest(fold, number, site)
            assert digest is not None
            holds = None if full else self.journal.state.holds.get(site)
            if holds == digest:
                return weights.describe_held(digest), None
            before = self._views.digest(fold, number - 1, site)
            if before is not None and holds == before:
                difference = self._views.difference(fold, number, site)
                if difference is not None:
                    file, sha256 = difference
                    return weights.describe_difference(file, before, digest, sha256), file
            return weights.describe_full(path, digest), path

        return carried

    def _held(self, fold: str) -> Callable[[str, bool], tuple[Weights, Path | None]]:
        return self._carried(fold, self.journal.state.weights[fold][0])

    def _round(self, fold: str, number: int) -> None:
        journal, study = self.journal, self.study
        journal.phase("training")
        started = time.monotonic()
        carried = self._carried(fold, number - 1)

        def errand(site: str, full: bool) -> Errand:
            header, file = carried(site, full)
            return Errand(self._task(site, Kind.TRAIN, fold, number, weights=header), file)

        def accept(task: Task, result: Result, update: Path) -> dict[str, Any]:
            base = self._views.weights(fold, number - 1, task.site)
            admitted = admit(task, result, update, base, self._cases[task.site])
            return {
                "cases": admitted.cases,
                "distance": admitted.norm,
                "digest": admitted.digest,
                "holds": self._views.digest(fold, number - 1, task.site),
                "training": result.training.model_dump(mode="json") if result.training else None,
            }

        closed = journal.state.closed.get((fold, number))
        if closed is None:
            outcome = self._exchange.ask(
                study.sites,
                errand,
                accept,
                needed=study.needed,
                deadline=study.round_deadline,
                max_weights=journal.global_file(fold, number - 1).stat().st_size + 2**16,
            )
            if len(outcome.answers) < study.needed:
                raise FednnunetError(
                    Code.QUORUM_NOT_MET,
                    f"fold {fold}, round {number}: {len(outcome.answers)} of {study.needed} needed; {_who(outcome)}",
                )
            journal.write(
                "closed",
                fold=fold,
                round=number,
                participants=sorted(outcome.answers),
                missing=outcome.missing,
                seconds=round(time.monotonic() - started, 3),
            )
            closed = journal.state.closed[fold, number]
            with logs.about(fold=fold, round=number):
                took_part = f"{len(closed['participants'])} of {len(study.sites)} sites"
                log.info("round closed: %s, %.1f s", took_part, closed["seconds"])
        aggregating = time.monotonic()
        digest, chosen = self._aggregate(fold, number, closed["participants"])
        journal.write(
            "weights",
            fold=fold,
            round=number,
            digest=digest,
            seconds=round(time.monotonic() - aggregating, 3),
            memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **({"chosen": chosen} if chosen is not None else {}),
        )
        journal.forget_round(fold, number)

    def _aggregate(self, fold: str, number: int, participants: list[str]) -> tuple[str, list[str] | None]:
        """The next global weights: their digest, and with Krum the sites whose updates were chosen."""
        journal, study = self.journal, self.study
        uniform = study.aggregation.weighting == "uniform"
        updates = {
            site: Update(
                journal.round_folder(fold, number) / "updates" / f"{site}.safetensors",
                1.0 if uniform else float(self._cases[site]),
                self._views.names(site),
            )
            for site in participants
        }
        base, out = journal.global_file(fold, number - 1), journal.global_file(fold, number)
        before, after = journal.optimizer_file(fold, number - 1), journal.optimizer_file(fold, number)
        rule = study.aggregation
        chosen = select(rule, updates, base) if rule.method in KRUM else None
        wire = study.wire
        if wire == "full":
            return aggregate(rule, updates, base, out, before, after, chosen), chosen
        exact = out.with_name("exact.safetensors")
        aggregate(rule, updates, base, exact, before, after, chosen)
        difference, carry = out.with_name("difference.safetensors"), out.with_name("carry.safetensors")
        weights.encode_difference(exact, base, base.with_name("carry.safetensors"), difference, carry, wire)
        exact.unlink()
        return weights.apply_difference(base, difference, out), chosen

    def _validate(self, fold: str) -> Scored:
        """Every site scores the global weights; with the quorum the study goes on, and says who is missing."""
        carried = self._held(fold)
        number = self.journal.state.weights[fold][0]

        def errand(site: str, full: bool) -> Errand:
            header, file = carried(site, full)
            return Errand(self._task(site, Kind.VALIDATE, fold, None, weights=header), file)

        def accept(task: Task, result: Result, update: Path) -> dict[str, Any]:
            return {
                "holds": self._views.digest(fold, number, task.site),
                "validation": result.validation.model_dump(mode="json") if result.validation else None,
            }

        outcome = self._closed(Kind.VALIDATE, fold, errand)
        if outcome is None:
            self._enter(Kind.VALIDATE, errand)
            outcome = self._exchange.ask(
                self.study.sites, errand, accept, needed=self.study.needed, deadline=self.study.step_deadline
            )
            if len(outcome.answers) < self.study.needed:
                raise FednnunetError(Code.QUORUM_NOT_MET, f"validation of fold {fold}: {_who(outcome)}")
            self._close(Kind.VALIDATE, fold, outcome)
        scores = {site: result.validation for site, result in sorted(outcome.answers.items()) if result.validation}
        return Scored(scores, outcome.missing)

    @staticmethod
    def _accept_comparison(task: Task, result: Result, update: Path) -> dict[str, Any]:
        return {"comparison": result.comparison.model_dump(mode="json") if result.comparison else None}

    def _export(self, plan: Plan | None, validation: dict[str, Scored], unfinished: dict[str, str]) -> None:
        journal = self.journal
        if journal.state.exported is not None:
            return
        journal.phase("exporting")
        finals = {fold: journal.global_file(fold, journal.state.weights[fold][0]) for fold in self.study.folds}
        scores = {fold: entry.scores for fold, entry in validation.items()}
        if self.study.one_model and plan is not None:
            archive = journal.folder / f"{self.study.dataset}.zip"
            model.export(
                journal.folder / "model",
                plan.plans,
                plan.dataset_json,
                to_nnunet(self._pooled()),
                self.study,
                finals,
                scores,
                archive,
                {fold: self._curves(fold) for fold in self.study.folds},
                self._workshop,
            )
        else:
            archive = journal.folder / f"{self.study.dataset}-shared.zip"
            layers = journal.folder / "layers.json"
            shared_export.export(archive, self.study, layers, finals, scores, plan)
        journal.write(
            "exported",
            whole=self.study.one_model,
            path=archive.name,
            sha256=files.sha256_of(archive),
            nbytes=archive.stat().st_size,
            weights={fold: journal.state.weights[fold][1] for fold in self.study.folds},
            unfinished=unfinished,
            validation={
                fold: {
                    "sites": {site: score.model_dump(mode="json") for site, score in entry.scores.items()},
                    "missing": entry.missing,
                }
                for fold, entry in validation.items()
            },
        )

    def _curves(self, fold: str) -> dict[str, list[float]]:
        """For each epoch the mean over the sites that took part, as nnU-Net's own progress.png draws them."""
        names = {"train_losses": "train_loss", "val_losses": "val_loss", "lrs": "learning_rate"}
        curves: dict[str, list[float]] = {name: [] for name in (*names, "mean_fg_dice")}
        for number in range(1, self.study.rounds + 1):
            reports = [
                line["training"]
                for (key, _), line in sorted(self.journal.state.answered.items())
                if key == f"train-fold_{fold}-{number:04d}"
            ]
            for epoch in range(self.study.epochs_per_round):
                for name, field in names.items():
                    curves[name].append(_mean([report[field][epoch] for report in reports]))
                dice = [value for report in reports for value in report["pseudo_dice"][epoch] if value is not None]
                curves["mean_fg_dice"].append(_mean(dice))
        return curves


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _who(outcome: Outcome) -> str:
    return "; ".join(f"{site}: {reason}" for site, reason in sorted(outcome.missing.items()))


@dataclass(frozen=True)
class CoordinatorSettings:
    """Where the coordinator works.

    Attributes
    ----------
    state : Path
        The orchestrator's state folder.
    control : str
        HOST:PORT of the control listener.
    poll : float
        Seconds between two looks.
    """

    state: Path
    control: str
    poll: float

    @property
    def authority(self) -> Authority:
        """The authority's files."""
        return Authority(self.state / "authority")

    @property
    def signatures(self) -> Signatures:
        """The coordinator's key, and those of the sites as the registry has them."""
        from orchestrator.enrollment.registry import Registry

        key = self.authority.signing_key
        return CoordinatorSignatures(keypairs.load_private(key.read_bytes(), str(key)), Registry(self.state).public_key)

    @property
    def studies(self) -> Path:
        """Folder of the studies."""
        return self.state / "studies"


def drive(settings: CoordinatorSettings, run: Run, workshop: Workshop) -> None:
    """Drive the study of one run to its end, or until the run is lost."""
    if run.study_json == selftest.STUDY:
        selftest.empty_round(settings.state, run, settings.signatures, settings.poll)
        log.info("run %s: an empty round", run.run_id)
        return
    study = parse(json.loads(run.study_json), f"run {run.run_id}")
    with logs.about(study=study.id[:12]):
        _drive(settings, run, study, workshop)


def _drive(settings: CoordinatorSettings, run: Run, study: Study, workshop: Workshop) -> None:
    folder = settings.studies / study.id
    journal, shut_down = _open(folder, study, run), False
    try:
        shutil.rmtree(folder / "incoming", ignore_errors=True)
        if journal.state.ended == "done" or run.submission in journal.state.ended_submissions:
            return
        journal.write("opened", run=run.run_id, submission=run.submission)
        log.info("%s, run %s: %s", study.name, run.run_id, journal.state.phase)
        try:
            Conductor(
                run, journal, settings.state / "pretrained", settings.signatures, workshop, settings.poll
            ).conduct()
        except FednnunetError as error:
            journal.write("failed", number=error.code.number, reason=str(error), advice=error.advice)
            raise
        except OSError as error:
            numbered = files.disk_error(error, folder)
            numbered = numbered or FednnunetError(Code.STUDY_FAILED, f"{type(error).__name__}: {error}")
            log.exception("%s broke off", study.name)
            journal.write("failed", number=numbered.code.number, reason=str(numbered), advice=numbered.advice)
            raise numbered from error
        except StopRequested as asked:
            journal.stop(asked.by)
            log.info("%s: stopped by %s", study.name, asked.by)
            return
        except (RunLost, clients.HTTPError):
            raise
        except Stop:
            shut_down = True
            raise
        except Exception as error:  # a fault of ours: said once, in full, instead of a coordinator that dies for ever
            log.exception("%s broke off", study.name)
            failed = FednnunetError(Code.STUDY_FAILED, f"{type(error).__name__}: {error} (traceback in the log)")
            journal.write("failed", number=failed.code.number, reason=str(failed), advice=failed.advice)
            raise failed from error
    finally:
        ended = journal.state.ended in ENDED
        journal.close()
        if ended:
            withdraw_stop(folder)
            _write_report(folder)
        if shut_down:  # SIGTERM may have come in the middle of a line, so the file is opened anew
            audit.append(folder / "journal.jsonl", "interrupted", run=run.run_id)


def _open(folder: Path, study: Study, run: Run) -> Journal:
    """A study's journal. While the disk does not take it there is nowhere to say so but the log: it is tried again."""
    while True:
        try:
            with files.disk_errors(folder):
                return Journal(folder, study)
        except FednnunetError as error:
            if error.code is not Code.DISK_FULL:
                raise
            log.error("%s waits for the disk: %s. %s", study.name, error, error.advice)
        time.sleep(DISK_PAUSE)
        run.check()


def _write_report(folder: Path) -> None:
    """The report of a study that has ended; a report that cannot be written changes nothing of the study."""
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator.report", str(folder)], capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode != 0:
        log.warning("no report: %s", (done.stderr.strip().splitlines() or ["?"])[-1])


def unfinished(settings: CoordinatorSettings) -> list[Study]:
    """Studies whose journal has begun and not ended; one that cannot be read is said and holds up no other."""
    found = []
    for folder in sorted(settings.studies.glob("*")):
        if (folder / "journal.jsonl").exists():
            try:
                study = read_study(folder / "study.json")
                if _goes_on(folder, study):
                    found.append(study)
            except (FednnunetError, OSError) as error:
                log.error("study %s is left as it is: %s", folder.name[:12], error)
    return found


def _goes_on(folder: Path, study: Study) -> bool:
    journal = Journal(folder, study)
    try:
        if journal.state.ended not in ENDED:
            journal.check()
            return True
    except StopRequested as asked:  # nobody drove it when it was asked for
        journal.stop(asked.by)
    finally:
        journal.close()
    return False


def _carry_on(settings: CoordinatorSettings, control: clients.Control) -> None:
    """Flower forgets a run that loses its coordinator: end what is left of it and start a new run in its place.

    Called while no run is driven, so every run that is under way has lost its coordinator. Mostly its study has a
    journal that has not ended; but who died between taking the run and the journal's line of it has left nothing else.
    The new run is started before the old one is ended, so that the study is somewhere at every moment.
    """
    going_on: dict[str, tuple[str, str | None]]
    going_on = {study.id: (study.model_dump_json(), None) for study in unfinished(settings)}
    lost = control.under_way()
    for run in lost:
        if run.study_json == selftest.STUDY:
            going_on[selftest.STUDY] = run.study_json, run.submission
            continue
        try:
            study = parse(json.loads(run.study_json), f"run {run.run_id}")
        except (FednnunetError, ValueError):  # of another version
            continue
        if study.id not in going_on and not _has_ended(settings, study, run.submission):
            going_on[study.id] = study.model_dump_json(), run.submission
    for key, (text, submission) in going_on.items():
        log.info("study %s goes on in a new run", key[:12])
        control.start(text, submission)
    for run in lost:
        control.stop(run.run_id)


def _has_ended(settings: CoordinatorSettings, study: Study, submission: str) -> bool:
    """Whether the journal says that this submission of a study has come to its end; a damaged one does not go on."""
    folder = settings.studies / study.id
    if not (folder / "journal.jsonl").exists():
        return False
    try:
        journal = Journal(folder, study)
    except FednnunetError as error:
        log.error("study %s is left as it is: %s", study.id[:12], error)
        return True
    try:
        return journal.state.ended == "done" or submission in journal.state.ended_submissions
    finally:
        journal.close()


def main(settings: CoordinatorSettings) -> None:
    """Run the resident coordinator until SIGTERM."""

    def stop(*_: object) -> None:
        raise Stop(0)

    signal.signal(signal.SIGTERM, stop)
    authority = settings.authority
    authority.check()
    ca, token = authority.ca.read_bytes(), authority.token.read_text().strip()
    control = clients.Control(settings.control, ca, token)
    secret = clients.load_secret(authority.secret)
    workshop, pause, known = Workshop(), 0.0, ""
    next_try: float | None = 0.0
    for ran in serve_runs(settings.control, ca, secret, lambda run: drive(settings, run, workshop), settings.poll):
        if ran:  # a study that makes no progress is tried again after a pause that grows
            now = _progress(settings)
            pause = min(max(1.0, pause * 2), 60.0) if now == known else 0.0
            known, next_try = now, time.monotonic() + pause
        if next_try is not None and time.monotonic() >= next_try:
            try:
                put_out_revoked(settings.state, control)
                _register_again(settings.state, control)
                _carry_on(settings, control)
                next_try = None
            except clients.HTTPError as error:
                log.warning("the SuperLink does not answer: %s", str(error).splitlines()[0])


def _register_again(state: Path, control: clients.Control) -> None:
    """A SuperLink with a new database gets to know the sites again; one it refuses is said, and holds up nobody."""
    registry = Registry(state)
    with registry.changing():
        for site in forgotten(registry, control):
            try:
                control.register(site.public_key.encode(), site.name)
                log.info("%s is registered again: the SuperLink did not know it", site.name)
            except clients.HTTPError as error:
                log.warning("the SuperLink does not take %s: %s", site.name, str(error).splitlines()[0])


def _progress(settings: CoordinatorSettings) -> str:
    """Changes when any study's journal has grown by more than the lines of a restart."""
    return ",".join(_grown(path) for path in sorted(settings.studies.glob("*/journal.jsonl")))


def _grown(path: Path) -> str:
    try:
        return str(sum(line["event"] not in _OF_A_START for line in audit.read(path)))
    except FednnunetError:  # damaged
        return ""
