"""The Inception-v3 behind published FID and IS by torch-fidelity's weight file, and the choice between it and lite0."""

import importlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smalto.errors import InputError, MissingFile
from smalto.metrics.features import SPATIAL_CHANNELS, FeatureExtractor, Features, check_sha256
from smalto.metrics.lite0 import Lite0Features

log = logging.getLogger(__name__)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


class InceptionFeatures(FeatureExtractor):
    """The Inception-v3 of published FID and IS numbers (torch-fidelity's port of the TensorFlow graph).

    Logits are the graph's own without the bias (``logits_unbiased``), over 1008 outputs, as ADM's evaluator
    takes them. The map behind sFID is the first convolution of the block that the graph calls ``mixed_6`` and this
    port ``Mixed_6d`` (after batch norm and ReLU), 17 x 17 places, its first 7 channels.

    Args:
        weights: path of the weight file; None looks into torch's hub folder
            (``$TORCH_HOME/hub/checkpoints``).
        download: fetch the file into that folder when it is not there.
        chunk_size: images per pass.

    Raises:
        FileNotFoundError: no file, and download is off.
        ValueError: the file's sha256 does not start with the published prefix, or it is no plain state dict.
    """

    def __init__(self, *, weights: str | Path | None = None, download: bool = False, chunk_size: int = 20) -> None:
        super().__init__(
            name="inception",
            num_features=2048,
            num_spatial=SPATIAL_CHANNELS * 17 * 17,
            num_logits=1008,
            chunk_size=chunk_size,
        )
        path = Path(weights) if weights is not None else inception_cache_path()
        if download and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("downloading %s to %s", INCEPTION_URL, path)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256_PREFIX)
        network: Any = _load_inception(path)
        self.network = network
        self._spatial: list[Tensor] = []
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        self.freeze()

    def extract(self, image: Tensor) -> Features:
        """See the base class; the network resizes to 299 itself, by TensorFlow 1's bilinear rule."""
        pool, logits = self.network(image)
        return Features(pool, self._spatial.pop(), logits)

    def _keep_spatial(self, module: nn.Module, given: tuple[Tensor], result: Tensor) -> None:
        self._spatial.append(result[:, :SPATIAL_CHANNELS].flatten(1))


def auto_features(
    *, size: int = 160, weights: str | Path | None = None, download: bool = False, chunk_size: int = 20
) -> FeatureExtractor:
    """Inception when its weight file is at hand or may be fetched, else EfficientNet-lite0; logs which.

    Args:
        size: input size of lite0.
        weights: path of the Inception file; None looks into torch's hub folder. A path that does not exist is
            an error, not a reason to fall back.
        download: allow Inception's download.
        chunk_size: images per pass.
    """
    path = Path(weights) if weights is not None else inception_cache_path()
    if weights is not None or download or path.is_file():
        log.info("features: inception, weights from %s", path)
        return InceptionFeatures(weights=weights, download=download, chunk_size=chunk_size)
    log.info("features: lite0_%d, because there is no inception file at %s", size, path)
    return Lite0Features(size=size, chunk_size=chunk_size)


def inception_cache_path() -> Path:
    """Where torch.hub keeps the Inception file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE


def _load_inception(path: Path) -> nn.Module:
    if not path.is_file():
        raise MissingFile(
            f"no Inception weights at {path}; put {INCEPTION_FILE} there (from {INCEPTION_URL}), give its "
            "path as features.weights=..., or choose features=lite0"
        )
    check_sha256(path, INCEPTION_SHA256_PREFIX)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is not a plain state dict of tensors: {error}") from error
    # torch-fidelity loads inside its constructor and without restriction; it is handed what was read safely.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with torch.random.fork_rng(devices=[]):
        return module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        )
