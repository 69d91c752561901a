"""``smalto sample``: a generator's checkpoint to a sheet, pictures and an ``.npz``; continued after a kill."""

import logging
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from smalto.data.output import OutputFolder
from smalto.data.progress import progress
from smalto.data.transforms import to_pixels
from smalto.runtime import build, hydra_main, record, results_folder, wanted_device
from smalto.sampling.packed import resolve_dtype
from smalto.sampling.requests import balanced_labels
from smalto.sampling.service import draw_images
from smalto.sampling.sheet import image_sheet
from smalto.sampling.writer import PictureFolder, pack_npz
from smalto.tasks.checkpoint import LoadedTask, load_task
from smalto.types import SamplingConfig

log = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, Any]:
    """Write ``num_images`` samples of ``ckpt``; returns where they are.

    Raises:
        ValueError: not a generator's checkpoint, labels it does not know, settings out of range, a device or dtype
            that is not there, a batch that memory does not hold.
        FileExistsError: ``out`` is in use, or holds samples of other settings.
    """
    loaded = load_task(config.ckpt, tokenizer_ckpt=config.tokenizer_ckpt, ema=config.ema)
    if loaded.kind != "gpt":
        raise ValueError(
            f"{config.ckpt} is a {loaded.kind}; samples are drawn from a generator (smalto train task=gpt)"
        )
    sampling: SamplingConfig = build(config.sampling)
    loaded.task.engine = build(config.engine)
    loaded.task.to(wanted_device(config.device))
    resolve_dtype(config.engine.dtype, loaded.task.device)  # refused here, not when the folder is there
    classes = wanted_classes(config.labels, loaded)
    out = Path(config.out or default_folder(config, loaded, sampling))
    stat = Path(config.ckpt).stat()
    settings = {
        "ckpt": str(config.ckpt),
        "ckpt_bytes_and_time": [stat.st_size, stat.st_mtime_ns],
        "sampling": OmegaConf.to_container(config.sampling, resolve=True),
        "dtype": config.engine.dtype,
        "labels": classes,
        "num_images": config.num_images,
        "seed": config.seed,
        "ema": config.ema,
        "tokenizer_ckpt": config.tokenizer_ckpt,
    }
    if config.eval_size is not None:
        settings["eval_size"] = config.eval_size
        loaded.task.to_pixels = partial(to_pixels, size=config.eval_size)
    with OutputFolder(
        out, format="smalto-samples", settings=settings, command="smalto sample", overwrite=config.overwrite
    ) as folder:
        if folder.finished is None:
            if config.overwrite:
                shutil.rmtree(out / "images", ignore_errors=True)
            rate = write_images(config, loaded, sampling, classes, out)
            folder.finish({**settings, "images_per_second": rate})
            record(
                config,
                experiment="sample",
                params={k: v for k, v in settings.items() if k != "labels"},
                metrics={"images_per_second": rate},
                artifacts=[out / "sheet.png"],
            )
    log.info("sheet: %s, pictures: %s, array: %s", out / "sheet.png", out / "images", out / "samples.npz")
    return {"out": str(out), "sheet": str(out / "sheet.png"), "npz": str(out / "samples.npz")}


def wanted_classes(labels: Any, loaded: LoadedTask) -> list[int]:
    """Class numbers from a list of numbers or names; all classes for None."""
    names = loaded.classes
    count = getattr(loaded.task.net.conditioner, "num_classes", None)
    if count is None:
        raise ValueError("this generator is conditioned on text features; smalto sample draws for classes only")
    if labels is None:
        return list(range(count))
    wanted = []
    for label in labels:
        if isinstance(label, str) and label in names:
            wanted.append(names.index(label))
        elif isinstance(label, int):
            wanted.append(label)
        else:
            raise ValueError(
                f"labels has {label!r}; give class numbers, or names of {', '.join(names) or '(none known)'}"
            )
    return wanted


def default_folder(config: DictConfig, loaded: LoadedTask, sampling: SamplingConfig) -> Path:
    """``samples/`` beside the run's checkpoints, named by what decides the pictures."""
    chosen = "" if config.labels is None else "_labels" + "-".join(str(label) for label in config.labels)
    name = (
        f"step{loaded.step}_n{config.num_images}{chosen}_cfg{sampling.cfg_scale:g}_t{sampling.temperature:g}"
        f"_k{sampling.top_k}_p{sampling.top_p:g}_seed{config.seed}"
        + ("" if config.engine.dtype == "auto" else f"_{config.engine.dtype}")
    )
    return results_folder(config.ckpt) / "samples" / name.replace("/", "-").replace(" ", "-")


def write_images(
    config: DictConfig, loaded: LoadedTask, sampling: SamplingConfig, classes: list[int], out: Path
) -> float:
    """Draw what is missing, then the sheet and the array; returns images per second."""
    task = loaded.task
    pictures = PictureFolder(out / "images")
    todo = pictures.missing(range(config.num_images))
    start = time.perf_counter()
    with progress("sample", total=config.num_images, done=config.num_images - len(todo)) as advance:
        for batch in draw_images(
            task,
            sampling=sampling,
            classes=classes,
            seed=config.seed,
            indices=todo,
            batch_size=config.batch_size,
        ):
            pictures.write(batch.indices, batch.images)
            advance(len(batch.indices))
    rate = len(todo) / max(time.perf_counter() - start, 1e-9)
    labels = balanced_labels(range(config.num_images), classes)
    pack_npz(pictures, config.num_images, out / "samples.npz", labels=labels.numpy())
    rows = classes[: config.sheet_rows]
    columns = min(config.sheet_columns, -(-config.num_images // len(classes)))
    shown = [r + c * len(classes) for r in range(len(rows)) for c in range(columns)]
    shown = [i for i in shown if i < config.num_images]
    names = [loaded.classes[c] if loaded.classes else str(c) for c in rows]
    images = torch.from_numpy(pictures.read(shown)).permute(0, 3, 1, 2)
    image_sheet(images, columns=columns, row_names=names).save(out / "sheet.png")
    return rate


main = hydra_main("sample")(run)

if __name__ == "__main__":
    main()
