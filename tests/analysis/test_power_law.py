import numpy as np
import pytest

from smalto.analysis.power_law import fit_power_law, law_of


@pytest.mark.parametrize("a", [0.5, 400.0])
@pytest.mark.parametrize("b", [0.05, 0.3, 1.2])
@pytest.mark.parametrize("c", [0.0, 2.0])
@pytest.mark.parametrize("scale", [1e6, 1e18], ids=["parameters", "FLOPs"])
def test_a_known_law_is_recovered(a, b, c, scale):
    x = scale * np.geomspace(1, 3000, 7)
    law = fit_power_law(x, a * (x / scale) ** -b + c)
    # The sum of squares is flat to rounding near its minimum, so the exponent is known to about 1e-8.
    assert law.b == pytest.approx(b, rel=1e-5)
    assert law.a * scale**-law.b == pytest.approx(a, rel=1e-4)
    assert law.c == pytest.approx(c, abs=1e-4 * a)
    assert law.residual_std < 1e-6 * (a + c)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, x = np.random.default_rng(0), np.geomspace(1e6, 3e9, 12)
    laws = [fit_power_law(x, 300 * x**-0.3 + 2 + rng.normal(0, 0.02, len(x)), confidence=0.9) for _ in range(200)]
    covered = {
        name: np.mean([law.intervals[name][0] <= true <= law.intervals[name][1] for law in laws])
        for name, true in (("a", 300), ("b", 0.3), ("c", 2))
    }
    middle = [law.band([1e8]) for law in laws]
    covered["curve"] = np.mean([low[0] <= 300 * 1e8**-0.3 + 2 <= high[0] for low, high in middle])
    # 200 draws of probability 0.9 have a standard deviation of 0.02; linearisation costs a little more.
    assert all(0.83 < share < 0.96 for share in covered.values()), covered


def test_the_same_points_give_the_same_law():
    x, y = [1e6, 5e6, 2e7, 9e7], [3.0, 2.4, 2.2, 2.1]
    assert fit_power_law(x, y) == fit_power_law(x, y)


def test_units_of_x_change_the_factor_only():
    x, y = np.array([1.0, 5, 20, 90, 400]), np.array([3.0, 2.4, 2.2, 2.1, 2.06])
    one, other = fit_power_law(x, y), fit_power_law(1e6 * x, y)
    assert other.b == pytest.approx(one.b, rel=1e-6)
    assert other.intervals["b"] == pytest.approx(one.intervals["b"], rel=1e-5)
    np.testing.assert_allclose(other.band(1e6 * x), one.band(x), rtol=1e-6)


def test_no_interval_without_a_point_to_spare():
    law, words = law_of([1, 10, 100], [3, 2, 1.5])
    assert law is not None
    assert law([1, 10, 100]) == pytest.approx([3, 2, 1.5], abs=1e-6)
    assert np.isnan([*law.intervals["b"], *law.band([5.0])[0]]).all()
    assert "no room" in words


def test_a_known_remainder_is_kept():
    x = np.array([1.0, 10, 100])
    law = fit_power_law(x, 2 * x**-0.5 + 1, offset=1)
    assert (law.c, law.intervals["c"]) == (1, (1, 1))
    assert law.b == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "said"),
    [
        ([1, 2], [2, 1], "too few"),
        ([1, 1, 2, 2], [2, 2, 1, 1], "too few"),
        ([1, 2, 3], [1, 2, 3], "does not fall"),
        ([1, 2, 4, 8], [5, 1, 1, 1], "no power law"),
        ([0, 1, 2], [3, 2, 1], "positive"),
        ([1, 2, 3], [3, float("nan"), 1], "finite"),
        ([1, 2, 3], [3, 2], "length"),
    ],
)
def test_points_without_a_law_are_refused(x, y, said):
    with pytest.raises(ValueError, match=said):
        fit_power_law(x, y)
    assert law_of(x, y)[0] is None
