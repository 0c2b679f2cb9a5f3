"""Whether this machine can turn the orchestrator's name, or the proxy's, into addresses."""

from __future__ import annotations

import socket
import time

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, ok
from federation.errors import Code


def check(context: Context) -> list[Finding]:
    """Look up the first stop on the way: with a proxy the proxy looks up the orchestrator."""
    place = network.first_stop(context.settings)
    through_proxy = place != network.orchestrator(context.settings)
    what = "the proxy's" if through_proxy else "the orchestrator's"
    private = {"host": Private(f"{what} name", place.host)}
    if place.is_address:
        return [ok(f"{what} host is an address: there is no name to look up")]
    started = time.perf_counter()
    try:
        answers = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        private["error"] = Private("", f" ({error})")
        return [
            fail(
                Code.NAME_NOT_RESOLVED,
                "no address is known for [host][error]",
                "Compare the name with the coordinator's invitation. If it is right, ask IT which DNS server "
                "containers may use (`--dns`), or for a proxy (HTTPS_PROXY).",
                private=private,
            )
        ]
    milliseconds = round(1000 * (time.perf_counter() - started), 1)
    addresses = sorted({str(answer[4][0]) for answer in answers})
    private["addresses"] = Private(
        "1 address" if len(addresses) == 1 else f"{len(addresses)} addresses", ", ".join(addresses)
    )
    return [
        ok(
            f"[host] has [addresses], found in {milliseconds:g} ms",
            private=private,
            measured={"milliseconds": milliseconds, "addresses": len(addresses)},
        )
    ]
