"""Speed of sampling: ``PYTHONPATH=src:tests python -m benchmarks.sampling [size=B] [images=8] [threads=1] [rounds=9]``.

``peer=PATH`` adds the authors' code from a checkout of FoundationVision/LlamaGen, fp32 and bf16. Prints milliseconds
per decode step and ratios as JSON lines.
"""

import json
import sys
from statistics import median

import torch

from benchmarks.contestants import Step, engine_step, make_model, peer_step, plain_step, smalto_step
from benchmarks.paired import interleave, ratio


def row(size: str, images: int, *, rounds: int, peer: str | None, positions: int = 4) -> dict[str, object]:
    """One comparison: contestants at ``positions`` places spread over the image, other places in every round."""
    net = make_model(size)
    steps: dict[str, Step] = {
        "plain fp32": plain_step(net, images),
        "model fp32": smalto_step(net, images),
        "engine fp32": engine_step(net, images, "fp32"),
        "engine auto": engine_step(net, images, "auto"),
    }
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
    }


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
