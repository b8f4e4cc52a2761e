"""A network between clients and a server on this machine that breaks as networks do: a TCP relay."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass

from ports import free_port

CHUNK_BYTES = 64 * 1024


@dataclass
class Connection:
    """A client's connection and the one that it is passed on to."""

    client: socket.socket
    server: socket.socket
    sent: int = 0
    """Bytes of the client's present request that came."""


class Network:
    """Passes connections to `port` on to the server's port, both on 127.0.0.1."""

    def __init__(self, server_port: int):
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", free_port()))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: list[socket.socket] = [self._listener]
        self._speaks = threading.Event()
        self._speaks.set()
        self._sent_before_cut: int | None = None
        self._silent_after_cut = False
        self._answers_to_cut = 0
        self.cut = threading.Event()
        """A connection was cut as it was asked for."""
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, sent_bytes: int, *, then_silent: bool = False) -> None:
        """Cut the next connection in the middle of a request that is longer: so much arrives, the rest does not."""
        self.cut.clear()
        self._silent_after_cut = then_silent
        self._sent_before_cut = sent_bytes

    def cut_answers(self, number: int) -> None:
        """Cut the next connections in place of the server's answers: requests arrive, and clients do not learn it."""
        self.cut.clear()
        self._answers_to_cut = number

    def fall_silent(self) -> None:
        """Deliver nothing more and keep every connection open."""
        self._speaks.clear()

    def speak(self) -> None:
        """Deliver again, first what was held back."""
        self._speaks.set()

    def close(self) -> None:
        self._speaks.set()
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        self._open.append(client)
        with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", self._server_port)) as server:
            self._open.append(server)
            pair = Connection(client, server)
            downwards = threading.Thread(target=self._downwards, args=(pair,), daemon=True)
            downwards.start()
            self._upwards(pair)
            server.shutdown(socket.SHUT_RDWR)
            downwards.join()

    def _upwards(self, pair: Connection) -> None:
        while chunk := pair.client.recv(CHUNK_BYTES):
            self._speaks.wait()
            pair.sent += len(chunk)
            if self._sent_before_cut is not None and pair.sent > self._sent_before_cut:
                pair.server.sendall(chunk[: self._sent_before_cut - pair.sent])
                self._sent_before_cut = None
                if self._silent_after_cut:
                    self.fall_silent()
                self.cut.set()
                return
            pair.server.sendall(chunk)

    def _downwards(self, pair: Connection) -> None:
        with contextlib.suppress(OSError):
            while chunk := pair.server.recv(CHUNK_BYTES):
                self._speaks.wait()
                pair.sent = 0
                if self._answers_to_cut:
                    self._answers_to_cut -= 1
                    self.cut.set()
                    break
                pair.client.sendall(chunk)
            pair.client.shutdown(socket.SHUT_RDWR)  # ends `_upwards` as well
