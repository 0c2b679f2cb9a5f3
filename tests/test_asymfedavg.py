"""AsymFedAvg over sites whose plans really differ: what is shared, what stays, and that nothing is lost on the way."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import fednnunet, good, phantom_study
from in_process import Federation, Outcome

from federation import files
from federation.errors import Code, FednnunetError
from federation.study import Study, parse
from federation.tasks import Network, Task
from federation.weights import Spec, TensorFile
from orchestrator.admin.phantom import PhantomSite, make_phantom_sites
from orchestrator.aggregation.shared_layers import SharedLayers, check_networks, share

pytestmark = pytest.mark.slow

SITES = {
    "iso": PhantomSite("Dataset311_Phantom", 6, 2, shape=(30, 32, 32)),
    "small": PhantomSite("Dataset312_Phantom", 5, 2, shape=(20, 20, 20), spacing=(2.0, 2.0, 2.0)),
    "thick": PhantomSite("Dataset313_Phantom", 7, 2, shape=(12, 40, 40), spacing=(4.0, 1.0, 1.0)),
}


def asym_study(**changes: Any) -> Study:
    values = {"rounds": 2, "iterations_per_epoch": 2, "validation_iterations_per_epoch": 1, "mode": "asymfedavg"}
    return parse(phantom_study(sorted(SITES), **{**values, **changes}))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_phantom_sites(tmp_path_factory.mktemp("asym_data"), SITES)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, data: dict[str, Path]) -> Federation:
    return Federation(tmp_path_factory.mktemp("asym"), data)


@pytest.fixture(scope="module")
def outcome(federation: Federation) -> Outcome:
    return federation.run(asym_study())


def layers_of(outcome: Outcome) -> SharedLayers:
    return SharedLayers.from_json(files.read_json(outcome.folder / "layers.json"))


def network_of(outcome: Outcome, site: str) -> dict[str, Any]:
    answer = files.read_json(outcome.folder / "answers" / "prepare" / f"{site}.json")
    return dict(answer["preparation"]["network"])


def model_of(federation: Federation, study: Study, site: str) -> dict[str, np.ndarray]:
    """The unique tensors of a site's native model."""
    import torch

    folder = federation.model_at_site(site, study)
    loaded = torch.load(folder / "fold_all" / "checkpoint_final.pth", weights_only=True)["network_weights"]
    return {
        name: tensor.numpy()
        for name, tensor in loaded.items()
        if not name.startswith("decoder.encoder.") and ".all_modules." not in name
    }


def test_each_site_has_its_own_plan_and_no_fingerprint_leaves(outcome: Outcome) -> None:
    networks = {site: network_of(outcome, site) for site in SITES}
    assert networks["thick"]["spacing"] == [4.0, 1.0, 1.0]
    assert networks["small"]["spacing"] == [2.0, 2.0, 2.0]
    assert len({tuple(network["patch_size"]) for network in networks.values()}) == 3
    assert networks["thick"]["architecture"]["arch_kwargs"]["n_stages"] == 4
    assert networks["iso"]["architecture"]["arch_kwargs"]["n_stages"] == 3
    assert {line["key"] for line in outcome.events("asked")} & {"fingerprint"} == set()
    for path in outcome.folder.rglob("*.json"):
        text = path.read_text()
        for secret in ("foreground_intensity", "shapes_after_crop", "median_image_size", "percentile"):
            assert secret not in text, path


def test_what_is_shared_is_what_two_models_have_by_name_and_shape(federation: Federation, outcome: Outcome) -> None:
    layers = layers_of(outcome)
    models = {site: model_of(federation, outcome.study, site) for site in SITES}
    for site, model in models.items():
        expected = {
            name
            for name, tensor in model.items()
            if any(name in other and other[name].shape == tensor.shape for at, other in models.items() if at != site)
        }
        assert set(layers.names[site].values()) == expected
        assert layers.totals[site] == sum(tensor.size for tensor in model.values())
    assert layers.shared("thick") < layers.totals["thick"]
    assert layers.shared("iso") == layers.totals["iso"], "iso and small have the same network"
    (line,) = outcome.events("layers")
    assert line["shared"]["thick"] == [layers.shared("thick"), layers.totals["thick"]]


def test_shared_layers_are_the_same_at_their_sites_and_the_others_were_never_here(
    federation: Federation, outcome: Outcome
) -> None:
    layers, store = layers_of(outcome), TensorFile(outcome.weights(2))
    models = {site: model_of(federation, outcome.study, site) for site in SITES}
    for site, names in layers.names.items():
        for key, name in names.items():
            np.testing.assert_array_equal(models[site][name], store.read(key))
    own = set(models["thick"]) - set(layers.names["thick"].values())
    assert own
    for path in outcome.folder.rglob("rounds/**/*.safetensors"):
        for name, spec in TensorFile(path).specs.items():
            bare = name.partition("@")[0]
            assert bare not in own or spec.shape != models["thick"][bare].shape, f"{name} in {path.name}"


def test_the_orchestrator_keeps_what_is_shared_and_says_so(outcome: Outcome) -> None:
    import zipfile

    assert outcome.exported["whole"] is False
    assert outcome.zip.name.endswith("-shared.zip")
    with zipfile.ZipFile(outcome.zip) as archive:
        assert "This is not a model" in archive.read("README.txt").decode()
        assert {"layers.json", "scores.json", "fold_all/shared.safetensors"} <= set(archive.namelist())
        assert archive.read("fold_all/shared.safetensors") == outcome.weights(2).read_bytes()


def test_each_sites_model_is_nnunets_own_and_is_what_was_scored(
    federation: Federation, outcome: Outcome, data: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    model = federation.model_at_site("thick", outcome.study)
    predictor.initialize_from_trained_model_folder(str(model), ("all",))
    case = sorted((data["thick"] / "imagesTs").glob("*_0000.nii.gz"))[0]
    name = case.name.removesuffix("_0000.nii.gz")
    predictor.predict_from_files_sequential([[str(case)]], [str(tmp_path / name)])
    scored = model / "fold_all" / "test" / f"{name}.nii.gz"
    assert (tmp_path / f"{name}.nii.gz").read_bytes() == scored.read_bytes()
    assert outcome.scores("thick").test_cases == 2


@pytest.mark.long
def test_common_shares_only_what_every_site_has(federation: Federation, outcome: Outcome) -> None:
    common = federation.run(asym_study(layers="common", rounds=1))
    layers = layers_of(common)
    assert all(len(layers.holders(key)) == 3 for key in layers.specs)
    assert layers.parameters(layers.specs) == layers.common == layers_of(outcome).common
    assert layers.shared("iso") < layers.totals["iso"]


def test_a_study_cut_short_goes_on_with_the_layers_that_stayed_at_the_sites(
    outcome: Outcome, federation: Federation, data: dict[str, Path], tmp_path: Path
) -> None:
    """Workers, conductor and all are thrown away after round 1; the end is the same, bit for bit."""
    study = asym_study()

    class CutError(Exception):
        pass

    def cut(site: str, task: Task) -> bool:
        if task.round == 2:
            raise CutError
        return False

    with pytest.raises(CutError):
        Federation(tmp_path, data).run(study, cut)
    again = Federation(tmp_path, data)
    second = again.run(study)
    assert second.weights(2).read_bytes() == outcome.weights(2).read_bytes()
    for site in SITES:
        models = [model_of(which, study, site) for which in (federation, again)]
        for name, tensor in models[0].items():
            np.testing.assert_array_equal(models[1][name], tensor, err_msg=f"{site} {name}")


@pytest.mark.long
def test_half_differences_with_a_personal_head_train_too(federation: Federation) -> None:
    done = federation.run(asym_study(wire="half", keep_local=["seg_head"], rounds=3))
    layers = layers_of(done)
    assert not any("seg_layers" in key for key in layers.specs)
    answers = [line for line in done.events("answered") if line["key"].startswith("train")]
    sizes = {line["site"]: line["nbytes"] for line in answers}
    for site, size in sizes.items():
        assert size < 2.3 * layers.shared(site) + 20_000, "float16, and the shared layers alone"
    asked = {line["key"]: line["nbytes"] for line in done.events("asked") if line["site"] == "iso"}
    assert asked["train-fold_all-0003"] < 0.7 * asked["train-fold_all-0001"], "the way down is a difference, too"


def test_two_dimensional_images_in_a_study_of_volumes_are_refused_by_name(tmp_path: Path) -> None:
    sites = make_phantom_sites(
        tmp_path / "data",
        {
            "flat": PhantomSite("Dataset321_Phantom", 5, 0, shape=(3, 32, 32)),
            "iso": PhantomSite("Dataset322_Phantom", 5, 0, shape=(24, 24, 24)),
        },
    )
    import SimpleITK as sitk

    for path in (*sites["flat"].glob("images*/*"), *sites["flat"].glob("labels*/*")):
        middle = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[1:2]
        sitk.WriteImage(sitk.GetImageFromArray(middle), str(path))
    for label in sites["flat"].glob("labels*/*"):
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
        values[0, 2:6, 2:6] = 1
        values[0, 3, 3] = 2
        sitk.WriteImage(sitk.GetImageFromArray(values), str(label))
    study = parse(phantom_study(["flat", "iso"], mode="asymfedavg"))
    with pytest.raises(FednnunetError) as error:
        Federation(tmp_path / "federation", sites).run(study)
    assert error.value.code is Code.SITE_FAILED
    assert f"flat: FNU-{Code.CONFIGURATION_MISSING.number}" in error.value.found
    assert "iso" not in error.value.found


def test_another_number_of_channels_is_refused_before_anything_is_planned(
    tmp_path: Path, data: dict[str, Path]
) -> None:
    sites = {"iso": data["iso"], "two": tmp_path / "two"}
    shutil.copytree(data["small"], sites["two"])
    description = json.loads((sites["two"] / "dataset.json").read_text())
    description["channel_names"] = {"0": "synthetic", "1": "contrast"}
    (sites["two"] / "dataset.json").write_text(json.dumps(description))
    study = parse(phantom_study(["iso", "two"], mode="asymfedavg"))
    with pytest.raises(FednnunetError) as error:
        Federation(tmp_path / "federation", sites).run(study)
    assert f"two: FNU-{Code.CHANNELS_DIFFER.number}" in error.value.found


# the rule itself


def specs(**shapes: tuple[int, ...]) -> dict[str, Spec]:
    return {name: Spec(np.dtype("<f4"), shape) for name, shape in shapes.items()}


NETWORKS = {
    "iso": specs(a=(2, 3), b=(4,), c=(5,)),
    "small": specs(a=(2, 3), b=(4, 4), c=(5,)),
    "thick": specs(a=(2, 3), b=(4, 4), c=(6,)),
}


def test_a_name_may_stand_for_several_groups() -> None:
    layers = share({**NETWORKS, "large": specs(a=(2, 3), b=(4,), c=(7,))}, asym_study())
    groups = {key: layers.holders(key) for key in layers.specs}
    assert groups == {
        "a@2x3": ("iso", "large", "small", "thick"),
        "b@4": ("iso", "large"),
        "b@4x4": ("small", "thick"),
        "c@5": ("iso", "small"),
    }
    assert layers.common == 6
    assert SharedLayers.from_json(json.loads(json.dumps(layers.to_json()))) == layers


def test_ffe_shares_all_of_one_network_even_at_one_site() -> None:
    study = parse(phantom_study(["iso"]))
    layers = share({"iso": NETWORKS["iso"]}, study)
    assert layers.names["iso"] == {"a": "a", "b": "b", "c": "c"}
    assert math.isclose(layers.shared("iso") / layers.totals["iso"], 1.0)


def test_a_site_that_would_share_nothing_is_named() -> None:
    networks = {**NETWORKS, "other": specs(a=(9,))}
    with pytest.raises(FednnunetError) as error:
        share(networks, asym_study())
    assert error.value.code is Code.NOTHING_SHARED
    assert "other" in error.value.found
    assert "iso" not in error.value.found
    with pytest.raises(FednnunetError):
        share(networks, asym_study(layers="common"))


def a_network(patch: list[int], kind: str = "PlainConvUNet") -> Network:
    architecture = {"network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}"}
    return Network(plans_name="p", architecture=architecture, patch_size=patch, spacing=[1.0], batch_size=2)


def test_2d_and_3d_networks_and_other_classes_are_refused_with_who_has_which() -> None:
    with pytest.raises(FednnunetError) as error:
        check_networks({"a": a_network([8, 8, 8]), "b": a_network([8, 8]), "c": a_network([4, 4, 4])})
    assert error.value.code is Code.NETWORKS_DIFFER
    assert "2d: b; 3d: a, c" in error.value.found
    with pytest.raises(FednnunetError) as error:
        check_networks({"a": a_network([8, 8]), "b": a_network([8, 8], "ResidualEncoderUNet")})
    assert "PlainConvUNet: a; ResidualEncoderUNet: b" in error.value.found


def test_a_hostile_sites_network_runs_nothing_at_the_orchestrator(
    tmp_path: Path, data: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from appliance.worker import preparation

    honest, marker = preparation.network, tmp_path / "ran"

    def hostile(plan: Any, configuration: str) -> Network:
        told = honest(plan, configuration)
        if told.spacing[0] != 4.0:
            return told
        arguments = {
            **told.architecture["arch_kwargs"],
            "nonlin": "torch.nn.modules.module.torch.os.system",
            "nonlin_kwargs": {"command": f"touch {marker}"},
        }
        return told.model_copy(update={"architecture": {**told.architecture, "arch_kwargs": arguments}})

    monkeypatch.setattr(preparation, "network", hostile)
    with pytest.raises(FednnunetError) as error:
        Federation(tmp_path / "federation", data).run(asym_study())
    assert "thick: FNU-507" in error.value.found
    assert not marker.exists()


# by the command line, with all processes


@pytest.mark.long
def test_plan_and_preprocess_asym_and_train_by_the_command_line(
    no_process_left: None, tmp_path: Path, data: dict[str, Path]
) -> None:
    def simulate(*arguments: object) -> str:
        raw = str(data["iso"].parent)
        return good(fednnunet("simulate", *arguments, cwd=tmp_path, nnUNet_raw=raw, timeout=400)).out

    planned = simulate("plan_and_preprocess", "311 313", "3d_fullres", "-pl", "SmallUNetPlanner", "--asym")
    assert "fingerprinting" not in planned
    assert "layers that are averaged, and among whom" in planned
    assert "common to all" in planned
    assert "12 x 24 x 24" in planned
    few = ("--rounds", 2, "--iterations", 2, "--validation-iterations", 1)
    rules = ("--aggregation", "fedavgm", "--proximal-mu", 0.01, "--momentum", "reset", "--wire", "half")
    trained = simulate("train", "311 313", "3d_fullres", "all", "-p", "nnUNetSmallPlans", *few, *rules)
    assert "Dice of each site's own model" in trained
    assert "no whole model can be made of them" in trained
    models = list(tmp_path.glob("fednnunet-state/*/sites/*/state/worker/*/nnUNet_results/*/*/fold_all/checkpoint*"))
    assert len(models) == 2
