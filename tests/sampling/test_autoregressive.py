"""The decode loop: what it computes, for whom, and what it leaves behind."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.models.gpt import GPT
from smalto.nn.kv_cache import KVCache
from smalto.sampling.autoregressive import generate, uniforms_from_seeds
from smalto.types import SamplingConfig

SEEDS = torch.tensor([11, 12, 13, 14, 15])
LABELS = torch.tensor([0, 3, 3, 9, 5])


class Recorder:
    """Passes calls on to a model and notes how many rows each one computes."""

    def __init__(self, net: GPT) -> None:
        self.net = net
        self.num_codes = net.num_codes
        self.conditioner = net.conditioner
        self.rows: list[int] = []

    def new_cache(self, batch_size: int) -> KVCache:
        return self.net.new_cache(batch_size)

    def prefill(self, condition: Tensor, cache: KVCache, condition_mask: Tensor | None = None) -> Tensor:
        self.rows.append(len(condition))
        return self.net.prefill(condition, cache, condition_mask)

    def step(self, codes: Tensor, cache: KVCache) -> Tensor:
        self.rows.append(len(codes))
        return self.net.step(codes, cache)


def sample(net, condition: Tensor = LABELS, seeds: Tensor = SEEDS, mask: Tensor | None = None, **settings) -> Tensor:
    uniforms = uniforms_from_seeds(seeds, net.num_codes)
    return generate(net, condition, sampling=SamplingConfig(**settings), uniforms=uniforms, condition_mask=mask)


def guided_by_definition(net: GPT, condition: Tensor, scale: float, interval: int, mask: Tensor | None) -> Tensor:
    """Greedy codes from teacher-forced logits, position by position, both conditions in full every time."""
    codes = torch.zeros(len(condition), net.num_codes, dtype=torch.int64)
    null = net.conditioner.null(len(condition)).to(condition.dtype)
    for i in range(net.num_codes):
        cond, uncond = (net(codes, c, mask)[:, i] for c in (condition, null))
        # Position 0 is the prefill; position i comes from decode step i - 1.
        guided = interval < 0 or i - 1 <= interval
        codes[:, i] = (uncond + scale * (cond - uncond) if guided else cond).argmax(-1)
    return codes


@pytest.mark.parametrize(("scale", "interval"), [(1.0, -1), (1.5, -1), (4.0, -1), (3.0, 0), (3.0, 4), (3.0, 100)])
def test_guidance_by_definition(class_gpt, scale, interval):
    net = class_gpt.double()
    codes = sample(net, cfg_scale=scale, cfg_interval=interval, temperature=0)
    assert codes.shape == (5, 12)
    assert codes.dtype == torch.int64
    assert torch.equal(codes, guided_by_definition(net, LABELS, scale, interval, None))


@pytest.mark.parametrize("interval", [-1, 3])
def test_guidance_with_padded_text(text_gpt, generator, interval):
    net = text_gpt.double()
    text = torch.randn(5, 5, 6, dtype=torch.float64, generator=generator)
    mask = torch.arange(5) >= torch.tensor([[0], [1], [2], [3], [4]])
    text = text * mask.unsqueeze(-1)
    codes = sample(net, text, mask=mask, cfg_scale=3.0, cfg_interval=interval, temperature=0)
    assert torch.equal(codes, guided_by_definition(net, text, 3.0, interval, mask))


def test_guidance_changes_codes(class_gpt):
    results = [sample(class_gpt, cfg_scale=s, cfg_interval=k) for s, k in ((1.0, -1), (4.0, -1), (4.0, 2))]
    assert all(not torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_no_unconditional_rows_without_guidance(class_gpt):
    recorder = Recorder(class_gpt)
    sample(recorder)
    assert recorder.rows == [5] * 12


def test_unconditional_rows_all_the_way_by_default(class_gpt):
    recorder = Recorder(class_gpt)
    sample(recorder, cfg_scale=2.0)
    assert recorder.rows == [10] * 12


@pytest.mark.parametrize("interval", [0, 4, 10])
def test_unconditional_rows_are_dropped_behind_the_interval(class_gpt, interval):
    recorder = Recorder(class_gpt)
    sample(recorder, cfg_scale=2.0, cfg_interval=interval)
    # The prefill and decode steps 0 to ``interval`` are guided; 12 codes take a prefill and 11 steps.
    guided = 2 + interval
    assert recorder.rows == [10] * guided + [5] * (12 - guided)


@pytest.mark.parametrize(
    "settings",
    [{}, {"cfg_scale": 3.0}, {"cfg_scale": 3.0, "cfg_interval": 4}, {"top_k": 5, "top_p": 0.8, "temperature": 0.7}],
)
@pytest.mark.parametrize("text", [False, True])
def test_an_image_depends_on_its_seed_and_condition_only(make_gpt, generator, text, settings):
    # Kernels round differently for other batch sizes; in float64 that is 1e-15 on probabilities, so that a uniform
    # (of 2^24 values) falls on the other side of a boundary about never.
    net = make_gpt(text=text).double()
    condition = torch.randn(5, 5, 6, dtype=torch.float64, generator=generator) if text else LABELS
    together = sample(net, condition, **settings)
    alone = [sample(net, condition[i : i + 1], SEEDS[i : i + 1], **settings) for i in range(5)]
    assert torch.equal(torch.cat(alone), together)
    order = torch.tensor([4, 2, 0, 3, 1])
    assert torch.equal(sample(net, condition[order], SEEDS[order], **settings), together[order])


def test_other_seeds_give_other_images(class_gpt):
    same_label = torch.full((5,), 3)
    codes = sample(class_gpt, same_label)
    assert len(codes.unique(dim=0)) == 5
    assert torch.equal(*sample(class_gpt, same_label[:2], torch.tensor([7, 7])))


def test_sampling_follows_the_model(make_gpt):
    """Joint probabilities of all 9 images of a model with two codes of three values each."""
    net = make_gpt(code_shape=((1, 2),), vocab_size=3).double()
    images = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_p = net(images, torch.zeros(9, dtype=torch.int64)).log_softmax(-1)
    expected = log_p.gather(-1, images.unsqueeze(-1)).sum((1, 2)).exp()
    count = 4000
    codes = sample(net, torch.zeros(count, dtype=torch.int64), torch.arange(count))
    frequency = torch.bincount(codes[:, 0] * 3 + codes[:, 1], minlength=9) / count
    # Standard error below sqrt(0.25 / 4000) = 0.008; five of them.
    assert (frequency - expected).abs().max() < 0.04


def test_sampling_again_gives_the_same(class_gpt):
    assert torch.equal(sample(class_gpt, cfg_scale=2.0), sample(class_gpt, cfg_scale=2.0))


def test_global_random_state_is_not_touched(class_gpt):
    before = torch.get_rng_state()
    first = sample(class_gpt)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(sample(class_gpt), first)


def test_arguments_and_weights_stay_as_they_were(text_gpt, generator):
    arguments = {
        "condition": torch.randn(5, 5, 6, generator=generator),
        "uniforms": uniforms_from_seeds(SEEDS, 12),
        "condition_mask": torch.ones(5, 5, dtype=torch.bool),
    }
    copies = {name: value.clone() for name, value in arguments.items()}
    weights = {name: value.clone() for name, value in text_gpt.state_dict().items()}
    generate(text_gpt, sampling=SamplingConfig(cfg_scale=2.0, cfg_interval=2, top_k=4, top_p=0.9), **arguments)
    assert all(torch.equal(arguments[name], copy) for name, copy in copies.items())
    assert all(torch.equal(text_gpt.state_dict()[name], copy) for name, copy in weights.items())


def test_training_goes_on_after_sampling(class_gpt):
    codes = sample(class_gpt, cfg_scale=2.0).clone()
    net = class_gpt.train()
    loss = F.cross_entropy(net(codes, LABELS).flatten(0, 1), codes.flatten())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_fresh_model_draws_evenly(make_gpt):
    net = make_gpt(random=False)
    codes = sample(net, torch.zeros(500, dtype=torch.int64), torch.arange(500))
    counts = torch.bincount(codes.flatten(), minlength=24)
    # 6000 draws of 24 codes: 250 each, standard deviation 15.5; five of them.
    assert (counts - 250).abs().max() < 78
    assert len(counts) == 24
    assert math.isclose(counts.sum().item(), 6000)


def test_no_images_are_no_problem(class_gpt):
    assert sample(class_gpt, LABELS[:0], SEEDS[:0], cfg_scale=2.0).shape == (0, 12)


def test_uniforms_belong_to_their_seed():
    uniforms = uniforms_from_seeds(SEEDS, 300)
    assert uniforms.shape == (5, 300)
    assert uniforms.min() >= 0
    assert uniforms.max() < 1
    assert torch.equal(uniforms_from_seeds(SEEDS[[3, 1]], 300), uniforms[[3, 1]])
    assert torch.equal(uniforms_from_seeds(torch.tensor([2**62]), 3), uniforms_from_seeds(torch.tensor([2**62]), 3))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0}, {"cfg_scale": 3.0}, {"top_k": 3, "top_p": 0.9}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_that_says_where(class_gpt, settings, value):
    step = class_gpt.step

    def broken(codes: Tensor, cache: KVCache) -> Tensor:
        logits = step(codes, cache)
        if cache.length >= 4:
            logits[1, 2] = value
        return logits

    class_gpt.step = broken
    with pytest.raises(ValueError, match=r"logits are not finite .* for 1 of 5 images, from code 3 on"):
        sample(class_gpt, **settings)


def test_weights_that_are_no_numbers_are_an_error_too(class_gpt):
    with torch.no_grad():
        class_gpt.output.weight[3] = math.nan
    with pytest.raises(ValueError, match=r"for 5 of 5 images, from code 0 on"):
        sample(class_gpt)
