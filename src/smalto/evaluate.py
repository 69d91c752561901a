"""``smalto evaluate``: a checkpoint or images to a table of metrics, on screen, as JSON and in MLflow."""

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from omegaconf import DictConfig, ListConfig
from torch import Tensor

from smalto.data.picture_sets import open_pictures
from smalto.data.ranks import Ranks
from smalto.data.transforms import to_pixels
from smalto.errors import InputError, PathInUse
from smalto.evaluation.generator import SampleRows, measure_generator
from smalto.evaluation.pairs import from_sets, from_tokenizer, measure_pairs
from smalto.evaluation.references import describe, find_reference
from smalto.evaluation.report import Measured, flat, show
from smalto.evaluation.samples import from_pictures, settings_grid
from smalto.evaluation_job import Job, code_shards, decoder, reference_images, requested
from smalto.files import write_json
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.metrics.reference import Reference
from smalto.metrics.rules import Rules
from smalto.metrics.scores import Scores
from smalto.metrics.suite import GenerationMetrics
from smalto.runtime import build, hydra_main, record
from smalto.sampling.packed import resolve_dtype
from smalto.sampling.writer import PictureFolder, pack_npz
from smalto.tasks.checkpoint import load_task
from smalto.tokenizers.precision import use_bf16

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
    with Ranks() as ranks:
        job = Job(config, ranks, loaded, requested(config))
        known = json.loads(job.out.read_text()) if job.out.exists() else {}
        saved = job.save is None or job.save.exists()  # a table kept earlier has no images to give
        if known.get("requested") == job.requested and saved and not config.overwrite:
            rows = [Measured.from_plain(row) for row in known["rows"]]
            log.info("measured already, the table is from %s (overwrite=true measures again)", job.out)
        else:
            claim_save(job)
            ranks.wait()  # nobody looks for what is there after the first has written
            rows = measure(job)
            known = {"protocol": job.protocol}
            if ranks.first:
                keep(job, rows)
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
    if config.reference_split not in ("train", "val"):
        problems.append(f"reference_split is {config.reference_split!r}, must be train or val")
    if config.batch_size < 1:
        problems.append(f"batch_size is {config.batch_size}, must be at least 1")
    if min(counts(config)) < 2:
        problems.append(f"num_samples is {config.num_samples}, every count must be at least 2")
    if problems:
        raise InputError("; ".join(problems))


def counts(config: DictConfig, at_hand: int | None = None) -> list[int]:
    """Numbers of samples to measure at, ascending; of ``at_hand`` finished images all, if nothing else is asked for."""
    wanted = config.num_samples
    if wanted is None:
        wanted = at_hand if at_hand and not config.protocol.published else config.protocol.num_samples
    return sorted(wanted) if isinstance(wanted, ListConfig) else [wanted]


def claim_save(job: Job) -> None:
    """Refuse to write images among others; what this very evaluation left when it was interrupted is its own."""
    save = job.save
    if save is None or job.config.overwrite or job.part_dir.exists():
        return
    if save.exists() and (not save.is_dir() or any(save.iterdir())):
        raise PathInUse(f"save={save} is in use; give a new folder, or overwrite=true to write into it")
    job.part_dir.mkdir(parents=True, exist_ok=True)


def measure(job: Job) -> list[Measured]:
    """All rows; other ranks than the first may get none."""
    config, loaded = job.config, job.loaded
    features: FeatureExtractor = build(config.features).to(job.device)
    job.protocol |= {"protocol": config.protocol.name, "features": features.name}
    if loaded is not None:
        loaded.task.to(job.device)
        loaded.task.engine = build(config.engine)
        job.protocol["pictures"] = "bf16" if use_bf16(config.engine.decode, job.device) else "fp32"
        if loaded.kind == "gpt":
            job.protocol["decoding"] = resolve_dtype(config.engine.dtype, job.device)
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
    if loaded is None and config.samples is None:
        return [Measured(Scores(values={"reference_images": float(reference.gaussian.n or 0)}))]
    if job.kind == "reconstruction":
        return [Measured(measure_reconstructions(job, reference, features, path, size))]
    return measure_generation(job, reference, features)


def measure_reconstructions(
    job: Job, reference: Reference, features: FeatureExtractor, path: Path, size: int | None
) -> Scores:
    """PSNR, SSIM, LPIPS, rFID and codebook usage of a tokenizer, or of two sets that belong together."""
    config, loaded = job.config, job.loaded
    originals = open_pictures(path, image_size=size, split=config.reference_split)
    count = min(config.reference_limit or len(originals), len(originals))
    pairs = (
        from_sets(originals, open_pictures(config.samples, image_size=config.image_size, split=None))
        if loaded is None
        else from_tokenizer(loaded.task, originals)
    )
    perceptual = build(config.perceptual)().to(job.device).eval() if config.perceptual else None
    metrics = ReconstructionMetrics(
        features=features,
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
        keep=None if job.save is None or loaded is None else pair_writer(job.save),
    )


def measure_generation(job: Job, reference: Reference, features: FeatureExtractor) -> list[Measured]:
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
        save=None if loaded is None else job.save,
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


def keep(job: Job, rows: list[Measured]) -> None:
    """JSON, the measured images packed, one MLflow run per row, and an end to what was put aside."""
    if job.save is not None and job.save.is_dir():
        for folder in sorted(path for path in job.save.iterdir() if path.is_dir()):
            pack_npz(PictureFolder(folder), len(list(folder.glob("*.png"))), folder.with_suffix(".npz"))
    job.out.parent.mkdir(parents=True, exist_ok=True)
    plain = {"metrics": flat(rows), "rows": [row.plain() for row in rows]}
    write_json(job.out, plain | {"protocol": job.protocol, "requested": job.requested})
    for row in rows:
        varied = {key if key == "num_samples" else f"sampling.{key}": value for key, value in row.settings.items()}
        params = job.protocol | varied
        record(job.config, experiment=job.name, params=params, metrics=row.scores.logged(), artifacts=[job.out])
    shutil.rmtree(job.part_dir, ignore_errors=True)
    log.info("written to %s", job.out)


def pair_writer(save: Path) -> Callable[[range, Tensor, Tensor], None]:
    """Write originals and reconstructions side by side."""
    originals, reconstructions = (PictureFolder(save / name) for name in ("originals", "reconstructions"))

    def write(indices: range, image: Tensor, rebuilt: Tensor) -> None:
        originals.write(indices, image)
        reconstructions.write(indices, rebuilt)

    return write


main = hydra_main("evaluate")(run)

if __name__ == "__main__":
    main()
