"""What every verb needs: where conf/ is, composing, building objects, commands, logging."""

import ctypes
import functools
import inspect
import logging
import os
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from smalto import __version__
from smalto.arguments import check_added, expanded, fit
from smalto.data.ranks import leads
from smalto.endings import FULL, told
from smalto.errors import InputError, printable
from smalto.kinds import check_kinds, root_kinds
from smalto.nn.tf32 import set_tf32
from smalto.signals import begin_work
from smalto.sweeps.jobs import run_job
from smalto.sweeps.names import current_job_name
from smalto.sweeps.sweep import reported

log = logging.getLogger(__name__)


def conf_dir() -> str:
    """The repository's ``conf/`` when the package runs from a checkout, else the copy inside the wheel."""
    package = Path(__file__).parent
    checkout = package.parent.parent / "conf"
    return str(checkout if (checkout / "train.yaml").exists() else package / "conf")


def config_groups() -> set[str]:
    """Names of the folders in ``conf/``."""
    return {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()}


def raster_shape(image_size: int, channel_multipliers: list[int]) -> ListConfig:
    """Grid of codes of a convolutional tokenizer: every level but one halves the image."""
    side = image_size // 2 ** (len(channel_multipliers) - 1)
    return ListConfig([[side, side]])


def absolute_path(path: str) -> str:
    """Of SMALTO_OUTPUTS; ``~`` as in a shell."""
    if not path:
        raise InputError("SMALTO_OUTPUTS is empty; unset it, or name a folder")
    return os.path.abspath(expanded("SMALTO_OUTPUTS", path))


def register_resolvers() -> None:
    """``${raster_shape:image_size,multipliers}``, ``${abspath:path}`` and ``${job_name:}`` for configs."""
    OmegaConf.register_new_resolver("raster_shape", raster_shape, replace=True)
    OmegaConf.register_new_resolver("abspath", absolute_path, replace=True)
    OmegaConf.register_new_resolver("job_name", current_job_name, replace=True)


def mark_launch() -> None:
    """Fix the time stamp of run folders once: processes that Lightning starts for other devices inherit it."""
    if "SMALTO_LAUNCHED_AT" not in os.environ:
        os.environ["SMALTO_LAUNCHED_AT"] = launch_stamp()


def launch_stamp() -> str:
    """Now, to the second; the same in all processes of a job that someone else started.

    Under torchrun the first process to ask decides, through the store that torchrun keeps. Under SLURM it is the
    number of job and step: a job that is queued again finds its folder.
    """
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*place, is_master=False, timeout=timedelta(minutes=5))
        return store.compare_set("smalto/launched_at", "", now).decode()
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in os.environ:
        return f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    return now


def keep_freed_memory() -> None:
    """Let the C library reuse large blocks instead of returning each to the system, up to 2 GB; glibc only.

    A freed tensor above 32 MB is otherwise unmapped, and the next one faults in page by page: a fifth of the time of
    the tokenizer on a CPU (VQ-16 at 256 px: decode 4.2 to 3.2 core seconds, encode 2.2 to 1.75).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def build(node: Any, **kwargs: Any) -> Any:
    """Instantiate a config node; plain lists and dicts inside, so that nothing of OmegaConf reaches a checkpoint."""
    return hydra.utils.instantiate(node, _convert_="all", **kwargs)


def compose(name: str, overrides: list[str] | None = None) -> DictConfig:
    """The config that ``smalto NAME overrides...`` would run, for notebooks and tests; give ``run_dir=`` to train."""
    register_resolvers()
    mark_launch()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        given = fitted_arguments(overrides or [], name)
        config = hydra.compose(name, given, return_hydra_config=True)
    HydraConfig.instance().set_config(config)  # what ${hydra:runtime.choices...} resolves from
    with open_dict(config):
        del config.hydra
    check(config, name)
    return config


def fitted_arguments(arguments: list[str], verb: str) -> list[str]:
    """What was typed after a verb, as Hydra wants it."""
    groups = config_groups()
    roots = {key.partition(".")[0] for key in root_kinds(verb, Path(conf_dir()))}
    check_added(arguments, verb=verb, known=groups | roots | {"hydra", "engine", "kind", "devices"})
    return fit(arguments, groups=groups)


def check(config: DictConfig, verb: str) -> None:
    """Compare every value of a config with the kind its option takes; what can only be meant one way is put right."""
    check_kinds(config, verb=verb, folder=Path(conf_dir()))


class Command:
    """What Hydra runs: a function of a config, with errors in one message; in a sweep, the process of a job.

    It names its function instead of holding it: processes that only launch jobs load nothing of what they do.

    Args:
        verb: of the command, and the name of its config.
        function: at the top of its module.
    """

    def __init__(self, verb: str, function: Callable[[DictConfig], Any]) -> None:
        self.verb = verb
        self.__module__ = function.__module__  # from which Hydra names the job
        spec = sys.modules[function.__module__].__spec__  # under python -m the module is called __main__
        self.module = spec.name if spec is not None else function.__module__
        self.function = function.__name__
        self._full = os.environ.get(FULL)

    def __call__(self, config: DictConfig) -> Any:
        """Run it."""
        begin_work()
        setup_logging()
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with environment(FULL, self._full):
                return run_job(self.module, config, partial(check, verb=self.verb))
        with environment(FULL, self._full), told(self.verb):
            if self.verb in ("train", "extract", "sample", "evaluate") and not torch.cuda.is_available():
                keep_freed_memory()
            try:
                check(config, self.verb)
                set_tf32(bool(config.get("tf32", False)))
                # A function that was decorated has the command in its place by now.
                result = inspect.unwrap(getattr(import_module(self.module), self.function))(config)
                record_pending(config)
                return result
            except BaseException:
                remove_if_empty(Path(HydraConfig.get().runtime.output_dir))
                raise


@contextmanager
def environment(name: str, value: str | None) -> Iterator[None]:
    """An environment variable, set or (None) unset inside."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def hydra_main(verb: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command of a function of a config: composes ``conf/VERB.yaml``, runs a sweep with ``-m``."""

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(function)
        def command() -> None:
            register_resolvers()
            mark_launch()
            task = Command(verb, function)
            # Hydra would print its own errors; with this it leaves them to us.
            with told(verb), environment(FULL, "1"), reported(task.module):
                sys.argv[1:] = fitted_arguments(sys.argv[1:], verb)
                hydra.main(version_base="1.3", config_path=conf_dir(), config_name=verb)(task)()

        command.verb = verb  # type: ignore[attr-defined]
        return command

    return decorate


def remove_if_empty(folder: Path) -> None:
    """A run that was refused leaves no folder behind, nor the one around it if that was made for it alone."""
    if folder != Path.cwd():
        with suppress(OSError):  # not empty
            folder.rmdir()
            folder.parent.rmdir()


class _Formatter(logging.Formatter):
    """Messages hold names from files; none of them commands the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def setup_logging(file: Path | None = None) -> None:
    """Messages to stderr, and to ``file`` once a run has a folder; the rank in front when there are several."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK")
    prefix = f"[rank {rank}] " if rank and rank != "0" else ""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(_Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    # Lightning's own use of torch, nothing a user could change.
    warnings.filterwarnings("ignore", message=".*treespec.*|.*does not have many workers.*")
    for noisy in (
        "alembic",
        "mlflow",
        "lightning.fabric",
        "lightning.pytorch.trainer",
        "urllib3",
        "matplotlib",
        "lightning.pytorch.utilities",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def results_folder(ckpt: str | Path) -> Path:
    """Where results of a checkpoint go: its run's folder, or one beside a file that lies alone, named after it."""
    path = Path(ckpt).resolve()
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent / f"{path.stem}_results"


def wanted_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    valid = ["auto", "cpu", *(["cuda"] if gpus else []), *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
    if name not in valid:
        raise InputError(f"device is {name!r}, choose one of {', '.join(valid)} (what this machine has)")
    return torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)


def record(
    config: DictConfig, *, experiment: str, params: dict, metrics: dict[str, float], artifacts: list[Path]
) -> None:
    """Log a finished job to MLflow beside the training runs, unless ``mlflow=false``; later, if MLflow fails."""
    if not config.mlflow:
        return
    # Seconds of import, only where they are wanted.
    from smalto.analysis.recorder import record_job
    from smalto.callbacks.provenance import git_commit

    record_job(
        tracking_uri(config),
        Path(config.paths.outputs),
        experiment=experiment,
        run_name=f"{experiment}-{os.environ['SMALTO_LAUNCHED_AT']}",
        params=params,
        metrics=metrics,
        tags={"commit": git_commit(), "smalto": __version__, "command": " ".join(sys.argv)},
        artifacts=artifacts,
    )


def tracking_uri(config: DictConfig) -> str:
    """Where finished jobs are recorded."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{config.paths.outputs}/mlflow.db"


def record_pending(config: DictConfig) -> None:
    """Record what earlier commands could not, because MLflow failed then."""
    if config.get("mlflow") and leads() and any(Path(config.paths.outputs).glob("mlflow_pending/*.jsonl")):
        from smalto.analysis.recorder import write_pending

        write_pending(tracking_uri(config), Path(config.paths.outputs))


def record_summary(config: DictConfig, verb: str, summary: dict[str, Any]) -> None:
    """Log a data set that was just written: its counts as metrics, all settings as parameters."""
    if summary["status"] != "written":
        record_pending(config)
        return
    plain: Any = OmegaConf.to_container(config, resolve=True)
    counts = {key: float(value) for key, value in summary.items() if isinstance(value, int)}
    meta = Path(summary["out"]) / "meta.json"
    record(config, experiment=verb, params=plain, metrics=counts, artifacts=[meta])
