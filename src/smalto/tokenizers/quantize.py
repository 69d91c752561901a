"""Vector quantisation: continuous latents to entries of a learned codebook (arXiv:1711.00937, LlamaGen section 2.1)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.errors import InputError
from smalto.nn.global_batch import mean_over_processes

LOOKUP_ROWS = {"cpu": 64}
"""Latents compared with the codebook at a time, by device: bounds memory to so many x codebook_size floats.

On a CPU the scores of 64 rows (4 MB for 16384 codes) are still in its cache when their maximum is sought: half the time
of 1024 rows.
"""
MANY_ROWS = 4096
"""On other devices, where each chunk costs a kernel launch."""


@dataclass(frozen=True)
class QuantizerOutput:
    """What quantising a batch of latents gives.

    Args:
        latent: (B, C, h, w), the chosen entries; gradients pass straight through to the input.
        codes: int64 (B, h * w), raster order.
        codebook_loss: scalar, pulls entries to latents.
        commitment_loss: scalar, pulls latents to entries; already weighted.
        entropy_loss: scalar, already weighted; zero when switched off.
    """

    latent: Tensor
    codes: Tensor
    codebook_loss: Tensor
    commitment_loss: Tensor
    entropy_loss: Tensor

    @property
    def loss(self) -> Tensor:
        """Sum of the three terms."""
        return self.codebook_loss + self.commitment_loss + self.entropy_loss


class VectorQuantizer(nn.Module):
    """Nearest-neighbour codebook with straight-through gradients.

    Args:
        codebook_size: number of entries.
        codebook_dim: length of an entry; LlamaGen's ablation (Table 2) favours 8.
        l2_norm: compare and emit unit vectors (arXiv:2110.04627); the stored entries need not have unit length.
        commitment_weight: factor of the commitment term.
        entropy_weight: factor of ``mean entropy per latent - entropy of the mean`` over softmax affinities,
            which rewards confident and evenly used codes; 0 does not compute it.
        entropy_temperature: of those affinities.
    """

    def __init__(
        self,
        *,
        codebook_size: int,
        codebook_dim: int,
        l2_norm: bool = True,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        super().__init__()
        if codebook_size < 2 or codebook_dim < 1:
            raise InputError(
                f"quantizer: codebook_size is {codebook_size} (needs >= 2), codebook_dim is {codebook_dim} (needs >= 1)"
            )
        if min(commitment_weight, entropy_weight) < 0 or entropy_temperature <= 0:
            raise InputError(
                f"quantizer: commitment_weight ({commitment_weight}) and entropy_weight ({entropy_weight}) must be "
                f">= 0, entropy_temperature ({entropy_temperature}) > 0"
            )
        self.codebook_size = codebook_size
        self.codebook_dim = codebook_dim
        self.l2_norm = l2_norm
        self.commitment_weight = commitment_weight
        self.entropy_weight = entropy_weight
        self.entropy_temperature = entropy_temperature
        self.codebook = nn.Embedding(codebook_size, codebook_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1 / codebook_size, on the unit sphere if entries are normalised."""
        with torch.no_grad():
            self.codebook.weight.uniform_(-1 / self.codebook_size, 1 / self.codebook_size)
            if self.l2_norm:
                self.codebook.weight.copy_(F.normalize(self.codebook.weight, dim=-1))

    def entries(self) -> Tensor:
        """The codebook as it is used: float32 (codebook_size, codebook_dim), unit rows if ``l2_norm``."""
        weight = self.codebook.weight.float()
        return F.normalize(weight, dim=-1) if self.l2_norm else weight

    @torch.no_grad()
    def nearest(self, latent: Tensor, entries: Tensor) -> Tensor:
        """Index of the nearest entry, int64 (N,), for float32 (N, C); ties go to the first.

        Of unit vectors the nearest is the one with the largest dot product; otherwise half the squared norm
        of the entry is taken off. Rows go in chunks, so no N x codebook_size matrix is held.
        """
        bias = None if self.l2_norm else entries.pow(2).sum(1) / 2
        chunks = []
        for rows in latent.split(LOOKUP_ROWS.get(latent.device.type, MANY_ROWS)):
            scores = rows @ entries.T
            if bias is not None:
                scores -= bias
            chunks.append(scores.argmax(1))
        return torch.cat(chunks)

    def forward(self, latent: Tensor) -> QuantizerOutput:
        """Quantise (B, codebook_dim, h, w); distances are always float32, whatever autocast says."""
        with torch.autocast(latent.device.type, enabled=False):
            z = latent.float().movedim(1, -1)
            if self.l2_norm:
                z = F.normalize(z, dim=-1)
            entries = self.entries()
            codes = self.nearest(z.detach().flatten(0, -2), entries.detach())
            quantized = F.embedding(codes, entries).view(z.shape)
            codebook_loss = F.mse_loss(quantized, z.detach())
            commitment_loss = self.commitment_weight * F.mse_loss(z, quantized.detach())
            if self.entropy_weight > 0:
                entropy_loss = self.entropy_weight * self.entropy(z.flatten(0, -2), entries)
            else:
                entropy_loss = codebook_loss.new_zeros(())
            straight_through = z + (quantized - z).detach()
        return QuantizerOutput(
            latent=straight_through.movedim(-1, 1).to(latent.dtype),
            codes=codes.view(latent.shape[0], -1),
            codebook_loss=codebook_loss,
            commitment_loss=commitment_loss,
            entropy_loss=entropy_loss,
        )

    def entropy(self, z: Tensor, entries: Tensor) -> Tensor:
        """Mean entropy of soft assignments minus the entropy of their mean over all processes, in nats, for (N, C)."""
        squared = z.pow(2).sum(1, keepdim=True) + entries.pow(2).sum(1) - 2 * z @ entries.T
        log_p = F.log_softmax(-squared / self.entropy_temperature, dim=-1)
        p = log_p.exp()
        mean_p = mean_over_processes(p.mean(0))
        per_sample = -(p * log_p).sum(-1).mean()
        of_mean = -(mean_p * (mean_p + 1e-5).log()).sum()
        return per_sample - of_mean

    def lookup(self, codes: Tensor) -> Tensor:
        """Entries of int64 codes (...,) as float32 (..., codebook_dim)."""
        return F.embedding(codes, self.entries())
