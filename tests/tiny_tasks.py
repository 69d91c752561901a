"""Tasks, data and a trainer that take milliseconds a step, for tests of behaviour over time."""

from functools import partial

import lightning as L
import torch

from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.data.synthetic import SyntheticCodes, SyntheticImages
from smalto.losses.patchgan import PatchDiscriminator
from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from smalto.tasks.gpt import GPTTask
from smalto.tasks.optim import Schedule
from smalto.tasks.tokenizer import TokenizerTask
from smalto.tokenizers.quantize import VectorQuantizer
from smalto.tokenizers.vqgan import VQModel

SIZE = 16


TOKENIZER = partial(
    VQModel,
    image_size=SIZE,
    base_channels=8,
    channel_multipliers=[1, 2],
    num_res_blocks=1,
    z_channels=8,
    norm_groups=4,
    quantizer=partial(VectorQuantizer, codebook_size=16, codebook_dim=4),
)


def make_tokenizer_task(**overrides) -> TokenizerTask:
    settings = {
        "net": partial(TOKENIZER, dropout=0.1),  # so that randomness matters for resuming
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, betas=[0.9, 0.95]),
        "discriminator": partial(PatchDiscriminator, base_channels=8, num_layers=1),
        "schedule": Schedule(kind="cosine", warmup_steps=2, total_steps=12),
        "disc_start": 3,
    }
    return TokenizerTask(**settings | overrides)


def make_trainer(folder, *callbacks, **overrides) -> L.Trainer:
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 6,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, LatestCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
        "callbacks": list(callbacks),
    }
    return L.Trainer(**settings | overrides)


def make_images() -> SyntheticImages:
    return SyntheticImages(image_size=SIZE, num_classes=3, num_train=16, num_val=4, batch_size=4, seed=0)


VOCABULARY, SHAPE = 32, ((4, 4),)


def make_gpt_task(**overrides) -> GPTTask:
    net = partial(
        GPT,
        dim=32,
        num_layers=2,
        num_heads=2,
        vocab_size=VOCABULARY,
        code_shape=SHAPE,
        conditioner=partial(ClassConditioner, num_classes=3, drop_prob=0.1),
        ffn_multiple_of=16,
    )
    settings = {
        "net": net,
        "optimizer": partial(torch.optim.AdamW, lr=1e-2, betas=[0.9, 0.95]),
        "schedule": Schedule(kind="cosine", warmup_steps=2, total_steps=10),
    }
    return GPTTask(**settings | overrides)


def make_codes() -> SyntheticCodes:
    return SyntheticCodes(
        codebook_size=VOCABULARY, code_shape=SHAPE, num_classes=3, num_train=64, num_val=16, batch_size=8, seed=0
    )


TINY_GPT = [
    "task=gpt",
    "data=synthetic_codes",
    "image_size=64",
    "model.dim=32",
    "model.num_heads=2",
    "model.conditioner.num_classes=4",
    "tokenizer.quantizer.codebook_size=32",
    "data.num_classes=4",
    "data.batch_size=4",
]
"""Overrides that make ``smalto train`` train a generator in seconds, on codes that need no files."""
