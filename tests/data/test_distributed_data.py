"""Lightning on two processes with gloo: no image lost, none twice, the same global batches as on one."""

import os
from itertools import chain

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from test_images import picture
from test_streaming import module as stream
from test_streaming import shards as stream_shards

from forked_ranks import run_ranks
from smalto.callbacks.checkpoint import LatestCheckpoint, newest_checkpoint
from smalto.data.encode import Item, Recipe, encode
from smalto.data.images import ImageShards
from smalto.data.sources import Record
from smalto.data.write import TarShard
from smalto.files import write_json

TRAIN, VAL, BATCH = 22, 7, 4


def numbered_images(folder):
    """Each image has its number as label, in shards of 9, 9 and 4: more than two and uneven."""
    splits = {}
    for split, count in (("train", TRAIN), ("val", VAL)):
        shards = []
        for number, start in enumerate(range(0, count, 9)):
            with TarShard(folder / f"{split}-{number:05d}.tar") as shard:
                for n in range(start, min(start + 9, count)):
                    record = Record(image=picture(n, (12, 20)), name="")
                    shard.add(f"{n:08d}.png", encode(Item("", "", record), Recipe("keep", None, "png", 0)).data)
                    shard.add(f"{n:08d}.cls", str(n).encode())
                shards.append(shard.close() | {"num_images": min(9, count - start)})
        splits[split] = {"num_images": count, "shards": shards}
    meta = {"splits": splits, "num_classes": TRAIN, "classes": [], "image_size": None, "encoding": "png"}
    write_json(folder / "meta.json", {"format": "smalto-images", "version": 1, **meta})
    return folder


def images(folder, workers=0):
    return ImageShards(
        path=folder,
        image_size=8,
        batch_size=BATCH,
        augment="random_crop",
        flip_prob=0.5,
        num_workers=workers,
        seed=3,
        val_batch_size=6,
    )


class Notes(L.LightningModule):
    """Writes down what it is fed: label and a sum over the augmented pixels."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.train_fed, self.val_fed = [], []

    @staticmethod
    def note(batch):
        return [(int(n), int(i.long().sum())) for n, i in zip(batch["label"], batch["image"], strict=True)]

    def training_step(self, batch, index):
        self.train_fed.append(self.note(batch))
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.val_fed.append(self.note(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, folder, *, world_size=1, max_steps=12, start=None):
    if world_size > 1:
        os.environ["TORCHELASTIC_RUN_ID"] = "test"  # the processes are there already; Lightning starts none
    model = Notes()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=DDPStrategy(process_group_backend="gloo") if world_size > 1 else "auto",
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_steps=max_steps,
        default_root_dir=folder,
        callbacks=[LatestCheckpoint(dirpath=folder, every_n_steps=1)],
    )
    trainer.fit(model, data, ckpt_path=start, weights_only=True)
    return model.train_fed, model.val_fed


def merged(ranks):
    return [list(chain.from_iterable(parts)) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("workers", [0, 1])
def test_two_ranks_see_what_one_sees(tmp_path, workers):
    numbered_images(tmp_path)
    train, val = fit(images(tmp_path), tmp_path / "one")
    assert [len(batch) for batch in train] == [BATCH] * 12
    epoch = [n for batch in train[:5] for n, _ in batch]
    assert len(set(epoch)) == 20  # five whole batches of an epoch of 22
    ranks = run_ranks(lambda rank: fit(images(tmp_path, workers), tmp_path / "two", world_size=2), 2)
    assert merged([fed for fed, _ in ranks]) == train
    # validated after each of two epochs; both times every image once
    seen = sorted(n for _, fed in ranks for batch in fed for n, _ in batch)
    assert seen == sorted(list(range(VAL)) * 2) == sorted(n for batch in val for n, _ in batch)
    assert len({len(fed) for _, fed in ranks}) == 1


def test_a_run_goes_on_with_another_number_of_ranks(tmp_path):
    numbered_images(tmp_path)
    whole, _ = fit(images(tmp_path), tmp_path / "one")
    first, _ = fit(images(tmp_path), tmp_path / "cut", max_steps=7)
    start = newest_checkpoint(tmp_path / "cut")
    ranks = run_ranks(lambda rank: fit(images(tmp_path), tmp_path / "two", world_size=2, start=start), 2)
    assert first + merged([fed for fed, _ in ranks]) == whole
    end = newest_checkpoint(tmp_path / "two")
    again, _ = fit(images(tmp_path), tmp_path / "back", max_steps=14, start=end)
    longer, _ = fit(images(tmp_path), tmp_path / "longer", max_steps=14)
    assert again == longer[12:]


def test_ranks_and_workers_stream_equally_from_a_single_shard(tmp_path):
    stream_shards(tmp_path, count=1)

    def run(rank):
        return fit(stream(tmp_path, num_workers=1, steps_per_epoch=5), tmp_path / "run", world_size=2, max_steps=10)

    ranks = run_ranks(run, 2)
    assert [len(fed) for fed, _ in ranks] == [10, 10]
    assert all(len(batch) == 2 for fed, _ in ranks for batch in fed)
