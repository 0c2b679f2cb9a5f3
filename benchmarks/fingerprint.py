"""The federated fingerprint beside nnU-Net's own extractor on the pooled data and the original FednnU-Net's rule.

One command::

    python benchmarks/fingerprint.py --output fingerprint.json

Rules:

- All three see the same files: three sites of generated, shifted CT-like cases, and hippocampus where it is there
  (`--hippocampus`; its three "sites" are one institution, split by intensity scale).
- `nnU-Net` pools the images and runs DatasetFingerprintExtractor as it is, with its 1e8 sampled voxels. `ours` examines
  every site by itself (all checks of Describe included) and merges. `original` runs nnU-Net's extractor at every site
  and takes the case-weighted mean of every statistic.
- Errors are against the exact truth: every foreground voxel of every case, each case weighing the same.
- Each measurement is a process of its own with one thread. CPU time counts its children; memory is that of its
  largest process, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
HIPPOCAMPUS = ROOT.parent / "shared" / "data" / "hippocampus"
STATISTICS = ("mean", "std", "percentile_00_5", "median", "percentile_99_5")
CT_LABELS = {"background": 0, "organ": 1, "tumour": 2}
HIPPOCAMPUS_LABELS = {"background": 0, "anterior": 1, "posterior": 2}


# the data


def generate(folder: Path, cases: int) -> list[Path]:
    """Write three sites of CT-like cases: shifted and scaled as by other scanners and other patients."""
    import numpy as np
    import SimpleITK as sitk

    sites = []
    for site, (offset, spread, slices) in enumerate(((-60.0, 25.0, 5.0), (90.0, 40.0, 3.0), (450.0, 90.0, 1.5))):
        random = np.random.default_rng(site)
        target = folder / f"site_{site}" / "Dataset701_CT"
        for part in ("imagesTr", "labelsTr"):
            (target / part).mkdir(parents=True)
        for number in range(cases):
            shape = tuple(int(size) for size in random.integers((32, 120, 120), (56, 168, 168)))
            image = random.normal(-700, 60, shape)
            label = np.zeros(shape, np.uint8)
            label[8:24, 30:90, 30:90] = 1
            label[12:18, 50:70, 50:70] = 2
            image[label == 1] = random.normal(offset, spread, int((label == 1).sum()))
            image[label == 2] = random.normal(offset + 40, spread / 2, int((label == 2).sum()))
            for part, name, array in (("imagesTr", "_0000", image.astype(np.int16)), ("labelsTr", "", label)):
                written = sitk.GetImageFromArray(array)
                written.SetSpacing((0.8, 0.8, slices))
                sitk.WriteImage(written, str(target / part / f"ct_{site}_{number:03d}{name}.nii.gz"))
        content = {"channel_names": {"0": "CT"}, "labels": CT_LABELS, "numTraining": cases, "file_ending": ".nii.gz"}
        (target / "dataset.json").write_text(json.dumps(content))
        sites.append(target)
    return sites


def listed(sites: list[Path]) -> dict[str, dict[str, Any]]:
    """nnU-Net's `dataset` table over the files of several sites."""
    result = {}
    for number, site in enumerate(sites):
        for label in sorted((site / "labelsTr").glob("*.nii.gz")):
            case = label.name.removesuffix(".nii.gz")
            image = site / "imagesTr" / f"{case}_0000.nii.gz"
            result[f"{number}_{case}"] = {"images": [str(image)], "label": str(label)}
    return result


# the children: one measurement each


def child_truth(sites: list[Path], _: Path) -> dict[str, Any]:
    """Exact statistics of the equal-weight mixture, and medians, from every foreground voxel."""
    import numpy as np
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    reader, values, weights, spacings, shapes = SimpleITKIO(), [], [], [], []
    for case in listed(sites).values():
        image, properties = reader.read_images(case["images"])
        data, label, _box = crop_to_nonzero(image, reader.read_seg(case["label"])[0])
        foreground = data[0][label[0] > 0].astype(np.float64)
        values.append(foreground)
        weights.append(np.full(len(foreground), 1 / len(foreground)))
        spacings.append(properties["spacing"])
        shapes.append(data.shape[1:])
    value, weight = np.concatenate(values), np.concatenate(weights) / len(values)
    order = np.argsort(value)
    heights = np.cumsum(weight[order])
    mean = float((value * weight).sum())
    result = {"mean": mean, "std": float(np.sqrt((weight * (value - mean) ** 2).sum()))}
    for name, q in (("percentile_00_5", 0.005), ("median", 0.5), ("percentile_99_5", 0.995)):
        result[name] = float(value[order][np.searchsorted(heights, q * heights[-1])])
    return {
        "intensity": result,
        "range": float(value.max() - value.min()),
        "spacing": np.median(spacings, 0).tolist(),
        "shape": np.median(shapes, 0).tolist(),
    }


def nnunet_fingerprint(sites: list[Path], folder: Path, dataset: int) -> dict[str, Any]:
    """nnU-Net's extractor over the files of `sites`, pooled in one dataset."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    name = f"Dataset{dataset}_Benchmark"
    raw = folder / "raw" / name
    raw.mkdir(parents=True, exist_ok=True)
    content = json.loads((sites[0] / "dataset.json").read_text())
    cases = listed(sites)
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": len(cases), "dataset": cases}))
    extractor = DatasetFingerprintExtractor(dataset, 1)
    extractor.show_progress_bar = False
    extractor.run(overwrite_existing=True)
    result: dict[str, Any] = json.loads((folder / "preprocessed" / name / "dataset_fingerprint.json").read_text())
    return result


def nnunet_plans(fingerprint: dict[str, Any], cases: int, folder: Path, dataset: int) -> dict[str, Any]:
    """nnU-Net's ExperimentPlanner on a fingerprint, with this numTraining."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    name = f"Dataset{dataset}_Benchmark"
    path = folder / "raw" / name / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "numTraining": cases}))
    (folder / "preprocessed" / name / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    planner = ExperimentPlanner(dataset)
    planner.plan_experiment()
    result: dict[str, Any] = json.loads((folder / "preprocessed" / name / "nnUNetPlans.json").read_text())
    (folder / "preprocessed" / name / "nnUNetPlans.json").unlink()
    return result


def child_nnunet(sites: list[Path], folder: Path) -> dict[str, Any]:
    fingerprint = nnunet_fingerprint(sites, folder, 701)
    measured = usage()
    return {
        **measured,
        "fingerprint": fingerprint,
        "plans": [nnunet_plans(fingerprint, len(listed(sites)), folder, 701)],
    }


def child_original(sites: list[Path], folder: Path) -> dict[str, Any]:
    """The original's rule: the case-weighted mean of every statistic; each site plans with its own numTraining."""
    parts = [nnunet_fingerprint([site], folder, 710 + number) for number, site in enumerate(sites)]
    counts = [len(part["spacings"]) for part in parts]
    key = "foreground_intensity_properties_per_channel"
    pooled: dict[str, Any] = {
        "spacings": [spacing for part in parts for spacing in part["spacings"]],
        "shapes_after_crop": [shape for part in parts for shape in part["shapes_after_crop"]],
    }

    def mean(values: list[float]) -> float:
        return sum(value * count for value, count in zip(values, counts, strict=True)) / sum(counts)

    pooled["median_relative_size_after_cropping"] = mean(
        [part["median_relative_size_after_cropping"] for part in parts]
    )
    pooled[key] = {
        channel: {name: mean([part[key][channel][name] for part in parts]) for name in parts[0][key][channel]}
        for channel in parts[0][key]
    }
    measured = usage()
    plans = [nnunet_plans(pooled, count, folder, 710 + number) for number, count in enumerate(counts)]
    return {**measured, "fingerprint": pooled, "plans": plans}


def child_ours(sites: list[Path], folder: Path) -> dict[str, Any]:
    from appliance.worker.dataset import examine
    from federation.fingerprint import merge, to_nnunet
    from federation.study import Study

    content = json.loads((sites[0] / "dataset.json").read_text())
    study = Study(
        name="benchmark",
        dataset="Dataset701_Benchmark",
        sites=["a", "b", "c"],
        channel_names=content["channel_names"],
        labels=content["labels"],
        accept_float_labels=True,
        fold="all",
    )
    found = [examine(site, study, 1).fingerprint(1) for site in sites]
    sizes = [len(fingerprint.model_dump_json()) for fingerprint in found]
    pooled = merge(found)
    fingerprint = to_nnunet(pooled)
    measured = usage()
    from orchestrator.planning import plan

    plans = plan(pooled, study, folder / "plan").plans
    return {**measured, "fingerprint": fingerprint, "plans": [plans], "bytes_per_site": sizes}


CHILDREN = {"truth": child_truth, "nnunet": child_nnunet, "original": child_original, "ours": child_ours}


def usage() -> dict[str, float]:
    """Wall and CPU seconds since the process started, and the memory of its largest process, in MiB."""
    import psutil

    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    scale = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return {
        "wall_s": time.time() - psutil.Process().create_time(),
        "cpu_s": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "peak_mib": max(own.ru_maxrss, children.ru_maxrss) / scale,
    }


def measure(what: str, sites: list[Path]) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="fednnunet-benchmark-") as place:
        folder = Path(place)
        (folder / "preprocessed").mkdir()
        (folder / "request.json").write_text(json.dumps({"what": what, "sites": [str(site) for site in sites]}))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": "1",
            "nnUNet_n_proc_DA": "1",
            "nnUNet_raw": str(folder / "raw"),
            "nnUNet_preprocessed": str(folder / "preprocessed"),
            "nnUNet_results": str(folder / "results"),
        }
        done = subprocess.run(
            [sys.executable, __file__, "--child", place],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{what} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text())
        return answer


def child(folder: Path) -> None:
    request = json.loads((folder / "request.json").read_text())
    answer = CHILDREN[request["what"]]([Path(site) for site in request["sites"]], folder)
    (folder / "answer.json").write_text(json.dumps(answer))


# the comparison


def differences(ours: Any, reference: Any, path: str = "") -> list[str]:
    """Where two plans differ, but for the dataset's name and the intensities."""
    if path in ("dataset_name", "foreground_intensity_properties_per_channel"):
        return []
    if isinstance(ours, dict) and isinstance(reference, dict):
        found = []
        for key in sorted(set(ours) | set(reference)):
            place = f"{path}.{key}" if path else key
            found += differences(ours.get(key), reference.get(key), place)
        return found
    return [] if ours == reference else [f"{path}: {ours} instead of {reference}"]


def compare(sites: list[Path]) -> dict[str, Any]:
    """All measurements over one set of sites, with their errors against the truth."""
    import numpy as np

    truth = measure("truth", sites)
    result: dict[str, Any] = {"cases": [len(listed([site])) for site in sites], "truth": truth}
    reference: dict[str, Any] = {}
    for name in ("nnunet", "ours", "original"):
        measured = measure(name, sites)
        fingerprint, plans = measured.pop("fingerprint"), measured.pop("plans")
        if name == "nnunet":
            reference = plans[0]
        found = fingerprint["foreground_intensity_properties_per_channel"]["0"]
        result[name] = {
            **measured,
            "intensity": {key: found[key] for key in STATISTICS},
            "relative_error": {key: found[key] / truth["intensity"][key] - 1 for key in ("mean", "std")},
            "error_of_range": {
                key: (found[key] - truth["intensity"][key]) / truth["range"]
                for key in STATISTICS
                if key not in ("mean", "std")
            },
            "median_spacing_exact": np.median(fingerprint["spacings"], 0).tolist() == truth["spacing"],
            "median_shape_exact": np.median(fingerprint["shapes_after_crop"], 0).tolist() == truth["shape"],
            "plan_differences": sorted({line for plan in plans for line in differences(plan, reference)}),
        }
    return result


def show(title: str, result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{title}: {' + '.join(map(str, result['cases']))} cases", title_justify="left")
    for column in ("", "truth", "nnU-Net, pooled", "ours, federated", "original's rule"):
        table.add_column(column, justify="left" if not column else "right")
    names = ("nnunet", "ours", "original")
    for key in STATISTICS:
        cells = []
        for name in names:
            part = result[name]
            error = part["relative_error"].get(key, part["error_of_range"].get(key))
            unit = "" if key in part["relative_error"] else " of range"
            cells.append(f"{part['intensity'][key]:.6g} ({error:+.4%}{unit})")
        table.add_row(key, f"{result['truth']['intensity'][key]:.6g}", *cells)
    table.add_section()
    for key, label in (("median_spacing_exact", "median spacing"), ("median_shape_exact", "median shape")):
        table.add_row(label, "", *("exact" if result[name][key] else "differs" for name in names))
    table.add_row(
        "plan",
        "",
        "reference",
        *(
            "equal" if not result[name]["plan_differences"] else f"{len(result[name]['plan_differences'])} differences"
            for name in names[1:]
        ),
    )
    table.add_section()
    for key, label, unit in (("wall_s", "wall", "s"), ("cpu_s", "CPU", "s"), ("peak_mib", "peak memory", "MiB")):
        table.add_row(label, "", *(f"{result[name][key]:.1f} {unit}" for name in names))
    console = Console(width=140)
    console.print(table)
    for name in names[1:]:
        for line in result[name]["plan_differences"]:
            console.print(f"  {name}: {line}", highlight=False)
    console.print(f"  bytes that leave each site: {result['ours']['bytes_per_site']}\n", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"), help="where the JSON goes")
    parser.add_argument("--hippocampus", type=Path, default=HIPPOCAMPUS, help="folder of hippo_a, hippo_b, hippo_c")
    parser.add_argument("--cases", type=int, default=8, help="generated cases at each of the three sites")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    sys.path.insert(0, str(ROOT))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="fednnunet-benchmark-") as place:
        sites = generate(Path(place) / "n", arguments.cases)
        result["generated"] = compare(sites)
        show("Generated, shifted CT-like sites", result["generated"])
        more = generate(Path(place) / "4n", 4 * arguments.cases)
        memory: dict[str, list[float]] = {}
        for name in ("nnunet", "ours"):
            memory[name] = [result["generated"][name]["peak_mib"], measure(name, more)["peak_mib"]]
        result["peak_mib_at_n_and_4n_cases"] = memory
        for name, (few, many) in memory.items():
            print(f"peak memory of {name}: {few:.0f} MiB at {3 * arguments.cases} cases, {many:.0f} MiB at four times")
    if (arguments.hippocampus / "hippo_a").is_dir():
        folders = [arguments.hippocampus / f"hippo_{site}" / "Dataset004_Hippocampus" for site in "abc"]
        result["hippocampus"] = compare(folders)
        show("Hippocampus (one institution, split by intensity scale)", result["hippocampus"])
    else:
        print("hippocampus is not there: give its folder with --hippocampus")
    arguments.output.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
    print(f"written: {arguments.output.name}")


if __name__ == "__main__":
    main()
