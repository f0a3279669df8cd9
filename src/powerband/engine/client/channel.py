"""The API process's ends of the two private sockets to the engine's process."""

from __future__ import annotations

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq

from powerband.engine.client.messages import OUTPUTS_SOCKET, REQUESTS_SOCKET, FromEngine, MessageCodec, ToEngine
from powerband.errors import EnvironmentFault

logger = logging.getLogger(__name__)


_MAX_FOLDER_CHARS = 107 - len("/powerband-xxxxxxxx/requests.sock")  # what the address of a unix socket holds


class EngineChannel:
    """Sockets in a folder that only this user can enter. `receive` is called for each message, in the event loop."""

    def __init__(self, receive: Callable[[FromEngine], None]) -> None:
        self.folder = _private_folder()
        self._codec = MessageCodec(FromEngine)
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._outputs = self._context.socket(zmq.PULL)
        self._outputs.set(zmq.RCVHWM, 0)
        path = self.folder / OUTPUTS_SOCKET
        self._outputs.bind(f"ipc://{path}")
        path.chmod(0o600)
        self._requests: zmq.Socket[bytes] | None = None
        # The descriptor only signals that something changed, so every call reads until nothing is left.
        self._loop.add_reader(self._outputs.fileno(), self.drain)

    @property
    def num_malformed(self) -> int:
        return self._codec.num_malformed

    def connect(self) -> None:
        """Open the way to the engine, which listens before it sends its first message."""
        self._requests = self._context.socket(zmq.PUSH)
        self._requests.set(zmq.SNDHWM, 0)  # what waits is bounded by refusing work while the engine is not ready
        self._requests.set(zmq.LINGER, 0)
        self._requests.connect(f"ipc://{self.folder / REQUESTS_SOCKET}")

    def send(self, message: ToEngine) -> None:
        """Never blocks. Before `connect` the message is dropped."""
        if self._requests is not None:
            self._requests.send(self._codec.encode(message), zmq.NOBLOCK)

    def drain(self) -> None:
        """Deliver everything that has arrived."""
        while int(self._outputs.get(zmq.EVENTS)) & zmq.POLLIN:
            data = self._outputs.recv(zmq.NOBLOCK)
            message = self._codec.decode(data)
            if message is None:
                logger.warning("Dropped %d bytes on the engine's socket that are not a valid message.", len(data))
            else:
                self._receive(message)

    def close(self) -> None:
        """Deliver what has arrived, then remove the sockets and their folder."""
        self.drain()
        self._loop.remove_reader(self._outputs.fileno())
        self._context.destroy(linger=0)
        shutil.rmtree(self.folder, ignore_errors=True)


def _private_folder() -> Path:
    """A new folder of mode 0700 whose path is short enough for a socket. Raises EnvironmentFault."""
    base = tempfile.gettempdir()
    try:
        return Path(tempfile.mkdtemp(prefix="powerband-", dir=base if len(base) <= _MAX_FOLDER_CHARS else "/tmp"))  # noqa: S108 (the new folder is private)
    except OSError as error:
        raise EnvironmentFault(
            f"No folder for the engine's sockets can be made: {error}.",
            hint="Free some space, or name another place in TMPDIR.",
            code="no_socket_folder",
        ) from error
