"""The images in a real engine: a federation by compose, the hardened hospital, faults in containers, wrong mounts.

Needs a Docker engine and the images of `make image`; `make test-containers` sees to the second. Nothing here is
skipped: without an engine the tests fail.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import REPOSITORY, wait_for

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]
DOCKER = os.environ.get("DOCKER", "docker")
UID = 10001
SITES = ("hospital_a", "hospital_b", "hospital_c")
PROJECT = "fednnunet-test"
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")


def docker(*arguments: object, check: bool = True, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a docker command to its end."""
    done = subprocess.run(
        [DOCKER, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, **changes},
        cwd=REPOSITORY,
        timeout=900,
    )
    assert not check or done.returncode == 0, f"docker {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def version() -> str:
    import tomllib

    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    return str(tomllib.loads(text)["project"]["version"])


def image(role: str) -> str:
    return f"fednnunet/{role}:{version()}-cpu"


@dataclass
class Compose:
    """A compose project: its files and what they are given."""

    project: str
    files: list[Path]
    variables: dict[str, str]

    def __call__(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        files = [part for file in self.files for part in ("-f", str(file))]
        return docker("compose", "-p", self.project, *files, *arguments, check=check, **self.variables)

    def execute(self, service: str, *command: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command in a running service."""
        return self("exec", "-T", service, *command, check=check)

    def container(self, service: str) -> str:
        return f"{self.project}-{service}-1"

    def logs(self, service: str) -> list[dict[str, Any]]:
        """The events that a service has shown; each line must be one."""
        lines = docker("logs", self.container(service)).stdout.splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def federation() -> Iterator[Compose]:
    """compose/federation.yaml, up and healthy."""
    compose = Compose(PROJECT, [REPOSITORY / "compose" / "federation.yaml"], {"LOG_FORMAT": "json", "ROUNDS": "3"})
    compose("down", "--volumes", "--timeout", 12, check=False)
    try:
        compose("up", "--wait")
        yield compose
    finally:
        compose("down", "--volumes", "--timeout", 12, check=False)


@pytest.fixture(scope="module")
def study(federation: Compose) -> dict[str, Any]:
    """The study that `setup` has written, run to its end."""
    done = federation.execute("orchestrator", "fednnunet", "study", "submit", "/config/study.yaml", "--state", "/state")
    assert "Dice of the global model" in done.stdout, done.stdout
    text = federation.execute("orchestrator", "cat", "/config/study.yaml").stdout
    value = yaml.safe_load(text)
    assert isinstance(value, dict)
    return value


def test_a_study_through_containers_ends_in_a_model_that_nnunet_predicts_with(
    federation: Compose, study: dict[str, Any], tmp_path: Path
) -> None:
    found = federation.execute("orchestrator", "sh", "-c", "ls /state/studies/*/*.zip").stdout.split()
    assert len(found) == 1
    federation("cp", f"orchestrator:{found[0]}", tmp_path / "model.zip")
    assert any(name.endswith("checkpoint_final.pth") for name in zipfile.ZipFile(tmp_path / "model.zip").namelist())
    models = federation.execute("hospital_a", "sh", "-c", "ls -d /state/worker/*/nnUNet_results/*/*").stdout.split()
    assert len(models) == 1
    trainer, plans, configuration = Path(models[0]).name.split("__")
    predict = (
        f"export TMPDIR=/state/cache OMP_NUM_THREADS=1 nnUNet_results={Path(models[0]).parents[1]}; "
        f"nnUNetv2_predict -i /data/Dataset301_Phantom/imagesTs -o /state/cache/predicted -d {study['dataset']} "
        f"-tr {trainer} -p {plans} -c {configuration} -f all -device cpu --disable_tta -npp 1 -nps 1 || exit 1; "
        "ls /state/cache/predicted"
    )
    shown = federation.execute("hospital_a", "sh", "-c", predict)
    cases = federation.execute("hospital_a", "sh", "-c", "ls /data/Dataset301_Phantom/imagesTs").stdout.split()
    assert {name.replace("_0000", "") for name in cases} <= set(shown.stdout.split())


def test_every_line_of_a_container_is_an_event_with_time_level_and_process(
    federation: Compose, study: dict[str, Any]
) -> None:
    for service, processes in (
        ("hospital_a", {"supervisor", "supernode", "link", "worker"}),
        ("orchestrator", {"supervisor", "superlink", "coordinator"}),
    ):
        events = federation.logs(service)
        assert processes <= {event["process"] for event in events}
        assert all({"time", "level", "process", "logger", "message"} <= set(event) for event in events)
        assert not [event for event in events if event["level"] == "DEBUG"]


@pytest.mark.parametrize("service", ["hospital_a", "orchestrator"])
def test_a_container_is_hardened(federation: Compose, service: str) -> None:
    check_hardened(federation, service)


def check_hardened(compose: Compose, service: str) -> None:
    """Ordinary user, no capability, no new privileges, read-only root, none of the tools an intruder likes."""
    status = compose.execute(service, "cat", "/proc/self/status").stdout
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["Uid"].split() == [str(UID)] * 4
    assert {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert fields["NoNewPrivs"] == "1"
    assert (
        docker("inspect", "--format", "{{.HostConfig.ReadonlyRootfs}}", compose.container(service)).stdout == "true\n"
    )
    assert compose.execute(service, "sh", "-c", ": >/tmp/new", check=False).returncode != 0
    for program in ("gcc", "cc", "pip", "curl", "strip"):
        assert compose.execute(service, "sh", "-c", f"command -v {program}", check=False).returncode != 0, program


def test_the_hardened_hospital_trains_with_a_worker_that_has_no_network_and_a_link_that_has_no_data(
    federation: Compose, study: dict[str, Any], tmp_path: Path
) -> None:
    """hospital_c moves into compose/hospital.yaml; a second study runs while processes die and a network goes away."""
    federation("stop", "hospital_c")
    config, data = copied(tmp_path, "config_c"), copied(tmp_path, "data_c")
    overlay = tmp_path / "overlay.yaml"
    network = {"outbound": {"external": True, "name": f"{PROJECT}_hospital_c"}}
    small = {
        "environment": {
            "FEDNNUNET_PREPROCESSING_PROCESSES": "1",
            "FEDNNUNET_FINGERPRINT_PROCESSES": "1",
            "FEDNNUNET_AUGMENTATION_PROCESSES": "0",
            "FEDNNUNET_THREADS": "1",
        }
    }
    overlay.write_text(yaml.safe_dump({"networks": network, "services": {"worker": small}}))
    hospital = Compose(
        f"{PROJECT}-hospital",
        [REPOSITORY / "compose" / "hospital.yaml", overlay],
        {"CONFIG": str(config), "DATA": str(data / "Dataset303_Phantom"), "LOG_FORMAT": "json"},
    )
    hospital("down", "--volumes", check=False)
    try:
        hospital("up", "--wait")
        for service in ("link", "worker"):
            check_hardened(hospital, service)
        devices = hospital.execute("worker", "cat", "/proc/net/dev").stdout
        assert [line.split(":")[0].strip() for line in devices.splitlines()[2:]] == ["lo"]
        assert hospital.execute("worker", "ls", "/config").stdout.split() == ["site.toml"]
        assert hospital.execute("link", "ls", "-A", "/data").stdout == ""
        assert hospital.execute("worker", "ls", "/data").stdout.split()
        assert hospital.execute("worker", "sh", "-c", ": >/data/new", check=False).returncode != 0

        second = {**study, "name": "second", "rounds": 6}
        submit = (
            f"cat >/state/second.yaml <<'E'\n{yaml.safe_dump(second)}E\n"
            "fednnunet study submit /state/second.yaml --state /state --no-wait"
        )
        federation.execute("orchestrator", "sh", "-c", submit)
        wait_for(lambda: rounds_done(federation, "second") >= 1, 300, "the first round")
        for compose, service, process in (
            (hospital, "worker", "worker"),
            (hospital, "link", "link"),
            (federation, "orchestrator", "coordinator"),
        ):
            kill(compose, service, process)
        federation("stop", "--timeout", 10, "hospital_a")
        assert exit_code(federation.container("hospital_a")) == 0, "SIGTERM did not end it in ten seconds"
        federation("start", "hospital_a")
        assert rounds_done(federation, "second") < 6
        docker("network", "disconnect", f"{PROJECT}_hospital_b", federation.container("hospital_b"))
        time.sleep(12)
        assert rounds_done(federation, "second") < 6, "the study did not need hospital_b"
        docker("network", "connect", f"{PROJECT}_hospital_b", federation.container("hospital_b"))
        done = federation.execute(
            "orchestrator", "fednnunet", "study", "submit", "/state/second.yaml", "--state", "/state"
        )
        assert "Dice of the global model" in done.stdout, done.stdout
        assert rounds_done(federation, "second") == 6
        restarts = {line.split("\t")[0]: line.split("\t")[2] for line in healthy(hospital, "worker")}
        assert restarts == {"worker": "1 restarts"}
    finally:
        hospital("stop", "--timeout", 10, check=False)
        ends = {service: exit_code(hospital.container(service)) for service in ("link", "worker")}
        hospital("down", "--volumes", check=False)
    assert ends == {"link": 0, "worker": 0}, "SIGTERM did not end a container in ten seconds"


def copied(folder: Path, volume: str) -> Path:
    """A volume of the federation as a folder of the host, owned by the images' user."""
    target = folder / volume
    target.mkdir()
    docker(
        *(
            "run",
            "--rm",
            "--network",
            "none",
            "--user",
            "0:0",
            "--entrypoint",
            "cp",
            "-v",
            f"{PROJECT}_{volume}:/from:ro",
        ),
        *("-v", f"{target}:/to", image("appliance"), "-a", "/from/.", "/to/"),
    )
    for path in (folder, *folder.parents):
        if path == path.parent or path.stat().st_uid != os.getuid():
            break
        path.chmod(path.stat().st_mode | 0o055)
    return target


def rounds_done(federation: Compose, name: str) -> int:
    """Rounds that a study's journal has recorded."""
    look = f"grep -lE '.name.: ?.{name}.' -r /state/studies --include=study.json | head -1"
    found = federation.execute("orchestrator", "sh", "-c", look, check=False).stdout.strip()
    if not found:
        return 0
    journal = federation.execute("orchestrator", "cat", f"{Path(found).parent}/journal.jsonl", check=False).stdout
    return sum('"closed"' in line for line in journal.splitlines())


def kill(compose: Compose, service: str, process: str) -> None:
    """kill -9 to one process in a container, found by the supervisor's own word."""
    pids = {line.split("\t")[0]: line.split("\t")[1] for line in healthy(compose, service)}
    compose.execute(service, "sh", "-c", f"kill -9 {pids[process]}")


def healthy(compose: Compose, service: str) -> list[str]:
    program = "orchestrator" if service == "orchestrator" else "appliance"
    lines: list[str] = []

    def asked() -> bool:
        done = compose.execute(service, program, "health", check=False)
        lines[:] = done.stdout.splitlines()
        return done.returncode == 0

    wait_for(asked, 60, f"{service} is healthy")
    return lines


def exit_code(container: str) -> int:
    return int(docker("inspect", "--format", "{{.State.ExitCode}}", container).stdout)


# ---- one container: what is told at start ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def house(federation: Compose, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`config`, `data` and `state` of a hospital on the host."""
    root = tmp_path_factory.mktemp("house")
    copied(root, "config_a").rename(root / "config")
    copied(root, "data_a").rename(root / "data")
    (root / "state").mkdir()
    os.chown(root / "state", UID, UID)
    return root


def start(house: Path, *options: str, config: bool = True, data: str = ":ro", state: str = "", shm: str = "8g") -> Any:
    """`docker run` as the documentation has it, with one thing wrong; it must end by itself."""
    mounts = [f"{house / 'state'}:/state{state}"]
    if config:
        mounts.append(f"{house / 'config'}:/config:ro")
    if data != "absent":
        mounts.append(f"{house / 'data'}:/data{data}")
    volumes = [part for mount in mounts for part in ("-v", mount)]
    return docker(
        *("run", "--rm", "--network", "none", *volumes, "--shm-size", shm, *HARDENED, *options),
        *(image("appliance"), "start", "--log-format", "json"),
        check=False,
    )


@pytest.mark.parametrize(
    ("wrong", "numbers"),
    [
        ({"config": False}, [131]),
        ({"data": "absent"}, [201]),
        ({"data": ""}, [716]),
        ({"state": ":ro"}, [702]),
        ({"shm": "64m"}, [712]),
        ({"data": "", "shm": "64m"}, [716, 712]),
    ],
    ids=["no config", "no data", "data writable", "state read-only", "small shared memory", "two at once"],
)
def test_a_wrong_mount_is_told_at_start_by_number(house: Path, wrong: dict[str, Any], numbers: list[int]) -> None:
    done = start(house, **wrong)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [event["code"] for event in told] == numbers, done
    assert all(event["advice"] for event in told)
    assert done.returncode == 10 + numbers[-1] // 100
    assert not list((house / "state").iterdir()), "something ran before the mounts were looked at"


@pytest.mark.parametrize(("user", "number"), [("0:0", 720), ("1234:1234", 702)])
def test_a_wrong_user_is_told_at_start_by_number(house: Path, user: str, number: int) -> None:
    done = start(house, "--user", user)
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert number in [event["code"] for event in told], done


def test_a_configuration_that_the_user_may_not_see_is_told_as_such(house: Path) -> None:
    mode = (house / "config").stat().st_mode
    (house / "config").chmod(0o700)
    try:
        done = start(house, "--user", "1234:1234")
    finally:
        (house / "config").chmod(mode)
    assert [json.loads(line)["code"] for line in done.stderr.splitlines()] == [721], done


def test_the_labels_say_what_an_image_is() -> None:
    for role in ("appliance", "orchestrator"):
        config = json.loads(docker("image", "inspect", image(role)).stdout)[0]["Config"]
        labels = config["Labels"]
        assert labels["org.opencontainers.image.title"] == f"fednnunet-{role}"
        assert labels["org.opencontainers.image.version"] == version()
        assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
        assert {"revision", "source", "created"} <= {name.rpartition(".")[2] for name in labels}
        assert config["User"] == f"{UID}:{UID}"
        assert config["Healthcheck"]["Test"] == ["CMD", role, "health"]
        assert config["Entrypoint"] == ["tini", "--", role]
        assert ("NVIDIA_DRIVER_CAPABILITIES=compute,utility" in config["Env"]) == (role == "appliance")


@pytest.mark.parametrize(("role", "most"), [("appliance", 1.7e9), ("orchestrator", 1.5e9)])
def test_the_images_stay_small(role: str, most: float) -> None:
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image(role)).stdout) <= most


@pytest.mark.parametrize(
    "files",
    [["federation"], ["hospital"], ["hospital", "hospital.gpu"], ["hospital", "hospital.gpu", "hospital.production"]],
    ids="+".join,
)
def test_compose_files_are_valid(files: list[str]) -> None:
    paths = [REPOSITORY / "compose" / f"{name}.yaml" for name in files]
    shown = Compose("check", paths, {"CONFIG": "/srv/config", "DATA": "/srv/data"})("config").stdout
    services = yaml.safe_load(shown)["services"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
    if "hospital" in files:
        assert services["worker"]["network_mode"] == "none"
        assert "/data" not in [mount["target"] for mount in services["link"]["volumes"]]
        assert all(mount.get("read_only") for mount in services["worker"]["volumes"] if mount["type"] == "bind")
    if "hospital.gpu" in files:
        (device,) = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"][0] == "gpu"
