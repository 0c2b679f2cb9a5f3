"""What goes wrong in front of a person: each fault is a numbered error on one screen that says what to do.

Every test runs the real command line as a child process. `commands.refused` checks what all errors have in common:
the number, the exit status, at most 24 lines of 100 columns, a line "What to do", and no traceback.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import (
    APPLIANCE,
    FEDNNUNET,
    ORCHESTRATOR,
    Done,
    assert_nothing_half_written,
    begin,
    command,
    end,
    fednnunet,
    good,
    phantom_study,
    refused,
    wait_for,
    write_study,
)

from federation.processes import Lock, free_port
from orchestrator.admin.simulate import Simulation, SiteOptions

# ---- before any site is asked: nothing is started, nothing is written --------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """An nnUNet_raw with two datasets that agree and one whose labels differ; no images are needed here."""
    folder = tmp_path / "nnUNet_raw"
    for name, labels in (
        ("Dataset301_Phantom", {"background": 0, "organ": 1, "lesion": 2}),
        ("Dataset302_Phantom", {"background": 0, "organ": 1, "lesion": 2}),
        ("Dataset303_Phantom", {"background": 0, "organ": 1, "tumour": 2}),
    ):
        (folder / name).mkdir(parents=True)
        dataset = {"channel_names": {"0": "synthetic"}, "labels": labels, "numTraining": 6, "file_ending": ".nii.gz"}
        (folder / name / "dataset.json").write_text(json.dumps(dataset))
    (tmp_path / "a_file").write_text("not a folder")
    return folder


TRAIN = ("simulate", "train")


@pytest.mark.parametrize(
    ("arguments", "number", "named"),
    [
        ((*TRAIN, "301 399", "3d_fullres", "all"), 103, ["399", "Dataset302_Phantom"]),
        ((*TRAIN, "301 liver", "3d_fullres", "all"), 103, ["'liver'"]),
        ((*TRAIN, "301 301", "3d_fullres", "all"), 103, ["301 is given twice"]),
        (("simulate", "extract_fingerprint", ""), 103, ["no id"]),
        (("simulate", "plan_and_preprocess", "301 302 303"), 108, ["labels", "Dataset303_Phantom", "tumour"]),
        (("simulate", "plan_and_preprocess", "301 302", "3d_huge"), 102, ["configuration", "3d_fullres"]),
        (("simulate", "plan_and_preprocess", "301", "-pl", "MyPlanner"), 102, ["planner", "ExperimentPlanner"]),
        (("simulate", "plan_and_preprocess", "301", "-overwrite_target_spacing", "1 x 1"), 102, ["1 x 1"]),
        (("simulate", "plan_and_preprocess", "301", "-overwrite_target_spacing", "1 1"), 102, ["three"]),
        ((*TRAIN, "301 302", "3d_fullres"), 104, ["no fold was given", "0-4"]),
        ((*TRAIN, "301 302", "3d_fullres", "5"), 104, ["'5'"]),
        ((*TRAIN, "301 302", "3d_fullres", "all"), 107, ["nnUNetPlans", "plan_and_preprocess"]),
        ((*TRAIN, "301 302", "3d_fullres", "all", "-p", "nnUNetOther"), 107, ["nnUNetOther"]),
        ((*TRAIN, "301 302", "3d_fullres", "all", "--val_best"), 105, ["--val_best"]),
        ((*TRAIN, "301 302", "3d_fullres", "all", "--val"), 105, ["--val"]),
        ((*TRAIN, "301 302", "3d_fullres", "all", "-num_gpus", "2"), 105, ["-num_gpus", "-device"]),
        ((*TRAIN, "301 302", "3d_fullres", "all", "--disable_checkpointing"), 105, ["--disable_checkpointing"]),
        (("simulate", "extract_fingerprint", "301", "-fpe", "Other"), 105, ["-fpe"]),
        (("simulate", "plan_and_preprocess", "301", "--clean"), 105, ["--clean"]),
        (("simulate", "plan_and_preprocess", "301", "-preprocessor_name", "Other"), 105, ["-preprocessor_name"]),
        (("simulate", "extract_fingerprint", "301", "-device", "tpu"), 112, ["device", "cuda"]),
        (
            ("simulate", "extract_fingerprint", "301", "--state", "a_file/x"),
            702,
            [],
        ),
    ],
    ids=lambda value: " ".join(map(str, value))[:60] if isinstance(value, tuple) else None,
)
def test_options_are_refused_before_any_site_is_asked(
    raw: Path, arguments: tuple[str, ...], number: int, named: list[str]
) -> None:
    done = fednnunet(*arguments, cwd=raw.parent, nnUNet_raw=str(raw))
    refused(done, number, *named)
    assert "enrolling ..." not in done.out, "a site was asked"
    assert not list(raw.parent.rglob("journal.jsonl")), "a study was begun"


def test_without_nnunet_raw_the_variable_is_named(tmp_path: Path) -> None:
    refused(fednnunet("simulate", "extract_fingerprint", "301", cwd=tmp_path, nnUNet_raw=None), 103, "nnUNet_raw")


def test_c_with_nothing_to_continue_is_refused_and_a_setting_that_is_wrong_too(raw: Path) -> None:
    planned = raw.parent / "state" / "planned" / "nnUNetPlans.json"
    planned.parent.mkdir(parents=True)
    planned.write_text(json.dumps({"planner": "SmallUNetPlanner", "plans_name": None}))
    train = (*TRAIN, "301 302", "3d_fullres", "all", "--state", "state")

    def run(*options: str) -> Done:
        return fednnunet(*train, *options, cwd=raw.parent, nnUNet_raw=str(raw))

    refused(run("--c"), 110, "--c")
    refused(run("--wire", "third", "--rounds", "0"), 102, "wire", "rounds")
    refused(run("--quorum", "3"), 102, "quorum 3", "2 sites")
    refused(run("-tr", "MyTrainer"), 102, "trainer")
    refused(run("-pretrained_weights", "nowhere.pth"), 111, "nowhere.pth")


@pytest.mark.parametrize(
    ("content", "number", "named"),
    [
        (None, 101, ["study.yaml"]),
        ("name: [demo\nsites: {", 101, ["study.yaml", "line 2"]),
        ("\x00\x01", 101, ["study.yaml"]),
        ("just a sentence", 101, ["study.yaml"]),
        ("name: 2026-13-01\n", 101, ["study.yaml", "month"]),
        (
            "rounds: 5\nlabels: {organ: 1,\n  organ: 2}\nrounds: 6\n",
            102,
            [
                "study.yaml",
                "rounds: given twice, in line 1 and in line 4",
                "organ: given twice, in line 2 and in line 3",
            ],
        ),
        ("channel_names: {0: CT, '0': MR}\n", 102, ["0: given twice, in line 1 and in line 1"]),
        ("name: demo\n", 102, ["study.yaml", "dataset", "sites", "channel_names", "labels"]),
        ({"round": 5}, 102, ["study.yaml", "round: this key is not known"]),
        ({"rounds": 0, "wire": "double"}, 102, ["rounds", "wire"]),
        ({"rounds": "many"}, 102, ["rounds"]),
        ({"quorum": 3}, 102, ["quorum 3"]),
        ({"labels": {"background": 0, "organ": 2}}, 102, ["consecutive"]),
        ({"sites": ["Hospital A"]}, 102, ["sites.0"]),
        ({"sites": ["hospital_a", "hospital_a"]}, 102, ["twice"]),
        ({"aggregation": {"method": "mode"}}, 102, ["aggregation.method"]),
    ],
    ids=["absent", "not YAML", "binary", "no keys", "no date", "a key twice", "a channel twice", "fields missing"]
    + [None] * 8,
)
def test_a_study_file_that_cannot_be_used_is_named_with_each_fault(
    tmp_path: Path, content: str | dict[str, Any] | None, number: int, named: list[str]
) -> None:
    file = tmp_path / "study.yaml"
    if isinstance(content, dict):
        content = yaml.safe_dump(phantom_study(["hospital_a"]) | content)
    if content is not None:
        file.write_text(content)
    refused(fednnunet("simulate", "run", "study.yaml", "--site", "hospital_a=.", cwd=tmp_path), number, *named)
    refused(fednnunet("study", "check", "study.yaml", cwd=tmp_path), number, *named)
    assert not (tmp_path / "fednnunet-state").exists(), "something was started"


@pytest.mark.parametrize(
    ("sites", "number", "named"),
    [
        ([], 106, ["hospital_a, hospital_b", "given: none"]),
        (["hospital_a=."], 106, ["hospital_a, hospital_b", "given: hospital_a"]),
        (["hospital_a=.", "hospital_b=.", "hospital_c=."], 106, ["hospital_c"]),
        (["hospital_a=.", "hospital_a=."], 106, ["hospital_a is given twice"]),
        (["hospital_a=.", "hospital_b"], 106, ["--site hospital_b", "NAME=PATH"]),
        (["hospital_a=.", "hospital_b=nowhere"], 201, ["hospital_b", "nowhere"]),
        (["hospital_a=here", "hospital_b=here"], 106, ["hospital_a=here", "hospital_b=here", "the same folder"]),
        (["hospital_a=here", "hospital_b=there"], 106, ["hospital_a=here", "hospital_b=there", "the same folder"]),
    ],
)
def test_sites_that_do_not_match_the_study_are_named(
    tmp_path: Path, sites: list[str], number: int, named: list[str]
) -> None:
    write_study(tmp_path / "study.yaml", phantom_study(["hospital_a", "hospital_b"]))
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to("here")
    options = [part for site in sites for part in ("--site", site)]
    refused(fednnunet("simulate", "run", "study.yaml", *options, cwd=tmp_path), number, *named)
    assert not (tmp_path / "fednnunet-state").exists(), "something was started"


def test_a_port_or_a_state_folder_in_use_is_named_and_free_again_it_starts(
    tmp_path: Path, no_process_left: None
) -> None:
    refused(command(ORCHESTRATOR, "start", "--state", "federation", cwd=tmp_path), 113, "federation init")
    good(fednnunet("federation", "init", "federation", "--name", "127.0.0.1", cwd=tmp_path))
    refused(fednnunet("federation", "init", "federation", "--name", "127.0.0.1", cwd=tmp_path), 113, "federation")
    write_study(tmp_path / "study.yaml", phantom_study(["hospital_a"]))
    port = free_port()  # stays ours between the tests of it: nobody else comes to listen there
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        fleet = ("start", "--state", "federation", "--fleet-port", port, "--control-port", free_port())
        refused(command(ORCHESTRATOR, *fleet, cwd=tmp_path), 701, f"127.0.0.1:{port}")
        control = ("start", "--state", "federation", "--fleet-port", free_port(), "--control-port", port)
        refused(command(ORCHESTRATOR, *control, cwd=tmp_path), 701, f"127.0.0.1:{port}")
    submit = ("study", "submit", "study.yaml", "--state", "federation", "--control", f"127.0.0.1:{port}")
    refused(fednnunet(*submit, cwd=tmp_path), 604, f"127.0.0.1:{port}")

    lock = Lock(tmp_path / "federation")
    refused(command(ORCHESTRATOR, *fleet, cwd=tmp_path), 705, "federation", str(os.getpid()))
    lock.release()
    process = begin(ORCHESTRATOR, *fleet, cwd=tmp_path)
    try:
        wait_for(lambda: process.poll() is not None or _answers(port), 180, "the hospitals' listener")
    finally:
        process.send_signal(signal.SIGINT)
        good(end(process))


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_a_simulation_whose_state_folder_is_in_use_is_refused(tmp_path: Path) -> None:
    write_study(tmp_path / "study.yaml", phantom_study(["hospital_a"]))
    run = ("simulate", "run", "study.yaml", "--site", "hospital_a=.", "--state", "state")
    lock = Lock(tmp_path / "state")
    refused(fednnunet(*run, cwd=tmp_path), 705, str(tmp_path / "state"), str(os.getpid()))
    lock.release()


# ---- real broken files, through a whole `simulate run` -----------------------------------------------------------


def hippo_float_label(bad: Path, folder: Path) -> None:
    """A label stored as float32."""
    _case(bad / "hippo_float_label" / "hippocampus_003_image.nii.gz", folder / "imagesTr" / "hippo_003_0000.nii.gz")
    _case(bad / "hippo_float_label" / "hippocampus_003_label.nii.gz", folder / "labelsTr" / "hippo_003.nii.gz")


def lfs_pointer(bad: Path, folder: Path) -> None:
    """A Git LFS pointer where an image should be."""
    pointer = bad / "lfs_pointers" / "ProstateX-0000_07-07-2011.nii.gz"
    _case(pointer, folder / "imagesTr" / "ProstateX-0000_0000.nii.gz")
    _case(pointer, folder / "labelsTr" / "ProstateX-0000.nii.gz")


def grey_mask(bad: Path, folder: Path) -> None:
    """An anti-aliased mask with about 160 values."""
    _case(bad / "label_values" / "image_MCUCXR_0002_0.png", folder / "imagesTr" / "MCUCXR_0002_0000.png")
    _case(bad / "label_values" / "grey_antialiased_mask_MCUCXR_0002_0.png", folder / "labelsTr" / "MCUCXR_0002.png")


def _case(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@dataclass(frozen=True)
class Broken:
    """A real broken file at a site, and what has to be said of it."""

    make: Callable[[Path, Path], None]
    number: int
    file: str
    advice: str


MRI = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "one": 1, "two": 2}, "file_ending": ".nii.gz"}
X_RAY = {"channel_names": {"0": "X-ray"}, "labels": {"background": 0, "lung": 1}, "file_ending": ".png"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contract", "broken"),
    [
        (
            MRI,
            {
                "hospital_a": Broken(hippo_float_label, 216, "hippo_003.nii.gz", "accept_float_labels"),
                "hospital_b": Broken(lfs_pointer, 211, "ProstateX-0000_0000.nii.gz", "git lfs pull"),
            },
        ),
        pytest.param(
            X_RAY, {"hospital_a": Broken(grey_mask, 215, "MCUCXR_0002.png", "Threshold")}, marks=pytest.mark.long
        ),
    ],
    ids=["a float label and an LFS pointer", "an anti-aliased mask"],
)
def test_a_real_broken_file_ends_the_study_with_the_sites_number_and_the_way_to_its_report(
    shared_data: Path, tmp_path: Path, no_process_left: None, contract: dict[str, Any], broken: dict[str, Broken]
) -> None:
    options: list[str] = []
    for site, fault in broken.items():
        folder = tmp_path / site / "Dataset400_Broken"
        fault.make(shared_data / "bad", folder)
        (folder / "dataset.json").write_text(json.dumps({**contract, "numTraining": 1}))
        options += ["--site", f"{site}={folder}"]
    write_study(tmp_path / "study.yaml", phantom_study(list(broken), dataset="Dataset400_Broken", **contract))
    done = fednnunet("simulate", "run", "study.yaml", *options, "--state", "state", cwd=tmp_path)
    refused(done, 502, "journal: ")
    assert "fingerprinting ..." not in done.out, "nothing but the number and a count has left the site"
    journal = next((tmp_path / "state" / "orchestrator").rglob("journal.jsonl")).read_text()
    reports = re.findall(r"^site report: (.*)$", done.err, re.MULTILINE)
    assert len(reports) == len(broken), done
    for (site, fault), report in zip(sorted(broken.items()), reports, strict=True):
        assert f"{site}: FNU-{fault.number}" in done.err
        assert fault.advice in done.err, "what to do about the site's number, not only about the study"
        assert f"FNU-{fault.number}" in journal
        assert fault.file not in journal + done.err + done.out, "the file's name stays at the site"
        written = Path(report).read_text()
        assert f"FNU-{fault.number}" in written
        assert fault.file in written


# ---- a full disk -------------------------------------------------------------------------------------------------


def fill(disk: Path) -> Path:
    """Take every byte that is left."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as stream:
        for size in (65536, 512):
            try:
                while True:
                    stream.write(b"0" * size)
            except OSError:
                continue
    return filler


@pytest.mark.long
@pytest.mark.parametrize("where", ["orchestrator", "sites/hospital_a/state"])
def test_a_disk_that_fills_up_in_the_middle_of_training_is_said_and_the_same_command_ends_the_study(
    tmp_path: Path,
    tiny_phantom_sites: dict[str, Path],
    small_disk: Callable[[Path, int], Path],
    no_process_left: None,
    where: str,
) -> None:
    disk = small_disk(tmp_path / "state" / where, 32)
    study = phantom_study(["hospital_a"], rounds=4)
    write_study(tmp_path / "study.yaml", study)
    data = tiny_phantom_sites["hospital_a"]
    run = ("simulate", "run", "study.yaml", "--site", f"hospital_a={data}", "--state", "state")
    process = begin(FEDNNUNET, *run, cwd=tmp_path)
    shown = Shown(process)
    shown.wait_for("round 1 of 4", 400)
    filler = fill(disk)
    done = shown.end()
    assert "FNU-702" in done.err, done
    assert "Free space" in done.err, done
    refused(done, int(done.err[4:7]))
    assert done.status in (15, 17), done
    assert_nothing_half_written(tmp_path / "state")

    if where == "orchestrator":  # too full to start at all, if somebody else has taken what was given back
        fill(disk)
        refused(fednnunet(*run, cwd=tmp_path), 702, "orchestrator")
    filler.unlink()
    again = good(fednnunet(*run, cwd=tmp_path))
    assert "round 4 of 4" in again.out
    assert "round 1 of 4" not in again.out, "what was done is not done again"
    assert "model: " in again.out
    assert_nothing_half_written(tmp_path / "state")


class Shown:
    """What a running command prints, read while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.lines, self.errors = process, list[str](), list[str]()
        self._readers = [
            threading.Thread(target=self._take, args=(process.stdout, self.lines)),
            threading.Thread(target=self._take, args=(process.stderr, self.errors)),
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _take(stream: Any, lines: list[str]) -> None:
        lines.extend(iter(stream.readline, ""))

    @property
    def out(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, timeout: float) -> None:
        """Wait until it has printed this; ends the command when it does not."""
        try:
            wait_for(lambda: text in self.out or self.process.poll() is not None, timeout, text)
            assert text in self.out, f"it ended without {text!r}: {self.out}\n{''.join(self.errors)}"
        except AssertionError:
            self.process.send_signal(signal.SIGINT)
            raise

    def end(self, timeout: float = 120) -> Done:
        """Wait for its end."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(30)
            raise AssertionError(f"no end within {timeout} s: {self.out}") from None
        for reader in self._readers:
            reader.join()
        return Done(self.process.returncode, self.out, "".join(self.errors))


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_in_the_middle_of_a_round_ends_every_process_and_the_second_start_goes_on(
    tmp_path: Path, tiny_phantom_sites: dict[str, Path], no_process_left: None
) -> None:
    study = phantom_study(["hospital_a"], rounds=4, iterations_per_epoch=15)
    write_study(tmp_path / "study.yaml", study)
    data = tiny_phantom_sites["hospital_a"]
    run = ("simulate", "run", "study.yaml", "--site", f"hospital_a={data}", "--state", "state")
    shown = Shown(begin(FEDNNUNET, *run, cwd=tmp_path))
    shown.wait_for("round 1 of 4", 400)
    journal = next((tmp_path / "state" / "orchestrator").rglob("journal.jsonl"))
    wait_for(lambda: '"train-fold_all-0002"' in journal.read_text(), 120, "round 2")
    os.killpg(shown.process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
    done = shown.end()
    assert done.status == 130, done
    assert "every process is ended" in done.out, done
    assert "The same command goes on" in done.out, done
    assert "Traceback" not in done.out + done.err, done
    assert not lives_below(tmp_path), "processes of the study live on"
    assert_nothing_half_written(tmp_path / "state")

    again = good(fednnunet(*run, cwd=tmp_path))
    assert "goes on after: training, round" in again.out, again
    assert "describing ..." not in again.out, "what was done is not done again"
    assert "round 1 of 4" not in again.out, again
    assert "round 4 of 4" in again.out, again
    assert "model: " in again.out, again
    assert not [*(tmp_path / "state").rglob("incoming/*")], "what was on its way is taken away"


def lives_below(folder: Path) -> list[str]:
    """Processes whose command line names this folder."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(folder) in line and process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid} {line[:160]}")
    return found


# ---- at the sites: one federation, a study for each fault --------------------------------------------------------


class Running:
    """A federation of two phantom hospitals, one of them with four cases, that runs for the whole module."""

    def __init__(self, simulation: Simulation, folder: Path) -> None:
        self.simulation, self.folder = simulation, folder
        self.control = simulation.control_address

    def submit(self, name: str, sites: list[str], **changes: Any) -> Done:
        """Run `fednnunet study submit` with a small study."""
        file = write_study(self.folder / f"{name}.yaml", phantom_study(sites, name=name, **changes))
        state = self.simulation.orchestrator
        return fednnunet("study", "submit", file, "--state", state, "--control", self.control, cwd=self.folder)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tiny_phantom_sites: dict[str, Path]) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("bad")
    few = folder / "few"
    copy_of(tiny_phantom_sites["hospital_b"], few, cases=4)
    simulation = Simulation(folder / "state", {"hospital_a": tiny_phantom_sites["hospital_a"], "few": few}, ONE_THREAD)
    with simulation.running():
        yield Running(simulation, folder)


ONE_THREAD = SiteOptions(threads=1)


def copy_of(dataset: Path, target: Path, cases: int) -> None:
    """A dataset with fewer training cases."""
    shutil.copytree(dataset, target)
    for label in sorted((target / "labelsTr").iterdir())[cases:]:
        label.unlink()
        (target / "imagesTr" / label.name.replace(".nii.gz", "_0000.nii.gz")).unlink()
    described = json.loads((target / "dataset.json").read_text()) | {"numTraining": cases}
    (target / "dataset.json").write_text(json.dumps(described))


@pytest.mark.parametrize("fold", ["0", "0-4"])
def test_fewer_than_five_cases_with_five_folds_is_said_by_the_site(running: Running, fold: str) -> None:
    done = running.submit(f"few_{fold[-1]}", ["few", "hospital_a"], fold=fold)
    refused(done, 502, "few: FNU-109", "fold all", "journal: ")
    assert "hospital_a: FNU" not in done.err
    assert "training ..." not in done.out


def test_labels_that_differ_are_said_by_the_site_and_leave_only_the_number(running: Running) -> None:
    done = running.submit("labels", ["hospital_a"], labels={"background": 0, "organ": 1, "tumour": 2})
    refused(done, 502, "hospital_a: FNU-204", "Agree on labels", "site report", "examination.txt")
    assert "lesion" not in done.err + done.out, "the site's own labels stay at the site"
    assert "fingerprinting ..." not in done.out


def test_a_site_that_never_appears_is_named(running: Running, tmp_path: Path) -> None:
    made = command(
        APPLIANCE,
        *("init", "--name", "hospital_z", "--orchestrator", "127.0.0.1:1", "--data", tmp_path),
        *("--config", tmp_path / "config", "--state", tmp_path / "state", "--device", "cpu"),
        cwd=tmp_path,
    )
    good(made)
    added = fednnunet(
        *("site", "add", "hospital_z", tmp_path / "config" / "site.pub"),
        *("--state", running.simulation.orchestrator, "--control", running.control),
        cwd=tmp_path,
    )
    good(added)
    listed = ("site", "list", "--state", running.simulation.orchestrator, "--control", running.control)
    wait_for(lambda: "hospital_a\tapproved\tonline" in fednnunet(*listed, cwd=tmp_path).out, 180, "hospital_a")
    done = running.submit("absent", ["hospital_a", "hospital_z"], appear_deadline=1)
    refused(done, 501, "hospital_z", "Start its appliance")
    assert "hospital_a is online" in done.out
    done = running.submit("unknown", ["hospital_a", "hospital_y"], appear_deadline=1)
    refused(done, 501, "hospital_y")
