import pytest
import torch

from smalto.nn.peak import measured_tflops, peak_tflops

CPU = torch.device("cpu")


def test_numbers_and_names_are_taken_as_they_are():
    assert peak_tflops(2.5, CPU, torch.float32) == 2.5
    assert peak_tflops("a100", CPU, torch.float32) == 312


@pytest.mark.parametrize("wrong", ["a1000", 0, -1.0])
def test_wrong_peaks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"peak_tflops is .*null"):
        peak_tflops(wrong, CPU, torch.float32)


def test_measuring_draws_nothing_and_gives_a_rate():
    state = torch.get_rng_state()
    assert 1e-4 < measured_tflops(CPU, torch.float32, seconds=0.05) < 100
    assert torch.equal(state, torch.get_rng_state())
