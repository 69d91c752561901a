"""What is typed after a verb, made fit for Hydra's grammar: paths are taken as they are."""

import difflib
import os
import re
from collections.abc import Collection, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from smalto.errors import InputError

_PATHS = re.compile(
    r"(.+\.)?(path|dir|dirpath|run_dir|\w+_(path|ckpt|dir|file))|ckpt|out|in|samples|reference|save|init_from|picture|text"
    r"|(to|from)_npy(\.\w+)?|source\.(images|labels|val_images|val_labels|metadata)|(features|perceptual)\.weights"
    r"|paths\.\w+|data\.urls"
)
_TEXT = re.compile(r"([\[\]{},:])")
"""What stands between the texts of lists and dicts, and between the jobs of a sweep."""
_NEVER_SWEPT = ("hydra.run.dir", "hydra.sweep.dir")


def is_path(key: str) -> bool:
    """Whether an option names a file or folder."""
    return _PATHS.fullmatch(key) is not None


def expanded(key: str, path: str) -> str:
    """``~`` as a shell would read it.

    Raises:
        InputError: of a user that there is not; a folder with that name would invite the worst of removals.
    """
    if not path.startswith("~"):
        return path
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise InputError(f"{key} is {path}, and there is no such user; a folder with that name is ./{path}")
    return found


def fit(arguments: Sequence[str], *, groups: Collection[str]) -> list[str]:
    """Arguments as Hydra's grammar wants them.

    Args:
        arguments: as they were typed.
        groups: names of config groups, whose options are words whatever they look like.

    Raises:
        InputError: no folder, where the current one would be taken, or a user that there is not.
    """
    for each in arguments:
        key, equals, value = each.lstrip("+").partition("=")
        if key in _NEVER_SWEPT and equals and not value.strip("'\" "):
            raise InputError(f"{key} is empty, a path is needed")  # Hydra would take the current folder
    sweeps = any(each in ("-m", "--multirun") or each.startswith(("hydra.mode=", "sweep=")) for each in arguments)
    return [quoted(each, sweeps=sweeps, groups=groups) for each in arguments]


def check_added(arguments: Sequence[str], *, verb: str, known: Collection[str]) -> None:
    """An option that is misspelled with a + would be put beside the one that is meant, and do nothing.

    One that is like no other is a note of the user's: it is kept with the config.

    Args:
        arguments: as they were typed.
        verb: of the command.
        known: names at the root of its config, those of groups among them.

    Raises:
        InputError: there is one.
    """
    for argument in arguments:
        key, equals, _ = argument.lstrip("+").partition("=")
        root = re.split(r"[.@/]", key)[0]
        used = any(re.search(rf"\$\{{{re.escape(root)}\b", each) for each in arguments)
        close = difflib.get_close_matches(root, known, n=1)
        if argument.startswith("+") and equals and root not in known and close and not used:
            raise InputError(f"smalto {verb} has no option {key}; did you mean {close[0]}?")


def quoted(argument: str, *, sweeps: bool = False, groups: Collection[str] = ()) -> str:
    """``key=value`` with quotes where Hydra's grammar would read a path, or an option's name, as something else.

    Args:
        argument: as it was typed.
        sweeps: a comma separates the jobs of a sweep.
        groups: names of config groups.
    """
    key, equals, value = argument.partition("=")
    key = key.lstrip("+")
    if not equals or not value or argument.startswith(("-", "~")) or "${" in value:
        return argument
    path = is_path(key)
    found = _parsed(argument)
    if found is None:
        if not path and not value.isascii():
            return _letters_quoted(argument)
        meant = value[0] in "'\"" or value[0] + value[-1] in ("[]", "{}")  # a value of Hydra's, with a mistake in it
        wrong = not meant and (path or "/" in value)
        return f"{argument.partition('=')[0]}={_quotes(expanded(key, value))}" if wrong else argument
    given = found.value()
    if isinstance(found._value, QuotedString) or given == value:
        if path and isinstance(given, str) and given.startswith("~"):
            return f"{argument.partition('=')[0]}={_quotes(expanded(key, given))}"
        return argument
    if given is None and key in groups and not argument.startswith("+"):
        return f"~{key}"  # null is what the configs show of a group that was not chosen; Hydra knows it there only
    if given is None or given == "???" or isinstance(given, (list, dict)):
        return argument
    swept = found.is_sweep_override() and sweeps and key not in _NEVER_SWEPT
    if swept or not (path or (key in groups and not found.is_sweep_override())):
        return argument
    return f"{argument.partition('=')[0]}={_quotes(expanded(key, value) if path else value)}"


def _letters_quoted(argument: str) -> str:
    """With quotes around texts that hold letters beyond ASCII, which Hydra's grammar takes in quotes only."""
    key, _, value = argument.partition("=")
    if set(value) & set("'\"()"):
        return argument
    parts = _TEXT.split(value)
    texts = [part if part.isascii() or _TEXT.fullmatch(part) else _quotes(part.strip()) for part in parts]
    return f"{key}={''.join(texts)}"


def _parsed(argument: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _quotes(value: str) -> str:
    """In single quotes; backslashes count only before a quote."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    return "'" + re.sub(r"\\+$", lambda found: found[0] * 2, escaped) + "'"
