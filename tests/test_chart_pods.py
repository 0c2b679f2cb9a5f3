"""The orchestrator's chart as pods that run: its demo from nothing to a model, helm test, an upgrade in mid-study.

Simulated: the kubelet (tests/kubelet.py). Needs a Docker engine, the images of `make image`, and helm.
"""

from __future__ import annotations

import base64
import io
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import CHARTS, render
from commands import APPLIANCE, command, good, wait_for
from kubelet import Node

from federation.audit import read
from orchestrator.enrollment.authority import create

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]
RELEASE = "fed"
ORCHESTRATOR = CHARTS / "orchestrator"


def helm_test(node: Node, documents: list[dict[str, Any]]) -> tuple[int, str]:
    """`helm test`."""
    (pod,) = [each for each in documents if each["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    return node.run("test", pod["spec"], pod["metadata"]["labels"])


def journal(node: Node) -> list[dict[str, Any]]:
    found = list(node.claim("shared").glob("studies/*/journal.jsonl"))
    return [line for path in found for line in read(path)]


def events(node: Node, name: str) -> list[dict[str, Any]]:
    return [line for line in journal(node) if line["event"] == name]


def test_the_demo_runs_a_study_through_an_upgrade_to_a_model(tmp_path: Path) -> None:
    values = {"demo.enabled": True, "demo.rounds": 12, "state.existingClaim": "shared", "metrics.enabled": True}
    documents = render(ORCHESTRATOR, values, release=RELEASE)
    with Node(tmp_path, "fednnunet-kubelet") as node:
        node.apply(documents)
        for pod in list(node.pods):
            node.ready(pod)
        wait_for(lambda: len(events(node, "weights")) >= 2, 400, "a round")
        status, said = helm_test(node, documents)
        assert status == 0, said
        assert "left out\tthe empty round" in said

        # an upgrade that changes the orchestrator's pod and no other
        before = {name: pod.thread for name, pod in node.pods.items()}
        upgraded = render(ORCHESTRATOR, {**values, "poll": 0.25, "podLabels.changed": "yes"}, release=RELEASE)
        node.apply(keep_secrets(documents, upgraded))
        assert [name for name, pod in node.pods.items() if pod.thread is not before[name]] == [RELEASE]
        assert events(node, "interrupted"), "SIGTERM reached the coordinator, and the journal says so"
        done = len(events(node, "weights"))
        assert 2 <= done < 13, "the upgrade came in the middle of the study"
        node.ready(RELEASE)
        wait_for(lambda: events(node, "done") or events(node, "failed"), 600, "the end")
        assert not events(node, "failed")
        assert [line["round"] for line in events(node, "weights")] == list(range(13)), "no round was done twice"
        assert list(node.claim("shared").glob("studies/*/*.zip"))

        for _ in range(10):  # the report is written after the journal's last line, and only then the run is over
            status, said = helm_test(node, upgraded)
            assert status == 0, said
            if "left out" not in said:
                break
        assert "the coordinator did an empty round" in said
        assert "3 sites are registered" in said
        scraped = node.execute(
            RELEASE,
            "coordinator",
            *(
                "python3",
                "-c",
                "import urllib.request as r; print(r.urlopen('http://127.0.0.1:9464/metrics').read().decode())",
            ),
        ).stdout
        assert 'phase="done"' in scraped
        predict_with_the_model(node)
        for site in ("a", "b", "c"):
            assert list(node.claim("shared").glob(f"demo-site-{site}/state/worker/*/nnUNet_results/*/*/fold_all"))


def predict_with_the_model(node: Node) -> None:
    """helm/inference with the study's zip, over the test images of a hospital."""
    (archive,) = node.claim("shared").glob("studies/*/*.zip")
    values = {
        "input": {"claim": "shared", "subPath": "demo-site-a/data/Dataset301_Phantom/imagesTs"},
        "output": {"claim": "predictions", "subPath": "phantom"},
        "model": {"claim": "shared", "path": str(archive.relative_to(node.claim("shared")))},
        "shards": 2,
        "device": "cpu",
        "options": {"threads": 2, "disableTta": True},
    }
    documents = render(CHARTS / "inference", values, release="phantom")
    node.apply(documents)
    (job,) = (each for each in documents if each["kind"] == "Job")
    status, said = helm_test(node, documents)
    assert status != 0, "nothing is predicted yet"
    for status, said in node.job(job):
        assert status == 0, said
    status, said = helm_test(node, documents)
    assert status == 0, said
    assert "4 of 4 cases have a prediction" in said
    images = node.claim("shared") / "demo-site-a" / "data" / "Dataset301_Phantom" / "imagesTs"
    expected = {path.name.replace("_0000", "") for path in images.glob("*.nii.gz")}
    assert {path.name for path in node.claim("predictions").glob("phantom/*.nii.gz")} == expected


def keep_secrets(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `lookup` does in a cluster: a Secret that is there keeps its random name."""
    there = {each["metadata"]["name"]: each for each in before if each["kind"] == "Secret"}
    return [there.get(each["metadata"]["name"], each) if each["kind"] == "Secret" else each for each in after]


def test_with_secrets_of_federation_init_the_orchestrator_tests_itself_and_a_hospitals_pod_comes_online(
    tmp_path: Path, tiny_phantom_sites: dict[str, Path]
) -> None:
    authority = create(tmp_path / "authority", ["fleet.example.org", RELEASE, "127.0.0.1"])
    documents = render(ORCHESTRATOR, {"studies.liver": "name: liver\n"}, release=RELEASE)
    with Node(tmp_path, "fednnunet-kubelet") as node:

        def coordinator(*command: object) -> str:
            return node.execute(RELEASE, "coordinator", *command).stdout

        for secret in yaml.safe_load_all(authority.secrets_yaml()):
            if secret:
                data = {name: base64.b64decode(value) for name, value in secret["data"].items()}
                node.secret(secret["metadata"]["name"], data)
        node.apply(documents)
        node.ready(RELEASE)
        status, said = helm_test(node, documents)
        assert status == 0, said
        assert "the coordinator did an empty round" in said
        assert coordinator("cat", "/studies/liver.yaml") == "name: liver\n"
        assert not list(node.claim(f"{RELEASE}-state").glob("authority/*")), "no key lies on the volume"
        assert "days left" in coordinator("fednnunet", "federation", "status", "/state")

        where = ("--state", "/state", "--orchestrator", f"{RELEASE}:8443", "--output", "-")
        (tmp_path / "north.json").write_text(coordinator("fednnunet", "site", "invite", "north", *where))
        config = tmp_path / "config"
        folders = ("--config", config, "--data", "/data", "--state", "/state", "--device", "cpu")
        good(command(APPLIANCE, "enroll", tmp_path / "north.json", *folders, "--offline", cwd=tmp_path))
        node.secret("fednnunet-site", {path.name: path.read_bytes() for path in config.iterdir()})
        shutil.copytree(tiny_phantom_sites["hospital_a"], node.claim("data"), dirs_exist_ok=True)
        values = {
            "data.claim": "data",
            "device": "cpu",
            "worker": {"augmentationProcesses": 0, "threads": 1},
            "networkPolicy.orchestrator": [{"ipBlock": {"cidr": "192.0.2.1/32"}}],
        }
        hospital = render(CHARTS / "hospital", values, release="north")
        node.apply(hospital)
        request = next(config.glob("*request*.json"))
        shutil.copyfile(request, node.claim(f"{RELEASE}-state") / request.name)
        coordinator("fednnunet", "site", "approve", f"/state/{request.name}", "--state", "/state", "--yes")
        node.ready("north")
        wait_for(lambda: "\tonline\t" in coordinator("fednnunet", "site", "list", "--state", "/state"), 300, "online")
        saved = coordinator("orchestrator", "backup", "--state", "/state", "--output", "-").encode()
        with tarfile.open(fileobj=io.BytesIO(saved)) as archive:
            assert {"state/authority/ca.crt", "state/authority/control.token"} <= set(archive.getnames())
            assert any(name.startswith("state/sites/north") for name in archive.getnames())
        worker, link = (node.execute("north", role, "ls", "/config", "/state").stdout for role in ("worker", "link"))
        assert "site.key" in link
        assert "site.key" not in worker
        assert node.execute("north", "link", "ls", "/data", check=False).stdout == ""
        checked = node.execute(
            "north", "link", "appliance", "doctor", "--only", "network", "--only", "user", check=False
        )
        assert "FNU-714" not in checked.stdout, "a Secret's mode is no exposed key"
