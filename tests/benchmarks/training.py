"""Speed of a training step: ``PYTHONPATH=src:tests python -m benchmarks.training [threads=1] [batch=4] [rounds=9]``.

``peer=PATH`` adds the authors' model from a checkout of FoundationVision/LlamaGen, eager and compiled, in the same
rounds. A step is forward, backward, clipping and AdamW (fused on both sides) of GPT-B on 256 codes per image, in
bfloat16 autocast where the machine has units for it, else in float32.

Tried, predicted, measured (2 cores of a Zen 3 EPYC, AVX2 without bfloat16 units, float32, batch 4, one thread):

* Share of matrix products in the step: 79-81 % for both, so at most 1.25 x can be won here, whatever is done.
* Compiling the block once (17 core s) or all blocks (49 core s): 9.1 and 8.7 s per step, eager 9.0, the authors' eager
  9.3-9.8, their compiled 9.4, each in a process of its own. Interleaved, batch 2, 3 rounds, on a loaded machine: ours
  compiled 0.99 of their eager and 1.04 of their compiled step: within the noise of 10 %, no difference in float32.
* MFU: 0.73 eager, 0.77 compiled.
* Loss by 512 rows: 0.95 of our plain step in the same rounds, and an eighth of the logits at batch 16.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.paired import interleave
from benchmarks.rows import Row, arguments, peer_module, time_row
from smalto.analysis.scaling import GPTShape
from smalto.losses.cross_entropy import linear_cross_entropy
from smalto.models.conditioner import ClassConditioner
from smalto.models.gpt import GPT
from smalto.nn.hardware import has_fast_bf16

VOCABULARY, GRID, CLASSES = 16_384, 16, 1000
PRODUCT = 2048
"""Side of the square product that stands for the machine's ceiling."""


def gpt_b() -> GPT:
    """The paper's B for 256 px, in training mode."""
    conditioner = partial(ClassConditioner, num_classes=CLASSES, drop_prob=0.1)
    return GPT(
        dim=768,
        num_layers=12,
        num_heads=12,
        vocab_size=VOCABULARY,
        code_shape=((GRID, GRID),),
        conditioner=conditioner,
    ).train()


def peer_b(peer: str) -> nn.Module:
    """The authors' B with the same dropout."""
    dropout = {"resid_dropout_p": 0.1, "ffn_dropout_p": 0.1, "token_dropout_p": 0.1}
    models = peer_module(peer, "autoregressive.models.gpt").GPT_models
    sizes = {"vocab_size": VOCABULARY, "block_size": GRID**2, "num_classes": CLASSES, "cls_token_num": 1}
    return models["GPT-B"](**sizes, model_type="c2i", **dropout).train()


def stepper(net: nn.Module, loss: Callable[[], torch.Tensor], *, bf16: bool) -> Callable[[int], None]:
    """One optimizer step per call."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step(_: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_rows(*, batch: int = 4, rounds: int = 9, peer: str | None = None) -> list[Row]:
    """Steps per variant against the plain eager one, or against the authors' with ``peer``; and the MFU."""
    bf16 = has_fast_bf16("cpu")
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(VOCABULARY, (batch, GRID**2), generator=generator)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    net = gpt_b()
    compiled = gpt_b()
    compiled.load_state_dict(net.state_dict())
    compiled.compile_blocks()

    def plain(model: nn.Module) -> torch.Tensor:
        return F.cross_entropy(model(codes, labels).float().flatten(0, 1), codes.flatten())

    def by_rows() -> torch.Tensor:
        def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy(hidden.flatten(0, 1), weight, codes.flatten(), rows=512)

        return net.apply_head(codes, labels, head=loss)

    steps = {
        "ours eager": stepper(net, lambda: plain(net), bf16=bf16),
        "ours by rows": stepper(net, by_rows, bf16=bf16),
        "ours compiled": stepper(compiled, lambda: plain(compiled), bf16=bf16),
    }
    if peer:
        theirs = peer_b(peer)
        call = {"cond_idx": labels, "idx": codes[:, :-1], "targets": codes}
        compiled_peer = torch.compile(theirs)
        steps["peer eager"] = stepper(theirs, lambda: theirs(**call)[1], bf16=bf16)
        steps["peer compiled"] = stepper(theirs, lambda: compiled_peer(**call)[1], bf16=bf16)
    square = torch.ones(PRODUCT, PRODUCT, dtype=torch.bfloat16 if bf16 else torch.float32)
    seconds = interleave(steps | {"product": lambda _: square @ square}, rounds=rounds)
    kind = "bf16" if bf16 else "fp32"
    goals = {"peer eager": "<= 0.77", "peer compiled": "<= 0.95"} if peer else {"ours eager": ""}
    rows = [
        time_row(f"training step B x {batch}, {kind}, {ours} / {theirs}", seconds, ours, theirs, goal=goal)
        for theirs, goal in goals.items()
        for ours in ("ours eager", "ours by rows", "ours compiled")
        if ours != theirs
    ]
    flops = GPTShape.of(net).training_flops * batch
    for name in ("ours eager", "ours compiled"):
        pairs = zip(seconds[name], seconds["product"], strict=True)
        shares = sorted(flops / step / (2 * PRODUCT**3 / product) for step, product in pairs)
        rates = [flops / sorted(seconds[name])[rounds // 2] / 1e9, 2 * PRODUCT**3 / min(seconds["product"]) / 1e9]
        rows.append(Row(f"MFU of {name}, {kind}", *rates, shares[rounds // 2], "GFLOP/s", "" if bf16 else ">= 0.62"))
    return rows


def main(given: list[str]) -> None:
    """Print the rows as JSON lines."""
    options = arguments(given)
    torch.set_num_threads(int(options.get("threads", 1)))
    sizes = {key: int(options[key]) for key in ("batch", "rounds") if key in options}
    for row in training_rows(**sizes, peer=options.get("peer")):
        print(json.dumps(asdict(row)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
