import platform
import subprocess
import sys
from pathlib import Path

import pytest

from smalto.runtime import remove_if_empty

PAGE_FAULTS = """
import resource, sys
import torch
from smalto.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(8):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(24):
    torch.ones(2**24)  # 64 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is a setting of glibc")
def test_freed_memory_is_used_again():
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", PAGE_FAULTS, mode], capture_output=True, check=True).stdout)
        for mode in ("keep", "return")
    }
    assert faults["keep"] < 0.5 * faults["return"]  # small blocks in between may push a few to fresh memory


def test_refused_runs_leave_no_folder(tmp_path, monkeypatch):
    (tmp_path / "c2i" / "now").mkdir(parents=True)
    (tmp_path / "other").write_text("")
    remove_if_empty(tmp_path / "c2i" / "now")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    remove_if_empty(tmp_path)
    assert tmp_path.exists()
    (tmp_path / "other").unlink()
    monkeypatch.chdir(tmp_path)
    remove_if_empty(Path.cwd())
    assert tmp_path.exists()
