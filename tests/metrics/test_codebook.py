import math

import pytest
import torch

from smalto.metrics.codebook import CodebookUsage, position_counts, unigram_entropy, unigram_nll


def test_usage_perplexity_entropy(generator):
    metric = CodebookUsage(codebook_size=16)
    metric.update(torch.arange(4).repeat(10, 1))
    metric.update(torch.arange(4, 8).repeat(10, 1))
    result = metric.compute()
    assert float(result["usage"]) == 0.5
    assert float(result["perplexity"]) == pytest.approx(8.0)
    assert float(result["entropy"]) == pytest.approx(math.log(8))


def test_nothing_seen_is_zero():
    assert float(unigram_entropy(torch.zeros(5, dtype=torch.int64))) == 0.0


def test_codes_outside_are_refused():
    with pytest.raises(ValueError, match="codebook"):
        CodebookUsage(codebook_size=4).update(torch.tensor([[0, 4]]))
    with pytest.raises(ValueError, match="codebook"):
        position_counts(torch.tensor([[0, -1]]), 4)


def test_position_counts_by_hand():
    counts = position_counts(torch.tensor([[0, 2], [0, 1], [1, 2]]), 3)
    assert counts.tolist() == [[2, 1, 0], [0, 1, 2]]


def test_unigram_nll_by_hand():
    counts = position_counts(torch.tensor([[0, 2], [0, 1], [1, 2]]), 3)
    overall, by_position = unigram_nll(counts, torch.tensor([[0, 2]]))
    assert overall == pytest.approx(-(math.log(3 / 9) + math.log(3 / 9)) / 2)
    assert by_position == pytest.approx(-(math.log(3 / 6) + math.log(3 / 6)) / 2)


def test_unigram_nll_approaches_entropy(generator):
    p = torch.tensor([0.6, 0.3, 0.1])
    draw = torch.multinomial(p, 40_000, replacement=True, generator=generator).view(-1, 4)
    counts = position_counts(draw[:5000], 3)
    overall, by_position = unigram_nll(counts, draw[5000:])
    expected = float(-(p * p.log()).sum())
    # 20,000 draws of a variable with standard deviation 0.7: 0.005 per standard error.
    assert overall == pytest.approx(expected, abs=0.02)
    assert by_position == pytest.approx(expected, abs=0.02)
    assert float(unigram_entropy(counts.sum(0))) == pytest.approx(expected, abs=0.02)


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="counts are for"):
        unigram_nll(torch.ones(3, 4, dtype=torch.int64), torch.zeros(2, 5, dtype=torch.int64))
