"""Values of options: of their kind, put right where one thing can be meant, or refused by name; paths as typed."""

from pathlib import Path
from typing import Any, Literal

import pytest
from omegaconf import OmegaConf

from smalto.arguments import fit, quoted
from smalto.endings import REFUSED, ending
from smalto.errors import InputError
from smalto.fitting import Misfit, fitted
from smalto.kinds import OPTIONAL, root_kinds
from smalto.runtime import compose, conf_dir

REQUIRED = {
    "prepare": ["out=x"],
    "train": ["run_dir=x"],
    "plan": ["run_dir=x"],
    "extract": ["out=x", "tokenizer_ckpt=x"],
    "sample": ["ckpt=x"],
    "evaluate": [],
    "inspect": ["path=x"],
    "convert": ["in=x", "out=y"],
}


@pytest.mark.parametrize(
    ("verb", "given", "value"),
    [
        ("sample", "seed=1e2", 100),
        ("sample", "num_images=2.0", 2),
        ("sample", "sampling.top_k=1e2", 100),
        ("sample", "labels=5", [5]),
        ("sample", "labels=Bag", ["Bag"]),
        ("sample", "mlflow=no", False),
        ("evaluate", "num_samples=[5e2,2e3]", [500, 2000]),
        ("evaluate", "guidance_scales=1.5", [1.5]),
        ("extract", "crop_range=1.1", [1.1]),
        ("prepare", "workers=2.0", 2),
        ("inspect", "num_images=4.0", 4),
        ("plan", "plan.num_images=1e6", 1000000),
        ("train", "data.batch_size=8.0", 8),
        ("train", "task.optimizer.lr='1e-3'", 1e-3),
        ("train", "trainer.max_steps=1e1", 10),
        ("train", "trainer.val_check_interval=1e2", 100),
        ("train", "trainer.val_check_interval=0.5", 0.5),
        ("train", "trainer.limit_val_batches=1.0", 1.0),
        ("train", "trainer.devices=2.0", 2),
        ("train", "callbacks.generation.num_samples=[500.0]", [500]),
        ("train", "run_name=7", "7"),
        ("train", "+trainer.max_time=5", "5"),  # a text, of which Lightning says what is wrong; no duration
        ("sample", "num_images=\u0663", 3),  # digits are digits
        ("train", "name=gr\u00f6\u00dfe", "gr\u00f6\u00dfe"),
        ("sample", "labels=[Bag, gr\u00f6\u00dfe 3,\u56f3]", ["Bag", "gr\u00f6\u00dfe 3", "\u56f3"]),
    ],
)
def test_what_can_be_meant_one_way_is_put_right(verb, given, value):
    found = OmegaConf.select(compose(verb, [*REQUIRED[verb], given]), given.lstrip("+").partition("=")[0])
    assert found == value
    assert repr(found) == repr(value)  # 8.0 == 8


@pytest.mark.parametrize(
    ("verb", "given", "said"),
    [
        ("sample", "seed=null", "seed is null, a whole number is needed"),
        ("sample", "seed=-1", "seed is -1, must be from 0 to"),
        ("sample", "sampling.temperature=nan", "sampling.temperature is nan, a number is needed"),
        ("sample", "num_images=many", "num_images is 'many', a whole number"),
        ("convert", "l2_norm=maybe", "l2_norm is 'maybe', true or false or null"),
        ("evaluate", "num_samples=2.5", "num_samples is 2.5, a whole number or a list of whole numbers or null"),
        ("plan", "plan.mfu=half", "plan.mfu is 'half', a number or null"),
        ("train", "data.batch_size=8.5", "data.batch_size is 8.5, a whole number is needed"),
        ("train", "data.batch_size={a:1}", "data.batch_size is a node of options, a whole number"),
        ("train", "trainer.val_check_interval=0", "trainer.val_check_interval is 0, must be more than 0"),
        ("train", "task.optimizer.betas=[0.9]", "task.optimizer.betas is [0.9], a list of 2"),
        ("train", "data.num_train=true", "data.num_train is true, a whole number"),
        ("train", "+model.dmi=3", "model.dmi is no option of smalto.models.gpt.GPT; it has dim, "),
        ("train", "model.num_heads=0", "model.num_heads is 0, must be 1 or more"),
        ("train", "model.token_dropout=2", "model.token_dropout is 2, must be from 0 to 1"),
        ("train", "tokenizer.channel_multipliers=[]", "tokenizer.channel_multipliers is [], must be one or more"),
        ("sample", "~device", "device is needed; ~device takes it away"),
        ("sample", "out=", "out is empty, a path is needed"),
        ("train", "run_name=1.5", "run_name is 1.5, a text is needed; put it in quotes"),
        ("train", "task.optimizer.lr=inf", "task.optimizer.lr is inf, must be 0 or more, and finite"),
        ("sample", "+num_image=2", "smalto sample has no option num_image; did you mean num_images?"),
        ("train", "++trainr.max_steps=2", "smalto train has no option trainr.max_steps; did you mean trainer?"),
        ("evaluate", "num_samples=[]", "num_samples is [], must be one or more numbers, or null"),
        ("evaluate", "guidance_scales=[]", "guidance_scales is [], must be one or more"),
        ("evaluate", "protocol=null", "protocol is needed"),
        ("sample", "engine=null", "engine is needed"),
        ("sample", "~sampling", "sampling is needed"),
        ("sample", "sampling=null", "sampling is needed"),
        ("train", "~trainer", "trainer is needed"),
        ("train", "task=null", "task is needed"),
        ("train", "hydra.run.dir=", "hydra.run.dir is empty, a path is needed"),
        ("train", "hydra.run.dir=''", "hydra.run.dir is empty, a path is needed"),
    ],
)
def test_anything_else_is_refused_by_the_name_of_the_option(verb, given, said):
    with pytest.raises(InputError) as error:
        compose(verb, [*REQUIRED[verb], given])
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("verb", REQUIRED)
def test_every_option_of_every_verb_has_a_kind(verb):
    """One that is null by default needs a line in ``OPTIONAL``."""
    unknown = [key for key, kind in root_kinds(verb, Path(conf_dir())).items() if kind is Any]
    assert unknown == []
    assert OPTIONAL
    compose(verb, REQUIRED[verb])  # the defaults are of their own kinds


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        (True, int, Misfit),
        (1, bool, True),
        (float("inf"), int, Misfit),
        (float("inf"), float, float("inf")),
        ("0x10", int, Misfit),
        ("-2.5E+3", float, -2500.0),
        ("", float, Misfit),
        ("a", list[str] | None, ["a"]),
        (None, list[str] | None, None),
        (None, list[str], Misfit),
        ([1, 2], list[str], ["1", "2"]),
        (3, list[list[int]], Misfit),
        ([3, 4], list[list[int]], Misfit),
        ("3", int | str, "3"),
        (16, Literal["16", "32"], "16"),
        ("8", Literal["16", "32"], Misfit),
        ({"a": 1}, str, Misfit),
        ({"a": 1}, str | dict, {"a": 1}),
    ],
)
def test_one_value_and_one_kind(value, kind, result):
    if result is Misfit:
        with pytest.raises(Misfit):
            fitted(value, kind)
    else:
        assert repr(fitted(value, kind)) == repr(result)


@pytest.mark.parametrize(
    ("verb", "key", "path"),
    [
        ("sample", "ckpt", "epoch=1-step=100.ckpt"),
        ("sample", "ckpt", "my runs, v1/last.ckpt"),
        ("sample", "out", "[new] (2), {x}/größe 図"),
        ("sample", "out", "1e3"),
        ("sample", "out", "true"),
        ("sample", "out", "choice(a,b)"),
        ("sample", "out", r"it's\ and \\'\\"),
        ("sample", "tokenizer_ckpt", "a,b"),
        ("train", "data.path", "DATA/{train,val}-*.tar"),
        ("train", "init_from", "a: b, c"),
        ("convert", "in", "007.pt"),
        ("prepare", "source.path", "x,y"),
    ],
)
def test_paths_are_taken_as_they_are(verb, key, path):
    more = ["source=folder"] if key == "source.path" else ["data=images"] if key == "data.path" else []
    others = [each for each in REQUIRED[verb] if not each.startswith(f"{key}=")]
    assert OmegaConf.select(compose(verb, [*more, *others, f"{key}={path}"]), key) == path


def test_what_is_no_path_or_is_swept_stays_as_it_is():
    same = ["seed=1,2", "model=b,l", "out=null", "from_npy={train: a, val: b}", "labels=[a,b]", "--help", "~logger"]
    assert [quoted(each, groups={"model"}) for each in same] == same
    assert fit(["-m", "ckpt=a,b"], groups=()) == ["-m", "ckpt=a,b"]
    assert fit(["-m", "hydra.sweep.dir=a,b"], groups=()) == ["-m", "hydra.sweep.dir='a,b'"]
    assert fit(["model=nan", "+experiment=1"], groups={"model", "experiment"}) == ["model='nan'", "+experiment='1'"]


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SMALTO_OUTPUTS", "~/outputs")
    config = compose("prepare", ["source=folder", "source.path='~/photos'", "out=~/shards"])
    home = str(tmp_path)
    assert (config.out, config.source.path) == (f"{home}/shards", f"{home}/photos")
    assert config.paths.outputs == f"{home}/outputs"
    assert quoted("hydra.run.dir=~/runs/one") == f"hydra.run.dir='{home}/runs/one'"
    assert compose("train", ["run_dir=~/r"]).run_dir == f"{home}/r"
    with pytest.raises(InputError, match="no such user"):
        quoted("out=~nobody-at-all/x")


def test_a_tilde_in_a_file_of_settings_is_one_too(monkeypatch, tmp_path):
    from smalto.runtime import check

    monkeypatch.setenv("HOME", str(tmp_path))
    config = compose("sample", ["ckpt=x"])
    config.ckpt = "~/last.ckpt"
    check(config, "sample")
    assert config.ckpt == f"{tmp_path}/last.ckpt"


def test_null_takes_a_group_away_as_the_configs_show_it():
    config = compose("train", ["run_dir=x", "experiment=null", "ablation=null", "logger=null"])
    assert "logger" not in config
    assert config.trainer.max_steps


def test_what_is_added_for_others_to_refer_to_is_no_mistake():
    assert compose("train", ["run_dir=x", "+my=8", "data.batch_size=${my}"]).data.batch_size == 8
    assert compose("train", ["run_dir=x", "+origin=a-letter"]).origin == "a-letter"
    assert compose("plan", ["run_dir=x", "+devices.mine={a: 1}"]).devices.mine == {"a": 1}
    assert compose("train", ["run_dir=x", "+trainer.fast_dev_run=true"]).trainer.fast_dev_run is True


def test_outputs_need_a_name(monkeypatch):
    monkeypatch.setenv("SMALTO_OUTPUTS", "")
    with pytest.raises(Exception, match="SMALTO_OUTPUTS is empty") as error:
        _ = compose("train", ["run_dir=x"]).paths.outputs
    assert ending(error.value).code == REFUSED
