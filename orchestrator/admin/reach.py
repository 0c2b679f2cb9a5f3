"""Reaching a running orchestrator through its control listener."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from federation.console import require
from federation.errors import Code, FednnunetError
from orchestrator.enrollment.authority import Authority

if TYPE_CHECKING:
    from federation.flower.clients import Control


def control(state: Path, address: str) -> Control:
    """A client of the control listener, with the certificate and the token of a state folder."""
    from federation.flower.clients import Control

    authority = Authority(state / "authority")
    authority.check()
    return Control(address, authority.ca.read_bytes(), authority.token.read_text().strip())


@contextlib.contextmanager
def reaching(address: str) -> Iterator[None]:
    """Turn what the network says into FNU-604; FNU-704 where Flower is not installed."""
    require("orchestrator", "flwr")
    from federation.flower.clients import HTTPError

    try:
        yield
    except HTTPError as error:
        raise FednnunetError(
            Code.ORCHESTRATOR_UNREACHABLE,
            f"control listener {address}: {str(error).splitlines()[0]}",
            "Start it (`orchestrator start`), or give the address of its control listener: --control HOST:PORT.",
        ) from error
