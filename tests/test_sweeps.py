"""Sweeps: names, GPUs, the table; and one with a job that fails, killed in the middle and continued."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from smalto.files import FileLock
from smalto.runtime import compose
from smalto.sweeps.devices import claimed, devices_wanted
from smalto.sweeps.names import job_name
from smalto.sweeps.table import sweep_report


def test_a_job_is_called_by_what_is_swept():
    overrides = ["experiment=demo_gpt", "model=nano", "seed=0", "task.optimizer.lr=1e-3", "a.size=4", "b.size=8"]
    assert job_name(overrides, ["model", "task.optimizer.lr"]) == "model-nano_lr-1e-3"
    assert job_name(overrides, ["a.size", "b.size"]) == "a.size-4_b.size-8"
    assert job_name(overrides, []) == "job"


def test_values_that_no_file_name_can_hold_stay_apart():
    values = ["{dim:4}", "{dim:4 }", "[a/b]", "[ab]", "x" * 300, "x" * 301]
    names = [job_name([f"k={value}"], ["k"]) for value in values]
    assert len(set(names)) == len(values)
    assert all("/" not in name and len(name) < 200 for name in names)


def test_a_gpu_has_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with claimed(1, ["3", "5"]) as (first, _), claimed(1, ["3", "5"]) as (second, _):
        assert (first, second) == (["3"], ["5"])
    with claimed(2, ["3", "5"]) as (both, _):
        assert both == ["3", "5"]
    with pytest.raises(ValueError, match=r"wants 4 GPUs.*shows 2"), claimed(4, ["3", "5"]):
        pass


@pytest.mark.parametrize(
    ("accelerator", "devices", "wanted"), [("auto", 1, 1), ("gpu", "auto", 8), ("cpu", 2, 0), ("gpu", [1], 0)]
)
def test_gpus_wanted(accelerator, devices, wanted):
    assert devices_wanted({"trainer": {"accelerator": accelerator, "devices": devices}}, visible=8) == wanted


def test_the_table_shows_what_differs_and_names_what_failed(tmp_path):
    records = [
        {
            "job": 0,
            "overrides": ["a=1", "seed=0"],
            "status": "kept",
            "metric": "val/loss",
            "value": 2.5,
            "seconds": 3.1,
        },
        {"job": 1, "overrides": ["a=1", "seed=1"], "status": "failed", "error": "no luck", "log": "there.log"},
    ]
    text = sweep_report(records, ["seed"], tmp_path)
    assert text.splitlines()[1].split() == ["0", "seed=0", "kept", "val/loss", "2.5", "3"]
    assert "job 1 failed: seed=1\n  no luck\n  log: there.log" in text
    assert f"1 of 2 job(s) to do: smalto resume {tmp_path}" in text


def test_a_model_size_brings_the_authors_settings_and_the_user_may_differ():
    found = {}
    for model, own in (("l", []), ("xl", ["data.batch_size=8"]), ("3b", [])):
        config = compose("train", ["experiment=c2i_384", f"model={model}", "run_dir=x", *own])
        found[model] = (config.task.optimizer.lr, config.data.batch_size)
    assert found == {"l": (1e-4, 256), "xl": (2e-4, 8), "3b": (2e-4, 512)}


def wait_until(what, process: subprocess.Popen | None = None, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        assert process is None or process.poll() is None, "ended too early"
        time.sleep(0.2)


@pytest.mark.chain
def test_a_sweep_outlives_failures_and_kill_and_is_continued(tmp_path):
    environment = {
        **os.environ,
        "SMALTO_OUTPUTS": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "3,5",  # GPUs that nobody looks for
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "toy_verb", "-m", "seed=2,0,1", "callbacks=none", f"hydra.sweep.dir={folder}"]
    command += ["logger=none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]

    def status(seed: int) -> str | None:
        file = folder / f"seed-{seed}/job.json"
        return json.loads(file.read_text())["status"] if file.exists() else None

    def starts(seed: int) -> list[str]:
        return (folder / f"seed-{seed}/starts.txt").read_text().split()

    sweep = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        ended = {0: "finished", 1: "failed", 2: "running"}
        wait_until(lambda: {seed: status(seed) for seed in ended} == ended, sweep)
        wait_until((folder / "seed-2/starts.txt").exists, sweep)
        assert starts(2) != starts(0) == starts(1), "jobs side by side were given one GPU"
    finally:
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.wait()
    lock = FileLock(folder / "seed-2/.lock")
    lock.acquire(patience=60)  # its process is gone
    lock.release()

    (folder / "later").touch()
    known = "from smalto.sweeps import sweep; sweep.SWEPT_MODULES.add('toy_verb')"  # else only our commands are
    again = [sys.executable, "-c", f"{known}; from smalto.resume import main; main()", str(folder)]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1, done.stderr
    rows = {line.split()[0]: line.split()[2:3] for line in done.stdout.splitlines() if "  seed=" in line}
    assert (rows["0"], rows["1"], rows["2"]) == (["failed"], ["kept"], ["finished"]), done.stdout
    assert "killed by SIGKILL (out of memory?)" in done.stdout
    assert (len(starts(0)), len(starts(1)), len(starts(2))) == (1, 2, 2)
