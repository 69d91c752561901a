"""Which classes the config inside a checkpoint may name.

A config names what to build by dotted path, and a dotted path reaches everything Python can import: a file from
somebody else could ask for ``os.system``. Only classes of smalto and optimizers of torch are built.
"""

from typing import Any

from hydra.utils import get_object

from smalto.errors import InputError

TRUSTED = ("smalto.", "torch.optim.")


def check_targets(node: Any) -> None:
    """Look through a config node from a file before anything of it is built.

    Raises:
        ValueError: a ``_target_`` that is no class of smalto or torch.optim.
    """
    if isinstance(node, dict):
        if "_target_" in node:
            _check(str(node["_target_"]))
        for child in node.values():
            check_targets(child)
    elif isinstance(node, list):
        for child in node:
            check_targets(child)


def _check(target: str) -> None:
    if target.startswith(TRUSTED):
        try:
            found = get_object(target)
        except (ImportError, ValueError) as error:
            raise InputError(
                f"the config in the checkpoint names {target}, which this version of smalto has not got; use the "
                "version that wrote it"
            ) from error
        # smalto.runtime.os.system is a dotted path of smalto too: what counts is where the class is defined.
        if isinstance(found, type) and f"{found.__module__}.".startswith(TRUSTED):
            return
    raise InputError(
        f"the config in the checkpoint wants to build {target}; only classes of smalto and torch.optim are built from "
        "files, so that opening a file runs no other code"
    )
