"""``make bench`` assembles its rows, keeps what was measured, and says what it cannot measure."""

import io
import json
import os
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from benchmarks import assembly, ceilings, contestants, metrics, sampling, tokenizer
from benchmarks.__main__ import THREADS, main
from benchmarks.assembly import Options
from benchmarks.machine import describe_machine
from benchmarks.rows import Row, unmeasured
from smalto.tokenizers.quantize import LOOKUP_ROWS


def text(found: dict) -> str:
    file = io.StringIO()
    Console(width=200, file=file).print(assembly.table(found))
    return file.getvalue()


@pytest.mark.parametrize(
    ("ratio", "goal", "comparable", "met"),
    [
        (0.2, "<= 0.25", True, True),
        (0.3, "<= 0.25", True, False),
        (0.7, ">= 0.62", True, True),
        (0.6, ">= 0.62", True, False),
        (0.2, "<= 0.25", False, None),
        (0.2, "", True, None),
        (None, "<= 0.25", True, None),
    ],
)
def test_a_goal_is_met_missed_or_open(ratio, goal, comparable, met):
    assert Row("x", 1.0, 2.0, ratio, "s", goal, comparable).met is met


def test_the_command_writes_table_and_file(tmp_path, monkeypatch, capsys):
    def part(options):
        yield Row(f"rounds {options.rounds}", 1.0, 4.0, 0.25, "s", "<= 0.3")
        yield Row("processes", float(os.getpid()), float(parent), None, "")
        yield Row("threads", float(torch.get_num_threads()), None, None, "")

    monkeypatch.setitem(assembly.PARTS, "data", part)
    for name in THREADS:
        monkeypatch.setenv(name, "2")  # put back at the end
    parent, out = os.getpid(), tmp_path / "deep/bench.json"
    assert main(["rounds=3", "threads=1", "parts=data", f"out={out}"]) == 0
    assert {os.environ[name] for name in THREADS} == {"1"}
    found, printed = json.loads(out.read_text()), capsys.readouterr()
    first, processes, threads = found["rows"]
    assert (first["part"], first["name"], first["met"]) == ("data", "rounds 3", True)
    assert processes["ours"] != processes["baseline"]
    assert threads["ours"] == 1
    assert found["options"] == {"rounds": 3, "peer": None, "threads": 1, "parts": ["data"]}
    assert found["machine"]["torch"] == torch.__version__
    assert [part["part"] for part in found["finished"]] == ["data"]
    assert "[1/1] data" in printed.err
    assert "rounds 3" in printed.out
    assert found["machine"]["cpu"] in printed.out


def test_a_part_that_fails_is_an_error(tmp_path, monkeypatch):
    def broken(options):
        yield Row("first", 1.0, 2.0, 0.5, "s")
        raise OSError("gone")

    monkeypatch.setattr(assembly, "PARTS", {"a": broken})
    with pytest.raises(RuntimeError, match="a failed"):
        assembly.run(parts=["a"], options=Options(), out=tmp_path / "x.json")
    assert [row["name"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == ["first"]


def test_what_was_measured_survives_an_interruption(tmp_path, monkeypatch):
    def interrupted(options):
        yield Row("first", 1.0, 2.0, 0.5, "s", "<= 0.6")
        raise KeyboardInterrupt

    monkeypatch.setattr(assembly, "PARTS", {"a": interrupted, "b": lambda options: pytest.fail("went on")})
    with pytest.raises(KeyboardInterrupt):
        assembly.run(parts=["a", "b"], options=Options(), out=tmp_path / "x.json")
    found = json.loads((tmp_path / "x.json").read_text())
    assert [(row["part"], row["name"], row["met"]) for row in found["rows"]] == [("a", "first", True)]
    assert found["finished"] == []
    assert not list(tmp_path.glob("*.tmp"))


def test_the_table_says_why_a_figure_or_a_verdict_is_missing(monkeypatch):
    monkeypatch.setattr(ceilings, "has_fast_bf16", lambda device: False)
    rows = [
        *ceilings.ceiling_rows(seconds=0.01),
        unmeasured("decode", goal="<= 0.28"),
        Row("stand-in", 1.0, 2.0, 0.5, "s", "<= 0.6", comparable=False),
        Row("slow", 1.0, 2.0, 0.5, "s", "<= 0.3"),
    ]
    assert [row.name for row in rows[:3:2]] == ["matrix product, fp32, best", "memory read, best"]
    assert rows[0].ours > 1
    assert 0.1 < rows[2].ours < 10_000
    found = {
        "machine": describe_machine(),
        "options": {"threads": 1},
        "rows": [{"part": "p", **asdict(row), "met": row.met} for row in rows],
    }
    lines = {line.split("│")[1].strip(): line for line in text(found).splitlines() if "│" in line}
    assert any("no units for bfloat16" in name for name in lines)
    assert "not here" in next(line for name, line in lines.items() if name.startswith("decode"))
    assert "needs peer=" in lines["stand-in"]
    assert lines["slow"].split("│")[-2].strip() == "no"


def test_wrong_options_are_named(capsys, tmp_path):
    for words, message in (
        (["part=data"], "unknown part; options are parts="),
        (["parts=data,dates"], "parts has 'dates', choose of ceilings, sampling"),
        (["rounds=0"], "rounds is 0"),
        ([f"peer={tmp_path}"], f"no checkout of FoundationVision/LlamaGen at peer={tmp_path}"),
    ):
        assert main(words) == 1
        assert message in capsys.readouterr().err


def test_machine_reads_the_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 amx_tile\n\nmodel name\t: Other\nflags\t: avx512f\n")
    found = describe_machine(file)
    assert (found["cpu"], found["flags"]) == ("Some CPU", ["avx2", "amx_tile"])


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setitem(contestants.SIZES, "tiny", {"dim": 32, "num_layers": 1, "num_heads": 2})
    monkeypatch.setattr(contestants, "CODES", 16)
    monkeypatch.setitem(sampling.GOALS, ("tiny", 2), {"auto": "<= 0.15", "fp32": "<= 0.32"})


@pytest.mark.usefixtures("_tiny")
def test_sampling_rows_hold_goals_open_without_the_authors_code():
    rows = sampling.sampling_rows("tiny", 2, rounds=1)
    rows += sampling.call_rows(size="tiny", images=2, rounds=1)
    assert [row.goal for row in rows] == ["<= 0.32", "<= 0.15", "", "<= 0.32", "<= 0.15"]
    assert all(row.met is None and row.ratio > 0 for row in rows)
    assert [row.unit for row in rows] == ["ms", "ms", "ms", "s", "s"]


@pytest.mark.usefixtures("_tiny")
@torch.inference_mode()
def test_whole_calls_of_all_samplers_write_the_same_codes(monkeypatch):
    """With nearly all probability on one code each, draws do not matter."""
    monkeypatch.setattr(contestants, "GRID", (4, 4))
    net = contestants.make_model("tiny")
    net.output.weight.mul_(1e4)
    calls = [contestants.plain_call(net, 3), contestants.smalto_call(net, 3, "fp32")]
    plain, ours = (call(0) for call in calls)
    assert plain.shape == (3, 16)
    assert torch.equal(plain, ours)


def test_the_matrix_root_agrees_with_scipy():
    time, difference = metrics.root_rows(dim=48)
    assert (time.unit, time.goal) == ("s", "<= 0.10")
    assert difference.met is True
    json.dumps(asdict(difference))


def test_metrics_are_timed_with_every_score(monkeypatch):
    monkeypatch.setattr(metrics, "FEATURES", 12)
    monkeypatch.setattr(metrics, "SPATIAL", 10)
    suite, kid = metrics.suite_rows(count=40)
    assert suite.ours > 0
    assert kid.ours > 0


def test_quantizer_rows_have_verdicts():
    time, memory, codes = tokenizer.quantizer_rows(latents=256, rounds=1)
    assert time.met is not None
    assert memory.ratio == pytest.approx(LOOKUP_ROWS["cpu"] / 256)
    assert not memory.met
    assert codes.met
