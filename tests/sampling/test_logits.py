import re

import pytest
import torch
from scipy.stats import chisquare

from golden_weights import load_golden
from smalto.sampling.logits import draw, keep_top_k, keep_top_p, next_codes
from smalto.types import SamplingConfig

INF = float("inf")
LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 1.0]])


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_filters_of_the_authors():
    golden = load_golden("sampling_filters")
    logits = golden.tensor("logits")
    settings = {key: re.fullmatch(r"probs_t([\d.]+)_k(\d+)_p([\d.]+)", key) for key in golden.arrays if key != "logits"}
    assert len(settings) == 4
    for key, match in settings.items():
        t, k, p = float(match[1]), int(match[2]), float(match[3])
        probability = keep_top_p(keep_top_k(logits / t, k), p).softmax(-1)
        expected = golden.tensor(key)
        assert torch.equal(probability > 0, expected > 0), key
        torch.testing.assert_close(probability, expected, atol=1e-6, rtol=0)  # a softmax in float32


def test_top_k_keeps_ties():
    assert kept(keep_top_k(LOGITS, 2)) == [[0, 1, 4]]
    assert kept(keep_top_k(torch.zeros(1, 6), 1)) == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_keeps_the_k_largest(k, generator):
    logits = torch.randn(20, 9, generator=generator)
    expected = [sorted(row) for row in logits.argsort(descending=True)[:, :k].tolist()]
    assert kept(keep_top_k(logits, k)) == expected


@pytest.mark.parametrize("k", [0, 5, 100])
def test_top_k_off(k):
    assert torch.equal(keep_top_k(LOGITS, k), LOGITS)


def test_top_p_keeps_one_of_two_tied_entries_when_one_is_enough():
    # Probabilities 0.51, 0.19, 0.07, 0.03, 0.19: one tied entry takes the sum across 0.6.
    indices = kept(keep_top_p(LOGITS, 0.6))[0]
    assert indices in ([0, 1], [0, 4])


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p, generator):
    logits = 2 * torch.randn(50, 30, generator=generator)
    probability = logits.double().softmax(-1)
    for row, indices in zip(probability, kept(keep_top_p(logits, p)), strict=True):
        chosen = row[indices]
        assert len(indices) >= 1
        assert chosen.min() >= row.topk(len(indices)).values[-1]
        # float32 sums of 30 probabilities.
        assert chosen.sum() >= p - 1e-5
        assert chosen.sum() - chosen.min() <= p + 1e-5


def test_a_sum_of_exactly_p_does_not_stop_yet():
    # The authors remove what comes after the sum has exceeded p; one half does not exceed one half.
    assert kept(keep_top_p(torch.tensor([[0.0, 0.0, -INF]]), 0.5)) == [[0, 1]]


def test_top_p_one_keeps_all_and_works_behind_top_k():
    assert torch.equal(keep_top_p(LOGITS, 1.0), LOGITS)
    assert kept(keep_top_p(keep_top_k(LOGITS, 1), 0.99)) == [[0]]


@pytest.mark.parametrize("function", [lambda x: keep_top_k(x, 2), lambda x: keep_top_p(x, 0.5)])
def test_filters_leave_their_input_alone(function):
    logits = LOGITS.clone()
    function(logits)
    assert torch.equal(logits, LOGITS)


def test_draw_divides_the_unit_interval_in_proportion(generator):
    logits = torch.randn(1, 12, generator=generator)
    count = 10_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    counts = torch.bincount(draw(logits.expand(count, -1), grid), minlength=12)
    # An interval of length p holds p n points of a grid of n, give or take one at its ends.
    assert (counts - count * logits[0].double().softmax(-1)).abs().max() <= 1 + 1e-3
    assert torch.equal(draw(logits.expand(count, -1), grid).sort().values, draw(logits.expand(count, -1), grid))


def test_draw_follows_the_softmax(generator):
    logits = torch.randn(1, 12, generator=generator)
    count = 20_000
    codes = draw(logits.expand(count, -1), torch.rand(count, generator=generator))
    expected = count * logits[0].double().softmax(-1)
    # The seed is fixed: this is one draw of the statistic, suspicious below one in a thousand.
    assert chisquare(torch.bincount(codes, minlength=12), expected / expected.sum() * count).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.25, 0.5, 1 - 2**-24, 1 - 2**-53, 1.0])
def test_draw_never_takes_what_has_no_probability(uniform):
    logits = torch.tensor(
        [
            [-INF, 0.0, -INF, 0.0, -INF],
            [0.0, -INF, -INF, -INF, -INF],
            [-INF, -INF, -INF, -INF, 0.0],
            [-INF, 50.0, -60.0, 50.0, -INF],  # exp(-110) is 0 in float32
        ]
    )
    codes = draw(logits, torch.full((4,), uniform, dtype=torch.float64)).tolist()
    assert codes[0] in (1, 3)
    assert codes[1:3] == [0, 4]
    assert codes[3] in (1, 3)


def test_ends_of_the_unit_interval_are_the_first_and_the_last_code():
    logits = torch.tensor([[-INF, 0.0, 0.0, -INF]])
    assert draw(logits, torch.tensor([0.0])).item() == 1
    assert draw(logits, torch.tensor([1.0])).item() == 2


def test_one_uniform_decides_one_row(generator):
    logits, uniforms = torch.randn(6, 20, generator=generator), torch.rand(6, generator=generator)
    rows = [draw(logits[i : i + 1], uniforms[i : i + 1]) for i in range(6)]
    assert torch.equal(draw(logits, uniforms), torch.cat(rows))


def test_zero_temperature_is_greedy(generator):
    logits, uniforms = torch.randn(30, 9, generator=generator), torch.rand(30, generator=generator)
    greedy = next_codes(logits, uniforms, SamplingConfig(temperature=0.0))
    assert torch.equal(greedy, logits.argmax(-1))
    # The limit: at temperature 1e-3 a lead of 0.1 is a factor exp(100).
    lead = logits.topk(2).values.diff().abs().flatten() > 0.1
    cold = next_codes(logits, uniforms, SamplingConfig(temperature=1e-3))
    assert torch.equal(cold[lead], greedy[lead])


def test_order_is_temperature_then_top_k_then_top_p():
    # log probabilities 0.4, 0.3, 0.2, 0.1. At temperature 1/2: 16, 9, 4, 1 of 30. Top-3 leaves 16, 9, 4 of 29;
    # top-p 0.6 then needs two of them (16/29 = 0.55). Top-p before top-k, or before the temperature, gives other sets.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    config = SamplingConfig(temperature=0.5, top_k=3, top_p=0.6)
    counts = torch.bincount(next_codes(logits.expand(1000, -1), grid, config), minlength=4)
    assert counts.tolist() == [640, 360, 0, 0]


def authors_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Their rule in their steps: sums of sorted probabilities, removed where above p, shifted right by one."""
    ordered, index = torch.sort(logits, descending=True)
    remove = torch.cumsum(torch.softmax(ordered, dim=-1), dim=-1) > p
    remove[..., 1:] = remove[..., :-1].clone()
    remove[..., 0] = False
    return ~remove.scatter(1, index, remove)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize(("rows", "codes", "scale"), [(2000, 1024, 2.0), (2000, 50, 1.0), (100, 16384, 3.0)])
def test_top_p_keeps_the_set_of_the_authors_in_every_row(generator, p, rows, codes, scale):
    logits = scale * torch.randn(rows, codes, generator=generator)
    different = (keep_top_p(logits, p).isfinite() != authors_top_p(logits, p)).any(dim=-1).sum().item()
    assert different == 0, f"{different} of {rows} rows keep another set"


def sorted_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """By a full sort with places, as on a GPU."""
    ordered, index = torch.sort(logits, dim=-1, descending=True)
    behind = torch.nn.functional.pad((ordered.float().softmax(-1).cumsum(-1) > p)[..., :-1], (1, 0))
    return logits.masked_fill(torch.empty_like(behind).scatter_(-1, index, behind), -INF)


HARD_ROWS = {
    "flat": lambda x: 1e-3 * x,
    "peaked": lambda x: 8 * x,
    "extreme": lambda x: 1e37 * x,
    "ties": lambda x: x.round(),
    "ties of all": torch.zeros_like,
    "two values": lambda x: (x > 0.5).to(x.dtype),
    "both zeros": lambda x: torch.where(x > 0, 0.0, -0.0).to(x.dtype),
    "behind top-k": lambda x: keep_top_k(x, 40),
    "infinite": lambda x: torch.where(x > 3, INF, x),
    "one left": lambda x: torch.where(x == x.amax(-1, keepdim=True), x, -INF),
    "none left": lambda x: torch.full_like(x, -INF),
    "not a number": lambda x: torch.where(x > 3, float("nan"), x),
}


@pytest.mark.parametrize("rows", HARD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_top_p_keeps_the_set_of_a_full_sort_bit_for_bit(generator, rows, dtype):
    for codes in (1, 7, 1500):
        logits = HARD_ROWS[rows](torch.randn(12, codes, generator=generator).to(dtype))
        for p in (1e-9, 0.1, 0.5, 0.9, 0.99, 0.999, 1 - 1e-7):
            expected = sorted_top_p(logits, p)
            assert torch.equal(keep_top_p(logits, p).isneginf(), expected.isneginf()), p
            torch.testing.assert_close(keep_top_p(logits, p), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", HARD_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_top_k_keeps_the_set_of_torch_topk(generator, rows, dtype):
    logits = HARD_ROWS[rows](torch.randn(12, 1500, generator=generator).to(dtype))
    for k in (1, 2, 50, 1499):
        threshold = logits.topk(k, dim=-1).values[..., -1:]
        expected = logits.masked_fill(logits < threshold, -INF)
        torch.testing.assert_close(keep_top_k(logits, k), expected, rtol=0, atol=0, equal_nan=True)


def test_filters_do_not_sort_places_on_a_cpu(generator, monkeypatch):
    """A full sort of 16,384 codes with their places takes fifty times as long as everything else in a draw."""
    monkeypatch.setattr(torch.Tensor, "sort", None)
    monkeypatch.setattr(torch.Tensor, "topk", None)
    logits = torch.randn(8, 16_384, generator=generator)
    assert 8 < keep_top_p(logits, 0.9).isfinite().sum() < 8 * 16_384
    assert keep_top_k(logits, 1000).isfinite().sum() == 8000


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-38, 1e-12, 1e-5, 1e-3, 1.0, 1e30, 1.7e308])
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"top_k": 5, "top_p": 1e-9}])
def test_every_temperature_gives_a_code(generator, temperature, filters):
    logits = 5 * torch.randn(40, 9, generator=generator)
    logits[0] *= 1e37
    logits[1, 3:] = -INF
    codes = next_codes(logits, torch.rand(40, generator=generator), SamplingConfig(temperature=temperature, **filters))
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < 9
    assert codes[1] < 3
    if temperature <= 1e-5:
        assert torch.equal(codes[2:], logits[2:].argmax(-1))


@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 0}])
def test_logits_that_are_no_numbers_give_no_code_beyond_the_last(filters):
    nan = float("nan")
    logits = torch.tensor([[nan] * 4, [0.0, nan, 1.0, 2.0], [-INF] * 4, [0.0, INF, 1.0, 2.0], [INF, -INF, INF, 0.0]])
    for uniform in (0.0, 0.5, 1.0):
        codes = next_codes(logits, torch.full((5,), uniform), SamplingConfig(**filters))
        assert 0 <= int(codes.min()) <= int(codes.max()) < 4
        assert codes[3] == 1
        assert codes[4] in (0, 2)
