"""Every option of conf/ that changes a step is used by a rehearsal, or stands here with the reason why not."""

from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from gpu_rehearsal.cases import CASES
from smalto.runtime import conf_dir

FOLDERS = (
    "task",
    "callbacks",
    "quantizer",
    "discriminator",
    "conditioner",
    "perceptual",
    "tokenizer",
    "model",
    "trainer",
)
FOLDERS += ("strategy", "sampling")

ALWAYS = {
    "task/*.net": "the network itself",
    "task/*.discriminator": "a group of its own",
    "task/*.perceptual": "a group of its own",
    "task/*.*_weight": "a factor, in every case as it is",
    "task/*.decode_batch_size": "in the cases of generation",
    "task/*.tokenizer_ckpt": "in the cases of generation",
    "task/tokenizer.gradient_clip_val": "off in every case, as the task clips by itself",
    "trainer/default.gradient_clip_val": "on in every case of gpt",
    "discriminator/stylegan*": "in tokenizer_stylegan",
    "task/_optimizer.*": "AdamW with its numbers, in every case",
    "task/_schedule.*": "constant in every case, cosine in gpt_options",
    "callbacks/_common.*": "in every case",
    "callbacks/gpt.generation.*": "in the cases of generation",
    "callbacks/tokenizer.reconstruction.*": "in the cases of tokenizers",
    "quantizer/*": "in every case of tokenizers",
    "discriminator/patchgan*": "in every case of tokenizers",
    "conditioner/*": "class in every case of gpt, text in the cases of texts",
    "perceptual/*": "squeeze_caffe; the networks differ in their weights and sizes",
    "tokenizer/*": "convolutions of other sizes",
    "model/[!_]*": "other sizes of the same layers",
    "model/_gpt.*": "in every case of gpt",
    "trainer/default.precision": "all of them",
    "sampling/*": "every kind of draw in test_verbs",
}
"""Options that are part of cases without being named: pattern of ``file.key``, and where."""

NOT_HERE = {
    "task/*.compile": "compilers take no tensors that pretend; tests of the tasks and of the engine count graphs",
    "task/tokenizer.init_discriminator": "where a run begins, not a step",
    "task/tokenizer.benchmark": "what cuDNN does with it only cuDNN knows",
    "trainer/default.benchmark": "what cuDNN does with it only cuDNN knows",
    "strategy/*": "one device is pretended; tests/test_collectives.py records what two processes exchange",
    "trainer/default.accelerator": "the pretended one",
    "trainer/default.devices": "one",
    "trainer/default.num_nodes": "one",
    "trainer/default.max_*": "the end of a run, not a step",
    "trainer/default.check_val_every_n_epoch": "when, not what",
    "trainer/default.limit_val_batches": "when, not what",
    "trainer/default.num_sanity_val_steps": "when, not what",
    "trainer/default.enable_model_summary": "no step",
    "trainer/default.use_distributed_sampler": "always false",
    "trainer/default.deterministic": "what CUDA does with it only CUDA knows",
    "trainer/default.val_check_interval": "when, not what",
    "trainer/default.log_every_n_steps": "when, not what",
}
"""Options that no rehearsal has: pattern, and the reason."""


def options() -> list[str]:
    """``folder/file.key.key`` of every leaf."""
    found = []
    for folder in FOLDERS:
        for path in sorted((Path(conf_dir()) / folder).glob("*.yaml")):
            content = yaml.safe_load(path.read_text()) or {}
            found += [f"{folder}/{path.stem}{key}" for key in leaves(content)]
    return found


def leaves(tree: object, place: str = "") -> list[str]:
    if isinstance(tree, dict):
        skipped = ("_target_", "_partial_", "defaults", "kind", "run_name")
        parts = {key: value for key, value in tree.items() if key not in skipped}
        shorter = {key: value for key, value in parts.items()}
        return [leaf for key, value in shorter.items() for leaf in leaves(value, step(place, key))]
    return [place]


def step(place: str, key: str) -> str:
    """The groups of whole configs repeat their name: ``task.compile`` in conf/task is ``.compile``."""
    return place if not place and key in ("task", "trainer") else f"{place}.{key}"


def is_named(option: str) -> bool:
    """Whether a case sets it."""
    folder, _, key = option.partition("/")
    name = key.partition(".")[2]
    words = [word.lstrip("+~").partition("=")[0] for case in CASES.values() for word in case]
    roots = {"task": "task", "trainer": "trainer", "model": "model", "callbacks": "callbacks"}
    return f"{roots.get(folder, folder)}.{name}" in words or f"tokenizer.{folder}.{name}" in words


@pytest.mark.parametrize("option", options())
def test_option_is_rehearsed_or_excused(option):
    excused = [pattern for pattern in (*ALWAYS, *NOT_HERE) if fnmatch(option, pattern)]
    assert excused or is_named(option), f"{option}: add a case, or a line here with the reason"


def test_no_excuse_is_left_over():
    known = options()
    assert [pattern for pattern in (*ALWAYS, *NOT_HERE) if not any(fnmatch(option, pattern) for option in known)] == []
