"""Whatever a peer sends, a decoder takes it or refuses it by number: it never breaks, nor writes, nor takes memory.

Bytes that are nearly right come from real messages with a few of them changed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import phantom_study
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from federation import keypairs, signing, study, tasks, weights
from federation.errors import FednnunetError
from federation.plans import check_plans
from federation.tasks import Kind, Result, Task
from federation.weights import TensorFile
from orchestrator.model import pool_scores

CAP = 48 * 2**20
"""Bytes: what a decoder may take for a message of a few kilobytes (a header of 16 MiB is the largest it believes)."""
STUDY = study.parse(phantom_study(["a", "b"]))
TASK = Task(study=STUDY, site="a", kind=Kind.DESCRIBE)
RESULT = Result.answering(TASK, description=tasks.Description(training_cases=5, test_cases=0))
SCORE = tasks.LabelScore(mean=0.5, std=0.1, minimum=0.4, cases=2)
SCORED = Result.answering(TASK, validation=tasks.Validation(test={"organ": SCORE}, test_cases=2, seconds=1.5))
NETWORK = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {"n_stages": 2, "features_per_stage": [8, 16], "conv_op": "torch.nn.modules.conv.Conv3d"},
    "_kw_requires_import": ["conv_op"],
}
PLANS: dict[str, Any] = {
    "dataset_name": STUDY.dataset,
    "plans_name": "p",
    "configurations": {"3d_fullres": {"architecture": NETWORK, "patch_size": [8, 8, 8], "batch_size": 2}},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def nearly(draw: st.DrawFn, message: bytes) -> bytes:
    """A message with a few bytes changed, or cut short, or repeated."""
    changed = bytearray(message)
    for _ in range(draw(st.integers(0, 6))):
        changed[draw(st.integers(0, len(changed) - 1))] = draw(st.integers(0, 255))
    end = draw(st.integers(0, len(changed)))
    return bytes(changed[:end]) * draw(st.integers(1, 3)) if draw(st.booleans()) else bytes(changed)


@st.composite
def nearly_json(draw: st.DrawFn, value: Any) -> Any:
    """A value with one place of it replaced by anything."""
    changed = json.loads(json.dumps(value))
    place = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            place[key] = draw(JSON)
            return changed
        place = place[key]


def holds(decode: Callable[[], object], folder: Path) -> None:
    """Decode within the cap, by number or well, and write nothing."""
    before = sorted(folder.rglob("*"))
    tracemalloc.start()
    try:
        decode()
    except FednnunetError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < CAP, f"{peak / 2**20:.0f} MiB"
    assert sorted(folder.rglob("*")) == before


DECODERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "task": (TASK.model_dump_json().encode(), lambda data: tasks.parse_task(data).study.id),
    "answer": (RESULT.model_dump_json().encode(), tasks.parse_result),
    "message": (
        b'{"purpose":"task","signer":"coordinator","nonce":"'
        + b"0" * 32
        + b'","answers":null,"body":"{}","signature":""}',
        lambda data: signing.open_message(data.decode("latin-1"), "task", "coordinator", []),
    ),
    "key": (
        b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n",
        lambda d: keypairs.load_public(d, "x"),
    ),
}
FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("name", DECODERS)
@FUZZ
@given(data=st.data())
def test_messages(tmp_path: Path, name: str, data: st.DataObject) -> None:
    message, decode = DECODERS[name]
    given_bytes = data.draw(nearly(message) | st.binary(max_size=300))
    holds(lambda: decode(given_bytes), tmp_path)


@FUZZ
@given(data=st.data())
def test_weights_files_truncated_oversized_and_with_any_header(tmp_path: Path, data: st.DataObject) -> None:
    sound = tmp_path / "sound"
    weights.save(sound, {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "n": np.asarray(3)})
    content = data.draw(nearly(sound.read_bytes()) | st.binary(max_size=200))
    file = tmp_path / "arrived"
    file.write_bytes(content)

    def read() -> None:
        opened = TensorFile(file)
        for name in opened.names:
            opened.read(name)

    holds(read, tmp_path)


def test_a_header_that_announces_terabytes_is_refused_unread(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2**39], "data_offsets": [0, 2**41]}
    header = json.dumps({"w": entry}).encode()
    for length in (len(header), 2**62, 2**64 - 1):
        (tmp_path / "arrived").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(FednnunetError):
            TensorFile(tmp_path / "arrived")
        holds(lambda: TensorFile(tmp_path / "arrived"), tmp_path)


@FUZZ
@given(changed=nearly_json(PLANS))
def test_plans_with_anything_in_one_place(tmp_path: Path, changed: Any) -> None:
    holds(lambda: check_plans(changed, STUDY), tmp_path)


@FUZZ
@given(changed=nearly_json(STUDY.model_dump(mode="json")))
def test_studies_with_anything_in_one_place(tmp_path: Path, changed: Any) -> None:
    holds(lambda: study.parse(changed).id, tmp_path)


@FUZZ
@given(changed=nearly_json(json.loads(RESULT.model_dump_json())))
def test_answers_with_anything_in_one_place(tmp_path: Path, changed: Any) -> None:
    holds(lambda: tasks.parse_result(json.dumps(changed)), tmp_path)


@FUZZ
@given(changed=nearly_json(json.loads(SCORED.model_dump_json())))
def test_scores_with_anything_in_one_place_can_be_pooled_or_are_refused(tmp_path: Path, changed: Any) -> None:
    def pool() -> None:
        report = tasks.parse_result(json.dumps(changed)).validation
        if report is not None:
            pool_scores([SCORE, *report.test.values(), *report.validation.values()])

    holds(pool, tmp_path)


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "NaN", "1e400"])
def test_a_signed_study_without_end_is_refused(number: str) -> None:
    """JSON has no such number, and yet its readers take it; nobody can say what the study's id would be."""
    text = TASK.model_dump_json()
    deadline = f'"round_deadline":{STUDY.round_deadline}'
    assert deadline in text
    with pytest.raises(FednnunetError):
        tasks.parse_task(text.replace(deadline, f'"round_deadline":{number}'))


@pytest.mark.long
def test_twenty_seconds_of_coverage_guided_fuzzing(tmp_path: Path) -> None:
    """Seeds are real messages; tests/fuzz_decoders.py runs for as long as one likes."""
    pytest.importorskip("atheris", reason="atheris has no wheel for this Python")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    weights.save(corpus / "weights", {"w": np.arange(12, dtype=np.float32)})
    for name, (message, _) in DECODERS.items():
        (corpus / name).write_bytes(message)
    (corpus / "plans").write_text(json.dumps(PLANS))
    (corpus / "study").write_text(STUDY.model_dump_json())
    script = Path(__file__).with_name("fuzz_decoders.py")
    done = subprocess.run(
        [sys.executable, str(script), str(corpus), "-max_total_time=20", "-rss_limit_mb=2048"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Done" in done.stderr
