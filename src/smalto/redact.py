"""What is written down of a config or a command line, without the credentials in it.

Run folders, MLflow and checkpoints are shared; a password in a tracking address or the signature of a presigned URL is
not meant to be. What carried one is recognised by its mark, so that a continued run can ask for it again.
"""

import re
from collections.abc import Iterable
from typing import Any

MARK = "***"
"""Stands where a credential stood."""

URL = re.compile(
    r"""(?P<scheme>\b[a-z][a-z0-9+.-]{0,40}://)
    (?P<user>[^\s/?#'"]*@                            # user:password@
      |[^\s/?#@:'"]+:(?!\d+(?:[/?#\s'"]|$))[^\s@'"]*@)?  # the same with a / in the password, which databases take
    (?P<place>[^\s?'"]*)
    (?P<query>\?(?:(?!(?:,|::)[a-z][a-z0-9+.-]{0,40}://)[^\s'"])*)?""",
    re.IGNORECASE | re.VERBOSE,
)
SECRET = r"(?:password|passwd|secret|token|auth[_-]?token|access[_-]?token|api[_-]?key|access[_-]?key|secret[_-]?key)"
NAMED = re.compile(
    rf"""(?P<name>(?<![\w-])(?:-{{0,2}}{SECRET}\s*[=:]\s*|--{SECRET}\s+|authorization\s*[=:]\s*(?:(?:basic|bearer)\s+)?))
    (?P<value>[^\s'",&]+)""",
    re.IGNORECASE | re.VERBOSE,
)


def redacted(value: Any) -> Any:
    """Plain data without credentials: those of URLs (user and password, the whole query), and values by their name.

    A query is dropped whatever it says: what a signature is called differs from one service to the next. Doing it again
    changes nothing.

    Args:
        value: text, or dicts and lists of it; other values are returned as they are. It is not changed.
    """
    if isinstance(value, str):
        return NAMED.sub(rf"\g<name>{MARK}", URL.sub(_without, value))
    if isinstance(value, dict):
        return {
            key: MARK if isinstance(entry, str) and entry and re.fullmatch(SECRET, str(key), re.IGNORECASE)
            else redacted(entry)
            for key, entry in value.items()
        }  # fmt: skip
    if isinstance(value, (list, tuple)):
        return [redacted(entry) for entry in value]
    return value


def _without(match: re.Match[str]) -> str:
    user = f"{MARK}@" if match["user"] else ""
    query = f"?{MARK}" if match["query"] else ""
    return f"{match['scheme']}{user}{match['place']}{query}"


def restored(value: Any, known: Iterable[str]) -> Any:
    """Plain data that was written down, with each text of ``known`` where its redacted form stands."""
    if isinstance(value, dict):
        return {key: restored(entry, known) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [restored(entry, known) for entry in value]
    if isinstance(value, str) and MARK in value:
        return next((text for text in known if redacted(text) == value), value)
    return value


def redacted_places(value: Any, prefix: str = "") -> list[str]:
    """Dotted names of the entries from which :func:`redacted` took something, in plain data that was written down."""
    if isinstance(value, dict):
        return [place for key, entry in value.items() for place in redacted_places(entry, f"{prefix}{key}.")]
    if isinstance(value, (list, tuple)):
        return [place for i, entry in enumerate(value) for place in redacted_places(entry, f"{prefix}{i}.")]
    return [prefix[:-1]] if isinstance(value, str) and MARK in value else []
