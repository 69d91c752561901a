"""What ``smalto sample`` asks, draws, records and leaves behind; the model behind it is a stub."""

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from omegaconf import OmegaConf

from smalto import sample
from smalto.data.output_plan import PLAN
from smalto.errors import InputError, PathInUse
from smalto.nn.hardware import has_fast_bf16
from smalto.runtime import compose
from smalto.sampling.engine import EngineConfig
from smalto.sampling.packed import resolve_dtype

CPU = torch.device("cpu")
AUTO = resolve_dtype("auto", CPU)
NAMES = ["T-shirt", "Bag", "10"]


@dataclass
class Stub:
    """A generator whose images tell their label and seed."""

    tokenizer: object = "there"
    device: torch.device = CPU
    engine: EngineConfig = field(default_factory=EngineConfig)
    net: object = field(default_factory=lambda: SimpleNamespace(conditioner=SimpleNamespace(num_classes=len(NAMES))))
    drawn: int = 0

    def to(self, device):
        self.device = device

    def sample_images(self, labels, *, sampling, seeds):
        self.drawn += len(labels)
        values = torch.stack([labels, seeds % 251, torch.zeros_like(labels)], 1)
        return values[:, :, None, None].expand(-1, -1, 4, 4).to(torch.uint8)


@pytest.fixture
def task(monkeypatch):
    stub = Stub()
    loaded = SimpleNamespace(kind="gpt", task=stub, classes=NAMES, step=7)
    monkeypatch.setattr(sample, "load_task", lambda *args, **options: loaded)
    return stub


@pytest.fixture
def draw(task, tmp_path):
    """Runs the command into one folder, ``out`` in ``tmp_path``."""
    (tmp_path / "last.ckpt").write_bytes(b"weights")
    return lambda *options: run(f"ckpt={tmp_path / 'last.ckpt'}", f"out={tmp_path / 'out'}", *options)


@cache
def defaults():
    return compose("sample", ["ckpt=none", "mlflow=false", "device=cpu", "num_images=4"])


def run(*options):
    return sample.run(OmegaConf.merge(defaults(), OmegaConf.from_dotlist(list(options))))


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "images").iterdir()}


def packed(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz") as archive:
        return archive["arr_0"][np.argsort(archive["index"])]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("labels=[16]", "classes 0 to 2"),
        ("labels=[true]", "neither a class number nor a name"),
        ("labels=[]", "labels is empty"),
        ("labels=Coat", "'Coat'"),
        ("batch_size=0", "batch_size is 0"),
        ("seed=-1", "seed is -1"),
        ("eval_size=0", "eval_size is 0"),
        ("sheet_columns=0", "sheet_columns is 0"),
        ("sampling.top_p=0", "top_p is 0"),
        ("engine.dtype=fp64", "engine.dtype is 'fp64'"),
        ("engine.decode=fp16", "engine.decode is 'fp16'"),
    ],
)
def test_a_refused_command_leaves_nothing_and_keeps_what_is_there(draw, tmp_path, wrong, words):
    for there in (False, True):
        was = draw("labels=[1]") and pictures(tmp_path / "out") if there else None
        with pytest.raises((InputError, InstantiationException), match=words):
            draw(wrong, "overwrite=true")
        assert there or not (tmp_path / "out").exists()
        assert was is None or pictures(tmp_path / "out") == was
    draw("labels=[Bag]")  # the corrected command


def test_a_generator_without_pictures_is_refused_before_there_is_a_folder(draw, task, tmp_path):
    task.tokenizer = None
    with pytest.raises(InputError, match="tokenizer_ckpt=PATH"):
        draw()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("labels", ["[1]", "1", "Bag", "[Bag]"])
def test_a_single_label_is_a_list_of_one_and_is_said(draw, tmp_path, caplog, labels):
    with caplog.at_level("INFO"):
        draw(f"labels={labels}")
    assert '4 images of class 1 = "Bag"' in caplog.messages
    assert packed(tmp_path / "out")[:, 0, 0, 0].tolist() == [1] * 4


def test_fewer_samples_anew_leave_none_of_the_old(draw, tmp_path):
    draw("num_images=6", "labels=[0]")
    (tmp_path / "out/images/mine.png").write_bytes(b"mine")
    draw("num_images=2", "labels=[1]", "overwrite=true")
    assert packed(tmp_path / "out")[:, 0, 0, 0].tolist() == [1, 1]
    assert pictures(tmp_path / "out").keys() == {"000000.png", "000001.png", "mine.png"}


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-1], lambda data: data[:9]])
def test_a_picture_without_its_end_is_drawn_again(draw, task, tmp_path, damage):
    draw()
    whole = pictures(tmp_path / "out")
    (tmp_path / "out/meta.json").unlink()  # killed just before, and then a power cut
    for name in ("000001.png", "000003.png"):
        (tmp_path / "out/images" / name).write_bytes(damage(whole[name]))
    before = task.drawn
    draw()
    assert task.drawn == before + 2
    assert pictures(tmp_path / "out") == whole


def test_a_picture_that_is_spoiled_inside_is_named(draw, tmp_path):
    draw()
    (tmp_path / "out/meta.json").unlink()
    file = tmp_path / "out/images/000002.png"
    data = file.read_bytes()
    file.write_bytes(data[:40] + bytes(20) + data[60:])
    with pytest.raises(InputError, match=r"000002.png cannot be read .* remove it and run the same command again"):
        draw()
    file.unlink()
    draw()


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ([], AUTO),
        (["engine.dtype=fp32"], "fp32"),
        (["engine.dtype=int8"], "int8"),
        (["engine.compile=true"], resolve_dtype("auto", CPU, packed=False)),
    ],
)
def test_the_record_says_what_computed(draw, tmp_path, options, dtype):
    draw(*options)
    for name in ("meta.json", PLAN):
        found = json.loads((tmp_path / "out" / name).read_text())
        assert found.get("settings", found)["dtype"] == dtype
    draw(f"engine.dtype={dtype}")  # the same under its own name
    other = "int8" if dtype != "int8" else "fp32"
    with pytest.raises(PathInUse, match=rf"dtype: {dtype} there, {other} now"):
        draw(f"engine.dtype={other}")


def test_the_precision_of_decoding_is_recorded_too(draw, tmp_path):
    draw("engine.decode=auto")
    found = json.loads((tmp_path / "out/meta.json").read_text())
    assert found.get("decode", "fp32") == ("bf16" if has_fast_bf16(CPU) else "fp32")
    if not has_fast_bf16(CPU):
        with pytest.raises(PathInUse, match="decode: None there, bf16 now"):
            draw("engine.decode=bf16")


@pytest.mark.parametrize("finished", [False, True])
def test_folders_of_versions_that_recorded_auto_are_known(draw, task, tmp_path, finished):
    draw()
    plan = json.loads((tmp_path / "out" / PLAN).read_text())
    plan["settings"] |= {"dtype": "auto", "decode": "auto"}
    del plan["version"]
    (tmp_path / "out" / PLAN).write_text(json.dumps(plan))
    if not finished:
        (tmp_path / "out/meta.json").unlink()
    before = task.drawn
    decode = "bf16" if has_fast_bf16(CPU) else "fp32"
    with pytest.raises(PathInUse, match=rf"dtype: {AUTO} there, int8 now"):
        draw("engine.dtype=int8", f"engine.decode={decode}")
    draw(f"engine.decode={decode}")
    assert task.drawn == before
    if not finished:
        assert json.loads((tmp_path / "out" / PLAN).read_text())["settings"]["dtype"] == AUTO


def test_default_folders_are_called_as_before(task, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").write_bytes(b"weights")

    def name(*options):
        out = Path(run(f"ckpt={tmp_path / 'checkpoints/last.ckpt'}", *options)["out"])
        assert out.parent == tmp_path / "samples"
        return out.name

    assert name() == "step7_n4_cfg2_t1_k0_p1_seed0"
    assert name("labels=[Bag,0]", "seed=3") == "step7_n4_labelsBag-0_cfg2_t1_k0_p1_seed3"
    assert name("labels=Bag") == name("labels=[Bag]") == "step7_n4_labelsBag_cfg2_t1_k0_p1_seed0"
    assert name("engine.dtype=fp32") == "step7_n4_cfg2_t1_k0_p1_seed0_fp32"
    long = name(f"labels=[{','.join(['0'] * 200)}]")
    assert len(long) < 100
    assert long != name(f"labels=[{','.join(['1'] * 200)}]")
