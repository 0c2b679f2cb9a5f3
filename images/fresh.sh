#!/usr/bin/env bash
# The README's two commands on a fresh machine: a bare Debian container (python3, python3-venv, make, git and nothing else),
# an ordinary user, a clone of the last commit. Prints how long each took. DOCKER names the docker program.
# pip's settings on this machine (PIP_*, its configuration, its certificates) hold in the container too.
set -euo pipefail
cd "$(dirname "$0")/.."
docker="${DOCKER:-docker}" image=fednnunet/fresh:bookworm
work="$(mktemp -d)"
name="fednnunet-fresh-$$"
trap '"$docker" rm -f "$name" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT
if ! "$docker" image inspect "$image" >/dev/null 2>&1; then
    if [ "${BASE:-docker}" = debian ]; then
        mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,make,git,ca-certificates bookworm "$work/base.tar"
        "$docker" import "$work/base.tar" "$image" >/dev/null
    else
        printf 'FROM debian:bookworm-slim\nRUN apt-get update && apt-get install -y --no-install-recommends %s\n' \
            "python3 python3-venv make git ca-certificates" | "$docker" build -t "$image" -
    fi
fi
git clone --quiet --bare . "$work/repository.git"
chmod -R a+rX "$work"
arguments=(--env HOME=/home/someone --env CI="${CI:-}" --volume "$work/repository.git:/repository.git:ro")
while IFS='=' read -r variable value; do
    arguments+=(--env "$variable=$value")
    if [[ "$value" = /* && -e "$value" ]]; then
        arguments+=(--volume "$value:$value:ro")
    fi
done < <(env | grep '^PIP_' || true)
for folder in /etc/pip.conf /etc/xdg/pip $(sed -n 's#.*file://\(/[^ /]*\).*#\1#p' /etc/pip.conf 2>/dev/null | sort -u); do
    [ ! -e "$folder" ] || arguments+=(--volume "$folder:$folder:ro")
done
"$docker" run --name "$name" --shm-size 1g "${arguments[@]}" "$image" bash -euc '
    echo "someone:x:1000:1000::/home/someone:/bin/bash" >>/etc/passwd
    mkdir /home/someone && chown 1000:1000 /home/someone
    cat >/run/fresh <<"SCRIPT"
set -euo pipefail
git config --global --add safe.directory /repository.git
git clone --quiet /repository.git ~/fednnunet
cd ~/fednnunet
SECONDS=0
make demo
echo "make demo: $SECONDS s, the environment included"
SECONDS=0
make test
echo "make test: $SECONDS s"
SCRIPT
    exec setpriv --reuid 1000 --regid 1000 --clear-groups bash /run/fresh
'
