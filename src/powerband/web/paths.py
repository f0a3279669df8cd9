"""Paths that no route has: 404 with what was probably meant, before any key is asked for.

Asked for a key, the user of a wrong base URL would look for the fault in the key.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from powerband.web.errors import HttpError

_SHOWN_CHARS = 100
_HOST = re.compile(r"[A-Za-z0-9.-]{1,80}(:\d{1,5})?", re.ASCII)
_PREFIXES = ("/v1", "/v1/v1", "/api/v1", "/openai/v1", "/openai", "/api")
_NOT_STORED = "Responses are not stored: send the whole conversation to /v1/responses."
_CHAT = "Use /v1/chat/completions."
# The beginning of a path → the API that it belongs to.
_OTHER_APIS = {
    "/v1/images": "Images",
    "/v1/audio": "Audio",
    "/v1/moderations": "Moderation",
    "/v1/files": "Files",
    "/v1/batches": "Batches",
    "/v1/assistants": "OpenAI's Assistants API",
    "/v1/threads": "OpenAI's Assistants API",
    "/v1/realtime": "OpenAI's Realtime API",
    "/pooling": "Pooling",
    "/classify": "Classification",
    "/api/": "Ollama's API",
    "/generate": "SGLang's and TGI's API",
    "/completion": "llama.cpp's API",
    "/infill": "llama.cpp's API",
}


class KnownPathsMiddleware:
    """Raises HttpError 404 for a path that no route has. The router decides about all others."""

    def __init__(
        self,
        app: ASGIApp,
        routes: Iterable[BaseRoute],
        listed_in: str,
        elsewhere: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """listed_in: the page that lists the paths. elsewhere: paths of the other kind of server, each with a hint."""
        self._app = app
        self._elsewhere = elsewhere
        self._listed_in = listed_in
        paths = [route.path for route in routes if isinstance(route, Route)]
        self._paths = frozenset(path for path in paths if "{" not in path)
        self._prefixes = tuple(path.partition("{")[0] for path in paths if "{" in path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._knows(scope["path"]):
            raise self._not_found(scope["path"], _base_url(scope))
        await self._app(scope, receive, send)

    def _knows(self, path: str) -> bool:
        return path in self._paths or (path.startswith(self._prefixes) and path not in self._prefixes)

    def _not_found(self, path: str, base_url: str) -> HttpError:
        shown = path if len(path) <= _SHOWN_CHARS else f"{path[:_SHOWN_CHARS]}…"
        return HttpError(
            404, "not_found", f"There is no path {shown!r}.", hint=self._meant(path[:_SHOWN_CHARS], base_url)
        )

    def _meant(self, path: str, base_url: str) -> str:
        plain = "/" + "/".join(part for part in path.lower().split("/") if part)
        if plain in ("/", "/v1"):
            return f"{base_url} The paths are listed in {self._listed_in}."
        if self._knows(plain):
            return f"Did you mean '{plain}'?"
        if self._knows(f"/v1{plain}"):
            return f"Did you mean '/v1{plain}'? {base_url}"
        for path, hint in self._elsewhere.items():
            if plain == path or plain.startswith(f"{path}/"):
                return hint
        for prefix in _PREFIXES:
            bare = plain.removeprefix(prefix)
            for meant in (f"/v1{bare}", bare):
                if bare != plain and self._knows(meant):
                    return f"Did you mean '{meant}'?"
        if plain.startswith("/v1/responses/") and self._knows("/v1/responses"):
            return _NOT_STORED
        for beginning, name in _OTHER_APIS.items():
            if plain.startswith(beginning):
                return f"{name} cannot be used here. {_CHAT}"
        # A whole path was given as the base URL.
        if any(plain.startswith(f"{known}/") for known in self._paths if known.startswith("/v1/")):
            return base_url
        public = [known for known in self._paths if not known.startswith("/admin/")]
        near = difflib.get_close_matches(plain, public, n=1, cutoff=0.75)
        return f"Did you mean '{near[0]}'?" if near else f"The paths are listed in {self._listed_in}."


def _base_url(scope: Scope) -> str:
    """With the address that the client asked, where its Host header is plain; else with this server's port."""
    host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
    if not _HOST.fullmatch(host):
        port = (scope.get("server") or ("", None))[1]
        host = "localhost" if port is None else f"localhost:{port}"
    return f"The base URL for OpenAI's clients ends with /v1, such as {scope.get('scheme', 'http')}://{host}/v1."
