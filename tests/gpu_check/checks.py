"""What a GPU could do otherwise than a CPU, one function each; each gives rows of the report."""

import json
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.benchmark import Timer

from golden_weights import golden_gpt, golden_image, golden_tokenizer, load_golden
from gpu_check.runs import Failed, Runs, furthest
from gpu_check.table import ABSENT, BAD, Row, judged
from smalto.sampling.engine import EngineConfig
from smalto.tokenizers.precision import has_fast_bf16

Check = Callable[[Runs], Iterator[Row]]


def golden(runs: Runs) -> Iterator[Row]:
    """The authors' numbers, on the device."""
    case = load_golden("gpt_c2i_tiny")
    net = golden_gpt(case).to(runs.device)
    with torch.inference_mode():
        logits = net(case.tensor("tokens").to(runs.device), case.tensor("labels").to(runs.device)).cpu()
    error = float((logits - case.tensor("logits_cond")).abs().max())
    yield judged("authors' GPT: logits", f"at most {error:.1e} from theirs", error < 1e-3)
    case = load_golden("tokenizer_vq16")
    tokenizer = golden_tokenizer(case).to(runs.device)
    with torch.inference_mode():
        codes = tokenizer.encode(golden_image(case).to(runs.device)).cpu().flatten()
    same = int((codes == case.tensor("codes")).sum())
    yield judged("authors' tokenizer: codes", f"{same} of {len(codes)} are theirs", same == len(codes))


def training(runs: Runs) -> Iterator[Row]:
    """Float32 losses against the CPU's, bfloat16 against float32, compiled against eager."""
    half = ["trainer.precision=bf16-mixed"]
    for task in ("tokenizer", "gpt"):
        exact = runs.train(task, f"{task}_fp32")
        host = runs.train(task, f"{task}_cpu", device="cpu")
        error = furthest(host, exact)
        most = 0.1 if task == "tokenizer" else 5e-3  # rounding, until codes fall to the other side
        yield judged(f"{task}: float32 losses of {len(host)} steps", f"{error:.1e} from the CPU's", error < most)
        error = furthest(exact, runs.train(task, f"{task}_bf16", *half))
        yield judged(f"{task}: bf16-mixed losses", f"{error:.1e} from float32", error < 0.1)
        error = furthest(exact, runs.train(task, f"{task}_compiled", "task.compile=true"))
        yield judged(f"{task}: compiled losses", f"{error:.1e} from eager", error < most)


def synchronisations(runs: Runs) -> Iterator[Row]:
    """How often a step waits for the device."""
    for task in ("tokenizer", "gpt"):
        file = runs.out / f"{task}_syncs.json"
        words = [f"+callbacks.syncs={{_target_: gpu_check.syncs.Syncs, file: {file}}}", "trainer.log_every_n_steps=100"]
        runs.train(task, f"{task}_syncs", *words, "trainer.precision=bf16-mixed", "trainer.val_check_interval=20")
        found = json.loads(file.read_text())
        if not found["steps"]:
            yield Row(f"{task}: waits for the device", "only CUDA counts them", ABSENT)
            continue
        places = ", ".join(f"{place} x{count}" for place, count in sorted(found["places"].items())[:6])
        count = sum(found["places"].values()) / found["steps"]
        yield judged(f"{task}: waits for the device", f"{count:.1f} a step {places}", count < 1)


def resuming(runs: Runs) -> Iterator[Row]:
    """Ten steps and ten more are twenty."""
    whole = runs.train("gpt", "gpt_whole")
    runs.train("gpt", "gpt_half", "trainer.max_steps=10")
    start = runs.out / "gpt_half" / "checkpoints" / "last.ckpt"
    second = runs.train("gpt", "gpt_resumed", f"ckpt_path={start}")
    error = furthest({step: loss for step, loss in whole.items() if step >= 10}, second)
    yield judged(
        "gpt: losses after resuming", "the same bit by bit" if error == 0 else f"{error:.1e} off", error < 1e-5
    )


def evaluation(runs: Runs) -> Iterator[Row]:
    """The last evaluation took place, on the device; a second run reads the reference that the first one kept."""
    key = "gen/fid_lite0_32"
    for task, name in (("gpt", "gpt_fp32"), ("gpt", "gpt_whole")):
        value = runs.metrics(name).get(key, math.nan)
        kept = len(list((runs.out / "references").rglob("*.npz")))
        yield judged(f"{task}: evaluated at the end of {name}", f"{key} {value:.4f}, {kept} references", value > 0)


def sampling(runs: Runs) -> Iterator[Row]:
    """Pictures of the engine in each dtype, eager and compiled, against float32 on the CPU."""
    yield Row("engine.dtype=auto here is", EngineConfig().computes_in(runs.device))
    yield Row("fast bfloat16", str(has_fast_bf16(runs.device)))
    host = runs.sample("gpt_fp32", "samples_cpu", "engine.dtype=fp32", "engine.compile=false", device="cpu")
    for dtype, compiled in (("fp32", "false"), ("fp32", "true"), ("bf16", "false"), ("bf16", "true"), ("int8", "true")):
        name = f"samples_{dtype}{'_compiled' * (compiled == 'true')}"
        words = [f"engine.dtype={dtype}", f"engine.compile={compiled}"]
        try:
            pictures = runs.sample("gpt_fp32", name, *words)
        except Failed as refused:
            yield Row(f"{name}: pictures", str(refused)[:80], ABSENT if dtype == "int8" else BAD)
            continue
        near = np.abs(pictures.astype(int) - host).reshape(len(host), -1).max(1) <= 1
        good = near.mean() > 0.9 if dtype == "fp32" else True
        yield judged(f"{name}: pictures", f"{near.sum()} of {len(host)} as float32 on the CPU", good)


def processes(runs: Runs) -> Iterator[Row]:
    """Two devices compute what one does; sharded, too."""
    if runs.device.type == "cuda" and torch.cuda.device_count() < 2:
        yield Row("ddp and fsdp on two devices", "one GPU", ABSENT)
        return
    two, half = ["trainer.devices=2"], ["trainer.precision=bf16-mixed"]
    for task, strategy in (("tokenizer", "ddp"), ("gpt", "ddp"), ("gpt", "fsdp")):
        one = runs.train(task, f"{task}_fp32")
        error = furthest(one, runs.train(task, f"{task}_{strategy}", *two, f"strategy={strategy}"))
        # Rounding, until codes of the tokenizer fall to the other side.
        good = error < (0.05 if task == "tokenizer" else 1e-3)
        yield judged(f"{task}: {strategy} on two", f"losses {error:.1e} from one process", good)
    whole = runs.train("gpt", "gpt_ddp_bf16", *two, *half, "strategy=ddp")
    error = furthest(whole, runs.train("gpt", "gpt_fsdp_bf16", *two, *half, "strategy=fsdp"))
    yield judged("gpt: fsdp in bfloat16", f"losses {error:.1e} from ddp", error < 0.1)


def layouts(runs: Runs) -> Iterator[Row]:
    """Memory format of the tokenizer's convolutions: which one is faster here."""
    net = golden_tokenizer(load_golden("tokenizer_vq16")).to(runs.device)
    side = net.image_size
    for half in (False, True):
        found = {}
        for name, layout in (("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)):
            net.to(memory_format=layout)
            image = torch.zeros(8, 3, side, side, device=runs.device).contiguous(memory_format=layout)
            with torch.inference_mode(), torch.autocast(runs.device.type, torch.bfloat16, enabled=half):
                timer = Timer("net.encode(image)", globals={"net": net, "image": image})
                found[name] = timer.blocked_autorange(min_run_time=0.3).median
        ratio = found["channels_last"] / found["contiguous"]
        yield Row(f"tokenizer in {'bf16' if half else 'fp32'}: channels_last", f"{ratio:.2f} x the time of contiguous")


CHECKS: tuple[Check, ...] = (golden, training, synchronisations, resuming, evaluation, sampling, processes, layouts)
