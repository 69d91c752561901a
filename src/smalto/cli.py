"""``smalto VERB overrides...``: one word for what to do, the rest is Hydra's."""

import os
import sys
from importlib import import_module

from smalto import __version__

VERBS = {
    "prepare": "image source -> image shards",
    "train": "image shards -> tokenizer, code shards -> generator",
    "extract": "image shards + tokenizer -> code shards",
    "sample": "generator -> sheet, pictures, .npz",
    "evaluate": "checkpoint -> table of metrics",
    "convert": "the authors' .pt -> checkpoint, and back; safetensors",
}


def usage() -> str:
    """The help text."""
    lines = [f"  {verb:<10}{what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            f"smalto {__version__}: autoregressive image generation",
            "",
            "usage: smalto VERB [key=value ...]",
            "",
            *lines,
            "",
            "smalto VERB --help          config groups and options of a verb",
            "smalto VERB --cfg job       the whole config, without running it",
        ]
    )


def main() -> None:
    """Run a verb."""
    # Two threads that spin for each other on a busy machine lose milliseconds per operation; sleeping ones do not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    # Lightning starts the processes of other devices by repeating sys.argv, from which the verb is gone by then.
    verb = arguments[0] if arguments and arguments[0] in VERBS else os.environ.get("SMALTO_VERB")
    if arguments and arguments[0] in VERBS:
        del sys.argv[1]
    elif verb is None or "LOCAL_RANK" not in os.environ:
        if arguments and arguments[0] not in ("-h", "--help", "help", "--version"):
            sys.stderr.write(f"smalto: unknown verb {arguments[0]!r}; one of {', '.join(VERBS)}\n")
            sys.exit(1)
        sys.stdout.write((__version__ if arguments[:1] == ["--version"] else usage()) + "\n")
        return
    assert verb is not None
    os.environ["SMALTO_VERB"] = verb
    import_module(f"smalto.{verb}").main()


if __name__ == "__main__":
    main()
