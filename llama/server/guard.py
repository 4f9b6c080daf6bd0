"""Who may ask: the API key, and the browsers that a page from elsewhere makes ask.

A page of any site can have its visitor's browser send requests to a service on the visitor's own machine. Its name for
the service may even lead there (DNS rebinding). So an Origin must be the service's own, and where there is no key that
such a page lacks, the service must be called by an address, by localhost, or by the name that --host gives.
"""

import hmac
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llama.server.metrics import Metrics
from llama.server.refusals import Refusal

OPEN = ("/", "/health")  # what needs no key: neither asks the model anything
_HOST = re.compile(r"(?P<name>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?", re.IGNORECASE | re.ASCII)
_SAFE = [(b"x-content-type-options", b"nosniff"), (b"cross-origin-resource-policy", b"same-origin")]


class Guard:
    """Lets a request through to `app`, or answers it with the reason why not; counts the answers."""

    def __init__(self, app: ASGIApp, *, key: str | None, host: str, paths: frozenset[str], metrics: Metrics) -> None:
        self._app, self._host, self._paths, self._metrics = app, host, paths, metrics
        self._key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests[path, message["status"]] += 1
                message = {**message, "headers": [*message["headers"], *_SAFE]}
            await send(message)

        if refusal := self._refusal(Headers(scope=scope), scope["path"]):
            response = JSONResponse(refusal.body, refusal.status, refusal.headers)
            return await response(scope, receive, counted)
        await self._app(scope, receive, counted)

    def _refusal(self, headers: Headers, path: str) -> Refusal | None:
        host, origins = headers.get("host", ""), headers.getlist("origin")
        if any(re.sub("^https?://", "", origin).lower() != host.lower() for origin in origins):
            return Refusal(403, "the Origin is another site's: pages from elsewhere are not answered")
        site = headers.get("sec-fetch-site", "none")  # which browsers add to what a page asks without an Origin
        if path != "/" and site not in ("none", "same-origin"):  # links may lead to the page
            return Refusal(403, "another site's page asks: pages from elsewhere are not answered")
        if self._key is None and not self._is_own(host):
            said = "the Host is not a name of this service's: call it by an address, by localhost or by its --host"
            return Refusal(403, said)
        return None if self._key is None else self._key_refusal(self._key, headers, path)

    def _key_refusal(self, key: bytes, headers: Headers, path: str) -> Refusal | None:
        if path in OPEN:
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), key)
        if right and scheme.lower() == "bearer":
            return None
        said = "the API key is wrong" if given else "the API key is missing: send Authorization: Bearer KEY"
        return Refusal(401, said, "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def _is_own(self, host: str) -> bool:
        """Whether a Host cannot be a name that somebody else has made lead here."""
        found = _HOST.fullmatch(host)
        if not found:
            return False
        name = found["name"].lower()
        return name in ("localhost", self._host.lower()) or is_address(name.strip("[]"))


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
