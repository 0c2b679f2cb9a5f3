"""`fednnunet predict`: the chart's Job in a cluster, watched and read.

Simulated: the API server (a few paths of it, over real HTTP, with a real kubeconfig); what it is sent and what it
answers has Kubernetes' form. Real: helm, the chart, the kubernetes client, the commands.
"""

from __future__ import annotations

import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from charts import CHARTS, TOOLS, render
from commands import Done, begin, end, fednnunet, good, refused, wait_for

from orchestrator.admin import predictions

pytestmark = pytest.mark.charts
CLAIMS = ("--input", "images:liver/imagesTs", "--output", "predictions", "--model", "models:liver.zip")


class ApiServer(http.server.ThreadingHTTPServer):
    """Simulated: the API server of a cluster, for one namespace."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, Any]] = {}
        self.pods: list[dict[str, Any]] = []
        self.moments: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
        self.logs: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.forbidden = False

    def job(self) -> dict[str, Any]:
        (found,) = (each for path, each in list(self.objects.items()) if "/jobs/" in path)
        return found

    def goes_on(self) -> None:
        """To the next moment of the Job and its pods, if there is one more; whoever watches asks for the Job first."""
        if self.moments:
            self.job()["status"], self.pods = self.moments.pop(0)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ApiServer

    def answer(self, status: int, value: Any) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, str) else "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        return value

    def do_POST(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append(("POST", path))
        document = self.body()
        place = f"{path}/{document['metadata']['name']}"
        if self.server.forbidden:
            message = 'jobs.batch is forbidden: User "reader" cannot create resource "jobs"'
            return self.answer(403, {"kind": "Status", "message": message, "reason": "Forbidden"})
        if place in self.server.objects:
            return self.answer(409, {"kind": "Status", "message": "already exists", "reason": "AlreadyExists"})
        document["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z"
        self.server.objects[place] = document
        return self.answer(201, document)

    def do_PATCH(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append(("PATCH", path))
        self.body()
        self.answer(200, self.server.objects[path])

    def do_GET(self) -> None:
        parts = urllib.parse.urlsplit(self.path)
        wanted = dict(urllib.parse.parse_qsl(parts.query)).get("labelSelector", "")
        labels = dict(each.split("=") for each in wanted.split(",") if each)
        if parts.path.endswith("/log"):
            return self.answer(200, self.server.logs[parts.path.split("/")[-2]])
        if parts.path.endswith("/pods"):
            items = [each for each in self.server.pods if labels.items() <= each["metadata"]["labels"].items()]
            return self.answer(200, {"items": items})
        if parts.path.endswith("/jobs"):
            jobs = [each for path, each in self.server.objects.items() if "/jobs/" in path]
            items = [each for each in jobs if labels.items() <= each["metadata"]["labels"].items()]
            return self.answer(200, {"items": items})
        if parts.path.endswith("/status"):
            self.server.goes_on()
        return self.answer(200, self.server.objects[parts.path.removesuffix("/status")])

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        kubeconfig = {
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "research"}}],
            "current-context": "x",
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        (tmp_path / "helm").symlink_to(TOOLS / "helm4")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        yield server
        server.shutdown()


def predict(tmp_path: Path, *arguments: object) -> Done:
    return fednnunet("predict", *arguments, cwd=tmp_path)


def pod(job: str, index: int, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": f"{job}-{index}-abcde",
            "labels": {"batch.kubernetes.io/job-name": job, "batch.kubernetes.io/job-completion-index": str(index)},
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"containers": []},
        "status": status,
    }


def test_a_dry_run_prints_what_the_chart_renders_and_asks_no_cluster(cluster: ApiServer, tmp_path: Path) -> None:
    options = ("--shards", "3", "--device", "cpu", "--set", "options.disableTta=true", "-n", "federation")
    printed = list(yaml.safe_load_all(good(predict(tmp_path, "submit", "liver", *CLAIMS, *options, "--dry-run")).out))
    values = {
        "input": {"claim": "images", "subPath": "liver/imagesTs"},
        "output": {"claim": "predictions", "subPath": ""},
        "model": {"claim": "models", "path": "liver.zip"},
        "shards": 3,
        "device": "cpu",
        "options.disableTta": True,
    }
    expected = [each for each in render(CHARTS / "inference", values, release="liver") if each["kind"] != "Pod"]
    for document in expected:
        document["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "fednnunet"
    assert printed == expected
    assert cluster.asked == []
    assert predictions.chart() == CHARTS / "inference"


def test_a_prediction_is_submitted_once_watched_to_its_end_and_its_logs_are_read(
    cluster: ApiServer, tmp_path: Path
) -> None:
    (tmp_path / "values.yaml").write_text("resources: { limits: { cpu: 4 } }\n")
    more = ("--shards", "2", "--values", "values.yaml")
    said = good(predict(tmp_path, "submit", "liver", *CLAIMS, *more)).out
    job = cluster.job()
    name = job["metadata"]["name"]
    assert said == f"submitted: Job {name} in namespace research\n"
    kinds = [path.split("/")[-1] for _, path in cluster.asked]
    assert sorted(kinds) == ["jobs", "networkpolicies", "serviceaccounts"]
    assert kinds[-1] == "jobs"
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": "4", "memory": "32Gi", "nvidia.com/gpu": "1"}
    assert "there already" in good(predict(tmp_path, "submit", "liver", *CLAIMS, *more)).out
    assert [each for each in cluster.asked if each[0] == "PATCH" and "/jobs/" in each[1]] == []

    waiting = {"reason": "ImagePullBackOff", "message": "no such image"}
    stuck = {"name": "predict", "state": {"waiting": waiting}, "image": "i", "imageID": "", "ready": False}
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no nvidia.com/gpu"}
    pods = [
        pod(name, 1, conditions=[unscheduled]),
        pod(name, 0, containerStatuses=[{**stuck, "restartCount": 0}]),
    ]
    one_done = {"active": 1, "succeeded": 1, "failed": 1, "completedIndexes": "0"}
    done = {"succeeded": 2, "completedIndexes": "0,1", "conditions": [{"type": "Complete", "status": "True"}]}
    cluster.moments = [({"active": 2}, pods)] * 2 + [(one_done, [])] * 2 + [(done, [])]
    watching = good(predict(tmp_path, "watch", "liver"))
    assert watching.out.splitlines() == [
        "0 of 2 shards done, 2 at work; ImagePullBackOff: no such image; Unschedulable: no nvidia.com/gpu",
        "1 of 2 shards done, 1 at work, 1 pods failed",
        "2 of 2 shards done, 0 at work, complete",
    ]

    cluster.pods = [pod(name, index) for index in (1, 0)]
    cluster.logs = {f"{name}-0-abcde": "one\ntwo\n", f"{name}-1-abcde": "three"}
    assert good(predict(tmp_path, "logs", "liver")).out == "[0] one\n[0] two\n[1] three\n"
    assert good(predict(tmp_path, "logs", "liver", "--shard", 1, "--follow")).out == "[1] three\n"
    refused(predict(tmp_path, "logs", "liver", "--shard", 7), 162, "shard 7")
    refused(predict(tmp_path, "logs", "liver", "--follow"), 112, "--shard")


def test_shards_that_were_given_up_end_the_watch_with_a_number(cluster: ApiServer, tmp_path: Path) -> None:
    waiting = begin("orchestrator.admin.cli", "predict", "submit", "liver", *CLAIMS, "--wait", cwd=tmp_path)
    wait_for(lambda: any("/jobs/" in path for path in list(cluster.objects)), 180, "the Job")
    condition = {"type": "Failed", "status": "True", "reason": "FailedIndexes", "message": "Job has failed indexes"}
    cluster.job()["status"] = {"failed": 3, "failedIndexes": "0", "conditions": [condition]}
    refused(end(waiting), 411, "shards 0 were given up")


def test_what_the_cluster_or_the_chart_refuses_is_said_with_a_number(
    cluster: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(predict(tmp_path, "watch", "liver"), 162, "liver", "research")
    refused(predict(tmp_path, "submit", "liver", "--input", "images"), 161, "output.claim")
    refused(predict(tmp_path, "submit", "liver", *CLAIMS, "--set", "shard=3"), 161, "shard")
    refused(predict(tmp_path, "submit", "Liver_2", *CLAIMS), 161, "Liver_2")
    cluster.forbidden = True
    refused(predict(tmp_path, "submit", "liver", *CLAIMS), 160, "forbidden")
    refused(predict(tmp_path, "watch", "liver", "--context", "nowhere"), 159, "nowhere")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    refused(predict(tmp_path, "watch", "liver"), 159)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    refused(predict(tmp_path, "submit", "liver", *CLAIMS), 704, "helm")
