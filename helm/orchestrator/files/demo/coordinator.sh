# The coordinator's part of the demo, beside the orchestrator: invites three phantom hospitals, lets them in, gives the
# study, and shows it. Nobody compares keys and the invitations go over plain HTTP inside the cluster, under a name that
# nobody can guess: a demo with generated data, and no more than that. A restart goes on where this stopped.
#
# ADDRESS  HOST:PORT that the hospitals dial        SECRET  file with the name that nobody can guess
# ROUNDS   rounds of training                       PORT    where the invitations are served
# FEDNNUNET_STATE, FEDNNUNET_CONTROL_PORT  as `orchestrator start` has them
set -eu
umask 077
state=$FEDNNUNET_STATE
control=127.0.0.1:${FEDNNUNET_CONTROL_PORT:-8100}
served=$state/demo/served/$(cat "$SECRET")
sites="hospital_a hospital_b hospital_c"

echo "demo: waiting for the SuperLink"
until orchestrator health --ready >/dev/null 2>&1; do sleep 2; done

mkdir -p "$served"
: >"$state/demo/served/index.html" # no listing
cp "$state/authority/ca.crt" "$state/authority/control.token" "$served"
for site in $sites; do
    invitation=$served/$site.json
    test -f "$invitation" ||
        fednnunet site invite "$site" --state "$state" --orchestrator "$ADDRESS" --output "$invitation"
done
python3 -m http.server "$PORT" --directory "$state/demo/served" >/dev/null 2>&1 &
server=$!
trap 'kill "$server"' EXIT

if ! test -f "$state/demo/study.yaml"; then
    rm -rf "$state/demo/phantoms"
    fednnunet simulate phantoms "$state/demo/phantoms" --rounds "$ROUNDS"
    mv "$state/demo/phantoms/study.yaml" "$state/demo/study.yaml"
    rm -rf "$state/demo/phantoms"
fi
echo "demo: waiting for the hospitals"
while test "$(fednnunet site list --state "$state" --control "$control" | cut -f2 | grep -cx approved)" -lt 3; do
    for site in $(fednnunet site requests --state "$state" | cut -f1); do
        fednnunet site approve "$site" --state "$state" --control "$control" --yes
    done
    sleep 2
done
fednnunet study submit "$state/demo/study.yaml" --state "$state" --control "$control"
echo "demo: the model is in $state/studies; this container only serves the invitations now"
wait "$server"
