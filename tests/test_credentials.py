"""What a run writes down holds no password and no signature, and it goes on all the same."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from smalto import resume, train
from smalto.errors import InputError
from smalto.runtime import compose
from smalto.sweeps import jobs, sweep
from smalto.sweeps.names import WHOLE_CONFIG
from smalto.tasks.checkpoint import load_task
from smalto.tasks.contents import CONFIG_KEY
from test_train import SYNTHETIC

SIGNED = "https://ann:hunter2@bucket.example.org/{000..009}.tar?X-Amz-Signature=hunter2"


def config(folder: Path, *overrides: str):
    return compose("train", [*SYNTHETIC, f"run_dir={folder}", f"+origin='{SIGNED}'", "trainer.max_steps=2", *overrides])


def test_no_file_of_a_run_holds_credentials_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smalto", "train", f"+origin={SIGNED}"])
    first = train.run(config(tmp_path / "run"))
    for file in (path for path in (tmp_path / "run").rglob("*") if path.is_file()):
        assert b"hunter2" not in file.read_bytes(), file
    assert (
        "bucket.example.org/{000..009}.tar?***" in json.loads((tmp_path / "run/provenance.json").read_text())["command"]
    )
    kept = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)[CONFIG_KEY]["config"]
    assert kept["origin"] == "https://***@bucket.example.org/{000..009}.tar?***"
    assert kept.keys().isdisjoint({"logger", "paths"})
    assert load_task(tmp_path / "run/checkpoints/last.ckpt").step == 2
    assert train.run(config(tmp_path / "run")) == first, "another signature is no other setting"
    with pytest.raises(InputError, match=r"keeps no credentials.*with origin in full.*hydra.run.dir="):
        resume.run(tmp_path / "run")


def test_a_tracking_address_comes_back_from_the_environment(tmp_path, monkeypatch):
    uri = "http://ann:hunter2@mlflow.example.org"
    run = tmp_path / "run"
    run.mkdir()
    plain = {"run_dir": str(run), "logger": {"mlflow": {"tracking_uri": "http://***@mlflow.example.org"}}}
    (run / "config.yaml").write_text(yaml.safe_dump(plain))
    seen = []
    monkeypatch.setattr(train, "run", seen.append)
    with pytest.raises(InputError, match=r"logger\.mlflow\.tracking_uri.*MLFLOW_TRACKING_URI"):
        resume.run(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    resume.run(run)
    assert seen[0].logger.mlflow.tracking_uri == uri


def test_a_checkpoint_that_has_logger_and_paths_still_loads(tmp_path):
    train.run(config(tmp_path / "run"))
    path = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content[CONFIG_KEY]["config"] |= {"logger": {"csv": {"_target_": "os.system"}}, "paths": {"outputs": "/x"}}
    torch.save(content, tmp_path / "old.ckpt")
    assert load_task(tmp_path / "old.ckpt").step == 2


def test_jobs_of_a_sweep_get_what_their_files_leave_out(tmp_path, monkeypatch):
    seen = {}

    def process(command, environment, log_file, files, *, echo):
        seen.update(environment)
        return 1

    monkeypatch.setattr(jobs, "wait_for", process)
    plain = {"source": SIGNED, "token": "hunter2", "trainer": {"devices": 1}}
    jobs.start(
        "smalto.train",
        tmp_path,
        plain,
        {"status": "running", "overrides": [f"source={SIGNED}"]},
        echo=False,
        share=False,
    )
    assert json.loads(seen[WHOLE_CONFIG]) == plain
    assert not [path for path in tmp_path.iterdir() if b"hunter2" in path.read_bytes()]
    jobs.start("smalto.train", tmp_path, {"seed": 1}, {"status": "running"}, echo=False, share=False)


@pytest.mark.parametrize("module", ["os", "smalto.runtime", "antigravity", "smalto.train.os", 3])
def test_a_sweep_continues_commands_of_ours_only(tmp_path, module, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smalto"])
    (tmp_path / "sweep.json").write_text(json.dumps({"module": module, "arguments": [], "cwd": str(tmp_path)}))
    with pytest.raises(InputError, match="no command of smalto"):
        sweep.again(tmp_path)


def test_a_sweep_with_credentials_asks_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["smalto"])
    told = {"module": "smalto.train", "arguments": ["-m", "source=https://***@x.org"], "cwd": str(tmp_path)}
    (tmp_path / "sweep.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"keeps no credentials.*hydra\.sweep\.dir="):
        sweep.again(tmp_path)
