import inspect
from pathlib import Path

import pytest
from hydra.utils import get_class
from omegaconf import OmegaConf

CONF = Path(__file__).parents[2] / "conf" / "data"


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_option_lists_all_arguments_of_its_module(path):
    node = OmegaConf.load(path)
    for base in node.pop("defaults", []):
        if base != "_self_":
            node = OmegaConf.merge(OmegaConf.load(CONF / f"{base}.yaml"), node)
    arguments = set(inspect.signature(get_class(node["_target_"]).__init__).parameters) - {"self"}
    assert set(node) - {"_target_"} == arguments
