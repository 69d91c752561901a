"""Speed of sampling: ``PYTHONPATH=src:tests python -m benchmarks.sampling [size=B] [images=8] [threads=1] [rounds=9]``.

``peer=PATH`` adds the authors' code from a checkout of FoundationVision/LlamaGen, fp32 and bf16. Prints milliseconds
per decode step and ratios as JSON lines; "read" is one pass over the float32 weights that a step streams.

What was tried for the engine, on two cores of an AVX2 machine (no AVX-512, no bfloat16 in hardware), one thread, all
matrices of one step of B in ms at 2 / 16 / 32 rows; "read" took 20-25 on the same machine:

    F.linear fp32                         58 /  99 / 127
    oneDNN packed fp32                    32 /  71 / 106   taken for fp32; rows round alike
    MKL packed fp32                       40 /  89 / 117
    F.linear bf16                         42 /   - /   -   emulated
    FBGEMM fp16 weights, fp32 sums        16 /  44 /  76   taken as ``auto`` here; 12 times closer to fp32 than bf16
    int8 weights, bf16 activations        21 /  86 / 154   an option: pays at 2 rows where bf16 is in hardware
    int8 weights, int8 activations        10 /  22 /  41   not taken: one scale for all rows, images would depend on
                                                           their neighbours; its constructors are deprecated
    huge pages for all of these           3 % less         not taken

Attention over a prefix of 129 takes 20 ms at 16 rows, twice a read of its keys and values. The fused kernel, products
and sums, and a cache with transposed keys take as long as two bmm; only bmm gives a row the same bits on every thread,
so it is taken. Half-precision caches are 2 to 4 times slower without hardware for them; a compiled kernel gains 35 % of
it with a half-precision cache, nothing with float32. Matrices and attention are 93 % of a step of 8 images: compiling
the rest was not pursued.

Rotary pairs as a complex product: 15 us instead of 290 as a rotated half (32 rows). A norm as ``x / hypot(|x|, c)``:
three operations instead of six, which with other such savings took dispatch from 5.5 to 3.7 ms per step.

Floors there: 8 images with guidance are 3.1 GFLOP and 150 MB of cache per step, 31 + 10 ms at 100 GFLOP/s and
15 GB/s; 16 images 62 + 20 ms.
"""

import json
import sys
from statistics import median
from typing import Any

import torch

from benchmarks.contestants import (
    Step,
    engine_step,
    make_model,
    peer_call,
    peer_step,
    plain_call,
    plain_step,
    smalto_call,
    smalto_step,
)
from benchmarks.paired import interleave, ratio
from benchmarks.rows import Row, time_row
from smalto.nn.hardware import has_fast_bf16
from smalto.sampling.packed import resolve_dtype


def row(size: str, images: int, *, rounds: int, peer: str | None, positions: int = 4) -> dict[str, object]:
    """One comparison: contestants at ``positions`` places spread over the image, other places in every round."""
    net = make_model(size)
    steps: dict[str, Step] = {
        "plain fp32": plain_step(net, images),
        "model fp32": smalto_step(net, images),
        "engine fp32": engine_step(net, images, "fp32"),
        "engine auto": engine_step(net, images, "auto"),
    }
    if images <= INT8_IMAGES:
        steps["engine int8"] = engine_step(net, images, "int8")
    if peer:
        steps["peer fp32"] = peer_step(peer, size, images, torch.float32)
        steps["peer bf16"] = peer_step(peer, size, images, torch.bfloat16)
    streamed = torch.cat([p.detach().flatten() for p in net.blocks.parameters()] + [net.output.weight.flatten()])

    def spread(step: Step) -> Step:
        stride = 255 // positions
        return lambda i: [step((i * 37) % stride + j * stride) for j in range(positions)]

    contestants = {name: spread(step) for name, step in steps.items()} | {"read": spread(lambda _: streamed.sum())}
    seconds = interleave(contestants, rounds=rounds)
    theirs = [name for name in seconds if name.startswith("peer")] or ["plain fp32"]
    return {
        "size": size,
        "images": images,
        "threads": torch.get_num_threads(),
        "ms_per_step": {name: round(1e3 * median(values) / positions, 2) for name, values in seconds.items()},
        "against": theirs,
        "fp32": round(ratio(seconds, "engine fp32", *theirs), 3),
        "auto": round(ratio(seconds, "engine auto", *theirs), 3),
        "fp32 / read": round(ratio(seconds, "engine fp32", "read"), 2),
        "auto / read": round(ratio(seconds, "engine auto", "read"), 2),
    } | ({"int8": round(ratio(seconds, "engine int8", *theirs), 3)} if images <= INT8_IMAGES else {})


INT8_IMAGES = 2
"""Beyond as many, int8 weights are slower than others."""

GOALS = {
    ("B", 1): {"auto": "<= 0.45", "int8": "<= 0.36"},
    ("B", 8): {"auto": "<= 0.15", "fp32": "<= 0.32"},
    ("B", 16): {"auto": "<= 0.11"},
    ("small", 16): {"auto": "<= 0.15"},
}
"""Shares of the authors' time per step; their better one of float32 and bfloat16."""
READ_GOALS = {"fp32": "<= 1.4", "auto": "<= 2.0"}
"""Of a step of B for one image, by the time to read the weights it streams, in their size."""


@torch.inference_mode()
def sampling_rows(size: str, images: int, *, rounds: int = 9, peer: str | None = None) -> list[Row]:
    """:func:`row` as lines of the table of speeds."""
    found = row(size, images, rounds=rounds, peer=peer)
    ms: Any = found["ms_per_step"]
    theirs = min(found["against"], key=ms.__getitem__)  # type: ignore[arg-type]
    auto = resolve_dtype("auto", torch.device("cpu"))
    goals = GOALS.get((size, images), {})
    setting = f"decode step, {size}, {images} images with guidance"
    rows = []
    for kind in ("fp32", "auto", *(["int8"] if "int8" in found else [])):
        name = f"{setting}, {f'auto ({auto})' if kind == 'auto' else kind} / {theirs}"
        ratio: Any = found[kind]
        goal = goals.get(kind, "")
        rows.append(Row(name, ms[f"engine {kind}"], ms[theirs], ratio, "ms", goal, comparable=peer is not None))
    if (size, images) != ("B", 1):
        return rows
    for kind, dtype in (("fp32", "fp32"), ("auto", auto)):
        share = 1.0 if dtype == "fp32" else 0.5  # of the float32 weights that "read" passes over
        ratio = found[f"{kind} / read"]
        name = f"{setting}, {dtype} / reading its weights once"
        rows.append(Row(name, ms[f"engine {kind}"], ms["read"] * share, ratio / share, "ms", READ_GOALS[kind]))
    return rows


@torch.inference_mode()
def call_rows(*, size: str = "B", images: int = 8, rounds: int = 1, peer: str | None = None) -> list[Row]:
    """Whole calls: class labels to the codes of whole images, packing of weights included."""
    net = make_model(size)
    calls = {
        "plain fp32": plain_call(net, images),
        "fp32": smalto_call(net, images, "fp32"),
        "auto": smalto_call(net, images, "auto"),
    }
    if peer:
        calls["peer fp32"] = peer_call(peer, size, images, torch.float32)
        if has_fast_bf16("cpu"):
            calls["peer bf16"] = peer_call(peer, size, images, torch.bfloat16)
    seconds = interleave(calls, rounds=rounds, warm=False)
    peers = [name for name in calls if name.startswith("peer")]
    better = min(peers, key=lambda name: median(seconds[name])) if peers else None
    goals = GOALS.get((size, images), {})
    return [
        time_row(
            f"{size}, {images} whole images with guidance, {kind} / {theirs}",
            seconds,
            kind,
            theirs,
            goal=goals.get(kind, "") if theirs == (better or theirs) else "",
            comparable=theirs == better,
        )
        for kind in ("fp32", "auto")
        for theirs in ["plain fp32", *([better] if better else [])]
    ]


def main(arguments: list[str]) -> None:
    """Rows for the sizes and image counts asked for."""
    given = dict(argument.split("=", 1) for argument in arguments)
    torch.set_num_threads(int(given.get("threads", 1)))
    default = [("B", 1), ("B", 8), ("B", 16), ("small", 16)]
    rows = [(given.get("size", "B"), int(n)) for n in given["images"].split(",")] if "images" in given else default
    with torch.inference_mode():
        for size, images in rows:
            found = row(size, images, rounds=int(given.get("rounds", 9)), peer=given.get("peer"))
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
