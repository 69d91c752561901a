"""Where the files of an uncompressed tar lie: the headers of our own shards by hand, all others by ``tarfile``."""

import itertools
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Self

from smalto.data.foreign import open_plain, reason
from smalto.errors import InputError

_BLOCK = 512  # tar's unit: every header and every member starts at a multiple
_PADDING = 2**11  # blocks of zeros behind the last member that are looked through
_END = bytes(_BLOCK)
_EXTENSION = 2**14  # bytes of an extension header: some versions of tarfile take quadratic time over them


class Member(NamedTuple):
    """One file inside a tar."""

    name: str
    offset: int  # of the first content byte in the tar
    size: int


class StrictTarInfo(tarfile.TarInfo):
    """Headers for ``tarfile`` that end the reading where they are damaged.

    ``tarfile`` takes a damaged header for the end of the archive, a negative size as a way back, and reads an
    extension header of any size into memory.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        """Of 512 bytes."""
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            if len(buf) < _BLOCK:
                raise tarfile.ReadError("it ends without tar's end mark") from error
            raise tarfile.ReadError(f"a header is damaged: {error}") from error
        extension = info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        if info.size < 0:
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        if extension and info.size > _EXTENSION:
            raise tarfile.ReadError(
                f"a header claims {info.size} bytes for extensions, {_EXTENSION} are read: write it without extended "
                "attributes"
            )
        return info


def tar_members(path: str | Path, skipped: Counter[str] | None = None) -> Iterator[Member]:
    """Regular files of an uncompressed tar in order, read from the headers alone; links count as what they lead to.

    Args:
        path: of the tar.
        skipped: what is no file (links to nothing, devices) is counted here, by kind.

    Raises:
        ValueError: compressed, cut short, otherwise not a plain tar, or several, one put after the other.
    """
    path = Path(path)
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < _BLOCK:
            raise InputError(f"{path} is not a tar file: it has {size} bytes")
        members = _plain_members(file.fileno(), size, path)
    return iter(_any_members(path, size, Counter() if skipped is None else skipped) if members is None else members)


def _plain_members(file: int, end: int, path: Path) -> list[Member] | None:
    """Of a tar of plain files and folders in the POSIX layout, ten times as fast as ``tarfile``; None for others."""
    members: list[Member] = []
    position = 0
    while position + _BLOCK <= end:
        header = os.pread(file, _BLOCK, position)
        kind = header[156:157]
        if header[257:262] != b"ustar" or kind not in (b"0", b"\0", b"5"):
            if header != _END:
                return None
            _check_rest(file, position, path)
            return members
        try:
            size, checksum = int(header[124:135], 8), int(header[148:154], 8)
        except ValueError:
            return None
        if size < 0 or checksum != 256 + sum(header[:148]) + sum(header[156:]):
            return None
        size = 0 if kind == b"5" else size
        offset = position + _BLOCK
        position = offset + -(-size // _BLOCK) * _BLOCK
        if offset + size > end:
            raise InputError(f"{path} ends inside a member; it was copied or written incompletely")
        name = header[:100].partition(b"\0")[0]
        prefix = header[345:500].partition(b"\0")[0] if header[345] else b""
        if kind != b"5" and not name.endswith(b"/"):
            whole = prefix + b"/" + name if prefix else name
            members.append(Member(whole.decode(errors="surrogateescape"), offset, size))
    raise InputError(f"{path} ends without tar's end mark; it was copied or written incompletely")


def _any_members(path: Path, end: int, skipped: Counter[str]) -> list[Member]:
    found: dict[str, Member] = {}
    members: list[Member | tarfile.TarInfo] = []  # links to what comes later stay as they are, until all is read
    last = -1
    try:
        with open_plain(path) as raw, tarfile.open(fileobj=raw, mode="r:", tarinfo=StrictTarInfo) as tar:
            for info in tar:
                if info.offset <= last or info.size < 0:
                    raise tarfile.ReadError("a header claims a negative size")
                last = info.offset
                if info.isdir():
                    continue
                member = found.get(_target(info)) if info.issym() or info.islnk() else None
                if member is not None:
                    member = member._replace(name=info.name)
                elif info.isreg() and not info.issparse():
                    member = Member(info.name, info.offset_data, info.size)
                    if member.offset + member.size > end:
                        raise tarfile.ReadError("it ends inside a member")
                elif info.issym() or info.islnk():
                    members.append(info)
                    continue
                else:
                    skipped["devices and sparse files"] += 1
                    continue
                found[posixpath.normpath(member.name)] = member
                members.append(member)
            _check_rest(raw.fileno(), tar.offset, path)
    except InputError:
        raise
    except Exception as error:  # foreign bytes in the hands of a library
        raise InputError(f"{path} is not a plain tar file, or damaged ({reason(error)}); unpack .gz first") from error
    return list(_resolved(members, found, skipped))


def _resolved(
    members: list[Member | tarfile.TarInfo], found: dict[str, Member], skipped: Counter[str]
) -> Iterator[Member]:
    """All members in their order, links as what they lead to."""
    links = {posixpath.normpath(link.name): link for link in members if isinstance(link, tarfile.TarInfo)}
    for member in members:
        if isinstance(member, Member):
            yield member
            continue
        target, seen = _target(member), set()
        while target in links and target not in seen and target not in found:
            seen.add(target)
            target = _target(links[target])
        if target in found:
            yield found[target]._replace(name=member.name)
        else:
            skipped["links to nothing in the tar"] += 1


def _check_rest(file: int, position: int, path: Path) -> None:
    check_rest((os.pread(file, _BLOCK, start) for start in itertools.count(position, _BLOCK)), path)


def check_rest(blocks: Iterable[bytes], where: object) -> None:
    """Refuse more members behind an end mark: all readers stop there, and would lose them.

    Args:
        blocks: that follow, of 512 bytes; nothing where the file ends.
        where: for the message.
    """
    for block in itertools.islice(blocks, _PADDING):
        if block[257:262] == b"ustar":
            raise InputError(
                f"{where} has more members behind its end mark, as files have that were put one after the other (cat "
                "a.tar b.tar); give them one by one"
            )
        if block != _END:
            return


def _target(info: tarfile.TarInfo) -> str:
    """Where a link leads: a hard link names a member, a symbolic one a file beside itself."""
    folder = posixpath.dirname(info.name) if info.issym() else ""
    return posixpath.normpath(posixpath.join(folder, info.linkname))
