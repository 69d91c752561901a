"""``smalto evaluate``: a checkpoint or images to a table of metrics, on screen, as JSON and in MLflow."""

import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from omegaconf import DictConfig, ListConfig
from torch import Tensor

from smalto.data.picture_sets import PictureSet, open_pictures
from smalto.data.ranks import Ranks
from smalto.data.transforms import to_pixels
from smalto.errors import InputError
from smalto.evaluation.generator import SampleRows, measure_generator
from smalto.evaluation.pairs import from_sets, from_tokenizer, match, measure_pairs
from smalto.evaluation.references import describe, find_reference
from smalto.evaluation.report import Measured, flat, show
from smalto.evaluation.samples import from_pictures, settings_grid
from smalto.evaluation.saved import SavedPictures
from smalto.evaluation_job import Job, code_shards, decoder, reference_images, requested
from smalto.evaluation_start import Networks, begin, computes, identity, is_reference_alone
from smalto.files import FileLock, write_json
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.metrics.reference import Reference
from smalto.metrics.rules import Rules
from smalto.metrics.scores import Scores
from smalto.metrics.suite import GenerationMetrics
from smalto.nn.tf32 import tf32_allowed
from smalto.runtime import build, hydra_main, record
from smalto.tasks.checkpoint import load_task

log = logging.getLogger(__name__)

GRID = {"guidance_scales": "cfg_scale", "top_ks": "top_k", "top_ps": "top_p", "temperatures": "temperature"}
"""Lists of the command, and the fields of `SamplingConfig` they are of."""


def run(config: DictConfig) -> dict[str, float]:
    """Measure ``ckpt`` or ``samples`` against ``reference``; with neither, measure and keep the reference.

    Started by ``torchrun`` all processes share the work. What an interrupted evaluation finished is kept.

    Raises:
        ValueError: nothing to measure or to compare with, settings out of range, a reference of the wrong kind.
        FileNotFoundError: a path that is not there.
        FileExistsError: ``save`` is a folder with something else in it.
    """
    check(config)
    loaded = None
    if config.ckpt is not None:
        loaded = load_task(config.ckpt, tokenizer_ckpt=config.tokenizer_ckpt, ema=config.ema, verify=config.verify)
    with Ranks() as ranks, ExitStack() as stack:
        job = Job(config, ranks, loaded, requested(config))
        networks = Networks(config, job)
        job.requested["measured"] = ranks.decide(partial(identity, job, networks))
        saved = None if job.save is None else SavedPictures(job.save, job.key, first=ranks.first)
        lock = FileLock(job.out.with_name(f"{job.out.name}.lock"))
        stack.callback(lock.release)
        known = ranks.decide(partial(begin, job, saved, lock))
        if known is not None:
            rows = [Measured.from_plain(row) for row in known["rows"]]
            log.info("measured already, the table is from %s (overwrite=true measures again)", job.out)
        else:
            rows = measure(job, networks, saved)
            known = {"protocol": job.protocol}
            if ranks.first:
                keep(job, rows, saved)
        if ranks.first:
            show(rows, known["protocol"])
    return flat(rows)


def check(config: DictConfig) -> None:
    """Refuse contradictory requests before anything is loaded; all problems at once."""
    problems = []
    if config.ckpt is not None and config.samples is not None:
        problems.append("ckpt and samples are both given; measure one at a time")
    if config.ckpt is None and config.reference is None:
        problems.append("nothing to measure: give ckpt=CHECKPOINT, or samples=IMAGES reference=IMAGES")
    if config.kind not in (None, "generation", "reconstruction"):
        problems.append(f"kind is {config.kind!r}, must be generation or reconstruction, or null for the usual one")
    if config.kind is not None and config.ckpt is not None:
        problems.append("kind is for samples=; a checkpoint says itself what it is")
    if config.protocol.labels not in ("balanced", "random"):
        problems.append(f"protocol.labels is {config.protocol.labels!r}, must be balanced or random")
    if config.pairing not in ("name", "order"):
        problems.append(f"pairing is {config.pairing!r}, must be name or order")
    if config.save is not None and config.ckpt is None:
        problems.append("save is for ckpt=: it keeps the images a checkpoint makes; samples are files already")
    if config.reference_split not in ("train", "val"):
        problems.append(f"reference_split is {config.reference_split!r}, must be train or val")
    if config.batch_size < 1:
        problems.append(f"batch_size is {config.batch_size}, must be at least 1")
    if min(counts(config)) < 2:
        problems.append(f"num_samples is {config.num_samples}, every count must be at least 2")
    if problems:
        raise InputError("; ".join(problems))
    build(config.protocol.rules)  # says itself what is wrong


def counts(config: DictConfig, at_hand: int | None = None) -> list[int]:
    """Numbers of samples to measure at, ascending; of ``at_hand`` finished images all, if nothing else is asked for."""
    wanted = config.num_samples
    if wanted is None:
        wanted = at_hand if at_hand and not config.protocol.published else config.protocol.num_samples
    return sorted(wanted) if isinstance(wanted, ListConfig) else [wanted]


def measure(job: Job, networks: Networks, saved: SavedPictures | None) -> list[Measured]:
    """All rows; other ranks than the first may get none."""
    config, loaded, features = job.config, job.loaded, networks.features
    job.protocol |= {"protocol": config.protocol.name, "features": features.name, "tf32": tf32_allowed()}
    if loaded is not None:
        loaded.task.to(job.device)
        loaded.task.engine = build(config.engine)
        job.protocol |= computes(job)
        size, rounding = config.protocol.eval_size, config.protocol.rounding
        loaded.task.to_pixels = partial(to_pixels, size=size, rounding=rounding)
        job.protocol |= {"ckpt": str(config.ckpt), "step": loaded.step, "ema": config.ema, "rounding": rounding}
        job.protocol["eval_size"] = size or decoder(loaded).image_size
    elif config.samples is not None:
        job.protocol["samples"] = str(config.samples)
    path, size = reference_images(job)
    reference = find_reference(
        path,
        features=features,
        kind=job.kind,
        rules=build(config.protocol.rules),
        cache_dir=config.paths.references,
        image_size=config.protocol.eval_size or size,
        split=config.reference_split,
        limit=config.reference_limit,
        batch_size=config.batch_size,
        rank=job.ranks.rank,
        world_size=job.ranks.world_size,
    )
    job.protocol |= describe(reference)
    if is_reference_alone(job):
        return [Measured(Scores(values={"reference_images": float(reference.gaussian.n or 0)}))]
    if job.kind == "reconstruction":
        originals = open_pictures(path, image_size=size, split=config.reference_split)
        return [Measured(measure_reconstructions(job, reference, networks, originals, saved))]
    return measure_generation(job, reference, features, saved)


def measure_reconstructions(
    job: Job, reference: Reference, networks: Networks, originals: PictureSet, saved: SavedPictures | None
) -> Scores:
    """PSNR, SSIM, LPIPS, rFID and codebook usage of a tokenizer, or of two sets that belong together."""
    config, loaded = job.config, job.loaded
    count = min(config.reference_limit or len(originals), len(originals))
    if loaded is None:
        rebuilt = open_pictures(config.samples, image_size=config.image_size, split=None)
        _, job.protocol["pairs"] = match(originals, rebuilt, pairing=config.pairing)
        pairs = from_sets(originals, rebuilt, pairing=config.pairing)
    else:
        pairs = from_tokenizer(loaded.task, originals)
    perceptual = networks.perceptual
    metrics = ReconstructionMetrics(
        features=networks.features,
        perceptual=perceptual,
        perceptual_name=getattr(perceptual, "name", "lpips"),
        codebook_size=None if loaded is None else loaded.task.codebook_size,
        ssim_data_range=config.protocol.ssim_data_range,
        reference=reference,
    ).to(job.device)
    job.protocol["ssim_data_range"] = config.protocol.ssim_data_range
    return measure_pairs(
        pairs,
        count=count,
        metrics=metrics,
        part_file=job.part_dir / "pairs",
        batch_size=config.batch_size,
        ranks=job.ranks,
        keep=None if saved is None else pair_writer(saved, count),
    )


def measure_generation(
    job: Job, reference: Reference, features: FeatureExtractor, saved: SavedPictures | None
) -> list[Measured]:
    """FID, sFID, IS, KID, precision, recall and more of a generator, or of images made elsewhere."""
    config, loaded = job.config, job.loaded
    rules: Rules = build(config.protocol.rules)
    job.protocol |= {
        "is_rule": f"splits of {rules.split_size} in sample order, remainder {rules.split_remainder}",
        "precision_recall": f"k={rules.num_neighbours}, {rules.distance_dtype}, {len(reference.pool)} real features",
        "kid_rule": f"{rules.kid_subsets} subsets of {rules.kid_subset_size}",
    }
    wanted, classes = counts(config), None
    if loaded is not None:
        classes = getattr(loaded.task.net.conditioner, "num_classes", None)
        if classes is None:
            raise InputError(f"{config.ckpt} is conditioned on text; class-conditional generators are measured here")
    else:
        pictures = open_pictures(config.samples, image_size=config.image_size, split=None)
        wanted, side = counts(config, len(pictures)), pictures.read(range(1)).shape[-1]
        if side != (config.protocol.eval_size or side):
            raise InputError(
                f"{config.samples} has images of {side} px, protocol={config.protocol.name} measures at "
                f"{config.protocol.eval_size}; they must be resized before they are rounded (smalto sample eval_size="
                f"{config.protocol.eval_size}), or set protocol.eval_size=null to measure them as they are"
            )
        if max(wanted) > len(pictures):
            raise InputError(
                f"{config.samples} holds {len(pictures)} images, {max(wanted)} are needed (num_samples, or protocol="
                f"{config.protocol.name}); FID depends on the number, so fewer are not taken silently: give num_samples"
            )
    if len(wanted) == 1:
        job.protocol["num_samples"] = wanted[0]
    rows = SampleRows(
        suite=GenerationMetrics(
            features=features, reference=reference, num_classes=classes, rules=rules, distributed=False
        ).to(job.device),
        counts=wanted,
        part_dir=job.part_dir,
        batch_size=config.batch_size,
        ranks=job.ranks,
        save=saved,
    )
    if loaded is None:
        return rows.measure(from_pictures(pictures), settings={})
    base, lists = build(config.sampling), dict(zip(GRID.values(), (config[key] for key in GRID), strict=True))
    varied = [name for name, values in lists.items() if values]
    job.protocol |= {"labels": config.protocol.labels, "seed": config.seed}
    job.protocol |= {f"sampling.{name}": value for name, value in vars(base).items() if name not in varied}
    return measure_generator(
        loaded.task,
        rows=rows,
        grid=[({n: getattr(one, n) for n in varied}, one) for one in settings_grid(base, **lists)],
        classes=loaded.classes,
        labels=config.protocol.labels,
        seed=config.seed,
        codes=code_shards(loaded),
        baselines=config.baselines,
    )


def keep(job: Job, rows: list[Measured], saved: SavedPictures | None) -> None:
    """JSON, the measured images packed, one MLflow run per row, and an end to what was put aside."""
    if saved is not None:
        saved.finish()
    plain = {"metrics": flat(rows), "rows": [row.plain() for row in rows]}
    write_json(job.out, plain | {"protocol": job.protocol, "requested": job.requested})
    for row in rows:
        varied = {key if key == "num_samples" else f"sampling.{key}": value for key, value in row.settings.items()}
        params = job.protocol | varied
        record(job.config, experiment=job.name, params=params, metrics=row.scores.logged(), artifacts=[job.out])
    shutil.rmtree(job.part_dir, ignore_errors=True)
    log.info("written to %s", job.out)


def pair_writer(saved: SavedPictures, count: int) -> Callable[[range, Tensor, Tensor], None]:
    """Write originals and reconstructions side by side."""
    originals, reconstructions = (saved.folder(name, count) for name in ("originals", "reconstructions"))

    def write(indices: range, image: Tensor, rebuilt: Tensor) -> None:
        originals.write(indices, image)
        reconstructions.write(indices, rebuilt)

    return write


main = hydra_main("evaluate")(run)

if __name__ == "__main__":
    main()
