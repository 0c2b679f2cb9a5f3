#!/usr/bin/env bash
# One layer of an image: install the wheels of a folder, leave out what never runs, and make the files the same each time.
# Usage (in the build): install.sh TARGET WHEELS. TARGET /opt/fednnunet is the environment itself, others are folders.
# Left out: static libraries, headers, tests, pip. Byte code is written here: the root of a running container is read-only.
set -euo pipefail
target="$1" wheels="$2" environment=/opt/fednnunet
pip=("$environment/bin/python" -m pip install --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check --quiet)
if [ "$target" = "$environment" ]; then
    "${pip[@]}" "$wheels"/*.whl
    "$environment/bin/python" -m pip uninstall --yes --quiet pip setuptools 2>/dev/null || true
    site="$("$environment/bin/python" -c 'import site; print(site.getsitepackages()[0])')"
    printf '/opt/torch\n/opt/libraries\n' >"$site/layers.pth"
    rm -f "$environment"/bin/[Aa]ctivate*
else
    "${pip[@]}" --target "$target" "$wheels"/*.whl
    find "$target" -name '*.a' -delete
    rm -rf "$target"/torch/{include,test,share} "$target"/nvidia/*/include "$target"/nvidia/*/*/include
    # numpy.testing and torch import parts of their own tests folders
    find "$target" -mindepth 2 -type d \( -name tests -o -name test \) \
        -not -path "$target/numpy/*" -not -path "$target/torch/*" -prune -exec rm -rf {} +
    if [ -d "$target/bin" ]; then
        find "$target/bin" -type f -not -name 'nnUNetv2_*' -delete
    fi
fi
"$environment/bin/python" -m compileall -q -j 0 --invalidation-mode unchecked-hash "$target" || true
find "$target" -exec touch --no-dereference --date=@1577836800 {} +
