"""Our reader and writer of the safetensors format: its bytes, every dtype, damaged files."""

import json
import struct
import zlib

import pytest
import torch

from smalto.tasks.safetensors import DTYPES, read_safetensors, write_safetensors


def tensors() -> dict[str, torch.Tensor]:
    made = {str(dtype): (torch.arange(-6, 7) % 5).to(dtype)[3:] for dtype in DTYPES.values()}
    return made | {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "odd": torch.ones(3, dtype=torch.uint8),
    }


def test_what_was_written_comes_back(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors())
    found = read_safetensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors().keys()
    for name, value in tensors().items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_bytes_are_those_of_the_format(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"b": torch.tensor([[1.0, -2.0]]), "a": torch.tensor([7], dtype=torch.int64)})
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    assert length % 8 == 0
    sums = f"{zlib.crc32(data[8 + length : 16 + length]):08x}{zlib.crc32(data[16 + length :]):08x}"
    assert json.loads(data[8 : 8 + length]) == {
        "__metadata__": {"format": "pt", "crc32": sums},
        "a": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 16]},
    }
    assert data[8 + length :] == struct.pack("<qff", 7, 1.0, -2.0)


def test_files_of_others_may_start_anywhere(tmp_path):
    """Nothing says that headers are padded or that wide types come first."""
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "float": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<Bff", 9, 0.5, 1.5))
    found = read_safetensors(path)
    assert (found["byte"].item(), found["float"].tolist()) == (9, [0.5, 1.5])


def test_one_tensor_saved_alone_is_one_tensor(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"large": torch.zeros(100_000), "small": torch.zeros(2)})
    torch.save(read_safetensors(tmp_path / "x.safetensors")["small"], tmp_path / "small.pt")
    assert (tmp_path / "small.pt").stat().st_size < 5_000


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(4)})
    before = path.read_bytes()
    read_safetensors(path)["a"].fill_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_files(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.zeros(100)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"x\.safetensors is not a whole safetensors file.*copy it again") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html><body>Sign in to go on</body></html>",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a":{}}',
        struct.pack("<Q", 61) + b'{"a":{"dtype":"F9","shape":[1],"data_offsets":[0,4]}}        ' + bytes(4),
        struct.pack("<Q", 61) + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}       ' + bytes(4),
    ],
)
def test_other_files(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_safetensors(tmp_path / "x.safetensors")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="check the path"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_dtype_without_a_name_there_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"a is torch\.complex64"):
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())
