"""The real side of a comparison: found in a file, or measured once and kept."""

import hashlib
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smalto.data.npz_images import IMAGES_KEY, npz_names, read_npz_statistics
from smalto.data.picture_sets import PictureSet, Split, open_pictures
from smalto.data.progress import progress
from smalto.data.ranks import agreed, from_first, shared_device
from smalto.errors import InputError, MissingFile, PathInUse
from smalto.evaluation.begun import Begun, batches
from smalto.metrics.distribution import Gaussian
from smalto.metrics.features import FeatureExtractor
from smalto.metrics.reference import VERSION, Kind, Reference, chain_hash, is_reference_file
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics
from smalto.tasks.checkpoint import fingerprint

log = logging.getLogger(__name__)


def find_reference(
    path: str | Path,
    *,
    features: FeatureExtractor,
    kind: Kind,
    rules: Rules,
    cache_dir: str | Path,
    image_size: int | None = None,
    split: Split = "val",
    limit: int | None = None,
    batch_size: int = 100,
    rank: int = 0,
    world_size: int = 1,
) -> Reference:
    """Statistics of real images, from a file that has them, from the cache, or measured and put there.

    Args:
        path: a reference file of smalto; an ADM ``.npz`` with statistics, images or both; a folder of images; shards.
        features: the extractor, on the device where it is to work.
        kind: what will be compared with it.
        rules: for the number of features kept.
        cache_dir: where measured references are kept, by everything that decides them.
        image_size: see `open_pictures`.
        split: see `open_pictures`.
        limit: only the first so many images.
        batch_size: images read together.
        rank: of this process; several share the work if they are joined in a process group, and all must call.
        world_size: number of processes.

    Raises:
        FileNotFoundError: nothing at ``path``.
        ValueError: a reference of another kind or extractor, statistics that cannot be used with it, bad images.
    """
    path = Path(path)
    # Each looks at its own disk, so all compare notes before any of them counts on the others.
    is_reference = from_first(path.is_file() and is_reference_file(path), world_size=world_size)
    if is_reference:
        return agreed(lambda: Reference.load(path, extractor=features.name, kind=kind), world_size=world_size)

    def look() -> tuple[Reference | None, PictureSet | None]:
        statistics = _usable_statistics(path, features, kind) if path.suffix == ".npz" else None
        if statistics is not None and IMAGES_KEY not in npz_names(path):
            return statistics, None
        return statistics, open_pictures(path, image_size=image_size, split=split)

    statistics, pictures = agreed(look, world_size=world_size)
    if pictures is None:
        assert statistics is not None
        return statistics
    measured = measured_reference(
        pictures,
        features=features,
        kind=kind,
        rules=rules,
        cache_dir=cache_dir,
        limit=limit,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
    )
    if statistics is None:
        return measured
    return replace(measured, gaussian=statistics.gaussian, spatial=statistics.spatial, protocol=statistics.protocol)


def measured_reference(
    pictures: PictureSet,
    *,
    features: FeatureExtractor,
    kind: Kind,
    rules: Rules,
    cache_dir: str | Path,
    limit: int | None = None,
    batch_size: int = 100,
    rank: int = 0,
    world_size: int = 1,
) -> Reference:
    """See `find_reference`; an interrupted measurement goes on where it was."""
    count = len(pictures) if limit is None else min(limit, len(pictures))
    known: Reference | None = None
    file = Path()
    if rank == 0:
        file = cache_file(pictures, features=features, kind=kind, rules=rules, cache_dir=cache_dir, count=count)
        known = _kept(file, features, kind)
    # decided by one: while others look, the file may appear
    file, is_known = from_first((file, known is not None), world_size=world_size)
    if is_known:
        log.info("reference: %s, measured before", file)
        return agreed(lambda: known or Reference.load(file, extractor=features.name, kind=kind), world_size=world_size)
    suite = GenerationMetrics(features=features, num_classes=pictures.num_classes, kind=kind, rules=rules)
    device = next(features.parameters(), torch.zeros(0)).device
    suite.to(shared_device(device))
    features.to(device)  # the sums may lie elsewhere, the network stays
    todo = list(batches(range(count), batch_size))[rank::world_size]
    begun = Begun(file.with_suffix(f".part{rank}of{world_size}x{batch_size}.pt"), suite)
    done, content = begun.restore("")
    finished = sum(map(len, todo[:done]))
    with progress("reference", total=sum(map(len, todo)), done=finished) as advance:
        for number, block in enumerate(todo[done:], start=done + 1):
            image = pictures.read(block)
            if world_size == 1:  # a chain needs all images in order
                content = chain_hash(content, image)
            label = None if pictures.labels is None else pictures.labels[block.start : block.stop]
            suite.update_real_features(features(image.to(device)).to(suite.device), label)
            advance(len(block))
            begun.save(number, content)
    protocol = pictures.settings | {"num_images": count}
    reference = suite.finish_real(images=str(pictures.path), content=content, protocol=protocol)
    if rank == 0:
        _keep(reference, file)
    begun.remove()
    return reference


def _kept(file: Path, features: FeatureExtractor, kind: Kind) -> Reference | None:
    """What was measured before; a file that cannot be read is removed with a warning."""
    try:
        return Reference.load(file, extractor=features.name, kind=kind)
    except MissingFile:
        return None
    except InputError as error:
        log.warning("%s; measuring the images again", error)
        file.unlink(missing_ok=True)
        return None


def _keep(reference: Reference, file: Path) -> None:
    """Save it, unless another process that measured the same images was first."""
    try:
        reference.save(file)
        log.info("reference: kept as %s", file)
    except PathInUse:
        theirs = Reference.load(file, extractor=reference.extractor, kind=reference.kind)
        if theirs.content and reference.content and theirs.content != reference.content:
            raise
        log.info("reference: %s was kept by another process meanwhile", file)


def cache_file(
    pictures: PictureSet,
    *,
    features: FeatureExtractor,
    kind: Kind,
    rules: Rules,
    cache_dir: str | Path,
    count: int,
) -> Path:
    """Where the reference of these images is kept; another name as soon as anything that decides it differs."""
    decisive = {
        "version": VERSION,
        "images": pictures.fingerprint(memory(cache_dir)),
        "network": fingerprint(features),
        "settings": {key: value for key, value in pictures.settings.items() if key != "path"},
        "count": count,
        "max_pool": rules.max_pool,
    }
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cache_dir) / f"{pictures.path.stem or 'images'}-{kind}-{features.name}-{key}.npz"


def memory(cache_dir: str | Path) -> Path:
    """Where `content_hash` remembers what it read, beside the references."""
    return Path(cache_dir).parent / "hashes"


def _usable_statistics(path: Path, features: FeatureExtractor, kind: Kind) -> Reference | None:
    """What an ADM file says of the training images; None if it says nothing that this extractor can use."""
    found = read_npz_statistics(path)
    if found is None:
        return None
    if kind == "reconstruction":
        raise InputError(
            f"{path} holds statistics of a training set; reconstructions are compared with the images they were made "
            "from, in the same crop: give those images (with the wrong ones an rFID of 2.19 was measured as 4.28)"
        )
    if features.name != "inception":
        if IMAGES_KEY not in npz_names(path):
            raise InputError(
                f"{path} holds statistics of Inception features and no images, this run uses {features.name}; choose "
                "features=inception, or a reference with images"
            )
        log.warning("%s: its statistics are Inception's; %s is measured on its images instead", path, features.name)
        return None
    if len(found.mu) != features.num_features or (found.mu_s is not None and len(found.mu_s) != features.num_spatial):
        raise InputError(
            f"{path}: mu has {len(found.mu)} features, Inception gives {features.num_features} (and "
            f"{features.num_spatial} spatial ones); it was made with another network"
        )
    spatial = (
        None if found.mu_s is None else Gaussian(torch.from_numpy(found.mu_s), torch.from_numpy(found.sigma_s), None)
    )
    return Reference(
        extractor=features.name,
        kind=kind,
        images=str(path),
        gaussian=Gaussian(torch.from_numpy(found.mu), torch.from_numpy(found.sigma), None),
        pool=torch.zeros(0, features.num_features),
        classes=None,
        spatial=spatial,
        protocol={"path": str(path), "statistics": "from the file"},
    )


def describe(reference: Reference) -> dict[str, Any]:
    """What a table says of a reference."""
    gaussian = reference.gaussian
    size: Tensor | int | str = "unknown" if gaussian.n is None else gaussian.n
    return {
        "reference": reference.images,
        "reference_kind": reference.kind,
        "reference_images": size,
        "reference_hash": reference.content[:12] or "not known",
        **{f"reference_{key}": value for key, value in reference.protocol.items() if key not in ("path", "num_images")},
    }
