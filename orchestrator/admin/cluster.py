"""A Kubernetes cluster, as far as batch prediction goes: the only module that imports `kubernetes`.

What the cluster says in its own words comes out as a numbered error: nobody answers FNU-159, refused FNU-160.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import urllib3.exceptions
from kubernetes import client, config

from federation.errors import Code, FednnunetError

CHART = "fednnunet-inference"
_INDEX = "batch.kubernetes.io/job-completion-index"
_JOB = "batch.kubernetes.io/job-name"
_TIMEOUT = 30


@dataclass(frozen=True)
class Progress:
    """How a Job stands.

    Attributes
    ----------
    name : str
        The Job's name.
    shards, succeeded, active, failed : int
        Shards in all; those that are done; pods that run; pods that have failed, also those that were started again.
    done, given_up : str
        Indexes that succeeded and that failed for good, as Kubernetes writes them: `0-2,5`.
    ended : str
        Complete, Failed, Suspended, or nothing while it goes on.
    reason : str
        Why it failed.
    waiting : tuple of str
        What keeps pods from running, in the cluster's words, each once.
    """

    name: str
    shards: int
    succeeded: int
    active: int
    failed: int
    done: str
    given_up: str
    ended: str
    reason: str
    waiting: tuple[str, ...]


class Cluster:
    """Jobs of batch prediction in one namespace.

    Parameters
    ----------
    context : str or None
        A context of the kubeconfig; None: its current one, or the pod's own account within a cluster.
    namespace : str or None
        None: that of the context.
    """

    def __init__(self, context: str | None, namespace: str | None) -> None:
        try:
            config.load_kube_config(context=context)
            _, active = config.list_kube_config_contexts()
            chosen = active if context is None else self._context(context)
            self.namespace = namespace or chosen["context"].get("namespace") or "default"
        except config.ConfigException as error:
            try:
                config.load_incluster_config()
            except config.ConfigException:
                raise FednnunetError(Code.CLUSTER_UNREACHABLE, str(error)) from error
            self.namespace = namespace or "default"
        self._batch, self._core, self._network = client.BatchV1Api(), client.CoreV1Api(), client.NetworkingV1Api()

    @staticmethod
    def _context(name: str) -> Any:
        found, _ = config.list_kube_config_contexts()
        return next(each for each in found if each["name"] == name)

    def apply(self, document: Mapping[str, Any]) -> bool:
        """Make an object, or bring one that is there to this form; a Job that is there stays as it is: False."""
        kind, name = document["kind"], document["metadata"]["name"]
        core, network = self._core, self._network
        create, patch = {
            "ServiceAccount": (core.create_namespaced_service_account, core.patch_namespaced_service_account),
            "NetworkPolicy": (network.create_namespaced_network_policy, network.patch_namespaced_network_policy),
            "Job": (self._batch.create_namespaced_job, None),
        }[kind]
        with _asked(f"{kind} {name}"):
            try:
                create(self.namespace, document, field_manager="fednnunet", _request_timeout=_TIMEOUT)
            except client.ApiException as error:
                if error.status != 409:
                    raise
                if patch is None:
                    return False
                patch(name, self.namespace, document, field_manager="fednnunet", _request_timeout=_TIMEOUT)
        return True

    def job(self, prediction: str) -> str:
        """Name of the newest Job of a prediction; raises FNU-162."""
        selector = f"app.kubernetes.io/name={CHART},app.kubernetes.io/instance={prediction}"
        with _asked(f"Jobs of {prediction}"):
            found = self._batch.list_namespaced_job(
                self.namespace, label_selector=selector, _request_timeout=_TIMEOUT
            ).items
        if not found:
            raise FednnunetError(Code.JOB_UNKNOWN, f"{prediction} in namespace {self.namespace}")
        return str(max(found, key=lambda job: job.metadata.creation_timestamp).metadata.name)

    def progress(self, job: str) -> Progress:
        """How a Job stands now."""
        with _asked(f"Job {job}"):
            found = self._batch.read_namespaced_job_status(job, self.namespace, _request_timeout=_TIMEOUT)
        status = found.status or client.V1JobStatus()
        ended, reason = "", ""
        for condition in status.conditions or []:
            if condition.status == "True" and condition.type in ("Complete", "Failed", "Suspended"):
                ended, reason = condition.type, f"{condition.reason or ''}: {condition.message or ''}".strip(": ")
        return Progress(
            name=job,
            shards=found.spec.completions,
            succeeded=status.succeeded or 0,
            active=status.active or 0,
            failed=status.failed or 0,
            done=status.completed_indexes or "",
            given_up=status.failed_indexes or "",
            ended=ended,
            reason=reason,
            waiting=() if ended else self._waiting(job),
        )

    def _waiting(self, job: str) -> tuple[str, ...]:
        said: list[str] = []
        for pod in self._pods(job):
            states = [each.state.waiting for each in pod.status.container_statuses or [] if each.state]
            told = [each for each in states if each and each.reason != "ContainerCreating"]
            told += [
                each for each in pod.status.conditions or [] if each.type == "PodScheduled" and each.status == "False"
            ]
            said += [f"{each.reason}: {each.message or ''}".strip(": ") for each in told]
        return tuple(dict.fromkeys(said))

    def _pods(self, job: str) -> list[Any]:
        with _asked(f"pods of {job}"):
            found = self._core.list_namespaced_pod(
                self.namespace, label_selector=f"{_JOB}={job}", _request_timeout=_TIMEOUT
            )
        return sorted(found.items, key=lambda pod: (self._index(pod), str(pod.metadata.creation_timestamp)))

    @staticmethod
    def _index(pod: Any) -> int:
        told = {**(pod.metadata.labels or {}), **(pod.metadata.annotations or {})}
        return int(told.get(_INDEX, -1))

    def logs(self, job: str, shard: int | None, follow: bool) -> Iterator[tuple[int, str]]:
        """Lines of the pods of one shard or of all, with the shard; `follow`: of the newest pod, until it ends."""
        pods = [pod for pod in self._pods(job) if shard is None or self._index(pod) == shard]
        if not pods:
            which = "" if shard is None else f", shard {shard}"
            raise FednnunetError(Code.JOB_UNKNOWN, f"no pod of {job}{which} in namespace {self.namespace}")
        for pod in pods[-1:] if follow else pods:
            with _asked(f"log of {pod.metadata.name}"):
                stream = self._core.read_namespaced_pod_log(
                    pod.metadata.name, self.namespace, follow=follow, _preload_content=False
                )
                rest = b""
                for piece in stream.stream(amt=None):
                    *lines, rest = (rest + piece).split(b"\n")
                    yield from ((self._index(pod), line.decode(errors="replace")) for line in lines)
                if rest:
                    yield self._index(pod), rest.decode(errors="replace")


@contextlib.contextmanager
def _asked(what: str) -> Iterator[None]:
    try:
        yield
    except client.ApiException as error:
        try:
            said = json.loads(error.body)["message"]
        except (ValueError, KeyError, TypeError):
            said = error.reason
        raise FednnunetError(Code.CLUSTER_REFUSED, f"{what}: {said}") from error
    except urllib3.exceptions.HTTPError as error:
        raise FednnunetError(Code.CLUSTER_UNREACHABLE, f"{what}: {str(error)[:300]}") from error
