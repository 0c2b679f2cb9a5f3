"""Whether the orchestrator lets this site in: whether the coordinator has approved its key, and has not revoked it.

The question is signed with the site's key, as the appliance's are, and changes nothing at the orchestrator: it may be
asked before the appliance is started and while it runs.
"""

from __future__ import annotations

from appliance.doctor import network
from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, ok, skipped, warn
from federation.errors import Code, FednnunetError


def check(context: Context) -> list[Finding]:
    """Ask."""
    settings = context.settings
    try:
        from federation.flower import clients
    except ImportError as error:
        raise FednnunetError(Code.EXTRA_MISSING, f"not installed: {error.name}") from error
    try:
        known = clients.is_let_in(
            settings.orchestrator, settings.ca_certificate.read_bytes(), settings.site_key, context.timeout
        )
    except clients.HTTPError as error:
        private = {**network.private_place(settings), "error": Private(type(error).__name__, repr(error))}
        return [
            fail(
                Code.ORCHESTRATOR_UNREACHABLE,
                "[orchestrator] did not say whether it lets this site in: [error]",
                "Ask the coordinator whether the orchestrator runs; where a proxy or an ingress stands between, "
                "whether it passes on POST /v1/fleet with all its headers.",
                private=private,
            )
        ]
    except (OSError, ValueError):
        return [skipped("this site's key or the federation's CA cannot be read", "See the checks user and tls.")]
    if known:
        return [ok("the orchestrator lets this site in")]
    return [
        warn(
            "the orchestrator does not let this site in (yet)",
            "Ask the coordinator whether the request has come and is approved, or whether the site was revoked.",
            Code.NOT_LET_IN,
        )
    ]
