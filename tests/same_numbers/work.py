"""One tree's part: runs the commands with the smalto that ``PYTHONPATH`` names, in one process where it can."""

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

from same_numbers.cases import Command, chosen, commands
from same_numbers.numbers import numbers


def main(out: Path, tasks: list[str], beginning: str) -> None:
    """Run all whose name begins so; ``out/numbers.json`` holds the numbers of each, or how it failed."""
    found: dict[str, dict[str, str]] = {}
    for command in chosen(commands(out, tasks), beginning):
        start = time.perf_counter()
        said = alone(command) if command.alone else here(command)
        found[command.name] = {"failed": said} if said else numbers(out, command)
        sys.stderr.write(f"  {out.name}: {command.name}, {time.perf_counter() - start:.0f} s\n")
        (out / "numbers.json").write_text(json.dumps(found))


def here(command: Command) -> str:
    """In this process; what it said when it failed."""
    from smalto.cli import main as smalto

    said, ending = io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        sys.argv = ["smalto", *command.words]
        try:
            smalto()
        except SystemExit as error:
            ending = error.code
        except Exception:
            return traceback.format_exc()
    return said.getvalue()[-2000:] if ending else ""


def alone(command: Command) -> str:
    """In processes of its own."""
    words = [sys.executable, "-m", "smalto", *command.words]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"SMALTO_VERB": ""}, check=False)
    return (done.stdout + done.stderr)[-2000:] if done.returncode else ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3])
