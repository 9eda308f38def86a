"""llama.cpp's RPC servers, which hold layers on other machines: pykvc/lib/ggml-rpc-server, one on each."""
import socket
import struct
from typing import Any

from . import _core, weights

HELLO, N_HELLO = 14, 24     # the command every version knows, and the bytes it sends along
N_ANSWER_MAX = 256
TIMEOUT_S = 5.0


def endpoints(servers: Any) -> tuple[str, ...]:
    """host:port of each server that "host:port,host:port" names. ValueError: it is no host:port."""
    if servers is None:
        return ()
    if _core.RPC_VERSION is None:
        raise ValueError("rpc_servers: this build knows no RPC; build it with -C cmake.define.PYKVC_RPC=ON")
    found = [part.strip() for part in servers.split(",")] if isinstance(servers, str) else servers
    if not isinstance(found, (list, tuple)) or not found:
        raise ValueError("rpc_servers names at least one server, as 192.168.1.2:50052")
    for endpoint in found:
        _host_and_port(endpoint)
    return tuple(found)


def check(servers: tuple[str, ...]) -> None:
    """Asks each for its version, since llama.cpp ends the process where none answers. ValueError: nobody answers
    there, or in another version."""
    for endpoint in servers:
        if not weights.uses(endpoint):  # a server talks to one process at a time
            _check_version(endpoint, *_host_and_port(endpoint))


def _host_and_port(endpoint: Any) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":") if isinstance(endpoint, str) else ("", "", "")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ValueError(f"rpc_servers: a server is host:port, such as 192.168.1.2:50052, not {endpoint!r}")
    return host, int(port)


def _check_version(endpoint: str, host: str, port: int) -> None:
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT_S) as connection:
            connection.sendall(struct.pack("=BQ", HELLO, N_HELLO) + bytes(N_HELLO))
            n_answer, version = struct.unpack("=QB", _received(connection, 9))
    except OSError as error:
        raise ValueError(f"rpc_servers: no RPC server answers at {endpoint} ({error}): start ggml-rpc-server there; it "
                         "serves one program at a time") from None
    if n_answer > N_ANSWER_MAX or version != _core.RPC_VERSION:
        raise ValueError(f"rpc_servers: {endpoint} does not speak llama.cpp's RPC of version {_core.RPC_VERSION}: take "
                         "ggml-rpc-server of this build")


def _received(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n and (part := connection.recv(n - len(data))):
        data += part
    if len(data) < n:
        raise OSError("it closed the connection")
    return data
