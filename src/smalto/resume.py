"""``smalto resume FOLDER``: continue a training run, or a sweep, by what lies in its own folder.

A run folder is code: what its config says is built and run. It must be yours, see :mod:`smalto.trust`.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from smalto import train
from smalto.endings import told
from smalto.errors import InputError, MissingFile
from smalto.redact import redacted_places, restored
from smalto.runtime import mark_launch, setup_logging
from smalto.signals import begin_work
from smalto.sweeps.sweep import again, is_sweep
from smalto.trust import check_own

USAGE = """usage: smalto resume FOLDER

Continue the training run, or the sweep, that began in FOLDER (outputs/...), by what lies there: config.yaml and
checkpoints, or sweep.json. It takes no options: other settings are another run.
"""


def run(folder: Path) -> dict[str, float]:
    """Go on with the run in ``folder``; returns its final metrics.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the folder was moved: its config and checkpoints name the old place.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise MissingFile(f"{folder} is not the folder of a run (it holds no config.yaml); give one of outputs/")
    try:
        written = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    if not isinstance(written, dict) or "run_dir" not in written:
        raise InputError(f"{file} is not the config of a training (it names no run_dir)")
    known = [uri for uri in (os.environ.get("MLFLOW_TRACKING_URI"),) if uri]
    config = OmegaConf.create(restored(written, known))
    assert isinstance(config, DictConfig)
    withheld = redacted_places(OmegaConf.to_container(config))
    if withheld:
        raise InputError(
            f"{file} keeps no credentials: run the command that began it again, with {', '.join(withheld)} in full and "
            f"hydra.run.dir={folder} (an address of MLflow may be given as MLFLOW_TRACKING_URI)"
        )
    if Path(config.run_dir).resolve() != folder.resolve():
        raise InputError(f"{folder} was made as {config.run_dir}; move it back there to continue it")
    return train.run(config)


def main() -> None:
    """The command."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        sys.stdout.write(USAGE)
        return
    begin_work()
    mark_launch()
    setup_logging()
    with told("resume"):
        if len(sys.argv) != 2 or not sys.argv[1]:
            raise InputError(f"give one folder of a run or a sweep; {USAGE.splitlines()[0]}")
        folder = Path(sys.argv[1]).expanduser()
        check_own(folder, "config.yaml", "sweep.json")
        if is_sweep(folder):
            again(folder)
        else:
            run(folder)


if __name__ == "__main__":
    main()
