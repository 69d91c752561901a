"""Reading checkpoints: what is in them comes back, and every wrong file gets one clear line."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smalto.models.gpt import GPT
from smalto.tasks.checkpoint import (
    CONFIG_KEY,
    EMA_KEY,
    fingerprint,
    load_task,
    load_tokenizer,
    read_checkpoint,
)
from smalto.tasks.registry import factory
from smalto.tokenizers.vqgan import VQModel
from smalto.types import SamplingConfig

VQ_NODE = {
    "_target_": "smalto.tokenizers.vqgan.VQModel",
    "_partial_": True,
    "image_size": 16,
    "base_channels": 8,
    "channel_multipliers": [1, 1, 2],
    "z_channels": 8,
    "num_res_blocks": 1,
    "norm_groups": 4,
    "quantizer": {
        "_target_": "smalto.tokenizers.quantize.VectorQuantizer",
        "_partial_": True,
        "codebook_size": 32,
        "codebook_dim": 4,
    },
}
GPT_NODE = {
    "_target_": "smalto.models.gpt.GPT",
    "_partial_": True,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 32,
    "code_shape": [[4, 4]],
    "ffn_multiple_of": 16,
    "conditioner": {
        "_target_": "smalto.models.conditioner.ClassConditioner",
        "_partial_": True,
        "num_classes": 3,
        "drop_prob": 0.1,
    },
}
OPTIMIZER_NODE = {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1e-3}


def prefixed(net: torch.nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{name}": value for name, value in net.state_dict().items()}


def tokenizer_checkpoint(net: VQModel, **extra: Any) -> dict[str, Any]:
    task = {"_target_": "smalto.tasks.tokenizer.TokenizerTask", "net": VQ_NODE, "optimizer": OPTIMIZER_NODE}
    return {
        CONFIG_KEY: {"version": "0", "kind": "tokenizer", "config": {"task": task}},
        "state_dict": prefixed(net, "net") | {"discriminator.main.0.bias": torch.zeros(3)},
        "global_step": 12,
    } | extra


def gpt_checkpoint(net: GPT, **extra: Any) -> dict[str, Any]:
    task = {
        "_target_": "smalto.tasks.gpt.GPTTask",
        "net": GPT_NODE,
        "optimizer": OPTIMIZER_NODE,
        "tokenizer_ckpt": "a/path/of/the/training/machine.ckpt",
    }
    return {
        CONFIG_KEY: {"version": "0", "kind": "gpt", "config": {"task": task}, "classes": ["boot", "bag", "coat"]},
        "state_dict": prefixed(net, "net"),
        "global_step": 7,
    } | extra


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.fixture
def vq() -> VQModel:
    return factory(VQ_NODE, "tokenizer", where="this test")()


@pytest.fixture
def gpt() -> GPT:
    net = factory(GPT_NODE, "gpt", where="this test")()
    torch.nn.init.normal_(net.output.weight)
    return net


@pytest.fixture
def tokenizer_file(tmp_path, vq) -> Path:
    return saved(tmp_path / "tokenizer.ckpt", tokenizer_checkpoint(vq))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("should-not-exist",)


def zip_of_arrays(path: Path) -> Path:
    np.savez(path, a=np.zeros(3))
    return path


WEB_PAGE = b"<!doctype html>\n<html>Sign in</html>"
# name: how to make it from an empty folder and a good file, error, message
WRONG_FILES: dict[str, tuple[Callable[[Path, Path], Path], type[Exception], str]] = {
    "a folder": (lambda folder, _: folder, ValueError, "is a folder.*last.ckpt"),
    "missing": (lambda folder, _: folder / "x", FileNotFoundError, "does not exist.*check the path"),
    "empty": (lambda folder, _: written(folder / "x", b""), ValueError, "not a torch checkpoint"),
    "a web page": (lambda folder, _: written(folder / "x", WEB_PAGE), ValueError, "not a torch.*copy it again"),
    "truncated": (
        lambda folder, good: written(folder / "x", good.read_bytes()[: good.stat().st_size // 2]),
        ValueError,
        "truncated.*copy it again",
    ),
    "another archive": (lambda folder, _: zip_of_arrays(folder / "x.npz"), ValueError, "could not be read"),
    "code inside": (lambda folder, _: saved(folder / "x", {CONFIG_KEY: Malicious()}), ValueError, "could not be read"),
    "bare weights": (
        lambda folder, _: saved(folder / "x", {"model": {"a": torch.zeros(2)}}),
        ValueError,
        "no smalto config.*smalto train",
    ),
    "a tensor": (lambda folder, _: saved(folder / "x", torch.zeros(2)), ValueError, "no smalto config"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_named_in_one_line(tmp_path, tokenizer_file, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, error, message = WRONG_FILES[case]
    (tmp_path / "folder").mkdir()
    path = make(tmp_path / "folder", tokenizer_file)
    with pytest.raises(error, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "should-not-exist").exists(), "reading ran code of the file"


def test_damage_inside_is_named_in_one_line(tmp_path, tokenizer_file):
    content = bytearray(tokenizer_file.read_bytes())
    start = content.index(b"data.pkl")
    content[start + 80 : start + 120] = bytes(40)
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="could not be read as a checkpoint") as caught:
        read_checkpoint(tmp_path / "x.ckpt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("has", "wants"), [("tokenizer", "gpt"), ("gpt", "tokenizer")])
def test_wrong_kind(tmp_path, vq, gpt, has, wants):
    content = tokenizer_checkpoint(vq) if has == "tokenizer" else gpt_checkpoint(gpt)
    path = saved(tmp_path / "x.ckpt", content)
    with pytest.raises(ValueError, match=f"holds a {has}, a {wants} is needed"):
        read_checkpoint(path, kind=wants)
    assert read_checkpoint(path, kind=has)["global_step"] == content["global_step"]
    assert read_checkpoint(path)["global_step"] == content["global_step"]


def test_tokenizer_comes_back(tokenizer_file, vq, generator):
    loaded = load_tokenizer(tokenizer_file)
    image = 2 * torch.rand(2, 3, 16, 16, generator=generator) - 1
    assert torch.equal(loaded.tokenizer.encode(image), vq.eval().encode(image))
    assert (loaded.codebook_size, loaded.code_shape, loaded.image_size) == (32, ((4, 4),), 16)
    assert loaded.path == tokenizer_file
    assert not loaded.tokenizer.training
    assert not any(p.requires_grad for p in loaded.tokenizer.parameters())


def test_tokenizer_at_another_resolution(tokenizer_file):
    loaded = load_tokenizer(tokenizer_file, image_size=32)
    assert (loaded.code_shape, loaded.config["image_size"]) == (((8, 8),), 32)
    assert loaded.fingerprint == load_tokenizer(tokenizer_file).fingerprint


def test_averaged_weights_are_preferred(tmp_path, vq):
    average = {name: value + 1 for name, value in vq.named_parameters()}
    state = {EMA_KEY: {"num_updates": 3, "shadow": average}}
    path = saved(tmp_path / "x.ckpt", tokenizer_checkpoint(vq, callbacks=state))
    loaded, live = load_tokenizer(path), load_tokenizer(path, ema=False)
    for name, value in vq.named_parameters():
        assert torch.equal(loaded.tokenizer.get_parameter(name), value + 1)
        assert torch.equal(live.tokenizer.get_parameter(name), value)


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_weights_must_fit_exactly(tmp_path, vq, change):
    content = tokenizer_checkpoint(vq)
    if change == "missing":
        del content["state_dict"]["net.decoder.conv_out.bias"]
    else:
        content["state_dict"]["net.decoder.extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"decoder\.(conv_out\.bias|extra)"):
        load_tokenizer(saved(tmp_path / "x.ckpt", content))


def test_fingerprint_is_of_the_weights(vq):
    before = fingerprint(vq)
    assert len(before) == 16
    assert int(before, 16) >= 0
    assert fingerprint(vq) == before
    weight = vq.decoder.conv_out.weight.data
    weight[0, 0, 0, 0] = torch.nextafter(weight[0, 0, 0, 0], torch.tensor(9.0))
    assert fingerprint(vq) != before, "one bit of one weight"


def test_fingerprint_reads_all_dtypes(vq):
    assert len({fingerprint(vq.to(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)}) == 3


def test_gpt_comes_back_with_the_tokenizer_inside(tmp_path, gpt, vq):
    content = gpt_checkpoint(gpt, tokenizer_config=VQ_NODE)
    content["state_dict"] |= prefixed(vq, "tokenizer")
    loaded = load_task(saved(tmp_path / "x.ckpt", content))
    assert (loaded.kind, loaded.step, loaded.classes) == ("gpt", 7, ["boot", "bag", "coat"])
    codes = torch.arange(16).unsqueeze(0)
    label = torch.tensor([2])
    assert torch.equal(loaded.task.net(codes, label), gpt.eval()(codes, label))
    assert fingerprint(loaded.task.tokenizer) == fingerprint(vq)
    images = loaded.task.sample_images(label, sampling=SamplingConfig(), seeds=torch.tensor([0]))
    assert images.shape == (1, 3, 16, 16)
    assert images.dtype == torch.uint8


def test_gpt_without_a_tokenizer_takes_one(tmp_path, gpt, vq, tokenizer_file):
    path = saved(tmp_path / "x.ckpt", gpt_checkpoint(gpt, tokenizer_config=None))
    alone = load_task(path).task
    assert alone.tokenizer is None
    with pytest.raises(ValueError, match="tokenizer_ckpt=PATH"):
        alone.decode_codes(torch.zeros(1, 16, dtype=torch.int64))
    assert fingerprint(load_task(path, tokenizer_ckpt=tokenizer_file).task.tokenizer) == fingerprint(vq)


def test_tokenizer_task_comes_back_without_its_discriminator(tokenizer_file, vq, generator):
    loaded = load_task(tokenizer_file)
    assert (loaded.kind, loaded.step, loaded.classes) == ("tokenizer", 12, [])
    assert loaded.task.discriminator is None
    image = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=generator)
    reconstruction, codes = loaded.task.reconstruct(image)
    assert reconstruction.shape == image.shape
    assert torch.equal(codes, vq.eval().encode(image / 127.5 - 1))
