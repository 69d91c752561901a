"""Text conditioning end to end on synthetic features: configs compose, training learns, samples follow the text."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from forked_ranks import run_ranks
from smalto import train
from smalto.data.synthetic_text import SyntheticText
from smalto.models.conditioner import TextConditioner
from smalto.models.gpt import GPT
from smalto.runtime import compose
from smalto.tasks.checkpoint import load_task
from smalto.tasks.optim import Schedule
from smalto.tasks.strategy import ShardedStrategy
from smalto.types import SamplingConfig
from tiny_tasks import SHAPE, VOCABULARY, make_gpt_task, make_trainer

TOKENS, WIDTH = 6, 8


def make_texts(**overrides) -> SyntheticText:
    settings = {
        "codebook_size": VOCABULARY,
        "code_shape": SHAPE,
        "num_classes": 2,
        "num_tokens": TOKENS,
        "text_dim": WIDTH,
        "num_train": 64,
        "num_val": 16,
        "batch_size": 16,
        "seed": 0,
        "noise": 0.0,
    }
    return SyntheticText(**settings | overrides)


def make_text_task(**overrides):
    net = partial(
        GPT,
        dim=32,
        num_layers=2,
        num_heads=2,
        vocab_size=VOCABULARY,
        code_shape=SHAPE,
        conditioner=partial(TextConditioner, text_dim=WIDTH, num_tokens=TOKENS, drop_prob=0.1),
        ffn_multiple_of=16,
        token_dropout=0.0,
        resid_dropout=0.0,
        ffn_dropout=0.0,
    )
    return make_gpt_task(net=net, **overrides)


def test_texts_are_padded_on_the_left_and_say_their_class():
    batch = make_texts(num_train=40).fetch_train(0, torch.arange(40).numpy())
    text, mask = batch["text"], batch["text_mask"]
    assert (text.shape, mask.shape, mask.dtype) == ((40, TOKENS, WIDTH), (40, TOKENS), torch.bool)
    assert not text[~mask].any()
    assert mask[:, -1].all()
    lengths = mask.sum(1)
    assert all(mask[i, TOKENS - n :].all() for i, n in enumerate(lengths))
    assert set(lengths.tolist()) == set(range(1, TOKENS + 1))
    last = text[:, -1]
    same, other = (last[0::2] - last[0]).norm(dim=1), (last[1::2] - last[0]).norm(dim=1)
    assert same.max() < other.min()


def test_training_uses_the_text(tmp_path):
    """The first code is random and the text says the step to the second; later codes tell it themselves."""
    task = make_text_task(schedule=Schedule(kind="constant"))
    data = make_texts(num_train=512)
    make_trainer(tmp_path, max_steps=200, limit_val_batches=0).fit(task, datamodule=data)
    task.eval()
    batch = data.fetch_val(0, torch.arange(16).numpy())
    texts = {"right": batch["text"], "swapped": batch["text"].flip(0)}  # classes alternate, so a flip swaps them
    masks = {"right": batch["text_mask"], "swapped": batch["text_mask"].flip(0)}
    with torch.inference_mode():
        second = {
            key: F.cross_entropy(task.net(batch["codes"], texts[key], masks[key])[:, 1], batch["codes"][:, 1]).item()
            for key in texts
        }
    assert second["right"] < second["swapped"] - 1, second


def test_sampling_depends_on_the_text_and_not_on_the_padding():
    torch.manual_seed(1)
    task = make_text_task()
    task.configure_model()
    torch.nn.init.normal_(task.net.output.weight)
    batch = make_texts().fetch_train(0, torch.arange(4).numpy())
    seeds = torch.arange(4)
    sample = partial(task.sample_codes, sampling=SamplingConfig(cfg_scale=2.0), seeds=seeds)
    codes = sample(batch["text"], condition_mask=batch["text_mask"])
    assert codes.shape == (4, 16)
    assert torch.equal(codes, sample(batch["text"], condition_mask=batch["text_mask"])), "sampling twice works"
    garbage = torch.where(batch["text_mask"][:, :, None], batch["text"], torch.randn_like(batch["text"]))
    assert torch.equal(codes, sample(garbage, condition_mask=batch["text_mask"]))
    assert not torch.equal(codes, sample(batch["text"].roll(1, 0), condition_mask=batch["text_mask"].roll(1, 0)))
    with pytest.raises(ValueError, match="text features have shape"):
        sample(batch["text"][:, 1:])


def test_training_after_sampling_and_the_null_text_learns(tmp_path):
    task = make_text_task()
    task.configure_model()
    batch = make_texts().fetch_train(0, torch.arange(4).numpy())
    task.sample_codes(batch["text"], sampling=SamplingConfig(), seeds=torch.arange(4))
    null = task.net.conditioner.null_features.clone()
    make_trainer(tmp_path, max_steps=8, limit_val_batches=0).fit(task, datamodule=make_texts())
    assert not torch.equal(task.net.conditioner.null_features, null)


@pytest.mark.chain
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_texts_that_are_never_dropped_train_on_two_processes(tmp_path, strategy):
    """The null features get no gradient then, and stay as they are, in the optimizer's groups and in checkpoints."""

    def run(rank: int) -> list:
        task = make_text_task()
        task.net_factory = partial(
            task.net_factory, conditioner=partial(TextConditioner, text_dim=WIDTH, num_tokens=TOKENS, drop_prob=0.0)
        )
        where = {"strategy": strategy if strategy == "ddp" else ShardedStrategy(), "inference_mode": False}
        trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=0, devices=2, **where)
        trainer.fit(task, datamodule=make_texts())
        groups = trainer.optimizers[0].param_groups
        assert any(p is task.net.conditioner.null_features for group in groups for p in group["params"])
        assert "net.conditioner.null_features" in task.state_dict()
        return [task.net.conditioner.null_features.grad, trainer.global_step]

    assert run_ranks(run, 2) == [[None, 3]] * 2


def test_the_command_trains_on_texts(tmp_path):
    overrides = [
        "task=gpt",
        "conditioner=text",
        "data=synthetic_text",
        "callbacks=_common",
        "logger=csv",
        "image_size=64",
        "model.dim=32",
        "model.num_layers=1",
        "model.num_heads=2",
        "model.conditioner.text_dim=8",
        "model.conditioner.num_tokens=5",
        "tokenizer.quantizer.codebook_size=32",
        "data.num_train=16",
        "data.num_val=4",
        "data.batch_size=4",
        "trainer.max_steps=2",
        "trainer.val_check_interval=2",
        "trainer.accelerator=cpu",
        f"run_dir={tmp_path}/run",
    ]
    assert train.run(compose("train", overrides))["val/loss"] > 0
    task = load_task(tmp_path / "run/checkpoints/last.ckpt").task
    assert task.net.conditioner.num_tokens == 5


def test_published_text_sizes_are_the_default():
    config = compose("train", ["conditioner=text", "model=xl", "data=synthetic_text", "run_dir=x"])
    assert (config.data.num_tokens, config.data.text_dim) == (120, 2048)
