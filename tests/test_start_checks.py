"""Wrong mounts and settings are told by number before anything runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from commands import APPLIANCE, command, refused

from appliance import settings, start_checks
from appliance.doctor.context import Machine
from federation.errors import Code, FednnunetError

BARE = {"FEDNNUNET_NAME": "hospital_a", "FEDNNUNET_ORCHESTRATOR": "host:8443"}


def numbers(tmp_path: Path, role: start_checks.Role, **changes: str) -> list[Code]:
    environment = {**BARE, "FEDNNUNET_STATE": str(tmp_path / "state"), "FEDNNUNET_DATA": str(tmp_path / "data")}
    loaded = settings.load(None, environment | changes)
    machine = Machine(shared_memory=tmp_path / "no-shm")
    return [error.code for error in start_checks.faults(loaded, role, machine)]


def test_no_site_toml(tmp_path: Path) -> None:
    refused(command(APPLIANCE, "start", "--config", tmp_path / "site.toml", cwd=tmp_path), 131, "site.toml")


def test_a_folder_given_as_config_is_its_site_toml(tmp_path: Path) -> None:
    for arguments in (["start"], ["studies"], ["doctor", "--only", "mounts"]):
        done = command(APPLIANCE, *arguments, "--config", tmp_path, cwd=tmp_path)
        assert "Give the file" in done.err, done
        refused(done, 112, str(tmp_path), "site.toml")
    file = tmp_path / "site.toml"
    file.write_text('name = "hospital_a"\norchestrator = "host:8443"\nstate = "state"\n')
    found = settings.resolve(tmp_path, {})
    assert found.settings.state == tmp_path / "state"
    assert found.sources["name"] == str(file)
    told = command(
        APPLIANCE, *("doctor", "--only", "mounts", "--json", "--private", "--config"), tmp_path, cwd=tmp_path
    )
    assert str(file) in told.out, told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("foo = 1", "foo: this key is not known"),
        ('orchestrator = "host"', "orchestrator: 'host' is not a `HOST:PORT`"),
        ('name = "St. Elsewhere"', "name: 'St. Elsewhere' is not a name in small letters"),
        ('device = "tpu"', "device: 'tpu' is not a device: cuda, cuda:N, mps or cpu"),
        ("threads = 1.5", "threads: must be a whole number"),
        ('threads = "two"', "threads: must be a whole number"),
        ("compile = 3", "compile: must be true or false"),
        ("data = 3", "data: must be a path"),
        ("poll = 99", "poll: must be at most 10, not 99"),
        ('log_format = "xml"', "log_format: must be 'rich' or 'json'"),
        ("preprocessing_processes = 0", "preprocessing_processes: must be at least 1, not 0"),
    ],
)
def test_a_fault_in_site_toml_is_said_in_plain_words(tmp_path: Path, line: str, said: str) -> None:
    values = {"name": '"hospital_a"', "orchestrator": '"host:8443"'}
    key, _, value = line.partition(" = ")
    file = tmp_path / "site.toml"
    file.write_text("".join(f"{name} = {text}\n" for name, text in {**values, key: value}.items()))
    with pytest.raises(FednnunetError) as caught:
        settings.load(file, {})
    assert caught.value.found.startswith(f"{file}: {said}")
    for jargon in ("Input", "String", "pattern", "Value error"):
        assert jargon not in caught.value.found


def test_what_site_toml_lacks_is_named() -> None:
    with pytest.raises(FednnunetError, match="name: this key is needed; orchestrator: this key is needed"):
        settings.load(None, {})


def test_data_missing_or_empty(tmp_path: Path) -> None:
    assert numbers(tmp_path, "worker") == [Code.DATASET_JSON_MISSING]
    (tmp_path / "data").mkdir()
    assert numbers(tmp_path, "worker") == [Code.DATASET_JSON_MISSING]


def test_strict_mounts_refuse_what_a_plain_machine_may_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    assert numbers(tmp_path, "worker") == []
    strict = numbers(tmp_path, "worker", FEDNNUNET_STRICT_MOUNTS="true")
    assert strict == [Code.RUNS_AS_ROOT, Code.DATA_WRITABLE, Code.SHARED_MEMORY_SMALL]


def test_the_link_is_not_asked_for_data(tmp_path: Path) -> None:
    found = numbers(tmp_path, "link")
    assert Code.DATASET_JSON_MISSING not in found
    assert Code.STATE_NOT_READY in found


def test_every_setting_says_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text('name = "hospital_a"\norchestrator = "host:8443"\nthreads = 3\n')
    found = settings.resolve(file, {"FEDNNUNET_THREADS": "", "FEDNNUNET_DEVICE": "cpu"})
    assert found.settings.threads is None
    assert found.sources["threads"] == "FEDNNUNET_THREADS"
    assert found.sources["device"] == "FEDNNUNET_DEVICE"
    assert found.sources["name"] == str(file)
    assert found.sources["poll"] == "default"


def test_torch_compile_is_off_where_no_c_compiler_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = settings.load(None, {}, name="hospital_a", orchestrator="example.org:8443", device="cuda")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not cuda.compiles
    compiler = tmp_path / "gcc"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert cuda.compiles
    assert not settings.load(None, {}, name="hospital_a", orchestrator="example.org:8443", device="cpu").compiles
