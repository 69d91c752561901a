"""What a training misses is told before anything is built: what, the rule, the command."""

import json

import pytest
from omegaconf import OmegaConf

from smalto import train
from smalto.preflight import classes, preflight
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


@pytest.mark.parametrize(
    ("experiment", "file", "way_out"),
    [
        ("tokenizer_f16", "vgg16-397923af.pth", "perceptual=squeeze_caffe"),
        ("tokenizer_f16", "weights-inception-2015-12-05-6726825d.pth", "features=lite0"),
        ("c2i_384", "weights-inception-2015-12-05-6726825d.pth", "features=lite0"),
    ],
)
def test_networks_of_the_paper_are_not_replaced_in_silence(experiment, file, way_out, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def told(*words: str) -> str:
        config = compose("train", [f"experiment={experiment}", f"run_dir={tmp_path}/run", *words])
        with pytest.raises(ValueError, match=r"no GPU here|no image shards|no code shards") as raised:
            preflight(OmegaConf.to_container(config, resolve=True))
        return str(raised.value)

    assert file in told()
    assert way_out in told()
    assert file not in told(way_out)
    place = tmp_path / "hub" / "hub" / "checkpoints" / file
    place.parent.mkdir(parents=True)
    place.touch()
    assert file not in told()


def labelled(tmp_path, num_classes, *, known):
    meta = {"format": "smalto-codes", "version": 1, "splits": {}, "num_classes": num_classes}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    options = [f"data.path={tmp_path}", f"model.conditioner.num_classes={known}", f"run_dir={tmp_path}/run"]
    return OmegaConf.to_container(compose("train", ["experiment=demo_gpt", *options]), resolve=True)


def test_classes_that_the_model_has_not_got_are_told_before_anything_is_built(tmp_path):
    plain = labelled(tmp_path, 16, known=10)
    assert [problem[0] for problem in classes(plain)] == [
        f"the codes at {tmp_path} have 16 classes, model.conditioner.num_classes is 10"
    ]
    with pytest.raises(ValueError, match=r"have 16 classes, model.conditioner.num_classes is 10") as error:
        preflight(plain)
    assert str(error.value).count("have 16 classes") == 1
    assert next(classes(labelled(tmp_path, 11, known=10)))  # label 10 would be taken for no class at all
    assert "have no labels" in next(classes(labelled(tmp_path, None, known=10)))[0]


def test_many_more_classes_than_there_are_deserve_a_warning(tmp_path, caplog):
    assert list(classes(labelled(tmp_path, 16, known=16))) == []
    assert not caplog.records
    assert list(classes(labelled(tmp_path, 16, known=1000))) == []
    assert "have 16 classes, model.conditioner.num_classes is 1000" in caplog.text


def test_too_few_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    config = compose("train", ["run_dir=x", "trainer.accelerator=gpu", "trainer.devices=8"])
    with pytest.raises(ValueError, match=r"2 GPU\(s\) here, trainer.devices is 8"):
        preflight(OmegaConf.to_container(config, resolve=True))
