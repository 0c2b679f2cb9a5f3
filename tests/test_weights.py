"""Weights files: each tensor once, one tensor in memory, nothing believed that a peer wrote."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from federation import weights
from federation.errors import Code, FednnunetError
from federation.weights import TensorFile


def tensors(seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        "a.weight": (scale * random.standard_normal((4, 3, 3))).astype(np.float32),
        "b.bias": (scale * random.standard_normal(7)).astype(np.float32),
        "empty": np.empty((0, 2), np.float32),
        "scalar": np.asarray(scale, np.float32),
    }


def test_the_safetensors_library_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    ours, theirs, expected = tmp_path / "ours", tmp_path / "theirs", tensors()
    weights.save(ours, expected)
    safetensors.numpy.save_file(expected, theirs)
    for name, value in safetensors.numpy.load_file(ours).items():
        np.testing.assert_array_equal(value, expected[name])
    file = TensorFile(theirs)
    assert file.names == sorted(expected)
    for name in expected:
        np.testing.assert_array_equal(file.read(name), expected[name])


def test_the_same_tensors_give_the_same_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    some = tensors()
    first = weights.save(tmp_path / "a", some)
    second = weights.save(tmp_path / "b", dict(reversed(some.items())))
    assert first == second == TensorFile(tmp_path / "a").digest
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(("wire", "error", "part"), [("half", 4e-3, 0.6), ("int8", 2.0**-5, 0.4)])
def test_a_difference_and_its_base_give_the_weights_within_its_bits_and_the_carry_holds_the_rest(
    tmp_path: Path, wire: weights.Wire, error: float, part: float
) -> None:
    base, new = ({**tensors(seed), "large": 4 * tensors(seed + 2)["a.weight"].repeat(100, 0)} for seed in (1, 2))
    weights.save(tmp_path / "base", base)
    weights.save(tmp_path / "new", new)
    weights.encode_difference(tmp_path / "new", tmp_path / "base", None, tmp_path / "d", tmp_path / "carry", wire)
    weights.apply_difference(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    out, carry = TensorFile(tmp_path / "out"), TensorFile(tmp_path / "carry")
    for name in base:
        np.testing.assert_allclose(out.read(name), new[name], rtol=0, atol=8 * error)
        np.testing.assert_allclose(out.read(name) + carry.read(name), new[name], rtol=0, atol=2e-6)
    np.testing.assert_allclose(out.read("b.bias"), new["b.bias"], rtol=0, atol=4e-3)  # float16 in both
    assert (tmp_path / "d").stat().st_size < part * (tmp_path / "new").stat().st_size + 200


@pytest.mark.parametrize("wire", ["half", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_finite_numbers_are_not_rounded_to_some(
    tmp_path: Path, wire: weights.Wire, value: float
) -> None:
    weights.save(tmp_path / "base", tensors(1))
    weights.save(tmp_path / "new", {**tensors(2), "a.weight": np.full((4, 3, 3), value, np.float32)})
    with pytest.raises(FednnunetError, match="FNU-407"):
        weights.encode_difference(tmp_path / "new", tmp_path / "base", None, tmp_path / "d", tmp_path / "c", wire)
    assert not (tmp_path / "d").exists()
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("wire", "least"), [("half", 2.0**-12), ("int8", 2.0**-9)])
def test_what_the_rounding_took_is_carried_over_until_it_counts(
    tmp_path: Path, wire: weights.Wire, least: float
) -> None:
    """A step too small beside a large one is not lost: error feedback brings it in later rounds."""
    base = {"w": np.zeros((1, 1), np.float32)}
    step = np.float32(1.0 + least)  # rounded to 1
    total, carry = np.float32(0), None
    weights.save(tmp_path / "base", base)
    weights.save(tmp_path / "new", {"w": np.asarray([[step]])})
    for number in range(64):
        out = tmp_path / f"carry{number}"
        weights.encode_difference(tmp_path / "new", tmp_path / "base", carry, tmp_path / "d", out, wire)
        weights.apply_difference(tmp_path / "base", tmp_path / "d", tmp_path / "step")
        total += TensorFile(tmp_path / "step").read("w")[0, 0]
        carry = out
    assert abs(total - 64 * step) <= 4 * least
    assert total != 64.0


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e-3, 1.0, 1e6, 1e30])
def test_a_difference_of_any_size_keeps_eleven_bits(tmp_path: Path, scale: float) -> None:
    """Small steps late in a training neither vanish nor lose precision, and huge ones do not become infinite."""
    value = (scale * np.random.default_rng(0).uniform(0.01, 1, 1000)).astype(np.float32)
    weights.save(tmp_path / "base", {"w": np.zeros(1000, np.float32)})
    weights.save(tmp_path / "new", {"w": value})
    weights.encode_difference(tmp_path / "new", tmp_path / "base", None, tmp_path / "d", tmp_path / "c", "half")
    weights.apply_difference(tmp_path / "base", tmp_path / "d", tmp_path / "out")
    np.testing.assert_allclose(TensorFile(tmp_path / "out").read("w"), value, rtol=2.0**-11)


def test_a_difference_whose_exponents_are_missing_or_absurd_is_refused(tmp_path: Path) -> None:
    weights.save(tmp_path / "base", {"w": np.zeros(2, np.float32)})
    for exponents in (None, np.asarray([10**6], np.int32)):
        tensors: dict[str, np.ndarray] = {"w": np.ones(2, np.float16)}
        if exponents is not None:
            tensors[weights.EXPONENTS] = exponents
        weights.save(tmp_path / "d", tensors)
        with pytest.raises(FednnunetError, match=r"FNU-(404|603)"):
            weights.apply_difference(tmp_path / "base", tmp_path / "d", tmp_path / "out")
        assert not (tmp_path / "out").exists()


def header(value: object, data: bytes = b"") -> bytes:
    raw = json.dumps(value).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 100) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 2) + b"\xff\xff",
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"),
        header({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
        header({"w": {"dtype": "OBJ", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"),
        header({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"1234"),
        header({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}}, b"1234"),
        header({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
        header({"x" * 600: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"1234"),
        header(
            {
                "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            b"1234",
        ),
        header({"w": 3}),
        b"\x80\x04\x95pickle",
    ],
)
def test_a_file_that_is_not_sound_is_refused_by_number(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    with pytest.raises(FednnunetError) as caught:
        TensorFile(path)
    assert caught.value.code is Code.WEIGHTS_DAMAGED


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.binary(min_size=1, max_size=4))
def test_no_bytes_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, noise: bytes, at: int, patch: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "f"
    weights.save(path, tensors())
    data = bytearray(path.read_bytes())
    data[at : at + len(patch)] = patch
    for content in (bytes(data), noise, bytes(data[:at])):
        path.write_bytes(content)
        try:
            file = TensorFile(path)
            for name in file.names:
                file.read(name)
        except FednnunetError as error:
            assert error.code is Code.WEIGHTS_DAMAGED  # noqa: PT017 - sound files are fine too


def test_weights_for_a_task_are_checked_by_their_digests(tmp_path: Path) -> None:
    base, new = tmp_path / "base", tmp_path / "new"
    base_digest, new_digest = weights.save(base, tensors(1)), weights.save(new, tensors(2))
    full = weights.describe_full(new)
    assert weights.open_weights(full, new, lambda _: None, tmp_path / "o") == new
    with pytest.raises(FednnunetError, match="FNU-603"):
        weights.open_weights(full, base, lambda _: None, tmp_path / "o")
    with pytest.raises(FednnunetError, match="FNU-603"):
        weights.open_weights(full, None, lambda _: None, tmp_path / "o")
    weights.encode_difference(new, base, None, tmp_path / "d", tmp_path / "c", "half")
    digest = weights.apply_difference(base, tmp_path / "d", tmp_path / "sum")
    difference = weights.describe_difference(tmp_path / "d", base_digest, digest)
    with pytest.raises(FednnunetError, match="FNU-408"):
        weights.open_weights(difference, tmp_path / "d", lambda _: None, tmp_path / "o")
    opened = weights.open_weights(difference, tmp_path / "d", {base_digest: base}.get, tmp_path / "o")
    assert TensorFile(opened).digest == digest
    with pytest.raises(FednnunetError, match="FNU-603"):
        weights.open_weights(difference, tmp_path / "d", lambda _: new, tmp_path / "o2")
    assert not (tmp_path / "o2").exists()
    with pytest.raises(FednnunetError, match="FNU-408"):
        weights.open_weights(weights.describe_held(new_digest), None, lambda _: None, tmp_path / "o")
