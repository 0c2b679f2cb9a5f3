"""Lines that die without a word: the kernel ends a connection whose other side takes and acknowledges nothing."""

from __future__ import annotations

import socket
from typing import Any

DEAD = 60
"""Seconds after which such a connection ends."""


def end_when_dead(connected: Any) -> None:
    """Let the kernel end a connection that is dead, at either end of it."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_USER_TIMEOUT", DEAD * 1000), ("TCP_KEEPIDLE", DEAD // 2), ("TCP_KEEPINTVL", DEAD // 6)):
        if hasattr(socket, option):  # Linux
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
