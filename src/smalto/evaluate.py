"""``smalto evaluate``: a checkpoint to a table of metrics, on screen, as JSON and in MLflow."""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from smalto.data.images import ImageShards
from smalto.data.progress import progress
from smalto.data.transforms import to_float, to_pixels
from smalto.data.write import write_json
from smalto.metrics.codebook import CodebookUsage, position_counts, unigram_entropy, unigram_nll
from smalto.metrics.image import PSNR, SSIM
from smalto.metrics.suite import GenerationMetrics
from smalto.runtime import build, hydra_main, record, results_folder, wanted_device
from smalto.sampling.requests import balanced_labels, image_seeds
from smalto.tasks.checkpoint import LoadedTask, load_task
from smalto.tasks.targets import check_targets

log = logging.getLogger(__name__)


def run(config: DictConfig) -> dict[str, float]:
    """Measure ``ckpt``: a tokenizer by its reconstructions, a generator by its samples and its loss.

    Raises:
        ValueError: no images to compare with, settings out of range.
    """
    protocol = requested(config)
    loaded = load_task(config.ckpt, tokenizer_ckpt=config.tokenizer_ckpt, ema=config.ema)
    out = Path(config.out or results_folder(config.ckpt) / f"evaluation_step{loaded.step}.json")
    known = json.loads(out.read_text()) if out.exists() else {}
    if known.get("requested") == protocol and not config.overwrite:
        log.info("measured already, the table is from %s (overwrite=true measures again)", out)
        show(known["metrics"], known["protocol"])
        return known["metrics"]
    loaded.task.to(wanted_device(config.device))
    loaded.task.to_pixels = partial(to_pixels, size=config.eval_size, rounding=config.rounding)
    images = reference_images(config, loaded, size=config.eval_size if loaded.kind == "gpt" else None)
    measure = evaluate_tokenizer if loaded.kind == "tokenizer" else evaluate_generator
    values = measure(config, loaded, images)
    found = {
        "ckpt": str(config.ckpt),
        "step": loaded.step,
        "ema": config.ema,
        "reference": f"{images.path}, {images.num_val} validation images",
        "eval_size": config.eval_size or images.image_size,
        "features": next((key.split("_", 1)[1] for key in values if key.startswith(("fid_", "rfid_"))), None),
    }
    if loaded.kind == "gpt":
        found |= {"num_samples": config.num_samples, "labels": "balanced", "seed": config.seed}
        found |= {f"sampling.{key}": value for key, value in config.sampling.items() if key != "_target_"}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, {"metrics": values, "protocol": found, "requested": protocol})
    show(values, found)
    record(config, experiment=f"evaluate_{loaded.kind}", params=found, metrics=values, artifacts=[out])
    log.info("written to %s", out)
    return values


def requested(config: DictConfig) -> dict[str, Any]:
    """What decides the numbers: all settings, and the checkpoint's size and time."""
    plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    for key in ("paths", "out", "device", "mlflow", "overwrite", "batch_size"):
        plain.pop(key)
    path = Path(config.ckpt)
    stat = path.stat() if path.exists() else None
    return plain | {"file": [stat.st_size, stat.st_mtime_ns] if stat else None}


def reference_images(config: DictConfig, loaded: LoadedTask, *, size: int | None = None) -> ImageShards:
    """The images of the checkpoint's own run, or those of ``images=``; ``size`` px instead of the run's if given."""
    if loaded.kind == "tokenizer":
        node = dict(loaded.config.get("data") or {})
    else:
        callbacks = loaded.config.get("callbacks") or {}
        node = dict((callbacks.get("generation") or {}).get("reference") or {})
    if not node and config.images is None:
        raise ValueError(f"{config.ckpt} knows of no reference images; give images=FOLDER of image shards")
    if config.images is not None:
        node = {
            "_target_": "smalto.data.images.ImageShards",
            "image_size": decoder(loaded).image_size,
            "augment": "center_crop",
            "flip_prob": 0.0,
            **node,
            "path": config.images,
        }
    if size is not None:
        node |= {"image_size": size, "augment": "center_crop"}
    node |= {
        "batch_size": config.batch_size,
        "val_batch_size": config.batch_size,
        "seed": 0,
        "num_workers": 0,
    }
    check_targets(node)
    data = build(node)
    data.setup("validate")
    if data.num_val == 0:
        raise ValueError(f"{node['path']} has no validation images; prepare with val_fraction > 0")
    return data


def decoder(loaded: LoadedTask) -> Any:
    """What makes pictures: the network of a tokenizer, the tokenizer of a generator."""
    found = loaded.task.tokenizer if loaded.kind == "gpt" else loaded.task.net
    if found is None:
        raise ValueError("this generator carries no tokenizer; give tokenizer_ckpt=PATH to see pictures")
    return found


def evaluate_tokenizer(config: DictConfig, loaded: LoadedTask, images: ImageShards) -> dict[str, float]:
    """PSNR, SSIM, LPIPS, rFID and codebook usage over the validation images."""
    task = loaded.task
    psnr, ssim = PSNR().to(task.device), SSIM(data_range=config.ssim_data_range).to(task.device)
    usage = CodebookUsage(codebook_size=task.codebook_size).to(task.device)
    suite = GenerationMetrics(features=build(config.features), kind="reconstruction").to(task.device)
    perceptual = build(config.perceptual)().to(task.device).eval() if config.perceptual else None
    resized = config.eval_size not in (None, images.image_size)
    # PSNR and SSIM compare with the resized image, rFID with images cropped at that size, as the authors do.
    originals = iter(reference_images(config, loaded, size=config.eval_size).val_dataloader() if resized else ())
    distance = 0.0
    with progress("reconstruct", total=images.num_val) as advance, torch.inference_mode():
        for batch in images.val_dataloader():
            image = batch["image"].to(task.device)
            rebuilt, codes = task.reconstruct(image)
            suite.update_real(next(originals)["image"].to(task.device) if resized else image)
            suite.update_fake(rebuilt)
            usage.update(codes)
            image = task.to_pixels(to_float(image)) if resized else image
            for metric in (psnr, ssim):
                metric.update(rebuilt, image)
            if perceptual is not None:
                distance += float(perceptual(rebuilt / 127.5 - 1, image / 127.5 - 1).sum())
            advance(len(image))
    values = {"psnr": float(psnr.compute()), "ssim": float(ssim.compute())}
    values |= {f"codebook_{key}": float(value) for key, value in usage.compute().items()}
    if perceptual is not None:
        values[perceptual.name] = distance / images.num_val
    return values | suite.compute()


def evaluate_generator(config: DictConfig, loaded: LoadedTask, images: ImageShards) -> dict[str, float]:
    """FID, IS, precision, recall and class accuracy of samples; loss against what code counts alone would reach."""
    task, sampling = loaded.task, build(config.sampling)
    suite = GenerationMetrics(features=build(config.features), num_classes=images.num_classes).to(task.device)
    with progress("reference", total=images.num_val) as advance:
        for batch in images.val_dataloader():
            suite.update_real(batch["image"].to(task.device), batch["label"])
            advance(len(batch["image"]))
    suite.finish_real()
    classes = range(task.net.conditioner.num_classes)

    def measure(name: str, draw: Any) -> dict[str, float]:
        suite.reset_fake()
        with progress(name, total=config.num_samples) as advance:
            for start in range(0, config.num_samples, config.batch_size):
                indices = range(start, min(start + config.batch_size, config.num_samples))
                labels, seeds = balanced_labels(indices, classes), image_seeds(config.seed, indices)
                suite.update_fake(draw(labels, seeds), labels)
                advance(len(indices))
        return suite.compute()

    values = measure("samples", lambda labels, seeds: task.sample_images(labels, sampling=sampling, seeds=seeds))
    per_class = dict(zip(loaded.classes, suite.per_class_accuracy, strict=False))
    if per_class:
        log.info("class accuracy: %s", ", ".join(f"{name} {value:.0%}" for name, value in per_class.items()))
    codes = code_shards(loaded)
    if codes is None:
        return values
    loss, counts = validation_loss(loaded, codes)
    values |= loss
    if config.baselines:
        generator = torch.Generator().manual_seed(config.seed)
        uniform = torch.ones_like(counts, dtype=torch.float)
        for name, weights in {"uniform_codes": uniform, "position_frequencies": counts.float()}.items():
            found = measure(name, lambda labels, seeds, w=weights: draw_codes(task, w, len(labels), generator))
            values |= {f"{name}/{key}": value for key, value in found.items() if key.startswith("fid_")}
    return values


def code_shards(loaded: LoadedTask) -> Any:
    """The codes the generator was trained on, None if they are gone."""
    node = loaded.config.get("data")
    if not node:
        log.warning("no validation loss: the checkpoint does not say on which codes it was trained")
        return None
    check_targets(node)
    try:
        data = build(node)
        data.setup("validate")
    except FileNotFoundError as error:
        log.warning("no validation loss: %s", error)
        return None
    return data


@torch.inference_mode()
def validation_loss(loaded: LoadedTask, data: Any) -> tuple[dict[str, float], Tensor]:
    """Teacher-forced loss in nats and accuracy, beside the loss of code counts; and the counts per position (L, K)."""
    task = loaded.task
    total = correct = 0.0
    validation = []
    for batch in data.val_dataloader():
        codes = batch["codes"].to(task.device)
        condition, mask = task.condition(batch)
        logits = task.net(codes, condition.to(task.device), mask).float()
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="sum"))
        correct += float((logits.argmax(-1) == codes).sum())
        validation.append(codes.cpu())
    counts = torch.zeros(task.net.num_codes, task.net.vocab_size, dtype=torch.int64)
    for batch in data.train_dataloader():
        counts += position_counts(batch["codes"], task.net.vocab_size)
    every = torch.cat(validation)
    unigram, positional = unigram_nll(counts, every)
    loss = total / every.numel()
    return {
        "loss": loss,
        "accuracy": correct / every.numel(),
        "bits_per_image": loss * every.shape[1] / math.log(2),
        "unigram_entropy": float(unigram_entropy(counts.sum(0))),
        "unigram_loss": unigram,
        "position_unigram_loss": positional,
    }, counts


def draw_codes(task: Any, weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Pictures of codes drawn position by position from ``weights`` (L, K), blind to each other."""
    codes = torch.multinomial(weights, count, replacement=True, generator=generator).T
    return task.decode_codes(codes.to(task.device))


def show(values: dict[str, float], protocol: dict[str, Any]) -> None:
    """The table, to stdout."""
    table = Table(title="smalto evaluate", title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in values.items():
        table.add_row(key, f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}")
    console = Console(soft_wrap=True)
    console.print(table)
    console.print("\n".join(f"{key}: {value}" for key, value in protocol.items()), highlight=False)


main = hydra_main("evaluate")(run)

if __name__ == "__main__":
    main()
