"""Every option of every group composes, names classes that exist, and every experiment builds."""

from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, get_method
from omegaconf import DictConfig, OmegaConf

from smalto.runtime import build, compose, conf_dir
from smalto.train import chosen

CONF = Path(conf_dir())
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}"
    for group in (
        "model",
        "tokenizer",
        "conditioner",
        "discriminator",
        "perceptual",
        "features",
        "trainer",
        "strategy",
        "task",
        "data",
        "callbacks",
        "sampling",
        "logger",
        "ablation",
        "debug",
    )
    for path in (CONF / group).glob("[!_]*.yaml")
)


def targets(node) -> list[str]:
    if isinstance(node, dict):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [target for child in node.values() for target in targets(child)]
    if isinstance(node, list):
        return [target for child in node for target in targets(child)]
    return []


def assert_targets_exist(config: DictConfig) -> None:
    for target in targets(OmegaConf.to_container(config, resolve=False)):
        try:
            get_class(target)
        except (ImportError, ValueError):
            get_method(target)


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_and_its_classes_exist(option):
    needs_tokenizer_task = option.split("=")[0] in ("discriminator", "perceptual") or option in (
        "callbacks=tokenizer",
        "ablation=adaptive_gan",
    )
    task = [] if option.startswith("task=") else [f"task={'tokenizer' if needs_tokenizer_task else 'gpt'}"]
    assert_targets_exist(compose("train", [option, *task, "run_dir=x"]))


@pytest.mark.parametrize("sweep", sorted(path.stem for path in (CONF / "sweep").glob("*.yaml")))
def test_sweep_composes(sweep):
    experiment = "tokenizer_f16" if sweep == "codebook" else "demo_gpt"
    compose("train", [f"experiment={experiment}", f"sweep={sweep}", "run_dir=x"])


@pytest.mark.parametrize("verb", ["sample", "evaluate", "prepare", "extract", "inspect", "plan"])
def test_verb_composes(verb):
    assert_targets_exist(compose(verb))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_resolves_and_its_task_builds(experiment):
    config = compose("train", [f"experiment={experiment}", "run_dir=x", "trainer.max_steps=10"])
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    task = build(config.task)
    assert task.net is None, "constructors must not build networks; configure_model does, on the right device"
    build(config.data)
    one = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true"}
    build(config.trainer, logger=False, enable_checkpointing=False, **one)


def test_vocabulary_and_grid_follow_the_tokenizer():
    config = compose("train", ["tokenizer=vq_f8", "image_size=384", "quantizer=vq", "run_dir=x"])
    assert config.model.code_shape == [[48, 48]]
    changed = compose("train", ["tokenizer.quantizer.codebook_size=4096", "run_dir=x"])
    assert changed.model.vocab_size == 4096


def test_an_explicit_choice_beats_the_experiment():
    config = compose("train", ["experiment=demo_gpt", "model=mini", "run_dir=x"])
    assert config.model.dim == 384


@pytest.mark.parametrize(("model", "scale"), [("b", 2.0), ("l", 2.0), ("xl", 1.75), ("xxl", 1.75), ("3b", 1.65)])
def test_generators_of_the_paper_are_measured_as_the_paper_does(model, scale):
    config = compose("train", ["experiment=c2i_384", f"model={model}", "paths.adm_reference=adm.npz"])
    generation = OmegaConf.to_container(config.callbacks.generation, resolve=True)
    assert generation["sampling"]["cfg_scale"] == scale
    assert generation["eval_size"] == 256
    assert (generation["rounding"], generation["labels"]) == ("truncate", "random")
    assert generation["reference_file"] == "adm.npz"
    assert generation["features"]["_target_"].endswith("InceptionFeatures")
    assert generation["final_num_samples"] == 50_000
    assert config.task.compile


def test_tokenizers_of_the_paper_are_trained_and_measured_as_the_paper_does():
    config = compose("train", ["experiment=tokenizer_f16"])
    assert config.task.perceptual.net == "vgg"
    reconstruction = config.callbacks.reconstruction
    assert reconstruction.features._target_.endswith("InceptionFeatures")
    assert (reconstruction.rounding, reconstruction.ssim_data_range) == ("truncate", 2.0)


def test_what_the_authors_do_otherwise_has_a_name():
    config = compose("train", ["experiment=tokenizer_f16", "ablation=authors_optimizer"])
    optimizer = build(config.task.optimizer)([torch.nn.Parameter(torch.ones(2))])
    assert type(optimizer) is torch.optim.Adam
    assert optimizer.defaults["weight_decay"] == 0
    assert list(optimizer.defaults["betas"]) == [0.9, 0.95]
    config = compose("train", ["experiment=c2i_256", "ablation=authors_ema"])
    assert not any(node["_target_"].endswith(".EMA") for node in chosen(config.callbacks))


def test_run_names_of_a_scaling_sweep_differ():
    names = {compose("train", ["experiment=demo_gpt", f"model={m}", "run_dir=x"]).run_name for m in ("nano", "mini")}
    assert len(names) == 2


def test_nothing_of_omegaconf_reaches_the_objects():
    optimizer = build(compose("train", ["run_dir=x", "trainer.max_steps=5"]).task).optimizer_factory
    assert type(optimizer.keywords["betas"]) is list
