"""Two minutes for whoever has a GPU: ``make gpu-check [DEVICE=cuda|cpu]``.

Trains tiny models on the device with all callbacks, eager and compiled, in float32 and bfloat16, on one device and on
two; compares with the CPU and with the authors' numbers; counts how often a step waits for the device. The table at the
end is what to send along with a report.
"""

import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

from gpu_check.checks import CHECKS
from gpu_check.runs import Failed, Runs
from gpu_check.table import BAD, Row, machine, markdown, save


def main(device: str, out: Path, only: str = "") -> int:
    """0 if nothing is wrong; 2 where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu-check: no GPU here; DEVICE=cpu runs the same on the CPU\n")
        return 2
    start, rows = time.perf_counter(), machine(torch.device(device))
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        runs = Runs(Path(scratch), torch.device(device))
        try:
            runs.prepare()
            for check in CHECKS:
                if check.__name__.startswith(only):
                    sys.stderr.write(f"gpu-check: {check.__name__}, after {time.perf_counter() - start:.0f} s\n")
                    rows += looked_at(check, runs)
        except Failed as failed:
            rows.append(Row("images, tokenizer, codes", str(failed), BAD))
    rows.append(Row("time", f"{time.perf_counter() - start:.0f} s"))
    save(rows, out)
    sys.stdout.write(f"{markdown(rows)}\n\nthe same for programs: {out}\n")
    return 1 if any(row.verdict == BAD for row in rows) else 0


def looked_at(check, runs: Runs) -> list[Row]:
    """Rows of a check, the last one saying so if it broke."""
    rows: list[Row] = []
    try:
        for row in check(runs):
            rows.append(row)
    except Exception as error:  # one check that breaks must not hide what the others see
        if not isinstance(error, Failed):
            traceback.print_exc()
        rows.append(Row(check.__name__, f"{type(error).__name__}: {error}"[:200], BAD))
    return rows


if __name__ == "__main__":
    words = dict(word.partition("=")[::2] for word in sys.argv[1:])
    place = Path(words.get("out") or "outputs/gpu_check/report.json")
    sys.exit(main(words.get("device") or "cuda", place, words.get("only", "")))
