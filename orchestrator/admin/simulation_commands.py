"""`fednnunet simulate`: a whole federation on this machine.

nnU-Net's options keep nnU-Net's names. An option of nnU-Net that makes no sense in a federation is refused with the
reason (FNU-105), never ignored.
"""

from __future__ import annotations

import hashlib
import itertools
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from orchestrator.admin.datasets import Datasets

app = typer.Typer(
    help="Run a whole federation on this machine, by the same processes that hospitals run.", no_args_is_help=True
)

FOLD_HELP = (
    "0 to 4: one fold of five. 0-4: the five folds, one after the other (what FednnU-Net's run.py called all). all: "
    "nnU-Net's own meaning, every case trains and none is held out."
)

Ids = Annotated[str, typer.Argument(metavar='"ID ID ..."', help="Dataset ids under nnUNet_raw; each is a site.")]
Configuration = Annotated[
    str, typer.Argument(help="2d, 3d_fullres, 3d_lowres or, after 3d_lowres with fold 0-4 or all, 3d_cascade_fullres.")
]
State = Annotated[
    Path | None, typer.Option("--state", help="Where everything is kept. Default: fednnunet-state/ID_ID_...")
]
Device = Annotated[str, typer.Option("-device", help="cpu, cuda, cuda:N or mps, for every site.")]
Np = Annotated[int | None, typer.Option("-np", help="Processes for preprocessing, at each site.")]
Npfp = Annotated[int | None, typer.Option("-npfp", help="Processes for reading the dataset, at each site.")]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify_dataset_integrity", help="Accepted: a federation always checks every dataset before anything leaves."
    ),
]
Deadline = Annotated[float, typer.Option("--appear-deadline", help="Seconds within which every site must appear.")]
MinCases = Annotated[
    int, typer.Option("--fingerprint-min-cases", help="Least number of cases in a group of the fingerprint; see docs.")
]
FloatLabels = Annotated[bool, typer.Option("--accept-float-labels", help="Accept labels stored as floating point.")]


def _refused(name: str, reason: str) -> Any:
    """An option of nnU-Net's that is refused with its reason."""

    def refuse(value: Any) -> Any:
        if value not in (None, False):
            from federation.errors import Code, FednnunetError

            raise FednnunetError(Code.OPTION_NOT_FEDERATED, f"{name}: {reason}")
        return value

    return typer.Option(name, hidden=True, callback=refuse, help=f"Refused: {reason}")


def _console() -> Any:
    from rich.console import Console

    return Console()


def _state(state: Path | None, ids: str) -> Path:
    return state or Path("fednnunet-state") / "_".join(ids.replace(",", " ").split())


def _need_everything() -> None:
    """Say what is missing of the installation before anything begins."""
    from federation.console import require

    require("all", "flwr", "nnunetv2", "torch")


def _go(
    study: dict[str, Any], datasets: Datasets, state: Path, device: str, np: int | None = None, npfp: int | None = None
) -> Path:
    """Run a study over datasets; returns its folder at the orchestrator."""
    _need_everything()
    from federation.study import parse
    from orchestrator.admin.simulate import SiteOptions, simulate

    options = SiteOptions.for_device(device, len(datasets.sites), np, npfp)
    return simulate(parse(study, "options"), state, datasets.sites, options, _console())


@app.command("extract_fingerprint")
def extract_fingerprint(
    ids: Ids,
    state: State = None,
    device: Device = "cpu",
    npfp: Npfp = None,
    verify: Verify = False,
    appear_deadline: Deadline = 600.0,
    fingerprint_min_cases: MinCases = 1,
    accept_float_labels: FloatLabels = False,
    fpe: Annotated[
        str | None,
        _refused("-fpe", "the federated fingerprint is exact sums; another extractor's samples cannot be merged"),
    ] = None,
    clean: Annotated[
        bool, _refused("--clean", "nothing old is kept: a fingerprint is read again when the data has changed")
    ] = False,
) -> None:
    """Check each dataset and pool the fingerprints (nnUNetv2_extract_fingerprint over all sites)."""
    from orchestrator.admin.datasets import find

    datasets = find(ids)
    study = {
        **datasets.contract,
        "name": "extract_fingerprint",
        "stop_after": "fingerprint",
        "appear_deadline": appear_deadline,
        "fingerprint_min_cases": fingerprint_min_cases,
        "accept_float_labels": accept_float_labels,
    }
    folder = _go(study, datasets, _state(state, ids), device, None, npfp)
    _print_fingerprint(folder)


def _print_fingerprint(folder: Path) -> None:
    from rich.table import Table

    from federation.fingerprint import SiteFingerprint, to_nnunet

    pooled = SiteFingerprint.model_validate_json((folder / "fingerprint.json").read_bytes())
    properties = to_nnunet(pooled)["foreground_intensity_properties_per_channel"]
    table = Table(title="pooled fingerprint: foreground intensities")
    for column in ("channel", "mean", "std", "p0.5", "median", "p99.5"):
        table.add_column(column, justify="right")
    for channel, values in properties.items():
        keys = ("mean", "std", "percentile_00_5", "median", "percentile_99_5")
        table.add_row(str(channel), *(f"{values[key]:.4g}" for key in keys))
    console = _console()
    console.print(table)
    console.print(f"fingerprint: {folder / 'fingerprint.json'}", soft_wrap=True)


@app.command("plan_and_preprocess")
def plan_and_preprocess(
    ids: Ids,
    configuration: Configuration = "3d_fullres",
    state: State = None,
    planner: Annotated[str, typer.Option("-pl", help="Planner: ExperimentPlanner, nnUNetPlannerResEncM, ...")] = (
        "ExperimentPlanner"
    ),
    gpu_memory_target: Annotated[
        float | None, typer.Option("-gpu_memory_target", help="GPU memory in GB that the planner may fill.")
    ] = None,
    overwrite_target_spacing: Annotated[
        str | None, typer.Option("-overwrite_target_spacing", help='Target spacing in mm, such as "1 1 1".')
    ] = None,
    overwrite_plans_name: Annotated[
        str | None, typer.Option("-overwrite_plans_name", help="Another name for the plans.")
    ] = None,
    no_pp: Annotated[bool, typer.Option("--no_pp", help="Plan only, do not preprocess.")] = False,
    asym: Annotated[
        bool,
        typer.Option(
            "--asym", help="AsymFedAvg: each site plans from its own data, and shares the layers that others have too."
        ),
    ] = False,
    layers: Annotated[
        str,
        typer.Option("--layers", help="With --asym: groups (of two sites or more), or common (to all, as the paper)."),
    ] = "groups",
    device: Device = "cpu",
    np: Np = None,
    npfp: Npfp = None,
    verify: Verify = False,
    appear_deadline: Deadline = 600.0,
    fingerprint_min_cases: MinCases = 1,
    accept_float_labels: FloatLabels = False,
    preprocessor_name: Annotated[
        str | None,
        _refused("-preprocessor_name", "the plans name the preprocessor, and every site must use the same one"),
    ] = None,
    clean: Annotated[
        bool, _refused("--clean", "nothing old is kept: a fingerprint is read again when the data has changed")
    ] = False,
) -> None:
    """Plan and preprocess at every site: one plan from the pooled fingerprint (FFE), or each its own (--asym)."""
    from federation import files
    from federation.errors import Code, FednnunetError
    from federation.study import CASCADE
    from orchestrator.admin.datasets import find

    if configuration == CASCADE:
        raise FednnunetError(
            Code.STUDY_INVALID,
            f"{CASCADE} has the data of 3d_fullres",
            "Give 3d_fullres; train finds the rest by itself.",
        )
    datasets = find(ids)
    spacing = None
    if overwrite_target_spacing is not None:
        try:
            spacing = [float(part) for part in overwrite_target_spacing.replace(",", " ").split()]
        except ValueError as error:
            raise FednnunetError(Code.STUDY_INVALID, f"-overwrite_target_spacing {overwrite_target_spacing}") from error
    planning = {
        "planner": planner,
        "gpu_memory_target": gpu_memory_target,
        "overwrite_target_spacing": spacing,
        "plans_name": overwrite_plans_name,
        "fingerprint_min_cases": fingerprint_min_cases,
        "accept_float_labels": accept_float_labels,
        "mode": "asymfedavg" if asym else "ffe",
        "layers": layers,
    }
    study = {
        **datasets.contract,
        **planning,
        "name": "plan_and_preprocess",
        "configuration": configuration,
        "stop_after": "plan" if no_pp else "prepare",
        "fold": "all",
        "appear_deadline": appear_deadline,
    }
    where = _state(state, ids)
    folder = _go(study, datasets, where, device, np, npfp)
    if asym:
        _print_networks(folder, list(datasets.sites))
        name = _plans_name(folder)
    else:
        plans = files.read_json(folder / "plan.json")["plans"]
        _print_plan(plans, configuration, folder)
        name = plans["plans_name"]
    files.write_json(where / "planned" / f"{name}.json", planning)


def _plans_name(folder: Path) -> str:
    """What the sites that plan for themselves call their plans."""
    from federation.audit import read

    (line,) = [line for line in read(folder / "journal.jsonl") if line["event"] == "layers"]
    return str(line["plans_name"])


def _print_networks(folder: Path, sites: list[str]) -> None:
    from orchestrator.admin.layers import networks_table

    console = _console()
    console.print(networks_table(folder, sites))
    name = _plans_name(folder)
    console.print(f"plans {name}, each site's own; shared layers: {folder / 'layers.json'}", soft_wrap=True)


def _print_plan(plans: dict[str, Any], configuration: str, folder: Path) -> None:
    from orchestrator.planning import describe

    console = _console()
    console.print(describe(plans), highlight=False)
    console.print(f"plans {plans['plans_name']}: {folder / 'plan.json'}", soft_wrap=True)


@app.command("train")
def train(
    ids: Ids,
    configuration: Configuration,
    fold: Annotated[str | None, typer.Argument(help=FOLD_HELP)] = None,
    state: State = None,
    trainer: Annotated[str, typer.Option("-tr", help="nnU-Net's trainer class.")] = "nnUNetTrainer",
    plans: Annotated[str, typer.Option("-p", help="Plans made by plan_and_preprocess.")] = "nnUNetPlans",
    pretrained_weights: Annotated[
        Path | None, typer.Option("-pretrained_weights", help="Checkpoint of nnU-Net to start from.")
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of training.")] = 1000,
    epochs_per_round: Annotated[int, typer.Option("--epochs-per-round", help="Epochs in a round.")] = 1,
    iterations: Annotated[int, typer.Option("--iterations", help="Iterations in an epoch.")] = 250,
    validation_iterations: Annotated[
        int, typer.Option("--validation-iterations", help="Iterations of the online validation in an epoch.")
    ] = 50,
    wire: Annotated[
        str, typer.Option("--wire", help="full: float32. half: float16 differences. int8: 8 bits.")
    ] = "full",
    aggregation: Annotated[
        str,
        typer.Option("--aggregation", help="mean, fedavgm, fedadam, median, krum, ...; see docs/reference/study.md."),
    ] = "mean",
    weighting: Annotated[str, typer.Option("--weighting", help="cases or uniform.")] = "cases",
    proximal_mu: Annotated[float, typer.Option("--proximal-mu", help="FedProx's mu; 0: plain.")] = 0.0,
    keep_local: Annotated[
        list[str] | None,
        typer.Option("--keep-local", help="Layers that stay at each site: norm, seg_head or a pattern; repeatable."),
    ] = None,
    momentum: Annotated[str, typer.Option("--momentum", help="Between rounds: keep or reset.")] = "keep",
    quorum: Annotated[int | None, typer.Option("--quorum", help="Sites a round needs; default: all.")] = None,
    round_deadline: Annotated[float, typer.Option("--round-deadline", help="Seconds for a round.")] = 86400.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the study.")] = 12345,
    npz: Annotated[bool, typer.Option("--npz", help="Sites keep softmax outputs of the final validation.")] = False,
    c: Annotated[bool, typer.Option("--c", help="Go on with an earlier run; an error when there is none.")] = False,
    device: Device = "cpu",
    np: Np = None,
    npfp: Npfp = None,
    appear_deadline: Deadline = 600.0,
    val_best: Annotated[
        bool,
        _refused(
            "--val_best", "a best checkpoint is chosen from one site's weights; a federation keeps the last global ones"
        ),
    ] = False,
    val: Annotated[
        bool, _refused("--val", "the study validates by itself; the same command again goes on where it ended")
    ] = False,
    num_gpus: Annotated[
        int | None, _refused("-num_gpus", "a site trains in one process; name its GPU with -device cuda:N")
    ] = None,
    disable_checkpointing: Annotated[
        bool, _refused("--disable_checkpointing", "without checkpoints a killed worker could not go on")
    ] = False,
) -> None:
    """Train over all sites as they were planned (FFE or AsymFedAvg), validate, export."""
    from federation import files
    from federation.errors import Code, FednnunetError
    from federation.study import CASCADE, parse
    from orchestrator.admin.datasets import find

    if fold not in ("0", "1", "2", "3", "4", "0-4", "all"):
        raise FednnunetError(Code.FOLD_INVALID, "no fold was given" if fold is None else f"fold {fold!r}")
    datasets = find(ids)
    where = _state(state, ids)
    planned = where / "planned" / f"{plans}.json"
    if not planned.exists():
        known = ", ".join(sorted(path.stem for path in planned.parent.glob("*.json"))) or "none"
        raise FednnunetError(Code.NOT_PLANNED, f"plans {plans} in {where}; there: {known}")
    study = {
        **datasets.contract,
        **files.read_json(planned),
        "name": "train",
        "configuration": configuration,
        "fold": fold,
        "trainer": trainer,
        "rounds": rounds,
        "epochs_per_round": epochs_per_round,
        "iterations_per_epoch": iterations,
        "validation_iterations_per_epoch": validation_iterations,
        "wire": wire,
        "aggregation": {"method": aggregation, "weighting": weighting},
        "proximal_mu": proximal_mu,
        "keep_local": keep_local or [],
        "momentum": momentum,
        "quorum": quorum,
        "round_deadline": round_deadline,
        "seed": seed,
        "save_probabilities": npz,
        "appear_deadline": appear_deadline,
    }
    if configuration == CASCADE:
        study["previous_stage"] = _first_stage(study, where / "orchestrator" / "studies")
    if pretrained_weights is not None:
        study["pretrained_weights"] = _take_pretrained(pretrained_weights, where / "orchestrator" / "pretrained")
    if c and not (where / "orchestrator" / "studies" / parse(study, "options").id).exists():
        raise FednnunetError(Code.NOTHING_TO_CONTINUE, f"--c, in {where}")
    _go(study, datasets, where, device, np, npfp)


def _first_stage(study: dict[str, Any], studies: Path) -> str:
    """The id of the newest finished study of 3d_lowres with the same planning and trainer."""
    from federation.study import parse
    from orchestrator.stages import newest

    return newest(studies, parse({**study, "previous_stage": "0" * 64}, "options")).study.id


def _take_pretrained(checkpoint: Path, folder: Path) -> str:
    """Copy a checkpoint into the orchestrator's folder under its SHA-256, and return that."""
    from federation.errors import Code, FednnunetError
    from federation.files import replacing

    try:
        digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    except OSError as error:
        raise FednnunetError(Code.PRETRAINED_UNREADABLE, f"{checkpoint}: {error.strerror}") from error
    with replacing(folder / f"{digest}.pth") as temporary:
        shutil.copyfile(checkpoint, temporary)
    return digest


@app.command("find_best_configuration")
def find_best_configuration(
    ids: Ids,
    c: Annotated[
        list[str] | None,
        typer.Option("-c", metavar='"CONFIGURATION ..."', help="Configurations. Default: all that are trained."),
    ] = None,
    p: Annotated[
        list[str] | None, typer.Option("-p", metavar='"PLANS ..."', help="Plans. Default: nnUNetPlans")
    ] = None,
    tr: Annotated[
        list[str] | None, typer.Option("-tr", metavar='"TRAINER ..."', help="Trainers. Default: nnUNetTrainer")
    ] = None,
    state: State = None,
    disable_ensembling: Annotated[
        bool, typer.Option("--disable_ensembling", help="Accepted: ensembles are never compared, with or without it.")
    ] = False,
    f: Annotated[
        str | None, _refused("-f", "every case must be held out once at every site: all five folds are compared")
    ] = None,
    np: Annotated[str | None, _refused("-np", "nothing is predicted or scored again")] = None,
    no_overwrite: Annotated[bool, _refused("--no_overwrite", "nothing is predicted or scored again")] = False,
) -> None:
    """Say which trained configuration is best over all sites (nnUNetv2_find_best_configuration), and how to run it."""
    from federation.errors import Code, FednnunetError
    from orchestrator.admin.best import show
    from orchestrator.admin.datasets import find
    from orchestrator.finished import load_all

    datasets, where = find(ids), _state(state, ids)
    trained = [
        one
        for one in load_all(where / "orchestrator" / "studies")
        if one.study.fold == "0-4" and one.zip is not None and set(one.study.sites) == set(datasets.sites)
    ]
    console, chosen = _console(), []
    for trainer in _words(tr, "nnUNetTrainer"):
        for configuration in _words(c, "2d 3d_fullres 3d_lowres 3d_cascade_fullres"):
            for plans in _words(p, "nnUNetPlans"):
                wanted = (trainer, configuration, plans)
                fitting = [
                    one for one in trained if (one.study.trainer, one.study.configuration, one.plans_name) == wanted
                ]
                if fitting:
                    chosen.append(fitting[-1])  # the newest
                elif c is not None:
                    raise FednnunetError(
                        Code.STUDY_NOT_FOUND, f"{'__'.join((trainer, plans, configuration))} with fold 0-4, in {where}",
                        "Train it with fold 0-4 first, or leave it out of -c.",
                    )  # fmt: skip
                else:
                    console.print(f"{trainer}__{plans}__{configuration}: no finished study with fold 0-4, left out")
    if not chosen:
        raise FednnunetError(Code.STUDY_NOT_FOUND, f"none with fold 0-4 in {where}", "Train one with fold 0-4 first.")
    show(chosen, where / "best" / chosen[0].study.dataset, console)


def _words(given: list[str] | None, default: str) -> list[str]:
    """The words of an option that may hold several, and may be given several times."""
    return [word for text in (given or [default]) for word in text.replace(",", " ").split()]


@app.command("run")
def run(
    file: Annotated[Path, typer.Argument(help="The study, YAML.")],
    site: Annotated[
        list[str] | None, typer.Option("--site", metavar="NAME=PATH", help="A site's dataset; once for each site.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="Where everything is kept. Default: fednnunet-state/NAME")
    ] = None,
    device: Device = "cpu",
    np: Np = None,
    npfp: Npfp = None,
) -> None:
    """Run a study from end to end: describe, fingerprint, plan, prepare, train, validate, finish."""
    _need_everything()
    from federation.errors import Code, FednnunetError
    from federation.study import load
    from orchestrator.admin.simulate import SiteOptions, simulate

    study = load(file)
    sites: dict[str, Path] = {}
    for entry in site or []:
        name, _, given = entry.partition("=")
        if not given:
            raise FednnunetError(Code.SITES_MISMATCH, f"--site {entry}: give NAME=PATH")
        if name in sites:
            raise FednnunetError(Code.SITES_MISMATCH, f"--site {name} is given twice")
        sites[name] = Path(given)
    if set(sites) != set(study.sites):
        raise FednnunetError(
            Code.SITES_MISMATCH, f"study: {', '.join(study.sites)}; given: {', '.join(sites) or 'none'}"
        )
    for name, path in sites.items():
        if not path.is_dir():
            raise FednnunetError(Code.DATASET_JSON_MISSING, f"{name}: {path} is not a folder", "Correct --site.")
    for (one, path), (other, same) in itertools.combinations(sites.items(), 2):
        if path.samefile(same):
            raise FednnunetError(
                Code.SITES_MISMATCH,
                f"--site {one}={path} and --site {other}={same} are the same folder",
                "Give each site the folder with its own dataset.",
            )
    options = SiteOptions.for_device(device, len(sites), np, npfp)
    simulate(study, state or Path("fednnunet-state") / study.name, sites, options, _console())


@app.command("demo")
def demo(
    state: Annotated[Path, typer.Option("--state", help="Where everything is kept.")] = Path("demo"),
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of training.")] = 8,
    iterations: Annotated[int, typer.Option("--iterations", help="Iterations in a round.")] = 25,
) -> None:
    """Make three phantom hospitals (synthetic images) and run a whole study on them, on the CPU."""
    _need_everything()
    from federation.study import parse
    from orchestrator.admin.phantom import make_phantom_sites, phantom_study
    from orchestrator.admin.simulate import SiteOptions, simulate

    sites = make_phantom_sites(state / "hospitals")
    study = parse(phantom_study(sites, rounds, iterations), "the demo's study")
    console = _console()
    console.print(f"three phantom hospitals (synthetic images) in {state / 'hospitals'}", soft_wrap=True)
    simulate(study, state / "federation", sites, SiteOptions.for_device("cpu", len(sites)), console)


@app.command("phantoms")
def phantoms(
    folder: Annotated[Path, typer.Argument(help="Where to write DATASET for each hospital, and study.yaml.")],
    rounds: Annotated[int, typer.Option("--rounds", help="Rounds of training in study.yaml.")] = 8,
    iterations: Annotated[int, typer.Option("--iterations", help="Iterations in a round in study.yaml.")] = 25,
) -> None:
    """Write the demo's three phantom hospitals (synthetic images) and a study of them; start nothing."""
    import yaml

    from federation import files
    from federation.console import require
    from orchestrator.admin.phantom import make_phantom_sites, phantom_study

    require("orchestrator", "numpy", "SimpleITK")
    sites = make_phantom_sites(folder)
    text = yaml.safe_dump(phantom_study(sites, rounds, iterations), sort_keys=False)
    files.write_bytes(folder / "study.yaml", text.encode())
    for name, dataset in sites.items():
        typer.echo(f"{name}: {dataset}")
    typer.echo(f"study: {folder / 'study.yaml'}")
