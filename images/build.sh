#!/usr/bin/env bash
# Build one image with no network: images/build.sh appliance|orchestrator cpu|cuda [TAG]
# BASE_IMAGE, TOOLS_IMAGE, SOURCE and DOCKER are taken from the environment. Needs BuildKit and `make wheelhouse`.
set -euo pipefail
cd "$(dirname "$0")/.."
role="${1:?usage: images/build.sh appliance|orchestrator cpu|cuda [TAG]}" torch="${2:-cpu}"
version="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)"
tag="${3:-fednnunet/$role:$version-$torch}"
revision="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
created="$(date -u -d "@$(git log -1 --format=%ct 2>/dev/null || echo 0)" +%Y-%m-%dT%H:%M:%SZ)"
[ -d "build/wheels/$torch/torch" ] || { echo "build/wheels/$torch is missing: make wheelhouse TORCH=$torch" >&2; exit 1; }
DOCKER_BUILDKIT=1 "${DOCKER:-docker}" build --quiet --network none --file "images/$role.Dockerfile" --tag "$tag" \
    --build-arg BASE_IMAGE="${BASE_IMAGE:-fednnunet/base:bookworm}" \
    --build-arg TOOLS_IMAGE="${TOOLS_IMAGE:-fednnunet/tools:bookworm}" \
    --build-arg TORCH="$torch" --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    --build-arg CREATED="$created" --build-arg SOURCE="${SOURCE:-unknown}" . >/dev/null
echo "built $tag"
