"""Asking a server over HTTP for JSON, with what Python has."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from concurrent import futures
from concurrent.futures import Future
from urllib.parse import urlsplit

from vllm_companion_plugin.errors import SettingsError

MAX_ANSWER_BYTES = 1 << 24


class Http:
    """A server, by its base URL. Each question is a connection of its own: engines are told something once in a while.

    Raises:
        SettingsError: it is no URL of a server.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = 0
        if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or parts.query or parts.fragment:
            raise SettingsError(f"{url!r} is no URL of an engine.", remedy="Name it as in http://127.0.0.1:8000.")
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = parts.hostname, port, parts.path.rstrip("/")

    def ask(self, method: str, route: str, timeout_s: float, body: object = None) -> tuple[int, object]:
        """The status, and the answer: as JSON if it is that, else as text.

        Args:
            timeout_s: for all of it: finding the server, asking, and reading its answer.

        Raises:
            TimeoutError: the whole answer was not there in time.
            OSError: the server cannot be reached, or the connection broke.
        """
        # Time limits of sockets begin anew with each byte, and finding an address has none. So another thread waits.
        connection = self._kind(self._host, self._port, timeout=timeout_s)
        sockets: list[socket.socket] = []
        over = threading.Event()
        answer: Future[tuple[int, object]] = Future()

        def ask() -> None:
            try:
                answer.set_result(self._ask(connection, sockets, over, method, route, body))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=ask, name="companion-http", daemon=True).start()
        try:
            return answer.result(timeout_s)
        except futures.TimeoutError as error:
            raise TimeoutError(str(error)) from error
        finally:
            over.set()
            for sock in sockets:  # so that the thread ends, too
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's, which is not for two threads

    def _ask(
        self,
        connection: http.client.HTTPConnection,
        sockets: list[socket.socket],
        over: threading.Event,
        method: str,
        route: str,
        body: object,
    ) -> tuple[int, object]:
        """As `ask`; puts the socket into `sockets`, and asks nothing any more if it is over by then."""
        try:
            content = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"} if content is not None else {}
            connection.connect()
            sockets.append(connection.sock)
            if over.is_set():
                raise TimeoutError
            connection.request(method, self._path + route, content, headers)
            answer = connection.getresponse()
            text = answer.read(MAX_ANSWER_BYTES).decode(errors="replace")
        except http.client.HTTPException as error:
            raise ConnectionError(f"no HTTP: {error!r}") from error
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text)
        except (ValueError, RecursionError):
            return answer.status, text
