"""Simulated: a kubelet with one node, which starts the containers of rendered pods with docker as their manifests say.

Real: the images, commands, variables, files, users, capabilities, read-only roots, probes, limits, the order of init
containers, the shared network of a pod and the names of its Services. Not there: an API server, a scheduler, a policy
engine for the network. Claims and emptyDirs are folders of this machine, so a pod that is deleted and made again finds
its claims as it left them, and new emptyDirs.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import wait_for

DOCKER = os.environ.get("DOCKER", "docker")
OWNER = 10001
_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}


def docker(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a docker command to its end."""
    done = subprocess.run(
        [DOCKER, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=900,
        check=False,
    )
    assert not check or done.returncode == 0, f"docker {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass
class Pod:
    """A pod of the simulated node."""

    name: str
    spec: Mapping[str, Any]
    labels: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    thread: threading.Thread | None = None

    def container(self, name: str) -> str:
        """Docker's name of one of its containers."""
        return f"{self.name}.{name}"

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """Its containers, without those for its start."""
        return list(self.spec["containers"])


class Node:
    """A node, its network, its claims.

    Parameters
    ----------
    folder : Path
        Where claims and other volumes lie.
    name : str
        Of the docker network; containers begin with it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.pods: dict[str, Pod] = {}
        self._one = threading.Lock()
        self._objects: dict[tuple[str, str], Mapping[str, Any]] = {}
        self.stop()
        docker("network", "create", "--internal", name)

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove every container and the network."""
        left = docker("ps", "-aq", "--filter", f"name=^{self.name}").stdout.split()
        if left:
            docker("rm", "-f", *left)
        docker("network", "rm", self.name, check=False)

    # ---- what is applied

    def apply(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Take objects in; pods of Deployments whose template changed are replaced, as `Recreate` does it."""
        for document in documents:
            if "helm.sh/hook" in document["metadata"].get("annotations", {}):
                continue
            self._objects[document["kind"], document["metadata"]["name"]] = document
        for (kind, name), document in list(self._objects.items()):
            if kind != "Deployment":
                continue
            template = document["spec"]["template"]
            there = self.pods.get(name)
            if there is not None:
                if there.spec == template["spec"] and there.labels == template["metadata"]["labels"]:
                    continue
                self.delete(name)
            self.pods[name] = pod = Pod(f"{self.name}-{name}", template["spec"], template["metadata"]["labels"])
            pod.thread = threading.Thread(target=self._start, args=(pod,), daemon=True)
            pod.thread.start()

    def secret(self, name: str, files: Mapping[str, bytes]) -> None:
        """Make a Secret."""
        data = {key: base64.b64encode(value).decode() for key, value in files.items()}
        self._objects["Secret", name] = {"kind": "Secret", "metadata": {"name": name}, "data": data}

    def delete(self, name: str) -> None:
        """End a pod in order: SIGTERM to every container at once, SIGKILL after its grace; emptyDirs are gone."""
        pod = self.pods.pop(name)
        grace = pod.spec.get("terminationGracePeriodSeconds", 30)
        names = [pod.container(each["name"]) for each in pod.containers]
        docker("stop", "--time", grace, *names, check=False)
        docker("rm", "-f", *names, pod.container("pause"), check=False)
        if pod.thread is not None:
            pod.thread.join(120)
        shutil.rmtree(self.folder / "pods" / pod.name, ignore_errors=True)

    def job(self, document: Mapping[str, Any]) -> list[tuple[int, str]]:
        """Run an Indexed Job's pods one after the other; of each, exit status and log."""
        spec = document["spec"]
        pod, labels = spec["template"]["spec"], spec["template"]["metadata"]["labels"]
        return [
            self.run(f"predict-{index}", pod, labels, JOB_COMPLETION_INDEX=str(index))
            for index in range(spec["completions"])
        ]

    # ---- pods

    def run(self, name: str, spec: Mapping[str, Any], labels: Mapping[str, str], **environment: str) -> tuple[int, str]:
        """Run a pod with one container to its end; its exit status and what it logged."""
        pod = Pod(f"{self.name}-{name}", {**spec, "restartPolicy": "Never"}, labels, environment)
        try:
            self._start(pod)
            assert not pod.failed, pod.failed
            container = pod.container(pod.containers[0]["name"])
            status = int(docker("wait", container).stdout)
            logged = docker("logs", container)
            return status, logged.stdout + logged.stderr
        finally:
            names = [pod.container(each["name"]) for each in pod.containers]
            docker("rm", "-f", *names, pod.container("pause"), check=False)
            shutil.rmtree(self.folder / "pods" / pod.name, ignore_errors=True)

    def ready(self, name: str, timeout: float = 300) -> None:
        """Wait until a pod has started and its startup and readiness probes succeed."""

        def good() -> bool:
            pod = self.pods[name]
            assert not pod.failed, pod.failed
            assert pod.thread is not None
            return not pod.thread.is_alive() and all(
                self._probe(pod, container, container[kind])
                for container in pod.containers
                for kind in ("startupProbe", "readinessProbe", "livenessProbe")
                if kind in container
            )

        try:
            wait_for(good, timeout, f"{name} is ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs(name)[-4000:]}") from None

    def execute(
        self, name: str, container: str, *command: object, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """kubectl exec."""
        return docker("exec", self.pods[name].container(container), *command, check=check)

    def logs(self, name: str, container: str = "") -> str:
        """kubectl logs; of all containers where none is named."""
        pod = self.pods[name]
        names = [container] if container else [each["name"] for each in pod.containers]
        done = [docker("logs", pod.container(each), check=False) for each in names]
        return "\n".join(each.stdout + each.stderr for each in done)

    def _start(self, pod: Pod) -> None:
        try:
            volumes = {volume["name"]: self._volume(pod, volume) for volume in pod.spec.get("volumes", [])}
            aliases = [part for service in self._services(pod) for part in ("--network-alias", service)]
            first = pod.containers[0]["image"]
            docker(
                *("run", "-d", "--name", pod.container("pause"), "--network", self.name, *aliases),
                *("--entrypoint", "sleep", first, "infinity"),
            )
            for container in pod.spec.get("initContainers", []):
                docker("run", "--rm", *self._flags(pod, container, volumes))
            again = [] if pod.spec.get("restartPolicy") == "Never" else ["--restart", "unless-stopped"]
            for container in pod.containers:
                docker("run", "-d", *again, *self._flags(pod, container, volumes))
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            pod.failed.append(str(error))

    def _services(self, pod: Pod) -> list[str]:
        """Names under which a pod is dialled; no Service here changes a port's number."""
        found = []
        ports = {port["name"]: port["containerPort"] for each in pod.containers for port in each.get("ports", [])}
        for (kind, name), document in self._objects.items():
            if kind != "Service" or not document["spec"]["selector"].items() <= pod.labels.items():
                continue
            for port in document["spec"]["ports"]:
                assert ports[port["targetPort"]] == port["port"], f"{name}: {port}"
            found.append(name)
        return found

    def _flags(self, pod: Pod, container: Mapping[str, Any], volumes: Mapping[str, Path]) -> list[str]:
        """Arguments of `docker run` that make a container as its manifest says."""
        whole, own = pod.spec["securityContext"], container["securityContext"]
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert not own["allowPrivilegeEscalation"]
        flags = ["--name", pod.container(container["name"]), "--network", f"container:{pod.container('pause')}"]
        flags += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        flags += ["--user", f"{whole['runAsUser']}:{whole['runAsGroup']}", "--group-add", str(whole["fsGroup"])]
        flags += ["--read-only"] if own["readOnlyRootFilesystem"] else []
        flags += ["--memory", str(_bytes(container["resources"]["limits"]["memory"]))]
        for name, value in self._variables(pod, container).items():
            flags += ["--env", f"{name}={value}"]
        for mount in container.get("volumeMounts", []):
            source = volumes[mount["name"]] / mount.get("subPath", "")
            with self._one:  # several pods of one claim start at once
                if not source.exists():
                    source.mkdir(parents=True)
                    _own(source)
            flags += ["--volume", f"{source}:{mount['mountPath']}{':ro' if mount.get('readOnly') else ''}"]
        command = [*container.get("command", []), *container.get("args", [])]
        if container.get("command"):
            return [*flags, "--entrypoint", command[0], container["image"], *command[1:]]
        return [*flags, container["image"], *command]

    def _variables(self, pod: Pod, container: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for source in container.get("envFrom", []):
            found |= self._objects["ConfigMap", source["configMapRef"]["name"]]["data"]
        for variable in container.get("env", []):
            if "value" in variable:
                found[variable["name"]] = variable["value"]
        assert all(isinstance(value, str) for value in found.values()), found
        return {**found, **pod.environment}

    def _volume(self, pod: Pod, volume: Mapping[str, Any]) -> Path:
        if "persistentVolumeClaim" in volume:
            folder = self.claim(volume["persistentVolumeClaim"]["claimName"])
        else:
            folder = self.folder / "pods" / pod.name / volume["name"]
            folder.mkdir(parents=True, exist_ok=True)
            _own(folder)
        sources = volume.get("projected", {}).get("sources", [])
        mode = volume.get("projected", {}).get("defaultMode", 0o644)
        for kind, key in (("secret", "secretName"), ("configMap", "name")):
            if kind in volume:
                sources = [{kind: {"name": volume[kind][key], "items": volume[kind].get("items", [])}}]
                mode = volume[kind].get("defaultMode", 0o644)
        for source in sources:
            for kind, told in source.items():
                self._project(folder, kind, told, mode)
        return folder

    def _project(self, folder: Path, kind: str, told: Mapping[str, Any], mode: int) -> None:
        secret = kind == "secret"
        document = self._objects["Secret" if secret else "ConfigMap", told["name"]]
        items = {item["key"]: item["path"] for item in told.get("items", [])}
        for key, value in (document.get("data") or {}).items():
            if items and key not in items:
                continue
            path = folder / items.get(key, key)
            path.write_bytes(base64.b64decode(value) if secret else value.encode())
            os.chown(path, 0, OWNER)
            path.chmod(mode)

    def claim(self, name: str) -> Path:
        """The folder behind a claim."""
        folder = self.folder / "claims" / name
        with self._one:  # several pods of one claim start at once
            if not folder.exists():
                folder.mkdir(parents=True)
                _own(folder)
        return folder

    def _probe(self, pod: Pod, container: Mapping[str, Any], probe: Mapping[str, Any]) -> bool:
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        if "exec" in probe:
            command = list(probe["exec"]["command"])
        elif "httpGet" in probe:
            told = probe["httpGet"]
            url = f"{told['scheme'].lower()}://127.0.0.1:{ports[told['port']]}{told['path']}"
            ask = (
                "import ssl, sys, urllib.request as r; r.urlopen(sys.argv[1], context=ssl._create_unverified_context())"
            )
            command = ["python3", "-c", ask, url]
        else:
            port = ports[probe["tcpSocket"]["port"]]
            command = ["python3", "-c", f"import socket; socket.create_connection(('127.0.0.1', {port}))"]
        return docker("exec", pod.container(container["name"]), *command, check=False).returncode == 0


def _own(folder: Path) -> None:
    """As fsGroup leaves a volume's root."""
    os.chown(folder, 0, OWNER)
    folder.chmod(0o2775)


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * _UNITS[quantity[-2:]]
