"""Dice of local-only, federated (AsymFedAvg, FFE) and centralized training, at equal numbers of iterations, real data.

One command::

    python benchmarks/accuracy.py --seeds 3 --output accuracy.json

Rules:

- Every model is a study through the same code: `local` is a study with one site, `centralized` a study with one site
  whose dataset is the union of all (symbolic links in a temporary folder), `FFE` a study with all sites: pooled
  fingerprint, one plan, weighted mean; `AsymFedAvg` the same study with each site's own plan (`layers: groups`). The
  variants are the FFE study with another aggregation or another rule at the sites.
- The federation of a study runs in one process (tests/in_process.py): conductor, journal, spools, workers and nnU-Net
  are real, Flower is left out, which carries the same bytes and would only add its processes to the machine's load.
- Equal iterations means rounds x iterations optimizer steps along each model's own path: so many at the one site of
  local and centralized training, and so many at each site in federated training. All sites together thus compute as
  many times more steps for a federated model as there are sites, and see as many times more patches; batch size, patch
  size and the schedule of the learning rate follow the same rules for all. Every case trains (fold `all`).
- Every model is judged on every site's labelsTs, which no training sees (AsymFedAvg: each site's own model on its own).
  The score is nnU-Net's Dice: the mean over the foreground labels of a case, then over the cases of a site; tables show
  mean and standard deviation over the seeds.
- The network is the small one for CPUs (SmallUNetPlanner) and training is short: figures compare the ways at this
  setting, and say nothing about what nnU-Net reaches on these data.
- lung_xray is three hospitals of three countries. The three "sites" of hippocampus are one institution, split by
  intensity scale.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
SEPARATOR = "__"  # between site and case in the name of a linked file


@dataclass(frozen=True)
class Dataset:
    """One dataset of several sites, and how a study takes it."""

    title: str
    folders: Mapping[str, str]
    study: Mapping[str, Any]
    rounds: int
    iterations: int


# At spacing 2 a patch of the small network covers the whole image, and Adam leaves the plateau of the first hundred
# iterations sooner than SGD does: without both, 250 iterations give little more than a threshold on grey values.
DATASETS = {
    "lung_xray": Dataset(
        "Lungs in chest X-rays: three hospitals",
        {site: f"lung_xray/{site}/Dataset101_LungCXR" for site in ("montgomery_us", "shenzhen_cn", "jsrt_jp")},
        {
            "dataset": "Dataset101_LungCXR",
            "channel_names": {"0": "xray"},
            "labels": {"background": 0, "lung": 1},
            "file_ending": ".png",
            "configuration": "2d",
            "overwrite_target_spacing": [999.0, 2.0, 2.0],
            "trainer": "nnUNetTrainerAdam",
        },
        rounds=10,
        iterations=20,
    ),
    # One institution split by intensity scale (medians about 61, 553, 244000): pseudo-sites, no hospitals.
    "hippocampus": Dataset(
        'Hippocampus in MRI: one institution, its three "sites" are a split by intensity scale',
        {f"hippo_{part}": f"hippocampus/hippo_{part}/Dataset004_Hippocampus" for part in "abc"},
        {
            "dataset": "Dataset004_Hippocampus",
            "channel_names": {"0": "MRI"},
            "labels": {"background": 0, "anterior": 1, "posterior": 2},
            "file_ending": ".nii.gz",
            "configuration": "3d_fullres",
            "accept_float_labels": True,
            "overwrite_target_spacing": [2.0, 2.0, 2.0],
            "trainer": "nnUNetTrainerAdam",
        },
        rounds=16,
        iterations=25,
    ),
}


# Each differs from FFE by these keys of the study alone.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "FedAvgM": {"aggregation": {"method": "fedavgm", "server_momentum": 0.5}},
    "FedAdagrad": {"aggregation": {"method": "fedadagrad"}},
    "FedYogi": {"aggregation": {"method": "fedyogi"}},
    "FedAdam": {"aggregation": {"method": "fedadam"}},
    "FedProx 0.01": {"proximal_mu": 0.01},
    "norm kept local": {"keep_local": ["norm"]},
    "momentum reset": {"momentum": "reset"},
}
# The same for what travels, with as many seeds as FFE itself.
WIRES: Mapping[str, Mapping[str, Any]] = {"wire half": {"wire": "half"}, "wire int8": {"wire": "int8"}}


# the data of one model


def link_site(target: Path, training: Mapping[str, Path], test: Mapping[str, Path]) -> None:
    """Make a dataset in nnU-Net's raw format of symbolic links, each named after its site.

    Parameters
    ----------
    target : Path
        The new `DatasetNNN_Name`.
    training, test : mapping of str to Path
        Datasets by site: whose imagesTr train, and whose labelled imagesTs are scored.
    """
    first = next(iter(training.values()))
    content = json.loads((first / "dataset.json").read_text())
    ending, cases = content["file_ending"], 0
    for part, sources in (("Tr", training), ("Ts", test)):
        for kind in ("images", "labels"):
            (target / f"{kind}{part}").mkdir(parents=True)
        for site, folder in sources.items():
            for label in sorted((folder / f"labels{part}").glob(f"*{ending}")):
                case = label.name.removesuffix(ending)
                (target / f"labels{part}" / f"{site}{SEPARATOR}{label.name}").symlink_to(label)
                for image in sorted((folder / f"images{part}").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}")):
                    (target / f"images{part}" / f"{site}{SEPARATOR}{image.name}").symlink_to(image)
                cases += part == "Tr"
    keep = {key: content[key] for key in ("channel_names", "labels", "file_ending")}
    (target / "dataset.json").write_text(json.dumps({**keep, "numTraining": cases}))


# the child: one model


def child(folder: Path) -> None:
    """Run one study and write every test case's Dice."""
    from in_process import Federation

    from federation.study import parse

    request = json.loads((folder / "request.json").read_text())
    sources = {site: Path(path) for site, path in request["sources"].items()}
    data = {}
    for name, trains in request["sites"].items():
        data[name] = folder / "data" / name / request["study"]["dataset"]
        judged = {site: sources[site] for site in request["judged"][name]}
        link_site(data[name], {site: sources[site] for site in trains}, judged)
    study = parse({**request["study"], "sites": sorted(data)})
    federation = Federation(folder / "federation", data)
    started = time.monotonic()
    outcome = federation.run(study)
    names = {value: name for name, value in study.labels.items() if value}
    dice: dict[str, dict[str, dict[str, float]]] = {}
    for name in study.sites:
        scored = federation.model_at_site(name, study) / "fold_all" / "test" / "summary.json"
        for case in json.loads(scored.read_text())["metric_per_case"]:
            site, _, case_name = Path(case["prediction_file"]).name.partition(SEPARATOR)
            values = {names[int(label)]: metrics["Dice"] for label, metrics in case["metrics"].items()}
            dice.setdefault(site, {})[case_name] = values
    expected = {site for judged in request["judged"].values() for site in judged}
    if set(dice) != expected:
        raise SystemExit(f"scores of some test sets are missing: {sorted(expected - set(dice))}")
    (layers,) = outcome.events("layers")
    answer = {
        "dice": dice,
        "wall_s": round(time.monotonic() - started, 1),
        "shared": {site: round(part / whole, 4) for site, (part, whole) in layers["shared"].items()},
    }
    (folder / "answer.json").write_text(json.dumps(answer))


def train(
    study: Mapping[str, Any],
    sources: Mapping[str, Path],
    sites: Mapping[str, Sequence[str]],
    judged: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Train one model in a process of its own.

    Parameters
    ----------
    sites : mapping of str to sequence of str
        For each site of the study, whose training cases it holds.
    judged : mapping of str to sequence of str
        For each site of the study, whose test cases it is judged on.
    """
    with tempfile.TemporaryDirectory(prefix="fednnunet-benchmark-") as place:
        folder = Path(place)
        request = {
            "study": dict(study),
            "sources": {site: str(path) for site, path in sources.items()},
            "sites": dict(sites),
            "judged": {site: list(others) for site, others in judged.items()},
        }
        (folder / "request.json").write_text(json.dumps(request))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--child", place],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{study['name']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        print(f"{study['name']}: {answer['wall_s']:.0f} s", flush=True)
        return answer


# the comparison


def site_mean(cases: Mapping[str, Mapping[str, float]]) -> float:
    """Mean Dice over the labels of a case, then over cases."""
    means = [sum(values.values()) / len(values) for values in cases.values()]
    return sum(means) / len(means)


def compare(
    name: str,
    data: Path,
    rounds: int | None,
    iterations: int | None,
    seeds: int,
    variant_seeds: int,
    jobs: int,
    earlier: Mapping[str, Any],
) -> dict[str, Any]:
    """Every model of one dataset, and its scores on every site; what `earlier` has at this setting is kept."""
    dataset = DATASETS[name]
    sources = {site: (data / path).resolve() for site, path in dataset.folders.items()}
    rounds, iterations = rounds or dataset.rounds, iterations or dataset.iterations
    everyone = {site: [site] for site in sources}
    models: dict[str, tuple[dict[str, list[str]], Mapping[str, Any], int]] = {
        "FFE": (everyone, {}, seeds),
        "AsymFedAvg": (everyone, {"mode": "asymfedavg"}, seeds),
        "centralized": ({"everything": list(sources)}, {}, seeds),
        **{f"local {site}": ({site: [site]}, {}, seeds) for site in sources},
        **{wire: (everyone, changes, seeds) for wire, changes in WIRES.items()},
        **{variant: (everyone, changes, variant_seeds) for variant, changes in VARIANTS.items()},
    }
    common = {
        **dataset.study,
        "planner": "SmallUNetPlanner",
        "fold": "all",
        "rounds": rounds,
        "iterations_per_epoch": iterations,
        "validation_iterations_per_epoch": 1,
    }
    setting = {"rounds": rounds, "iterations": iterations, "study": common}
    kept = earlier if setting.items() <= earlier.items() else {}
    known = kept.get("dice", {})
    answers: dict[tuple[str, int], dict[str, Any]] = {}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            (model, seed): pool.submit(
                train,
                {
                    **common,
                    **changes,
                    "name": f"{name}-{model.replace(' ', '-').replace('.', '-')}-{seed}",
                    "seed": seed,
                },
                sources,
                sites,
                _judged(model, sites, list(sources), seed),
            )
            for seed in range(1, max(seeds, variant_seeds) + 1)
            for model, (sites, changes, times) in models.items()
            if seed <= times and not known.get(model)
        }
        answers = {key: future.result() for key, future in futures.items()}
    scores = known | {
        model: {
            site: [
                round(site_mean(answers[model, seed]["dice"][site]), 4)
                for seed in range(1, times + 1)
                if site in answers[model, seed]["dice"]
            ]
            for site in sources
        }
        for model, (_, _, times) in models.items()
        if times and not known.get(model)
    }
    return {
        "title": dataset.title,
        "rounds": rounds,
        "iterations": iterations,
        "optimizer_steps": rounds * iterations,
        "seeds": kept.get("seeds", seeds),
        "variant_seeds": variant_seeds,
        "study": common,
        "variants": VARIANTS,
        "training_cases": {
            site: len(list((folder / "labelsTr").glob(f"*{dataset.study['file_ending']}")))
            for site, folder in sources.items()
        },
        "test_cases": kept.get("test_cases") or {site: len(answers["FFE", 1]["dice"][site]) for site in sources},
        "shared_by_asymfedavg": kept.get("shared_by_asymfedavg") or answers["AsymFedAvg", 1]["shared"],
        "dice": scores,
        "wall_s": kept.get("wall_s", {})
        | {f"{model}, seed {seed}": answer["wall_s"] for (model, seed), answer in answers.items()},
    }


def _judged(model: str, sites: Mapping[str, Sequence[str]], everyone: list[str], seed: int) -> dict[str, list[str]]:
    """On whose test cases each site of a study is judged: a local model on all of them with the first seed alone."""
    if model == "centralized" or (model.startswith("local") and seed == 1):
        return dict.fromkeys(sites, everyone)
    return {site: list(own) for site, own in sites.items()}


def cell(values: Sequence[float]) -> str:
    """Mean over seeds, and their standard deviation where there is more than one."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def show(result: Mapping[str, Any]) -> None:
    """The table in the form of the paper's Tables 7-9, and each local model on the others' test sets."""
    from rich.console import Console
    from rich.table import Table

    dice, sites = result["dice"], list(result["test_cases"])

    def seed_means(rows: Sequence[Sequence[float]]) -> list[float]:
        return [sum(values) / len(values) for values in zip(*rows, strict=True)]

    console = Console(width=120)
    heading = (
        f"{result['title']}. Dice after {result['rounds']} x {result['iterations']} = {result['optimizer_steps']} "
        f"iterations along each model's path; mean ± standard deviation of"
    )
    local = {site: dice[f"local {site}"][site] for site in sites}
    ways = {"local": local, **{way: dice[way] for way in ("AsymFedAvg", "FFE", "centralized")}}
    variants = {name: dice[name] for name in result["variants"] if name in dice}
    wires = {name: dice[name] for name in ("FFE", *WIRES)}
    shown = ((ways, result["seeds"]), (wires, result["seeds"]), (variants, result["variant_seeds"]))
    for columns, seeds in shown:
        if not columns:
            continue
        table = Table(title=f"{heading} {seeds} seed(s)", title_justify="left")
        table.add_column("test set of (train / test cases)")
        for column in columns:
            table.add_column(column, justify="right")
        for site in sites:
            numbers = f"{site} ({result['training_cases'][site]} / {result['test_cases'][site]})"
            table.add_row(numbers, *(cell(rows[site]) for rows in columns.values()))
        table.add_section()
        means = (cell(seed_means([rows[site] for site in sites])) for rows in columns.values())
        table.add_row("mean of the sites", *means)
        console.print(table)
    shared = ", ".join(f"{site} {100 * part:.0f} %" for site, part in result["shared_by_asymfedavg"].items())
    console.print(f"AsymFedAvg, parameters that a site shares with another: {shared}")
    crossed = Table(title="Each local model on every test set (the first seed)", title_justify="left")
    crossed.add_column("test set of")
    for site in sites:
        crossed.add_column(f"local {site}", justify="right")
    for judged in sites:
        crossed.add_row(judged, *(cell(dice[f"local {site}"][judged][:1]) for site in sites))
    crossed.add_section()
    crossed.add_row(
        "mean of the sites",
        *(cell(seed_means([dice[f"local {site}"][judged][:1] for judged in sites])) for site in sites),
    )
    console.print(crossed)
    console.print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dataset", choices=DATASETS, action="append", help="default: all of them")
    parser.add_argument("--rounds", type=int, help="rounds of every study; default: the dataset's own")
    parser.add_argument("--iterations", type=int, help="iterations in a round; default: the dataset's own")
    parser.add_argument("--seeds", type=int, default=1, help="how many times the four ways are trained")
    parser.add_argument("--variant-seeds", type=int, default=1, help="how many times the variants of FFE are trained")
    parser.add_argument("--jobs", type=int, default=2, help="models trained at the same time")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of lung_xray and hippocampus")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).with_suffix(".json"),
        help="where the JSON goes; what it holds of other datasets, and of this setting, is kept",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        child(arguments.child)
        return
    if not arguments.data.is_dir():
        print("the real data is not there: give its folder with --data")
        return
    packages = ("torch", "nnunetv2", "flwr")
    earlier = json.loads(arguments.output.read_text())["datasets"] if arguments.output.exists() else {}
    result: dict[str, Any] = {
        "machine": {"cores": os.cpu_count(), "accelerator": "none: trained on the CPU, one thread for each site"},
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "datasets": earlier,
    }
    for name in arguments.dataset or list(DATASETS):
        started = time.monotonic()
        result["datasets"][name] = compare(
            name,
            arguments.data,
            arguments.rounds,
            arguments.iterations,
            arguments.seeds,
            arguments.variant_seeds,
            arguments.jobs,
            earlier.get(name, {}),
        )
        show(result["datasets"][name])
        result["datasets"][name]["all_s"] = round(time.monotonic() - started)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {arguments.output.name}")


if __name__ == "__main__":
    main()
