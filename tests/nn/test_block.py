import torch

from smalto.nn.block import TransformerBlock
from smalto.nn.rope import axial_rope


def test_is_two_residuals(generator):
    block = TransformerBlock(16, num_heads=2, ffn_multiple_of=8).double().eval()
    rope = axial_rope((2, 3), 8).double()
    x = torch.randn(2, 6, 16, dtype=torch.float64, generator=generator)
    h = x + block.attention(block.attention_norm(x), rope)
    torch.testing.assert_close(block(x, rope), h + block.ffn(block.ffn_norm(h)), atol=1e-12, rtol=1e-12)


def test_is_the_identity_without_its_output_layers(generator):
    block = TransformerBlock(16, num_heads=2, ffn_multiple_of=8)
    torch.nn.init.zeros_(block.attention.proj.weight)
    torch.nn.init.zeros_(block.ffn.down.weight)
    x = torch.randn(2, 6, 16, generator=generator)
    assert torch.equal(block(x, axial_rope((2, 3), 8)), x)


def test_drop_path_skips_a_branch_per_sample():
    block = TransformerBlock(16, num_heads=2, ffn_multiple_of=8, drop_path=0.5).train()
    x = torch.randn(1, 6, 16).expand(400, -1, -1)
    results = block(x, axial_rope((2, 3), 8)).detach().flatten(1)
    # Two branches, each kept or not: four different results, each of probability 1/4 (100 +- 5 x 8.7).
    kinds, counts = results.mul(1e4).round().unique(dim=0, return_counts=True)
    assert len(kinds) == 4
    assert (counts - 100).abs().max() < 44
    assert (results == x.flatten(1)).all(1).any()
