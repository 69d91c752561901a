"""All rows of all parts into one table and one JSON file, which is written anew after every row."""

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import ceilings, data, metrics, sampling, tokenizer, training
from benchmarks.machine import describe_machine
from benchmarks.rows import Row
from smalto.files import write_json

INTERRUPTED = 130
"""Exit code after Ctrl-C."""


@dataclass(frozen=True)
class Options:
    """What ``make bench`` takes.

    Args:
        rounds: at most so many; parts of long calls take fewer, see ``PARTS``.
        peer: a checkout of FoundationVision/LlamaGen, or None.
        threads: of every computation.
    """

    rounds: int = 9
    peer: str | None = None
    threads: int = 1

    def up_to(self, rounds: int) -> int:
        """Rounds of a part that takes no more than ``rounds``."""
        return min(self.rounds, rounds)


def _sampling(given: Options) -> Iterator[Row]:
    for size, images in sampling.GOALS:
        yield from sampling.sampling_rows(size, images, rounds=given.rounds, peer=given.peer)


def _tokenizer(given: Options) -> Iterator[Row]:
    yield from tokenizer.quantizer_rows(rounds=given.rounds)
    yield from tokenizer.coding_rows(rounds=given.up_to(3), peer=given.peer)
    yield from tokenizer.ten_crop_rows(rounds=given.up_to(1), peer=given.peer)


def _data(given: Options) -> Iterator[Row]:
    yield from data.code_rows(rounds=given.rounds)
    yield from data.image_rows(rounds=given.rounds)


def _metrics(given: Options) -> Iterator[Row]:
    yield from metrics.root_rows(rounds=given.up_to(1))
    yield from metrics.suite_rows(rounds=given.up_to(1))


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "ceilings": lambda given: iter(ceilings.ceiling_rows()),
    "sampling": _sampling,
    "calls": lambda given: iter(sampling.call_rows(rounds=given.up_to(1), peer=given.peer)),
    "training": lambda given: iter(training.training_rows(batch=2, rounds=given.up_to(3), peer=given.peer)),
    "tokenizer": _tokenizer,
    "data": _data,
    "metrics": _metrics,
}


def chosen_parts(wanted: str | None) -> list[str]:
    """Names from ``sampling,metrics``, in the order of ``PARTS``; all for None.

    Raises:
        ValueError: a name that is not there.
    """
    names = list(PARTS) if wanted is None else wanted.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ValueError(f"parts has {', '.join(map(repr, unknown))}, choose of {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


def measured(name: str, options: Options) -> Iterator[Row]:
    """Rows of a part, each as soon as it is there, from a process of its own.

    What one part leaves behind in allocators moves the figures of the next: the quantizer's distance matrix takes
    0.53 s in a fresh process and 0.15 s behind sampling and training, its lookup by chunks 0.08 s in both.

    Raises:
        KeyboardInterrupt: the process was interrupted.
        RuntimeError: it failed; its traceback is on the screen.
    """
    context = multiprocessing.get_context("fork")  # this process imports, but never computes
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(name, options, send))
    process.start()
    send.close()
    try:
        with contextlib.suppress(EOFError):
            while True:
                yield receive.recv()
        process.join()
    finally:
        process.terminate()
        process.join()
    if process.exitcode == INTERRUPTED:
        raise KeyboardInterrupt
    if process.exitcode:
        raise RuntimeError(f"{name} failed, see above")


def _measure(name: str, options: Options, send: Connection) -> None:
    torch.set_num_threads(options.threads)
    try:
        for row in PARTS[name](options):
            send.send(row)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def run(*, parts: list[str], options: Options, out: Path) -> dict[str, Any]:
    """Measure; what was measured is in ``out`` and on the screen however it ends."""
    console = Console(stderr=True, highlight=False)
    found: dict[str, Any] = {
        "machine": describe_machine(),
        "options": asdict(options) | {"parts": parts},
        "begun": datetime.now().isoformat(timespec="seconds"),
        "finished": [],
        "rows": [],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for number, name in enumerate(parts, start=1):
            console.print(f"[{number}/{len(parts)}] {name} ...", markup=False)
            start = time.perf_counter()
            for row in measured(name, options):
                found["rows"].append({"part": name, **asdict(row), "met": row.met})
                write_json(out, found)
            found["finished"].append({"part": name, "seconds": round(time.perf_counter() - start, 1)})
            write_json(out, found)
            console.print(f"[{number}/{len(parts)}] {name}: {found['finished'][-1]['seconds']} s", markup=False)
    finally:
        Console(width=None if sys.stdout.isatty() else 160).print(table(found))
        console.print(f"written to {out}", markup=False)
    return found


def table(found: dict[str, Any]) -> Table:
    """Of what :func:`run` found."""
    machine, threads = found["machine"], found["options"]["threads"]
    title = (
        f"{machine['cpu']} ({' '.join(machine['flags'])}), {threads} of {machine['cores']} cores, "
        f"load {machine['load']}, torch {machine['torch']}; {_clock(threads)}"
    )
    shown = Table(title=title, title_justify="left")
    shown.add_column("what / against what", max_width=78)
    for column in ("ours", "other", "unit", "ratio", "goal", "met"):
        shown.add_column(column, justify="right" if column in ("ours", "other", "ratio") else "left", no_wrap=True)
    part = None
    for row in found["rows"]:
        if part not in (None, row["part"]):
            shown.add_section()
        part = row["part"]
        name = row["name"] + (f" [dim]({row['note']})[/dim]" if row["note"] else "")
        figures = [_figure(row[key]) for key in ("ours", "baseline")]
        shown.add_row(name, *figures, row["unit"], _figure(row["ratio"]), row["goal"], _met(row))
    return shown


def _clock(threads: int) -> str:
    return "seconds of processor time" if threads == 1 else "seconds on the clock"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"


def _met(row: dict[str, Any]) -> str:
    if row["met"] is not None:
        return "yes" if row["met"] else "no"
    if not row["goal"]:
        return ""
    return "not here" if row["ours"] is None else "needs peer="


def default_file() -> Path:
    """In the folder of everything the program writes."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return Path(os.environ.get("SMALTO_OUTPUTS", "outputs")) / "bench" / f"{stamp}.json"


def main(given: dict[str, str]) -> None:
    """Run with ``key=value`` options.

    Raises:
        ValueError: a value out of range, no checkout at ``peer``.
    """
    rounds, threads, peer = int(given.get("rounds", 9)), int(given.get("threads", 1)), given.get("peer")
    if min(rounds, threads) < 1:
        raise ValueError(f"rounds is {rounds} and threads is {threads}; both must be at least 1")
    if peer is not None and not Path(peer, "autoregressive/models/gpt.py").is_file():
        raise ValueError(
            f"no checkout of FoundationVision/LlamaGen at peer={peer}: it has no autoregressive/models/gpt.py"
        )
    parts = chosen_parts(given.get("parts"))
    run(parts=parts, options=Options(rounds, peer, threads), out=Path(given.get("out") or default_file()))
