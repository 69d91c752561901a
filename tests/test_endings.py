"""How commands end: users are told in one message, bugs keep their traceback, signals leave one line."""

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from smalto import endings, resume, sweep_job
from smalto.endings import BUG, INTERRUPTED, REFUSED, TERMINATED, ending
from smalto.errors import InputError, MissingFile, StorageError
from smalto.runtime import build, compose, setup_logging
from smalto.signals import AtOnce, Terminated, begin_work
from smalto.sweeps.jobs import read_record


def raised(job) -> BaseException:
    """What ``job`` raises, with its traceback."""
    try:
        job()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


class Built:
    """What a config may build."""

    def __init__(self, what: str = "") -> None:
        if what == "refuse":
            raise InputError("what is refused")
        if what == "bug":
            raise ValueError("too many values to unpack")


BUGGY = {"_target_": "smalto.runtime.raster_shape", "image_size": 32, "channel_multipliers": 3}
"""A node whose call stumbles inside smalto."""


class Items:
    """A data set of one item, which cannot be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise StorageError("shard.tar is damaged; restore it")


def chained(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (lambda: build({"_target_": "test_endings.Built", "what": "refuse"}), "what is refused"),
        (lambda: build({"_target_": "test_endings.Built", "wat": 1}), "unexpected keyword argument 'wat'"),
        (lambda: build({"_target_": "test_endings.Bilt"}), "Error locating target 'test_endings.Bilt'"),
        (lambda: build({"_target_": "lightning.pytorch.Trainer", "strategy": "magic"}), "strategy='magic'"),
        (lambda: OmegaConf.create({"a": "${b}"}).a, "Interpolation key 'b' not found"),
        (lambda: OmegaConf.create({"a": "???"}).a, "a is needed: a=VALUE"),
        (lambda: list(DataLoader(Items(), num_workers=1)), "shard.tar is damaged; restore it"),
        (lambda: Path("/proc/version/x").read_text(), "a part of the path is no folder: /proc/version/x"),
        (lambda: bytearray(1 << 60), "not enough memory"),
    ],
)
def test_what_the_user_can_change_is_told_in_a_line(job, said):
    end = ending(raised(job))
    assert end.code == REFUSED
    assert said in end.message
    assert "Traceback" not in end.message
    assert len(end.message.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "the disk is full: a/b"),
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), "no permission: a/b"),
        (OSError(errno.EROFS, "Read-only file system", "a"), "the file system is read-only: a"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"), "not enough memory"),
        (RuntimeError("std::bad_alloc"), "not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "ulimit -v"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "memory"),
        (MisconfigurationException("No supported gpu backend found!"), "No supported gpu backend"),
        (MissingFile("no folder x"), "no folder x"),
        (chained(RuntimeError("building failed"), InputError("seed is -1")), "seed is -1"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(error, said):
    assert ending(error).code == REFUSED
    assert said in ending(error).message


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not enough values to unpack (expected 2, got 1)"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        KeyError("x"),
        AssertionError(),
        raised(lambda: OmegaConf.create({"a": 1}, flags={"struct": True}).b),
        raised(lambda: build(BUGGY)),
    ],
)
def test_anything_else_is_a_bug(error):
    assert ending(error).code == BUG
    assert type(error).__name__ in ending(error).message or isinstance(error, InstantiationException)


def test_what_hydra_cannot_read_is_told_without_its_own_words():
    def unread(argument: str) -> str:
        return ending(raised(lambda: hydra_compose(overrides=["+a={b: 1}", argument]))).message

    GlobalHydra.instance().clear()
    with initialize(None, version_base="1.3"):
        for argument, said in (
            ("\u00fc=3", "\u00fc=3 cannot be read; letters like these belong into quotes: 'key=\"value\"'"),
            (
                "a.c=3",
                "there is no option a.c; --cfg job shows all there are; if the default does not show it: +a.c=VALUE",
            ),
            ("c=3", "there is no option c; --cfg job shows all there are"),
        ):
            assert unread(argument) == said


def test_interrupts_are_found_below_what_libraries_make_of_them():
    def importing() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("numpy._core.multiarray failed to import") from None

    assert ending(raised(importing)).code == INTERRUPTED
    assert ending(Terminated()).code == TERMINATED


def test_the_traceback_of_a_bug_goes_to_a_file_and_its_place_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path))
    monkeypatch.setenv("SMALTO_LAUNCHED_AT", "then")
    monkeypatch.delenv(endings.FULL, raising=False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # runs of other tests have logs
    bug = raised(lambda: build(BUGGY))
    assert endings.report("sample", bug) == BUG
    said, log = capsys.readouterr().err, tmp_path / "logs/sample-then.log"
    assert "This is a bug of smalto" in said
    assert str(log) in said
    assert "Traceback (most recent" not in said
    kept = log.read_text()
    assert "Traceback (most recent" in kept
    assert "in raster_shape" in kept
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "file"))  # no log can be made there
    endings.report("sample", bug)
    assert "Traceback (most recent" in capsys.readouterr().err


def test_a_run_that_has_a_log_keeps_the_traceback_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "outputs"))
    handlers = logging.getLogger().handlers[:]
    try:
        setup_logging(tmp_path / "train.log")
        assert endings.report("train", raised(lambda: build(BUGGY))) == BUG
    finally:
        logging.getLogger().handlers[:] = handlers
    assert "in raster_shape" in (tmp_path / "train.log").read_text()
    assert not (tmp_path / "outputs").exists()


def test_a_bug_in_a_job_of_a_sweep_has_its_traceback_in_the_log_of_the_job(tmp_path, capsys):
    config = compose("train", ["seed=1", f"run_dir={tmp_path}"])
    (tmp_path / "job.yaml").write_text(OmegaConf.to_yaml(config, resolve=True))
    assert sweep_job.run("toy_verb", tmp_path / "job.yaml") == BUG
    assert "Traceback (most recent" in capsys.readouterr().err  # which is the log
    assert read_record(tmp_path)["error"] == "ValueError: no such luck"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("config.yaml", "a: [1", "config.yaml is damaged"),
        ("config.yaml", "- 1", "is not the config of a training"),
        ("config.yaml", "a: 1", "is not the config of a training"),
        ("sweep.json", '{"module": 1', "sweep.json is damaged"),
        ("sweep.json", "[]", "sweep.json is damaged"),
        ("notes.txt", "", "is not the folder of a run"),
    ],
)
def test_resume_says_what_is_wrong_with_a_folder(tmp_path, monkeypatch, capsys, name, text, said):
    (tmp_path / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["smalto", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        resume.main()
    assert end.value.code == REFUSED
    assert said in capsys.readouterr().err


def test_resume_tells_what_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smalto", "--help"])
    resume.main()
    assert capsys.readouterr().out.startswith("usage: smalto resume FOLDER")
    monkeypatch.setattr(sys, "argv", ["smalto"])
    with pytest.raises(SystemExit):
        resume.main()
    assert "usage: smalto resume FOLDER" in capsys.readouterr().err


def run_smalto(*arguments: str, after: float | None = None, number: int = 0, **more) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "smalto", *arguments]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, encoding="utf-8", **more)
    if after is not None:
        time.sleep(after)
        process.send_signal(number)
    said, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, said, errors)


def lines(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.strip()]


def check_interrupt(delay: float, number: int, tmp_path: Path) -> None:
    out = f"out={tmp_path}/x"
    done = run_smalto("prepare", "source=fashion_mnist", out, "mlflow=false", "workers=0", after=delay, number=number)
    assert done.returncode in (128 + number, 0), done.stderr
    said = [line for line in lines(done) if not line[:2].isdigit()]  # its own messages begin with the time
    if done.returncode:
        assert len(said) == 1, done.stderr
        assert said[0].startswith("smalto prepare: ")


@pytest.mark.parametrize(("delay", "number"), [(0.5, signal.SIGINT), (0.8, signal.SIGTERM)])
def test_a_signal_while_everything_is_imported_leaves_one_line(tmp_path, delay, number):
    check_interrupt(delay, number, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_leaves_one_line(tmp_path, number):
    for tenth in range(2, 80, 6):
        check_interrupt(tenth / 10, number, tmp_path / str(tenth))


def test_a_reader_that_leaves_is_no_error():
    smalto = f"{sys.executable} -m smalto"
    for command in (f"{smalto} --help | true", f"{smalto} --help >&-"):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_an_ascii_locale_says_any_letter():
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_smalto("größe", env=environment)
    assert done.returncode == REFUSED
    assert "unknown verb 'größe'" in done.stderr


def test_signals_end_forked_workers_and_interrupt_the_one_that_installed_it():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        AtOnce(None).install()
        begin_work()
        ready, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(go, b".")
            time.sleep(30)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
