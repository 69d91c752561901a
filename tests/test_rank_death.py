"""kill -9 of one of two processes, and SIGTERM to both: the job ends by itself, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tiny_tasks import TINY_GPT

pytestmark = pytest.mark.chain

SETTINGS = [
    *TINY_GPT,
    "logger=none",
    "trainer.accelerator=cpu",
    "trainer.devices=2",
    "strategy=ddp",
    "trainer.max_steps=120",
    "trainer.val_check_interval=120",
    "callbacks=_common",
    "callbacks.checkpoint.every_n_steps=10",
    "model.num_layers=1",
    "data.num_train=64",
    "data.num_val=10",
]


class Job:
    """``smalto train`` of two processes, in a session of its own."""

    def __init__(self, folder):
        self.folder = folder
        command = [sys.executable, "-m", "smalto", "train", f"hydra.run.dir={folder}", *SETTINGS]
        environment = {**os.environ, "SMALTO_OUTPUTS": str(folder), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, timeout: float) -> tuple[int, str]:
        try:
            text, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        until = time.monotonic() + 10
        while self.members() and time.monotonic() < until:
            time.sleep(0.1)
        assert not self.members(), "processes are left behind"
        return self.process.returncode, text

    def members(self) -> list[int]:
        found = subprocess.run(["ps", "-o", "pid=", "-g", str(self.process.pid)], capture_output=True, text=True)
        return [int(line) for line in found.stdout.split() if int(line) != self.process.pid]

    def wait_for_step(self, after: int) -> int:
        """Wait for a checkpoint beyond step ``after``; its step."""
        until = time.monotonic() + 90
        while time.monotonic() < until and self.process.poll() is None:
            if (step := saved_step(self.folder)) > after:
                return step
            time.sleep(0.05)
        raise AssertionError("no checkpoint came")


def saved_step(folder) -> int:
    return max((int(p.stem.split("_")[1]) for p in (folder / "checkpoints").glob("step_*.ckpt")), default=0)


def test_the_job_ends_by_itself_and_resumes_exactly(tmp_path):
    code, text = Job(tmp_path / "unbroken").end(120)
    assert code == 0, text

    job = Job(tmp_path / "broken")
    step = job.wait_for_step(0)
    other = next(
        pid for pid in job.members() if b"LOCAL_RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    os.kill(other, signal.SIGKILL)
    code, text = job.end(60)
    assert code == 1
    assert "the process of rank 1 was killed by SIGKILL" in text
    assert "Traceback" not in text

    job = Job(tmp_path / "broken")
    step = job.wait_for_step(max(step, saved_step(tmp_path / "broken")))
    assert step < 120
    os.killpg(job.process.pid, signal.SIGTERM)
    code, text = job.end(60)
    assert code != 0, text
    assert step <= saved_step(tmp_path / "broken") < 120

    code, text = Job(tmp_path / "broken").end(120)
    assert code == 0, text
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("unbroken", "broken")
    ]
    for key, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][key]), key
    metrics = [(tmp_path / name / "metrics.json").read_text() for name in ("unbroken", "broken")]
    assert metrics[0].split('"val/loss"')[1] == metrics[1].split('"val/loss"')[1]
