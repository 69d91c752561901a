import math

import pytest
import torch
import torch.nn.functional as F

from smalto.metrics.likelihood import CodeLikelihood


def test_loss_accuracy_bits_and_error(generator):
    logits = torch.randn(30, 7, 5, generator=generator)
    codes = torch.randint(5, (30, 7), generator=generator)
    metric = CodeLikelihood()
    for part in torch.arange(30).split(8):
        metric.update(logits[part], codes[part])
    scores = metric.scores()
    nll = F.cross_entropy(logits.flatten(0, 1), codes.flatten(), reduction="none").view(30, 7).double()
    assert scores.values["loss"] == pytest.approx(float(nll.mean()), rel=1e-6)
    assert scores.values["accuracy"] == pytest.approx(float((logits.argmax(-1) == codes).double().mean()))
    assert scores.values["bits_per_image"] == pytest.approx(float(nll.sum(1).mean()) / math.log(2), rel=1e-6)
    assert scores.errors["loss"] == pytest.approx(float(nll.mean(1).std() / 30**0.5), rel=1e-5)


def test_uniform_logits_cost_the_log_of_the_vocabulary():
    metric = CodeLikelihood()
    metric.update(torch.zeros(3, 4, 16, dtype=torch.bfloat16), torch.ones(3, 4, dtype=torch.int64))
    values = metric.scores().values
    assert values["loss"] == pytest.approx(math.log(16))
    assert values["bits_per_image"] == pytest.approx(16.0)
