"""Proxy settings of the environment: what they mean for the appliance, and whether the proxy opens the way.

What Flower's client does with them (httpx 0.28, flwr 1.41.0): it honours HTTPS_PROXY, ALL_PROXY and NO_PROXY; NO_PROXY
knows names, domains and single addresses, no ranges such as 10.0.0.0/8. It does not read SSL_CERT_FILE: the appliance
hands it `ca_certificate`, and that alone counts.

The link talks to the supernode over http://127.0.0.1, by the same client; the appliance adds 127.0.0.1 to NO_PROXY for
its own processes, so that no proxy gets these calls.
"""

from __future__ import annotations

import importlib
import os
import re
import urllib.parse

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, ok, skipped, warn
from federation.errors import Code

VARIABLES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
_RANGE = re.compile(r"(^|,)\s*[0-9a-fA-F.:]+/[0-9]+\s*(,|$)")


def check(context: Context) -> list[Finding]:
    """Show the settings, then try the way through the proxy."""
    found = {name: value for name in VARIABLES if (value := os.environ.get(name) or os.environ.get(name.lower()))}
    findings = [_shown(found)]
    way = network.proxy(context.settings)
    if way is not None:
        findings.append(_try(context, way))
    elif any(name in found for name in ("HTTPS_PROXY", "ALL_PROXY")):
        findings.append(ok("NO_PROXY names the orchestrator: the appliance dials it directly"))
    if _RANGE.search(found.get("NO_PROXY", "")):
        findings.append(
            warn(
                "NO_PROXY holds a range of addresses, which Flower's client does not understand",
                "Name the hosts or single addresses in NO_PROXY.",
            )
        )
    if "SSL_CERT_FILE" in found or "SSL_CERT_DIR" in found:
        findings.append(
            ok("SSL_CERT_FILE, SSL_CERT_DIR: without effect, the orchestrator is checked against ca_certificate alone")
        )
    return findings


def _shown(found: dict[str, str]) -> Finding:
    if not any(name.endswith("_PROXY") and name != "NO_PROXY" for name in found):
        return ok("no proxy is set: the appliance dials the orchestrator directly")
    values = ", ".join(f"{name}={_without_password(value)}" for name, value in found.items())
    return ok("set: [variables]", private={"variables": Private(", ".join(found), values)})


def _without_password(value: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//***@", value)


def _try(context: Context, way: str) -> Finding:
    private = {
        **network.private_place(context.settings),
        "proxy": Private("the proxy", str(network.proxy_place(way))),
    }
    scheme = urllib.parse.urlsplit(way).scheme
    if scheme.startswith("socks"):
        try:
            importlib.import_module("socksio")  # what httpx asks for
        except ImportError:
            return fail(
                Code.PROXY_REFUSED,
                "the proxy speaks SOCKS, which this installation does not",
                "Set HTTPS_PROXY to an http:// proxy, or install httpx[socks].",
                private=private,
            )
    try:
        network.connect(context).close()
    except network.NotTested as error:
        return warn(
            f"{error}: the way through it was not tried", "Start the appliance and read its log.", private=private
        )
    except network.ProxyRefused as error:
        advice = {
            407: "The proxy wants a name and a password: HTTPS_PROXY=http://USER:PASSWORD@HOST:PORT.",
            0: "Compare HTTPS_PROXY with what IT gave: something else may listen there.",
        }.get(error.status, "Ask IT to let [orchestrator] pass (CONNECT), or add it to NO_PROXY if it can be dialled.")
        found = f"[proxy] answers CONNECT with {error.status}" if error.status else "[proxy] gives no answer to CONNECT"
        return fail(Code.PROXY_REFUSED, found, advice, private=private, measured={"answer": error.status})
    except (OSError, UnicodeError):
        return skipped("the proxy is not reached", "See dns and tcp; compare HTTPS_PROXY with what IT gave.")
    return ok("[proxy] opens the way to [orchestrator] (CONNECT); Flower's client takes it too", private=private)
