# A phantom hospital of the demo enrolls: generated data, an invitation, keys made here, a request. Once; then it ends.
#
# SITE    hospital_a, hospital_b or hospital_c      SECRET       file with the name under which its invitation is served
# FOLDER  where data, config and state go           INVITATIONS  URL of the demo's server
set -eu
config=$FOLDER/config
test -f "$config/enrolled" && exit 0
mkdir -p "$FOLDER/data" "$config" "$FOLDER/state"
work=$(mktemp -d)
case $SITE in
hospital_a) dataset=Dataset301_Phantom ;;
hospital_b) dataset=Dataset302_Phantom ;;
hospital_c) dataset=Dataset303_Phantom ;;
esac
fednnunet simulate phantoms "$work/phantoms"
rm -rf "$FOLDER/data/$dataset"
cp -r "$work/phantoms/$dataset" "$FOLDER/data/"
echo "demo: $SITE waits for its invitation"
until python3 -c "import sys, urllib.request as r; r.urlretrieve(*sys.argv[1:])" \
    "$INVITATIONS/$(cat "$SECRET")/$SITE.json" "$work/invitation.json" 2>/dev/null; do sleep 2; done
appliance enroll "$work/invitation.json" --online --data "$FOLDER/data" --device cpu \
    --config "$config" --state "$FOLDER/state"
echo 'studies = "any"  # a demo with phantoms: a hospital approves each study' >"$config/policy.toml"
rm -rf "$work"
touch "$config/enrolled"
