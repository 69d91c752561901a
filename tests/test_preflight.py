"""What a training misses is told before anything is built: what, the rule, the command."""

import pytest
from omegaconf import OmegaConf

from smalto import train
from smalto.runtime import compose


@pytest.mark.parametrize("experiment", ["c2i_256", "tokenizer_f8", "t2i_stage2"])
def test_a_paper_preset_on_a_bare_machine_says_what_to_do(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("SMALTO_OUTPUTS", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    config = compose("train", [f"experiment={experiment}", f"run_dir={tmp_path}/run"])
    with pytest.raises(ValueError, match="no GPU here") as raised:
        train.run(config)
    paragraphs = str(raised.value).split("\n\n")
    assert all(len(paragraph.splitlines()) == 3 for paragraph in paragraphs)
    text = str(raised.value)
    assert f"{tmp_path}/data" in text
    command = "smalto prepare" if experiment == "tokenizer_f8" else "smalto extract"
    assert command in text
    assert ("init_from" in text) == (experiment == "t2i_stage2")
    assert not list(tmp_path.iterdir()), "something was written before the check"


def test_too_few_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = compose("train", ["run_dir=x", "trainer.accelerator=gpu", "trainer.devices=8"])
    from smalto.preflight import preflight

    with pytest.raises(ValueError, match=r"2 GPU\(s\) here, trainer.devices is 8"):
        preflight(OmegaConf.to_container(config, resolve=True))
