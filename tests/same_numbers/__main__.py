"""Does this tree compute what another revision computes, bit by bit? ``make same-numbers BASE=REVISION [ONLY=gpt]``.

Every family's tiny config is trained for some steps in both trees, side by side; losses, gradient norms, weights,
optimizer states, codes, samples and metrics are compared exactly. What a tree logs beside is no difference.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from same_numbers.cases import families
from same_numbers.numbers import first_difference

HERE = Path(__file__).parents[2]


def main(base: str, chosen: str) -> int:
    """0 if all is equal."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        before = Path(scratch) / "tree"
        before.mkdir()
        archive = subprocess.run(["git", "archive", base, "src", "conf"], cwd=HERE, capture_output=True, check=False)
        if archive.returncode:
            sys.stderr.write(f"same-numbers: BASE={base}: {archive.stderr.decode().strip()}\n")
            return 2
        subprocess.run(["tar", "-x", "-C", before], input=archive.stdout, check=True)
        tasks = families(before / "conf")
        found = compare(Path(scratch), before, HERE, tasks, chosen)
    known = sum(len(values) for values in found[0].values())
    equal = report(*found)
    new = sorted(set(families(HERE / "conf")) - set(tasks))
    sys.stdout.write(
        f"{known:,} numbers of {len(found[0])} commands {'are the same' if equal else 'compared'} as in {base}"
        f"{', not there yet: task=' + ', '.join(new) if new else ''}, {time.perf_counter() - start:.0f} s\n"
    )
    return 0 if equal else 1


def compare(scratch: Path, before: Path, after: Path, tasks: list[str], chosen: str) -> list[dict[str, dict[str, str]]]:
    """Numbers of both trees, which run at the same time, each with one thread."""
    jobs = {}
    for name, tree in (("before", before), ("now", after)):
        out = scratch / name
        out.mkdir()
        path = os.pathsep.join(map(str, (tree / "src", HERE / "tests")))
        told = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "SMALTO_OUTPUTS": str(out), "OMP_WAIT_POLICY": "PASSIVE"}
        words = [sys.executable, "-m", "same_numbers.work", str(out), ",".join(tasks), chosen]
        jobs[out] = subprocess.Popen(words, env=os.environ | told, cwd=out)
    for job in jobs.values():
        job.wait()
    files = [out / "numbers.json" for out in jobs]
    return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def report(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> bool:
    """Say what differs, command by command; whether nothing does."""
    equal = bool(before)
    for name, values in before.items():
        now = after.get(name, {})
        if "failed" in values or "failed" in now:
            if values.get("failed") and now.get("failed"):
                sys.stdout.write(f"{name}: fails in both trees\n{now['failed']}\n")
            else:
                sys.stdout.write(f"{name}: fails {'before' if 'failed' in values else 'now'}\n")
                sys.stdout.write(f"{values.get('failed') or now.get('failed')}\n")
            equal = False
        elif not values:
            sys.stdout.write(f"{name}: left nothing to compare\n")
            equal = False
        else:
            difference = first_difference(values, now)
            count = sum(now.get(key) != value for key, value in values.items())
            if difference is not None:
                sys.stdout.write(f"{name}: {count} of {len(values)} differ, first {difference}\n")
                equal = False
    return equal


if __name__ == "__main__":
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    sys.exit(main(words.get("base") or "HEAD", words.get("only", "")))
