"""What decides the numbers of an evaluation beside its settings: what the files and the networks hold."""

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import nn

from smalto.data.content import content_hash
from smalto.data.picture_sets import Split, open_pictures
from smalto.data.shards import CODES, read_meta, shard_files
from smalto.errors import UserError
from smalto.tasks.checkpoint import LoadedTask, fingerprint


def pictures_identity(path: Path, *, image_size: int | None, split: Split | None, memory: Path) -> str:
    """Of a set of images, of statistics of one, or of both: hash of what is in the files."""
    if path.is_file():
        return content_hash([path], memory=memory)
    return open_pictures(path, image_size=image_size, split=split).fingerprint(memory)


def checkpoint_identity(loaded: LoadedTask) -> dict[str, str]:
    """Of the weights that will be used, and of what the checkpoint says of them."""
    networks = {"net": loaded.task.net, "tokenizer": getattr(loaded.task, "tokenizer", None)}
    told = json.dumps([loaded.config, loaded.classes], sort_keys=True, default=str)
    found = {name: fingerprint(net) for name, net in networks.items() if isinstance(net, nn.Module)}
    return found | {"config": hashlib.sha256(told.encode()).hexdigest()[:16]}


def codes_identity(node: Any, *, memory: Path) -> str | None:
    """Of the codes a generator was trained on, by the config of their data; None where they are not at hand."""
    if not node or "path" not in node:
        return None
    try:
        meta = read_meta(node["path"], CODES)
    except (UserError, TypeError):  # measuring says what is wrong with them, or goes without
        return None
    return content_hash(shard_files(node["path"], meta), memory=memory)
