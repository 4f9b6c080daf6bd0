"""Where the service listens, and who may ask there: checked before a model is loaded."""

import ipaddress
import os
import socket

from llama.errors import ParameterError

VARIABLE = "LLAMA_API_KEY"


def read_key(given: str | None) -> str | None:
    """The API key: as it was given, or the variable's. Raises ParameterError where no header could carry it."""
    key = os.environ.get(VARIABLE) or None if given is None else given
    if key is not None and not (key.isascii() and key.isprintable() and key and " " not in key):
        where = VARIABLE if given is None else "--api_key"
        raise ParameterError(f"{where} is no key: it needs one or more of ASCII's printable characters, and no space")
    return key


def listen(host: str, port: int, guarded: bool) -> socket.socket:
    """A socket bound to an address. Raises ParameterError where that cannot be, or would let anybody in unasked."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise ParameterError(
            f"host={host!r} is no address of this machine: use 127.0.0.1, or 0.0.0.0 for all"
        ) from None
    if not guarded and not ipaddress.ip_address(address[0]).is_loopback:
        raise ParameterError(
            f"host={host!r} can be reached from other machines, and there is no API key: set {VARIABLE}, or say"
            " --allow_unauthenticated"
        )
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # or another process could still bind the same port
    except OSError as error:
        listener.close()
        raise ParameterError(f"cannot listen at {host} port {port}: {error.strerror}; name another --port") from None
    return listener


def url(host: str, listener: socket.socket) -> str:
    """How a client on this machine calls the service."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"
