"""``smalto convert``: the authors' files in and out without a bit changed; every wrong file gets one line."""

import argparse
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from golden_weights import golden_gpt, golden_image, golden_tokenizer, load_golden, official_tensor
from official_files import saved, tiny_gpt, tiny_text_gpt, tiny_tokenizer
from smalto import convert
from smalto.losses.patchgan import PatchDiscriminator
from smalto.runtime import compose
from smalto.tasks.checkpoint import load_task, load_tokenizer, read_checkpoint
from smalto.tasks.official_config import Hints, gpt_node
from smalto.tasks.safetensors import write_safetensors
from smalto.types import SamplingConfig

GPT = ("image_size=16", "num_heads=2", "downsample_factor=2")  # 8 x 8 codes


def run(source: Path, out: Path, *overrides: str) -> dict[str, Any]:
    return convert.run(compose("convert", [f"in={source}", f"out={out}", *overrides]))


def model_in(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.fixture
def tokenizer_file(tmp_path) -> Path:
    return saved(tmp_path / "vq.pt", {"model": tiny_tokenizer()})


@pytest.fixture
def gpt_file(tmp_path) -> Path:
    return saved(tmp_path / "gpt.pt", {"model": tiny_gpt()})


CASES = {
    "tokenizer": (tiny_tokenizer, ()),
    "class generator": (tiny_gpt, GPT),
    "text generator": (tiny_text_gpt, GPT),
    "bfloat16": (lambda: {n: v.bfloat16() for n, v in tiny_gpt().items()}, GPT),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("middle", ["x.ckpt", "x.safetensors"])
def test_there_and_back_bit_by_bit(tmp_path, case, middle):
    make, options = CASES[case]
    original = make()
    source = saved(tmp_path / "in.pt", {"model": original})
    layout = ["format=safetensors"] if middle.endswith("safetensors") else []
    run(source, tmp_path / middle, *options, *layout)
    run(tmp_path / middle, tmp_path / "out.pt", "format=official")
    assert_same_bits(model_in(tmp_path / "out.pt"), original)
    # And once more: an exported file says itself what the tensors do not.
    run(tmp_path / "out.pt", tmp_path / "again.ckpt")
    assert (
        read_checkpoint(tmp_path / "again.ckpt")["smalto"]["config"]
        == read_checkpoint(tmp_path / middle)["smalto"]["config"]
    )


def test_the_buffer_that_the_authors_load_demands_is_made(tmp_path):
    original = tiny_tokenizer()
    del original["quantize.codebook_used"]
    run(saved(tmp_path / "in.pt", original), tmp_path / "x.ckpt")
    run(tmp_path / "x.ckpt", tmp_path / "out.pt", "format=official")
    found = model_in(tmp_path / "out.pt")
    assert torch.equal(found.pop("quantize.codebook_used"), torch.zeros(65536))
    assert_same_bits(found, original)


@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_of_the_authors_training_with_all_that_is_in_it(tmp_path, old_format):
    judge = PatchDiscriminator(base_channels=8).state_dict()
    content = {
        "model": tiny_tokenizer(),
        "optimizer": torch.optim.Adam([torch.nn.Parameter(torch.zeros(2))]).state_dict(),
        "discriminator": {f"module.{name}": value for name, value in judge.items()},
        "optimizer_disc": {},
        "steps": 1234,
        "args": argparse.Namespace(image_size=32, vq_model="VQ-16"),
    }
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=not old_format)
    assert run(tmp_path / "in.pt", tmp_path / "x.ckpt")["step"] == 1234
    assert load_tokenizer(tmp_path / "x.ckpt").image_size == 32, "the arguments in the file say so"
    run(tmp_path / "x.ckpt", tmp_path / "out.pt", "format=official")
    again = torch.load(tmp_path / "out.pt", weights_only=True)
    assert again["steps"] == 1234
    assert_same_bits(again["discriminator"], judge)
    assert_same_bits(again["model"], content["model"])


@pytest.mark.parametrize("name", ["gpt_c2i_tiny", "gpt_t2i_tiny"])
def test_a_golden_generator_computes_the_authors_logits(tmp_path, name):
    golden = load_golden(name)
    weights = {key: official_tensor(key, shape) for key, shape in golden.description["state_dict"].items()}
    source = saved(tmp_path / "in.pth", {f"_fsdp_wrapped_module.{key}": value for key, value in weights.items()})
    run(source, tmp_path / "x.ckpt", "image_size=64", f"num_heads={golden.config['n_head']}")
    net = load_task(tmp_path / "x.ckpt").task.net
    codes = golden.tensor("tokens")
    condition = golden.tensor("labels" if "labels" in golden.arrays else "text_embedding")
    torch.testing.assert_close(net(codes, condition), golden.tensor("logits_cond"), atol=1e-4, rtol=0)
    assert torch.equal(net(codes, condition), golden_gpt(golden)(codes, condition))


def test_a_golden_tokenizer_gives_the_authors_codes(tmp_path):
    golden = load_golden("tokenizer_vq8")
    weights = {key: official_tensor(key, shape) for key, shape in golden.description["state_dict"].items()}
    source = saved(tmp_path / "in.pt", {"model": weights})
    run(source, tmp_path / "x.ckpt", "image_size=32")
    tokenizer = load_tokenizer(tmp_path / "x.ckpt").tokenizer
    image = golden_image(golden)
    assert torch.equal(tokenizer.encode(image).flatten(), golden.tensor("codes"))
    assert torch.equal(tokenizer.encode(image), golden_tokenizer(golden).encode(image))
    for large in (source, tmp_path / "x.ckpt"):  # 280 MB each
        large.unlink()


@pytest.mark.parametrize("layout", ["smalto", "safetensors"])
def test_a_generator_that_carries_its_tokenizer_samples_without_more(tmp_path, gpt_file, tokenizer_file, layout):
    out = tmp_path / ("x.safetensors" if layout == "safetensors" else "x.ckpt")
    run(gpt_file, out, *GPT[:2], f"tokenizer_ckpt={tokenizer_file}", f"format={layout}")
    loaded = load_task(out)
    assert (loaded.kind, loaded.step, loaded.classes) == ("gpt", 0, [])
    images = loaded.task.sample_images(torch.tensor([1, 4]), sampling=SamplingConfig(), seeds=torch.tensor([0, 1]))
    assert images.shape == (2, 3, 16, 16)
    assert images.dtype == torch.uint8
    # A tokenizer fits every resolution; the one inside has the generator's.
    assert loaded.task.tokenizer.code_shape == ((8, 8),)


def test_official_tensors_in_safetensors_are_read_too(tmp_path, tokenizer_file):
    write_safetensors(tmp_path / "model.safetensors", tiny_tokenizer())
    run(tmp_path / "model.safetensors", tmp_path / "a.ckpt")
    run(tokenizer_file, tmp_path / "b.ckpt")
    a, b = (read_checkpoint(tmp_path / name)["state_dict"] for name in ("a.ckpt", "b.ckpt"))
    assert_same_bits(a, b)


def test_a_tokenizer_off_the_unit_sphere_and_at_another_size(tmp_path, tokenizer_file):
    run(tokenizer_file, tmp_path / "x.ckpt", "l2_norm=false", "image_size=64")
    loaded = load_tokenizer(tmp_path / "x.ckpt")
    assert (loaded.image_size, loaded.tokenizer.quantizer.l2_norm) == (64, False)


def test_the_average_of_a_run_is_exported_unless_told(tmp_path, gpt_file):
    checkpoint = read_checkpoint(converted(gpt_file, tmp_path))
    average = {
        name.removeprefix("net."): value.float() + 1
        for name, value in checkpoint["state_dict"].items()
        if name.startswith("net.")
    }
    trained = saved(tmp_path / "last.ckpt", checkpoint | {"callbacks": {"EMA": {"num_updates": 1, "shadow": average}}})
    for which, shift in (([], 1), (["weights=ema"], 1), (["weights=model"], 0)):
        run(trained, tmp_path / "out.pt", "format=official", "overwrite=true", *which)
        assert_same_bits(model_in(tmp_path / "out.pt"), {name: value + shift for name, value in tiny_gpt().items()})


def test_what_the_authors_code_cannot_run_is_said(tmp_path, gpt_file, caplog):
    checkpoint = read_checkpoint(converted(gpt_file, tmp_path))
    checkpoint["smalto"]["config"]["task"]["net"]["condition_rope"] = "identity"
    own = saved(tmp_path / "own.ckpt", checkpoint)
    run(own, tmp_path / "out.pt", "format=official")
    assert "cannot run this model as it was trained: condition_rope is identity, theirs zero" in caplog.text
    run(tmp_path / "out.pt", tmp_path / "again.ckpt")
    assert load_task(tmp_path / "again.ckpt").task.net.condition_rope == "identity"


def test_a_folder_of_sharded_training_names_the_file_in_it(tmp_path):
    saved(tmp_path / "consolidated.pth", tiny_gpt())
    with pytest.raises(ValueError, match=r"is a folder.*consolidated\.pth"):
        run(tmp_path, tmp_path / "x.ckpt", *GPT)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("should-not-exist",)


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def broken(make: Callable[[], dict], change: Callable[[dict], Any]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        weights = make()
        change(weights)
        return saved(folder / "x.pt", {"model": weights})

    return build


def cut(folder: Path) -> Path:
    whole = saved(folder / "whole.pt", {"model": tiny_gpt()}).read_bytes()
    return written(folder / "x.pt", whole[: len(whole) // 2])


def cut_old(folder: Path) -> Path:
    torch.save({"model": tiny_gpt()}, folder / "whole.pt", _use_new_zipfile_serialization=False)
    whole = (folder / "whole.pt").read_bytes()
    return written(folder / "x.pt", whole[: len(whole) // 2])


PAGE = b"<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>"
# name: how to make the file, options, what the message says
WRONG: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], str]] = {
    "missing": (lambda folder: folder / "nothing.pt", GPT, r"does not exist.*check the path"),
    "truncated": (cut, GPT, "truncated zip archive.*copy it again"),
    "truncated, old format": (cut_old, GPT, r"could not be read as a checkpoint.*copy it again"),
    "web page": (lambda folder: written(folder / "x.pt", PAGE), GPT, "a web page.*copy it again"),
    "git-lfs": (lambda f: written(f / "x.pt", b"version https://git-lfs.github.com/spec/v1\n"), GPT, "git lfs pull"),
    "empty": (lambda folder: written(folder / "x.pt", b""), GPT, "an empty file"),
    "code, zip": (lambda folder: saved(folder / "x.pt", {"model": Malicious()}), GPT, "mkdir, which is code.*runs no"),
    "code, pickle": (lambda folder: written(folder / "x.pt", pickle.dumps(Malicious())), GPT, "could not be read"),
    "foreign": (lambda folder: saved(folder / "x.pt", {"model": {"a.b": torch.ones(2)}}), GPT, "neither.*a.b"),
    "unknown tensor": (
        broken(tiny_gpt, lambda w: w.update({"layers.0.gate.weight": torch.ones(1)})),
        GPT,
        r"unknown: layers\.0\.gate\.weight",
    ),
    "our names": (
        broken(tiny_gpt, lambda w: w.update({"blocks.0.ffn_norm.weight": w.pop("layers.0.ffn_norm.weight")})),
        GPT,
        r"unknown: blocks\.0\.ffn_norm\.weight; missing: layers\.0\.ffn_norm\.weight",
    ),
    "missing tensors": (
        broken(tiny_tokenizer, lambda w: (w.pop("decoder.norm_out.weight"), w.pop("quant_conv.bias"))),
        (),
        r"missing: decoder\.norm_out\.weight, quant_conv\.bias",
    ),
    "shape": (
        broken(tiny_tokenizer, lambda w: w.update({"quant_conv.weight": torch.ones(4, 31, 1, 1)})),
        (),
        r"quant_conv\.weight \(4, 31, 1, 1\) instead of \(4, 32, 1, 1\)",
    ),
    "no codebook": (broken(tiny_tokenizer, lambda w: w.pop("quantize.embedding.weight")), (), "quantize.embedding"),
    "useless option": (broken(tiny_tokenizer, lambda w: None), ("num_heads=4",), "num_heads means nothing"),
    "no average": (broken(tiny_gpt, lambda w: None), (*GPT, "weights=ema"), "no averaged weights"),
    "nothing said": (broken(tiny_gpt, lambda w: None), (), r"give image_size=PIXELS .* and num_heads=N"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_named_in_one_line_and_nothing_is_written(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    make, options, message = WRONG[case]
    path = make(tmp_path)
    before = set(tmp_path.iterdir())
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        run(path, tmp_path / "new/out.ckpt", *options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


def test_a_tokenizer_with_another_codebook_is_refused(tmp_path, gpt_file):
    other = saved(tmp_path / "vq.pt", {"model": tiny_tokenizer(codes=128)})
    with pytest.raises(ValueError, match=r"vq\.pt has 128 codes, .*gpt\.pt was trained on 64; give the tokenizer"):
        run(gpt_file, tmp_path / "x.ckpt", *GPT[:2], f"tokenizer_ckpt={other}")
    with pytest.raises(ValueError, match="holds a gpt, give a tokenizer"):
        run(gpt_file, tmp_path / "x.ckpt", *GPT, f"tokenizer_ckpt={converted(gpt_file, tmp_path)}")
    assert not (tmp_path / "x.ckpt").exists()


def converted(source: Path, folder: Path) -> Path:
    run(source, folder / "converted.ckpt", *GPT)
    return folder / "converted.ckpt"


def test_existing_files_stay_unless_told(tmp_path, tokenizer_file):
    out = tmp_path / "x.ckpt"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"x\.ckpt exists already.*overwrite=true"):
        run(tokenizer_file, out)
    assert out.read_text() == "mine"
    run(tokenizer_file, out, "overwrite=true")
    assert load_tokenizer(out).codebook_size == 64
    (tmp_path / "y.json").write_text("mine")
    with pytest.raises(FileExistsError, match=r"y\.json exists already"):
        run(tokenizer_file, tmp_path / "y.safetensors", "format=safetensors")
    with pytest.raises(ValueError, match="in and out are both"):
        run(out, out, "overwrite=true")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("x.ckpt", ["format=onnx"], "format is 'onnx', must be one of smalto"),
        ("x.safetensors", [], "format=smalto: safetensors files, and only they"),
        ("x.ckpt", ["format=safetensors"], "only they, end in"),
        ("x.ckpt", ["weights=best"], "weights is 'best'"),
        ("x.ckpt", ["image_size=-1"], "image_size is -1"),
        ("x.ckpt", ["image_size=33"], "needs a multiple of 2"),
    ],
)
def test_options_that_cannot_be(tmp_path, tokenizer_file, out, options, message):
    with pytest.raises(ValueError, match=message):
        run(tokenizer_file, tmp_path / out, *options)


def test_a_generators_resolution_cannot_be_changed(tmp_path, gpt_file, tokenizer_file):
    run(gpt_file, tmp_path / "x.ckpt", *GPT[:2], f"tokenizer_ckpt={tokenizer_file}")
    with pytest.raises(ValueError, match=r"image_size is 32, .* writes 8 x 8 codes of 2 px, which is 16"):
        run(tmp_path / "x.ckpt", tmp_path / "y.ckpt", "image_size=32")
    run(gpt_file, tmp_path / "alone.ckpt", *GPT)  # without a tokenizer inside, its record says the size
    for wrong in ("image_size=384", "downsample_factor=16"):
        with pytest.raises(ValueError, match=f"{wrong.partition('=')[0]} is {wrong.partition('=')[2]}, "):
            run(tmp_path / "alone.ckpt", tmp_path / "y.ckpt", wrong)
    assert not (tmp_path / "y.ckpt").exists()


def test_the_config_of_a_file_builds_nothing_but_smalto(tmp_path, tokenizer_file):
    run(tokenizer_file, tmp_path / "x.safetensors", "format=safetensors")
    config = tmp_path / "x.json"
    for target in ("os.mkdir", "smalto.runtime.os.mkdir", "torch.hub.load", "smalto.train.run"):
        content = json.loads(config.read_text())
        content["smalto"]["config"]["task"]["net"]["quantizer"]["_target_"] = target
        config.write_text(json.dumps(content))
        for load in (load_task, load_tokenizer):
            with pytest.raises(ValueError, match=f"wants to build {target}"):
                load(tmp_path / "x.safetensors")


def test_safetensors_without_or_with_another_config(tmp_path, tokenizer_file, gpt_file):
    run(tokenizer_file, tmp_path / "x.safetensors", "format=safetensors")
    run(gpt_file, tmp_path / "y.safetensors", *GPT, "format=safetensors")
    (tmp_path / "x.json").write_text((tmp_path / "y.json").read_text())
    with pytest.raises(ValueError, match=r"x\.safetensors is not whole: blocks\.0.* is missing"):
        load_task(tmp_path / "x.safetensors")
    (tmp_path / "x.json").unlink()
    with pytest.raises(ValueError, match=r"x\.json is missing beside it"):
        load_task(tmp_path / "x.safetensors")


def test_authors_files_given_to_other_commands_point_here(gpt_file):
    with pytest.raises(ValueError, match=r"smalto convert in=.*gpt\.pt out="):
        load_task(gpt_file)


def test_the_command_exits_with_1_and_one_message(tmp_path, monkeypatch, capsys):
    written(tmp_path / "x.pt", PAGE)
    monkeypatch.setattr("sys.argv", ["smalto", f"in={tmp_path}/x.pt", f"out={tmp_path}/y.ckpt"])
    with pytest.raises(SystemExit) as caught:
        convert.main()
    assert caught.value.code == 1
    assert "smalto convert: " in capsys.readouterr().err
    assert not (tmp_path / "y.ckpt").exists()


def told(tmp_path, *overrides: str, name: str = "x.pt", **content: Any) -> dict[str, Any]:
    """The config that comes of a tiny file of the authors with more in it."""
    source = saved(tmp_path / name, {"model": tiny_gpt(), **content})
    run(source, tmp_path / "out.ckpt", "num_heads=2", "overwrite=true", *overrides)
    return read_checkpoint(tmp_path / "out.ckpt")["smalto"]["config"]


def test_of_model_and_ema_the_authors_choice_is_taken_said_and_kept(tmp_path, caplog):
    caplog.set_level("INFO")
    average = {name: value + 1 for name, value in tiny_gpt().items()}
    options = ("image_size=16", "downsample_factor=2")
    for overrides, taken, said in (((), "model", 1), (("weights=ema",), "ema", 0), (("weights=model",), "model", 0)):
        caplog.clear()
        assert told(tmp_path, *options, *overrides, ema=average)["weights"] == taken
        assert sum("model and ema" in record.message for record in caplog.records) == said
        found = read_checkpoint(tmp_path / "out.ckpt")["state_dict"]["net.norm.weight"]
        assert torch.equal(found, tiny_gpt()["norm.weight"] + (taken == "ema"))


@pytest.mark.parametrize(
    ("overrides", "name", "arguments", "message"),
    [
        (("image_size=256", "downsample_factor=32"), "c2i_B_384.pt", {}, r"image_size is 256, its name says 384"),
        (
            ("image_size=16", "downsample_factor=2"),
            "x.pt",
            {"image_size": 32},
            r"image_size is 16, the arguments of its training say 32",
        ),
        (
            ("image_size=16", "downsample_factor=2"),
            "x.pt",
            {"downsample_size": 4},
            r"downsample_factor is 2, the arguments of its training say 4",
        ),
    ],
)
def test_hints_that_the_file_contradicts_are_refused(tmp_path, overrides, name, arguments, message):
    args = argparse.Namespace(**arguments)
    with pytest.raises(ValueError, match=rf"{message}.*force=true"):
        told(tmp_path, *overrides, name=name, args=args)
    forced = told(tmp_path, *overrides, "force=true", name=name, args=args)
    assert f"image_size={forced['image_size']}" == overrides[0]


def test_heads_of_a_published_size_are_known():
    tensors = {
        "tok_embeddings.weight": torch.empty(16, 768, device="meta"),
        "cls_embedding.embedding_table.weight": torch.empty(11, 768, device="meta"),
    }
    for i in range(12):
        tensors[f"layers.{i}.attention.wqkv.weight"] = torch.empty(3 * 768, 768, device="meta")
        tensors[f"layers.{i}.feed_forward.w1.weight"] = torch.empty(2048, 768, device="meta")
    hints = Hints(image_size=256, num_heads=16)
    with pytest.raises(ValueError, match=r"num_heads is 16, the published size .* has 12.*force=true"):
        gpt_node(tensors, hints, Path("x.pt"))
    assert gpt_node(tensors, replace(hints, force=True), Path("x.pt"))["num_heads"] == 16
    assert gpt_node(tensors, Hints(image_size=256), Path("x.pt"))["num_heads"] == 12


def test_a_codebook_that_the_arguments_know(tmp_path):
    args = argparse.Namespace(codebook_l2_norm=False)
    source = saved(tmp_path / "x.pt", {"model": tiny_tokenizer(), "args": args})
    with pytest.raises(ValueError, match=r"l2_norm is True, the arguments of its training say False"):
        run(source, tmp_path / "out.ckpt", "l2_norm=true")
    run(source, tmp_path / "out.ckpt")
    assert not load_tokenizer(tmp_path / "out.ckpt").tokenizer.quantizer.l2_norm
    with pytest.raises(ValueError, match=r"l2_norm is True, the config in .* says False"):
        run(tmp_path / "out.ckpt", tmp_path / "again.ckpt", "l2_norm=true")


def test_a_tokenizer_decides_how_much_it_shrinks_images(tmp_path, gpt_file, tokenizer_file):
    with pytest.raises(ValueError, match=r"downsample_factor is 4, the tokenizer .* has 2"):
        run(gpt_file, tmp_path / "x.ckpt", *GPT[:2], "downsample_factor=4", f"tokenizer_ckpt={tokenizer_file}")
