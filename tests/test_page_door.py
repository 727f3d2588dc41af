"""Who may see the page of a run, and that nobody changes anything by it: tokens, hosts, origins, methods, paths, sizes."""

import contextlib
import json
import re
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attacks import PING, RawClient, frame_header, opening, pump, trusting
from conftest import Clock, run_in_thread
from test_door import SETTINGS, Guarded
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from gpu_server import ConfigError, GpuServer, ServerConfig
from gpu_server.door import open_door
from gpu_server.errors import ServerError
from gpu_server.page.routes import FOLDER, HEADERS, Answer, Asked, Place, Routes
from gpu_server.page.token import own_token
from gpu_server.serving.http_handshake import REFUSALS_A_MINUTE

TOKEN = "t" * 43
FILES = {path: (FOLDER / name).read_bytes() for path, name in (("/page.css", "page.css"), ("/page.js", "page.js"))}
NO_FURTHER = {"Upgrade": "websocket"}


def looked_up(target: str, *, token: str | None = None, method: str = "GET", has_page: bool = True, **headers: Any) -> Any:
    """What becomes of a request; its headers by their names, with "_" for "-"; a list has one several times."""
    routes = Routes(has_page=has_page, token=token, is_well=lambda: True)
    given = {"Host": "127.0.0.1:8765", **{name.replace("_", "-"): value for name, value in headers.items()}}

    def values(name: str) -> list[str]:
        value = given.get(name)
        return value if isinstance(value, list) else [] if value is None else [value]

    return routes.look_up(Asked(method, target, values))


def status(target: str, **options: Any) -> int:
    answer = looked_up(target, **options)
    assert isinstance(answer, Answer), answer
    return answer.status


# Paths and methods


def test_what_there_is_for_a_browser_and_for_prometheus() -> None:
    page = looked_up("/")
    assert (page.status, page.content_type) == (200, "text/html; charset=utf-8")
    assert page.body == (FOLDER / "page.html").read_bytes()
    assert {path: looked_up(path).body for path in FILES} == FILES
    assert looked_up("/metrics") is Place.METRICS
    assert looked_up("/healthz").body == b"ok\n"
    assert looked_up("/live", Upgrade="websocket") is Place.LIVE
    assert status("/live") == 426


ODD_PATHS = """
    // /. /.. /../ /page.html /page.js/ //page.js /./page.js /x/../page.js /%70age.js /page%2ejs /page.js%00 /PAGE.JS /page.js;x
    /live/ //live /%6cive /metrics/ /healthz/.. * page.js http://127.0.0.1:8765/ http://127.0.0.1:8765/live /run.json
    /page-token /token.py /..%2fpage-token
"""


@pytest.mark.parametrize("path", [*ODD_PATHS.split(), "", "/" * 8000])
def test_path_is_one_of_these_letter_by_letter_and_no_other_leads_to_a_file(path: str) -> None:
    for upgrade in ({}, NO_FURTHER):
        assert looked_up(path, **upgrade) is Place.RUN


def test_device_asks_at_the_path_of_the_page() -> None:
    assert looked_up("/", **NO_FURTHER) is Place.RUN
    assert looked_up("/?token=x", **NO_FURTHER, token=TOKEN) is Place.RUN


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", ""])
@pytest.mark.parametrize("path", ["/", "/page.css", "/page.js", "/live", "/metrics", "/healthz"])
def test_everything_is_only_read(method: str, path: str) -> None:
    answer = looked_up(path, method=method)
    assert (answer.status, answer.headers["Allow"]) == (405, "GET")


def test_server_without_a_page_tells_only_whether_it_is_well() -> None:
    assert status("/healthz", has_page=False) == 200
    for path in ("/", "/page.css", "/page.js", "/live", "/metrics"):
        assert looked_up(path, has_page=False) is Place.RUN


def test_health_is_told_to_everybody_and_is_bad_when_the_run_is_over() -> None:
    assert status("/healthz", token=TOKEN, Host="elsewhere", Origin="https://elsewhere") == 200
    routes = Routes(has_page=True, token=None, is_well=lambda: False)
    answer = routes.look_up(Asked("GET", "/healthz", lambda _: []))
    assert isinstance(answer, Answer)
    assert answer.status == 503


# Who may see it


@pytest.mark.parametrize("path", ["/", "/live", "/metrics"])
def test_what_says_something_of_the_run_is_shown_to_who_has_the_token(path: str) -> None:
    upgrade = NO_FURTHER if path == "/live" else {}

    def seen(query: str = "", **headers: Any) -> bool:
        answer = looked_up(f"{path}{query}", token=TOKEN, Host="run.example", **upgrade, **headers)
        if isinstance(answer, Answer) and answer.status != 200:
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert TOKEN not in answer.body.decode() + answer.why
            return False
        return True

    assert seen(f"?token={TOKEN}")
    assert seen(f"?x=1&token={TOKEN}")
    assert seen(Authorization=f"Bearer {TOKEN}")
    assert seen(Authorization=f"bearer {TOKEN}")
    for query in ("", "?", "?token", "?token=", f"?token={TOKEN[:-1]}", f"?token={TOKEN}t", f"?Token={TOKEN}", f"?{TOKEN}"):
        assert not seen(query), query
    assert not seen(f"?token={TOKEN}&token={TOKEN}")
    assert not seen(f"?token={TOKEN}&token=x")
    assert not seen(f"?token={TOKEN}", Authorization="Bearer x")
    assert not seen("?" + "&".join(f"x{number}=1" for number in range(100)) + f"&token={TOKEN}")
    assert not seen("?token=%ff%fe")
    assert not seen("?token=\udcff")
    assert not seen(Authorization=f"Basic {TOKEN}")
    assert not seen(Authorization=TOKEN)
    assert not seen(Authorization="Bearer ")


def test_style_and_script_need_no_token() -> None:
    assert status("/page.css", token=TOKEN) == status("/page.js", token=TOKEN) == 200


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.0.0.1:8765", "127.8.9.1:1", "localhost", "LocalHost:9000", "[::1]:8765", "[::1]"]
)
def test_without_a_token_this_machine_may_look_by_its_own_names(host: str) -> None:
    assert status("/", Host=host) == 200
    assert looked_up("/live", Host=host, Origin=f"http://{host}", **NO_FURTHER) is Place.LIVE


OTHER_HOSTS = """
    evil.example evil.example:8765 127.0.0.1.evil.example localhost.evil.example 192.168.1.20:8765 0.0.0.0 ::1 [127.0.0.1
    2130706433 127.0.0.1@evil.example evil.example#127.0.0.1 127.0.0.1:8765:1 127.0.0.1:x
"""


@pytest.mark.parametrize("host", [*OTHER_HOSTS.split(), "", "127.0.0.1 "])
@pytest.mark.parametrize("path", ["/", "/live", "/metrics", "/page.js"])
def test_name_that_was_made_to_lead_to_this_machine_sees_nothing(host: str, path: str) -> None:
    """Of a web page elsewhere, whose name its owner lets lead here: to the browser the two are one site."""
    headers = {"Origin": f"http://{host}"} if path == "/live" else {}
    assert status(path, Host=host, **headers, **(NO_FURTHER if path == "/live" else {})) == 403


def test_request_names_its_host_once() -> None:
    for hosts in ([], ["127.0.0.1", "127.0.0.1"], ["127.0.0.1", "evil.example"]):
        assert status("/", Host=hosts) == 400


@pytest.mark.parametrize("token", [None, TOKEN])
def test_page_of_another_site_cannot_follow_the_run(token: str | None) -> None:
    def follows(*origins: str) -> bool:
        asked = looked_up(f"/live?token={TOKEN}", token=token, Host="127.0.0.1:8765", Origin=list(origins), **NO_FURTHER)
        assert asked is Place.LIVE or asked.status == 403
        return asked is Place.LIVE

    assert follows("http://127.0.0.1:8765")
    assert follows("https://127.0.0.1:8765")  # something before the server encrypts for it
    assert follows()  # no browser
    for origin in (
        "http://127.0.0.1",
        "http://127.0.0.1:8766",
        "http://localhost:8765",
        "null",
        "",
        "file://",
        "127.0.0.1:8765",
    ):
        assert not follows(origin), origin
    for origin in (
        "https://evil.example",
        "http://127.0.0.1:8765.evil.example",
        "http://127.0.0.1:8765/",
        "ws://127.0.0.1:8765",
    ):
        assert not follows(origin), origin
    assert not follows("http://127.0.0.1:8765", "http://127.0.0.1:8765")


def test_line_in_the_log_has_no_token_in_it() -> None:
    routes = Routes(has_page=True, token=TOKEN, is_well=lambda: True)
    for target in (f"/x?token={TOKEN}", f"/{TOKEN}", f"/x/{TOKEN}/{TOKEN}", f"http://a/?token={TOKEN}", "/" + "x" * 60 + TOKEN):
        assert "ttt" not in routes.shown(target)
    assert routes.shown("/admin?x") == "'/admin'"
    assert routes.shown("/\x1b[31m") == "'/\\x1b[31m'"


# The settings


def config(**options: Any) -> ServerConfig:
    return ServerConfig(model="gpt2", steps=1, **{"run_dir": "runs/none", **options})


def test_page_is_there_where_only_this_machine_reaches_the_server_or_with_a_token() -> None:
    assert [config(host=host).has_page for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.1.2")] == [
        True
    ] * 3 + [False] * 2
    assert config(host="0.0.0.0", page_token=True).has_page
    assert config(host="0.0.0.0", page="on", page_token=True).has_page
    assert not config(page="off").has_page
    assert not config(page="off", page_token=True).has_page


def test_page_without_a_token_is_refused_where_other_machines_reach_it() -> None:
    with pytest.raises(ConfigError) as refused:
        config(host="0.0.0.0", page="on")
    assert str(refused.value) == (
        "page on, where other machines reach the server (host 0.0.0.0), would show the run to everybody: add --page-token, or "
        "leave --page out"
    )


def test_token_is_made_once_and_readable_for_its_owner_alone(tmp_path: Path) -> None:
    token = own_token(tmp_path)
    assert re.fullmatch(r"[\w-]{43}", token)
    assert own_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / "page-token").stat().st_mode) == 0o600
    (tmp_path / "another").mkdir()
    assert own_token(tmp_path / "another") != token
    assert open_door(config(run_dir=str(tmp_path))).page_token is None
    assert open_door(config(run_dir=str(tmp_path), page_token=True)).page_token == token


@pytest.mark.parametrize(
    "content", [b"", b"short\n", b"\xff\xfe", b"two words of which there may be none in a token", b"x" * 300]
)
def test_file_that_holds_no_token_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "page-token").write_bytes(content)
    with pytest.raises(ServerError, match="page-token holds no token; delete it, and another one is made"):
        own_token(tmp_path)


def test_token_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "page-token").mkdir()
    with pytest.raises(ServerError, match="page-token cannot be used: "):
        own_token(tmp_path)


def test_url_of_the_page_has_the_scheme_and_the_token_of_the_server(tmp_path: Path) -> None:
    assert open_door(config(run_dir=str(tmp_path))).page_url(1) == "http://127.0.0.1:1/"
    assert open_door(config(run_dir=str(tmp_path), host="::1")).page_url(1) == "http://[::1]:1/"
    assert open_door(config(run_dir=str(tmp_path), page="off")).page_url(1) is None
    assert open_door(config(run_dir=str(tmp_path), host="10.0.0.1")).page_url(1) is None
    door = open_door(config(run_dir=str(tmp_path), host="10.0.0.1", page_token=True))
    assert door.page_url(1) == f"https://10.0.0.1:1/?token={door.page_token}"
    everywhere = open_door(config(run_dir=str(tmp_path), host="0.0.0.0", page_token=True)).page_url(1)
    assert everywhere is not None
    assert "0.0.0.0" not in everywhere


# Over a socket


@pytest.fixture(scope="module")
def here(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GpuServer]:
    """A server for this machine alone, that waits for a device."""
    run_dir = tmp_path_factory.mktemp("here") / "run"
    with GpuServer(
        model=str(tiny_model), run_dir=str(run_dir), port=0, steps=1, max_pages=3, max_strangers=2, **SETTINGS
    ) as server:
        yield server


def port_of(server: GpuServer) -> int:
    return int(server.url.rpartition(":")[2])


def asked(port: int, request: bytes, *, encrypted: bool = False) -> tuple[bytes, dict[str, str], bytes]:
    """The answer to these bytes: its first line, its headers, its body."""
    with socket.create_connection(("127.0.0.1", port), 60) as plain, contextlib.ExitStack() as stack:
        client = stack.enter_context(trusting().wrap_socket(plain)) if encrypted else plain
        client.sendall(request)
        received = b""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while part := client.recv(2**16):
                received += part
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    return first.encode(), dict(line.split(": ", 1) for line in lines), body


def get(port: int, target: str, *lines: str, encrypted: bool = False) -> tuple[int, dict[str, str], bytes]:
    request = "\r\n".join([f"GET {target} HTTP/1.1", f"Host: 127.0.0.1:{port}", *lines, "", ""]).encode("latin-1")
    first, headers, body = asked(port, request, encrypted=encrypted)
    return int(first.split()[1]), headers, body


def follow(server: GpuServer, query: str = "", **options: Any) -> ClientConnection:
    return connect(f"{server.url}/live{query}", proxy=None, max_size=2**24, **options)


def code_at_the_end(page: ClientConnection) -> int | None:
    """With which the server closes it."""
    with contextlib.suppress(ConnectionClosed):
        while True:
            page.recv(60)
    return page.close_code


def test_server_answers_others_while_metrics_are_written(here: GpuServer, monkeypatch: pytest.MonkeyPatch) -> None:
    observer, begun, go_on = here._run.prometheus, threading.Event(), threading.Event()
    write = observer._write

    def slowly(standing: Any) -> tuple[bytes, str]:
        begun.set()
        assert go_on.wait(60)
        return write(standing)

    monkeypatch.setattr(observer, "_write", slowly)
    scrape = run_in_thread(lambda: get(port_of(here), "/metrics"))
    assert begun.wait(60)
    assert get(port_of(here), "/healthz")[0] == 200
    go_on.set()
    assert b"splitlora_step 0.0" in scrape.result(60)[2]


def test_server_ends_at_once_though_requests_are_half_open(tiny_model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(tiny_model), "run_dir": str(tmp_path / "run"), "steps": 1, **SETTINGS}
    server = GpuServer(port=0, **{**options, "handshake_seconds": 600.0, "max_strangers": 50})
    server.__enter__()
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            half = stack.enter_context(socket.create_connection(("127.0.0.1", port_of(server)), 60))
            half.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127")
        assert get(port_of(server), "/healthz")[0] == 200  # which came after them
        run_in_thread(lambda: server.__exit__(None, None, None)).result(60)


def test_page_comes_whole_and_with_headers_that_keep_it_to_itself(here: GpuServer) -> None:
    for path, name in (("/", "page.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
        status_code, headers, body = get(port_of(here), path)
        assert (status_code, body) == (200, (FOLDER / name).read_bytes())
        assert int(headers["Content-Length"]) == len(body)
        assert HEADERS.items() <= headers.items()
        assert "'unsafe" not in headers["Content-Security-Policy"]
        assert headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Server" not in headers
        assert "Set-Cookie" not in headers


def test_page_asks_for_nothing_that_its_own_rules_forbid() -> None:
    """No script, style or address of elsewhere within its HTML."""
    html = (FOLDER / "page.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://(?!www\.w3\.org/)", html)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 414)),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 9000 + b"\r\n\r\n", (400, 431)),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", (400, 431)),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n\r\nhello", (400,)),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400, 501)),
        (b"GET  / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400,)),
        (b"GET /\xc3\xa4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 404, 426)),
        (b"GET / HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n", (400, 505)),
        (b"POST /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 405)),
        (b"DELETE / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", (400, 405)),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", (400,)),
        (b"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n", (426,)),
        (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: x\r\nAuthorization: y\r\n\r\n", (400,)),
    ],
)
def test_odd_request_is_refused_and_the_server_goes_on(here: GpuServer, request_: bytes, expected: tuple[int, ...]) -> None:
    first, _, _ = asked(port_of(here), request_)
    assert not first or int(first.split()[1]) in expected  # what is no request of HTTP is cut off without an answer
    assert get(port_of(here), "/healthz")[0] == 200


def test_other_names_and_origins_are_refused_over_the_socket_too(here: GpuServer) -> None:
    port = port_of(here)
    first, _, body = asked(port, b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    assert first.split()[1] == b"403"
    assert body == b"the page is this machine's alone, and was asked for as 'evil.example': open it at 127.0.0.1\n"
    with pytest.raises(InvalidStatus, match="403"):
        follow(here, origin="https://evil.example")  # type: ignore[arg-type]
    with follow(here, origin=f"http://127.0.0.1:{port}") as page:  # type: ignore[arg-type]
        assert json.loads(page.recv(60))["kind"] == "snapshot"


def test_device_that_comes_from_a_web_page_is_refused_as_ever(here: GpuServer) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        connect(here.url, proxy=None, origin=f"http://127.0.0.1:{port_of(here)}")  # type: ignore[arg-type]


@pytest.mark.parametrize("said", [b"", b"x", b"x" * 100_000, "text"])
def test_page_that_says_anything_is_closed(here: GpuServer, said: bytes | str) -> None:
    with follow(here) as page:
        page.recv(60)
        page.send(said)
        assert code_at_the_end(page) in (1008, 1009)


def test_pages_have_places_of_their_own_and_take_none_of_the_strangers(here: GpuServer) -> None:
    port = port_of(here)
    with contextlib.ExitStack() as stack:
        pages = [stack.enter_context(follow(here)) for _ in range(3)]
        with pytest.raises(InvalidStatus, match="503"):
            follow(here)
        # Of two strangers at most, the pages would have had to go before these.
        for _ in range(4):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), 60))
        assert get(port, "/healthz")[0] == 200
        for page in pages:
            assert page.ping().wait(60)
        pages[0].close()
        while True:
            try:
                stack.enter_context(follow(here))
                break
            except InvalidStatus:
                continue  # the server has not seen the end of it yet


def test_token_opens_the_page_beyond_loopback_and_stands_in_no_line(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Guarded(tiny_model, tmp_path, page_token=True) as guarded:
        url = guarded.server.page_url
        assert url is not None
        token = url.partition("?token=")[2]
        assert token == (guarded.run_dir / "page-token").read_text().strip()
        port = guarded.port
        assert get(port, f"/?token={token}", encrypted=True)[0] == 200
        assert get(port, "/metrics", f"Authorization: Bearer {token}", encrypted=True)[0] == 200
        assert get(port, "/", encrypted=True)[0] == 401
        assert get(port, f"/nothing?token={token}", encrypted=True)[0] == 401  # a stranger to the devices
        assert get(port, f"/{token}", encrypted=True)[0] == 401
        assert get(port, "/metrics", f"Authorization: Basic {token}", encrypted=True)[0] == 401
        assert get(port, "/healthz", encrypted=True)[:1] == (200,)
        with pytest.raises(InvalidStatus, match="401"):
            connect(f"wss://127.0.0.1:{port}/live", proxy=None, ssl=trusting())
        with connect(f"wss://127.0.0.1:{port}/live?token={token}", proxy=None, ssl=trusting()) as page:
            assert json.loads(page.recv(60))["kind"] == "snapshot"
        with pytest.raises(InvalidStatus, match="401"):  # it opens no place of a device's
            connect(f"wss://127.0.0.1:{port}/?token={token}", proxy=None, ssl=trusting())
        with RawClient(port, guarded.alice) as device:
            assert device.status == 101
        with pytest.raises(InvalidStatus, match="401"):  # nor does a device's secret open the page
            connect(
                f"wss://127.0.0.1:{port}/live",
                proxy=None,
                ssl=trusting(),
                additional_headers={"Authorization": f"Bearer {guarded.alice.secret}"},
            )
    assert token not in caplog.text
    assert guarded.alice.secret not in caplog.text
    events = (guarded.run_dir / "events.jsonl").read_text()
    assert token not in events
    assert "HTTP 401" in events


def test_whoever_is_refused_without_end_fills_no_log(
    here: GpuServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    clock.now = 1e9
    monkeypatch.setattr("gpu_server.serving.http_handshake.time", SimpleNamespace(monotonic=clock))
    for _ in range(REFUSALS_A_MINUTE + 7):
        assert get(port_of(here), "/nothing")[0] == 404
    assert sum("refused: HTTP 404" in line for line in caplog.messages) == REFUSALS_A_MINUTE
    clock.now += 60.0
    assert get(port_of(here), "/nothing")[0] == 404
    assert "7 more requests of HTTP were refused within that minute" in caplog.messages
    assert sum("refused: HTTP 404" in line for line in caplog.messages) == REFUSALS_A_MINUTE + 1


def test_page_that_does_not_read_is_dropped_and_the_server_ends_without_it(tiny_model: Path, tmp_path: Path) -> None:
    """It is sent what it never takes, by its pings too."""
    with GpuServer(model=str(tiny_model), run_dir=str(tmp_path / "run"), port=0, steps=1, **SETTINGS) as server:
        asks = opening("/live", host="127.0.0.1")
        deaf = RawClient(port_of(server), None, encrypted=False, read_buffer=2**12, asks=asks)
        with deaf:
            assert deaf.status == 101
            pump(deaf, frame_header(PING, b"x" * 125) * 500)
            assert get(port_of(server), "/healthz")[0] == 200
            server.stop()
            server._thread.join(60)
            assert not server._thread.is_alive()


def test_page_is_told_that_the_server_ends(tiny_model: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with GpuServer(model=str(tiny_model), run_dir=str(tmp_path / "run"), port=0, steps=1, **SETTINGS) as server:
            page = stack.enter_context(follow(server))
            page.recv(60)
        assert code_at_the_end(page) == 1001
