"""Settings that cannot work are refused by `fednnunet study check`, before any site is asked; what can work passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import fednnunet, good, phantom_study, refused, write_study
from pydantic import Field

from federation import files
from federation.errors import Code, FednnunetError
from federation.layers import kept_local, possible_names
from federation.study import PATTERNS, READERS, Study, load, parse
from orchestrator.journal import Journal, read_study

FIVE = [f"site_{number}" for number in range(5)]
CASCADE = {"configuration": "3d_cascade_fullres", "previous_stage": "a" * 64}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a label without a number": (
        {"labels": {"background": 0, "tumour": 1, "rest": []}},
        "labels.rest is an empty list: give its number, or the numbers of a region",
    ),
    "a label without a number among regions": (
        {"labels": {"background": 0, "whole": [1, 2], "core": 2, "rest": []}, "regions_class_order": [1, 2]},
        "labels.rest is an empty list",
    ),
    "mu below 0": ({"proximal_mu": -0.1}, "proximal_mu: must be at least 0, not -0.1"),
    "a trim of half": ({"aggregation": {"method": "trimmed_mean", "trim": 0.5}}, "aggregation.trim"),
    "a trim that leaves out nobody": (
        {"aggregation": {"method": "trimmed_mean", "trim": 0.1}},
        "aggregation.trim 0.1 of 5 sites leaves out none",
    ),
    "Krum with too few sites": (
        {"aggregation": {"method": "krum", "faulty_sites": 2}},
        "krum with 2 faulty sites needs 7 sites in every round, but sites is 5",
    ),
    "Krum with too small a quorum": (
        {"aggregation": {"method": "multi_krum"}, "quorum": 4},
        "needs 5 sites in every round, but quorum is 4",
    ),
    "more selected than can be sound": (
        {"aggregation": {"method": "multi_krum", "selected_sites": 5}},
        "aggregation.selected_sites 5 is more than all but the faulty sites",
    ),
    "Krum among groups": (
        {"aggregation": {"method": "krum"}, "mode": "asymfedavg"},
        "krum compares whole updates: it needs layers: common",
    ),
    "a method that does not exist": ({"aggregation": {"method": "mode"}}, "aggregation.method: must be 'mean'"),
    "a momentum of 1": ({"aggregation": {"method": "fedavgm", "server_momentum": 1.0}}, "aggregation.server_momentum"),
    "a step of 0": ({"aggregation": {"method": "fedadam", "server_learning_rate": 0}}, "server_learning_rate"),
    "a layer that no network has": (
        {"keep_local": ["encoder.stage.0.*"]},
        "no layer of any network of SmallUNetPlanner",
    ),
    "a layer of another planner's networks": ({"keep_local": ["encoder.stem.*"]}, "is called encoder.stem.*"),
    "every layer kept": ({"keep_local": ["encoder.*", "decoder.*"]}, "keep_local keeps every layer"),
    "pretrained layers that would not arrive": (
        {"keep_local": ["norm"], "pretrained_weights": "b" * 64},
        "may keep the seg_head alone",
    ),
    "one checkpoint for different networks": (
        {"mode": "asymfedavg", "pretrained_weights": "b" * 64},
        "pretrained_weights need mode ffe",
    ),
    "a fingerprint that never leaves": ({"mode": "asymfedavg", "stop_after": "fingerprint"}, "no fingerprint leaves"),
    "a rule of asymfedavg without it": ({"layers": "common"}, "layers has a meaning with mode: asymfedavg alone"),
    "a mode that does not exist": ({"mode": "fedavg"}, "mode: must be 'ffe' or 'asymfedavg', not 'fedavg'"),
    "a cascade without its first stage": ({"configuration": "3d_cascade_fullres"}, "need each other"),
    "a first stage without a cascade": ({"previous_stage": "a" * 64}, "need each other"),
    "a cascade of different networks": ({**CASCADE, "mode": "asymfedavg"}, "3d_cascade_fullres needs mode ffe"),
    "a trainer of other epochs": ({"trainer": "nnUNetTrainer_250epochs"}, "rounds x epochs_per_round is 2"),
    "a trainer that needs another package": ({"trainer": "nnUNetTrainerAdan"}, "adan_pytorch"),
    "a trainer that measures": ({"trainer": "nnUNetTrainerBenchmark_5epochs"}, "trains nothing of use"),
    "a label that a terminal obeys": (
        {"labels": {"background": 0, "organ\x1b[8m": 1}},
        "'organ\\x1b[8m' must be printable",
    ),
    "a label of two lines": ({"labels": {"background": 0, "a\nWhat leaves: nothing": 1}}, "must be printable text"),
    "a channel that turns the line round": ({"channel_names": {0: "CT\u202e"}}, "channel_names: 'CT\\u202e' must be"),
    "a layer that is no text": ({"keep_local": ["*[\x1bn]orm*"]}, "keep_local: '*[\\x1bn]orm*' must be"),
    "a label as long as a page": ({"labels": {"background": 0, "a" * 201: 1}}, "of 200 letters at most"),
    "a trainer that nobody knows": ({"trainer": "nnUNetTrainerMagic"}, "not one of nnU-Net's trainers"),
}

RIGHT: dict[str, dict[str, Any]] = {
    "krum": {"aggregation": {"method": "krum"}},
    "krum, common layers": {"aggregation": {"method": "krum"}, "mode": "asymfedavg", "layers": "common"},
    "trimmed mean": {"aggregation": {"method": "trimmed_mean", "trim": 0.2}},
    "personal head of a pretrained model": {"keep_local": ["seg_head"], "pretrained_weights": "b" * 64},
    "batch norm kept": {"keep_local": ["norm"], "trainer": "nnUNetTrainerBN"},
    "a pattern": {"keep_local": ["decoder.stages.?.convs.*"]},
    "stem": {"keep_local": ["encoder.stem.*"], "planner": "nnUNetPlannerResEncM"},
    "epochs": {"trainer": "nnUNetTrainer_10epochs", "rounds": 5, "epochs_per_round": 2},
    "cascade": CASCADE,
}


def study(**changes: Any) -> dict[str, Any]:
    return phantom_study(FIVE, **{"rounds": 2, **changes})


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_setting_is_refused_with_its_reason(name: str) -> None:
    changes, reason = WRONG[name]
    with pytest.raises(FednnunetError) as error:
        parse(study(**changes))
    assert error.value.code is Code.STUDY_INVALID
    assert reason in error.value.found


@pytest.mark.parametrize("name", RIGHT)
def test_a_setting_that_can_work_passes(name: str) -> None:
    assert parse(study(**RIGHT[name])).id


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"name": "my study"}, ["name: 'my study' is not a name in letters, digits, `-` and `_`, such as liver-2026"]),
        ({"name": 2026}, ["name: must be text (in quotes where it looks like a number), not 2026"]),
        ({"dataset": "Liver"}, ["dataset: 'Liver' is not a `DatasetNNN_Name`, such as Dataset401_Liver"]),
        ({"sites": "north"}, ["sites: must be a list, such as [hospital_a, hospital_b], not 'north'"]),
        ({"sites": []}, ["sites: has too few entries, needs 1 or more, such as [hospital_a, hospital_b]"]),
        ({"channel_names": ["CT"]}, ["channel_names: must be a mapping, such as {0: CT}, not ['CT']"]),
        ({"aggregation": "krum"}, ["aggregation: must be a mapping, such as {method: median}, not 'krum'"]),
        (
            {"labels": {0: "background", "int": ["one"]}},  # the first in the manner of nnU-Net v1
            [
                "labels: must be a mapping, such as {background: 0, tumour: 1}",
                "labels.0: must be a whole number, or a list of whole numbers",
                "labels.int: must be a whole number, or a list of whole numbers",
            ],
        ),
        ({"labels": {"background": 0, "organ": 2}}, ["label numbers must be consecutive from 0, found [0, 2]"]),
        ({"round": 3, "zzz": 1}, ["round: this key is not known; did you mean rounds?", "zzz: this key is not known"]),
        ({"aggregation": {"metod": "krum"}}, ["aggregation.metod: this key is not known; did you mean method?"]),
        ({"aggregation": {"trim": 0.5}}, ["aggregation.trim: must be below 0.5, not 0.5"]),
        ({"rounds": None}, ["rounds: must be a whole number, not nothing"]),
        ({"round_deadline": float("inf")}, ["round_deadline: must be a finite number"]),
        (
            {"aggregation": {"max_update_ratio": float("nan")}},
            ["aggregation.max_update_ratio: must be a finite number"],
        ),
        ({"accept_float_labels": "maybe"}, ["accept_float_labels: must be true or false, not 'maybe'"]),
    ],
)
def test_what_is_wrong_is_said_in_our_words_and_with_what_would_be_right(
    changes: dict[str, Any], lines: list[str]
) -> None:
    with pytest.raises(FednnunetError) as error:
        parse({**study(), **changes}, "study.yaml")
    found = error.value.found.splitlines()
    assert len(found) == 1 + len(lines)
    for line, expected in zip(found[1:], lines, strict=True):
        assert line.startswith(f"  {expected}")


def test_every_pattern_of_the_study_has_words() -> None:
    for name, schema in Study.model_json_schema()["properties"].items():
        for kind in (schema, schema.get("items", {}), *schema.get("anyOf", [])):
            assert kind.get("pattern") in (None, *PATTERNS), name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: !!timestamp today", "this is no timestamp.*line 1"),
        ("name: demo\nrounds: !!int ''", "this is no int.*line 2"),
        ("name: demo\nrounds: !!bool perhaps", "this is no bool.*line 2"),
        ("? !!float ''\n: 1", "this is no float.*line 1"),
        *((opening * 5000, "too deep") for opening in ("[", "{", "- ")),
    ],
)
def test_a_study_file_that_yaml_itself_trips_over_is_refused_by_number(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(FednnunetError, match=f"(?s)study.yaml: .*{said}") as error:
        load(file)
    assert error.value.code is Code.STUDY_UNREADABLE


REGIONS: dict[str, Any] = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
    "regions_class_order": [1, 2, 3],
}


def test_the_order_of_regions_is_a_part_of_the_study_and_survives_its_journal(tmp_path: Path) -> None:
    """nnU-Net's regions_class_order counts by the order of the labels."""
    regions = parse(study(**REGIONS))
    labels = REGIONS["labels"]
    turned = parse(study(**{**REGIONS, "labels": dict(sorted(labels.items()))}))
    assert regions.id != turned.id
    assert turned.id == files.sha256_json(turned.model_dump(mode="json", exclude_defaults=True)), "as ever"
    plain = {"background": 0, "b": 1, "a": 2}
    assert parse(study(labels=plain)).id == parse(study(labels=dict(reversed(plain.items())))).id
    Journal(tmp_path, regions).close()
    again = parse(json.loads(read_study(tmp_path / "study.json").model_dump_json()))
    assert again.id == regions.id
    assert list(again.dataset_json(1)["labels"]) == list(labels)


def test_channels_are_in_the_order_of_their_numbers_whatever_the_file_says() -> None:
    """nnU-Net takes their order: beyond ten channels text sorts otherwise."""
    given = {number: f"c{number}" for number in (11, 2, 0, 1, 10, *range(3, 10))}
    names = parse(study(channel_names=given)).dataset_json(1)["channel_names"]
    assert list(names.items()) == [(str(number), f"c{number}") for number in range(12)]


def test_a_reader_that_does_not_read_the_ending_is_refused() -> None:
    assert parse(study(overwrite_image_reader_writer="NibabelIOWithReorient")).id != parse(study()).id
    with pytest.raises(FednnunetError, match=r"Tiff3DIO reads no \.nii\.gz"):
        parse(study(overwrite_image_reader_writer="Tiff3DIO"))


def test_the_readers_are_nnunets() -> None:
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    there = {reader.__name__: tuple(reader.supported_file_endings) for reader in LIST_OF_IO_CLASSES}
    assert list(there.items()) == list(READERS.items())


def test_asymfedavg_of_one_site_is_refused() -> None:
    with pytest.raises(FednnunetError, match="two sites or more"):
        parse(phantom_study(["alone"], mode="asymfedavg"))


def test_study_check_refuses_by_number_and_shows_what_it_accepts(tmp_path: Path) -> None:
    write_study(tmp_path / "wrong.yaml", study(aggregation={"method": "krum", "faulty_sites": 2}))
    refused(fednnunet("study", "check", "wrong.yaml", cwd=tmp_path), 102, "krum with 2 faulty sites needs 7 sites")
    write_study(tmp_path / "right.yaml", study(keep_local=["norm"], proximal_mu=0.01))
    shown = good(fednnunet("study", "check", "right.yaml", cwd=tmp_path)).out
    assert "keep_local" in shown
    assert "proximal_mu" in shown


@pytest.mark.parametrize("residual", [False, True])
def test_aliases_name_the_layers_they_mean(residual: bool) -> None:
    names = possible_names(residual)
    norm, head = kept_local(names, ["norm"]), kept_local(names, ["seg_head"])
    assert norm
    assert all(".norm." in name for name in norm)
    assert {name for name in names if ".norm." in name} == norm
    assert {name for name in names if "seg_layers" in name} == head
    assert kept_local(names, ["norm", "seg_head"]) == norm | head
    assert not kept_local(names, [])


def test_a_field_that_a_later_version_adds_leaves_the_id_of_a_study_under_way() -> None:
    class Later(Study):
        compare: str = Field("none", description="a field of a later version")

    given = {**phantom_study(["a", "b"]), "aggregation": {"method": "mean"}}
    assert Later.model_validate(given).id == parse(given).id
    assert Later.model_validate({**given, "compare": "local"}).id != parse(given).id
    spelt_out = parse(given).model_dump(mode="json")
    assert parse(spelt_out).id == parse(given).id, "defaults written down are the same study"
    assert parse({**given, "aggregation": {"method": "mean", "max_update_ratio": 9.0}}).id != parse(given).id


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "organ": 1, "lesion": 2}, None),
        ({"background": 0, "lesion": [1], "ignore": 2}, None),
        ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, [1, 2]),
        ({"background": 0, "whole": [1, 2, 3], "core": 2, "rest": 3}, [1, 2, 3]),
    ],
)
def test_labels_have_the_keys_that_nnunet_writes_into_a_summary(
    labels: dict[str, Any], order: list[int] | None
) -> None:
    from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    study = parse(phantom_study(["a", "b"], labels=labels, regions_class_order=order))
    manager = LabelManager(labels, order)
    written = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    assert list(study.label_keys.values()) == [label_or_region_to_key(each) for each in written]
    assert list(study.label_keys) == [name for name in labels if name not in ("background", "ignore")]
    assert study.has_regions is manager.has_regions
