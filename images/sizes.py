"""Where the images' bytes are and what was left out: `make image-sizes`.

The CPU images are measured in the engine. The CUDA image is computed, since few machines hold it: the wheels that
images/cuda.lock names are looked up in the package index, and of each only the archive's directory is read (a few
kilobytes), which says how large its files are unpacked.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
DOCKER = os.environ.get("DOCKER", "docker")
LARGEST = 12
BOUNDS = {"appliance": 1.7e9, "orchestrator": 1.5e9}
"""Unpacked bytes that a CPU image may have."""
INSIDE = """
import collections, json, os
found = collections.Counter()
for layer in ("/opt/torch", "/opt/libraries", "/opt/fednnunet"):
    for folder, _, names in os.walk(layer):
        for name in names:
            path = os.path.join(folder, name)
            top = os.path.relpath(path, layer).split(os.sep)[0]
            found[top if layer != "/opt/fednnunet" else "fednnunet"] += os.lstat(path).st_size
print(json.dumps(found))
"""


def megabytes(size: float) -> str:
    """Bytes as MB (10^6), right-aligned."""
    return f"{size / 1e6:8.1f} MB"


def docker(*arguments: str) -> str:
    """What a docker command prints."""
    return subprocess.run([DOCKER, *arguments], check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


def kind_left_out(name: str) -> str | None:
    """Which of the things that images/install.sh removes a wheel's file is; None: it stays."""
    if name.endswith(".a"):
        return "static libraries"
    if re.match(r"(torch/(include|share)/|nvidia/.*?/include/)|.*\.[ch](pp)?$", name):
        return "headers and sources in C"
    if re.match(r"(torch/(test|bin)|skimage/data|Crypto/SelfTest)/", name) and not name.endswith("torch_shm_manager"):
        return "tests and tools of torch, sample data"
    if re.search(r"/tests?/", name) and not name.startswith(("numpy/", "torch/")):
        return "tests"
    return "Cython sources" if name.endswith((".pyx", ".pxd")) else None


def measure(role: str, version: str) -> int:
    """Print one CPU image, layer by layer and package by package; returns its size in bytes."""
    image = f"fednnunet/{role}:{version}-cpu"
    size = int(docker("image", "inspect", image, "--format", "{{.Size}}"))
    print(f"\n{image}: {size / 1e9:.2f} GB unpacked (at most {BOUNDS[role] / 1e9:.1f})")
    for line in docker("history", image, "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}").splitlines():
        layer, _, made = line.partition("\t")
        if int(layer) > 1e5:
            what = re.search(r"COPY (/opt/\w+)", made)
            print(f"  {megabytes(int(layer))}  {what[1] if what else 'the base: Debian, Python, tini'}")
    packages = json.loads(docker("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", INSIDE))
    ordered = sorted(packages.items(), key=lambda item: -item[1])
    print("  of these: " + ", ".join(f"{name} {bytes_ / 1e6:.0f} MB" for name, bytes_ in ordered[:LARGEST]))
    return size


def left_out() -> None:
    """Print what the CPU wheels hold and the images do not."""
    kinds: collections.Counter[str] = collections.Counter()
    unpacked = 0
    for wheel in sorted((ROOT / "build" / "wheels" / "cpu").glob("*/*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                unpacked += entry.file_size
                if (kind := kind_left_out(entry.filename)) is not None:
                    kinds[kind] += entry.file_size
    print(f"\nthe CPU wheels unpacked: {unpacked / 1e9:.2f} GB; left out of them:")
    for kind, size in kinds.most_common():
        print(f"  {megabytes(size)}  {kind}")
    print("  besides, symbols for debuggers; and whole wheels:")
    for line in (ROOT / "images" / "cpu.lock").read_text(encoding="utf-8").splitlines():
        if line.startswith("# Left out: "):
            print(f"    {line.removeprefix('# Left out: ')}")


class _Remote(io.RawIOBase):
    """A file behind a URL, read in ranges."""

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        with self._open("bytes=0-0") as answer:
            self.size = int(answer.headers["Content-Range"].rpartition("/")[2])

    def _open(self, wanted: str) -> Any:
        request = urllib.request.Request(self._url, headers={"Range": wanted})
        return urllib.request.urlopen(request, timeout=60)

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self.size, self._position + len(buffer))
        if end <= self._position:
            return 0
        with self._open(f"bytes={self._position}-{end - 1}") as answer:
            data = answer.read()
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@contextlib.contextmanager
def opened(url: str) -> Iterator[tuple[IO[bytes], int]]:
    """A wheel as a stream, and its size in bytes: on this disk, or read in ranges."""
    if url.startswith("file:"):
        path = Path(urllib.request.url2pathname(url.removeprefix("file://")))
        with open(path, "rb") as local:
            yield local, path.stat().st_size
        return
    remote = _Remote(url)
    yield io.BufferedReader(remote, 2**17), remote.size


def cuda_wheels() -> Iterator[tuple[str, str]]:
    """Name and URL of each wheel of the CUDA image, as the index offers it for the lock's hashes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        clean = {name: value for name, value in os.environ.items() if name not in ("PIP_FIND_LINKS", "PIP_CONSTRAINT")}
        command = [
            *(sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"),
            *("--require-hashes", "-r", str(ROOT / "images" / "cuda.lock"), "--report", str(report)),
        ]
        subprocess.run(command, check=True, env=clean, stderr=subprocess.DEVNULL)
        for item in json.loads(report.read_text())["install"]:
            yield item["metadata"]["name"], item["download_info"]["url"]


def compute_cuda(base: int) -> None:
    """Print the CUDA appliance's size, from the wheels' own directories."""
    packed = unpacked = kept = 0
    sizes: dict[str, int] = {}
    for name, url in cuda_wheels():
        if not url.endswith(".whl"):
            continue
        with opened(url) as (stream, size), zipfile.ZipFile(stream) as archive:
            entries = archive.infolist()
        packed += size
        unpacked += sum(entry.file_size for entry in entries)
        sizes[name] = sum(entry.file_size for entry in entries if kind_left_out(entry.filename) is None)
        kept += sizes[name]
    print("\nfednnunet/appliance with CUDA, computed from the directories of the wheels in images/cuda.lock:")
    print(f"  {megabytes(packed)}  wheels to download")
    print(f"  {megabytes(unpacked)}  unpacked")
    print(f"  {megabytes(base + kept)}  in the image, with the base, before stripping and byte code")
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    print("  of these: " + ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in ordered[:LARGEST]))


def main() -> int:
    """Print all three; 1 where a CPU image is too large."""
    found = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    large = [role for role in BOUNDS if measure(role, found[1]) > BOUNDS[role]]
    left_out()
    base = os.environ.get("BASE_IMAGE", "fednnunet/base:bookworm")
    compute_cuda(int(docker("image", "inspect", base, "--format", "{{.Size}}")))
    for role in large:
        print(f"the {role}'s image is larger than {BOUNDS[role] / 1e9:.1f} GB", file=sys.stderr)
    return 1 if large else 0


if __name__ == "__main__":
    sys.exit(main())
