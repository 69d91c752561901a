"""Processes of one run compute with the same networks, whatever files their machines have."""

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from forked_ranks import run_ranks
from smalto.callbacks.provenance import Provenance, networks
from smalto.errors import UserError


def begun(rank: int, names: list[str]) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=2)

    def broadcast(value):
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    features = SimpleNamespace(features=SimpleNamespace(name=names[rank]))
    trainer = SimpleNamespace(callbacks=[features], strategy=SimpleNamespace(broadcast=broadcast), world_size=2)
    callback = Provenance({}, kind="gpt")
    callback._write = lambda *_: None
    try:
        callback.on_fit_start(trainer, SimpleNamespace(perceptual=SimpleNamespace(name="lpips_vgg")))
    except UserError as error:
        return str(error)
    return "begun"


@pytest.mark.parametrize("names", [["inception", "inception"], ["inception", "lite0_160"]])
def test_all_processes_have_the_same_networks(names):
    told = run_ranks(lambda rank: begun(rank, names), 2)
    if names[0] == names[1]:
        assert told == ["begun", "begun"]
    else:
        assert told[1].startswith("this process would measure and train with lite0_160, lpips_vgg, the first one with ")
        assert told[0].startswith("process 1 stopped: this process would measure")


def test_networks_of_a_run_are_named():
    trainer = SimpleNamespace(callbacks=[SimpleNamespace(features=SimpleNamespace(name="lite0_64")), SimpleNamespace()])
    assert networks(trainer, SimpleNamespace(perceptual=None)) == ["lite0_64"]
