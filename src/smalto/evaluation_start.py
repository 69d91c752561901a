"""Before ``smalto evaluate`` measures: what exactly is asked for, and whether that was measured already."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from smalto.data.ranks import PATIENCE
from smalto.errors import PathInUse
from smalto.evaluation.identity import checkpoint_identity, codes_identity, pictures_identity
from smalto.evaluation.references import memory
from smalto.evaluation.saved import SavedPictures
from smalto.evaluation_job import Job, reference_images
from smalto.files import FileLock
from smalto.metrics.features import FeatureExtractor
from smalto.runtime import build
from smalto.tasks.checkpoint import fingerprint
from smalto.tokenizers.precision import use_bf16

log = logging.getLogger(__name__)


class Networks:
    """Those that measure, on the device of this process: ``features``, and ``perceptual`` where pairs are measured."""

    def __init__(self, config: DictConfig, job: Job) -> None:
        self.features: FeatureExtractor = build(config.features).to(job.device)
        wanted = config.get("perceptual") and job.kind == "reconstruction" and not is_reference_alone(job)
        self.perceptual = build(config.perceptual)().to(job.device).eval() if wanted else None


def identity(job: Job, networks: Networks) -> dict[str, Any]:
    """What decides the numbers beside the settings: what is in the files, and how this machine computes."""
    config, loaded, hashes = job.config, job.loaded, memory(job.config.paths.references)
    path, size = reference_images(job)
    found: dict[str, Any] = {
        "reference": pictures_identity(
            path, image_size=config.protocol.eval_size or size, split=config.reference_split, memory=hashes
        ),
        "networks": [fingerprint(net) for net in (networks.features, networks.perceptual) if net is not None],
        "features": networks.features.name,
    }
    if config.samples is not None:
        samples = Path(config.samples)
        found["samples"] = pictures_identity(samples, image_size=config.image_size, split=None, memory=hashes)
    if loaded is not None:
        found["checkpoint"] = checkpoint_identity(loaded)
        found["computes"] = computes(job)
        if loaded.kind == "gpt":
            found["codes"] = codes_identity(loaded.config.get("data"), memory=hashes)
    return found


def computes(job: Job) -> dict[str, str]:
    """The types a checkpoint's networks really compute in on this device."""
    assert job.loaded is not None
    found = {"pictures": "bf16" if use_bf16(job.config.engine.decode, job.device) else "fp32"}
    return found | ({"decoding": build(job.config.engine).computes_in(job.device)} if job.loaded.kind == "gpt" else {})


def begin(job: Job, saved: SavedPictures | None, lock: FileLock) -> dict[str, Any] | None:
    """The table if it is there; else the right to make it, once nobody else is doing so."""
    known = finished(job, saved)
    if known is not None:
        return known
    job.out.parent.mkdir(parents=True, exist_ok=True)
    if not lock.try_acquire():
        log.info("waiting for %s, which makes %s", lock.owner() or "another process", job.out)
        lock.acquire(patience=PATIENCE.total_seconds())
        known = finished(job, saved)
    if known is None and saved is not None and not saved.claim(overwrite=job.config.overwrite):
        shutil.rmtree(job.part_dir, ignore_errors=True)  # features of images that are not kept
    return known


def finished(job: Job, saved: SavedPictures | None) -> dict[str, Any] | None:
    """The table of this very request, None if it is not there, or without the images that are asked for."""
    if job.config.overwrite or not job.out.exists():
        return None
    try:
        known = json.loads(job.out.read_text())
        asked, _ = known["requested"], known["rows"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PathInUse(
            f"{job.out} is not a table of smalto evaluate; give another out=, or overwrite=true to replace it"
        ) from error
    return known if asked == job.requested and (saved is None or saved.is_finished()) else None


def is_reference_alone(job: Job) -> bool:
    """Whether there is nothing to compare with the reference: it is measured and kept."""
    return job.loaded is None and job.config.samples is None
