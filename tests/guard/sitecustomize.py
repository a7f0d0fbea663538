"""A socket guard: with this folder on PYTHONPATH, Python stays on loopback.

Python imports `sitecustomize` at every start, so test workers, notebook
kernels and subprocesses are all guarded. What tries to leave the machine gets
a NetworkBlocked error that says where it wanted to go.
"""

import ipaddress
import os
import socket


class NetworkBlocked(RuntimeError):
    """Raised when guarded code tries to reach another machine."""


def _is_local(host) -> bool:
    if host in (None, "", b"", "localhost", b"localhost"):
        return True
    if host == socket.gethostname():
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text.split("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _check(host) -> None:
    if not _is_local(host):
        raise NetworkBlocked(
            f"a test or notebook tried to reach {host!r}; everything in this "
            "project runs offline"
        )


def _install() -> None:
    plain_socket, plain_lookup = socket.socket, socket.getaddrinfo

    class GuardedSocket(plain_socket):
        def _guard(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _check(address[0])

        def connect(self, address):
            self._guard(address)
            return super().connect(address)

        def connect_ex(self, address):
            self._guard(address)
            return super().connect_ex(address)

        def sendto(self, data, *rest):
            self._guard(rest[-1])
            return super().sendto(data, *rest)

    def guarded_lookup(host, *args, **kwargs):
        _check(host)
        return plain_lookup(host, *args, **kwargs)

    socket.socket = GuardedSocket
    socket.getaddrinfo = guarded_lookup


if os.environ.get("MINILLM_ALLOW_NETWORK") != "1":
    _install()
