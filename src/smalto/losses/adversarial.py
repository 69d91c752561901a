"""Adversarial losses as pure functions of discriminator logits of any shape (LlamaGen section 2.1).

Logits of any float dtype; losses and means are taken in float32 (float64 stays). Under autocast logits are bfloat16,
whose mean over thousands of patches has two to three digits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from smalto.nn.global_batch import mean_over_processes


def hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    """Half of ``mean relu(1 - real) + mean relu(1 + fake)`` (arXiv:1705.02894)."""
    return 0.5 * (F.relu(1 - _exact(real)).mean() + F.relu(1 + _exact(fake)).mean())


def vanilla_d(real: Tensor, fake: Tensor) -> Tensor:
    """Half of the two cross-entropies, real against 1 and fake against 0 (arXiv:1406.2661)."""
    return 0.5 * non_saturating_d(real, fake)


def non_saturating_d(real: Tensor, fake: Tensor) -> Tensor:
    """Both cross-entropies, not halved; logits first (the authors' code passes target and logits swapped)."""
    return F.softplus(-_exact(real)).mean() + F.softplus(_exact(fake)).mean()


def hinge_g(fake: Tensor) -> Tensor:
    """``-mean fake``."""
    return -mean_logit(fake)


def non_saturating_g(fake: Tensor) -> Tensor:
    """Cross-entropy of fakes against 1."""
    return F.softplus(-_exact(fake)).mean()


def mean_logit(logits: Tensor) -> Tensor:
    """How real a batch looks, a scalar."""
    return _exact(logits).mean()


def _exact(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


DISCRIMINATOR_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "hinge": hinge_d,
    "vanilla": vanilla_d,
    "non_saturating": non_saturating_d,
}
GENERATOR_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "hinge": hinge_g,
    "non_saturating": non_saturating_g,
}


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """Ratio of the two gradients' norms at the decoder's last layer, in [0, 1e4] (arXiv:2012.09841, equation 7).

    Call before ``backward``: the graph is kept. The result carries no gradient.
    """
    (of_reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (of_adversarial,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    of_reconstruction, of_adversarial = mean_over_processes(of_reconstruction), mean_over_processes(of_adversarial)
    return (of_reconstruction.norm() / (of_adversarial.norm() + 1e-4)).clamp(0, 1e4).detach()
