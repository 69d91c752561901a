"""An MLflow store with the runs of three studies, as the commands would have recorded them."""

from pathlib import Path

import pytest

from smalto.analysis.recorder import record_job

GPT = {
    "kind": "gpt",
    "model/_target_": "smalto.models.gpt.GPT",
    "model/num_layers": 2,
    "model/num_heads": 4,
    "model/num_kv_heads": None,
    "model/vocab_size": 512,
    "model/code_shape": [[8, 8]],
    "model/ffn_multiple_of": 256,
    "model/conditioner/num_classes": 10,
    "trainer/max_steps": 100,
    "trainer/accumulate_grad_batches": 1,
    "data/path": "codes",
    "data/batch_size": 64,
    "seed": 0,
}
SAMPLING = {"cfg_interval": -1, "temperature": 1.0, "top_p": 1.0}


def record(store: Path, experiment: str, params: dict, metrics: dict, **tags: str) -> None:
    record_job(
        f"sqlite:///{store}",
        store.parent,
        experiment=experiment,
        run_name=experiment,
        params=params,
        metrics=metrics,
        tags=tags,
        artifacts=[],
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    # Scaling: four sizes of one study, one of them repeated with a worse loss, and a run of another study.
    for dim, loss in ((64, 3.0), (128, 2.5), (256, 2.25), (512, 2.125), (128, 2.9)):
        metrics = {"val/loss": loss, "train/loss": loss + 0.1, "gen/fid_lite0_160": 20 * loss}
        record(path, "scaling", GPT | {"model/dim": dim}, metrics, sweep="scaling")
    record(path, "other", GPT | {"model/dim": 64}, {"val/loss": 1.0})
    record(path, "other_class", GPT | {"model/dim": 64, "model/_target_": "x.Y"}, {"val/loss": 1.0})
    # Codebooks: a cross around (8, 512), recorded twice.
    for shift in (1, 0):
        for dim, size in ((4, 512), (8, 512), (32, 512), (8, 128), (8, 2048)):
            codebook = {"tokenizer/quantizer/codebook_dim": dim, "tokenizer/quantizer/codebook_size": size}
            params = {"kind": "tokenizer", "seed": 0, "data/path": "images", "trainer/max_steps": 10, **codebook}
            metrics = {"val/psnr": dim + shift, "val/ssim": 0.5, "val/rfid_lite0_160": size, "val/codebook_usage": 0.5}
            record(path, "tokenizer_codebook", params, metrics)
    # Sampling: a guidance curve and a top-k curve of one checkpoint, a single evaluation of another.
    for ckpt, scale, top_k in (*(("a.ckpt", s, 0) for s in (1.0, 2.0, 3.0)), ("a.ckpt", 2.0, 50), ("b.ckpt", 2.0, 0)):
        control = SAMPLING | {"cfg_scale": scale, "top_k": top_k}
        params = {"ckpt": ckpt, "num_samples": 100} | {f"sampling.{name}": value for name, value in control.items()}
        metrics = {"fid_lite0_160": 10 + scale + top_k, "is_lite0_160": scale, "precision_lite0_160": 0.5}
        record(path, "evaluate_gpt", params, {**metrics, "recall_lite0_160": 0.5, "uniform_codes/fid_lite0_160": 400})
    return path


@pytest.fixture
def store_uri(store: Path) -> str:
    return f"sqlite:///{store}"
