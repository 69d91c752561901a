import pytest
import torch

from smalto.nn.rope import apply_rope, axial_rope


def test_table_of_64_channels():
    """Row 3, column 5 of a 16 x 16 grid in the authors' code; they are printed with six decimals."""
    table = axial_rope((16, 16), 64, prefix=1)
    assert table.shape == (257, 32, 2)
    cos, sin = table[1 + 3 * 16 + 5].unbind(-1)
    expected = {
        (cos, 0): [-0.989992, -0.115966, 0.582754, 0.861041],
        (sin, 0): [0.14112, 0.993253, 0.812649, 0.508536],
        (cos, 16): [0.283662, -0.946079, -0.010342, 0.63008],
        (sin, 16): [-0.958924, 0.323935, 0.999947, 0.77653],
    }
    for (values, start), printed in expected.items():
        torch.testing.assert_close(values[start : start + 4], torch.tensor(printed), atol=1e-6, rtol=0)


def test_table_of_100_channels():
    """GPT-3B: 25 row and 25 column frequencies; row 2, column 7 of a 24 x 24 grid in the authors' code."""
    cos = axial_rope((24, 24), 100, prefix=1)[1 + 2 * 24 + 7, :, 0]
    assert cos.shape == (50,)
    torch.testing.assert_close(cos[:3], torch.tensor([-0.416147, 0.186044, 0.575762]), atol=1e-6, rtol=0)
    torch.testing.assert_close(cos[25:28], torch.tensor([0.753902, 0.130058, -0.978277]), atol=1e-6, rtol=0)


def test_rows_turn_the_first_half_and_columns_the_second():
    table = axial_rope((3, 5), 16).unflatten(0, (3, 5))
    assert torch.equal(table[:, :1, :4].expand(-1, 5, -1, -1), table[:, :, :4])
    assert torch.equal(table[:1, :, 4:].expand(3, -1, -1, -1), table[:, :, 4:])


def test_adjacent_channels_form_a_pair():
    quarter_turn = torch.tensor([[[0.0, 1.0]]])
    x = torch.tensor([1.0, 2.0]).view(1, 1, 1, 2)
    assert apply_rope(x, quarter_turn).flatten().tolist() == [-2.0, 1.0]


def test_condition_tokens_vanish_in_zero_mode_and_stay_in_identity_mode(generator):
    x = torch.randn(2, 3, 4, 8, generator=generator)
    assert torch.equal(apply_rope(x, axial_rope((2, 2), 8, prefix=3)[:3]), torch.zeros_like(x))
    assert torch.equal(apply_rope(x, axial_rope((2, 2), 8, prefix=3, prefix_mode="identity")[:3]), x)


def test_prefix_only_shifts_the_codes():
    assert torch.equal(axial_rope((4, 4), 8, prefix=5)[5:], axial_rope((4, 4), 8))


def test_rotation_keeps_lengths(generator):
    x = torch.randn(2, 12, 3, 16, generator=generator)
    rotated = apply_rope(x, axial_rope((3, 4), 16))
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))


def test_dot_products_depend_on_the_offset_only(generator):
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=generator)
    table = axial_rope((6, 6), 8).double()
    turn = apply_rope(torch.stack([q, k]).view(1, 1, 2, 8).expand(1, 36, 2, 8), table)[0].unflatten(0, (6, 6))

    def product(at: tuple[int, int], offset: tuple[int, int]) -> float:
        return float(turn[at][0] @ turn[at[0] + offset[0], at[1] + offset[1]][1])

    for offset in ((0, 1), (1, 0), (2, 3)):
        # The angles are float32, of size up to 5: 5e-7 each.
        assert product((0, 0), offset) == pytest.approx(product((3, 2), offset), abs=1e-5)
    assert product((0, 0), (0, 1)) != pytest.approx(product((0, 0), (1, 0)), abs=1e-2)


def test_keeps_the_dtype(generator):
    table = axial_rope((2, 2), 8)
    x = torch.randn(1, 4, 2, 8, generator=generator)
    half = apply_rope(x.bfloat16(), table)
    assert half.dtype == torch.bfloat16
    # Computed in float32 and rounded once to 8 significant bits.
    exact = apply_rope(x.bfloat16().float(), table)
    torch.testing.assert_close(half.float(), exact, rtol=2**-8, atol=0)


def test_float64_keeps_its_digits(generator):
    table = axial_rope((2, 2), 8)
    x = torch.randn(1, 4, 2, 8, dtype=torch.float64, generator=generator)
    turned, nudged = apply_rope(x, table), apply_rope(x * (1 + 1e-12), table)
    assert turned.dtype == torch.float64
    torch.testing.assert_close(nudged, turned * (1 + 1e-12), rtol=1e-14, atol=1e-15)  # float32 would not see the nudge


@pytest.mark.parametrize("head_dim", [6, 10, 63])
def test_refuses_heads_that_cannot_be_split(head_dim):
    with pytest.raises(ValueError, match=f"head_dim is {head_dim}.*multiple of 4"):
        axial_rope((2, 2), head_dim)


def test_refuses_unknown_mode():
    with pytest.raises(ValueError, match=r"'one'.*'zero'.*'identity'"):
        axial_rope((2, 2), 8, prefix_mode="one")
