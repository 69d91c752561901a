"""``smalto VERB overrides...``: one word for what to do, the rest is Hydra's."""

import os
import sys
from importlib import import_module

from smalto import __version__
from smalto.endings import REFUSED, told
from smalto.signals import AtOnce

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

MODULES = {**{verb: verb for verb in VERBS}, "inspect": "inspect_path", "sweep_job": "sweep_job"}
"""Where a verb is. ``inspect`` is a module of Python's; ``sweep_job`` is what sweeps start, nobody types it."""


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
    if sys.getfilesystemencoding() != "utf-8":
        # An ASCII locale: names and texts beyond it could be neither said nor written. Python's own way out.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the one who started us has none for us (>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    # Two threads that spin for each other on a busy machine lose milliseconds per operation; sleeping ones do not.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    # Lightning starts the processes of other devices by repeating sys.argv, from which the verb is gone by then.
    verb = arguments[0] if arguments and arguments[0] in MODULES else os.environ.get("SMALTO_VERB")
    with told(verb or ""):
        if arguments and arguments[0] in MODULES:
            del sys.argv[1]
        elif verb is None or "LOCAL_RANK" not in os.environ:
            if arguments and arguments[0] not in ("-h", "--help", "help", "--version"):
                sys.stderr.write(f"smalto: unknown verb {arguments[0]!r}; one of {', '.join(VERBS)}\n")
                sys.exit(REFUSED)
            sys.stdout.write((__version__ if arguments[:1] == ["--version"] else usage()) + "\n")
            sys.stdout.flush()
            return
        assert verb is not None
        os.environ["SMALTO_VERB"] = verb
        AtOnce(f"smalto {verb}: stopped before it began").install()
        try:
            run(verb)
            sys.stdout.flush()
        finally:
            AtOnce(None).install()  # Python's own end takes a moment, too


def run(verb: str) -> None:
    """Import a verb, which takes seconds, and run it."""
    given = sys.argv[1] if sys.argv[1:] else "-"
    if verb == "inspect" and given[:1] != "-" and ("=" not in given or os.path.exists(given)):
        sys.argv[1] = f"path={given}"
    import_module(f"smalto.{MODULES[verb]}").main()


if __name__ == "__main__":
    main()
