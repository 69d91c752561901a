"""What the jobs of a sweep are called and what they are told: names, and variables of their environment."""

import hashlib
import json
import os
import re
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig

SWEPT = "SMALTO_SWEPT"
"""Environment variable with the swept keys as JSON: jobs on other machines and in other processes read it."""
PARENT = "SMALTO_PARENT_RUN"
"""Environment variable with the id of the MLflow run that the runs of the jobs belong to."""
LAUNCHER_PID = "SMALTO_SWEEP_PID"
"""Environment variable with the process that launched the sweep: jobs end when it is gone."""
WHOLE_CONFIG = "SMALTO_JOB_CONFIG"
"""Environment variable with the config of a job as JSON, where its file leaves credentials out."""
STOP = ".stop"
"""File in the folder of a sweep while it stops: no job begins, and those that run save and end."""
LONGEST = 120
"""Characters of a name; file systems allow 255."""


def job_name(overrides: Sequence[str], swept: Sequence[str]) -> str:
    """A folder name from the swept ones of ``overrides``: ``model-nano_seed-0``.

    A value that cannot be written in a file name, or is too long, loses characters and gains a hash, so that two
    jobs never share a folder. The number of a job is no part of its name: a grid may grow and keeps what is done.

    Args:
        overrides: ``key=value`` of the job.
        swept: keys that differ between jobs.
    """
    values = dict(override.split("=", 1) for override in overrides if "=" in override)
    last = [key.rsplit(".", 1)[-1] for key in swept]
    parts = [
        f"{short if last.count(short) == 1 else key}-{values[key]}"
        for key, short in zip(swept, last, strict=True)
        if key in values
    ]
    exact = "_".join(parts) or "job"
    name = re.sub(r"[^\w.-]+", "", exact)[:LONGEST]
    if name != exact:
        name = f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
    return name


def current_job_name() -> str:
    """The name of the job that Hydra is about to start; resolver of ``hydra.sweep.subdir``."""
    return job_name(list(HydraConfig.get().overrides.task), json.loads(os.environ.get(SWEPT, "[]")))
