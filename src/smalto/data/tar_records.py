"""Which members of a tar belong to one image, and in what role."""

from collections.abc import Iterable
from typing import NamedTuple

from smalto.data.folder_scan import is_hidden
from smalto.data.foreign import one_line
from smalto.data.shards import IMAGE_SUFFIXES, split_key
from smalto.errors import InputError


class Roles(NamedTuple):
    """Suffixes of the members of one key that are read; None: there is no such member."""

    image: str
    label: str | None
    caption: str | None
    notes: str | None  # a JSON object with any of label, caption


def record_key(name: str) -> tuple[str, str] | None:
    """Key and suffix of a member; None for hidden and system files, which are no data."""
    return None if is_hidden(name.split("/")) else split_key(name)


def is_image(suffix: str) -> bool:
    """Of a member with this suffix, which may hold dots (``00.png``)."""
    return "." + suffix.rpartition(".")[2] in IMAGE_SUFFIXES


def roles(key: str, suffixes: Iterable[str], where: object) -> Roles | None:
    """The members of ``key`` by what they are; None when there is no image among them.

    Keys end at the first dot of a name, so files called ``22.00.png``, ``22.01.png`` share the key ``22``: they would
    be one record, and all but one of its images would be gone.

    Raises:
        ValueError: several images, or a label that belongs to none of them.
    """
    suffixes = list(suffixes)
    images = [suffix for suffix in suffixes if is_image(suffix)]
    if not images:
        return None
    if len(images) > 1:
        names = one_line(", ".join(f"{key}.{suffix}" for suffix in images[:5]))
        raise InputError(
            f"{where} holds {len(images)} images with the key {one_line(key)} ({names}): a key ends at the first dot "
            "of a name, and is one image; write the tar with other names"
        )
    before = images[0].rpartition(".")[0]

    def beside(kind: str) -> str | None:
        return next((s for s in ((f"{before}.{kind}" if before else kind), kind) if s in suffixes), None)

    found = Roles(images[0], beside("cls"), beside("txt"), beside("json"))
    lost = [s for s in suffixes if s.rpartition(".")[2] == "cls"]
    if lost and found.label is None:
        raise InputError(
            f"{where} holds the label {one_line(f'{key}.{lost[0]}')}, which belongs to no image "
            f"({one_line(f'{key}.{images[0]}')}); write the tar with equal names"
        )
    return found
