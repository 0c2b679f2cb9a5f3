"""Named tensors in safetensors files, each tensor once, read and written one tensor at a time.

Rules:

- A file holds unique parameters and buffers alone (`named_parameters()`, never the aliased `state_dict()`), in
  the order of their names: the same tensors give the same bytes, so a file's SHA-256 is the weights' digest.
- Nothing is unpickled and nothing is mapped into memory: a reader holds one tensor.
- `full` carries float32. A `difference` carries differences to a base both sides hold, as float16 (`half`) or as
  whole numbers of 8 bits (`int8`), each tensor scaled by a power of two so that its largest value uses the whole range
  (small steps late in a training would fall below float16's smallest number); what the rounding took is carried over
  to the next difference (error feedback), so that only the last round's rounding is lost. The exponents stand in the
  file's last tensor, `EXPONENTS`. Vectors (norm layers, biases) stay float16 in `int8`: they are few bytes, and one
  channel's large step would drown the others'.
- Running statistics of batch norm, and what is not float32 (its counters), travel as they are, also in a difference:
  they are observed, not learned, and a variance that rounding makes negative is NaN at every site.
- A file from a peer is checked before it is believed: header size, names, dtypes, shapes, offsets, file size.

The format is that of https://github.com/huggingface/safetensors (8 bytes header length, JSON header, data). The
library itself reads and writes whole models at once or maps them; the coordinator must do neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt

from federation.errors import Code, FednnunetError
from federation.files import replacing, sha256_of
from federation.layers import is_statistic
from federation.tasks import Weights

Tensor = npt.NDArray[Any]
Wire = Literal["half", "int8"]
"""The ways in which a difference travels."""

MAX_HEADER = 16 * 2**20
MAX_NAME = 512
MAX_DIMENSIONS = 8
EXPONENTS = "~exponents"
"""Name of the tensor, int32, that holds a difference's exponents in the order of the names."""
SINGLE, HALF, BYTE = np.dtype("<f4"), np.dtype("<f2"), np.dtype("|i1")
LARGEST_EXPONENT = 100
"""Of a difference: times the largest weight of a site, 2 to the 20th, it is still finite, so that zeros stay zeros."""
_BITS = {HALF: 15, BYTE: 7}
"""Binary digits before the point of the largest number that a difference's type takes."""
_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I8": "|i1",
    "U8": "|u1",
    "BOOL": "|b1",
}
_CODES = {np.dtype(value): key for key, value in _DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """Element type and shape of one tensor."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def _damaged(path: Path, why: str) -> FednnunetError:
    return FednnunetError(Code.WEIGHTS_DAMAGED, f"{path}: {why}")


class TensorFile:
    """A safetensors file, read one tensor at a time.

    Parameters
    ----------
    path : Path
        The file. Its header is checked in full here; raises FNU-603.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._offsets: dict[str, int] = {}
        size = path.stat().st_size
        with open(path, "rb") as stream:
            head = stream.read(8)
            if len(head) != 8:
                raise _damaged(path, "shorter than its header")
            (length,) = struct.unpack("<Q", head)
            if length > MAX_HEADER or 8 + length > size:
                raise _damaged(path, f"header of {length} bytes")
            raw = stream.read(length)
        try:
            header = json.loads(raw)
            header.pop("__metadata__", None)
            position = 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
                dtype = np.dtype(_DTYPES[entry["dtype"]])
                shape = tuple(entry["shape"])
                first, last = entry["data_offsets"]
                if not 0 < len(name) <= MAX_NAME or len(shape) > MAX_DIMENSIONS:
                    raise ValueError("name or shape")
                if not all(type(extent) is int and 0 <= extent < 2**40 for extent in shape):
                    raise ValueError("shape")
                spec = Spec(dtype, shape)
                if first != position or last != first + spec.nbytes:
                    raise ValueError("offsets")
                self.specs[name] = spec
                self._offsets[name] = 8 + length + first
                position = last
            if 8 + length + position != size:
                raise ValueError("size")
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise _damaged(path, f"not a sound safetensors file ({error})") from error

    @property
    def names(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self.specs)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.path.stat().st_size

    @property
    def digest(self) -> str:
        """SHA-256 of the file's bytes."""
        return sha256_of(self.path)

    def spec(self, name: str) -> Spec:
        """Element type and shape of one tensor."""
        return self.specs[name]

    def read(self, name: str) -> Tensor:
        """One tensor, as an array of its own."""
        spec = self.specs[name]
        array: Tensor = np.fromfile(
            self.path, dtype=spec.dtype, count=math.prod(spec.shape), offset=self._offsets[name]
        ).reshape(spec.shape)
        return array

    def offset(self, name: str) -> int:
        """Where a tensor's bytes begin in the file (for readers that take it in pieces)."""
        return self._offsets[name]


class TensorWriter:
    """Writes a safetensors file tensor by tensor, in the order of the names, into an open stream.

    `write` takes a tensor whole or in pieces; `finish` returns the digest and raises ``ValueError`` when
    bytes are missing.
    """

    def __init__(self, stream: BinaryIO, specs: Mapping[str, Spec]) -> None:
        header: dict[str, Any] = {}
        position = 0
        for name in sorted(specs):
            spec = specs[name]
            header[name] = {
                "dtype": _CODES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)
        self._stream, self._hash, self._left = stream, hashlib.sha256(), position
        self._put(struct.pack("<Q", len(raw)) + raw)

    def _put(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._hash.update(data)

    def write(self, tensor: Tensor) -> None:
        """Write the next tensor, or the next piece of it."""
        contiguous = np.ascontiguousarray(tensor)
        self._left -= contiguous.nbytes
        if contiguous.nbytes:
            self._put(memoryview(contiguous.reshape(-1).view(np.uint8)))

    def finish(self) -> str:
        """The digest of the whole file."""
        if self._left:
            raise ValueError(f"{self._left} bytes are missing")
        return self._hash.hexdigest()


def write_tensors(path: Path, specs: Mapping[str, Spec], read: Callable[[str], Tensor]) -> str:
    """Write a safetensors file, whole or not at all, holding one tensor at a time.

    Parameters
    ----------
    path : Path
        Where the file goes.
    specs : Mapping[str, Spec]
        Element type and shape of each tensor.
    read : Callable[[str], Tensor]
        Called once for each name, in sorted order.

    Returns
    -------
    str
        SHA-256 of the file.
    """
    with replacing(path) as temporary, open(temporary, "wb") as stream:
        writer = TensorWriter(stream, specs)
        for name in sorted(specs):
            tensor = read(name)
            if tensor.shape != specs[name].shape or tensor.dtype != specs[name].dtype:
                raise ValueError(f"{name}: {tensor.dtype}{tensor.shape} is not {specs[name]}")
            writer.write(tensor)
        digest = writer.finish()
        stream.flush()
    return digest


def save(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors that are in memory already; returns the digest."""
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    specs = {name: Spec(array.dtype, array.shape) for name, array in arrays.items()}
    return write_tensors(path, specs, lambda name: arrays[name])


def select(path: Path, names: Mapping[str, str], out: Path) -> str:
    """Write some tensors of a weights file under other names; those of a difference keep their exponents.

    Parameters
    ----------
    path : Path
        Full weights or a difference.
    names : Mapping[str, str]
        New name of each tensor, and its name in `path`.
    out : Path
        Where they go.

    Returns
    -------
    str
        SHA-256 of `out`.
    """
    source = TensorFile(path)
    specs = {name: source.spec(key) for name, key in names.items()}
    scales: dict[str, int] = {}
    if EXPONENTS in source.specs:
        scales = exponents(source)
        specs[EXPONENTS] = Spec(np.dtype("<i4"), (len(names),))

    def read(name: str) -> Tensor:
        if name == EXPONENTS:
            return np.asarray([scales[names[other]] for other in sorted(names)], "<i4")
        return source.read(names[name])

    return write_tensors(out, specs, read)


def _differs(name: str, spec: Spec) -> bool:
    """Whether a tensor travels as a difference; the others travel as they are."""
    return spec.dtype == SINGLE and not is_statistic(name)


def difference_specs(specs: Mapping[str, Spec], wire: Wire) -> dict[str, Spec]:
    """Specs of a difference between weights with these specs: what is learned is smaller, and there are exponents."""
    found = {
        name: Spec(BYTE if wire == "int8" and len(spec.shape) > 1 else HALF, spec.shape)
        if _differs(name, spec)
        else spec
        for name, spec in specs.items()
    }
    found[EXPONENTS] = Spec(np.dtype("<i4"), (len(specs),))
    return found


def exponents(difference: TensorFile) -> dict[str, int]:
    """The exponent of each tensor of a difference: its values are ``number * 2**exponent``. Raises FNU-603."""
    names = [name for name in difference.names if name != EXPONENTS]
    if EXPONENTS not in difference.specs or difference.spec(EXPONENTS) != Spec(np.dtype("<i4"), (len(names),)):
        raise _damaged(difference.path, "a difference without exponents")
    found = {name: int(value) for name, value in zip(names, difference.read(EXPONENTS), strict=True)}
    for name, value in found.items():
        if not -200 <= value <= (LARGEST_EXPONENT if difference.spec(name).dtype in _BITS else 0):
            raise _damaged(difference.path, f"the exponent of {name} is out of range")
    return found


def _exponent(values: Tensor, dtype: np.dtype[Any]) -> int:
    """The power of two that brings the largest value just below the largest number of a difference's type."""
    largest = float(np.max(np.abs(values), initial=0.0))
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    return max(math.frexp(largest)[1] - _BITS[dtype], -126)


def _rounded(scaled: Tensor, dtype: np.dtype[Any]) -> Tensor:
    """Numbers in a difference's type; 8 bits are -127 to 127."""
    if dtype == BYTE:
        scaled = np.clip(np.rint(scaled), -127, 127)
    return scaled.astype(dtype)


def _same_specs(first: TensorFile, second: TensorFile) -> None:
    if first.specs != second.specs:
        raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, f"{first.path} and {second.path}: names, shapes or types differ")


def encode_difference(new: Path, base: Path, carry: Path | None, out: Path, carry_out: Path, wire: Wire) -> str:
    """The difference of two weights files, with error feedback (Seide et al. 2014, 1-bit SGD, section 2).

    Parameters
    ----------
    new, base : Path
        Float32 weights files with the same tensors; the difference is ``new - base``.
    carry : Path or None
        What earlier roundings took away, added before this rounding.
    out, carry_out : Path
        Where the difference goes, and what this rounding took away.
    wire : str
        `half` or `int8`.

    Returns
    -------
    str
        SHA-256 of `out`. Raises FNU-407 when a weight is not a finite number.
    """
    new_file, base_file = TensorFile(new), TensorFile(base)
    _same_specs(new_file, base_file)
    carry_file = TensorFile(carry) if carry is not None and carry.exists() else None
    if carry_file is not None and not set(carry_file.specs) <= set(new_file.specs):
        raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, f"{carry}")
    specs = difference_specs(new_file.specs, wire)
    carried = {name: spec for name, spec in new_file.specs.items() if _differs(name, spec)}

    with replacing(carry_out) as temporary, open(temporary, "wb") as stream:
        rest = TensorWriter(stream, carried)

        scales: list[int] = []

        def rounded(name: str) -> Tensor:
            if name == EXPONENTS:
                return np.asarray(scales, "<i4")
            value = new_file.read(name)
            if name not in carried:
                scales.append(0)
                return value
            value -= base_file.read(name)
            if carry_file is not None:
                value += carry_file.read(name)
            dtype = specs[name].dtype
            scales.append(_exponent(value, dtype))
            if not np.isfinite(value).all() or scales[-1] > LARGEST_EXPONENT:
                raise FednnunetError(Code.LOSS_NOT_FINITE, f"{new}: {name} holds NaN, infinite or absurd numbers")
            sent = _rounded(np.ldexp(value, -scales[-1]), dtype)
            rest.write(value - np.ldexp(sent.astype(SINGLE), scales[-1]))
            return sent

        digest = write_tensors(out, specs, rounded)
        rest.finish()
        stream.flush()
    return digest


def apply_difference(base: Path, difference: Path, out: Path) -> str:
    """Float32 weights ``base + difference``; returns their digest. Raises FNU-404 when they do not fit."""
    base_file, difference_file = TensorFile(base), TensorFile(difference)
    if difference_file.specs not in [difference_specs(base_file.specs, wire) for wire in get_args(Wire)]:
        raise FednnunetError(Code.WEIGHTS_DO_NOT_FIT, f"{difference} is no difference to {base}")

    scales = exponents(difference_file)

    def weights_of(name: str) -> Tensor:
        value = difference_file.read(name)
        if not _differs(name, base_file.spec(name)):
            return value
        restored: Tensor = base_file.read(name) + np.ldexp(value.astype(SINGLE), scales[name])
        return restored

    return write_tensors(out, base_file.specs, weights_of)


def describe_full(path: Path, digest: str | None = None) -> Weights:
    """The `Weights` of a file that travels as it is."""
    digest = digest or sha256_of(path)
    return Weights(encoding="full", file_sha256=digest, nbytes=path.stat().st_size, digest=digest)


def describe_difference(path: Path, base: str, digest: str, file_sha256: str | None = None) -> Weights:
    """The `Weights` of a difference file to the weights `base` that gives the weights `digest`."""
    file_sha256 = file_sha256 or sha256_of(path)
    return Weights(encoding="difference", file_sha256=file_sha256, nbytes=path.stat().st_size, base=base, digest=digest)


def describe_held(digest: str) -> Weights:
    """The `Weights` of weights that the receiver has already."""
    return Weights(encoding="held", nbytes=0, digest=digest)


def open_weights(header: Weights, file: Path | None, bases: Callable[[str], Path | None], out: Path) -> Path:
    """The float32 weights that a task carries, as a file.

    Parameters
    ----------
    header : Weights
        What the task says of the file.
    file : Path or None
        The file that travelled, if one did.
    bases : Callable[[str], Path or None]
        Finds a weights file by its digest.
    out : Path
        Where the weights go when they have to be put together.

    Returns
    -------
    Path
        `file` itself for full weights, `out` for a difference, what `bases` found for held ones. Raises FNU-603 when
        a digest does not hold, FNU-408 when the base is not there.
    """
    if header.encoding == "held":
        held = bases(header.digest)
        if held is None:
            raise FednnunetError(Code.BASE_MISSING, header.digest)
        return held
    if file is None:
        raise FednnunetError(Code.WEIGHTS_DAMAGED, "the announced weights file did not arrive")
    if sha256_of(file) != header.file_sha256:
        raise _damaged(file, "its SHA-256 is not the announced one")
    if header.encoding == "full":
        if header.digest != header.file_sha256:
            raise _damaged(file, "digest and SHA-256 of full weights differ")
        return file
    base = bases(header.base) if header.base else None
    if base is None:
        raise FednnunetError(Code.BASE_MISSING, header.base or "")
    if apply_difference(base, file, out) != header.digest:
        out.unlink(missing_ok=True)
        raise _damaged(file, "base and difference do not give the announced weights")
    return out
