import math
import re
import shutil

import pytest
import torch

from same_numbers.__main__ import HERE, compare, report
from same_numbers.cases import Command, chosen, commands, families
from same_numbers.numbers import first_difference, numbers


def test_every_family_has_trainings(tmp_path):
    found = commands(tmp_path, families(HERE / "conf"))
    assert {"tokenizer", "gpt", "gpt_accumulated", "gpt_ddp", "gpt_text", "samples_int8", "evaluation"} <= {
        command.name for command in found
    }
    with pytest.raises(SystemExit, match=r"no trainings of task=newcomer"):
        commands(tmp_path, ["gpt", "newcomer"])


def test_what_is_chosen_brings_what_it_needs(tmp_path):
    found = commands(tmp_path, families(HERE / "conf"))
    assert [command.name for command in chosen(found, "gpt_text")] == ["gpt_text"]
    assert [command.name for command in chosen(found, "samples_fp32")] == [
        "images", "tokenizer", "codes", "gpt", "samples_fp32"
    ]  # fmt: skip


def run(out, weight: torch.Tensor, loss: float) -> dict[str, str]:
    folder = out / "gpt"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "metrics.csv").write_text(f"epoch,step,train/loss,train/images_per_second\n0,3,{loss!r},{id(out)}\n")
    content = {"state_dict": {"w": weight}, "callbacks": {}, "optimizer_states": [{"step": 4}], "global_step": 4}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    return numbers(out, Command("gpt", []))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_one_ulp_is_a_difference(tmp_path, kind):
    weight = torch.randn(8, 3, 2, 2).to(kind).contiguous(memory_format=torch.channels_last)
    other = weight.clone()
    other[1, 2, 0, 1] = torch.nextafter(other[1, 2, 0, 1], torch.tensor(9.0, dtype=kind))
    first = run(tmp_path / "a", weight, 1.5)
    assert first_difference(first, run(tmp_path / "b", weight.clone(), 1.5)) is None
    assert first_difference(first, run(tmp_path / "c", other, 1.5)).startswith("checkpoint state_dict/w: ")
    told = first_difference(first, run(tmp_path / "d", weight, math.nextafter(1.5, 2)))
    assert told == "step   3 train/loss: 1.5 before, 1.5000000000000002 now"


def test_what_is_gone_is_a_difference_and_what_is_new_is_none():
    assert first_difference({"a": "1"}, {"a": "1", "b": "2"}) is None
    assert first_difference({"a": "1", "b": "2"}, {"a": "1"}) == "b: 2 is gone"


def test_nothing_to_compare_is_not_equal(capsys):
    assert not report({}, {})
    assert not report({"gpt": {}}, {"gpt": {}})
    assert not report({"gpt": {"failed": "why"}}, {"gpt": {"failed": "why"}})
    assert "fails in both trees" in capsys.readouterr().out


def test_one_ulp_in_the_source_is_found(tmp_path, capsys):
    changed = tmp_path / "changed"
    for part in ("src", "conf"):
        shutil.copytree(HERE / part, changed / part, ignore=shutil.ignore_patterns("__pycache__"))
    norm = changed / "src" / "smalto" / "nn" / "norm.py"
    source = norm.read_text()
    norm.write_text(
        source + "\n_plain = RMSNorm.forward\nRMSNorm.forward = lambda self, x: _plain(self, x) * (1 + 2**-23)\n"
    )
    assert not report(*compare(tmp_path, HERE, changed, ["gpt"], "gpt_text"))
    assert re.search(r"gpt_text: \d+ of \d+ differ, first step +0 train/", capsys.readouterr().out)
