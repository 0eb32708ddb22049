"""The batch host's clock, asked over the network: how far is this node's clock from it?

Logs of hundreds of ranks are read side by side, and leases and time limits compare times of different hosts.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

ASK_LIMIT_S = 5.0
ROUNDS = 5
_TIME = struct.Struct("!d")


@contextmanager
def clock_server(clock: Callable[[], float] = time.time) -> Iterator[int]:
    """Answer every connection with this host's time until the block ends; yields the TCP port."""
    with socket.create_server(("", 0), backlog=256) as server:
        thread = threading.Thread(target=_answer, args=(server, clock), name="preflight clock", daemon=True)
        thread.start()
        yield int(server.getsockname()[1])


def _answer(server: socket.socket, clock: Callable[[], float]) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:
            return  # closed: the block ended
        with connection, suppress(OSError):
            connection.settimeout(ASK_LIMIT_S)
            while connection.recv(1):
                connection.sendall(_TIME.pack(clock()))


def clock_offset_s(host: str, port: int) -> float:
    """Seconds that this node's clock is ahead of the server's, from the fastest of a few questions.

    Raises:
        OSError: the server cannot be reached.
    """
    best_delay, best_offset = float("inf"), 0.0
    with socket.create_connection((host, port), timeout=ASK_LIMIT_S) as connection:
        for _ in range(ROUNDS):
            before = time.time()
            connection.sendall(b"?")
            data = b""
            while len(data) < _TIME.size:
                part = connection.recv(_TIME.size - len(data))
                if not part:
                    raise ConnectionError(f"the clock of {host} went away")
                data += part
            after = time.time()
            if after - before < best_delay:
                best_delay, best_offset = after - before, (before + after) / 2 - _TIME.unpack(data)[0]
    return best_offset
