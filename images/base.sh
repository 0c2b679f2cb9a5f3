#!/usr/bin/env bash
# The base image where no registry can be reached: Debian with Python 3.11 and tini, made by mmdebstrap.
# Usage: images/base.sh IMAGE [PACKAGE ...]; DOCKER names the docker program. Needs mmdebstrap, and root or user namespaces.
set -euo pipefail
image="${1:?usage: images/base.sh IMAGE [PACKAGE ...]}"
shift
packages="$(IFS=,; echo "python3,python3-venv,ca-certificates,tini${*:+,$*}")"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
command -v mmdebstrap >/dev/null || { echo "mmdebstrap is missing: apt-get install mmdebstrap" >&2; exit 1; }
mmdebstrap --quiet --variant=minbase --include="$packages" \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --customize-hook='rm -rf "$1"/var/cache/apt/* "$1"/var/log/*.log "$1"/var/log/apt "$1"/etc/apt/apt.conf.d/99mmdebstrap' \
    bookworm "$work/base.tar"
"${DOCKER:-docker}" import --change 'CMD ["python3"]' "$work/base.tar" "$image" >/dev/null
echo "made $image from Debian's packages"
