"""``smalto resume FOLDER``: continue a training run, or a sweep, by what lies in its own folder.

A run folder is code: what its config says is built and run. It must be yours, see :mod:`smalto.trust`.
"""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from smalto import train
from smalto.errors import InputError, MissingFile
from smalto.redact import redacted_places, restored
from smalto.runtime import USER_ERRORS, fail, mark_launch, setup_logging
from smalto.sweeps.sweep import again, is_sweep
from smalto.trust import check_own


def run(folder: Path) -> dict[str, float]:
    """Go on with the run in ``folder``; returns its final metrics.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the folder was moved: its config and checkpoints name the old place.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise MissingFile(f"{folder} is not the folder of a run (it holds no config.yaml); give one of outputs/")
    known = [uri for uri in (os.environ.get("MLFLOW_TRACKING_URI"),) if uri]
    config = OmegaConf.create(restored(OmegaConf.to_container(OmegaConf.load(file)), known))
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
    mark_launch()
    setup_logging()
    try:
        if len(sys.argv) != 2:
            raise InputError("give one folder of a run or a sweep: smalto resume outputs/...")
        folder = Path(sys.argv[1])
        check_own(folder, "config.yaml", "sweep.json")
        if is_sweep(folder):
            again(folder)
        else:
            run(folder)
    except (*USER_ERRORS, KeyboardInterrupt) as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        fail("resume", error)


if __name__ == "__main__":
    main()
