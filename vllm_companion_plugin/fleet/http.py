"""Asking a server over HTTP for JSON, with what Python has."""

from __future__ import annotations

import http.client
import json
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

        Raises:
            TimeoutError: the server said nothing for so long.
            OSError: it cannot be reached, or the connection broke.
        """
        connection = self._kind(self._host, self._port, timeout=timeout_s)
        try:
            content = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"} if content is not None else {}
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
