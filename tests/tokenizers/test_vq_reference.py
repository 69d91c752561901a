"""The tokenizer with codebooks without recorded numbers, against the reference that reads the authors' names."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import reference_vq as reference
from official_files import filled, tokenizer_shapes
from smalto.tasks.official import official_name
from smalto.tasks.official_config import Hints, tokenizer_node
from smalto.tasks.registry import factory
from smalto.tokenizers.quantize import QuantizerOutput
from smalto.tokenizers.vqgan import VQModel

# float32 in two implementations: values of order 1 through some twenty layers.
CLOSE = {"atol": 1e-4, "rtol": 0}


@dataclass(frozen=True)
class Book:
    codes: int
    dim: int
    l2_norm: bool
    entropy_weight: float
    multipliers: tuple[int, ...] = (1, 2)


BOOKS = {
    "1024 codes": Book(1024, 8, True, 0.0),
    "16384 codes, entropy": Book(16384, 8, True, 0.1, (1, 1, 2)),
    "dim 32 off the sphere": Book(1024, 32, False, 0.0),
    "dim 32 off the sphere, entropy": Book(1024, 32, False, 0.1, (1, 2, 2)),
    "dim 256": Book(512, 256, True, 0.1),
}


class Case:
    """Both forward and backward passes of the golden recipe: mean squared reconstruction plus all losses."""

    def __init__(self, book: Book) -> None:
        shapes = tokenizer_shapes(
            base=64, multipliers=list(book.multipliers), blocks=2, z=64, codes=book.codes, dim=book.dim
        )
        self.theirs = {name: value.requires_grad_() for name, value in filled(shapes).items()}
        image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        self.their_latent = reference.encode(self.theirs, image)
        self.expected = reference.quantize(
            self.theirs, self.their_latent, l2_norm=book.l2_norm, entropy_weight=book.entropy_weight
        )
        self.their_image = reference.decode(self.theirs, self.expected["quantized"])
        losses = [self.expected[f"{name}_loss"] for name in ("codebook", "commitment", "entropy")]
        (self.their_image.pow(2).mean() + sum(losses)).backward()

        node = tokenizer_node(self.theirs, Hints(image_size=16, l2_norm=book.l2_norm), Path("x"))
        node["quantizer"]["entropy_weight"] = book.entropy_weight
        self.net: VQModel = factory(node, "tokenizer", where="this test")()
        state = {name: self.theirs[official_name("tokenizer", name)].detach() for name in self.net.state_dict()}
        self.net.load_state_dict(state)
        self.latent = self.net.quant_conv(self.net.encoder(image))
        self.found: QuantizerOutput = self.net.quantizer(self.latent)
        self.image = self.net.decode_latent(self.found.latent)
        (self.image.pow(2).mean() + self.found.loss).backward()


@pytest.fixture(scope="module", params=BOOKS)
def case(request) -> Case:
    return Case(BOOKS[request.param])


def test_latent_codes_and_reconstruction(case):
    torch.testing.assert_close(case.latent, case.their_latent, **CLOSE)
    assert torch.equal(case.found.codes.flatten(), case.expected["codes"])
    torch.testing.assert_close(case.found.latent, case.expected["quantized"], **CLOSE)
    torch.testing.assert_close(case.image, case.their_image, **CLOSE)
    torch.testing.assert_close(case.net.decode(case.found.codes), case.their_image, **CLOSE)


@pytest.mark.parametrize("name", ["codebook_loss", "commitment_loss", "entropy_loss"])
def test_losses(case, name):
    assert getattr(case.found, name).item() == pytest.approx(case.expected[name].item(), abs=1e-5)


def test_gradient_norms(case):
    for name, parameter in case.net.named_parameters():
        if name.endswith(".k.bias"):  # a constant added to all keys changes nothing: rounding noise
            continue
        expected = float(case.theirs[official_name("tokenizer", name)].grad.norm())
        assert float(parameter.grad.norm()) == pytest.approx(expected, rel=1e-3), name
