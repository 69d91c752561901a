"""``smalto plan``: every training config has a plan, and what is wrong with one is said as training would say it."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from smalto import plan
from smalto.nn.peak import NAMED_TFLOPS
from smalto.planning.step import StepBytes, trained_parameters
from smalto.runtime import build, compose, conf_dir

CONF = Path(conf_dir())
GIB = 2**30
ALONE = ["experiment=c2i_256", "task.tokenizer_ckpt=null", "callbacks.generation=null"]


@pytest.fixture
def planned(monkeypatch, tmp_path):
    """Makes a plan; how much a step holds has its own tests, here each image takes 1 GiB and a batch one more."""
    monkeypatch.setenv("SMALTO_LAUNCHED_AT", "test")
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path / "outputs"))

    def traced(task, *, images, **_):
        return StepBytes(forward=(images + 1) * GIB, backward=0, backward_and_gradients=0)

    monkeypatch.setattr("smalto.planning.memory.trace_step", traced)
    monkeypatch.setattr(
        "smalto.planning.memory.optimizer_bytes", lambda task, **_: 8 * sum(p.numel() for p in trained_parameters(task))
    )
    monkeypatch.setattr("smalto.plan.decoding_bytes", lambda tokenizer, *, images, gpu: images * GIB // 10)
    return lambda *overrides: plan.make_plan(compose("plan", list(overrides)))


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_has_a_plan_without_data(planned, experiment):
    small = ["tokenizer.num_res_blocks=1", "perceptual=none"]
    found = planned(f"experiment={experiment}", *small)
    assert found["time"]["seconds"] > 0
    assert found["memory"]["strategies"]["auto"]["total"] > 0
    assert "assumed" in found["storage"]["training_images_from"] or "data." in found["storage"]["training_images_from"]


# Of the spec: blocks with the last norm, and the whole. All sizes: tests/models/test_parameter_counts.py.
@pytest.mark.parametrize(
    ("size", "blocks", "whole"), [("b", 84_953_856, 110_888_448), ("3b", 2_988_598_400, 3_096_659_200)]
)
def test_parameters_are_the_published_ones(planned, size, blocks, whole):
    found = planned("experiment=c2i_256", f"model={size}")["parameters"]
    assert found["trained"] == whole
    assert found["parts"]["blocks"] + found["parts"]["last norm"] == blocks
    assert found["parts"]["conditioner"] * 16384 == 1001 * found["parts"]["head"]
    assert found["frozen"] == {"tokenizer": 71_883_403}


def test_parameters_by_text(planned):
    found = planned("data=text_codes", "data.path=none", "conditioner=text", "model=xl", "trainer.max_steps=10")
    assert found["parameters"]["trained"] == 777_678_080 + 120 * 2048  # the null features are a buffer with the authors
    assert found["storage"]["text_bytes_at_most"] == 1_281_167 * 120 * 2048 * 2


def test_a_tokenizer_by_parts(planned):
    found = planned("experiment=tokenizer_f16", "perceptual=vgg")["parameters"]
    assert found["model"] == 71_883_403
    assert found["parts"]["encoder"] == 29_298_176
    assert found["parts"]["decoder"] == 42_449_795
    assert found["parts"]["codebook"] == 131_072
    assert found["parts"]["discriminator"] == 2_765_633
    assert found["frozen"]["perceptual"] == 14_714_688 + 1472  # VGG16 without its classifier, and lpips' heads


def test_memory_and_what_fits(planned):
    on_t4 = ["device=t4", "trainer.precision=16-mixed"]
    found = planned(*ALONE, "model=b", "data.batch_size=64", "trainer.devices=16", "plan.headroom=0")
    rows, state = found["memory"]["strategies"], 4 * 110_888_448
    for strategy, shards in (("auto", 1), ("ddp", 1), ("fsdp", 16)):
        row = rows[strategy]
        assert row["gradients"] == pytest.approx(state / shards, rel=1e-6)
        assert row["optimizer"] == pytest.approx(2 * state / shards, rel=1e-3)
        assert row["average"] == pytest.approx(state / shards, rel=1e-6)
        assert row["weights"] == pytest.approx(state / shards, rel=1e-3)  # and the rotary table
    assert rows["auto"]["activations"] == 65 * GIB
    assert rows["ddp"]["activations"] == rows["fsdp"]["activations"] == 5 * GIB
    # 79.2 GiB of an A100, 2.1 of them for weights and what belongs to them, one for the batch.
    assert rows["auto"]["smallest_devices"] == rows["ddp"]["smallest_devices"] == 1
    assert rows["ddp"]["largest_images_per_device"] == 76
    small = planned(*ALONE, "model=b", "data.batch_size=64", "trainer.devices=16", *on_t4)
    assert small["memory"]["strategies"]["auto"]["smallest_devices"] is None
    assert small["memory"]["strategies"]["ddp"]["smallest_devices"] == 8
    assert small["strategy"] == "ddp"


def test_time_and_cost_follow_from_the_arithmetic(planned):
    found = planned(*ALONE, "trainer.devices=8", "plan.mfu=0.5", "plan.price_per_hour=2", "seed=1")
    images, flops = 300 * 5004 * 256, found["flops"]["training"]
    assert found["time"]["seconds"] == pytest.approx(images * flops / (8 * 0.5 * 312e12))
    assert found["time"]["cost"] == pytest.approx(found["time"]["seconds"] / 3600 * 8 * 2)
    assert found["time"]["tokens"] == images * 256
    recomputing = planned(*ALONE, "trainer.devices=8", "task.recompute_every=1")["flops"]
    assert 1.25 < recomputing["hardware"] / flops < 4 / 3


def test_what_a_step_sends_and_how_long_that_takes(planned, capsys):
    on_nodes = ["model=b", "strategy=fsdp", "trainer.devices=8", "trainer.num_nodes=4", "plan.network_gb_s=200"]
    found = planned(*ALONE, *on_nodes)
    rows, parameters = found["traffic"]["strategies"], found["parameters"]["trained"]
    assert rows["ddp"]["gradients"] == 2 * 4 * parameters * 31 // 32
    assert rows["ddp"]["buffers"] == 0  # how ddp is set up is known only where it is asked for
    # Blocks twice in bfloat16, the root once, float32 gradients; shares of the 1001 classes are padded.
    root = (2 * 16384 + 1001 + 1) * 768
    assert rows["fsdp"]["total"] == pytest.approx((8 * parameters - 2 * root) * 31 / 32, rel=1e-3)
    assert found["traffic"]["gb_s"] == 200  # NVLink's 300 within a node
    assert rows["fsdp"]["seconds"] == rows["fsdp"]["total"] / 200e9
    assert rows["fsdp"]["share_of_step"] == pytest.approx(rows["fsdp"]["seconds"] / found["time"]["seconds_per_step"])
    assert found["traffic"]["host"]["batch_bytes"] == 256 // 32 * (256 * 8 + 8)
    unknown = planned(*ALONE, *on_nodes[:-1])["traffic"]
    assert unknown["gb_s"] is unknown["strategies"]["ddp"]["seconds"] is None
    assert planned(*ALONE, "trainer.devices=8")["traffic"]["gb_s"] == 300
    one_each = planned(*ALONE, "trainer.devices=1", "trainer.num_nodes=4", "plan.network_gb_s=12.5")["traffic"]
    assert one_each["gb_s"] == 12.5
    for trainer in (["strategy=ddp"], ["strategy=ddp", "trainer.strategy.broadcast_buffers=true"]):
        row = planned(*ALONE, "trainer.devices=8", *trainer)["traffic"]["strategies"]["ddp"]
        assert (row["buffers"] > 0) == (len(trainer) == 2)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["plan.network_gb_s=0"], "plan.network_gb_s"),
        (["devices.a100_80.link_gb_s=-1"], "link_gb_s is -1"),
        (["plan.mfu=35"], "at most 1"),
        (["trainer.devices=auto"], "trainer.devices=8"),
        (["trainer.devices=3"], "data.batch_size=256"),
        (["device=v100_32"], "16-mixed"),
        (["trainer.precision=fp8"], "bf16-mixed"),
        (["devices.a100_80.memory_gib=0"], "memory_gib"),
        (["plan.crops=0"], "plan.crops"),
        (["device=tpu"], "device is 'tpu', choose one of a10, a100_40"),
    ],
)
def test_what_is_wrong_is_said(planned, wrong, said):
    with pytest.raises(Exception, match=said):
        planned(*ALONE, *wrong)


def test_devices_agree_with_the_peaks_of_mfu():
    devices = OmegaConf.load(CONF / "_devices.yaml").devices
    assert len(devices) == 12
    for name in set(devices) - {"measured"}:
        device = build(devices[name])
        assert device.name == name
        assert device.half_tflops == NAMED_TFLOPS[name.split("_")[0]]


def test_the_command_prints_a_table_and_writes_json(planned, tmp_path, capsys):
    out = tmp_path / "new" / "plan.json"
    plan.run(compose("plan", ["experiment=demo_gpt", f"out={out}"]))
    said = capsys.readouterr().out
    assert "1,969,920 trained" in said
    assert "fewest devices" in said
    assert "back a loss in one copy every" in said
    assert "each device sends" not in said
    plan.run(compose("plan", ["experiment=demo_gpt", "trainer.devices=2"]))
    assert "ddp: each device sends 7.9 MB a step (gradients reduced 7.9 MB" in capsys.readouterr().out
    assert json.loads(out.read_text())["kind"] == "gpt"
    with pytest.raises(OSError, match="is a folder"):
        plan.run(compose("plan", ["experiment=demo_gpt", f"out={tmp_path}"]))


def test_samples_while_training_have_to_fit_too(planned):
    cpus = ["experiment=c2i_256", "model=b", "data.batch_size=64", "trainer.devices=64", "plan.headroom=0"]
    rows = planned(*cpus, "callbacks.generation.batch_size=64")["memory"]["strategies"]
    state = 4 * 110_888_448
    # weights twice (the average stands in), gradients, moments, average; the bfloat16 copy; 6.4 GiB of decoded pictures
    assert rows["ddp"]["while_sampling"] == pytest.approx(6 * state + 0.22 * GIB + 6.4 * GIB, rel=0.1)
    assert rows["ddp"]["while_sampling"] > rows["ddp"]["total"]
    small = planned(*cpus, "callbacks.generation.batch_size=64", "devices.a100_80.memory_gib=6")["memory"]["strategies"]
    assert not small["ddp"]["fits"]
    assert small["ddp"]["smallest_devices"] is None
    assert small["ddp"]["largest_images_per_device"] == 0
