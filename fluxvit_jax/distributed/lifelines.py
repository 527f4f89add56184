"""Connections between hosts: they break when one of them dies, and tell of a signal to stop.

Host 0 has a TCP connection with every other host, besides those of JAX. The kernel closes it
however a process dies, and its probes find out a machine that is gone. JAX alone would abort the
others with a stack: up to a minute later, or at once if host 0 dies, which `_outlive` puts off.

A signal reaches all hosts whatever their main threads are doing, such as waiting within JAX for a
host that waits for its data. It is a hint only: what follows from it, hosts decide together.
"""

import contextlib
import os
import secrets
import selectors
import socket
import stat
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator

from fluxvit_jax.distributed.console import say
from fluxvit_jax.distributed.interrupts import NO_DESCRIPTOR, SIGNALS
from fluxvit_jax.distributed.mesh import coordinator_address, gather, host_count, host_index

# A machine may be silent for 25 s: less than half of hosts.HEARTBEAT_SECONDS, when JAX may abort.
PROBES = {"KEEPIDLE": 10, "KEEPINTVL": 5, "KEEPCNT": 3}
CONNECT_SECONDS = 10  # to reach host 0
OUTLIVE_SECONDS = 5  # for all hosts to say that host 0 died
NUMBER = struct.Struct("!i")  # a message: number of a host that died, LEAVES, or less
LEAVES = -1  # the sender ends, and has said why; less than that is -stop_status()

_lifelines: "_Lifelines | None" = None  # of this process, if there are several hosts


@contextlib.contextmanager
def connected(on_death: Callable[[int], None]) -> Iterator[None]:
    """A context of all hosts in which `on_death(host)` is called, in a thread, if another dies.

    One that cannot reach host 0 goes without, and says so.
    """
    global _lifelines
    _lifelines = _Lifelines(_connect(), on_death)
    keeper = _outlive() if host_index() == 0 else contextlib.nullcontext()
    with keeper:
        try:
            yield
        finally:
            leave()
            _lifelines.close()
            _lifelines = None


def leave() -> None:
    """Tells the other hosts that the end of this one is no death; without any, does nothing."""
    if _lifelines is not None:
        _lifelines.leave()


def stop_status() -> int:
    """128 + the number of a signal that some host has got; 0 before, and without other hosts.

    Hosts learn of it at different times. See `signal_descriptor`.
    """
    return _lifelines.stop_status if _lifelines is not None else 0


def signal_descriptor() -> int:
    """For `signal.set_wakeup_fd`, which has all hosts told of a signal; -1 without other hosts."""
    return _lifelines.signal_descriptor if _lifelines is not None else NO_DESCRIPTOR


class _Lifelines:
    """The connections of this process. peers: each with the number of its host.

    Attributes:
        stop_status, signal_descriptor: see the functions.
    """

    def __init__(self, peers: dict[socket.socket, int], on_death: Callable[[int], None]):
        self._peers, self._on_death = peers, on_death
        self._leaving = False
        self.stop_status = 0
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)  # as `signal.set_wakeup_fd` asks for
        self.signal_descriptor = self._ours.fileno()
        self._selector = selectors.DefaultSelector()
        for readable in (self._theirs, *peers):
            self._selector.register(readable, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def leave(self) -> None:
        self._leaving = True  # peers that close their end from now on have left as well
        self._tell(LEAVES)

    def _tell(self, number: int) -> None:
        """Sends a message to all peers."""
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.send(NUMBER.pack(number))

    def close(self) -> None:
        self._ours.close()
        self._thread.join()
        self._selector.close()
        for own in (self._theirs, *self._peers):
            own.close()

    def _watch(self) -> None:
        while True:
            for key, _ in self._selector.select():
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is not self._theirs:
                    self._hear(key.fileobj)
                elif not (signals := self._theirs.recv(64)):
                    return  # `close`
                else:
                    for number in set(signals).intersection(SIGNALS):
                        self._stop(128 + number)

    def _stop(self, status: int) -> None:
        """Notes the first signal, and tells of it."""
        if not self.stop_status:
            self.stop_status = status
            self._tell(-status)

    def _hear(self, peer: socket.socket) -> None:
        try:
            message = peer.recv(NUMBER.size)
        except OSError:  # reset by its kernel, or without an answer to the probes
            message = b""
        host = self._peers[peer]
        [number] = NUMBER.unpack(message) if message else [host]
        if number < LEAVES:
            self._stop(-number)
            return
        if number in (host, LEAVES):
            # It stays open: if this host closed it before `leave`, that would be a death.
            self._selector.unregister(peer)
        if number != LEAVES and not self._leaving:
            self._tell(number)
            self._on_death(number)


def _connect() -> dict[socket.socket, int]:
    """Host 0's connections with the others, or the one with host 0, by number of the other host."""
    peers: dict[socket.socket, int] = {}
    listener = listen("::", 0) if host_index() == 0 else None
    own = [listener.getsockname()[1], secrets.token_hex(8)] if listener else []
    port, secret = gather(own)
    address, error = coordinator_address().rpartition(":")[0].strip("[]"), ""
    if listener is None:
        try:
            peer = socket.create_connection((address, port), CONNECT_SECONDS)
            peer.sendall(f"{secret}{host_index():8}".encode())
            peers[_probed(peer)] = 0
        except OSError as reason:
            error = f"host {host_index()} cannot reach host 0 at {address}:{port}: {reason}"
    errors = [text for text in gather([error]) if text]
    if listener is not None:
        listener.settimeout(CONNECT_SECONDS)
        with listener, contextlib.suppress(TimeoutError):
            while len(peers) < host_count() - 1 - len(errors):
                peer, _ = listener.accept()
                said = _first_words(peer, len(secret) + 8)
                if said.startswith(secret):  # else a stranger
                    peers[_probed(peer)] = int(said[len(secret) :])
    if errors:
        say(f"warning: {errors[0]}; without, others learn from JAX, within a minute, if it dies")
    return peers


def listen(address: str, port: int) -> socket.socket:
    """A socket that listens as gRPC's do; at "::" on all addresses. Raises OSError."""
    if address == "::" and not socket.has_dualstack_ipv6():
        address = ""
    if ":" not in address:
        return socket.create_server((address, port))
    return socket.create_server(
        (address, port), family=socket.AF_INET6, dualstack_ipv6=address == "::", backlog=4096
    )


def _first_words(peer: socket.socket, count: int) -> str:
    """The first bytes from a new connection, as text; "" if they do not come."""
    peer.settimeout(1)
    try:
        return peer.recv(count, socket.MSG_WAITALL).decode(errors="replace")
    except OSError:
        return ""


def _probed(peer: socket.socket) -> socket.socket:
    """The connection, which breaks once the other machine no longer answers."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
    return peer


@contextlib.contextmanager
def _outlive() -> Iterator[None]:
    """A context in which JAX's connections of host 0 stay open for some seconds after its death.

    The other hosts abort as soon as these close. A child process has them as well, and ends
    `OUTLIVE_SECONDS` after its parent.
    """
    command = ["sh", "-c", f"read _; sleep {OUTLIVE_SECONDS}"]
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=_service_connections(),
        start_new_session=True,
    )
    try:
        yield
    finally:
        child.kill()
        child.communicate()


def _service_connections() -> list[int]:
    """File descriptors of connections that JAX's coordination service has accepted."""
    port, found = int(coordinator_address().rpartition(":")[2]), []
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the listing itself, sockets without a peer
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as own:
                    if own.getpeername() and own.getsockname()[1] == port:
                        found.append(descriptor)
    return found
