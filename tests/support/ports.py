"""Ports that somebody else is to listen on."""

from __future__ import annotations

import os
import socket

# The system gives higher ones to who asks for any (32768 and up on Linux, 49152 elsewhere).
_FIRST, _LAST = 12_000, 32_000


def free_port() -> int:
    """One that nobody else gets between its being found free and its being listened on."""
    count = _LAST - _FIRST
    for number in range(count):
        port = _FIRST + (os.getpid() * 97 + number) % count
        # Held until this process ends: other tests are kept away by it, and who listens, by TCP, is not.
        claim = socket.socket(type=socket.SOCK_DGRAM)
        with claim, socket.socket() as probe:
            try:
                claim.bind(("127.0.0.1", port))
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            claim.detach()
            return port
    raise AssertionError("no port is free")
