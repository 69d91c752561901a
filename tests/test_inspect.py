"""``smalto inspect``: says what is there, and finds damage."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from smalto import inspect_path, train
from smalto.arguments import quoted
from smalto.data.codes import CodeReader
from smalto.data.shards import CODES, IMAGES, read_meta
from smalto.runtime import compose
from test_extract import CODEBOOK, extract, images  # noqa: F401
from test_train import config as run_config


@pytest.fixture
def inspect(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "outputs"))

    def run(path, *options):
        facts = inspect_path.run(compose("inspect", [f"path='{path}'", *options]))
        assert str(facts["what"]) in capsys.readouterr().out
        return facts

    return run


def test_image_shards(images, inspect, tmp_path):  # noqa: F811
    facts = inspect(images, "verify=true", "num_images=6", "columns=3")
    assert facts["what"] == "image shards"
    counts = {split: entry["num_images"] for split, entry in read_meta(images, IMAGES)["splits"].items()}
    assert sum(counts.values()) == 60
    assert facts["train"].startswith(f"{counts['train']} images, 2 shards")
    assert facts["classes"] == "10: T-shirt/top, Trouser, Pullover, Dress, Coat, ..."
    assert facts["health"] == "good, checked: every hash"
    assert Path(facts["picture"]) == tmp_path / "outputs" / "inspect" / "fashion.png"
    with Image.open(facts["picture"]) as sheet:
        assert sheet.width > sheet.height  # two rows of three


def damaged(folder, how):
    shard = folder / "train-00000.tar"
    if how == "missing":
        shard.unlink()
    elif how == "shorter":
        shard.write_bytes(shard.read_bytes()[:-512])
    elif how == "changed":
        data = bytearray(shard.read_bytes())
        data[700] ^= 1
        shard.write_bytes(data)
    else:
        (folder / "train-00099.tar").write_bytes(b"")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "train-00000.tar is missing"),
        ("shorter", r"train-00000.tar has \d+ bytes instead of"),
        ("changed", "train-00000.tar has changed: its SHA-256"),
        ("added", "train-00099.tar is there but not in meta.json"),
    ],
)
def test_damage_is_said_after_the_table(images, tmp_path, inspect, how, said, capsys):  # noqa: F811
    for file in images.iterdir():
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / file.name).write_bytes(file.read_bytes())
    damaged(tmp_path / "d", how)
    with pytest.raises(ValueError, match=said):
        inspect(tmp_path / "d", "verify=true")
    assert "2 shards" in capsys.readouterr().out


def test_code_shards(images, tmp_path, inspect):  # noqa: F811
    extract(images, tmp_path / "codes", crop_range=[1.25])
    facts = inspect(tmp_path / "codes")
    meta = read_meta(tmp_path / "codes", CODES)
    readers = [CodeReader(tmp_path / "codes", meta, split) for split in ("train", "val")]
    codes = np.concatenate([r.gather(np.arange(len(r)), np.zeros(len(r), int)) for r in readers]).ravel()
    counts = np.bincount(codes, minlength=CODEBOOK)
    p = counts[counts > 0] / counts.sum()
    assert facts["codebook usage"].startswith(f"{100 * (counts > 0).mean():.1f} %")
    assert facts["entropy"].startswith(f"{-(p * np.log(p)).sum():.3f} nats of {np.log(CODEBOOK):.3f}")
    assert facts["most frequent"].startswith(f"{counts.argmax()}: {100 * p.max():.2f} %")
    half = np.sort(counts)[::-1][: CODEBOOK // 2].sum() / counts.sum()
    assert facts["histogram"][f"the {CODEBOOK // 2} most frequent"].startswith(f"{100 * half:.1f} %")
    assert facts["grid"] == "4x4"
    assert facts["crops"] == "10 of each image, ranges [1.25]"
    assert "picture" not in facts  # its tokenizer is no file


def test_run_and_checkpoint(tmp_path, inspect):
    train.run(run_config(tmp_path / "run", "callbacks.checkpoint.keep=0"))
    facts = inspect(tmp_path / "run")
    assert facts["state"] == "finished"
    assert facts["checkpoints"] == "step_00000002.ckpt, step_00000004.ckpt, step_00000006.ckpt"
    assert "val/loss" in facts["metrics"]
    file = tmp_path / "run/checkpoints/step_00000004.ckpt"
    facts = inspect(file, "verify=true")
    assert facts["what"] == "checkpoint of a gpt"
    assert facts["step"] == 4
    assert facts["averaged weights"] == "yes"
    weights = torch.load(file, weights_only=True)["state_dict"]
    assert facts["parameters and buffers"] == {"net": f"{sum(t.numel() for t in weights.values()):,}"}
    assert '"dim": 32' in facts["network"]
    newest = tmp_path / "run/checkpoints/step_00000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"step_00000006.ckpt is cut short"):
        inspect(tmp_path / "run")
    broken = torch.load(file, weights_only=True)
    broken["state_dict"]["net.output.weight"][0, 0] = float("nan")
    torch.save(broken, file)
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity, the first is net.output.weight"):
        inspect(file, "verify=true")


def test_other_paths_are_explained(tmp_path, inspect):
    with pytest.raises(FileNotFoundError, match="nothing at"):
        inspect(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a finished set"):
        inspect(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="unfinished job"):
        inspect(tmp_path)
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ValueError, match="not a torch checkpoint"):
        inspect(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("given", "passed"),
    [
        ("out=/tmp/plain", "out=/tmp/plain"),
        ("out=/tmp/with space", "out=/tmp/with space"),
        ("out=/tmp/für Ümit", "out='/tmp/für Ümit'"),
        ("out=/tmp/a=1/it's (new)", r"out='/tmp/a=1/it\'s (new)'"),
        ("out='/tmp/für'", "out='/tmp/für'"),
        ("sweep=[a/b,c/ü]", "sweep=[a/b,'c/ü']"),
        ("path=${paths.data}/ü", "path=${paths.data}/ü"),
        ("seed=1,2", "seed=1,2"),
        ("--help", "--help"),
    ],
)
def test_paths_of_any_name_reach_hydra(given, passed):
    assert quoted(given) == passed


def test_the_path_may_stand_alone(images, tmp_path):  # noqa: F811
    folder = tmp_path / "größe=1 (neu)"
    folder.symlink_to(images, target_is_directory=True)
    command = [sys.executable, "-m", "smalto", "inspect", str(folder), f"picture={tmp_path}/p.png"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "image shards" in done.stdout
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_size": 2**16}, "too large"),
        ({"code_shape": [[2, 8]]}, "in grids"),
        ({"codebook_size": CODEBOOK + 1}, "in grids"),
    ],
)
def test_codes_that_do_not_fit_the_tokenizer_they_name_are_not_decoded(changes, said, tmp_path, monkeypatch, caplog):
    (tmp_path / "t.ckpt").touch()
    known = SimpleNamespace(code_shape=((4, 4),), codebook_size=CODEBOOK, fingerprint="f")
    monkeypatch.setattr(inspect_path, "load_tokenizer", lambda file, image_size: known)
    meta = {"image_size": 32, "code_shape": [[4, 4]], "codebook_size": CODEBOOK}
    meta |= {"tokenizer": {"path": str(tmp_path / "t.ckpt"), "fingerprint": "f"}} | changes
    assert inspect_path.decoded_codes(OmegaConf.create({"tokenizer_ckpt": None}), tmp_path, meta) is None
    assert said in caplog.text


def test_an_empty_path_is_said():
    with pytest.raises(ValueError, match="path is empty"):
        inspect_path.run(compose("inspect", ["path=''"]))
