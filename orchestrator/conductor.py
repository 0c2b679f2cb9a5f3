"""The state machine of a study: from wherever its journal stands to its end.

Rules:

- Every step first asks the journal whether it has been done; a coordinator that is killed at any point goes on from
  the last line, in a new Flower run.
- Describe, fingerprint and prepare need every site: there is never a silent subset. A round of training, a validation
  and finishing need the quorum; the participation record says who was missing and why.
- Between rounds there is one store of all that is shared; every site gets its view of it (orchestrator.views). With
  `asymfedavg` each site has planned for itself, told its network with its answer to Prepare, and keeps the rest.
- Nothing here imports torch: planning and model building are child processes.

States: enrolling -> describing -> fingerprinting -> planning -> preparing -> (training -> validating -> finishing
[-> comparing], for each fold) -> exporting -> done, failed(why) or stopped(by). With `asymfedavg` nothing is
fingerprinted or planned here.
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federation import files, logs, weights
from federation.errors import Code, FednnunetError
from federation.fingerprint import SiteFingerprint, check, merge, plan_tolerance, to_nnunet
from federation.study import KRUM
from federation.tasks import Kind, Network, Plan, Preparation, Result, Task, Validation, Weights
from federation.weights import TensorFile
from orchestrator import model, planning, shared_export, stages
from orchestrator.admission import admit
from orchestrator.aggregation.mean import Update
from orchestrator.aggregation.robust import select
from orchestrator.aggregation.rules import aggregate
from orchestrator.aggregation.shared_layers import SharedLayers, check_networks, share
from orchestrator.journal import Journal
from orchestrator.rounds import Accept, Carrier, Errand, Exchange, Outcome
from orchestrator.signatures import Signatures
from orchestrator.views import Views
from orchestrator.workshop import Workshop

log = logging.getLogger("fednnunet.coordinator")

_PHASES = {
    Kind.DESCRIBE: "describing",
    Kind.FINGERPRINT: "fingerprinting",
    Kind.PREPARE: "preparing",
    Kind.TRAIN: "training",
    Kind.VALIDATE: "validating",
    Kind.FINISH: "finishing",
    Kind.COMPARE: "comparing",
}


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

        answers = self._everyone(Kind.PREPARE, plan=plan, accept=accept).answers
        prepared = {site: result.preparation for site, result in answers.items() if result.preparation is not None}
        self._plans |= {site: answer.plans_sha256 for site, answer in prepared.items()}
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
