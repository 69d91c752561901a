"""``smalto inspect`` of a run folder from somebody else: what lies there is data, of any kind."""

import os

import pytest

from fuzzing import survives
from smalto.errors import InputError
from smalto.inspect_path import run_facts

GOOD = "name: a\nkind: gpt\ndata: {path: x, batch_size: 4}\n"
BOMB = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 14)
)
SHARED = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)) + GOOD


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        SHARED,
        "",
        "3",
        "- a",
        "a: [",
        "a: !!python/object/apply:os.system [true]",
        "[" * 5000,
        "a: &a [*a]",
        "x" * 2**21,
        "data: 3\n\x00",
        "? [1, 2]\n: 3",
    ],
)
def test_settings_that_are_none(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    error = survives(run_facts, tmp_path)
    assert isinstance(error, InputError)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("name", ["provenance.json", "metrics.json"])
@pytest.mark.parametrize("text", ["[", "[" * 100_000, "3", '{"a": "x", "b": [1], "c": NaN}', '{"a": {}}'])
def test_notes_of_any_kind(name, text, tmp_path):
    (tmp_path / "config.yaml").write_text(GOOD)
    (tmp_path / name).write_text(text)
    survives(run_facts, tmp_path)


@pytest.mark.parametrize("name", ["provenance.json", "metrics.json"])
def test_pipes_are_not_waited_for(name, tmp_path):
    (tmp_path / "config.yaml").write_text(GOOD)
    os.mkfifo(tmp_path / name)
    assert "no plain file" in str(survives(run_facts, tmp_path))


@pytest.mark.parametrize("text", ["data: 3", "data: [1]", "name: [1]\nkind: {a: b}", "checkpoints: 1"])
def test_settings_of_another_kind(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    facts, problems = run_facts(tmp_path)
    assert facts["checkpoints"] == "none"
    assert not problems
