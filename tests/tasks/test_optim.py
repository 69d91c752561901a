import io
from functools import partial

import pytest
import torch
from torch import nn

from smalto.losses.patchgan import PatchDiscriminator
from smalto.models.conditioner import TextConditioner
from smalto.tasks.optim import Schedule, build_optimizer, clip_gradients, gradient_norm, parameter_groups

ADAMW = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.05)


@pytest.fixture(params=["class_gpt", "text_gpt", "vq_model", "discriminator"])
def net(request) -> nn.Module:
    if request.param == "discriminator":
        return PatchDiscriminator(base_channels=2, num_layers=1)
    return request.getfixturevalue(request.param)


def names_by_group(net: nn.Module) -> list[set[str]]:
    names = {id(p): name for name, p in net.named_parameters()}
    return [{names[id(p)] for p in group["params"]} for group in parameter_groups(net)]


def test_every_parameter_is_in_one_group(net):
    parameters = [p for group in parameter_groups(net) for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters})
    assert {id(p) for p in parameters} == {id(p) for p in net.parameters()}


def test_matrices_decay_and_nothing_else_does(net):
    decayed, free = names_by_group(net)
    dims = {name: p.dim() for name, p in net.named_parameters()}
    assert decayed == {name for name, dim in dims.items() if dim >= 2 and name != "conditioner.null_features"}
    assert all("norm" in name or name.endswith(("bias", "null_features")) or dims[name] == 1 for name in free)


def test_optimizer_decays_the_first_group_only(net):
    optimizer = build_optimizer(ADAMW, net)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed, _ = names_by_group(net)
    for name, p in net.named_parameters():
        # Without gradients AdamW only multiplies by 1 - lr * weight_decay.
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.05 if name in decayed else 1.0))


def test_type_decides_not_shape():
    # Sharded parameters may be flat: a rule by dimensions would decay nothing.
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    net[0].weight = nn.Parameter(net[0].weight.detach().flatten())
    assert names_by_group(net) == [{"0.weight"}, {"0.bias", "1.weight", "1.bias"}]


def test_frozen_parameters_are_left_out():
    net = TextConditioner(dim=4, text_dim=6, num_tokens=3, drop_prob=0.1, train_null=False)
    assert names_by_group(net) == [{"fc1.weight", "fc2.weight"}, set()]
    assert len(build_optimizer(ADAMW, net).param_groups) == 1, "optimizers dislike empty groups"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("told", [False, True])
def test_clipping_is_torchs_bit_for_bit(scale, told):
    nets = [nn.Linear(7, 5) for _ in range(2)]
    for net in nets:
        for p in net.parameters():
            p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    optimizer = build_optimizer(ADAMW, nets[0])
    expected = nn.utils.clip_grad_norm_(list(nets[1].parameters()), 0.5)
    norm = gradient_norm(optimizer)
    assert torch.equal(norm, expected)
    clip_gradients(optimizer, 0.5, norm=norm if told else None)
    for ours, theirs in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_without_gradients_there_is_no_norm():
    optimizer = build_optimizer(ADAMW, nn.Linear(2, 2))
    assert gradient_norm(optimizer) is None
    clip_gradients(optimizer, 1.0)


# step: factor
CONSTANT = {0: 1.0, 1: 1.0, 10**9: 1.0}
WARMED_UP = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0, 10**9: 1.0}
COSINE = {0: 1.0, 25: 0.8535534, 50: 0.5, 75: 0.1464466, 100: 0.0, 1000: 0.0}  # (1 + cos) / 2
WARMED_UP_COSINE = {
    0: 0.1,  # the first step already moves
    9: 1.0,  # full rate at the last warm-up step
    10: 1.0,  # the cosine starts behind it
    60: 0.55,  # half way between 10 and 110: the mean of 1 and 0.1
    110: 0.1,  # the end
    500: 0.1,  # stays there
}


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(), CONSTANT),
        (Schedule(warmup_steps=4), WARMED_UP),
        (Schedule(kind="cosine", total_steps=100), COSINE),
        (Schedule(kind="cosine", total_steps=110, warmup_steps=10, final_factor=0.1), WARMED_UP_COSINE),
        (Schedule(kind="cosine", total_steps=5, warmup_steps=5), {4: 1.0, 5: 1.0, 6: 0.0}),
    ],
)
def test_factors(schedule, factors):
    assert {step: schedule.factor(step) for step in factors} == pytest.approx(factors, abs=1e-6)


def test_rises_then_falls():
    schedule = Schedule(kind="cosine", total_steps=300, warmup_steps=30)
    factors = [schedule.factor(step) for step in range(300)]
    assert factors[:30] == sorted(factors[:30])
    assert factors[29:] == sorted(factors[29:], reverse=True)
    assert all(0 < f <= 1 for f in factors)


def rates(optimizer, scheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def started(schedule: Schedule):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    return optimizer, schedule.scheduler(optimizer)


def test_scheduler_applies_the_factors_and_resumes_by_step():
    schedule = Schedule(kind="cosine", total_steps=20, warmup_steps=3)
    optimizer, scheduler = started(schedule)
    unbroken = rates(optimizer, scheduler, 20)
    assert unbroken == pytest.approx([2 * schedule.factor(step) for step in range(20)])

    optimizer, scheduler = started(schedule)
    first = rates(optimizer, scheduler, 7)
    saved = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)  # plain data: no function may be in there
    optimizer, scheduler = started(schedule)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    assert first + rates(optimizer, scheduler, 13) == unbroken


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "linear"}, "kind is 'linear'.*'constant' or 'cosine'"),
        ({"kind": "cosine"}, "total_steps is None.*trainer.max_steps"),
        ({"kind": "cosine", "total_steps": -1}, "total_steps is -1.*trainer.max_steps"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**wrong)


def test_fused_falls_back_where_the_device_has_no_kernel(caplog):
    def optimizer(device: str, **options):
        net = nn.Linear(2, 2, device=device)
        return build_optimizer(partial(torch.optim.AdamW, lr=0.1, **options), net)

    assert optimizer("cpu", fused=True).defaults["fused"] is True
    assert not caplog.records
    assert optimizer("meta", fused=True).defaults["fused"] is False
    assert "no fused optimizer" in caplog.text
