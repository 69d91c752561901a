"""Speed of VQ-16: ``PYTHONPATH=src:tests python -m benchmarks.tokenizer [threads=1] [rounds=9] [part=coding]``.

Decode, encode, quantizer and ten-crop extraction against the authors' code (``peer=PATH``, a checkout of
FoundationVision/LlamaGen, which gets our weights), or, without one, against our network in plain memory layout and
what is written out here.

Tried, predicted, measured (2 cores of a Zen 3 EPYC, AVX2 without bfloat16 units, one thread):

* bfloat16 convolutions: 10 GFLOP/s where float32 has 93 (0.4 in plain layout). precision=auto stays at float32 there.
* Channels last: 93 against 72 GFLOP/s for a 3x3 convolution of 128 channels.
* Page faults: a fifth to a quarter of encode and decode, as tensors above 32 MB are unmapped when freed. Activations in
  place without gradients: decode 4.2 to 3.5 core s; mallopt in the commands (smalto.runtime.keep_freed_memory): 3.0.
  The rows here run without the latter, which would help both sides.
* Quantizer: chunks of 1024 / 256 / 64 / 32 rows take 0.36 / 0.19 / 0.15-0.19 / 0.14 of a full distance matrix;
  ``max`` instead of ``argmax`` is the same; the maximum of groups of 64 entries first, then inside the best group:
  0.08, not kept, as the quantizer is 2 % of an encode.
"""

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from benchmarks.data import jpeg, their_center_crop
from benchmarks.paired import interleave
from benchmarks.rows import Row, arguments, peer_module, time_row, unmeasured
from smalto.data.transforms import decode_image, ten_crops, to_float
from smalto.nn.hardware import has_fast_bf16
from smalto.tasks.official import official_name
from smalto.tokenizers.precision import decode, encode
from smalto.tokenizers.quantize import LOOKUP_ROWS, VectorQuantizer
from smalto.tokenizers.vqgan import VQModel

ENTRIES, DIM, SIZE = 16_384, 8, 256


def vq16() -> VQModel:
    """The paper's tokenizer, random weights."""
    torch.manual_seed(0)
    return (
        VQModel(
            image_size=SIZE,
            base_channels=128,
            channel_multipliers=[1, 1, 2, 2, 4],
            quantizer=partial(VectorQuantizer, codebook_size=ENTRIES, codebook_dim=DIM),
        )
        .eval()
        .requires_grad_(False)
    )


class Peer:
    """The authors' tokenizer with our weights, or ours in plain memory layout."""

    def __init__(self, peer: str | None, net: VQModel) -> None:
        self._ours = vq16()
        self._theirs: Any = None
        if peer:
            models = peer_module(peer, "tokenizer.tokenizer_image.vq_model").VQ_models
            self._theirs = models["VQ-16"](codebook_size=ENTRIES, codebook_embed_dim=DIM).eval().requires_grad_(False)
            weights = {official_name("tokenizer", name): value for name, value in net.state_dict().items()}
            missing, unknown = self._theirs.load_state_dict(weights, strict=False)
            assert not unknown
            assert set(missing) <= {"quantize.codebook_used"}

    def encode(self, image: Tensor) -> Tensor:
        """Codes (B, L)."""
        if self._theirs is None:
            return self._ours.encode(image)
        return self._theirs.encode(image)[2][2].view(len(image), -1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pictures."""
        if self._theirs is None:
            return self._ours.decode(codes)
        return self._theirs.decode_code(codes.flatten(), (len(codes), DIM, SIZE // 16, SIZE // 16))


@torch.inference_mode()
def coding_rows(*, batch: int = 1, rounds: int = 9, peer: str | None = None) -> list[Row]:
    """Encode and decode, and whether the codes are the same."""
    net = vq16().to(memory_format=torch.channels_last)
    theirs = Peer(peer, net)
    image = to_float(torch.stack([torch.from_numpy(np.array(picture(i))) for i in range(batch)]).permute(0, 3, 1, 2))
    codes = net.encode(image)
    same = (theirs.encode(image) == codes).float().mean().item()
    bf16 = has_fast_bf16("cpu")
    seconds = interleave(
        {
            "encode": lambda _: encode(net, image),
            "peer encode": lambda _: theirs.encode(image),
            "decode": lambda _: decode(net, codes),
            "peer decode": lambda _: theirs.decode(codes),
        }
        | (
            {
                "encode bf16": lambda _: encode(net, image, precision="bf16"),
                "decode bf16": lambda _: decode(net, codes, precision="bf16"),
                "peer decode bf16": lambda _: _autocast(theirs, codes),
            }
            if bf16
            else {}
        ),
        rounds=rounds,
    )
    goals = {("encode", "peer encode"): "<= 1.0", ("decode", "peer decode"): ""}
    bf16_goals = {
        ("encode bf16", "peer encode"): "<= 0.30",
        ("decode bf16", "peer decode"): "<= 0.28",
        ("decode bf16", "peer decode bf16"): "<= 0.75",
    }
    rows = []
    for (a, b), goal in (goals | bf16_goals).items():
        name = f"VQ-16 {a} / {b if peer else b.replace('peer', 'plain')}, fp32 unless said"
        if a in seconds:
            rows.append(time_row(name, seconds, a, b, items=batch, goal=goal, comparable=peer is not None))
        else:
            rows.append(unmeasured(name, goal=goal))
    return [*rows, Row("VQ-16 codes equal to the other side's", same, 1.0, same, "share", ">= 1")]


def _autocast(theirs: Peer, codes: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return theirs.decode(codes)


@torch.inference_mode()
def quantizer_rows(*, latents: int = 2560, rounds: int = 9) -> list[Row]:
    """Lookup against the whole matrix of squared distances, written as the authors do; time and memory."""
    generator = torch.Generator().manual_seed(0)
    quantizer = VectorQuantizer(codebook_size=ENTRIES, codebook_dim=DIM)
    entries = quantizer.entries()
    z = F.normalize(torch.randn(latents, DIM, generator=generator), dim=-1)

    def distances() -> Tensor:
        squared = z.pow(2).sum(1, keepdim=True) + entries.pow(2).sum(1) - 2 * torch.einsum("nc,kc->nk", z, entries)
        return squared.argmin(1)

    same = (quantizer.nearest(z, entries) == distances()).float().mean().item()
    seconds = interleave(
        {"chunks": lambda _: quantizer.nearest(z, entries), "matrix": lambda _: distances()}, rounds=rounds
    )
    ours, theirs = (4e-6 * rows * ENTRIES for rows in (LOOKUP_ROWS["cpu"], latents))
    return [
        time_row(f"quantizer, {latents} x {ENTRIES}", seconds, "chunks", "matrix", goal="<= 0.25"),
        Row("quantizer, scores or distances held", ours, theirs, ours / theirs, "MB", "<= 0.1"),
        Row("quantizer, codes equal", same, 1.0, same, "share", ">= 1"),
    ]


@torch.inference_mode()
def ten_crop_rows(*, rounds: int = 9, peer: str | None = None, crop_range: float = 1.05) -> list[Row]:
    """JPEG to the codes of its ten crops, one image at a time, all in this process."""
    net = vq16().to(memory_format=torch.channels_last)
    theirs = Peer(peer, net)
    data = jpeg(0, height=375, width=500)
    crops = transforms.Compose(
        [
            transforms.Lambda(lambda image: their_center_crop(image, int(SIZE * crop_range))),
            transforms.TenCrop(SIZE),
            transforms.Lambda(lambda many: torch.stack([transforms.ToTensor()(one) for one in many])),
            transforms.Normalize([0.5] * 3, [0.5] * 3, inplace=True),
        ]
    )

    def ours(_: int) -> Tensor:
        pixels = torch.from_numpy(ten_crops(decode_image(data), SIZE, crop_range)).permute(0, 3, 1, 2)
        return encode(net, to_float(pixels))

    def other(_: int) -> Tensor:
        return theirs.encode(crops(Image.open(io.BytesIO(data)).convert("RGB")))

    codes: dict[str, Tensor] = {}
    seconds = interleave(
        {"ours": lambda i: codes.update(ours=ours(i)), "peer": lambda i: codes.update(peer=other(i))},
        rounds=rounds,
        warm=False,
    )
    same = (codes["ours"] == codes["peer"]).float().mean().item()
    name = "ten-crop extraction of one image, VQ-16, 256 px, fp32"
    return [
        time_row(name, seconds, "ours", "peer", goal="<= 0.92", comparable=peer is not None),
        # Two ways of summing part at a near tie now and then: one code of 2,560 on one machine.
        Row("ten-crop codes equal to the other side's", same, 1.0, same, "share", ">= 0.999"),
    ]


def picture(number: int) -> Image.Image:
    """A smooth picture with some noise, RGB."""
    return decode_image(jpeg(number, height=SIZE, width=SIZE))


def main(given: list[str]) -> None:
    """Print the rows as JSON lines."""
    options = arguments(given)
    torch.set_num_threads(int(options.get("threads", 1)))
    rounds, peer = int(options.get("rounds", 9)), options.get("peer")
    parts: dict[str, Callable[[], list[Row]]] = {
        "quantizer": lambda: quantizer_rows(rounds=rounds),
        "coding": lambda: coding_rows(rounds=rounds, peer=peer),
        "ten_crop": lambda: ten_crop_rows(rounds=min(rounds, 3), peer=peer),
    }
    for part in [options["part"]] if "part" in options else parts:
        for row in parts[part]():
            print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
