"""Tables beside images: what each file is, as ``.jsonl`` or ``.csv``, with the line of whatever is wrong in them."""

import codecs
import csv
import functools
import io
import json
import logging
import posixpath
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from smalto.data.annotations import read_caption, read_labels, split_word
from smalto.data.foreign import one_line, reason
from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

PATH = ("path", "file_name")
"""Columns that say where a file is; the first that a table has is taken."""
COLUMNS = (*PATH, "label", "caption", "split")
"""All that are read, in small or capital letters."""


class Row(NamedTuple):
    """One image of a table.

    Args:
        path: of the file, below the folder, with ``/``.
        label: a number or a name, as all of the column are; None: none.
        caption: one sentence, or None.
        split: the word in the table, or None.
        line: of the table.
    """

    path: str
    label: int | str | None
    caption: str | None
    split: Any
    line: int


def read_rows(path: Path) -> tuple[list[Row], int]:
    """The rows of a table, and in how many of them only the first of several captions was taken.

    Raises:
        FileNotFoundError: no such table.
        ValueError: damaged, without a column of paths, a path that leads out of the folder, or values that are no
            label or no caption; table and line are named.
    """
    if not path.is_file():
        raise MissingFile(f"no table {path}; source.metadata is relative to source.path")
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:4]:
        raise InputError(f"{path} is UTF-16 or UTF-32 text, or no text; save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    jsonl = path.suffix.lower() in (".jsonl", ".ndjson")
    if not jsonl and data.lstrip()[:1] in (b"{", b"["):
        raise InputError(f"{path} holds JSON: write one object a line, and call it NAME.jsonl; other names are CSV")
    if data.startswith((b"PAR1", b"PK")):
        raise InputError(
            f"{path} is no text: tables are .jsonl or .csv (source=parquet reads images inside of Parquet)"
        )
    lines = _read_jsonl(path, data) if jsonl else _read_csv(path, data)
    unread = sorted(set().union(*(cells for _, cells in lines)) - set(COLUMNS))
    if unread:
        log.warning(
            "%s: columns that are not read: %s%s; those that are: %s",
            path,
            ", ".join(map(one_line, unread[:8])),
            ", ..." if len(unread) > 8 else "",
            ", ".join(COLUMNS),
        )
    rows, more = [], 0
    labels = read_labels([cells.get("label") for _, cells in lines], lambda i: f"{path}, line {lines[i][0]}")
    for (number, cells), label in zip(lines, labels, strict=True):
        place = f"{path}, line {number}"
        caption, others = read_caption(cells.get("caption"), lambda place=place: place)  # type: ignore[misc]
        split = cells.get("split")
        more += others > 0
        rows.append(Row(_inner_path(cells, place), label, caption, None if split == "" else split, number))
    _tell_of_repeats(path, rows)
    return rows, more


def _tell_of_repeats(path: Path, rows: list[Row]) -> None:
    """Warn of images that a table names again and otherwise: in two splits, one is trained on and held out."""
    said: dict[str, Row] = {}
    labels, splits = [], []
    for row in rows:
        first = said.setdefault(posixpath.normpath(row.path), row)
        if first.label != row.label:
            labels.append(row.path)
        if first.split != row.split and split_word(first.split) != split_word(row.split):
            splits.append(row.path)
    for what, found in (("labels", labels), ("splits", splits)):
        if found:
            shown = ", ".join(map(one_line, found[:3]))
            log.warning("%s: %d rows name an image again with other %s (%s)", path, len(found), what, shown)


def _inner_path(cells: dict[str, Any], place: str) -> str:
    """Where the file of a row is; never outside the folder, whatever the table says: it came with the images."""
    value = next((cells[key] for key in PATH if cells.get(key)), None)
    if not value:
        columns = ", ".join(map(one_line, cells)) or "none"
        raise InputError(
            f"{place}: the table has rows without path; its columns are {columns}, and "
            f"each row needs {' or '.join(PATH)}: the file's place below source.path"
        )
    if not isinstance(value, str):
        raise InputError(f"{place}: the path is {value!r}; it must be text")
    inner = PurePosixPath(value)
    if inner.is_absolute() or ".." in inner.parts or "\0" in value:
        raise InputError(f"{place}: the path {value!r} leads out of source.path; paths must be relative, without ..")
    try:
        value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise InputError(f"{place}: the path {value!r} is no name that a file can have") from None
    return value


def _read_jsonl(path: Path, data: bytes) -> list[tuple[int, dict[str, Any]]]:
    lines = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line, object_pairs_hook=_object)
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path}, line {number}: not JSON, or cut short ({reason(error)}); each line is one object"
            ) from error
        if not isinstance(cells, dict):
            raise InputError(f'{path}, line {number}: not an object such as {{"path": ..., "label": ...}}')
        lines.append((number, cells))
    return lines


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with names as columns have them."""
    cells = {_column(name): value for name, value in pairs}
    if len(cells) < len(pairs):
        _check_unique([_column(name) for name, _ in pairs], "an object")
    return cells


def _check_unique(names: list[str], where: str) -> None:
    twice = [name for name in COLUMNS if names.count(name) > 1]
    if twice:
        raise InputError(f"{where} has {', '.join(twice)} twice, in small or capital letters; leave one out")


def _read_csv(path: Path, data: bytes) -> list[tuple[int, dict[str, Any]]]:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text; save the table as UTF-8") from error
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    lines = []
    number = 1
    try:
        for cells in reader:
            place, number = number, reader.line_num + 1
            if not any(cells):
                continue
            if not header:
                header = [_column(name) for name in cells]
                _check_unique(header, f"{path}, line {place}: the header")
                continue
            if any(cells[len(header) :]):
                raise InputError(
                    f"{path}, line {place}: {len(cells)} cells, the header has {len(header)}; put text that holds "
                    f"{delimiter!r} in quotes, with no space before them"
                )
            lines.append((place, dict(zip(header, cells, strict=False))))
    except csv.Error as error:
        raise InputError(f"{path}, line {number}: not CSV, or cut short ({error})") from error
    return lines


def _delimiter(text: str) -> str:
    """What separates the columns: what leaves a column of paths in the header, else what makes most columns."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    found = {d: [_column(name) for name in header.split(d)] for d in (",", ";", "\t", "|")}
    return max(found, key=lambda d: (bool(set(found[d]) & set(PATH)), len(found[d])))


@functools.lru_cache(1000)
def _column(name: str) -> str:
    return one_line(name.strip().strip('"').lower())
