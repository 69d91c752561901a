import io
import json
import tarfile
from contextlib import suppress

import numpy as np
import pytest

from smalto.data.health import shard_problems
from smalto.data.output import OutputFolder
from smalto.data.patterns import expand_paths
from smalto.data.shards import CODES, IMAGES, map_member, missing_shards, read_member, read_meta, tar_members
from smalto.data.write import TarShard, npy_bytes
from smalto.errors import InputError, UserError
from smalto.files import write_json


def written(path, members):
    with TarShard(path) as shard:
        for name, data in members.items():
            shard.add(name, data)
        return shard.close()


def data_set(folder, *, kind=IMAGES, version=1):
    record = written(folder / "train-00000.tar", {"00000000.cls": b"3"})
    meta = {"format": kind, "version": version, "splits": {"train": {"num_images": 1, "shards": [record]}}}
    write_json(folder / "meta.json", meta)
    return meta


def test_shards_are_plain_tar_with_equal_bytes_for_equal_content(tmp_path):
    members = {"a.txt": b"one", "b.bin": bytes(range(256)) * 5, "empty.cls": b""}
    records = [written(tmp_path / name, members) for name in ("x.tar", "y.tar")]
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    assert records[0]["sha256"] == records[1]["sha256"]
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == members
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_member_offsets_of_any_tar(tmp_path, tar_format):
    members = {"short.png": b"12345", "folder/" + "long" * 40 + "/name.jpg": b"x" * 700, "d/z.cls": b"7"}
    if tar_format == tarfile.USTAR_FORMAT:
        members["p" * 90 + "/" + "n" * 90] = b"prefix"
        del members["folder/" + "long" * 40 + "/name.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w", format=tar_format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        tar.addfile(tarfile.TarInfo("just_a_folder/"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "short.png"
        tar.addfile(link)
    found = {m.name: read_member(tmp_path / "a.tar", m) for m in tar_members(tmp_path / "a.tar")}
    assert {name: found[name] for name in members} == members


def test_damaged_tars_are_named(tmp_path):
    path = tmp_path / "a.tar"
    written(path, {"a.bin": bytes(5000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="ends inside a member"):
        list(tar_members(path))
    path.write_bytes(whole[: 512 + 5120])  # exactly between members
    with pytest.raises(ValueError, match="without tar's end mark"):
        list(tar_members(path))
    path.write_bytes(b"\x1f\x8b" + whole)
    with pytest.raises(ValueError, match=r"not a plain tar.*gz"):
        list(tar_members(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        list(tar_members(path))


def test_npy_members_are_mapped_in_place(tmp_path):
    array = np.arange(60, dtype=np.uint16).reshape(3, 4, 5)
    written(tmp_path / "a.tar", {"first.cls": b"1", "a.npy": npy_bytes(array)})
    member = list(tar_members(tmp_path / "a.tar"))[1]
    mapped = map_member(tmp_path / "a.tar", member)
    assert np.array_equal(mapped, array)
    assert not mapped.flags.writeable
    # the flat view of the codes' reader needs element 0 on a multiple of the item size
    assert mapped.offset % 8 == 0
    data = (tmp_path / "a.tar").read_bytes()
    assert data[mapped.offset : mapped.offset + array.nbytes] == array.tobytes()


def test_leaving_early_leaves_nothing(tmp_path):
    with TarShard(tmp_path / "a.tar") as shard:
        shard.add("a", b"a")
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_braces_and_wildcards(tmp_path):
    for name in ("train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar", "notes.txt"):
        (tmp_path / name).touch()

    def names(pattern):
        return [path.name for path in expand_paths(f"{tmp_path}/{pattern}")]

    assert names("train-{000..001}.tar") == ["train-000.tar", "train-001.tar"]
    assert names("{val,train}-000.tar") == ["val-000.tar", "train-000.tar"]
    assert names("train-*.tar") == ["train-000.tar", "train-001.tar", "train-002.tar"]
    assert names("") == ["train-000.tar", "train-001.tar", "train-002.tar", "val-000.tar"]
    with pytest.raises(FileNotFoundError, match="train-003"):
        names("train-{002..003}.tar")


def test_meta_is_read_back(tmp_path):
    meta = data_set(tmp_path)
    assert read_meta(tmp_path, IMAGES) == meta


def test_every_wrong_folder_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data at .*smalto prepare"):
        read_meta(tmp_path / "nowhere", IMAGES)
    with pytest.raises(FileNotFoundError, match=r"no meta.json.*smalto extract"):
        read_meta(tmp_path, CODES)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="not finished"):
        read_meta(tmp_path, IMAGES)
    data_set(tmp_path)
    with pytest.raises(ValueError, match=r"holds image shards, but code shards are needed.*smalto extract"):
        read_meta(tmp_path, CODES)
    data_set(tmp_path, kind=CODES)
    with pytest.raises(ValueError, match=r"holds code shards, but image shards are needed.*smalto prepare"):
        read_meta(tmp_path, IMAGES)
    data_set(tmp_path, version=9)
    with pytest.raises(ValueError, match="version 9"):
        read_meta(tmp_path, IMAGES)
    (tmp_path / "meta.json").write_text(json.dumps({"something": "else"}))
    with pytest.raises(ValueError, match="not a smalto"):
        read_meta(tmp_path, IMAGES)


def test_missing_and_shortened_shards_are_seen(tmp_path):
    data_set(tmp_path)
    shard = tmp_path / "train-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"train-00000.tar has \d+ bytes, meta.json says"):
        read_meta(tmp_path, IMAGES)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-00000.tar is listed .* but missing"):
        read_meta(tmp_path, IMAGES)


def test_a_meta_json_that_contradicts_itself_is_refused(tmp_path):
    record = {"name": "train-00000.tar", "num_images": 1}
    with TarShard(tmp_path / "train-00000.tar") as shard:
        shard.add("000000.cls", b"1")
        record |= shard.close()
    good = {"format": IMAGES, "version": 1, "splits": {"train": {"num_images": 1, "shards": [record]}}}
    write_json(tmp_path / "meta.json", good)
    assert read_meta(tmp_path, IMAGES) == good
    assert shard_problems(tmp_path, good, verify=True) == []
    for change, said in (
        ({"num_images": 7, "shards": [record]}, "train has 7 images, its shards 1"),
        ({"num_images": 2, "shards": [record, record]}, "train-00000.tar is listed twice"),
        ({"num_images": 1, "shards": [record | {"name": "../train-00000.tar"}]}, "is no plain file name"),
        ({"num_images": 1, "shards": [record | {"name": "/etc/passwd"}]}, "is no plain file name"),
        ({"num_images": 1, "shards": [{}]}, "lacks what belongs there"),
    ):
        bad = good | {"splits": {"train": change}}
        write_json(tmp_path / "meta.json", bad)
        with pytest.raises(InputError, match=said):
            read_meta(tmp_path, IMAGES)
        assert any(said in problem for problem in shard_problems(tmp_path, bad, verify=False))


def test_damaged_headers_are_told_in_one_line(tmp_path):
    """Any byte of any header: an error of ours, or what was there; no hang, no traceback."""
    file = tmp_path / "a.tar"
    with TarShard(file) as shard:
        shard.add("a.npy", npy_bytes(np.arange(60, dtype=np.uint16).reshape(3, 20)))
        shard.add("b.cls", b"12")
        shard.close()
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 2048, int(rng.integers(1, 4))):
            data[place] = int(rng.choice([rng.integers(256), ord("-"), ord("7"), 0x80]))
        file.write_bytes(data)
        with suppress(InputError):
            for member in tar_members(file):
                with suppress(InputError):
                    map_member(file, member)
    header = bytearray(whole)
    header[124:136] = b"-7777777777\0"
    file.write_bytes(header)
    with pytest.raises(InputError, match="damaged"):
        list(tar_members(file))


def test_prepared_is_what_has_all_its_shards(tmp_path):
    data_set(tmp_path)
    meta = read_meta(tmp_path, IMAGES)
    assert missing_shards(tmp_path, meta) == []
    (tmp_path / "train-00000.tar").unlink()
    assert missing_shards(tmp_path, meta) == ["train-00000.tar"]
    settings = {"source": "x"}
    write_json(tmp_path / "plan.json", {"format": IMAGES, "settings": settings})
    folder = OutputFolder(tmp_path, format=IMAGES, settings=settings, command="smalto prepare", overwrite=False)
    with pytest.raises(UserError, match=r"train-00000\.tar is missing.*restore.*overwrite=true"), folder:
        pass
