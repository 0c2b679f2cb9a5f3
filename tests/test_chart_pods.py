"""The orchestrator's chart as pods that run: its demo from nothing to a model, helm test, an upgrade in mid-study.

Simulated: the kubelet (tests/kubelet.py). Needs a Docker engine, the images of `make image`, and helm.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from charts import CHARTS, render
from commands import wait_for
from kubelet import Node

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1500)]
RELEASE = "fed"
ORCHESTRATOR = CHARTS / "orchestrator"


def selftest(node: Node, documents: list[dict[str, Any]]) -> tuple[int, str]:
    """`helm test`."""
    (pod,) = [each for each in documents if each["metadata"].get("annotations", {}).get("helm.sh/hook") == "test"]
    return node.run("selftest", pod["spec"], pod["metadata"]["labels"])


def journal(node: Node) -> list[dict[str, Any]]:
    found = list(node.claim("shared").glob("studies/*/journal.jsonl"))
    return [json.loads(line) for path in found for line in path.read_text().splitlines()]


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
        status, said = selftest(node, documents)
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

        status, said = selftest(node, upgraded)
        assert status == 0, said
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
        for site in ("a", "b", "c"):
            assert list(node.claim("shared").glob(f"demo-site-{site}/state/worker/*/nnUNet_results/*/*/fold_all"))


def keep_secrets(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `lookup` does in a cluster: a Secret that is there keeps its random name."""
    there = {each["metadata"]["name"]: each for each in before if each["kind"] == "Secret"}
    return [there.get(each["metadata"]["name"], each) if each["kind"] == "Secret" else each for each in after]


def test_with_secrets_of_federation_init_the_orchestrator_gets_ready_and_tests_itself(tmp_path: Path) -> None:
    from orchestrator.enrollment.authority import create

    authority = create(tmp_path / "authority", ["fleet.example.org", "127.0.0.1"])
    documents = render(ORCHESTRATOR, {"studies.liver": "name: liver\n"}, release=RELEASE)
    with Node(tmp_path, "fednnunet-kubelet") as node:
        import base64

        import yaml

        for secret in yaml.safe_load_all(authority.secrets_yaml()):
            if secret:
                data = {name: base64.b64decode(value) for name, value in secret["data"].items()}
                node.secret(secret["metadata"]["name"], data)
        node.apply(documents)
        node.ready(RELEASE)
        status, said = selftest(node, documents)
        assert status == 0, said
        assert "the coordinator did an empty round" in said
        assert node.execute(RELEASE, "coordinator", "cat", "/studies/liver.yaml").stdout == "name: liver\n"
        invited = node.execute(
            RELEASE,
            "coordinator",
            *("fednnunet", "site", "invite", "north", "--state", "/state", "--output", "-"),
            *("--orchestrator", "fleet.example.org:443"),
        )
        assert json.loads(invited.stdout)["site"] == "north"
        assert not list(node.claim(f"{RELEASE}-state").glob("authority/*")), "no key lies on the volume"
        assert node.execute(RELEASE, "coordinator", "fednnunet", "federation", "status", "/state").returncode == 0
