"""What two processes say to each other in training: the same in both, and in a plain step nothing but gradients."""

from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
import yaml
from hydra.utils import instantiate
from lightning.pytorch.strategies import DDPStrategy
from tiny_features import TinyFeatures

from collectives import Call, Recorder, recorded
from forked_ranks import run_ranks
from smalto.callbacks.checkpoint import LatestCheckpoint
from smalto.callbacks.csv_log import CSVLog
from smalto.callbacks.ema import EMA
from smalto.callbacks.generation import Generation
from smalto.callbacks.gradient_guard import GradientGuard
from smalto.callbacks.progress import StepProgress
from smalto.callbacks.provenance import Provenance
from smalto.callbacks.reconstruction import Reconstruction
from smalto.callbacks.step_seed import StepSeed
from smalto.callbacks.throughput import Throughput
from smalto.callbacks.validation import Validation
from smalto.data.synthetic import SyntheticImages
from smalto.tasks.strategy import ShardedStrategy
from smalto.tokenizers.quantize import VectorQuantizer
from smalto.tokenizers.vqgan import VQModel
from smalto.types import SamplingConfig
from tiny_tasks import VOCABULARY, make_codes, make_gpt_task, make_images, make_tokenizer_task, make_trainer

pytestmark = pytest.mark.chain

CONF = Path(__file__).parents[1] / "conf"

STEPS, LOG_EVERY, CHECK_EVERY, SAVE_EVERY, DISC_START = 12, 5, 6, 4, 7

ALLOWED = {
    # Whether some process got a signal: a number between main memories, over gloo, while the next step is computed.
    ("callbacks/agreement.py", "any"),
    # Statistics of a discriminator's normalization are those of the global batch, as on one process.
    ("nn/global_batch.py", "forward"),
}
"""What may happen in every step beside gradients: file and function, with the reason."""

SHARDED_NORMS = 1
"""Reductions of the norms of sharded gradients in a step: the guard's, which the clipping takes over."""


class Phases(L.Callback):
    """Tells the recorder what the run is doing: a step by its number, or what is outside of steps."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_start(self, trainer, *args) -> None:
        self.recorder.phase = "step", trainer.global_step + 1

    def on_train_batch_start(self, trainer, *args) -> None:
        self.recorder.phase = "step", trainer.global_step + 1

    def on_validation_start(self, trainer, *args) -> None:
        self.recorder.phase = "validation", trainer.global_step

    def on_train_end(self, *args) -> None:
        self.recorder.phase = "end"


def train(folder: Path, task: Any, data: Any, strategy: Any, *callbacks: L.Callback, **overrides) -> list[Call]:
    """All collectives of a run with the callbacks that every run has, and ``callbacks``."""
    with recorded() as recorder:
        common = [
            Phases(recorder),
            StepSeed(seed=0),
            EMA(decay=0.9),
            GradientGuard(patience=4),
            Throughput(window=5, peak_tflops=1.0),
            StepProgress(line_every=0.0),
            *callbacks,
            Provenance({"seed": 0, "data": {"batch_size": 8}, "run_dir": str(folder)}, kind="gpt"),
            Validation(folder),
            LatestCheckpoint(dirpath=folder / "checkpoints", every_n_steps=SAVE_EVERY),
        ]
        settings = {"max_steps": STEPS, "log_every_n_steps": LOG_EVERY, "val_check_interval": CHECK_EVERY}
        settings |= {"check_val_every_n_epoch": None, "strategy": strategy, "devices": 2, "enable_progress_bar": True}
        make_trainer(folder, *common, logger=CSVLog(folder=folder), **settings | overrides).fit(task, data)
    return recorder.calls


def ddp() -> DDPStrategy:
    """As ``strategy=ddp`` makes it."""
    options = yaml.safe_load((CONF / "strategy/ddp.yaml").read_text())["strategy"]
    return instantiate(options, process_group_backend="gloo")


def tokenizer(folder: Path, rank: int) -> list[Call]:
    callback = Reconstruction(features=TinyFeatures(), sheet_pairs=2)
    return train(folder, make_tokenizer_task(disc_start=DISC_START), make_images(), ddp(), callback)


def generator(folder: Path, rank: int) -> list[Call]:
    task = make_gpt_task(tokenizer_ckpt="attached by hand")
    task.net = task.net_factory()
    task.attach_tokenizer(make_tokenizer_net(), {})
    callback = Generation(
        features=TinyFeatures(),
        reference=SyntheticImages(image_size=16, num_classes=3, num_train=4, num_val=16, batch_size=8, seed=0),
        sampling=SamplingConfig(cfg_scale=2.0),
        every_n_steps=CHECK_EVERY,
        num_samples=8,
        final_num_samples=12,
        batch_size=4,
        sheet_columns=2,
    )
    return train(folder, task, make_codes(), ddp(), callback, gradient_clip_val=1.0)


def make_tokenizer_net() -> VQModel:
    quantizer = partial(VectorQuantizer, codebook_size=VOCABULARY, codebook_dim=4)
    sizes = {"image_size": 16, "base_channels": 8, "channel_multipliers": (1, 1, 2), "z_channels": 8}
    return VQModel(**sizes, num_res_blocks=1, norm_groups=4, quantizer=quantizer)


def sharded(folder: Path, rank: int) -> list[Call]:
    sharding = {"gradient_clip_val": 1.0, "inference_mode": False}
    return train(folder, make_gpt_task(), make_codes(), ShardedStrategy(), **sharding)


RUNS = {"tokenizer": tokenizer, "generator": generator, "sharded": sharded}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory) -> tuple[str, list[list[Call]]]:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    results = run_ranks(partial(RUNS[request.param], folder), 2)
    for result in results:
        assert isinstance(result, list), result
    return request.param, results


def test_all_processes_enter_the_same_in_the_same_order(run):
    first, second = ([call.essence for call in calls] for calls in run[1])
    different = next((pair for pair in zip(first, second, strict=False) if pair[0] != pair[1]), None)
    assert different is None
    assert len(first) == len(second), "only one process entered the last ones"


def is_plain(step: int) -> bool:
    """Not logged, validated or saved, nor after a step that was saved, when that is settled, nor one of DDP's first."""
    return step > 2 and all(
        (step - late) % n for late, n in ((0, LOG_EVERY), (0, CHECK_EVERY), (0, SAVE_EVERY), (1, 4))
    )


def plain_steps(calls: list[Call]) -> dict[int, list[Call]]:
    steps: dict[int, list[Call]] = {n: [] for n in range(1, STEPS) if is_plain(n)}
    for call in calls:
        if isinstance(call.phase, tuple) and call.phase[0] == "step" and call.phase[1] in steps:
            steps[call.phase[1]].append(call)
    return steps


def test_a_plain_step_exchanges_gradients_and_nothing_else(run):
    name, (calls, _) = run
    steps = plain_steps(calls)
    assert len(steps) >= 3
    for step, found in steps.items():
        assert any(call.backward for call in found), f"no gradients in step {step}: nothing is recorded"
        others = [call for call in found if not call.backward]
        needless = [call for call in others if (call.place.rpartition(":")[0], call.function) not in ALLOWED]
        if name == "sharded":
            norms = [call for call in needless if call.place.startswith(("callbacks/gradient_guard", "tasks/optim"))]
            assert len(norms) <= SHARDED_NORMS
            needless = [call for call in needless if call not in norms and not call.kind.startswith("allgather")]
        assert not needless, f"step {step}: {needless}"


@pytest.mark.parametrize("run", ["tokenizer"], indirect=True)
def test_gradients_of_each_network_are_reduced_once_in_its_own_backward_pass(run):
    task = make_tokenizer_task()
    task.configure_model()
    net, disc = (sum(p.numel() for p in module.parameters()) for module in (task.net, task.discriminator))
    for step, found in plain_steps(run[1][0]).items():
        reduced = sum(call.numel for call in found if call.backward and call.place.startswith("tasks/tokenizer"))
        assert reduced == net + (disc if step > DISC_START else 0), f"step {step}"


def test_a_logged_step_is_reduced_in_one_piece(run):
    _, (calls, _) = run
    logged = [call for call in calls if call.place.startswith("tasks/step_log.py")]
    assert [call.phase for call in logged] == [("step", step) for step in (5, 10, STEPS)]


def test_the_recorder_sees_python_and_cpp_and_objects():
    def enter(rank: int) -> list[str]:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        with recorded() as recorder:
            net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
            recorder.calls.clear()
            net(torch.ones(1, 3)).sum().backward()
            dist.barrier()
            dist.all_gather_object([None, None], rank)
            dist.broadcast_object_list([rank])
            torch.distributed._functional_collectives.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
        assert recorder.calls[0].backward
        assert recorder.calls[0].bytes == 8 * 4
        return [call.kind for call in recorder.calls]

    kinds, others = run_ranks(enter, 2)
    assert kinds == others
    counts = Counter(kinds)
    assert counts["allreduce"] >= 1
    assert counts["all_reduce"] == 1
    assert counts["barrier"] == 1
    assert counts["allgather"] >= 2
    assert counts["broadcast"] >= 2
