"""Who runs the appliance, who else can read the site's private key, and whether the hospital's policy can be used."""

from __future__ import annotations

import os
import stat

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, of_error, ok, warn
from appliance.link import policy as hospital_policy
from federation.errors import Code, FednnunetError


def check(context: Context) -> list[Finding]:
    """The user id, the key file, the policy."""
    return [_user(os.getuid()), *key(context), policy(context)]


def _user(number: int) -> Finding:
    if number == 0:
        return warn(
            "the appliance runs as root, which it never needs",
            "Start the container with its own user (leave out --user 0), or use an ordinary account.",
            Code.RUNS_AS_ROOT,
        )
    return ok(f"the appliance runs as an ordinary user (uid {number})", measured={"uid": number})


def key(context: Context) -> list[Finding]:
    """The private key: there, readable, for its owner alone, of the kind that Flower takes."""
    path = context.settings.site_key
    private = {"key": Private("the site's private key", str(path))}
    try:
        status = path.stat()
        content = path.read_bytes()
    except FileNotFoundError:
        return [
            fail(
                Code.STATE_NOT_READY,
                "[key] is missing",
                "Run `appliance enroll` with the coordinator's invitation, or mount the folder that holds it.",
                private=private,
            )
        ]
    except OSError as error:
        private["error"] = Private(type(error).__name__, str(error))
        advice = "Let the appliance's user own the file (chown), with mode 0600."
        return [fail(Code.KEY_UNUSABLE, "[key] cannot be read ([error])", advice, private=private)]
    mode = stat.S_IMODE(status.st_mode)
    findings = []
    # a Secret of Kubernetes is root's, in a group that the pod's containers alone have: 0440, and nobody can write it
    by_group = status.st_uid == 0 and status.st_gid in os.getgroups() and not mode & 0o037
    if mode & 0o077 and not by_group:
        findings.append(
            fail(
                Code.KEY_EXPOSED,
                f"[key] has mode {mode:04o}: others on this machine may read it",
                "chmod 600 [key]. If others had access to it, make a new key (`appliance enroll`) and tell the "
                "coordinator.",
                private=private,
                measured={"mode": f"{mode:04o}"},
            )
        )
    try:
        loaded = load_ssh_private_key(content, None)
        fits = isinstance(loaded, ec.EllipticCurvePrivateKey)
    except (ValueError, TypeError):
        fits = False
    if not fits:
        findings.append(
            fail(
                Code.KEY_UNUSABLE,
                "[key] is not an elliptic-curve key in OpenSSH's format, without a password",
                "Make it with `appliance enroll`.",
                private=private,
            )
        )
    return findings or [ok(f"[key] has mode {mode:04o} and is a key that Flower takes", private=private)]


def policy(context: Context) -> Finding:
    """The policy, read as the link reads it at its start."""
    path = context.settings.policy
    private = {"policy": Private("the hospital's policy", str(path))}
    try:
        hospital_policy.load(path)
    except FednnunetError as error:
        return of_error(error)
    if not path.is_file():
        return ok("there is no policy.toml: each study waits for `appliance approve`", private=private)
    return ok("[policy] can be read, and every key in it is known", private=private)
