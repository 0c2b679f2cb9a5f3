"""`fednnunet predict`: batch prediction as a Job in a cluster; the Job is that of the chart helm/inference."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from federation import console
from federation.errors import Code, FednnunetError

if TYPE_CHECKING:
    from orchestrator.admin.cluster import Cluster, Progress

app = typer.Typer(help="Predict folders of images in a Kubernetes cluster.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="The prediction's name.")]
Namespace = Annotated[str | None, typer.Option("--namespace", "-n", help="Namespace.", show_default="the context's")]
Context = Annotated[str | None, typer.Option(help="Context of the kubeconfig.", show_default="the current one")]
CHART = ("helm", "inference")
_LOOK = 2.0


@app.command()
def submit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The prediction's name: lower case, digits and -.")],
    images: Annotated[
        str | None, typer.Option("--input", metavar="CLAIM[:FOLDER]", help="Claim, and folder in it, of the images.")
    ] = None,
    predictions: Annotated[
        str | None, typer.Option("--output", metavar="CLAIM[:FOLDER]", help="Where the predictions go.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="CLAIM[:PATH]", help="Claim, and path in it, of the model's folder or zip.")
    ] = None,
    shards: Annotated[int | None, typer.Option(help="Pods that share the cases.", show_default="1")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu.", show_default="cuda")] = None,
    values: Annotated[list[Path] | None, typer.Option("--values", "-f", help="Values of helm/inference, YAML.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One value more, as options.disableTta=true.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the YAML; ask no cluster.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the Job ends, as `predict watch`.")] = False,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Render the chart helm/inference and make its Job. Given again, it is the same Job; with other values another."""
    given: dict[str, Any] = {}
    for key, place, path in (
        ("input", images, "subPath"),
        ("output", predictions, "subPath"),
        ("model", model, "path"),
    ):
        if place is not None:
            claim, _, folder = place.partition(":")
            given[key] = {"claim": claim, path: folder}
    if shards is not None:
        given["shards"] = shards
    if device is not None:
        given["device"] = device
    documents = _rendered(name, given, values or [], settings or [], namespace)
    if dry_run:
        typer.echo(yaml.safe_dump_all(documents, sort_keys=False), nl=False)
        return
    cluster = _cluster(context, namespace)
    for document in sorted(documents, key=lambda each: each["kind"] == "Job"):  # the Job last: it needs the others
        made = cluster.apply(document)
        if document["kind"] == "Job":
            job = document["metadata"]["name"]
    typer.echo(f"{'submitted' if made else 'there already'}: Job {job} in namespace {cluster.namespace}")
    if wait:
        _watch(cluster, job)


@app.command()
def watch(name: Name, namespace: Namespace = None, context: Context = None) -> None:
    """Say how a prediction goes on until it ends. Ends with FNU-411 (status 14) when shards were given up."""
    cluster = _cluster(context, namespace)
    _watch(cluster, cluster.job(name))


@app.command()
def logs(
    name: Name,
    shard: Annotated[int | None, typer.Option(help="One shard.", min=0, show_default="all")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="With --shard: go on until its pod ends.")] = False,
    namespace: Namespace = None,
    context: Context = None,
) -> None:
    """Print what the pods of a prediction say, with the shard before each line."""
    if follow and shard is None:
        raise FednnunetError(Code.SETTINGS_INVALID, "--follow without --shard", "Name one shard to follow.")
    cluster = _cluster(context, namespace)
    for index, line in cluster.logs(cluster.job(name), shard, follow):
        typer.echo(f"[{index}] {line}")


def chart() -> Path:
    """The chart: in the repository, or as it was installed."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent.joinpath(*CHART), package / "charts" / CHART[-1]):
        if (folder / "Chart.yaml").is_file():
            return folder
    raise FednnunetError(Code.EXTRA_MISSING, f"the chart {'/'.join(CHART)} is not installed")


def _rendered(
    name: str, given: dict[str, Any], files: Sequence[Path], settings: Sequence[str], namespace: str | None
) -> list[dict[str, Any]]:
    """The objects of the chart, without its test; raises FNU-704 without helm, FNU-161 for values it refuses."""
    helm = shutil.which("helm")
    if helm is None:
        raise FednnunetError(
            Code.EXTRA_MISSING, "helm is not on the PATH", "Install helm 3 or 4: the Job is rendered from its chart."
        )
    command = [helm, "template", name, str(chart()), "--skip-tests"]
    command += ["--namespace", namespace] if namespace else []
    for file in files:
        command += ["--values", str(file)]
    command += ["--values", "-"] if given else []
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(command, input=json.dumps(given), capture_output=True, encoding="utf-8", check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line and not line.startswith(("level=", "Use --debug"))]
        raise FednnunetError(Code.CHART_REFUSED, "\n".join(said[:12]))
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    for document in documents:
        document["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "fednnunet"
        if document["kind"] == "Job":
            _spell_quantities(document["spec"]["template"]["spec"]["containers"])
    return documents


def _spell_quantities(containers: list[dict[str, Any]]) -> None:
    """`cpu: 2` is a quantity for Kubernetes; its Python client takes text alone."""
    for container in containers:
        for kind, quantities in container["resources"].items():
            container["resources"][kind] = {name: str(quantity) for name, quantity in quantities.items()}


def _cluster(context: str | None, namespace: str | None) -> Cluster:
    console.require("cluster", "kubernetes")
    from orchestrator.admin.cluster import Cluster

    return Cluster(context, namespace)


def _watch(cluster: Cluster, job: str) -> None:
    before = ""
    while True:
        progress = cluster.progress(job)
        if (line := _line(progress)) != before:
            typer.echo(line)
            before = line
        if progress.ended == "Complete":
            return
        if progress.ended == "Failed":
            given_up = f"shards {progress.given_up} were given up" if progress.given_up else progress.reason
            raise FednnunetError(
                Code.NOT_ALL_PREDICTED,
                f"Job {job}: {given_up}",
                "`fednnunet predict logs` says why; .predict/summary.json in the output names each case.",
            )
        time.sleep(_LOOK)


def _line(progress: Progress) -> str:
    parts = [f"{progress.succeeded} of {progress.shards} shards done", f"{progress.active} at work"]
    if progress.failed:
        parts.append(f"{progress.failed} pods failed")
    if progress.given_up:
        parts.append(f"given up: {progress.given_up}")
    if progress.ended:
        parts.append(progress.ended.lower())
    return "; ".join([", ".join(parts), *progress.waiting])
