"""Two processes with gloo: gradients of a network are averaged in its own backward pass, once, and no others are."""

import os
from functools import partial

import pytest
import torch
from hydra.utils import get_class
from lightning.pytorch.strategies import DDPStrategy
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from forked_ranks import run_ranks
from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.ema import EMA
from smalto.callbacks.gradient_guard import GradientGuard
from smalto.callbacks.step_seed import StepSeed
from smalto.losses.patchgan import PatchDiscriminator
from smalto.runtime import compose
from smalto.tasks.ddp import NetworkDDPStrategy
from tiny_tasks import TOKENIZER, make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer

START = 2
"""Step at which the discriminator comes into being."""


def make_task(**overrides):
    """Without dropout, which every process draws for itself."""
    optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    return make_tokenizer_task(**{"net": TOKENIZER, "optimizer": optimizer, "disc_start": START} | overrides)


def fit(folder, task, *, world_size=1, strategy=None, max_steps=4, start=None):
    """Losses and norms of every step; gradients reduced, as numbers of elements per backward pass; the final state."""
    reduced: list[int] = []
    losses: list[dict[str, float]] = []

    def counted(state, bucket):
        reduced[-1] += bucket.buffer().numel()
        return allreduce_hook(state, bucket)

    class Notes(LatestCheckpoint):
        def on_before_backward(self, *_):
            reduced.append(0)

        def on_train_batch_end(self, trainer, task, *rest):
            super().on_train_batch_end(trainer, task, *rest)
            losses.append({key: float(value) for key, value in trainer.callback_metrics.items()})

    plain = DistributedDataParallel.__init__

    def hooked(self, *args, **settings):
        plain(self, *args, **settings)
        self.register_comm_hook(None, counted)

    average = EMA(decay=0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistributedDataParallel, "__init__", hooked)
        patch.setenv("TORCHELASTIC_RUN_ID", "test")  # the processes are there already; Lightning starts none
        trainer = make_trainer(
            folder,
            StepSeed(seed=0),
            average,
            GradientGuard(),
            Notes(dirpath=folder, every_n_steps=2),
            devices=world_size,
            strategy="auto" if world_size == 1 else strategy,
            max_steps=max_steps,
            log_every_n_steps=1,
        )
        torch.manual_seed(0)
        trainer.fit(task, make_images(), ckpt_path=start, weights_only=True)
    state = {**task.state_dict(), **{f"ema.{name}": value for name, value in average.shadow.items()}}
    return losses, reduced, {name: value.clone().numpy() for name, value in state.items()}


def parameters(net) -> int:
    return sum(p.numel() for p in net.parameters())


def ddp(**settings):
    return NetworkDDPStrategy(
        process_group_backend="gloo", gradient_as_bucket_view=True, broadcast_buffers=False, **settings
    )


def on_two(folder, make=make_task, strategy=ddp, **settings):
    def rank(number):
        torch.manual_seed(number)  # initial weights are those of the seed all the same
        return fit(folder, make(), world_size=2, strategy=strategy(), **settings)

    results = run_ranks(rank, 2)
    assert not isinstance(results[0], str), results[0]
    assert not isinstance(results[1], str), results[1]
    return results


def assert_same_losses(found, wanted, *, tolerance=2e-5):
    assert len(found) == len(wanted)
    for two, one in zip(found, wanted, strict=True):
        steps = {key: value for key, value in one.items() if key.startswith("train/")}
        assert steps.keys() <= two.keys()
        for key, value in steps.items():
            assert two[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


@pytest.mark.parametrize("options", [{}, {"adaptive_disc_weight": True}, {"discriminator": None}])
def test_each_network_is_reduced_in_its_own_backward_pass_only(tmp_path, options):
    task = make_task(**options)
    one, _, alone = fit(tmp_path / "one", task)
    (losses, reduced, state), (_, same, other) = on_two(tmp_path / "two", partial(make_task, **options))
    generator = parameters(task.net)
    judge = [parameters(task.discriminator)] if task.discriminator is not None else []
    assert reduced == same == [generator] * START + [generator, *judge] * 2
    assert_same_losses(losses, one)
    assert state.keys() == alone.keys()
    assert not any("module." in name for name in state)
    for name, value in alone.items():
        assert (state[name] == other[name]).all(), f"{name} differs between the processes"
        assert state[name] == pytest.approx(value, abs=1e-4), name


def test_statistics_of_each_process_are_its_own(tmp_path):
    judge = partial(PatchDiscriminator, base_channels=8, num_layers=1, global_statistics=False)
    results = on_two(tmp_path, partial(make_task, discriminator=judge))
    first, second = (state for _, _, state in results)
    assert all((first[name] == second[name]).all() for name in first if "running" not in name)
    assert any((first[name] != second[name]).any() for name in first if "running" in name)


def test_older_configs_name_lightnings_strategy_and_give_the_same(tmp_path):
    one, _, _ = fit(tmp_path / "one", make_task())
    plain = partial(DDPStrategy, process_group_backend="gloo", gradient_as_bucket_view=True)
    (losses, _, _), _ = on_two(tmp_path / "two", strategy=plain)
    assert_same_losses(losses, one)


def test_a_run_goes_on_from_one_process_to_two_and_back(tmp_path):
    whole, _, _ = fit(tmp_path / "whole", make_task(), max_steps=6)
    fit(tmp_path / "begun", make_task(), max_steps=2)
    (losses, _, _), _ = on_two(tmp_path / "two", max_steps=4, start=tmp_path / "begun/last.ckpt")
    assert_same_losses(losses, whole[2:4])
    losses, _, _ = fit(tmp_path / "again", make_task(), max_steps=6, start=tmp_path / "two/last.ckpt")
    assert_same_losses(losses, whole[4:])


@pytest.mark.slow
def test_compiled_networks_are_divided_where_gradients_are_due(tmp_path):
    one, _, _ = fit(tmp_path / "one", make_task())
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def rank(number):
        torch.compile = partial(torch.compile, backend=backend)  # this process ends with the test
        torch.distributed._DEFAULT_FIRST_BUCKET_BYTES = 1000
        strategy = ddp(bucket_cap_mb=0.05)
        losses, reduced, _ = fit(tmp_path / "two", make_task(compile=True), world_size=2, strategy=strategy)
        return losses, reduced, len(graphs)

    results = run_ranks(rank, 2)
    assert not isinstance(results[0], str), results[0]
    (losses, reduced, parts), _ = results
    assert parts > 2, "one graph each: no gradient would be there before the last"
    assert_same_losses(losses, one, tolerance=1e-4)
    task = make_task()
    task.configure_model()
    generator, judge = parameters(task.net), parameters(task.discriminator)
    assert reduced == [generator] * START + [generator, judge] * 2


def test_a_generator_has_one_wrap(tmp_path):
    found = run_ranks(lambda rank: _wraps(tmp_path), 2)
    assert found == [["GPTTask"]] * 2


def _wraps(folder) -> list[str]:
    wrapped = []
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    plain = DistributedDataParallel.__init__

    def noted(self, module, **settings):
        wrapped.append(type(module).__name__)
        plain(self, module, **settings)

    DistributedDataParallel.__init__ = noted  # this process ends with the test
    make_trainer(folder, devices=2, strategy=ddp(), max_steps=1).fit(make_gpt_task(), make_codes())
    return wrapped


def test_the_option_names_it():
    node = compose("train", ["strategy=ddp"]).trainer.strategy
    assert get_class(node["_target_"]) is NetworkDDPStrategy
    assert node.broadcast_buffers is False
