"""Which paths there are for browsers and for tools that read metrics, and who may read them. None of them changes anything."""

import enum
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qs

from ..config import is_loopback

__all__ = ["Answer", "Asked", "Place", "Routes"]

FOLDER = Path(__file__).parent
TEXT, HTML = "text/plain; charset=utf-8", "text/html; charset=utf-8"
FILES = {
    "/": ("page.html", HTML),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
LIVE, METRICS, HEALTH = "/live", "/metrics", "/healthz"
NEED_TOKEN = {"/", LIVE, METRICS}
"""Whatever says something of a run. The style sheet and the script are those of every run."""

HEADERS = {
    # Nothing is loaded from elsewhere, nothing within the page is run as a script or shown in another site's frame.
    "Content-Security-Policy": (
        "default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self'; style-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The token is part of the URL: the page's links do not pass it on, and no cache keeps it.
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Asked:
    """A request of HTTP, as far as it matters."""

    method: str
    target: str
    """Path and query, as they came."""
    values: Callable[[str], Sequence[str]]
    """All values of a header, by its name."""


@dataclass(frozen=True)
class Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = TEXT
    headers: Mapping[str, str] = field(default_factory=dict)
    """Beside those that every answer has."""
    why: str = ""
    """For the log, where something is refused."""


class Place(enum.Enum):
    """Where a request belongs that is not answered here."""

    RUN = "run"
    """To the devices, or nowhere."""
    LIVE = "live"
    """It opens the WebSocket that tells a page how the run goes."""
    METRICS = "metrics"
    """To the run's metrics, which take a moment to be written."""


class Routes:
    """
    Args:
        has_page: without it, only whether the server is well is told.
        token: whoever reads something of the run has to know it. Without one, only names of this machine are listened to: a
            page of another site, whose name was made to lead here, asks for its own.
        is_well: whether the run goes on.
    """

    def __init__(self, *, has_page: bool, token: str | None, is_well: Callable[[], bool]) -> None:
        self._token, self._is_well = token, is_well
        self._files = {path: ((FOLDER / name).read_bytes(), kind) for path, (name, kind) in FILES.items()} if has_page else {}
        self._paths = {*self._files, LIVE, METRICS, HEALTH} if has_page else {HEALTH}

    def look_up(self, asked: Asked) -> Answer | Place:
        """What the request is answered, or where it belongs."""
        path, _, query = asked.target.partition("?")
        wants_socket = bool(asked.values("Upgrade"))
        # A path is one of these, letter by letter: nothing is decoded, and nothing made shorter.
        if path not in self._paths or (path == "/" and wants_socket):
            return Place.RUN
        if asked.method != "GET":
            return _refusal(HTTPStatus.METHOD_NOT_ALLOWED, "this is only read: GET", Allow="GET")
        if path == HEALTH:
            return Answer(HTTPStatus.OK, b"ok\n") if self._is_well() else _refusal(HTTPStatus.SERVICE_UNAVAILABLE, "ending")
        refusal = self._refusal_of_a_stranger(path, query, asked)
        if refusal is not None:
            return refusal
        if path == LIVE:
            return (
                Place.LIVE
                if wants_socket
                else _refusal(HTTPStatus.UPGRADE_REQUIRED, "a WebSocket is here", Upgrade="websocket")
            )
        return Place.METRICS if path == METRICS else Answer(HTTPStatus.OK, *self._files[path])

    def shown(self, target: str) -> str:
        """A request's path as it may stand in the log: without a query, and without the token wherever it is."""
        path = target.partition("?")[0]
        return ascii((path.replace(self._token, "TOKEN") if self._token else path)[:100])

    def _refusal_of_a_stranger(self, path: str, query: str, asked: Asked) -> Answer | None:
        hosts, origins = asked.values("Host"), asked.values("Origin")
        if len(hosts) != 1:
            return _refusal(HTTPStatus.BAD_REQUEST, "one Host is needed")
        own = {f"http://{hosts[0]}".lower(), f"https://{hosts[0]}".lower()}  # something before the server may encrypt for it
        if len(origins) > 1 or any(origin.lower() not in own for origin in origins):
            return _refusal(HTTPStatus.FORBIDDEN, f"a web page of {', '.join(origins)[:100]!a}")
        if self._token is None:
            if not _is_this_machine(hosts[0]):
                why = f"the page is this machine's alone, and was asked for as {hosts[0][:100]!a}: open it at 127.0.0.1"
                return _refusal(HTTPStatus.FORBIDDEN, why)
        elif path in NEED_TOKEN and not self._is_token(_tokens(query, asked.values("Authorization"))):
            why = "the token of the page is missing or wrong: open the URL that the server printed when it started"
            return _refusal(HTTPStatus.UNAUTHORIZED, why, **{"WWW-Authenticate": "Bearer"})
        return None

    def _is_token(self, given: Sequence[str]) -> bool:
        """Compared in a time that does not depend on how much of it is right."""
        assert self._token is not None
        return len(given) == 1 and hmac.compare_digest(given[0].encode("utf-8", "replace"), self._token.encode())


def _tokens(query: str, authorizations: Sequence[str]) -> list[str]:
    """All that are given, in the query or as a bearer's."""
    try:
        found = parse_qs(query, keep_blank_values=True, max_num_fields=10).get("token", [])
    except ValueError:
        return []
    for value in authorizations:
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            found.append(credentials.strip())
    return found


def _is_this_machine(host: str) -> bool:
    """Whether a Host header names this machine by itself, whatever its port: a tunnel may lead from another."""
    found = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^\[\]:]+)(:[0-9]{1,5})?", host, re.IGNORECASE)
    return found is not None and is_loopback(found[1].strip("[]").lower())


def _refusal(status: HTTPStatus, why: str, **headers: str) -> Answer:
    return Answer(status, f"{why}\n".encode(), headers=headers, why=why)
