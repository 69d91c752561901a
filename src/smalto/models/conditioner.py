"""What an image is asked to show, as a prefix of embeddings.

A conditioner maps its input to (B, num_tokens, dim) and knows the null condition that stands for "anything".
In training mode it replaces each sample's condition by the null one with probability ``drop_prob``, so that one
model learns both distributions that classifier-free guidance (arXiv:2207.12598) combines.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smalto.errors import InputError


def _check_drop_prob(drop_prob: float) -> None:
    if not 0 <= drop_prob < 1:
        raise InputError(f"conditioner: drop_prob is {drop_prob}, must be in [0, 1)")


class ClassConditioner(nn.Module):
    """One learned token per class, and one more for the null class, whose index is ``num_classes``."""

    def __init__(self, *, dim: int, num_classes: int, drop_prob: float) -> None:
        super().__init__()
        _check_drop_prob(drop_prob)
        self.num_classes = num_classes
        self.num_tokens = 1
        self.drop_prob = drop_prob
        self.embedding = nn.Embedding(num_classes + 1, dim)
        self.unused: list[str] = []
        """See :attr:`TextConditioner.unused`."""

    def forward(self, label: Tensor) -> Tensor:
        """Int64 (B,) in [0, num_classes], the last being null, to (B, 1, dim)."""
        if self.training and self.drop_prob > 0:
            dropped = torch.rand(label.shape, device=label.device) < self.drop_prob
            label = label.masked_fill(dropped, self.num_classes)
        return self.embedding(label).unsqueeze(1)

    def null(self, batch_size: int) -> Tensor:
        """The null condition, in the form :meth:`forward` takes."""
        return torch.full((batch_size,), self.num_classes, device=self.embedding.weight.device)

    def check(self, condition: Tensor) -> None:
        """Raise ValueError for labels the model has not got; done where labels come from a user, not per step."""
        if not condition.numel():
            return
        lowest, highest = torch.stack(condition.aminmax()).tolist()
        if lowest < 0 or highest >= self.num_classes:
            raise InputError(
                f"labels run from {lowest} to {highest}, the model knows classes 0 to {self.num_classes - 1}"
            )


class TextConditioner(nn.Module):
    """Text features through a two-layer projection without biases (LlamaGen section 2.2).

    Args:
        dim: width of the model.
        text_dim: width of the text encoder's features; 2048 for Flan-T5-XL.
        num_tokens: length of the prefix; shorter texts are padded on the left with zeros.
        drop_prob: of replacing the whole text by the null features in training.
        train_null: learn the null features. The authors meant to but stored them as a buffer, so in the released
            weights they are still at their random start; False reproduces that.
    """

    def __init__(self, *, dim: int, text_dim: int, num_tokens: int, drop_prob: float, train_null: bool = True) -> None:
        super().__init__()
        _check_drop_prob(drop_prob)
        self.num_tokens = num_tokens
        self.text_dim = text_dim
        self.drop_prob = drop_prob
        self.fc1 = nn.Linear(text_dim, dim, bias=False)
        self.fc2 = nn.Linear(dim, dim, bias=False)
        self.null_std = text_dim**-0.5
        """Of the null features at the start, so that they have about unit length."""
        self.null_features = nn.Parameter(torch.empty(num_tokens, text_dim), requires_grad=train_null)
        nn.init.normal_(self.null_features, std=self.null_std)

    @property
    def unused(self) -> list[str]:
        """Parameters that get no gradient in training; they stay in checkpoints and optimizers."""
        return ["null_features"] if self.drop_prob == 0 and self.null_features.requires_grad else []

    def forward(self, text: Tensor) -> Tensor:
        """Float (B, num_tokens, text_dim), left padded with zeros, to (B, num_tokens, dim)."""
        if self.training and self.drop_prob > 0:
            dropped = torch.rand(text.shape[0], 1, 1, device=text.device) < self.drop_prob
            text = torch.where(dropped, self.null_features.to(text.dtype), text)
        return self.fc2(F.gelu(self.fc1(text), approximate="tanh"))

    def null(self, batch_size: int) -> Tensor:
        """The null condition, in the form :meth:`forward` takes."""
        return self.null_features.expand(batch_size, -1, -1)

    def check(self, condition: Tensor) -> None:
        """Raise ValueError for features of another shape than the model was built for."""
        if condition.shape[1:] != (self.num_tokens, self.text_dim):
            raise InputError(
                f"text features have shape {tuple(condition.shape)}, "
                f"the model takes (batch, {self.num_tokens}, {self.text_dim})"
            )
