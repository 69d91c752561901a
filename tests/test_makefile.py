"""``make`` targets: listed in the help, and each starts a command whose config composes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from smalto.runtime import compose

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str, code: int = 0) -> str:
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_help_lists_every_target():
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split()
    listed = re.findall(r"^ +make (\S+)", make("help"), re.MULTILINE)
    assert sorted(listed) == sorted(set(targets))


@pytest.mark.parametrize(
    ("target", "batch", "image"),
    [
        ("train-tokenizer-f8", 128, 256),
        ("train-xl", 256, 384),
        ("train-xxl", 512, 384),
        ("train-t2i-xl-stage2", 256, 512),
    ],
)
def test_a_target_starts_what_its_name_says(target, batch, image):
    line = next(line for line in make("-n", target, "IMAGE=384", "GPUS=4").splitlines() if "smalto train" in line)
    overrides = line.split(" train ")[1].split()
    assert ("strategy=fsdp" in overrides) == (target == "train-xxl")
    config = compose("train", [*(each for each in overrides if each != "strategy=fsdp"), "run_dir=x"])
    assert (config.data.batch_size, config.image_size, config.trainer.devices) == (batch, image, 4)


def test_several_machines_need_an_address_and_a_dry_run_runs_nothing():
    assert "HEAD=HOST:PORT" in make("-n", "train-b", "NODES=2", code=2)
    assert "torchrun --nnodes=2 --nproc_per_node=8" in make("-n", "train-b", "NODES=2", "HEAD=a:1")
    dry = make("-n", "train-3b", "DRY=1")
    assert "--cfg job --resolve" in dry
    assert "smalto plan experiment=c2i_256 model=3b strategy=fsdp" in dry
