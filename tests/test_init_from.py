"""Fine-tuning: a new run with the weights of another, of any format, and nothing else of it."""

import pytest
import torch

from official_files import saved, tiny_gpt, tiny_tokenizer
from smalto import convert, train
from smalto.runtime import build, compose
from smalto.tasks.checkpoint import network_state, read_checkpoint, start_from, with_prefix
from tiny_tasks import make_gpt_task

GPT = [
    "task=gpt",
    "callbacks=_common",
    "data=synthetic_codes",
    "image_size=64",
    "tokenizer.channel_multipliers=[1,1,1,1]",  # 8 x 8 codes
    "tokenizer.quantizer.codebook_size=64",
    "model.dim=32",
    "model.num_layers=2",
    "model.num_heads=2",
    "data.num_train=32",
    "data.num_val=8",
    "data.batch_size=4",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.accelerator=cpu",
    "logger=csv",
]
TOKENIZER = [
    "task=tokenizer",
    "callbacks=_common",
    "data=synthetic_images",
    "image_size=16",
    "tokenizer.base_channels=32",
    "tokenizer.channel_multipliers=[1,2]",
    "tokenizer.num_res_blocks=1",
    "tokenizer.z_channels=32",
    "tokenizer.quantizer.codebook_size=64",
    "tokenizer.quantizer.codebook_dim=4",
    "discriminator.num_layers=1",
    "discriminator.base_channels=8",
    "perceptual=none",
    "task.disc_start=1",
    "data.num_train=16",
    "data.num_val=4",
    "data.batch_size=4",
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "trainer.accelerator=cpu",
    "logger=csv",
]
"""The sizes of ``official_files.tiny_gpt`` and ``tiny_tokenizer``."""


def run(folder, base, *overrides: str) -> dict[str, float]:
    return train.run(compose("train", [*base, f"run_dir={folder}", *overrides]))


def converted(folder, weights, *options: str):
    out = folder / ("start.safetensors" if "format=safetensors" in options else "start.ckpt")
    convert.run(compose("convert", [f"in={saved(folder / 'in.pt', weights)}", f"out={out}", *options]))
    return out


def weights_of(folder) -> dict[str, torch.Tensor]:
    state = read_checkpoint(folder / "checkpoints/last.ckpt")["state_dict"]
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("layout", ["smalto", "safetensors"])
def test_a_generator_goes_on_from_the_authors_weights(tmp_path, layout):
    size = ["image_size=128", "num_heads=2", f"format={layout}"]
    start = converted(tmp_path, tiny_gpt(classes=1000, hidden=256), *size)
    # A learning rate of zero shows what the run started with.
    run(tmp_path / "run", GPT, f"init_from={start}", "task.optimizer.lr=0", "model.ffn_multiple_of=256")
    found, given = weights_of(tmp_path / "run"), read_checkpoint(start)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert read_checkpoint(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2


def test_a_tokenizer_goes_on_with_a_new_discriminator(tmp_path):
    start = converted(tmp_path, tiny_tokenizer(), "image_size=16")
    metrics = run(tmp_path / "run", TOKENIZER, f"init_from={start}", "task.optimizer.lr=0")
    found, given = weights_of(tmp_path / "run"), read_checkpoint(start)["state_dict"]
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert any(name.startswith("discriminator.") for name in found)
    assert "train/disc_loss" in metrics


def started(*overrides: str):
    """The task of a run, as it begins."""
    config = compose("train", [*TOKENIZER, *overrides])
    task = build(config.task)
    task.init_from = config.init_from
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        task.configure_model()
    return task


def saved_as(layout: str, start, folder):
    """The checkpoint as what a user may have of it."""
    out = folder / ("start.safetensors" if layout == "safetensors" else f"{layout}.ckpt")
    if layout == "authors":  # to their layout and back
        convert.run(compose("convert", [f"in={start}", f"out={folder}/theirs.pt", "format=official"]))
        start, layout = folder / "theirs.pt", "smalto"
    convert.run(compose("convert", [f"in={start}", f"out={out}", f"format={layout}"]))
    return out


def test_the_discriminator_can_be_taken_along(tmp_path):
    run(tmp_path / "first", TOKENIZER, "task.optimizer.lr=1e-2")
    first = tmp_path / "first/checkpoints/last.ckpt"
    judge = {n: v.clone() for n, v in with_prefix(read_checkpoint(first)["state_dict"], "discriminator.").items()}
    new = started(f"init_from={first}").discriminator.state_dict()
    assert new.keys() == judge.keys()
    assert any(not torch.equal(new[name], value) for name, value in judge.items())
    starts = [first, *(saved_as(layout, first, tmp_path) for layout in ("smalto", "safetensors", "authors"))]
    for start in starts:
        task = started(f"init_from={start}", "task.init_discriminator=true")
        found = task.discriminator.state_dict()
        assert all(torch.equal(found[name], value) for name, value in judge.items()), start
        given = network_state(read_checkpoint(start), ema=True)
        assert all(torch.equal(given[name], value) for name, value in task.net.state_dict().items())


def test_a_discriminator_that_is_not_there_or_another_is_refused(tmp_path):
    taken = "task.init_discriminator=true"
    start = f"init_from={converted(tmp_path, tiny_tokenizer(), 'image_size=16')}"
    with pytest.raises(ValueError, match=r"holds no discriminator; set task\.init_discriminator=false"):
        started(start, taken)
    with pytest.raises(ValueError, match="this run has no discriminator"):
        run(tmp_path / "b", TOKENIZER, start, taken, "task.discriminator=null")
    with pytest.raises(ValueError, match="give init_from=PATH"):
        run(tmp_path / "c", TOKENIZER, taken)
    run(tmp_path / "wide", TOKENIZER, "discriminator.base_channels=16", "trainer.max_steps=1")
    with pytest.raises(ValueError, match=r"is not that of this run: .*instead of.*choose discriminator="):
        started(f"init_from={tmp_path / 'wide/checkpoints/last.ckpt'}", taken)


def test_a_run_that_took_a_discriminator_along_goes_on(tmp_path):
    run(tmp_path / "first", TOKENIZER)
    options = [f"init_from={tmp_path / 'first/checkpoints/last.ckpt'}", "task.init_discriminator=true"]
    whole = run(tmp_path / "run", TOKENIZER, *options)
    (tmp_path / "run/metrics.json").unlink()  # as if killed before its end
    assert run(tmp_path / "run", TOKENIZER, *options)["val/rec_loss"] == whole["val/rec_loss"]


def test_training_moves_the_weights_and_a_finished_run_is_not_started_again(tmp_path):
    start = converted(tmp_path, tiny_gpt(classes=1000), "image_size=128", "num_heads=2")
    first = run(tmp_path / "run", GPT, f"init_from={start}")
    moved = weights_of(tmp_path / "run")
    assert any(not torch.equal(moved[name], value) for name, value in read_checkpoint(start)["state_dict"].items())
    assert run(tmp_path / "run", GPT, f"init_from={start}") == first


def test_a_continued_run_keeps_its_own_weights(tmp_path):
    start = converted(tmp_path, tiny_gpt(classes=1000), "image_size=128", "num_heads=2")
    whole = run(tmp_path / "whole", GPT, f"init_from={start}", "trainer.max_steps=2")
    run(tmp_path / "run", GPT, f"init_from={start}", "trainer.max_steps=2")
    (tmp_path / "run/metrics.json").unlink()  # as if killed before its end
    start.unlink()
    assert run(tmp_path / "run", GPT, f"init_from={start}")["val/loss"] == whole["val/loss"]


def test_a_text_generator_goes_on_with_larger_images(tmp_path):
    texts = ["conditioner=text", "data=synthetic_text", "model.conditioner.text_dim=8"]
    texts += ["model.conditioner.num_tokens=4"]
    run(tmp_path / "small", GPT, *texts)
    start = tmp_path / "small/checkpoints/last.ckpt"
    run(tmp_path / "large", GPT, *texts, "image_size=128", f"init_from={start}", "task.optimizer.lr=0")
    found, given = weights_of(tmp_path / "large"), network_state(read_checkpoint(start), ema=True)
    assert all(torch.equal(found[f"net.{name}"], value) for name, value in given.items())
    config = read_checkpoint(tmp_path / "large/checkpoints/last.ckpt")["smalto"]["config"]
    assert config["model"]["code_shape"] == [[16, 16]]


def test_another_model_is_refused_by_name_and_changes_nothing(tmp_path):
    start = converted(tmp_path, tiny_gpt(classes=10), "image_size=128", "num_heads=2")
    with pytest.raises(ValueError, match=r"init_from=.*embedding\.weight is \(11, 32\) instead of \(1001, 32\)"):
        run(tmp_path / "run", GPT, f"init_from={start}")
    with pytest.raises(ValueError, match="holds a gpt, a tokenizer is needed"):
        run(tmp_path / "other", TOKENIZER, f"init_from={start}")
    assert not (tmp_path / "run/checkpoints").exists()
    task = make_gpt_task()
    task.configure_model()
    before = {name: value.clone() for name, value in task.net.state_dict().items()}
    with pytest.raises(ValueError, match="instead of"):
        start_from(task, start, kind="gpt")
    assert all(torch.equal(value, before[name]) for name, value in task.net.state_dict().items())
