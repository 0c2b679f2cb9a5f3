"""Whether the first stop on the way to the orchestrator (itself, or the proxy) takes a connection."""

from __future__ import annotations

import errno
import socket
import time

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, ok
from federation.errors import Code


def check(context: Context) -> list[Finding]:
    """Connect, and say how long it took or who said no."""
    place = network.first_stop(context.settings)
    through_proxy = place != network.orchestrator(context.settings)
    private = {"place": Private("the proxy" if through_proxy else "the orchestrator", str(place))}
    started = time.perf_counter()
    try:
        socket.create_connection((place.host, place.port), context.timeout).close()
    except (OSError, UnicodeError) as error:
        found, advice = _explain(error, context.timeout)
        return [fail(Code.PORT_NOT_REACHED, f"[place] {found}", advice, private=private)]
    milliseconds = round(1000 * (time.perf_counter() - started), 1)
    return [
        ok(
            f"[place] takes connections, in {milliseconds:g} ms",
            private=private,
            measured={"milliseconds": milliseconds},
        )
    ]


def _explain(error: Exception, timeout: float) -> tuple[str, str]:
    if isinstance(error, ConnectionRefusedError):
        return (
            "refuses: the machine is there, but nothing listens on this port, or a firewall says no",
            "Ask the coordinator whether the orchestrator runs and whether the port is right.",
        )
    if isinstance(error, TimeoutError):
        return (
            f"does not answer within {timeout:g} s: a firewall drops the packets, or the address is wrong",
            "Ask IT to let this machine dial [place] (TCP, outgoing).",
        )
    if isinstance(error, socket.gaierror | UnicodeError):
        return "has no address", "See the check dns."
    if isinstance(error, OSError) and error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        return (
            "is not reached: there is no route to it",
            "Give the container a network (not `--network none`), or ask IT for a route or a proxy.",
        )
    return f"is not reached ({type(error).__name__})", "Ask IT to let this machine dial [place] (TCP, outgoing)."
