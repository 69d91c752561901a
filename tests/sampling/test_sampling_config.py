import dataclasses

import pytest

from smalto.types import SamplingConfig


def test_defaults_change_nothing():
    config = SamplingConfig()
    assert dataclasses.astuple(config) == (1.0, -1, 1.0, 0, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [{"cfg_scale": 0.9}, {"cfg_interval": -2}, {"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}],
)
def test_refuses(wrong):
    key, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"{key} is {value}, must be"):
        SamplingConfig(**wrong)


@pytest.mark.parametrize("key", ["cfg_scale", "temperature", "top_p"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_refuses_what_is_no_number(key, value):
    with pytest.raises(ValueError, match=f"{key} is {value}"):
        SamplingConfig(**{key: float(value)})


def test_names_all_problems_at_once():
    with pytest.raises(ValueError, match=r"^sampling: ") as error:
        SamplingConfig(cfg_scale=0.0, cfg_interval=-5, temperature=-1.0, top_k=-3, top_p=2.0)
    message = str(error.value)
    assert "\n" not in message
    assert all(key in message for key in ("cfg_scale", "cfg_interval", "temperature", "top_k", "top_p"))
