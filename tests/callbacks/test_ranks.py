"""Who died, and what it said last; real processes in place of Lightning's."""

import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch

from smalto.callbacks import ranks
from smalto.callbacks.ranks import RankWatch, log_of_rank


def watched(*codes: str, node: int = 0) -> SimpleNamespace:
    """A trainer whose launcher has started ``python -c CODE`` for each."""
    processes = [subprocess.Popen([sys.executable, "-c", code]) for code in codes]
    launcher = SimpleNamespace(procs=processes)
    return SimpleNamespace(strategy=SimpleNamespace(launcher=launcher), node_rank=node, loggers=[])


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(ranks, "POLL", 0.05)
    monkeypatch.setattr(ranks, "PATIENCE", 3.0)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("raise SystemExit(3)", "failed with exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by SIGKILL"),
    ],
)
def test_a_failed_collective_is_explained(tmp_path, code, how):
    trainer = watched("import time; time.sleep(60)", code, node=1)
    log_of_rank(tmp_path, 2, 1).write_text("".join(f"line {i}\n" for i in range(100)))
    said = rf"rank 2 on node 1 {how}.*node_1_rank_2\.log:\n    line 85\n"
    with pytest.raises(ValueError, match=said) as found, RankWatch(trainer, tmp_path):
        raise RuntimeError("Connection closed by peer")
    assert str(found.value).endswith("line 99")
    assert trainer.strategy.launcher.procs[0].wait(5) < 0  # nobody is left behind


@pytest.mark.usefixtures("_quick")
def test_what_an_earlier_run_said_is_not_repeated(tmp_path):
    log_of_rank(tmp_path, 1).write_text("of an earlier run\n--- now\n")
    with (
        pytest.raises(ValueError, match=r"rank_1\.log: \(nothing\)$"),
        RankWatch(watched("raise SystemExit(3)"), tmp_path),
    ):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("error", [ValueError("of its own"), torch.OutOfMemoryError("of its own"), SystemExit(1)])
def test_errors_of_the_first_process_stay_what_they_are(tmp_path, error):
    trainer = watched("raise SystemExit(3)")
    trainer.strategy.launcher.procs[0].wait(10)
    with pytest.raises(type(error), match=r"of its own|1"), RankWatch(trainer, tmp_path):
        raise error


@pytest.mark.usefixtures("_quick")
def test_a_runtime_error_with_all_others_well(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "PATIENCE", 0.2)
    trainer = watched("import time; time.sleep(60)")
    try:
        with pytest.raises(RuntimeError, match="of its own"), RankWatch(trainer, tmp_path):
            raise RuntimeError("of its own")
    finally:
        trainer.strategy.launcher.procs[0].kill()


def test_a_collective_that_waits_for_ever_is_ended(tmp_path):
    script = f"""
        import os, sys, threading
        from pathlib import Path
        sys.path[:0] = {[p for p in sys.path if p]!r}
        from callbacks.test_ranks import ranks, watched
        from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
        ranks.POLL, ranks.GRACE = 0.05, 2.5
        trainer = watched("raise SystemExit(7)")
        # Lightning's own observer would end this process by SIGKILL as soon as it looks.
        _ChildProcessObserver(os.getpid(), trainer.strategy.launcher.procs, sleep_period=1).start()
        with ranks.RankWatch(trainer, Path({str(tmp_path)!r})):
            threading.Event().wait()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "the process of rank 1 failed with exit code 7, so the run has ended" in done.stderr
