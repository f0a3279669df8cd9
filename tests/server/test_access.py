"""Who gets in: every route but one asks for the key, whatever a request looks like; and the network only by name."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers_for_tests import RunningServer

from powerband.errors import EnvironmentFault, UsageError
from powerband.server.app import make_app, operations
from powerband.server.auth import server_key
from powerband.server.replica import ServerState
from powerband.server.settings import ServerSettings
from powerband.spec.settings import EngineSettings

KEY = "sk-correct-horse"
PROBES = ("/livez", "/startupz", "/readyz", "/health")


def ask(settings: ServerSettings, *requests: tuple[str, str, dict[str, str]]) -> list[httpx.Response]:
    """Answers of an application whose engine has not started, without a network."""

    async def scenario() -> list[httpx.Response]:
        app = make_app(ServerState(EngineSettings(), settings))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [await client.request(method, path, headers=headers) for method, path, headers in requests]

    return asyncio.run(scenario())


def all_operations() -> list[tuple[str, str]]:
    async def table() -> list[tuple[str, str]]:
        found = operations(ServerState(EngineSettings(), ServerSettings()))
        return [(o.method, o.path.replace("{name:path}", "demo")) for o in found]

    return [*asyncio.run(table()), ("GET", "/openapi.json"), ("PUT", "/v1/models"), ("OPTIONS", "/v1/models")]


def test_every_route_but_the_probes_asks_for_the_key() -> None:
    table = all_operations()
    assert len(table) > 18
    wrong_keys: list[dict[str, str]] = [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": KEY},
        {"X-Api-Key": KEY[:-1]},
        {"X-Api-Key": KEY},
    ]
    for headers in wrong_keys:
        is_anthropics = headers == {"X-Api-Key": KEY}  # right for the paths of Anthropic's API, and wrong for others
        requests = [
            (method, path, headers) for method, path in table if not (is_anthropics and path.startswith("/v1/messages"))
        ]
        for (_, path, _), response in zip(requests, ask(ServerSettings(api_key=KEY), *requests), strict=True):
            if path in PROBES:  # no engine has started here
                assert response.status_code == (200 if path == "/livez" else 503), path
            else:
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
                assert KEY not in response.text


def test_the_key_opens_every_route() -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    requests = [(method, path, headers) for method, path in all_operations()]
    for (_, path, _), response in zip(requests, ask(ServerSettings(api_key=KEY), *requests), strict=True):
        assert response.status_code not in (401, 403), path


@pytest.mark.parametrize("settings", [ServerSettings(api_key=KEY), ServerSettings()])
def test_probes_of_kubernetes_get_an_answer(settings: ServerSettings) -> None:
    """The kubelet sends no key, and names the pod's address or what httpHeaders says as the host."""
    requests = [("GET", path, {"Host": "model.example", "User-Agent": "kube-probe/1.34"}) for path in PROBES]
    assert {response.status_code for response in ask(settings, *requests)} <= {200, 503}


@pytest.mark.parametrize(
    "path",
    [
        "//livez",
        "/readyz/../metrics",
        "/health/",
        "/livez/",
        "/livez/../v1/models",
        "/v1/models?/livez",
        "/v1/models#/livez",
        "/%6civez/../metrics",
        "/LIVEZ",
    ],
)
def test_no_spelling_of_a_path_gets_around_the_key(path: str) -> None:
    [response] = ask(ServerSettings(api_key=KEY), ("GET", path, {"Host": "livez"}))
    assert response.status_code in (401, 404)  # 404: no route has it


def test_a_second_authorization_header_does_not_help() -> None:
    async def scenario() -> int:
        app = make_app(ServerState(EngineSettings(), ServerSettings(api_key=KEY)))
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"authorization", b"Bearer wrong"), (b"authorization", f"Bearer {KEY}".encode())]
        scope = {"type": "http", "method": "GET", "path": "/version", "headers": headers, "query_string": b""}
        await app(scope, None, send)  # type: ignore[arg-type]  # nothing is received
        return int(sent[0]["status"])

    assert asyncio.run(scenario()) == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
    ],
)
def test_without_a_key_only_names_of_this_machine_are_served(host: str, status: int) -> None:
    [response] = ask(ServerSettings(), ("GET", "/version", {"Host": host}))
    assert response.status_code == status


def test_web_pages_do_not_administrate() -> None:
    [response] = ask(ServerSettings(), ("POST", "/admin/drain", {"Origin": "http://localhost:3000"}))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")


PAGES: list[tuple[dict[str, str], int]] = [
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": "http://localhost:3000"}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"}, 503),
    ({"Sec-Fetch-Site": "none"}, 503),
    ({}, 503),
]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize(("headers", "status"), PAGES)
def test_without_a_key_pages_from_elsewhere_are_refused(path: str, headers: dict[str, str], status: int) -> None:
    """503: it came in, and the engine has not started."""
    said = {**headers, "Content-Type": "application/json"}
    [response] = ask(ServerSettings(), ("POST", path, said))
    assert response.status_code in ((403,) if status == 403 else (400, 503))
    [response] = ask(ServerSettings(api_key=KEY), ("POST", path, {**said, "Authorization": f"Bearer {KEY}"}))
    assert response.status_code != 403


UNKNOWN_PATHS = [
    ("/v1/chat/completions/", "Did you mean '/v1/chat/completions'?"),
    ("/v1//chat/completions", "Did you mean '/v1/chat/completions'?"),
    ("/V1/Chat/Completions", "Did you mean '/v1/chat/completions'?"),
    ("/chat/completions", "Did you mean '/v1/chat/completions'? The base URL for OpenAI's clients ends with /v1"),
    ("/models", "Did you mean '/v1/models'? The base URL"),
    ("/models/demo", "Did you mean '/v1/models/demo'? The base URL"),
    ("/v1/v1/completions", "Did you mean '/v1/completions'?"),
    ("/api/v1/models", "Did you mean '/v1/models'?"),
    ("/openai/chat/completions", "Did you mean '/v1/chat/completions'?"),
    ("/v1/tokenize", "Did you mean '/tokenize'?"),
    ("/v1/models/", "Did you mean '/v1/models'?"),
    ("/v1/chat/completion", "Did you mean '/v1/chat/completions'?"),
    ("/v1/images/generations", "Images cannot be used here. Use /v1/chat/completions."),
    ("/v1/files", "Files cannot be used here."),
    ("/api/chat", "Ollama's API cannot be used here."),
    ("/", "The base URL for OpenAI's clients ends with /v1, such as http://"),
    ("/v1", "The base URL"),
    ("/v1/", "The base URL"),
    ("/admin/keys", "This is a replica. Keys, limits, usage and routes are managed at a gateway"),
    ("/admin/keys/key_1", "This is a replica."),
    ("/docs", "The paths are listed in /openapi.json."),
    ("/favicon.ico", "The paths are listed in /openapi.json."),
    ("/" + "a" * 5000, "The paths are listed in /openapi.json."),
]


@pytest.mark.parametrize(("path", "hint"), UNKNOWN_PATHS)
def test_an_unknown_path_is_not_found_whatever_the_key_and_says_what_is_meant(path: str, hint: str) -> None:
    wrong = {"Authorization": "Bearer wrong"}
    for response in ask(ServerSettings(api_key=KEY), ("POST", path, {}), ("GET", path, wrong)):
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (404, "not_found")
        assert error["message"].startswith(f"There is no path '{path[:20]}")
        assert hint in error["message"]
        assert len(response.content) < 1000


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("api.example.com", "http://api.example.com/v1."),
        ("127.0.0.1:17200", "http://127.0.0.1:17200/v1."),
        ('a b"<script>:80', "http://localhost"),
        ("x" * 500, "http://localhost"),
    ],
)
def test_the_base_url_that_is_named_is_the_one_that_was_asked(host: str, shown: str) -> None:
    message = ask(ServerSettings(), ("GET", "/", {"Host": host}))[0].json()["error"]["message"]
    assert f"such as {shown}" in message
    assert ":8000" not in message
    assert "script" not in message


PAGE = "http://localhost:5173"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("allowed", [f"https://chat.example.com, {PAGE}/", "*", f'["{PAGE}"]'])
def test_a_page_that_is_allowed_uses_the_api(allowed: str, key: str | None) -> None:
    settings = ServerSettings(api_key=key, allowed_origins=allowed)
    from_page = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site", "Content-Type": "application/json"}
    with_key = {**from_page, **({"Authorization": f"Bearer {KEY}"} if key else {})}
    preflight, version, answer, refused = ask(
        settings,
        ("OPTIONS", "/v1/chat/completions", PREFLIGHT),
        ("GET", "/version", with_key),
        ("POST", "/v1/chat/completions", with_key),
        ("POST", "/v1/nothing", from_page),
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-headers"] == PREFLIGHT["Access-Control-Request-Headers"]
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert (version.status_code, refused.status_code) == (200, 404)
    assert answer.status_code in (400, 503)  # it came in, and the engine has not started
    for response in (preflight, version, answer, refused):  # a page can read errors, too
        assert response.headers["access-control-allow-origin"] == ("*" if allowed == "*" else PAGE)
    assert "X-Request-Id" in version.headers["access-control-expose-headers"]


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("allowed", [None, "https://chat.example.com"])
def test_a_page_that_is_not_allowed_does_not(allowed: str | None, key: str | None) -> None:
    settings = ServerSettings(api_key=key, allowed_origins=allowed)
    headers = {"Origin": PAGE, "Content-Type": "application/json"}
    preflight, answer = ask(
        settings, ("OPTIONS", "/v1/chat/completions", PREFLIGHT), ("POST", "/v1/chat/completions", headers)
    )
    assert preflight.status_code in (400, 401, 405)
    assert answer.status_code == (403 if key is None else 401)
    for response in (preflight, answer):
        assert "access-control-allow-origin" not in response.headers


def test_no_page_administrates_even_where_it_is_allowed() -> None:
    [response] = ask(ServerSettings(allowed_origins="*"), ("POST", "/admin/drain", {"Origin": PAGE}))
    assert (response.status_code, response.json()["error"]["code"]) == (403, "origin_not_allowed")


def test_an_allowed_page_does_not_open_other_names_of_the_server() -> None:
    """A name that leads to this machine would make any page one of the same origin (DNS rebinding)."""
    [response] = ask(ServerSettings(allowed_origins="*"), ("GET", "/version", {"Host": "evil.example"}))
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("origins", ["localhost:3000", "https://a.example/path", "https://*.example.com", "a b"])
def test_what_is_no_origin_is_refused_at_the_start(origins: str) -> None:
    with pytest.raises(UsageError, match="not the origin of a web page"):
        ServerSettings(allowed_origins=origins)


def test_without_a_key_a_body_says_that_it_is_json() -> None:
    for media, status in (
        ({}, 415),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json"}, 400),
    ):
        [response] = ask(ServerSettings(), ("POST", "/tokenize", {**media, "Content-Length": "2"}))
        assert response.status_code in (status, 503 if status == 400 else status)


def test_the_key_is_not_shown() -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for response in ask(
        ServerSettings(api_key=KEY), ("GET", "/admin/config", headers), ("GET", "/openapi.json", headers)
    ):
        assert KEY not in response.text


def test_one_port_of_loopback_is_all_that_listens(server: RunningServer) -> None:
    sockets = {
        os.readlink(fd)
        for pid in (server.process.pid, server.engine_pid())
        for fd in Path(f"/proc/{pid}/fd").iterdir()
        if fd.exists() or fd.is_symlink()
    }
    listening = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{server.process.pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                listening.append(fields[1])
    port = int(server.url.rpartition(":")[2])
    assert listening == [f"0100007F:{port:04X}"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_listening_beyond_loopback_needs_a_key_or_a_word(host: str) -> None:
    with pytest.raises(UsageError, match=rf"Listening on {host} without an API key .* --insecure"):
        server_key(ServerSettings(host=host))
    assert server_key(ServerSettings(host=host, insecure=True)) is None
    assert server_key(ServerSettings(host=host, api_key=KEY)) == KEY


def test_a_key_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\nsecond line\n")
    assert server_key(ServerSettings(api_key_file=str(file))) == KEY
    file.write_text("")
    with pytest.raises(UsageError, match="not empty"):
        server_key(ServerSettings(api_key_file=str(file)))
    with pytest.raises(EnvironmentFault, match="Cannot read"):
        server_key(ServerSettings(api_key_file=str(tmp_path / "missing")))
    with pytest.raises(UsageError, match="Give one"):
        server_key(ServerSettings(api_key=KEY, api_key_file=str(file)))
