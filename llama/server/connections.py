"""What one connection may cost: uvicorn's protocol with limits on time, and on how many there are.

uvicorn bounds the head of a request, and stops reading or writing where the other side does not keep up. It does not
end what is slow: a head that never comes, a reader that takes nothing. `watch`, called once a second, does.
"""

import time
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.server.limits import CONNECTIONS, HEAD_SECONDS, STALL_SECONDS

_SECONDS = {"waits for a request": HEAD_SECONDS, "is not read": STALL_SECONDS, "is closing": STALL_SECONDS}


class Connection(H11Protocol):
    """One that has waited too long is dropped, and the idlest one where there are too many."""

    state: str | None = None  # why it is waited for, if it is
    since = 0.0  # on the clock of `time.monotonic`

    def connection_made(self, transport: Any) -> None:
        self.look()
        others = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(others) >= CONNECTIONS:
            for one in others:
                one.look()
            idle = [one for one in others if one.state]
            dropped = min(idle, key=lambda one: one.since).transport if idle else transport
            dropped.abort()
        super().connection_made(transport)

    def look(self) -> float:
        """For how many seconds more it may stay as it is; negative where it has to go."""
        now, state = time.monotonic(), self._waits()
        if state != self.state or not self.since:
            self.state, self.since = state, now
        return self.since + _SECONDS[state] - now if state else STALL_SECONDS

    def _waits(self) -> str | None:
        if self.transport is not None and self.transport.is_closing():
            return "is closing"
        if self.flow is not None and self.flow.write_paused:
            return "is not read"
        return "waits for a request" if self.cycle is None or self.cycle.response_complete else None


def watch(connections: Iterable[Any]) -> None:
    """Drop those that have waited too long."""
    for connection in list(connections):
        if connection.look() < 0:
            connection.transport.abort()
