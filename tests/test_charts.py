"""The charts, as helm 3 and helm 4 render them over a matrix of values: schemas, policies, references. No cluster.

A values file of the matrix is one of `chart_values/CHART/*.yaml`; `defaults.yaml` holds what must be given, and nothing
more. WRITE_GOLDEN=1 writes the golden renders anew.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import charts
import pytest
import yaml
from charts import CHARTS, HELMS, TOOLS, broken_rules, helm, pods, refused, render, text
from commands import REPOSITORY

pytestmark = pytest.mark.charts
WRITE = bool(os.environ.get("WRITE_GOLDEN"))
MATRIX = sorted((REPOSITORY / "tests" / "chart_values").glob("*/*.yaml"))
NAMES = sorted(path.parent.name for path in CHARTS.glob("*/Chart.yaml"))
NOT_BUILT_IN = {"TLSRoute", "HTTPRoute", "BackendTLSPolicy", "ServiceMonitor", "PrometheusRule"}
LABELS = ("name", "instance", "component", "version", "part-of", "managed-by")
every_case = pytest.mark.parametrize("values", MATRIX, ids=lambda path: f"{path.parent.name}-{path.stem}")
every_chart = pytest.mark.parametrize("name", NAMES)


def chart_of(values: Path) -> Path:
    return CHARTS / values.parent.name


def without_chance(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The demo's Secret holds a random name."""
    return [{**each, "data": None} if each["kind"] == "Secret" else each for each in documents]


def schema(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((CHARTS / name / "values.schema.json").read_text())
    return value


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every value that has a default, by dotted name."""
    for name, inner in node["properties"].items():
        if "default" in inner:
            yield f"{prefix}{name}", inner
        else:
            yield from leaves(inner, f"{prefix}{name}.")


def test_every_chart_has_a_matrix() -> None:
    assert NAMES == ["hospital", "inference", "orchestrator"]
    assert {path.parent.name for path in MATRIX if path.stem == "defaults"} == set(NAMES)
    examples = sorted(CHARTS.glob("*/examples/*.yaml"))
    assert len(examples) >= 3
    for example in examples:
        assert render(example.parents[1], [example])


@every_case
def test_both_helms_find_nothing_and_render_the_same(values: Path) -> None:
    rendered = []
    for program in HELMS:
        linted = helm("lint", "--strict", chart_of(values), "--values", values, program=program)
        assert linted.returncode == 0, linted.stdout + linted.stderr
        rendered.append(without_chance(render(chart_of(values), [values], program=program)))
    assert rendered[0] == rendered[1]


@every_case
@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_kubernetes_takes_every_object(values: Path, version: str, tmp_path: Path) -> None:
    known = [each for each in render(chart_of(values), [values]) if each["kind"] not in NOT_BUILT_IN]
    (tmp_path / "rendered.yaml").write_text(yaml.safe_dump_all(known))
    done = subprocess.run(
        [
            *(TOOLS / "kubernetes-validate" / "bin" / "kubernetes-validate", "--strict", "-k", version),
            tmp_path / "rendered.yaml",
        ],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("passed") == len(known)


@every_case
def test_every_pod_is_restricted_asks_for_resources_and_has_no_token(values: Path) -> None:
    documents = render(chart_of(values), [values])
    found = list(pods(documents))
    assert found
    for name, metadata, spec in found:
        assert broken_rules(metadata, spec) == [], name
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, f"{name}: a Service named fednnunet would set FEDNNUNET_PORT"
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsUser"] == 10001
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            where = f"{name} {container['name']}"
            assert container["securityContext"]["readOnlyRootFilesystem"], where
            for kind in ("requests", "limits"):
                assert {"cpu", "memory"} <= set(container["resources"][kind]), where
            assert not container["image"].endswith(":latest"), where
            assert ":" in container["image"], where
            assert all(port["protocol"] == "TCP" for port in container.get("ports", [])), where
        if name.startswith("Deployment/"):
            for container in spec["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name
    for document in documents:
        if document["kind"] == "Service":
            assert all(port["protocol"] == "TCP" for port in document["spec"]["ports"])
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False


@every_case
def test_names_labels_selectors_and_references_hold_with_the_longest_release(values: Path) -> None:
    release = "r" * 53
    documents = render(chart_of(values), [values], release=release)
    made = {(each["kind"], each["metadata"]["name"]) for each in documents}
    assert len(made) == len(documents)
    labelled = [(name, metadata["labels"], spec) for name, metadata, spec in pods(documents)]
    for document in documents:
        metadata = document["metadata"]
        assert len(metadata["name"]) <= 63, metadata["name"]
        for label in LABELS:
            assert 0 < len(metadata["labels"][f"app.kubernetes.io/{label}"]) <= 63
        spec = document.get("spec", {})
        if document["kind"] == "Job":
            assert len(f"{metadata['name']}-{spec['completions'] - 1}") <= 63, "an index's host name"
        selector = spec.get("selector") or {}
        selector = selector.get("matchLabels", selector)
        if document["kind"] == "ServiceMonitor":
            matched = [each for each in documents if selector.items() <= each["metadata"]["labels"].items()]
            assert [each["kind"] for each in matched] == ["Service"]
        elif document["kind"] == "Deployment":
            assert selector.items() <= spec["template"]["metadata"]["labels"].items()
            assert "app.kubernetes.io/version" not in spec["template"]["metadata"]["labels"], (
                "an upgrade would restart it"
            )
        elif selector:
            assert any(selector.items() <= labels.items() for _, labels, _ in labelled), metadata["name"]
    for name, _, spec in labelled:
        if ("ServiceAccount", spec["serviceAccountName"]) not in made:
            raise AssertionError(f"{name}: {spec['serviceAccountName']}")
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            volumes = {volume["name"] for volume in spec["volumes"]}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes, name
            for source in container.get("envFrom", []):
                assert ("ConfigMap", source["configMapRef"]["name"]) in made
        used = {mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]}
        if not name.startswith("Pod/"):  # the check of a batch mounts what the batch has
            assert {volume["name"] for volume in spec["volumes"]} == used | {
                mount["name"] for each in spec.get("initContainers", []) for mount in each["volumeMounts"]
            }


@every_case
def test_every_pod_is_under_a_network_policy_whose_arrows_are_told(values: Path) -> None:
    documents = render(chart_of(values), [values])
    policies = [each["spec"] for each in documents if each["kind"] == "NetworkPolicy"]
    given = yaml.safe_load(values.read_text()) or {}
    if not given.get("networkPolicy", {}).get("enabled", True):
        assert policies == []
        return
    for name, metadata, _ in pods(documents):
        assert any(each["podSelector"]["matchLabels"].items() <= metadata["labels"].items() for each in policies), name
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        for rule in [*policy["ingress"], *policy["egress"]]:
            assert all("protocol" in port for port in rule.get("ports", []))
    for template in chart_of(values).glob("templates/**/networkpolicy.yaml"):
        assert "-->" in template.read_text()


@every_case
def test_checkov_fails_nothing(values: Path, tmp_path: Path) -> None:
    (tmp_path / "rendered.yaml").write_text(text(chart_of(values), [values]))
    done = subprocess.run(
        [
            *(TOOLS / "checkov" / "bin" / "checkov", "--config-file", CHARTS / "checkov.yaml"),
            *("--file", tmp_path / "rendered.yaml", "--output", "json"),
        ],
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    said = json.loads(done.stdout)
    failed = {(each["check_id"], each["resource"]) for each in said["results"]["failed_checks"]}
    assert not failed
    assert said["summary"]["passed"] > 20


@every_chart
def test_the_defaults_render_as_they_did(name: str) -> None:
    values = REPOSITORY / "tests" / "chart_values" / name / "defaults.yaml"
    golden = REPOSITORY / "tests" / "chart_golden" / f"{name}.yaml"
    rendered = yaml.safe_dump_all(render(CHARTS / name, [values]), sort_keys=True)
    if WRITE:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(rendered)
    assert rendered == golden.read_text(), "WRITE_GOLDEN=1 writes it anew, when that is what you meant"


@every_chart
def test_the_schema_is_closed_and_says_what_each_value_is(name: str) -> None:
    def closed(where: str, node: Mapping[str, Any]) -> None:
        assert node.get("description"), where
        if node.get("type") == "object" and "properties" in node:
            assert node["additionalProperties"] is False, where
            if "default" not in node:
                for key, inner in node["properties"].items():
                    closed(f"{where}.{key}", inner)

    closed(name, schema(name))
    defaults = yaml.safe_load((CHARTS / name / "values.yaml").read_text())
    for dotted, node in leaves(schema(name)):
        value = defaults
        for part in dotted.split("."):
            value = value[part]
        assert value == node["default"], dotted
    assert [dotted for dotted, _ in leaves(schema(name))] == list(_defaults(defaults, schema(name)))
    comments = sum(line.lstrip().startswith("#") for line in (CHARTS / name / "values.yaml").read_text().splitlines())
    assert comments >= len(list(leaves(schema(name))))


def _defaults(values: Mapping[str, Any], node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        inner = node["properties"][key]
        if "default" in inner:
            yield f"{prefix}{key}"
        else:
            yield from _defaults(value, inner, f"{prefix}{key}.")


@every_chart
def test_unknown_and_wrong_values_are_refused_by_name(name: str) -> None:
    for program in HELMS:
        refused(CHARTS / name, {"replicas": 2}, "replicas", program=program)
        refused(CHARTS / name, {"image.tga": "x"}, "tga", program=program)
        refused(CHARTS / name, {"logFormat": "xml"}, "logFormat", program=program)
        refused(CHARTS / name, {"networkPolicy.enabled": "no"}, "networkPolicy", program=program)


@every_chart
def test_every_value_is_read_and_what_is_read_is_a_value(name: str) -> None:
    """A value is read where its name stands after `.Values`, or after the name of an object that was taken whole."""
    templates = "".join(path.read_text() for path in sorted((CHARTS / name / "templates").rglob("*.*")))
    known = dict(leaves(schema(name)))
    for dotted in known:
        last = dotted.split(".")[-1]
        parents = [".".join(dotted.split(".")[:depth]) for depth in range(1, dotted.count(".") + 1)]
        whole = f".Values.{dotted}" in templates
        taken = any(re.search(rf"\.Values\.{re.escape(parent)}(?![.\w])", templates) for parent in parents)
        inside = taken and (re.search(rf"(?<=[\s(\w])\.(\w+\.)?{last}(?!\w)", templates) or _ranged(parents, templates))
        assert whole or inside, f"{dotted} is read nowhere"
    every = {parent for dotted in known for parent in _parents(dotted)}
    for read in set(re.findall(r"\.Values\.([\w.]+)", templates)):
        assert read in every or any(read.startswith(f"{dotted}.") for dotted in known), f"{read} is no value"


def _ranged(parents: list[str], templates: str) -> bool:
    return any(f":= .Values.{parent} }}}}" in templates for parent in parents)


def _parents(dotted: str) -> Iterator[str]:
    parts = dotted.split(".")
    yield from (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))


@every_chart
def test_versions_images_readme_and_notes_are_in_step(name: str) -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHARTS / name / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == project["version"]
    assert chart["name"] == f"fednnunet-{name}"
    values = REPOSITORY / "tests" / "chart_values" / name / "defaults.yaml"
    kinds = ("cpu",) if name == "orchestrator" else ("cuda",)
    role = "orchestrator" if name == "orchestrator" else "appliance"
    for _, _, spec in pods(render(CHARTS / name, [values])):
        for container in spec["containers"]:
            assert container["image"] in {f"fednnunet/{role}:{project['version']}-{kind}" for kind in kinds}
    specification = importlib.util.spec_from_file_location("readme", CHARTS / "readme.py")
    assert specification is not None
    assert specification.loader is not None
    readme = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(readme)
    assert (CHARTS / name / "README.md").read_text() == readme.written(CHARTS / name), "python helm/readme.py"
    for program in HELMS:
        flags = () if program == "helm3" else ("--dry-run=client",)
        done = helm("install", "fed", CHARTS / name, "--values", values, *(flags or ("--dry-run",)), program=program)
        if "NOTES" not in done.stdout:  # both want an API server, even to look
            break
        assert "Checks:" in done.stdout


@pytest.mark.parametrize(
    ("broken", "rule"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"hostPID": True}, "hostPID"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v"),
        ({"securityContext": {"sysctls": [{"name": "kernel.msgmax"}]}}, "sysctl kernel.msgmax"),
        ({"securityContext": {"runAsUser": 0}}, "pod: runAsUser"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "pod: seccompProfile"),
        ({"securityContext": {}}, "c: seccompProfile"),
        ({"container": {"privileged": True}}, "c: privileged"),
        ({"container": {"capabilities": {"drop": ["NET_RAW"]}}}, "c: capabilities.drop"),
        ({"container": {"capabilities": {"drop": ["ALL"], "add": ["SYS_ADMIN"]}}}, "c: capabilities.add"),
        ({"container": {"allowPrivilegeEscalation": None}}, "c: allowPrivilegeEscalation"),
        ({"container": {"runAsNonRoot": False}}, "c: runAsNonRoot"),
        ({"container": {"procMount": "Unmasked"}}, "c: procMount"),
        ({"container": {"seLinuxOptions": {"type": "spc_t"}}}, "c: seLinuxOptions"),
        ({"container": {"appArmorProfile": {"type": "Unconfined"}}}, "c: appArmorProfile"),
        ({"container": {"windowsOptions": {"hostProcess": True}}}, "c: hostProcess"),
        ({"ports": [{"containerPort": 1, "hostPort": 1}]}, "c: hostPort"),
    ],
)
@pytest.mark.parametrize("kind", ["containers", "initContainers", "ephemeralContainers"])
def test_the_restricted_rules_catch_a_pod_that_breaks_them(broken: dict[str, Any], rule: str, kind: str) -> None:
    good = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    whole = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    pod = {"securityContext": whole, kind: [{"name": "c", "securityContext": good}]}
    assert broken_rules({}, pod) == []
    changed = {name: value for name, value in broken.items() if name not in ("container", "ports")}
    container = {
        "name": "c",
        "securityContext": {**good, **broken.get("container", {})},
        "ports": broken.get("ports", []),
    }
    assert rule in broken_rules({}, {**pod, **changed, kind: [container]})


class TestOrchestrator:
    chart = CHARTS / "orchestrator"

    def named(self, kind: str, values: Mapping[str, Any], name: str = "fednnunet") -> dict[str, Any]:
        (found,) = (
            each for each in render(self.chart, values) if each["kind"] == kind and each["metadata"]["name"] == name
        )
        return found

    def test_one_pod_at_a_time_with_two_containers_and_a_claim_that_stays(self) -> None:
        deployment = self.named("Deployment", {})["spec"]
        assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
        names = [each["name"] for each in deployment["template"]["spec"]["containers"]]
        assert names == ["superlink", "coordinator"]
        claim = self.named("PersistentVolumeClaim", {}, "fednnunet-state")
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        values = {"state.existingClaim": "ours"}
        assert not any(each["kind"] == "PersistentVolumeClaim" for each in render(self.chart, values))

    def test_what_only_services_or_budgets_read_restarts_no_pod(self) -> None:
        """And neither does a new study: the ConfigMap is mounted, and the kubelet brings it."""
        before = self.named("Deployment", {})["spec"]["template"]
        for values in (
            {"fleet.service.type": "NodePort"},
            {"ingress.enabled": True},
            {"podDisruptionBudget.maxUnavailable": 0},
            {"studies": {"liver": "name: liver\n"}},
        ):
            assert self.named("Deployment", values)["spec"]["template"] == before
        assert self.named("Deployment", {"poll": 2})["spec"]["template"] != before

    @pytest.mark.parametrize("mode", ["passthrough", "terminate"])
    def test_the_ingress_lets_the_fleet_through_alone_with_large_bodies(self, mode: str) -> None:
        values = {"ingress.enabled": True, "ingress.tls.mode": mode, "ingress.tls.secretName": "public"}
        ingress = self.named("Ingress", values)
        (rule,) = ingress["spec"]["rules"]
        assert [path["path"] for path in rule["http"]["paths"]] == ["/v1/fleet/"]
        assert ("secretName" in ingress["spec"]["tls"][0]) == (mode == "terminate")
        annotations = ingress["metadata"]["annotations"]
        assert int(annotations["nginx.ingress.kubernetes.io/proxy-body-size"].removesuffix("m")) > 5
        passes = annotations["nginx.ingress.kubernetes.io/ssl-passthrough"]
        assert passes == ("true" if mode == "passthrough" else "false")
        more = self.named("Ingress", {**values, "ingress.enrollment": True})["spec"]["rules"][0]["http"]["paths"]
        assert [path["path"] for path in more] == ["/v1/fleet/", "/v1/enroll", "/health"]

    def test_gateway_routes_are_the_stable_ones_where_the_cluster_has_them(self) -> None:
        values = {"gateway.enabled": True, "gateway.parentRefs": [{"name": "public"}]}
        old = [each for each in render(self.chart, values) if each["kind"] == "TLSRoute"]
        new = render(self.chart, values, "--api-versions", "gateway.networking.k8s.io/v1/TLSRoute")
        assert [each["apiVersion"] for each in old] == ["gateway.networking.k8s.io/v1alpha2"]
        assert [each["apiVersion"] for each in new if each["kind"] == "TLSRoute"] == ["gateway.networking.k8s.io/v1"]
        values |= {"gateway.tls": {"mode": "terminate", "backendHostname": "h", "caConfigMap": "c"}}
        route = self.named("HTTPRoute", values)["spec"]["rules"][0]
        assert [match["path"]["value"] for match in route["matches"]] == ["/v1/fleet/"]
        assert self.named("BackendTLSPolicy", values)["spec"]["validation"]["hostname"] == "h"
        refused(self.chart, {"gateway.enabled": True}, "gateway.parentRefs")
        refused(self.chart, {"ingress.enabled": True, "ingress.tls.mode": "terminate"}, "ingress.tls.secretName")

    def test_control_is_reached_by_helm_test_alone_until_somebody_is_named(self) -> None:
        def who(values: Mapping[str, Any]) -> list[Any]:
            rules = self.named("NetworkPolicy", values)["spec"]["ingress"]
            return [rule.get("from") for rule in rules if any(port["port"] == "control" for port in rule["ports"])]

        assert len(who({})) == 1
        named = {"podSelector": {"matchLabels": {"a": "b"}}}
        assert [named] in who({"networkPolicy.control": [named]})
        assert self.named("Service", {}, "fednnunet-control")["spec"]["type"] == "ClusterIP"
        assert self.named("NetworkPolicy", {})["spec"]["egress"] == []

    def test_the_pod_holds_both_secrets_and_neither_the_cas_key(self) -> None:
        from orchestrator.enrollment.authority import Authority

        pod = self.named("Deployment", {})["spec"]["template"]["spec"]
        (volume,) = (each for each in pod["volumes"] if each["name"] == "authority")
        assert [each["secret"]["name"] for each in volume["projected"]["sources"]] == [
            "fednnunet-authority",
            "fednnunet-keys",
        ]
        assert volume["projected"]["defaultMode"] == 0o440
        for container in pod["containers"]:
            mounted = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            assert mounted["/state/authority"]["readOnly"]
        assert Authority(Path("/state/authority")).ca.parent == Path("/state/authority")


class TestInference:
    chart = CHARTS / "inference"
    least: Mapping[str, Any] = {"input.claim": "i", "output.claim": "o", "model.claim": "m"}

    def job(self, **values: Any) -> dict[str, Any]:
        (found,) = (
            each
            for each in render(self.chart, {**self.least, **{k.replace("__", "."): v for k, v in values.items()}})
            if each["kind"] == "Job"
        )
        return found

    def test_the_job_is_indexed_and_fails_shard_by_shard(self) -> None:
        spec = self.job(shards=4, parallelism=2)["spec"]
        assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 2)
        assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (2, 4)
        container = spec["template"]["spec"]["containers"][0]
        assert {"name": "FEDNNUNET_PREDICT_SHARDS", "value": "4"} in container["env"]
        codes = spec["podFailurePolicy"]["rules"][1]["onExitCodes"]["values"]
        assert 14 not in codes, "a case that failed may succeed: memory, storage"
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        shm = next(each for each in spec["template"]["spec"]["volumes"] if each["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"

    def test_other_values_make_another_job_and_a_policy_does_not(self) -> None:
        name = self.job()["metadata"]["name"]
        assert self.job(networkPolicy__enabled=False)["metadata"]["name"] == name
        assert self.job(shards=2)["metadata"]["name"] != name

    def test_a_claim_is_one_volume_however_often_it_is_used(self) -> None:
        values = {"input.claim": "s", "output.claim": "s", "model.claim": "s", "output.subPath": "out"}
        (job,) = (each for each in render(self.chart, values) if each["kind"] == "Job")
        pod = job["spec"]["template"]["spec"]
        assert [each["name"] for each in pod["volumes"] if "persistentVolumeClaim" in each] == ["claim-043a718774"[:14]]
        mounts = {each["mountPath"]: each for each in pod["containers"][0]["volumeMounts"]}
        assert mounts["/input"]["readOnly"]
        assert mounts["/model"]["readOnly"]
        assert "readOnly" not in mounts["/output"]

    def test_its_arguments_are_those_of_appliance_predict(self) -> None:
        import typer.main

        from appliance.cli import app

        command: Any = typer.main.get_command(app)
        options = {name for each in command.commands["predict"].params for name in each.opts}
        values = [REPOSITORY / "tests" / "chart_values" / "inference" / "cpu.yaml"]
        (job,) = (each for each in render(self.chart, values) if each["kind"] == "Job")
        arguments = job["spec"]["template"]["spec"]["containers"][0]["args"]
        assert {each.split("=")[0] for each in arguments[1:]} <= options
        assert "--folds=0,1,2" in arguments
        assert options - {each.split("=")[0] for each in arguments} == {"--shard", "--check"}

    def test_without_its_three_claims_it_is_refused(self) -> None:
        for missing in self.least:
            refused(self.chart, {name: value for name, value in self.least.items() if name != missing}, missing)


class TestHospital:
    chart = CHARTS / "hospital"
    values = REPOSITORY / "tests" / "chart_values" / "hospital" / "defaults.yaml"

    def pod(self) -> dict[str, Any]:
        (found,) = (each for each in render(self.chart, [self.values]) if each["kind"] == "Deployment")
        spec: dict[str, Any] = found["spec"]["template"]["spec"]
        return spec

    def test_the_link_sees_no_data_and_the_worker_no_key(self) -> None:
        pod = self.pod()
        link, worker = pod["containers"]
        assert not any("data" in mount["name"] for mount in link["volumeMounts"])
        settings = next(each for each in pod["volumes"] if each["name"] == "settings")
        assert [each["key"] for each in settings["secret"]["items"]] == ["site.toml"]
        assert "config" not in {mount["name"] for mount in worker["volumeMounts"]}
        data = next(mount for mount in worker["volumeMounts"] if mount["name"] == "data")
        assert data["readOnly"]
        spools = [m["subPath"] for c in (link, worker) for m in c["volumeMounts"] if m["mountPath"] == "/state/spool"]
        assert spools == ["spool", "spool"]
        states = [m["subPath"] for c in (link, worker) for m in c["volumeMounts"] if m["mountPath"] == "/state"]
        assert states == ["link", "worker"]

    def test_the_gpu_is_the_workers(self) -> None:
        link, worker = self.pod()["containers"]
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "nvidia.com/gpu" not in link["resources"]["limits"]

    def test_it_reaches_the_orchestrator_and_dns_alone(self) -> None:
        (policy,) = (each["spec"] for each in render(self.chart, [self.values]) if each["kind"] == "NetworkPolicy")
        assert policy["ingress"] == []
        assert policy["egress"][0] == {
            "to": [{"ipBlock": {"cidr": "192.0.2.10/32"}}],
            "ports": [{"port": 8443, "protocol": "TCP"}],
        }
        assert [port["port"] for port in policy["egress"][1]["ports"]] == [53, 53]
        assert len(policy["egress"]) == 2
        refused(self.chart, {"data.claim": "d"}, "networkPolicy.orchestrator")
        refused(self.chart, {"networkPolicy.enabled": False}, "data.claim")

    def test_its_variables_are_settings_of_the_appliance(self) -> None:
        from appliance.settings import Settings

        values = [REPOSITORY / "tests" / "chart_values" / "hospital" / "cpu.yaml"]
        (found,) = (each for each in render(self.chart, values) if each["kind"] == "Deployment")
        for container in found["spec"]["template"]["spec"]["containers"]:
            names = {each["name"].removeprefix("FEDNNUNET_").lower() for each in container["env"]}
            assert names - {"https_proxy", "no_proxy"} <= set(Settings.model_fields)


def test_the_tools_are_there() -> None:
    for program in HELMS:
        assert (charts.TOOLS / program).exists(), "helm/tools.sh fetches it"
