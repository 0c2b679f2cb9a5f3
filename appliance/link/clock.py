"""Says in the log that this machine's clock is off: Flower alone says "401 Unauthorized", as of a wrong key."""

from __future__ import annotations

import logging

from appliance.doctor import clock
from appliance.doctor.context import Context
from appliance.settings import Settings
from federation.errors import Code, FednnunetError

log = logging.getLogger("fednnunet.link")


def look(settings: Settings) -> None:
    """Compare this machine's clock with the orchestrator's, which has just refused a request."""
    for finding in clock.check(Context(settings)):
        if finding.code is Code.CLOCK_OFF:
            error = FednnunetError(Code.CLOCK_OFF, finding.text("found", house=True))
            log.error("%s. %s", error, finding.text("advice", house=True))
