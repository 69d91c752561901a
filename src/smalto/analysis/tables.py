"""Runs that can be compared, as tables for figures: pure functions of :func:`smalto.analysis.runs.runs_table`."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from smalto.analysis.scaling import GPTShape

LEAST = 3
"""Sizes, codebooks or settings that make a comparison."""

TRAINED = ["experiment", "params.data/path", "params.trainer/max_steps", "params.trainer/max_epochs"]
TRAINED += ["tags.ablation", "features"]
"""Training runs that agree in these can be compared by what is left: size, codebook, seed."""

SAMPLED = ["ckpt", "step", "num_samples", "reference", "eval_size", "seed", "features"]
CONTROLS = ["cfg_scale", "cfg_interval", "temperature", "top_k", "top_p"]


def codebook_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Tokenizers that differ in their codebook, from :func:`smalto.analysis.runs.runs_table`.

    Returns:
        ``run_id, codebook_dim, codebook_size, seed, features, rfid, psnr, ssim, usage`` (in percent); empty if no
        three runs compare.
    """
    columns = {
        "run_id": "run_id",
        "params.tokenizer/quantizer/codebook_dim": "codebook_dim",
        "params.tokenizer/quantizer/codebook_size": "codebook_size",
        "params.seed": "seed",
        "features": "features",
        "rfid": "rfid",
        "metrics.val/psnr": "psnr",
        "metrics.val/ssim": "ssim",
        "metrics.val/codebook_usage": "usage",
    }
    table = _finished(runs, "tokenizer")
    table["features"], table["rfid"] = _by_network(table, "metrics.val/rfid_")
    codebook = ["codebook_dim", "codebook_size"]
    table = _renamed(table, columns).dropna(subset="psnr")
    table = _largest_group(table, [*TRAINED, "params.data/batch_size", "params.task/optimizer/lr"], codebook)
    table = table.drop_duplicates([*codebook, "seed"]).sort_values([*codebook, "seed"])
    table = table.astype(dict.fromkeys([*codebook, "seed"], int))
    return (
        table.assign(usage=100 * table["usage"].astype(float))
        .reindex(columns=[*columns.values()])
        .reset_index(drop=True)
    )


def scaling_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Generators that differ in size, from :func:`smalto.analysis.runs.runs_table` with ``step_of="val/loss"``.

    Of several runs of one size and seed, with other learning rates say, the one of the lowest loss.

    Returns:
        ``run_id, label, parameters, forward_flops`` (one image), ``images`` (seen in training), ``training_flops`` (all
        of it), ``seed, loss`` (validation, nats per code), ``features, fid``; empty if no three sizes compare.
    """
    names = ["run_id", "label", "parameters", "forward_flops", "images", "training_flops"]
    names += ["seed", "loss", "features", "fid"]
    table = _finished(runs, "gpt")
    table = table[_column(table, "params.model/_target_") == "smalto.models.gpt.GPT"].copy()
    table["features"], table["fid"] = _by_network(table, "metrics.gen/fid_")
    table = _renamed(table, {"params.seed": "seed", "metrics.val/loss": "loss"})
    table = table.dropna(subset="loss")
    shapes = [GPTShape.from_run(row) for row in table.to_dict("records")]
    table["parameters"] = [shape.parameters for shape in shapes]
    table["label"] = [short_number(shape.parameters) for shape in shapes]
    table["forward_flops"] = [shape.forward_flops for shape in shapes]
    limit = pd.to_numeric(_column(table, "params.trainer/max_steps"))
    steps = limit.where(limit > 0, pd.to_numeric(_column(table, "step")) + 1)  # -1: epochs were the limit
    accumulated = pd.to_numeric(_column(table, "params.trainer/accumulate_grad_batches")).fillna(1)
    table["images"] = steps * pd.to_numeric(_column(table, "params.data/batch_size")) * accumulated
    table["training_flops"] = table["images"] * [shape.training_flops for shape in shapes]
    table = _largest_group(table, TRAINED, ["parameters"]).sort_values(["parameters", "seed", "loss"])
    return table.drop_duplicates(["parameters", "seed"]).reindex(columns=names).reset_index(drop=True)


def sampling_table(runs: pd.DataFrame) -> pd.DataFrame:
    """Samplings of one generator, from evaluations and from trainings with ``callbacks.generation.cfg_scales``.

    Returns:
        ``ckpt, num_samples``, the fields of ``sampling``, ``features, fid, is, precision, recall``; empty if no three
        settings compare.
    """
    names = ["ckpt", "num_samples", *CONTROLS, "features", "fid", "is", "precision", "recall"]
    evaluated = _measured_alone(runs)
    table = pd.concat([evaluated, _measured_in_training(runs)], ignore_index=True)
    for name in CONTROLS:
        table[name] = pd.to_numeric(_column(table, name))
    table = _largest_group(table, SAMPLED, CONTROLS)
    return table.drop_duplicates(CONTROLS).sort_values(CONTROLS).reindex(columns=names).reset_index(drop=True)


def vary(table: pd.DataFrame, control: str) -> pd.DataFrame:
    """The rows of a sampling table in which only ``control`` changes: as many as there are."""
    others = [name for name in CONTROLS if name != control and name in table]
    return _largest_group(table, others, [control], least=1).sort_values(control).reset_index(drop=True)


def short_number(value: float) -> str:
    """1,969,920 as 2.0M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value >= 10 * size else f"{value / size:.1f}{letter}"
    return f"{value:g}"


def _finished(runs: pd.DataFrame, kind: str) -> pd.DataFrame:
    return runs[(_column(runs, "status") == "FINISHED") & (_column(runs, "params.kind") == kind)].copy()


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    return table[name] if name in table else pd.Series(None, index=table.index, dtype=object)


def _renamed(table: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Columns under new names, made if missing; the others stay, grouping needs them."""
    return table.assign(**{new: _column(table, old) for old, new in names.items()})


def _by_network(table: pd.DataFrame, prefix: str) -> tuple[pd.Series, pd.Series]:
    """Name of the network and value of a metric whose name carries the network: one per run."""
    columns = [name for name in table if str(name).startswith(prefix)]
    if not columns:
        return _column(table, ""), _column(table, "").astype(float)
    values = table[columns].astype(float)
    first = [row.first_valid_index() for _, row in values.iterrows()]
    network = [None if name is None else name.removeprefix(prefix) for name in first]
    return pd.Series(network, table.index, dtype=object), values.bfill(axis=1).iloc[:, 0]


def _largest_group(table: pd.DataFrame, same: list[str], differ: list[str], *, least: int = LEAST) -> pd.DataFrame:
    """The rows that agree in ``same`` and have most different ``differ``; of equals the first, none below ``least``."""
    if table.empty:
        return table.reindex(columns=[*table, *(name for name in differ if name not in table)])
    keys = pd.DataFrame({name: _column(table, name).map(str) for name in same}, index=table.index)
    group = keys.agg("|".join, axis=1) if same else pd.Series("", table.index)
    counts = table.assign(_group=group).drop_duplicates(["_group", *differ])["_group"].value_counts(sort=False)
    if counts.max() < least:
        return table.iloc[:0]
    return table[group == counts.idxmax()]


def _measured_alone(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per ``smalto evaluate`` of a generator."""
    table = runs[(_column(runs, "experiment") == "evaluate_gpt") & (_column(runs, "status") == "FINISHED")].copy()
    table["features"], table["fid"] = _by_network(table, "metrics.fid_")
    for name in ("is", "precision", "recall"):
        table[name] = _by_network(table, f"metrics.{name}_")[1]
    params = ("ckpt", "step", "num_samples", "reference", "eval_size", "seed")
    names = {f"params.{name}": name for name in params} | {f"params.sampling.{name}": name for name in CONTROLS}
    return _renamed(table, names).dropna(subset="fid")


def _measured_in_training(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per guidance scale that a training run measured on its way: ``gen/cfg1.5/fid_lite0_160``."""
    rows: list[dict[str, Any]] = []
    for run in _finished(runs, "gpt").to_dict("records"):
        scales: dict[float, dict[str, Any]] = {}
        for key, value in run.items():
            named = re.fullmatch(r"metrics\.gen/cfg([\d.]+)/(fid|is|precision|recall)_(\w+)", str(key))
            if named and value == value:
                row = scales.setdefault(float(named[1]), {"features": named[3]})
                row[named[2]] = value
        settings = {name: run.get(f"params.sampling/{name}") for name in CONTROLS}
        samples = run.get("params.callbacks/generation/final_num_samples")
        for scale, row in scales.items():
            rows.append({"ckpt": run["run_id"], "num_samples": samples, **settings, **row, "cfg_scale": scale})
    return pd.DataFrame(rows)
