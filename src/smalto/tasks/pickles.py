"""Pickles looked at before they are loaded: what they name, and how large what they make is when it is written out.

A pickle of a hundred bytes can hold a tuple of itself, forty times over: to hash or to print that takes longer than
anybody lives. One byte more asks for a table of gigabytes. Checkpoints have nothing of the kind.
"""

import pickle
import pickletools
import re
from typing import IO

from smalto.tasks.contents import ENTRIES

_CHARACTERS = 64
"""Of a text, that count as much as an entry."""
_FILLED = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}
_NAMES = {"GLOBAL", "INST"}


class _Made:
    """Something that a pickle makes: how large it is without what is in it, and that."""

    __slots__ = ("own", "parts", "whole")

    def __init__(self, own: int, parts: "list[_Made]") -> None:
        self.own, self.parts = own, parts
        self.whole: int | None = None  # not known, being counted (0), or counted


def check_pickle(file: IO[bytes], known: re.Pattern[str] | None = None) -> None:
    """Go through one pickle without loading it; the file is at its end then.

    Args:
        file: at its begin.
        known: all that it may name, as ``module name``; None: whoever loads it looks at that.

    Raises:
        pickle.UnpicklingError: it names something else, or what it makes is too large or has no end.
        ValueError: no pickle; or LookupError.
    """
    stack: list[_Made | None] = []  # None is a mark
    memo: dict[int, _Made] = {}
    made: list[_Made] = []
    for operation, argument, _ in pickletools.genops(file):
        name, needs = operation.name, operation.stack_before
        if known is not None and name in _NAMES and not known.fullmatch(str(argument)):
            raise pickle.UnpicklingError(f"GLOBAL {str(argument).replace(' ', '.')}")
        if len(made) > ENTRIES:
            raise pickle.UnpicklingError("it holds more than any checkpoint")
        if name.endswith("PUT") or name == "MEMOIZE":
            place = len(memo) if argument is None else int(argument)
            if not 0 <= place <= ENTRIES or stack[-1] is None:
                raise pickle.UnpicklingError("it counts in a way that no pickle does")
            memo[place] = stack[-1]
            continue
        if name.endswith("GET"):
            assert argument is not None
            stack.append(memo[int(argument)])
            continue
        taken: list[_Made] = []
        count = len(needs)
        if pickletools.markobject in needs:
            count = needs.index(pickletools.markobject)
            while (top := stack.pop()) is not None:
                taken.append(top)
        for _needed in range(count):
            top = stack.pop()
            taken += [top] if top is not None else []
        if name == "DUP":
            stack += [taken[0], taken[0]]
        elif name in _FILLED:
            taken[-1].parts += taken[:-1]
            stack.append(taken[-1])
        elif pickletools.markobject in operation.stack_after:
            stack.append(None)
        elif operation.stack_after:
            text = len(argument) if isinstance(argument, (str, bytes, bytearray)) else 0
            made.append(_Made(1 + text // _CHARACTERS, taken))
            stack.append(made[-1])
    _check_sizes(made)


def _check_sizes(made: list[_Made]) -> None:
    waiting = list(made)
    while waiting:
        each = waiting[-1]
        if each.whole is None:
            each.whole = 0
            for part in each.parts:
                if part.whole == 0:
                    raise pickle.UnpicklingError("it holds itself")
                if part.whole is None:
                    waiting.append(part)
            continue
        waiting.pop()
        if each.whole == 0:
            each.whole = each.own + sum(part.whole or 0 for part in each.parts)
            if each.whole > ENTRIES:
                raise pickle.UnpicklingError("written out, what it holds would have no end")
