"""A command that does what the jobs of a sweep may do: finish, fail, die, take long. ``seed`` says which."""

import os
import signal
import time
from pathlib import Path

from smalto.runtime import hydra_main

FATES = {0: "finish", 1: "fail", 2: "sleep"}
FATES_LATER = {0: "finish", 1: "finish", 2: "die"}


def run(config):
    """The job."""
    folder = Path(config.run_dir)
    with (folder / "starts.txt").open("a") as file:
        file.write(f"{os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    what = (FATES_LATER if (folder.parent / "later").exists() else FATES)[config.seed]
    if what == "fail":
        raise ValueError("no such luck\nand more")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        time.sleep(600)
    return {"val/loss": float(config.seed)}


def finished(plain):
    """Nothing but its record tells."""
    return {"val/loss": float(plain["seed"])}


main = hydra_main("train")(run)

if __name__ == "__main__":
    main()
