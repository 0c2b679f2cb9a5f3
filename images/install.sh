#!/usr/bin/env bash
# One layer of an image: install the wheels of a folder, leave out what never runs, and make the files the same each time.
# Usage (in the build): install.sh TARGET WHEELS [PACKAGE_LEFT_OUT ...]. TARGET /opt/fednnunet is the environment itself,
# others are folders. Left out besides: static libraries, headers, tests, symbols for debuggers, pip.
# Byte code is written here: the root of a running container is read-only.
set -euo pipefail
target="$1" wheels="$2" environment=/opt/fednnunet
shift 2
pip=("$environment/bin/python" -m pip install --no-index --no-deps --no-compile --no-cache-dir --disable-pip-version-check --quiet)
# Strip a library, unless what comes out cannot be loaded: strip misplaces the segments of some that auditwheel has moved.
slim() {
    local kind offset address rest
    strip --strip-unneeded -o /tmp/slim "$1" || return 0
    while read -r kind offset address rest; do
        if [ "$kind" = LOAD ] && (((offset - address) % 4096)); then
            return 0
        fi
    done < <(readelf --program-headers --wide /tmp/slim)
    cat /tmp/slim >"$1"
}

if [ "$target" = "$environment" ]; then
    "${pip[@]}" "$wheels"/*.whl
    "$environment/bin/python" -m pip uninstall --yes --quiet pip setuptools 2>/dev/null || true
    site="$("$environment/bin/python" -c 'import site; print(site.getsitepackages()[0])')"
    printf '/opt/torch\n/opt/libraries\n' >"$site/layers.pth"
    rm -f "$environment"/bin/[Aa]ctivate*
else
    chosen=()
    for wheel in "$wheels"/*.whl; do
        name="$(basename "$wheel")"
        [[ " $* " == *" ${name%%-*} "* ]] || chosen+=("$wheel")
    done
    "${pip[@]}" --target "$target" "${chosen[@]}"
    find "$target" -name '*.a' -delete
    rm -rf "$target"/torch/{include,test,share} "$target"/nvidia/*/include "$target"/nvidia/*/*/include \
        "$target"/Crypto/SelfTest
    if [ -d "$target/skimage" ]; then # /opt/libraries; Triton, beside a CUDA torch, reads C files of its own
        find "$target/skimage/data" -type f -not -name '*.py*' -delete
        find "$target" -type f \( -name '*.pyx' -o -name '*.pxd' -o -name '*.[ch]' -o -name '*.[ch]pp' \) -delete
    fi
    # numpy.testing and torch import parts of their own tests folders
    find "$target" -mindepth 2 -type d \( -name tests -o -name test \) \
        -not -path "$target/numpy/*" -not -path "$target/torch/*" -prune -exec rm -rf {} +
    find "$target"/torch/bin -type f -not -name torch_shm_manager -delete 2>/dev/null || true
    while IFS= read -r -d '' library; do
        slim "$library"
    done < <(find "$target" -type f \( -name '*.so' -o -name '*.so.*' \) -print0)
    if [ -d "$target/bin" ]; then
        find "$target/bin" -type f -not -name 'nnUNetv2_*' -delete
    fi
fi
"$environment/bin/python" -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$target" || true # templates are no Python
find "$target" -exec touch --no-dereference --date=@1577836800 {} +
