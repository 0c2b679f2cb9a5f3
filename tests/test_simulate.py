"""`fednnunet simulate` over datasets given by their ids, as FednnU-Net's own run.py takes them: the real command line.

The datasets are tiny phantoms (synthetic); the network is small and trains for a few iterations.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from commands import FEDNNUNET, Done, begin, end, fednnunet, good, phantom_study, refused, wait_for, write_study
from documents import Page, Person

from federation.audit import read

pytestmark = pytest.mark.slow

IDS, SITES = "301 302", ("site_301", "site_302")


@dataclass
class Desk:
    """A folder to work in, with nnUNet_raw set."""

    folder: Path
    raw: Path

    @property
    def state(self) -> Path:
        """Where everything is kept when --state is left out."""
        return self.folder / "fednnunet-state" / "301_302"

    def simulate(self, *arguments: object) -> Done:
        """Run `fednnunet simulate ...` to its end."""
        return fednnunet("simulate", *arguments, cwd=self.folder, nnUNet_raw=str(self.raw))

    def journals(self) -> dict[str, list[dict[str, Any]]]:
        """Lines of every study's journal, by the study's name."""
        found = {}
        for path in self.state.glob("orchestrator/studies/*/journal.jsonl"):
            found[json.loads((path.parent / "study.json").read_text())["name"]] = read(path)
        return found

    def asked(self, study: str) -> set[str]:
        """The tasks that the sites were given in a study."""
        return {line["key"] for line in self.journals()[study] if line["event"] == "asked"}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_phantom_sites: dict[str, Path]) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"), tiny_phantom_sites["hospital_a"].parent)


@pytest.fixture(scope="module")
def fingerprinted(desk: Desk) -> Done:
    return good(desk.simulate("extract_fingerprint", IDS, "-npfp", 2, "--verify_dataset_integrity"))


@pytest.fixture(scope="module")
def planned(desk: Desk) -> Done:
    return good(
        desk.simulate("plan_and_preprocess", IDS, "3d_fullres", "-pl", "SmallUNetPlanner", "-np", 2, "-npfp", 2)
    )


TRAIN = ("train", IDS, "3d_fullres", "all", "-p", "nnUNetSmallPlans", "--wire", "half")
FEW = ("--rounds", 3, "--iterations", 4, "--validation-iterations", 1)


@pytest.fixture(scope="module")
def trained(desk: Desk, planned: Done) -> Done:
    return good(desk.simulate(*TRAIN, *FEW))


@pytest.mark.long
def test_extract_fingerprint_pools_and_stops_there(desk: Desk, fingerprinted: Done) -> None:
    for site in SITES:
        assert f"{site} is online" in fingerprinted.out
    assert "pooled fingerprint" in fingerprinted.out
    path = re.search(r"^fingerprint: (.*)$", fingerprinted.out, re.MULTILINE)
    assert path
    assert (desk.folder / path[1]).exists()
    assert desk.asked("extract_fingerprint") == {"describe", "fingerprint"}


def test_plan_and_preprocess_makes_one_plan_and_every_site_has_its_own_data(desk: Desk, planned: Done) -> None:
    assert "plans nnUNetSmallPlans: " in planned.out
    assert desk.asked("plan_and_preprocess") == {"describe", "fingerprint", "prepare"}
    for site in SITES:
        preprocessed = list((desk.state / "sites" / site / "state" / "worker" / "preprocessed").rglob("*.b2nd"))
        cases = {path.name.removesuffix("_seg.b2nd").removesuffix(".b2nd") for path in preprocessed}
        assert len(cases) == 6, f"{site}: {sorted(cases)}"
        hospital = "hospital_a" if site == "site_301" else "hospital_b"
        assert all(case.startswith(f"phantom_{hospital}") for case in cases), "only its own cases"


def test_train_with_half_wire_ends_in_one_native_model(desk: Desk, trained: Done) -> None:
    for number in (1, 2, 3):
        assert f"fold all, round {number} of 3: " in trained.out
    path = re.search(r"^model: (.*\.zip) \(", trained.out, re.MULTILINE)
    assert path
    names = zipfile.ZipFile(path[1]).namelist()
    top = "Dataset301_Phantom/nnUNetTrainer__nnUNetSmallPlans__3d_fullres"
    for name in ("dataset.json", "plans.json", "dataset_fingerprint.json", "fold_all/checkpoint_final.pth"):
        assert f"{top}/{name}" in names, names
    sent = [line["nbytes"] for line in desk.journals()["train"] if line.get("key", "").startswith("train-")]
    answered = [
        line["nbytes"]
        for line in desk.journals()["train"]
        if line["event"] == "answered" and line["key"].startswith("train-")
    ]
    assert len(answered) == 6
    assert max(answered) < 0.65 * max(sent), "an answer is a float16 difference, the first weights are float32"


@pytest.mark.long
def test_the_model_is_installed_and_predicts_as_getting_started_says(desk: Desk, trained: Done, tmp_path: Path) -> None:
    """The page's own lines, with the names that the study printed."""
    path = re.search(r"^model: (.*\.zip) \(", trained.out, re.MULTILINE)
    assert path
    assert "-d Dataset301_Phantom -c 3d_fullres -f all -p nnUNetSmallPlans\n" in trained.out, "as the page says"
    person = Person(tmp_path, {
        "PATH_OF_THE_ZIP": path[1],
        "DATASET": "Dataset301_Phantom",
        "PLANS": "nnUNetSmallPlans",
        "IMAGES": str(desk.raw / "Dataset301_Phantom" / "imagesTs"),
        "PREDICTIONS": "predictions",
    })  # fmt: skip
    person.reads(Page.of("getting-started/one-machine.md"), "3. Use the model")
    person.stops()
    assert len(list((tmp_path / "predictions").glob("phantom_*.nii.gz"))) == 2


def test_a_second_start_of_a_finished_study_says_so_at_once_and_starts_nothing(desk: Desk, trained: Done) -> None:
    lines = len(desk.journals()["train"])
    again = good(desk.simulate(*TRAIN, *FEW))
    assert "is done already" in again.out
    assert "enrolling" not in again.out
    assert re.findall(r"^model: .*$", again.out, re.MULTILINE) == re.findall(r"^model: .*$", trained.out, re.MULTILINE)
    assert len(desk.journals()["train"]) == lines
    continued = good(desk.simulate(*TRAIN, *FEW, "--c"))
    assert "is done already" in continued.out


def test_plans_that_were_not_made_are_refused_by_the_name_of_those_that_were(desk: Desk, planned: Done) -> None:
    refused(desk.simulate("train", IDS, "3d_fullres", "all"), 107, "nnUNetPlans", "there: nnUNetSmallPlans")


@pytest.mark.exhaustive
def test_fold_0_to_4_trains_five_models_one_after_the_other(
    no_process_left: None, tmp_path: Path, tiny_phantom_sites: dict[str, Path]
) -> None:
    data = tmp_path / "Dataset301_Phantom"
    shutil.copytree(tiny_phantom_sites["hospital_a"], data, ignore=shutil.ignore_patterns("imagesTs", "labelsTs"))
    study = phantom_study(["hospital_a"], fold="0-4", rounds=1, iterations_per_epoch=2)
    write_study(tmp_path / "study.yaml", study)
    run = ("simulate", "run", "study.yaml", "--site", f"hospital_a={data}", "--state", "state")
    done = good(fednnunet(*run, cwd=tmp_path, timeout=400))
    assert re.findall(r"^fold (\d), round 1 of 1: ", done.out, re.MULTILINE) == ["0", "1", "2", "3", "4"]
    path = re.search(r"^model: (.*\.zip) \(", done.out, re.MULTILINE)
    assert path
    names = zipfile.ZipFile(path[1]).namelist()
    at_site = {file.parent.name for file in (tmp_path / "state" / "sites").rglob("fold_*/checkpoint_final.pth")}
    for fold in range(5):
        assert any(name.endswith(f"/fold_{fold}/checkpoint_final.pth") for name in names), names
        assert f"fold_{fold}" in at_site
        assert re.search(rf"hospital_a .* [12] \(fold {fold}\)", done.out), "a table for each fold, of its own cases"


@pytest.fixture
def killed_later(tmp_path: Path, tiny_phantom_sites: dict[str, Path]) -> Iterator[subprocess.Popen[str]]:
    write_study(tmp_path / "study.yaml", phantom_study(["hospital_a"], rounds=100))
    process = begin(
        FEDNNUNET,
        *("simulate", "run", "study.yaml", "--site", f"hospital_a={tiny_phantom_sites['hospital_a']}"),
        *("--state", "state"),
        cwd=tmp_path,
    )
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        end(process, 60)


def test_a_killed_simulation_leaves_no_orphan(
    no_process_left: None, tmp_path: Path, killed_later: subprocess.Popen[str]
) -> None:
    import psutil

    def family() -> list[psutil.Process]:
        return psutil.Process(killed_later.pid).children(recursive=True)

    journals = "state/orchestrator/studies/*/journal.jsonl"
    wait_for(lambda: any('"describe"' in path.read_text() for path in tmp_path.glob(journals)), 300, "the first task")
    below, commands = family(), []
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):  # one that lived for a moment
            commands.append(" ".join(process.cmdline()))
    for part in (
        "orchestrator superlink",
        "orchestrator coordinator",
        "link supernode",
        "link link",
        "appliance.worker",
    ):
        assert any(f"-m {part}" in line or f".{part}" in line for line in commands), f"{part}: {commands}"
    killed_later.kill()
    killed_later.wait()
    _, alive = psutil.wait_procs(below, timeout=60)
    alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, [process.cmdline() for process in alive]
