"""A plan for people: tables on the terminal."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from smalto.planning.device import GIB

_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "average (EMA)",
    "frozen": "networks not trained",
    "gathered": "gathered blocks",
    "activations": "activations, temporaries",
}


def show(plan: dict[str, Any]) -> None:
    """Everything to stdout."""
    console = Console(soft_wrap=True, markup=False, width=None if sys.stdout.isatty() else 120)
    for table in (_facts(plan), _memory(plan)):
        console.print(table, highlight=False)
    for note in plan["notes"]:
        console.print(f"note: {note}", highlight=False)


def _facts(plan: dict[str, Any]) -> Table:
    device, storage, clock = plan["device"], plan["storage"], plan["time"]
    table = Table(title=f"smalto plan {' '.join(plan['overrides'])}", title_justify="left", show_header=False)
    rows = [("parameters", _parameters(plan["parameters"])), ("FLOPs per image", _flops(plan["flops"]))]
    rows.append(
        (
            "device",
            [
                f"{plan['devices']} x {device['name']}: {device['memory_gib']:.1f} GiB, "
                f"{device['half_tflops']:.4g} TFLOP/s half, {device['fp32_tflops']:.4g} single, "
                f"{device['bandwidth_gb_s']:.4g} GB/s",
            ],
        )
    )
    rows.append(("time", _time(clock, plan["precision"])))
    rows.append(("network, host", [*_network(plan), _host(plan["traffic"]["host"])]))
    rows.append(("data", _storage(storage, clock["tokens_per_image"], plan["kind"])))
    if "sampling" in plan:
        rows.append(("sampling", [_sampling(entry) for entry in plan["sampling"]]))
    for name, lines in rows:
        for number, line in enumerate(lines):
            table.add_row("" if number else name, line)
    return table


def _parameters(found: dict[str, Any]) -> Iterable[str]:
    yield f"{found['trained']:,} trained"
    yield ", ".join(f"{name} {count:,}" for name, count in found["parts"].items())
    for name, count in found["frozen"].items():
        yield f"{name} {count:,}, not trained"


def _flops(found: dict[str, Any]) -> Iterable[str]:
    if "training_adversarial" in found:
        yield f"encode {_tera(found['encode'])}, decode {_tera(found['decode'])}"
        yield (f"training {_tera(found['training'])}, with the discriminator {_tera(found['training_adversarial'])}")
        return
    again = found["hardware"] / found["training"] - 1
    recomputed = f", {again:.0%} more for what is computed again" if again else ""
    yield f"training {_tera(found['training'])}{recomputed}; 6 N per code would be {_tera(found['six_n'])}"
    yield f"sampling {_tera(found['sampling'])}, with guidance {_tera(found['sampling_guided'])}"


def _time(clock: dict[str, Any], precision: str) -> Iterable[str]:
    yield (
        f"{clock['images_per_second']:,.4g} images/s, {clock['seconds_per_step']:.3g} s a step, "
        f"{duration(clock['seconds_per_epoch'])} an epoch, if {clock['mfu']:.0%} of the {precision} peak is reached"
    )
    if clock["seconds"] is None:
        return
    yield (
        f"{clock['steps']:,} steps of {clock['images_per_step']} = {clock['epochs']:,.4g} epochs, "
        f"{clock['tokens']:.3g} codes: {duration(clock['seconds'])}, {clock['device_hours']:,.4g} device hours"
        + ("" if clock["cost"] is None else f", cost {clock['cost']:,.0f}")
    )


def _network(plan: dict[str, Any]) -> Iterable[str]:
    if plan["devices"] == 1:
        return
    speed = plan["traffic"]["gb_s"]
    for name, found in plan["traffic"]["strategies"].items():
        labels = {"weights": "weights gathered", "gradients": "gradients reduced", "buffers": "buffers copied"}
        parts = ", ".join(f"{label} {_giga(found[part])}" for part, label in labels.items() if found[part])
        time = "how long is not known (plan.network_gb_s, devices.NAME.link_gb_s)"
        if speed is not None:
            share = f"{found['share_of_step']:.1%} of the arithmetic's"
            time = f"{1000 * found['seconds']:.3g} ms at {speed:.4g} GB/s, {share}"
        yield f"{name}: each device sends {_giga(found['total'])} a step ({parts}); {time}"


def _host(found: dict[str, Any]) -> str:
    count, interval = found["logged_numbers"], found["log_every_n_steps"]
    losses = "a loss" if count == 1 else f"{count} losses"
    return f"to a device {_giga(found['batch_bytes'])} of data a step; back {losses} in one copy every {interval} steps"


def _storage(found: dict[str, Any], tokens: int, kind: str) -> Iterable[str]:
    yield f"{found['training_images']:,} training images ({found['training_images_from']})"
    images, codes = _giga(found["image_bytes"]), _giga(found["code_bytes"])
    if found["measured"]:
        yield f"on disk {codes if kind == 'gpt' else images}"
    else:
        yield (
            f"images of {found['image_kb']} kB each {images}, codes {codes} ({found['crops']} sequences of {tokens} an "
            "image)"
        )
    if found["text_bytes_at_most"] is not None:
        yield f"text features at most {_giga(found['text_bytes_at_most'])}"
    yield f"a checkpoint {_giga(found['checkpoint_bytes'])}"


def _sampling(entry: dict[str, Any]) -> str:
    how = "with guidance" if entry["guided"] else "plain"
    return (
        f"{how}, {entry['images']} images at once: {_gib(entry['total_bytes'])} GiB, of which cache "
        f"{_gib(entry['cache_bytes'])}; {entry['seconds']:.2g} s at best; largest batch {entry['largest_batch']:,}"
    )


def _memory(plan: dict[str, Any]) -> Table:
    found = plan["memory"]
    title = f"memory of a device in training, GiB; {_gib(found['usable'])} may be used"
    table = Table(title=title, title_justify="left")
    table.add_column("strategy")
    for name in found["strategies"]:
        table.add_column(f"{name}, the config's" if name == plan["strategy"] else name, justify="right")

    def row(label: str, say: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(label, *(say(entry) for entry in found["strategies"].values()))

    row("devices x images on each", lambda entry: f"{entry['devices']} x {entry['images_per_device']}")
    for part, label in _PARTS.items():
        row(label, lambda entry, part=part: _gib(entry[part]))  # type: ignore[misc]
    row("total", lambda entry: _gib(entry["total"]))
    if found["strategies"]["auto"]["while_sampling"] is not None:
        row("while samples are drawn", lambda entry: _gib(entry["while_sampling"]))
    row("", lambda entry: "fits" if entry["fits"] else "too much")
    row("most images that fit a device", lambda entry: f"{entry['largest_images_per_device']:,}")
    row("fewest devices for this batch", lambda entry: str(entry["smallest_devices"] or "never fits"))
    return table


def duration(seconds: float) -> str:
    """In the unit one would say."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} seconds"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.4g} T" if flops >= 1e11 else f"{flops / 1e9:.4g} G"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _giga(size: float) -> str:
    if size < 1e5:
        return f"{size / 1e3:,.1f} kB"
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
