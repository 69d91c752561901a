"""What a training needs from this machine, looked at in seconds: before models, databases and other processes."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from smalto.data.shards import CODES, read_meta
from smalto.errors import InputError
from smalto.losses.perceptual import VGG_URL, vgg_cache_path
from smalto.metrics.inception import INCEPTION_URL, inception_cache_path

log = logging.getLogger(__name__)


def preflight(plain: dict[str, Any]) -> None:
    """Stop a training that cannot run here.

    Args:
        plain: the resolved config.

    Raises:
        ValueError: something is missing: for each what, the rule, and a command that helps.
    """
    problems = ["\n".join(problem) for problem in (*devices(plain), *starts(plain), *files(plain))]
    if problems:
        raise InputError("\n\n".join(problems))


def devices(plain: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """GPUs that are asked for and not here."""
    trainer = plain["trainer"]
    if trainer["accelerator"] not in ("gpu", "cuda"):
        return
    here, wanted = torch.cuda.device_count(), trainer["devices"]
    if not here:
        yield (
            f"no GPU here (trainer.accelerator={trainer['accelerator']})",
            "this preset trains on GPUs: start it where there are some",
            "to run it on the CPU all the same: "
            "trainer.accelerator=cpu trainer.devices=1 trainer.precision=32-true strategy=auto",
        )
    elif isinstance(wanted, int) and wanted > here:
        yield (
            f"{here} GPU(s) here, trainer.devices is {wanted}",
            "trainer.devices counts the GPUs of one machine, trainer.num_nodes the machines",
            f"trainer.devices={here} (make: GPUS={here}); the batch is global and stays what it is",
        )


def starts(plain: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Options of ``init_from`` without it."""
    if plain["task"].get("init_discriminator") and plain["init_from"] is None:
        yield (
            "task.init_discriminator is true, init_from is null",
            "the discriminator is taken from the checkpoint that a run starts with",
            "give init_from=PATH, or leave task.init_discriminator out",
        )


def files(plain: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Files and folders that are named and not here, in the order in which they are made."""
    task, data = plain["task"], plain["data"]
    generation = (plain.get("callbacks") or {}).get("generation") or {}
    images = generation.get("reference") if generation.get("_target_") else None
    if images and not generation.get("reference_file") and missing(images.get("path")):
        yield (
            f"no images at {images['path']} (callbacks.generation.reference.path)",
            "FID compares samples with real images; callbacks=_common trains without it",
            prepare(images),
        )
    tokenizer = task.get("tokenizer_ckpt")
    if missing(tokenizer):
        yield (
            f"no checkpoint at {tokenizer} (task.tokenizer_ckpt)",
            "the tokenizer that wrote the codes turns samples into pictures; task.tokenizer_ckpt=null does without",
            f"smalto train experiment=tokenizer_f16, or the authors': smalto convert in=vq_ds16_c2i.pt out={tokenizer}",
        )
    if missing(data.get("path")):
        codes = data["_target_"].endswith("CodeShards")
        yield (
            f"no {'code' if codes else 'image'} shards at {data['path']} (data.path)",
            "training reads shards that smalto has written",
            extract(plain) if codes else prepare(data),
        )
    yield from networks(plain)
    yield from classes(plain)
    begun = any((Path(plain["run_dir"]) / "checkpoints").glob("step_*"))  # its own weights count, init_from no more
    for key, rule, command in (
        ("init_from", "the run starts with the weights of this checkpoint", "init_from=FILE"),
        ("ckpt_path", "the run goes on from this checkpoint", "ckpt_path=last takes the newest of the run folder"),
    ):
        if plain[key] != "last" and missing(plain[key]) and not (begun and key == "init_from"):
            yield f"no checkpoint at {plain[key]} ({key})", rule, command


def networks(plain: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Weight files of networks that are asked for by name; ``auto`` does without."""
    callbacks = [node for node in (plain.get("callbacks") or {}).values() if node and node.get("_target_")]
    features: dict[str, Any] = next((node["features"] for node in callbacks if node.get("features")), {})
    if features.get("_target_", "").endswith("InceptionFeatures") and not features.get("download"):
        file = features.get("weights") or str(inception_cache_path())
        if missing(file):
            yield (
                f"no Inception weights at {file} (features=inception)",
                "published FID is of this network; features=lite0 has another, whose numbers compare with its own only",
                f"fetch {INCEPTION_URL} to that place, or features.download=true",
            )
    task = plain["task"]
    perceptual = (task.get("perceptual") or {}) if task.get("perceptual_weight") else {}
    file = perceptual.get("weights") or str(vgg_cache_path())
    if perceptual.get("net") == "vgg" and missing(file):
        yield (
            f"no VGG16 weights at {file} (perceptual=vgg)",
            "LPIPS of the paper is on this network; perceptual=squeeze_caffe trains with another, without any file",
            f"fetch {VGG_URL} to that place",
        )


def classes(plain: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Labels of codes that the model has no classes for: on a GPU they end in an assertion without a line."""
    data, known = plain["data"], ((plain.get("model") or {}).get("conditioner") or {}).get("num_classes")
    if known is None or "codes" not in data["_target_"].lower() or data.get("condition", "label") != "label":
        return
    if data["_target_"].endswith("CodeShards"):
        if missing(data["path"]):
            return
        found = read_meta(data["path"], CODES)["num_classes"]
        what = f"the codes at {data['path']}"
    else:
        found, what = data.get("num_classes"), "the synthetic codes"
    if found is None:
        yield (
            f"{what} have no labels",
            f"the model draws images of {known} classes (model.conditioner.num_classes) and learns them from labels",
            "smalto prepare the images with labels and extract them anew, or train with conditioner=text",
        )
    elif found > known:
        yield (
            f"{what} have {found} classes, model.conditioner.num_classes is {known}",
            "every label needs a class of the model",
            f"model.conditioner.num_classes={found}",
        )
    elif found <= known // 2 and data["_target_"].endswith("CodeShards"):
        log.warning(
            "%s have %d classes, model.conditioner.num_classes is %d: the others are never trained",
            what,
            found,
            known,
        )


def missing(path: Any) -> bool:
    """Whether ``path`` names one local file or folder that is not there; patterns and addresses are not looked at."""
    if not isinstance(path, str) or "://" in path or "::" in path or set(path) & set("*?[{"):
        return False
    return not Path(path).exists()


def prepare(images: dict[str, Any]) -> str:
    """The command that makes image shards."""
    if Path(images["path"]).name == "fashion_mnist":
        return f"smalto prepare source=fashion_mnist out={images['path']} resize=pad image_size={images['image_size']}"
    return f"smalto prepare source=folder source.path=PICTURES out={images['path']} encoding=jpg"


def extract(plain: dict[str, Any]) -> str:
    """The command that makes the code shards."""
    data = plain["data"]
    tokenizer = plain["task"].get("tokenizer_ckpt") or "CHECKPOINT"
    crops = "crops=center text=FEATURES" if data.get("condition") == "text" else "crop_range=[1.1,1.05]"
    return (
        f"smalto extract tokenizer_ckpt={tokenizer} data.path=IMAGE_SHARDS out={data['path']} "
        f"image_size={plain['image_size']} {crops}"
    )
