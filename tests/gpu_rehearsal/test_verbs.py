"""Sampling in every dtype, extract and evaluate on a pretended GPU."""

import json
from collections import Counter
from functools import partial

import pytest
import torch

from gpu_rehearsal.findings import FETCH, GENERATOR, MIXED, SEND, Findings
from gpu_rehearsal.machine import gpu
from gpu_rehearsal.pretend import CUDA, OnDevice
from gpu_rehearsal.runs import GPT, TOKENIZER_FILE
from smalto import evaluate, extract, prepare, sample, train
from smalto.models.conditioner import TextConditioner
from smalto.runtime import compose
from smalto.sampling.engine import EngineConfig
from smalto.types import SamplingConfig
from tiny_tasks import SHAPE, make_gpt_task

CODES = SHAPE[0][0] * SHAPE[0][1]
SETTINGS = {
    "plain": SamplingConfig(cfg_scale=1.0),
    "guided": SamplingConfig(cfg_scale=2.0, top_k=5, top_p=0.9, temperature=0.9),
    "interval": SamplingConfig(cfg_scale=2.0, cfg_interval=3),
    "greedy": SamplingConfig(cfg_scale=1.5, temperature=0.0),
}


def repeated(found: Findings, times: int) -> dict[str, int]:
    """What happened as often as there are steps."""
    counts: Counter[str] = Counter()
    for phase in found.phases:
        counts.update(found.of(phase, kinds=(FETCH, SEND)))
    once = ("device_dtype_mixin.py", "tasks/checkpoint.py:fingerprint", ":_apply:")  # once for each of many tensors
    return {line: count for line, count in counts.items() if count >= times and not any(o in line for o in once)}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_step_of_sampling_waits_for_nothing(dtype, setting):
    task = make_gpt_task()
    task.configure_model()
    torch.nn.init.normal_(task.net.output.weight)
    task.engine = EngineConfig(dtype=dtype, compile=False)
    found = Findings()
    with gpu(found):
        task.to(CUDA)
        draw = partial(task.sample_codes, torch.tensor([0, 1, 2]), sampling=SETTINGS[setting])
        codes = draw(seeds=torch.arange(3))
        assert isinstance(codes, OnDevice)
    assert repeated(found, CODES - 1) == {}
    assert found.of(*found.phases, kinds=(MIXED, GENERATOR)) == {}


def test_text_is_drawn_without_waiting(make_gpt):
    task = make_gpt_task(net=partial(make_gpt, text=True))
    task.configure_model = lambda: None
    task.net = make_gpt(text=True)
    assert isinstance(task.net.conditioner, TextConditioner)
    task.engine = EngineConfig(dtype="bf16", compile=False)
    found = Findings()
    text, mask = torch.randn(2, 5, 6), torch.tensor([[False, True, True, True, True], [True] * 5])
    with gpu(found):
        task.to(CUDA)
        task.sample_codes(text, sampling=SamplingConfig(cfg_scale=2.0), seeds=torch.arange(2), condition_mask=mask)
    assert repeated(found, task.net.num_codes - 1) == {}


def test_what_cuda_has_no_kernels_for_is_refused():
    with gpu(Findings()), pytest.raises(ValueError, match=r"int8|fp16"):
        EngineConfig(dtype="int8", compile=False).computes_in(CUDA)
    with gpu(Findings()), pytest.raises(ValueError, match="fp16"):
        EngineConfig(dtype="fp16").computes_in(CUDA)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images, a tokenizer, codes and a generator, made on the CPU."""
    folder = tmp_path_factory.mktemp("made")
    make(folder)
    return folder


def make(folder) -> None:
    words = ["resize=pad", "image_size=32", "limit=24", "workers=0", "mlflow=false", f"out={folder}/images"]
    prepare.run(compose("prepare", words))
    train.run(compose("train", [*TOKENIZER_FILE, f"run_dir={folder}/tokenizer"]))
    common = ["device=cpu", "mlflow=false", "workers=0", f"data.path={folder}/images", "crops=center"]
    extract.run(
        compose("extract", [*common, f"tokenizer_ckpt={folder}/tokenizer/checkpoints/last.ckpt", f"out={folder}/codes"])
    )
    words = [word for word in GPT if not word.startswith("data") and "num_classes" not in word]
    words += ["data=codes", f"data.path={folder}/codes", "data.batch_size=4", "model.conditioner.num_classes=10"]
    words += ["callbacks=_common", "trainer.max_steps=2", "logger=none"]
    words += [f"task.tokenizer_ckpt={folder}/tokenizer/checkpoints/last.ckpt", f"run_dir={folder}/gpt"]
    train.run(compose("train", words))


def noted(run, *words: str) -> Findings:
    found = Findings()
    verb = run.__module__.rpartition(".")[2]
    config = compose(verb, [*words, "mlflow=false", "device=cuda"])
    with gpu(found):
        run(config)
    return found


def test_extract(made):
    words = [f"tokenizer_ckpt={made}/tokenizer/checkpoints/last.ckpt", f"data.path={made}/images", "batch_size=2"]
    found = noted(extract.run, *words, f"out={made}/codes_gpu", "crops=center", "workers=0")
    meta = [json.loads((made / name / "meta.json").read_text()) for name in ("codes", "codes_gpu")]
    assert meta[0]["splits"]["train"]["num_images"] == meta[1]["splits"]["train"]["num_images"]
    assert found.of(*found.phases, kinds=(MIXED, GENERATOR)) == {}
    waits = {line: count for line, count in repeated(found, 12).items() if line.startswith("fetch")}
    assert list(waits) == [next(iter(waits))], "the codes themselves come to the host, nothing else"
    assert "_encode_crops" in next(iter(waits))


def test_sample(made):
    words = [f"ckpt={made}/gpt/checkpoints/last.ckpt", f"out={made}/samples", "num_images=4", "sheet_rows=1"]
    found = noted(sample.run, *words, "sheet_columns=2", "engine.compile=false")
    assert found.of(*found.phases, kinds=(MIXED, GENERATOR)) == {}
    assert repeated(found, 63) == {}


@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_evaluate(made, kind):
    words = [f"ckpt={made}/{kind}/checkpoints/last.ckpt", f"reference={made}/images", "features=lite0"]
    words += ["features.size=32", "features.chunk_size=4", "perceptual=squeeze_caffe", "batch_size=4"]
    words += [f"paths.references={made}/references", f"out={made}/{kind}.json", "protocol.rules.kid_subsets=0"]
    own = ["num_samples=4", "engine.compile=false"] if kind == "gpt" else []
    found = noted(evaluate.run, *words, *own)
    rows = json.loads((made / f"{kind}.json").read_text())["rows"]
    assert rows[0]["metrics"]
    assert found.of(*found.phases, kinds=(MIXED, GENERATOR)) == {}
    assert found.of(*found.phases, kinds=(FETCH,))
