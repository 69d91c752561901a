"""How well a generator predicts held-out codes, beside what counting codes alone would reach."""

import logging
from typing import Any

import torch
from torch import Tensor

from smalto.data.progress import progress
from smalto.metrics.codebook import position_counts, unigram_entropy, unigram_nll
from smalto.metrics.likelihood import CodeLikelihood
from smalto.metrics.scores import Scores

log = logging.getLogger(__name__)


@torch.inference_mode()
def measure_codes(task: Any, data: Any) -> tuple[Scores, Tensor]:
    """Teacher-forced loss, accuracy and bits per image of the validation codes, and the loss of code counts.

    Args:
        task: a generator's, in eval mode.
        data: the data module of its codes, set up.

    Returns:
        Scores, and the counts of training codes per place, int64 (L, K). ``unigram_loss`` and
        ``position_unigram_loss`` are what a generator has to beat: counts of all places, and of each.
    """
    likelihood = CodeLikelihood().to(task.device)
    validation = []
    with progress("loss", total=data.num_val) as advance:
        for batch in data.val_dataloader():
            codes = batch["codes"].to(task.device)
            condition, mask = task.condition(batch)
            mask = None if mask is None else mask.to(task.device)
            likelihood.update(task.net(codes, condition.to(task.device), mask), codes)
            validation.append(codes.cpu())
            advance(len(codes))
    counts = torch.zeros(task.net.num_codes, task.net.vocab_size, dtype=torch.int64)
    for batch in data.train_dataloader():
        counts += position_counts(batch["codes"], task.net.vocab_size)
    scores = likelihood.scores()
    unigram, positional = unigram_nll(counts, torch.cat(validation))
    scores.add("unigram_entropy", float(unigram_entropy(counts.sum(0))))
    scores.add("unigram_loss", unigram)
    scores.add("position_unigram_loss", positional)
    return scores, counts
