"""``smalto VERB overrides...``: one word for what to do, the rest is Hydra's."""

import os
import sys
from importlib import import_module

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from smalto import __version__

VERBS = {
    "prepare": "image source -> image shards",
    "train": "image shards -> tokenizer, code shards -> generator",
    "plan": "a training's parameters, FLOPs, memory, hours and cost, before it runs",
    "resume": "the folder of an unfinished run -> the same run, continued",
    "extract": "image shards + tokenizer -> code shards",
    "sample": "generator -> sheet, pictures, .npz",
    "evaluate": "checkpoint -> table of metrics",
    "inspect": "shards, codes, checkpoint or run -> what is in it, and whether it is whole",
    "convert": "the authors' .pt -> checkpoint, and back; safetensors",
}


MODULES = {"inspect": "inspect_path"}
"""Where the module of a verb is not called like the verb: ``inspect`` is a module of Python's."""


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
    given = sys.argv[1] if sys.argv[1:] else "-"
    if verb == "inspect" and given[0] != "-" and ("=" not in given or os.path.exists(given)):
        sys.argv[1] = f"path={given}"
    sys.argv[1:] = [quoted(argument) for argument in sys.argv[1:]]
    import_module(f"smalto.{MODULES.get(verb, verb)}").main()


def quoted(argument: str) -> str:
    """``key=path`` with quotes where Hydra's grammar needs them: letters beyond ASCII, brackets, ``=`` in paths."""
    key, equals, value = argument.partition("=")
    if not equals or "/" not in value or value[0] in "[{'\"" or "${" in value:
        return argument
    parser = OverridesParser.create()
    try:
        parser.parse_override(argument)
    except HydraException:
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"{key}='{escaped}'"
    return argument


if __name__ == "__main__":
    main()
