"""``smalto sample``: a generator's checkpoint to a sheet and pictures; continued after a kill."""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from smalto.data.output import OutputFolder
from smalto.data.output_plan import PICTURES, SAMPLES
from smalto.data.progress import progress
from smalto.data.reader import ImageReader
from smalto.data.shards import IMAGES
from smalto.data.transforms import to_pixels
from smalto.errors import InputError
from smalto.files import replacing
from smalto.runtime import build, hydra_main, record, results_folder, wanted_device
from smalto.sampling.class_labels import class_numbers, described
from smalto.sampling.engine import EngineConfig
from smalto.sampling.requests import balanced_labels
from smalto.sampling.service import draw_images, fixed_weights
from smalto.sampling.shard_writer import Draw, SampleShards
from smalto.sampling.sheet import class_sheet
from smalto.sampling.writer import PictureFolder, pack_npz
from smalto.tasks.checkpoint import LoadedTask, load_task
from smalto.tokenizers.precision import use_bf16
from smalto.types import SamplingConfig

log = logging.getLogger(__name__)

Read = Callable[[Sequence[int]], Tensor]
"""Image numbers to uint8 (B, 3, H, W)."""
_LONGEST_NAME = 255  # bytes, on the file systems there are


def run(config: DictConfig) -> dict[str, Any]:
    """Write ``num_images`` samples of ``ckpt`` as files and array, or as shards; returns where they are.

    Raises:
        ValueError: not a generator's checkpoint, labels it does not know, settings out of range, a device or dtype
            that is not there, a batch that memory does not hold.
        FileExistsError: ``out`` is in use, or holds samples of other settings.
    """
    _check(config)
    loaded = load_task(config.ckpt, tokenizer_ckpt=config.tokenizer_ckpt, ema=config.ema, verify=config.verify)
    if loaded.kind != "gpt":
        raise InputError(
            f"{config.ckpt} is a {loaded.kind}; samples are drawn from a generator (smalto train task=gpt)"
        )
    sampling: SamplingConfig = build(config.sampling)
    engine: EngineConfig = build(config.engine)
    loaded.task.engine = engine
    loaded.task.to(wanted_device(config.device))
    device = loaded.task.device
    classes = wanted_classes(config.labels, loaded)
    if loaded.task.tokenizer is None:
        raise InputError("this model was trained without a tokenizer; give tokenizer_ckpt=PATH to see pictures")
    out = Path(config.out or default_folder(config, loaded, sampling))
    stat = Path(config.ckpt).stat()
    settings = {
        "ckpt": str(config.ckpt),
        "ckpt_bytes_and_time": [stat.st_size, stat.st_mtime_ns],
        "sampling": OmegaConf.to_container(config.sampling, resolve=True),
        **computes(engine, device),
        "labels": classes,
        "num_images": config.num_images,
        "seed": config.seed,
        "ema": config.ema,
        "tokenizer_ckpt": config.tokenizer_ckpt,
    }
    if config.eval_size is not None:
        settings["eval_size"] = config.eval_size
        loaded.task.to_pixels = partial(to_pixels, size=config.eval_size)
    as_shards = config.format == "wds"
    if as_shards:
        settings["shard_size"] = config.shard_size
    with OutputFolder(
        out,
        format=IMAGES if as_shards else SAMPLES,
        settings=settings,
        command="smalto sample",
        overwrite=config.overwrite,
        earlier=partial(as_computed, engine=engine, device=device),
    ) as folder:
        if folder.finished is None:
            folder.begin()
            log.info("%d images of %s", config.num_images, drawn_classes(classes[: config.num_images], loaded))
            draw = drawer(config, loaded.task, sampling, classes)
            meta: dict[str, Any] = {}
            if as_shards:
                rate, read, meta = write_shards(config, draw, folder, loaded)
            else:
                rate, read = write_pictures(config, draw, classes, out)
            sheet = class_sheet(
                read,
                count=config.num_images,
                classes=classes,
                names=loaded.classes,
                max_rows=config.sheet_rows,
                max_columns=config.sheet_columns,
            )
            with replacing(out / "sheet.png") as unfinished:
                sheet.save(unfinished, format="PNG")
            folder.finish({**settings, **meta, "images_per_second": rate})
            record(
                config,
                experiment="sample",
                params={k: v for k, v in settings.items() if k != "labels"},
                metrics={"images_per_second": rate},
                artifacts=[out / "sheet.png"],
            )
    found = {"out": str(out), "sheet": str(out / "sheet.png")}
    if as_shards:
        log.info("sheet: %s, shards: %s", out / "sheet.png", out)
        return found
    log.info("sheet: %s, pictures: %s, array: %s", out / "sheet.png", out / PICTURES, out / "samples.npz")
    return found | {"npz": str(out / "samples.npz")}


def _check(config: DictConfig) -> None:
    """What can be told from the settings alone."""
    if config.format not in ("png", "wds"):
        raise InputError(f"format is {config.format!r}, must be png (files and an .npz) or wds (WebDataset shards)")
    for key in ("num_images", "shard_size", "batch_size", "sheet_rows", "sheet_columns", "eval_size"):
        if config[key] is not None and config[key] < 1:
            raise InputError(f"{key} is {config[key]}, must be at least 1")
    if config.seed < 0:
        raise InputError(f"seed is {config.seed}, must be at least 0")


def computes(engine: EngineConfig, device: torch.device) -> dict[str, str]:
    """What really computes there, never ``auto``: of settings that decide the pictures."""
    decode = {"decode": "bf16"} if use_bf16(engine.decode, device) else {}
    return {"dtype": engine.computes_in(device), **decode}


def as_computed(settings: dict[str, Any], *, engine: EngineConfig, device: torch.device) -> dict[str, Any]:
    """Settings of a folder begun by a version that kept the words it was given, as they are kept now."""
    try:
        engine = replace(engine, dtype=str(settings.get("dtype")), decode=settings.get("decode", "fp32"))
        found = computes(engine, device)
    except InputError:  # not to be had here: it was begun elsewhere
        return settings
    return {key: value for key, value in settings.items() if key != "decode"} | found


def wanted_classes(labels: Any, loaded: LoadedTask) -> list[int]:
    """Class numbers from a number or name, or a list of them; all classes for None.

    Raises:
        ValueError: no class, one that the model does not know, or a label that can be read in two ways.
    """
    count = getattr(loaded.task.net.conditioner, "num_classes", None)
    if count is None:
        raise InputError("this generator is conditioned on text features; smalto sample draws for classes only")
    return class_numbers(_plain(labels), names=loaded.classes, count=count)


def drawn_classes(classes: list[int], loaded: LoadedTask) -> str:
    """Their numbers and names, in a line."""
    return described(classes, names=loaded.classes, count=loaded.task.net.conditioner.num_classes)


def _plain(labels: Any) -> Any:
    return OmegaConf.to_container(labels) if OmegaConf.is_config(labels) else labels


def default_folder(config: DictConfig, loaded: LoadedTask, sampling: SamplingConfig) -> Path:
    """``samples/`` beside the run's checkpoints, named by what decides the pictures."""
    labels = _plain(config.labels)
    words = "-".join(map(str, labels if isinstance(labels, list) else [labels]))

    def name(words: str) -> str:
        chosen = "" if labels is None else f"_labels{words}"
        return (
            f"step{loaded.step}_n{config.num_images}{chosen}_cfg{sampling.cfg_scale:g}_t{sampling.temperature:g}"
            f"_k{sampling.top_k}_p{sampling.top_p:g}_seed{config.seed}"
            + ("" if config.engine.dtype == "auto" else f"_{config.engine.dtype}")
            + ("" if config.engine.decode == "fp32" else f"_decode-{config.engine.decode}")
            + ("" if config.format == "png" else f"_{config.format}")
        )

    found = name(words)
    if len(found.encode()) > _LONGEST_NAME:
        found = name(hashlib.sha256(words.encode()).hexdigest()[:16])
    return results_folder(config.ckpt) / "samples" / found.replace("/", "-").replace(" ", "-")


def drawer(config: DictConfig, task: Any, sampling: SamplingConfig, classes: list[int]) -> Draw:
    """Draws the images of given numbers."""
    return lambda indices: draw_images(
        task, sampling=sampling, classes=classes, seed=config.seed, indices=indices, batch_size=config.batch_size
    )


def write_pictures(config: DictConfig, draw: Draw, classes: list[int], out: Path) -> tuple[float, Read]:
    """Draw what is missing into files, then the array; returns images per second, and how to read images."""
    pictures = PictureFolder(out / PICTURES)
    todo = pictures.missing(range(config.num_images))
    start = time.perf_counter()
    with progress("sample", total=config.num_images, done=config.num_images - len(todo)) as advance:
        for batch in draw(todo):
            pictures.write(batch.indices, batch.images)
            advance(len(batch.indices))
    rate = len(todo) / max(time.perf_counter() - start, 1e-9)
    labels = balanced_labels(range(config.num_images), classes)
    pack_npz(pictures, config.num_images, out / "samples.npz", labels=labels.numpy())
    pictures.sync(range(config.num_images))
    return rate, lambda indices: torch.from_numpy(pictures.read(indices)).permute(0, 3, 1, 2)


def write_shards(
    config: DictConfig, draw: Draw, folder: OutputFolder, loaded: LoadedTask
) -> tuple[float, Read, dict[str, Any]]:
    """Draw what is missing into shards; also returns what meta.json says of them."""
    shards = SampleShards(folder, count=config.num_images, shard_size=config.shard_size)
    todo = sum(map(len, shards.missing().values()))
    start = time.perf_counter()
    with (
        fixed_weights(loaded.task),
        progress("sample", total=config.num_images, done=config.num_images - todo) as advance,
    ):
        shards.write(draw, advance)
    rate = todo / max(time.perf_counter() - start, 1e-9)
    meta = {
        "splits": shards.splits(),
        "num_classes": loaded.task.net.conditioner.num_classes,
        "classes": loaded.classes,
        "captions": False,
        "encoding": "png",
    }
    images = ImageReader(folder.path, meta, "train")
    height, width = images.pixels(np.array([0])).shape[2:]
    return (
        rate,
        lambda chosen: torch.from_numpy(images.pixels(np.array(chosen))),
        meta | {"image_size": [height, width]},
    )


main = hydra_main("sample")(run)

if __name__ == "__main__":
    main()
