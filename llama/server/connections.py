"""What one connection may cost: uvicorn's protocol with limits on time, and on how many there are.

uvicorn bounds the head of a request, and stops reading or writing where the other side does not keep up. It does not
end what is slow: a head that never comes, a reader that takes nothing. `watch`, called once a second, does.
"""

import math
import time
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama.server.limits import CONNECTIONS, HEAD_SECONDS, STALL_SECONDS

_SECONDS = {
    "waits for a request": HEAD_SECONDS, "waits for a body": math.inf,  # which the application bounds
    "is not read": STALL_SECONDS, "is closing": STALL_SECONDS,
}  # fmt: skip


class Connection(H11Protocol):
    """One that has waited too long is dropped, and the idlest one where there are too many."""

    state: str | None = None  # why it is waited for, if it is
    since = 0.0  # on the clock of `time.monotonic`
    unread = 0  # bytes that were written and not taken yet

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.look()
        here = [one for one in self.connections if isinstance(one, Connection) and not one.transport.is_closing()]
        if len(here) > CONNECTIONS:
            for one in here:
                one.look()
            idle = [one for one in here if one.state and one is not self]
            min(idle, key=lambda one: one.since, default=self).transport.abort()

    def look(self) -> float:
        """For how many seconds more it may stay as it is; negative where it has to go."""
        now, state = time.monotonic(), self._waits()
        unread = self.transport.get_write_buffer_size()
        if state != self.state or unread < self.unread or not self.since:  # a slow reader is no stalled one
            self.state, self.since = state, now
        self.unread = unread
        return self.since + _SECONDS[state] - now if state else STALL_SECONDS

    def _waits(self) -> str | None:
        if self.transport.is_closing():
            return "is closing"
        if self.flow.write_paused:
            return "is not read"
        if self.cycle is None or self.cycle.response_complete:
            return "waits for a request"
        return "waits for a body" if self.conn.their_state is h11.SEND_BODY else None


def watch(connections: Iterable[Any]) -> None:
    """Drop those that have waited too long."""
    for connection in list(connections):
        if connection.look() < 0:
            connection.transport.abort()
