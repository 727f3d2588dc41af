"""The secret with which other machines see the page of a run: made once, and kept in the run's folder."""

import re
import secrets
from pathlib import Path

from storage import replace_file

from ..errors import ServerError

__all__ = ["TOKEN_FILE", "own_token"]

TOKEN_FILE = "page-token"


def own_token(run_dir: Path) -> str:
    """
    The token of a run's page: 256 random bits, readable for this user alone; the same whenever the run is served again.

    Raises:
        ServerError: the file cannot be read or written, or holds something else.
    """
    path = run_dir / TOKEN_FILE
    try:
        if not path.exists():
            replace_file(path, f"{secrets.token_urlsafe(32)}\n".encode())
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ServerError(f"{path} cannot be used: {error.strerror or error}") from None
    except UnicodeDecodeError:
        token = ""
    if not re.fullmatch(r"[A-Za-z0-9_-]{32,256}", token):
        raise ServerError(f"{path} holds no token; delete it, and another one is made")
    return token
