"""Whether this machine's clock agrees with the orchestrator's: Flower signs the time with every request.

Flower (1.41.0) takes a request whose time is less than 5 s ahead of the SuperLink's clock and less than 305 s behind
it. The orchestrator's clock is the `Date` header of GET /health, which counts whole seconds: a difference is known to
half a second and half the time of the request.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import http.client
import ssl

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Number, Private, fail, ok, skipped, warn
from federation.errors import Code

AHEAD, BEHIND = 5.0, 300.0
WARN_AHEAD, WARN_BEHIND = 2.0, 60.0
_NOT_YET, _EXPIRED = 9, 10


def check(context: Context) -> list[Finding]:
    """Compare the clocks; a certificate out of its dates is no hindrance, for a wrong clock may be its cause."""
    how, checked = network.trust(context.settings), True
    try:
        skew, doubt = _measure(context, how)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code not in (_NOT_YET, _EXPIRED):
            return [skipped("the orchestrator's certificate does not hold", "See the check tls.")]
        checked = False
        try:
            skew, doubt = _measure(context, network.no_trust())
        except (OSError, http.client.HTTPException, ValueError):
            return [skipped("the orchestrator gave no date")]
    except network.NotTested as reason:
        return [skipped(str(reason))]
    except (OSError, http.client.HTTPException, ValueError) as error:
        private = {**network.private_place(context.settings), "error": Private(type(error).__name__, repr(error))}
        return [
            fail(Code.ORCHESTRATOR_UNREACHABLE, "[orchestrator] gave no date on /health ([error])", private=private)
        ]
    return [_judge(skew, doubt, checked)]


def _measure(context: Context, how: ssl.SSLContext) -> tuple[float, float]:
    """Seconds that this clock is ahead of the orchestrator's, and how far that may be off."""
    with network.secure(context, how) as connection:
        talk = network.session(context, connection)
        before = dt.datetime.now(dt.UTC)
        talk.request("GET", "/health")
        answer = talk.getresponse()
        after = dt.datetime.now(dt.UTC)
        date = answer.getheader("Date")
        answer.read(4096)
    if date is None:
        raise ValueError("no Date header")
    there = email.utils.parsedate_to_datetime(date) + dt.timedelta(seconds=0.5)
    if there.tzinfo is None:
        there = there.replace(tzinfo=dt.UTC)
    return (before + (after - before) / 2 - there).total_seconds(), 0.5 + (after - before).total_seconds() / 2


def _judge(skew: float, doubt: float, checked: bool) -> Finding:
    direction = "ahead of" if skew > 0 else "behind"
    found = f"this clock is {abs(skew):.1f} s {direction} the orchestrator's (known to {doubt:.1f} s)"
    if not checked:
        found += ", which could not prove who it is"
    measured: dict[str, Number] = {"seconds_ahead": round(skew, 2), "doubt": round(doubt, 2)}
    advice = "Let this machine keep its time by NTP (timedatectl set-ntp true); a container has its host's clock."
    if skew - doubt > AHEAD or -skew - doubt > BEHIND:
        limit = f"{AHEAD:g} s ahead" if skew > 0 else f"{BEHIND:g} s behind"
        return fail(Code.CLOCK_OFF, f"{found}; Flower refuses more than {limit}", advice, measured=measured)
    if skew - doubt > WARN_AHEAD or -skew - doubt > WARN_BEHIND:
        return warn(found, advice, Code.CLOCK_OFF, measured=measured)
    return ok(found, measured=measured)
