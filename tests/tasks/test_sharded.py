"""strategy=fsdp on two processes: the same model as on one, half of it in each, and checkpoints that anyone reads."""

import ctypes
import errno
import os
import pickle
import resource
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from forked_ranks import run_ranks
from smalto.callbacks.checkpoint import LatestCheckpoint, newest_checkpoint, step_checkpoints
from smalto.callbacks.ema import EMA
from smalto.callbacks.step_seed import StepSeed
from smalto.callbacks.validation import Validation
from smalto.errors import StorageError
from smalto.models.conditioner import ClassConditioner, TextConditioner
from smalto.models.gpt import GPT
from smalto.runtime import build, compose
from smalto.tasks.checkpoint import EMA_KEY, read_checkpoint
from smalto.tasks.parallel import ShardingPlan, build_sharded
from smalto.tasks.sharded_folder import damage, read_folder
from smalto.tasks.strategy import AnyCheckpoint, ShardedStrategy
from smalto.types import SamplingConfig
from tiny_tasks import SHAPE, VOCABULARY, make_codes, make_gpt_task, make_tokenizer_task, make_trainer

CLASSES = partial(ClassConditioner, num_classes=3, drop_prob=0.0)
SETTINGS = {"check_val_every_n_epoch": None, "val_check_interval": 6, "gradient_clip_val": 0.5}


def make_task(**overrides):
    """Without dropout, so that ranks, which draw their own, compute what one process computes."""
    sizes = {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_multiple_of": 16}
    no_dropout = {"token_dropout": 0.0, "resid_dropout": 0.0, "ffn_dropout": 0.0}
    net = partial(GPT, **sizes, **no_dropout, vocab_size=VOCABULARY, code_shape=SHAPE, conditioner=CLASSES)
    return make_gpt_task(net=net, **overrides)


class Losses(L.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer, task, *args) -> None:
        self.values.append(float(task.step_log.read()["train/loss"]))


def fit(folder: Path, *, steps: int, start: Path | None = None, sharded: bool = False, task=None, **overrides):
    """Task, losses, average and trainer of a run; on two ranks if ``sharded``."""
    strategy = overrides.pop("strategy", None) or (ShardedStrategy() if sharded else "auto")
    task, losses, ema = task or make_task(), Losses(), EMA(decay=0.9)
    saver = LatestCheckpoint(dirpath=folder, every_n_steps=2, keep=0)
    where = {"strategy": strategy, "devices": 2, "inference_mode": False} if sharded else {"plugins": [AnyCheckpoint()]}
    trainer = make_trainer(folder, losses, ema, saver, max_steps=steps, **SETTINGS | where | overrides)
    trainer.fit(task, make_codes(), ckpt_path=start, weights_only=True)
    return task, losses.values, ema, trainer


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).detach().numpy().copy()
        for name, value in tensors.items()
    }


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], np.asarray(b[name])) for name in a)


def decayed_names(task, trainer) -> list[list[str]]:
    names = {id(p): name for name, p in task.net.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in trainer.optimizers[0].param_groups]


def sharded_run(rank: int, folder: Path) -> dict:
    """Six steps of two batches, with every option that touches sharded weights, and what came of them."""
    task = make_task(loss_rows=16, recompute_every=1)
    found: dict = {}
    task.on_fit_start = lambda: found.update(initial=whole(dict(task.net.named_parameters())))
    exchanges, reduce = [], dist.reduce_scatter_single
    dist.reduce_scatter_single = lambda *args, **kwargs: exchanges.append(1) or reduce(*args, **kwargs)
    task, losses, ema, trainer = fit(folder, steps=6, sharded=True, task=task, accumulate_grad_batches=2)
    parameters = dict(task.net.named_parameters())
    local = sum(p.to_local().numel() for p in parameters.values())
    with ema.applied(task.net):
        labels = torch.tensor([rank, 2])
        codes = task.sample_codes(labels, sampling=SamplingConfig(), seeds=torch.tensor([rank, 5]))
    return found | {
        "losses": losses,
        "validated": float(trainer.callback_metrics["val/loss"]),
        "share": local / sum(p.numel() for p in parameters.values()),
        "exchanges": len(exchanges),
        "groups": decayed_names(task, trainer),
        "final": whole(parameters),
        "average": whole(ema.shadow),
        "codes": codes.numpy(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both ranks, and of one process that did the same without sharding."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sharded")
    results = run_ranks(lambda rank: sharded_run(rank, folder / "two"), 2)
    assert isinstance(results[0], dict), results[0]
    assert isinstance(results[1], dict), results[1]
    torch.manual_seed(0)
    return folder, results, fit(folder / "one", steps=6, accumulate_grad_batches=2)


pytestmark = pytest.mark.chain


def test_initial_weights_are_those_of_one_process_bit_for_bit(ranks):
    torch.manual_seed(0)
    task = make_task()
    torch.rand(100)  # what a run draws before does not matter
    task.configure_model()
    assert same(ranks[1][0]["initial"], whole(dict(task.net.named_parameters())))


def test_losses_weights_and_groups_are_those_of_one_process(ranks):
    _, (first, second), (task, losses, ema, trainer) = ranks
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(losses, abs=1e-5)
    assert first["validated"] == pytest.approx(float(trainer.callback_metrics["val/loss"]), abs=1e-5)
    assert first["groups"] == decayed_names(task, trainer)
    for name, value in ema.shadow.items():
        np.testing.assert_allclose(first["average"][name], value.numpy(), atol=1e-4, err_msg=name)


def test_each_process_holds_half_and_exchanges_once_per_step(ranks):
    for result in ranks[1]:
        assert result["share"] <= 0.51
        # two blocks and the root, six steps; twelve batches would make 36
        assert result["exchanges"] == 18


def test_each_process_samples_by_itself_from_gathered_weights(ranks):
    results = ranks[1]
    task = make_task()
    task.configure_model()
    task.net.load_state_dict({name: torch.from_numpy(value) for name, value in results[0]["average"].items()})
    for rank, result in enumerate(results):
        labels, seeds = torch.tensor([rank, 2]), torch.tensor([rank, 5])
        codes = task.sample_codes(labels, sampling=SamplingConfig(), seeds=seeds)
        assert np.array_equal(result["codes"], codes.numpy())


def test_a_folder_reads_as_the_file_would_bit_for_bit(ranks):
    folder, results, _ = ranks
    two, one = newest_checkpoint(folder / "two"), newest_checkpoint(folder / "one")
    assert two.is_dir()
    tree, file = read_folder(two), torch.load(one, weights_only=True)
    assert same(results[0]["final"], {k.removeprefix("net."): v for k, v in tree["state_dict"].items()})
    assert same(results[0]["average"], tree["callbacks"][EMA_KEY]["shadow"])
    assert tree.keys() == file.keys()
    assert tree["optimizer_states"][0]["param_groups"] == file["optimizer_states"][0]["param_groups"]
    moments, expected = tree["optimizer_states"][0]["state"], file["optimizer_states"][0]["state"]
    assert moments.keys() == expected.keys()
    for i, state in moments.items():
        for key, value in state.items():
            torch.testing.assert_close(value, expected[i][key], atol=1e-4, rtol=0)


def test_only_what_is_wanted_is_read(ranks):
    folder, results, _ = ranks
    checkpoint = {"config": {}, "kind": "gpt", "version": "0"}
    path = newest_checkpoint(folder / "two")
    tree = torch.load(path / "meta.pt", weights_only=True)
    torch.save(tree | {"smalto": checkpoint}, path / "meta.pt")
    found = read_checkpoint(path, ema=True)
    assert all(value.is_meta for value in found["state_dict"].values())
    assert same(results[0]["average"], found["callbacks"][EMA_KEY]["shadow"])
    found = read_checkpoint(path, ema=False)
    assert same(results[0]["final"], {k.removeprefix("net."): v for k, v in found["state_dict"].items()})
    assert found["callbacks"][EMA_KEY]["shadow"]["norm.weight"].is_meta


def test_a_run_goes_on_under_another_strategy(ranks):
    folder, results, (_, whole_run, _, _) = ranks
    middle = step_checkpoints(folder / "two")[1]
    assert middle.name == "step_00000004.ckpt"
    twice = {"accumulate_grad_batches": 2}
    _, losses, ema, _ = fit(folder / "back", steps=6, start=middle, **twice)
    assert losses == pytest.approx(results[0]["losses"][8:], abs=1e-6)
    for name, value in ema.shadow.items():
        np.testing.assert_allclose(results[0]["average"][name], value.numpy(), atol=1e-5, err_msg=name)

    for start, expected in ((folder / "one/step_00000004.ckpt", whole_run), (middle, results[0]["losses"])):
        again = partial(fit, folder / start.parent.name / "again", steps=6, start=start, sharded=True, **twice)
        for rank_losses in run_ranks(lambda rank, again=again: again()[1], 2):
            assert rank_losses == pytest.approx(expected[8:], abs=1e-6)


def test_saving_beside_training_writes_the_same(ranks):
    folder, _, _ = ranks

    class NotByTheDevice(ShardedStrategy):
        asked = 0

        def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
            raise AssertionError("processes ask each other on the device, in every step while one writes")

        def still_saving(self) -> bool:
            self.asked += 1
            return super().still_saving()

    def run(rank: int) -> list[float]:
        options = {"task": make_task(loss_rows=16, recompute_every=1), "accumulate_grad_batches": 2}
        strategy = NotByTheDevice(async_save=True)
        losses = fit(folder / "beside", steps=6, sharded=True, strategy=strategy, **options)[1]
        assert strategy.asked
        return losses

    losses = run_ranks(run, 2)
    assert losses[0] == ranks[1][0]["losses"]
    for here, there in zip(step_checkpoints(folder / "beside"), step_checkpoints(folder / "two"), strict=True):
        a, b = read_folder(here), read_folder(there)
        assert same(whole(a["state_dict"]), b["state_dict"])
        assert same(whole(a["callbacks"][EMA_KEY]["shadow"]), b["callbacks"][EMA_KEY]["shadow"])
    assert not list((folder / "beside").glob("*.unfinished"))


@pytest.mark.parametrize("beside", [False, True])
def test_a_failed_save_is_told_everywhere_and_leaves_the_one_before(tmp_path, beside):
    write = FileSystemWriter.write_data

    def full(self, plan, planner):
        if "00000004" in str(self.path) and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, plan, planner)

    def run(rank: int) -> str:
        FileSystemWriter.write_data = full
        with pytest.raises(OSError, match="step_00000004") as caught:
            fit(tmp_path, steps=8, sharded=True, strategy=ShardedStrategy(async_save=beside))
        return str(caught.value)

    for message in run_ranks(run, 2):
        assert "process 1: No space left on device" in message
        assert "step_00000002.ckpt stays good" in message
    assert [path.name for path in step_checkpoints(tmp_path)] == ["step_00000002.ckpt"]
    assert newest_checkpoint(tmp_path).name == "step_00000002.ckpt"


class Validated(Validation):
    """Notes what was found, and fails at a step as a killed process would."""

    def __init__(self, folder: Path, fails_at: int = -1) -> None:
        super().__init__(folder)
        self.fails_at, self.found = fails_at, []

    def on_validation_batch_start(self, trainer, *args) -> None:
        if trainer.global_step == self.fails_at:
            raise RuntimeError("killed")

    def on_validation_end(self, trainer, pl_module) -> None:
        super().on_validation_end(trainer, pl_module)
        self.found.append((self.step, float(trainer.callback_metrics["val/loss"])))


def validated_run(folder: Path, start: Path | None = None, *callbacks: L.Callback, fails_at: int = -1):
    torch.manual_seed(0)
    watch, where = Validated(folder, fails_at), {"strategy": ShardedStrategy(), "devices": 2, "inference_mode": False}
    saver = LatestCheckpoint(dirpath=folder / "checkpoints", every_n_steps=2)
    callbacks = (*callbacks, StepSeed(seed=0), EMA(decay=0.9), watch, saver)
    trainer = make_trainer(folder, *callbacks, max_steps=5, val_check_interval=4, check_val_every_n_epoch=None, **where)
    trainer.fit(make_task(), make_codes(), ckpt_path=start, weights_only=True)
    return watch.found


def test_a_validation_that_was_interrupted_is_made_up_for_by_all_processes(tmp_path):
    def run(rank: int) -> tuple:
        whole_run = validated_run(tmp_path / "whole")
        with pytest.raises(RuntimeError, match="killed"):
            validated_run(tmp_path / "cut", fails_at=4)
        return whole_run, validated_run(tmp_path / "cut", tmp_path / "cut/checkpoints/step_00000004.ckpt")

    for whole_run, again in run_ranks(run, 2):
        assert [step for step, _ in whole_run] == [4, 5]
        assert again == whole_run


def test_a_folder_that_is_gone_is_told_by_all_processes(tmp_path):
    class Remove(L.Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_step == 3 and trainer.is_global_zero:
                shutil.rmtree(tmp_path / "checkpoints")

    def run(rank: int) -> str:
        with pytest.raises(StorageError) as caught:
            validated_run(tmp_path, None, Remove())
        return str(caught.value)

    for message in run_ranks(run, 2):
        assert message.startswith(f"{tmp_path}/checkpoints is gone: it was removed or moved away")
    assert not (tmp_path / "checkpoints").exists()


def test_dropout_is_the_same_in_every_run_on_as_many_processes(tmp_path):
    def run(rank: int, name: str) -> list[float]:
        losses = Losses()
        where = {"strategy": ShardedStrategy(), "devices": 2, "inference_mode": False}
        make_trainer(tmp_path / name, losses, StepSeed(seed=3), max_steps=4, **where).fit(make_gpt_task(), make_codes())
        return losses.values

    first, again = (run_ranks(lambda rank, name=name: run(rank, name), 2) for name in "ab")
    assert first == again
    assert first[0] == first[1]
    without = fit(tmp_path / "c", steps=4)[1]
    assert first[0][1:] != pytest.approx(without[1:], abs=1e-4)


class Gathers(L.Callback):
    """Notes how often shards are gathered in each step, and whether anything stays whole where weights may change."""

    def __init__(self) -> None:
        self.per_step: list[int] = []
        self.whole: set[str] = set()
        self.count = 0
        for name in ("all_gather_into_tensor", "all_gather_single"):  # torch renamed it
            if hasattr(dist, name):
                setattr(dist, name, self._counted(getattr(dist, name)))

    def _counted(self, gather):
        def counted(*args, **kwargs):
            self.count += 1
            return gather(*args, **kwargs)

        return counted

    def look(self, net) -> None:
        self.whole |= {name for name, parameter in net.named_parameters() if not isinstance(parameter, DTensor)}

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        self.look(pl_module.net)
        self.count = 0

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.look(pl_module.net)
        self.per_step.append(self.count)

    def on_validation_batch_end(self, trainer, pl_module, *args) -> None:
        self.look(pl_module.net)


@pytest.mark.parametrize("loss_rows", [0, 16])
def test_the_root_is_gathered_once_a_step_and_an_average_does_not_stay(tmp_path, loss_rows):
    def run(rank: int) -> tuple:
        torch.manual_seed(0)
        task, gathers, losses = make_task(loss_rows=loss_rows), Gathers(), Losses()
        where = {"strategy": ShardedStrategy(), "devices": 2, "inference_mode": False, "val_check_interval": 2}
        callbacks = (EMA(decay=0.9), losses, gathers)
        make_trainer(tmp_path, *callbacks, max_steps=6, check_val_every_n_epoch=None, **where).fit(task, make_codes())
        with torch.no_grad():  # a loss that nobody learns from
            batch = {"codes": torch.zeros(2, task.net.num_codes, dtype=torch.int64), "label": torch.tensor([0, 1])}
            task.train().training_loss(batch)
            gathers.look(task.net)
        return losses.values, gathers.per_step, gathers.whole

    torch.manual_seed(0)
    losses = Losses()
    settings = {"max_steps": 6, "limit_val_batches": 0}
    make_trainer(tmp_path, losses, **settings).fit(make_task(loss_rows=loss_rows), make_codes())
    for sharded, per_step, left in run_ranks(run, 2):
        assert per_step == [5] * 6  # two blocks in both directions, the root for both
        assert left == set()
        assert sharded == pytest.approx(losses.values, abs=1e-5)


def test_validation_of_weights_gathered_in_half_precision_says_so(tmp_path):
    def run(rank: int) -> set[str]:
        where = {"strategy": ShardedStrategy(), "devices": 2, "precision": "bf16-mixed"}
        (metrics,) = make_trainer(tmp_path, inference_mode=False, **where).validate(make_task(), make_codes())
        return set(metrics)

    assert run_ranks(run, 2) == [{"val/loss_bf16", "val/accuracy_bf16"}] * 2


def test_damaged_folders_are_named_and_run_no_code(ranks, tmp_path):
    folder = step_checkpoints(ranks[0] / "two")[0]
    for name, spoil, message in (
        ("a", lambda f: (f / ".metadata").unlink(), ".metadata missing"),
        ("b", lambda f: os.truncate(f / "__1_0.distcp", 1000), "__1_0.distcp missing or cut short"),
        ("c", lambda f: (f / "__0_0.distcp").unlink(), "__0_0.distcp missing or cut short"),
        ("d", lambda f: (f / ".metadata").write_bytes(pickle.dumps(os.getpid)), "posix.getpid"),
    ):
        copy = tmp_path / name / folder.name
        copy.mkdir(parents=True)
        for file in folder.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        assert damage(copy) is None
        spoil(copy)
        with pytest.raises(ValueError, match=message):
            read_folder(copy)
        assert newest_checkpoint(copy.parent) is None


def test_a_text_model_starts_alike_and_in_half_precision_keeps_float32_weights():
    text = partial(TextConditioner, text_dim=6, num_tokens=5, drop_prob=0.1)
    factory = partial(GPT, dim=32, num_layers=1, num_heads=2, vocab_size=24, code_shape=((3, 4),), conditioner=text)

    def shards(rank: int) -> tuple[dict, set[torch.dtype]]:
        dist.init_process_group("gloo")
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        net = build_sharded(factory, mesh, device=torch.device("cpu"), half=True)
        initial = whole(dict(net.named_parameters()))
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(torch.zeros(2, 12, dtype=torch.int64), torch.ones(2, 5, 6))
        assert logits.dtype == torch.bfloat16
        logits.sum().backward()
        return initial, {p.grad.dtype for p in net.parameters() if p.grad is not None}

    one = whole(dict(build_sharded(factory, None, device=torch.device("cpu"), half=False).named_parameters()))
    for two, gradients in run_ranks(shards, 2):
        assert same(one, two)
        assert gradients == {torch.float32}
    assert one["conditioner.null_features"].std() == pytest.approx(6**-0.5, rel=0.3)


LARGE = partial(GPT, dim=512, num_layers=14, num_heads=8, vocab_size=VOCABULARY, code_shape=SHAPE, conditioner=CLASSES)
"""48 million parameters; weights, gradients and two moments of all of them are 764 MB, of half of them 382."""
ROOM = 660 * 2**20
"""Beside the state: gathered blocks, stacks of threads, buffers."""


def limited_run(folder: Path, *, sharded: bool, room: int = ROOM) -> str:
    """Train the large model in so many bytes more than there are before; what came of it."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 2**16)  # M_MMAP_MAX, which a command that ran in this process may have set to 0
    libc.mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back to the system at once
    libc.malloc_trim(0)  # and what tests before have freed, or it would be room that nobody counts
    used = next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmData" in line)
    limit = int(used) * 1024 + room
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        where = {"strategy": ShardedStrategy(), "devices": 2, "inference_mode": False} if sharded else {}
        trainer = make_trainer(folder, max_steps=2, limit_val_batches=0, **where)
        optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
        trainer.fit(make_gpt_task(net=LARGE, optimizer=optimizer), make_codes())
    except (MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    return "trained"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_what_one_process_cannot_hold_two_can(tmp_path):
    def alone(rank: int) -> str:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            del os.environ[name]
        return limited_run(tmp_path, sharded=False)

    assert "memory" in run_ranks(alone, 1)[0]
    assert run_ranks(lambda rank: limited_run(tmp_path, sharded=True), 2) == ["trained", "trained"]


def test_a_tokenizer_is_refused(tmp_path):
    def run(rank: int) -> None:
        trainer = make_trainer(tmp_path, strategy=ShardedStrategy(), devices=1)
        with pytest.raises(ValueError, match="strategy=ddp"):
            trainer.fit(make_tokenizer_task())

    assert run_ranks(run, 1) == [None]


def test_plan_of_the_largest_model_from_shapes_alone():
    with torch.device("meta"):
        net = build(compose("train", ["model=3b", "run_dir=x"]).model)()
    plan = ShardingPlan.of(net, 8)
    assert plan.parameters == 3_096_659_200
    assert plan.held == pytest.approx(plan.parameters / 8, rel=1e-4)
    assert "24 blocks of 124,524,800" in str(plan)
