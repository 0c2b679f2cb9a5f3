#!/usr/bin/env bash
# Collect what the images install into build/wheels, so that they build with no network: images/wheelhouse.sh cpu|cuda
# Every file is held to its hash in images/VARIANT.lock; a CPU torch to its version in constraints.txt.
# PYTHON names a Python 3.11 with pip: the wheels are for the images' Python.
set -euo pipefail
cd "$(dirname "$0")/.."
variant="${1:?usage: images/wheelhouse.sh cpu|cuda}" python="${PYTHON:-.venv/bin/python}"
lock="images/$variant.lock" house="build/wheels/$variant"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "the images have Python 3.11, and $python is another: make distclean, then make PYTHON=python3.11 wheelhouse" >&2
    exit 1
}
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1577836800)}"
pip() { "$python" -m pip "$@" --quiet --disable-pip-version-check; }

rm -rf build/wheels/project
pip wheel --no-deps --wheel-dir build/wheels/project .

sums="$(cat "$lock" constraints.txt images/wheelhouse.sh | sha256sum)"
if [ "$(cat "$house/made-from" 2>/dev/null)" = "$sums" ]; then
    exit 0
fi
rm -rf "$house"
mkdir -p "$house/torch" "$house/libraries"
echo "collecting what $lock names (a few hundred MB for cpu, 3 GB for cuda)"
if [ "$variant" = cpu ]; then
    pip download --no-deps --constraint constraints.txt --dest "$house/torch" torch
    if "$python" -m zipfile --list "$house"/torch/torch-*.whl | grep -q libtorch_cuda; then
        rm -rf "$house"
        echo "your package index offers a CUDA build of torch; a CPU image needs PyTorch's CPU build of the version in" >&2
        echo "constraints.txt: name an index, or a folder (PIP_FIND_LINKS), that has it" >&2
        exit 1
    fi
fi
pip wheel --no-deps --require-hashes --wheel-dir "$house/libraries" --requirement "$lock"
find "$house/libraries" \( -name 'torch-*' -o -name 'nvidia_*' -o -name 'cuda_*' -o -name 'triton-*' \) \
    -exec mv {} "$house/torch" \;
(cd "$house" && find . -name '*.whl' -print0 | sort -z | xargs -0 sha256sum >SHA256SUMS)
echo "$sums" >"$house/made-from"
