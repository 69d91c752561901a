"""``smalto plan``: what a training would take, by its config; nothing is built and no data is needed."""

import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smalto.errors import InputError, PathInUse
from smalto.files import write_json
from smalto.losses.perceptual import vgg_cache_path
from smalto.planning.dataset import code_shard_bytes, stored_bytes, training_images
from smalto.planning.device import Device
from smalto.planning.memory import MemoryPlan, usable_bytes
from smalto.planning.outline import build_outline
from smalto.planning.report import show
from smalto.planning.sampling import SamplingPlan, plan_sampling
from smalto.planning.schedule import find_schedule
from smalto.planning.step import PRECISIONS, decoding_bytes
from smalto.planning.traffic import plan_traffic
from smalto.planning.training import Plan, plan_flops, plan_memory, plan_parameters, plan_time
from smalto.runtime import build, hydra_main

_OUTLINE = "smalto.planning.outline.PerceptualOutline"


def run(config: DictConfig) -> Plan:
    """Print the plan of a training config, write it to ``out`` if that is given, and return it.

    Raises:
        ValueError: a setting that training would refuse too, or one that leaves no plan.
        FileExistsError: ``out`` is a folder.
    """
    start = time.perf_counter()
    if config.out is not None and Path(config.out).is_dir():
        raise PathInUse(f"out={config.out} is a folder; give the name of a JSON file")
    plan = make_plan(config)
    plan["planned_in_seconds"] = time.perf_counter() - start
    show(plan)
    if config.out is not None:
        out = Path(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, plan)
        sys.stdout.write(f"{out}\n")
    return plan


def make_plan(config: DictConfig) -> Plan:
    """The plan as plain values."""
    settings, kind = config.plan, config.kind
    _check(settings)
    if config.device not in config.devices:
        raise InputError(f"device is {config.device!r}, choose one of {', '.join(config.devices)} (conf/_devices.yaml)")
    device: Device = build(config.devices[config.device])
    notes: list[str] = []
    trainer: Any = OmegaConf.to_container(config.trainer, resolve=True)
    data: Any = OmegaConf.to_container(config.data, resolve=True)
    precision, devices = _precision(trainer["precision"], kind), _devices(trainer)
    device.peak_flops(precision)
    batch = data["batch_size"]
    if batch % devices:
        raise InputError(
            f"data.batch_size={batch} cannot be divided among {devices} devices (trainer.devices x trainer.num_nodes); "
            "choose a multiple"
        )
    strategy = _strategy(trainer["strategy"], devices)
    if kind == "tokenizer" and strategy == "fsdp":
        raise InputError("strategy=fsdp shards transformers; train a tokenizer with strategy=ddp")
    frozen = _frozen(config)
    task = _outline(config, notes)
    tokens = task.net.num_codes if kind == "gpt" else sum(rows * columns for rows, columns in task.net.code_shape)
    images, source = training_images(data, wanted=settings.num_images)
    schedule = find_schedule(trainer, num_images=images, batch_size=batch, tokens_per_image=tokens)
    if schedule.steps is None:
        notes.append("the config sets no end: give trainer.max_steps or trainer.max_epochs for hours and cost")
    parameters = plan_parameters(task, frozen)
    flops = plan_flops(task, kind)
    tokenizer_bytes = 4 * sum(parameters["frozen"].get(name, 0) for name in frozen)
    plan: Plan = {
        "name": config.run_name,
        "kind": kind,
        "overrides": list(HydraConfig.get().overrides.task),
        "device": asdict(device),
        "devices": devices,
        "strategy": strategy,
        "precision": precision,
        "batch_size": batch,
        "parameters": parameters,
        "flops": flops,
        "time": plan_time(
            flops,
            schedule,
            device,
            kind=kind,
            precision=precision,
            devices=devices,
            mfu=settings.mfu,
            disc_start=getattr(task, "disc_start", None) if getattr(task, "discriminator", None) is not None else None,
            price_per_hour=settings.price_per_hour,
        ),
        "storage": _storage(config, data, images, source, tokens, kind),
    }
    plan["traffic"] = plan_traffic(
        task,
        device,
        trainer,
        kind=kind,
        strategy=strategy,
        precision=precision,
        devices=devices,
        batch_size=batch,
        frozen=frozen.values(),
        network_gb_s=settings.network_gb_s,
        seconds_per_step=plan["time"]["seconds_per_step"],
    )
    callbacks = config.get("callbacks") or {}
    drawing = None
    if kind == "gpt":
        draw = partial(_sampling_plan, config, task, device, frozen.get("tokenizer"), tokenizer_bytes)
        plan["sampling"] = [asdict(draw(settings.sample_batch_size, guided)) for guided in (False, True)]
        generation = callbacks.get("generation") or {}
        if generation.get("_target_"):
            asked = draw(generation["batch_size"], config.sampling.cfg_scale > 1)
            drawing = asked.packed_bytes + asked.working_bytes
    ema = callbacks.get("ema")
    memory = MemoryPlan(
        task,
        precision=precision,
        global_batch=batch,
        devices=devices,
        accumulate=trainer["accumulate_grad_batches"],
        averaged=bool(ema and ema.get("_target_")),
        frozen=tokenizer_bytes,
        drawing=drawing,
        gpu=device.kind == "cuda",
    )
    plan["memory"] = plan_memory(memory, device, kind=kind, devices=devices, headroom=settings.headroom)
    plan["storage"]["checkpoint_bytes"] = memory.checkpoint_bytes
    plan["notes"] = notes
    return plan


def _sampling_plan(
    config: DictConfig,
    task: Any,
    device: Device,
    tokenizer: nn.Module | None,
    tokenizer_bytes: int,
    images: int,
    guided: bool,
) -> SamplingPlan:
    decoder_bytes = 0
    if tokenizer is not None:
        decoded = min(images, task.decode_batch_size)
        decoder_bytes = decoding_bytes(tokenizer, images=decoded, gpu=device.kind == "cuda")
    return plan_sampling(
        task.net,
        device,
        images=images,
        guided=guided,
        usable=usable_bytes(device, config.plan.headroom),
        tokenizer_bytes=tokenizer_bytes,
        decoder_bytes=decoder_bytes,
    )


def _check(settings: DictConfig) -> None:
    problems = [
        f"plan.{name} is {settings[name]}, must be positive"
        for name in ("image_kb", "crops", "sample_batch_size", "num_images", "price_per_hour", "network_gb_s")
        if settings[name] is not None and settings[name] <= 0
    ]
    if settings.mfu is not None and not 0 < settings.mfu <= 1:
        problems.append(f"plan.mfu is {settings.mfu}, must be above 0 and at most 1: the share of the peak it reaches")
    if not 0 <= settings.headroom < 1:
        problems.append(f"plan.headroom is {settings.headroom}, must be in [0, 1): a share of the device's memory")
    if problems:
        raise InputError("; ".join(problems))


def _precision(wanted: Any, kind: str) -> str:
    short = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    precision = short.get(str(wanted), str(wanted))
    if precision not in PRECISIONS:
        raise InputError(f"trainer.precision is {wanted!r}, a plan knows {', '.join(PRECISIONS)}")
    if kind == "tokenizer" and precision == "16-mixed":
        raise InputError("trainer.precision is 16-mixed, which a tokenizer cannot train in; use bf16-mixed or 32-true")
    return precision


def _devices(trainer: dict[str, Any]) -> int:
    each = trainer["devices"]
    count = len(each) if isinstance(each, list) else int(each) if str(each).isdigit() else 0
    if count < 1:
        raise InputError(f"trainer.devices is {each!r}; a plan needs a number of devices per node: trainer.devices=8")
    return count * trainer["num_nodes"]


def _strategy(node: Any, devices: int) -> str:
    name = (node["_target_"] if isinstance(node, dict) else str(node)).rsplit(".", 1)[-1].lower()
    if any(word in name for word in ("sharded", "modelparallel", "fsdp")):
        return "fsdp"
    return "ddp" if "ddp" in name or devices > 1 else "auto"


def _frozen(config: DictConfig) -> dict[str, nn.Module]:
    """The tokenizer that a generator carries along, if it has one."""
    if config.kind != "gpt" or config.task.tokenizer_ckpt is None:
        return {}
    with torch.device("meta"):
        return {"tokenizer": build(config.tokenizer)()}


def _outline(config: DictConfig, notes: list[str]) -> Any:
    """The task on the meta device."""
    node = config.copy()
    if node.task.get("compile"):
        node.task.compile = False
        notes.append("task.compile=true: memory is that of eager blocks, compiled ones keep less")
    if node.kind == "gpt":
        node.task.tokenizer_ckpt = None
    elif node.get("perceptual"):
        here = node.device == "measured"
        if node.perceptual.net == "auto":
            node.perceptual.net = "vgg" if not here or vgg_cache_path().is_file() else "squeeze_caffe"
            notes.append(f"perceptual=auto: planned with {node.perceptual.net}")
        node.perceptual["_target_"] = _OUTLINE
    task = build(node.task)
    build_outline(task)
    return task


def _storage(
    config: DictConfig, data: dict[str, Any], images: int, source: str, tokens: int, kind: str
) -> dict[str, Any]:
    """Bytes on disk of the training set."""
    found = stored_bytes(data)
    codes = code_shard_bytes(
        images, crops=config.plan.crops, num_tokens=tokens, codebook_size=config.tokenizer.quantizer.codebook_size
    )
    text = config.model.conditioner.get("text_dim") if kind == "gpt" else None
    return {
        "training_images": images,
        "training_images_from": source,
        "image_bytes": found if found and kind == "tokenizer" else round(images * config.plan.image_kb * 1000),
        "code_bytes": found if found and kind == "gpt" else codes,
        "image_kb": config.plan.image_kb,
        "crops": config.plan.crops,
        "measured": found is not None,
        "text_bytes_at_most": None if text is None else 2 * images * text * config.model.conditioner.num_tokens,
    }


main = hydra_main("plan")(run)

if __name__ == "__main__":
    main()
