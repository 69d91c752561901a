"""The commands themselves, on tiny data: what a user types, in the order they type it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.chain

TINY_TOKENIZER = [
    "experiment=demo_tokenizer",
    "tokenizer.base_channels=8",
    "tokenizer.z_channels=16",
    "trainer.max_steps=6",
    "trainer.val_check_interval=3",
    "task.disc_start=3",
    "callbacks.checkpoint.every_n_steps=2",
    "features=lite0",
    "features.size=32",
    "data.batch_size=8",
]
TINY_GPT = [
    "experiment=demo_gpt",
    "model.dim=32",
    "model.num_layers=1",
    "tokenizer.base_channels=8",
    "tokenizer.z_channels=16",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "callbacks.checkpoint.every_n_steps=2",
    "callbacks.generation.every_n_steps=2",
    "callbacks.generation.num_samples=20",
    "callbacks.generation.final_num_samples=20",
    "callbacks.generation.sheet_columns=2",
    "features=lite0",
    "features.size=32",
    "data.batch_size=8",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chain")


def smalto(home: Path, *arguments: str, code: int = 0) -> str:
    """Run a command in ``home``; returns its output, stdout and stderr together."""
    environment = {**os.environ, "SMALTO_OUTPUTS": str(home / "outputs"), "OMP_NUM_THREADS": "2"}
    environment.pop("SMALTO_LAUNCHED_AT", None)
    done = subprocess.run(
        [sys.executable, "-m", "smalto", *arguments],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert done.returncode == code, done.stdout[-3000:]
    return done.stdout


def test_help_lists_the_verbs(home):
    text = smalto(home)
    assert all(verb in text for verb in ("prepare", "train", "extract", "sample", "evaluate"))
    assert "unknown verb 'trian'" in smalto(home, "trian", code=1)


def test_chain(home):
    outputs = home / "outputs"
    images, codes = outputs / "data/fashion_mnist", outputs / "data/fashion_mnist_codes"
    smalto(home, "prepare", f"out={images}", "resize=pad", "image_size=32", "limit=400")
    smalto(home, "train", *TINY_TOKENIZER)
    tokenizer = outputs / "demo/tokenizer"
    measured = json.loads((tokenizer / "metrics.json").read_text())
    assert {"val/psnr", "val/ssim", "val/codebook_usage", "val/rfid_lite0_32", "train/disc_loss"} <= set(measured)
    ckpt = tokenizer / "checkpoints/last.ckpt"
    smalto(home, "extract", f"tokenizer_ckpt={ckpt}", "data=fashion_mnist", f"out={codes}", "crops=ten")
    smalto(home, "train", *TINY_GPT)
    generator = outputs / "demo/gpt"
    measured = json.loads((generator / "metrics.json").read_text())
    assert {"val/loss", "gen/fid_lite0_32", "gen/is_lite0_32", "gen/class_accuracy_lite0_32"} <= set(measured)
    assert list((generator / "sheets/gen").glob("*.png"))

    ckpt = generator / "checkpoints/last.ckpt"
    out = home / "samples"
    smalto(home, "sample", f"ckpt={ckpt}", f"out={out}", "num_images=12", "labels=[Bag,3]", "sampling.cfg_scale=2")
    array = np.load(out / "samples.npz")
    assert array["arr_0"].shape == (12, 32, 32, 3)
    number = array["index"]  # shuffled, for evaluators that split in the order of the file
    assert array["labels"].tolist() == [[8, 3][i % 2] for i in number]
    assert np.array_equal(array["arr_0"][5], np.asarray(Image.open(out / f"images/{number[5]:06d}.png")))
    assert (out / "sheet.png").exists()

    table = smalto(home, "evaluate", f"ckpt={tokenizer}/checkpoints/last.ckpt", "features=lite0", "features.size=32")
    assert "psnr" in table
    assert "rfid_lite0_32" in table
    evaluate = ["evaluate", f"ckpt={ckpt}", "num_samples=30", "baselines=true", "features=lite0", "features.size=32"]
    table = smalto(home, *evaluate)
    assert "uniform_codes/fid_lite0_32" in table
    assert "position_unigram_loss" in table
    assert "measured already" in smalto(home, *evaluate)


def test_finished_stages_are_reused_not_repeated(home):
    images = home / "outputs/data/fashion_mnist"
    text = smalto(home, "prepare", f"out={images}", "resize=pad", "image_size=32", "limit=400")
    assert "complete already" in text
    assert "finished already" in smalto(home, "train", *TINY_TOKENIZER)


def test_sweep_runs_two_jobs_in_two_folders(home):
    plain = [argument for argument in TINY_GPT if not argument.startswith("callbacks.")]
    smalto(home, "train", "-m", *plain, "callbacks=none", "name=two_seeds", "seed=1,2")
    folders = sorted(path for path in (home / "outputs/sweeps/two_seeds").glob("*/*") if path.is_dir())
    assert [folder.name for folder in folders] == ["seed-1", "seed-2"]
    losses = {json.loads((folder / "metrics.json").read_text())["val/loss"] for folder in folders}
    assert len(losses) == 2

    from smalto.analysis.runs import SWEEP_TAG, client

    store = client(f"sqlite:///{home}/outputs/mlflow.db")
    runs = store.search_runs([store.get_experiment_by_name("two_seeds").experiment_id])
    parent = next(run.info for run in runs if SWEEP_TAG in run.data.tags)
    assert parent.status == "FINISHED"
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.run_id]
    assert sorted(run.data.params["seed"] for run in children) == ["1", "2"]


def test_resume_continues_a_run_by_its_folder_alone(home):
    folder = home / "outputs/demo/gpt"
    before = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").unlink()
    smalto(home, "resume", str(folder))
    assert json.loads((folder / "metrics.json").read_text())["val/loss"] == before["val/loss"]
    assert "config.yaml" in smalto(home, "resume", str(home), code=1)


def test_mlflow_holds_every_run_of_the_chain(home):
    from smalto.analysis.runs import runs_table

    table = runs_table(f"sqlite:///{home}/outputs/mlflow.db")
    done = set(table.loc[table.status == "FINISHED", "experiment"])
    chain = {"prepare", "demo_tokenizer", "extract", "demo_gpt", "sample", "evaluate_tokenizer", "evaluate_gpt"}
    assert chain | {"two_seeds"} <= done
    trained = table[table.experiment == "demo_gpt"].iloc[0]
    assert trained["params.model/dim"] == 32
    assert trained["tags.commit"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "experiment=demo_gpt", "model=huge"], "nano"),
        (["train", "experiment=demo_gpt", "model.dmi=3"], "dmi"),
        (["train", "experiment=demo_gpt", "data.path=nowhere", "hydra.run.dir=other"], "smalto extract"),
        (["train", *TINY_GPT, "trainer.max_steps=9"], "other settings"),
        (["sample", "ckpt=nowhere.ckpt"], "does not exist"),
        (["sample", "ckpt=outputs/demo/gpt/checkpoints/last.ckpt", "labels=[Hat]"], "Sneaker"),
        (["sample", "ckpt=outputs/demo/gpt/checkpoints/last.ckpt", "sampling.top_p=0"], "top_p"),
        (["sample", "ckpt=outputs/demo/gpt/checkpoints/last.ckpt", "engine.dtype=fp8"], "auto, fp32, bf16, fp16"),
        (["sample", "ckpt=outputs/demo/gpt/checkpoints/last.ckpt", "device=tpu"], "auto, cpu"),
        (["sample", "ckpt=outputs/demo/tokenizer/checkpoints/last.ckpt"], "is a tokenizer"),
        (["extract", "tokenizer_ckpt=outputs/demo/gpt/checkpoints/last.ckpt", "data=fashion_mnist", "out=x"], "gpt"),
        (["train", *TINY_GPT, "tokenizer.quantizer.codebook_size=64", "hydra.run.dir=other"], "codebook_size"),
    ],
)
def test_mistakes_are_told_in_one_message(home, arguments, said):
    before = sorted(str(path) for path in home.rglob("*") if path.is_file())
    text = smalto(home, *arguments, code=1)
    assert said in text
    assert "Traceback" not in text
    after = sorted(str(path) for path in home.rglob("*") if path.is_file())
    assert [path for path in before if path not in after] == [], "a failed command destroyed something"
