"""How often to look for what nobody announces: less often the longer it has been waited for.

A look costs both ends some milliseconds of a processor, which on a small machine are taken from training, and at the
orchestrator from the other sites. Late by a share of what has been waited, a look is late by that share at most.
"""

from __future__ import annotations

SLOWEST = 3.0
"""Seconds: Flower's own pause between two looks for a message."""
HOLD = 20.0
"""Seconds for which the SuperLink holds a site's look that would find nothing: proxies end a request that is not
answered for longer, the first of them after 30."""
UNHEARD = 10.0
"""Seconds after which a message that its site does not fetch is given out again."""


def pause(poll: float, waited: float, share: float) -> float:
    """Seconds until the next look.

    Parameters
    ----------
    poll : float
        Seconds between two looks at first.
    waited : float
        Seconds since something came.
    share : float
        The part of `waited` by which a look may come late.

    Returns
    -------
    float
        From `poll` up to `SLOWEST`.
    """
    return min(SLOWEST, max(poll, share * waited))
