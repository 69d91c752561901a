import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from smalto.data.encode import Item, Recipe, encode
from smalto.data.images import ImageShards
from smalto.data.order import sample_rng
from smalto.data.sources import Record
from smalto.data.transforms import center_crop, random_crop
from smalto.data.write import TarShard
from smalto.files import write_json

SIZE = 8


def picture(number: int, size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_shards(folder, *, size=(SIZE, SIZE), counts=(20, 6), labels=True):
    splits = {}
    for split, count, first in (("train", counts[0], 0), ("val", counts[1], 1000)):
        shards = []
        for number, start in enumerate(range(0, count, 12)):
            with TarShard(folder / f"{split}-{number:05d}.tar") as shard:
                numbers = range(start, min(start + 12, count))
                for n in numbers:
                    item = Item("", "", Record(image=picture(first + n, size), name=""))
                    shard.add(f"{n:08d}.png", encode(item, Recipe("keep", None, "png", 0)).data)
                    if labels:
                        shard.add(f"{n:08d}.cls", str(n % 5).encode())
                shards.append(shard.close() | {"num_images": len(numbers)})
        splits[split] = {"num_images": count, "shards": shards}
    meta = {
        "format": "smalto-images",
        "version": 1,
        "splits": splits,
        "num_classes": 5 if labels else None,
        "classes": [],
        "image_size": list(size),
        "encoding": "png",
    }
    write_json(folder / "meta.json", meta)
    return folder


def module(path, **changes):
    options = {
        "path": path,
        "image_size": SIZE,
        "batch_size": 4,
        "augment": "none",
        "flip_prob": 0.0,
        "num_workers": 0,
        "seed": 0,
    }
    data = ImageShards(**(options | changes))
    data.setup()
    return data


@pytest.mark.parametrize("cache_mb", [0, 256])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_image_once_with_its_label(tmp_path, cache_mb, workers):
    data = module(image_shards(tmp_path), cache_mb=cache_mb, num_workers=workers)
    assert (data.num_train, data.num_val, data.num_classes) == (20, 6, 5)
    seen = {}
    for batch in data.train_dataloader():
        assert batch["image"].dtype == torch.uint8
        assert batch["image"].shape == (4, 3, SIZE, SIZE)
        assert batch["label"].dtype == torch.int64
        for image, label in zip(batch["image"], batch["label"], strict=True):
            seen[image.permute(1, 2, 0).numpy().tobytes()] = int(label)
    assert seen == {np.asarray(picture(n, (SIZE, SIZE))).tobytes(): n % 5 for n in range(20)}


def test_cache_and_files_give_the_same_batches(tmp_path):
    image_shards(tmp_path, size=(20, 30))
    for augment in ("center_crop", "random_crop"):
        loaders = [module(tmp_path, cache_mb=mb, augment=augment, flip_prob=0.5).train_dataloader() for mb in (0, 256)]
        for a, b in zip(*loaders, strict=True):
            assert torch.equal(a["image"], b["image"])


def test_augmentation_is_a_function_of_seed_epoch_and_image(tmp_path):
    data = module(image_shards(tmp_path, size=(20, 30)), augment="random_crop")
    batch = data.fetch_train(3, np.array([7, 2]))
    expected = random_crop(picture(7, (20, 30)), SIZE, sample_rng(0, 3, 7))
    assert np.array_equal(batch["image"][0].permute(1, 2, 0), np.asarray(expected))
    assert torch.equal(data.fetch_train(3, np.array([2]))["image"][0], batch["image"][1])
    assert not torch.equal(data.fetch_train(4, np.array([7]))["image"][0], batch["image"][0])


def test_flip_prob_is_the_share_of_mirrored_images(tmp_path):
    image_shards(tmp_path, counts=(24, 1))
    plain = module(tmp_path).fetch_train(0, np.arange(24))["image"]
    assert torch.equal(module(tmp_path, flip_prob=1.0).fetch_train(0, np.arange(24))["image"], plain.flip(3))
    half = module(tmp_path, flip_prob=0.5)
    mirrored = 0
    for epoch in range(50):
        images = half.fetch_train(epoch, np.arange(24))["image"]
        is_plain, is_mirrored = ((images == x).flatten(1).all(1) for x in (plain, plain.flip(3)))
        assert (is_plain ^ is_mirrored).all()
        mirrored += int(is_mirrored.sum())
    assert abs(mirrored - 600) < 5 * (1200 * 0.25) ** 0.5


def test_the_cache_is_not_changed_by_mirroring(tmp_path):
    data = module(image_shards(tmp_path), flip_prob=1.0)
    first = data.fetch_train(0, np.arange(4))["image"]
    assert torch.equal(data.fetch_train(0, np.arange(4))["image"], first)


@pytest.mark.parametrize("augment", ["center_crop", "random_crop"])
def test_validation_is_cropped_in_the_centre_in_order_and_never_mirrored(tmp_path, augment):
    data = module(image_shards(tmp_path, size=(20, 30)), augment=augment, flip_prob=1.0, val_batch_size=5)
    images = torch.cat([batch["image"] for batch in data.val_dataloader()])
    expected = [np.asarray(center_crop(picture(1000 + n, (20, 30)), SIZE)) for n in range(6)]
    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack(expected))


def test_limit_val(tmp_path):
    data = module(image_shards(tmp_path), limit_val=3)
    assert data.num_val == 3
    assert sum(len(batch["label"]) for batch in data.val_dataloader()) == 3


def test_images_without_labels(tmp_path):
    data = module(image_shards(tmp_path, labels=False))
    assert data.num_classes is None
    assert data.fetch_train(0, np.arange(3))["label"].tolist() == [-1, -1, -1]


def test_without_validation_images_there_is_no_loader(tmp_path):
    assert module(image_shards(tmp_path, counts=(8, 0))).val_dataloader() == []


def test_sizes_that_do_not_fit_are_explained(tmp_path):
    image_shards(tmp_path, size=(20, 30))
    with pytest.raises(ValueError, match=r"holds images of 20x30, image_size is 8.*augment=center_crop"):
        module(tmp_path)


def test_wrong_arguments_are_told_at_once(tmp_path):
    with pytest.raises(ValueError, match=r"image_size .*augment .*flip_prob .*cache_mb .*limit_val "):
        module(tmp_path, image_size=0, augment="spin", flip_prob=2, cache_mb=-1, limit_val=0)
    with pytest.raises(ValueError, match=r"batch_size .*val_batch_size .*num_workers "):
        module(tmp_path, batch_size=0, val_batch_size=0, num_workers=-1)


def test_a_damaged_image_is_named(tmp_path):
    image_shards(tmp_path)
    shard = tmp_path / "train-00000.tar"
    data = bytearray(shard.read_bytes())
    data[512:700] = bytes(188)
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"image 0 in .*train-00000.tar is damaged"):
        module(tmp_path)


class Records(LightningModule):
    """Notes what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.fed = []

    def training_step(self, batch, index):
        self.fed.append((self.current_epoch, batch["label"].tolist(), int(batch["image"].long().sum())))
        return self.weight * 1.0

    def validation_step(self, batch, index):
        self.log("val", float(len(batch["label"])))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path, data_options, *, max_steps, save_at=None, ckpt_path=None):
    model = Records()
    checkpoints = [] if save_at is None else [ModelCheckpoint(path, "last", every_n_train_steps=save_at)]
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=checkpoints,
        default_root_dir=path,
        max_steps=max_steps,
    )
    trainer.fit(model, datamodule=module(path, **data_options), ckpt_path=ckpt_path)
    return model.fed


@pytest.mark.parametrize(("steps", "workers"), [(3, 0), (5, 0), (7, 1)])
def test_lightning_resumes_in_mid_epoch_with_the_same_images(tmp_path, steps, workers):
    image_shards(tmp_path, size=(20, 30))
    options = {"augment": "random_crop", "flip_prob": 0.5, "num_workers": workers}
    unbroken = fit(tmp_path, options, max_steps=12)
    assert [epoch for epoch, _, _ in unbroken] == [0] * 5 + [1] * 5 + [2] * 2
    assert unbroken[:5] != [(0, *fed) for _, *fed in unbroken[5:10]]  # another order in the next epoch
    first = fit(tmp_path, options, max_steps=steps, save_at=steps)
    rest = fit(tmp_path, options, max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    assert first + rest == unbroken


@pytest.mark.parametrize("augment", ["center_crop", "random_crop"])
@pytest.mark.parametrize("size", [(SIZE, SIZE), (21, 13), (9, 40)])
def test_crops_resized_by_torch_are_nearly_those_of_pillow(tmp_path, augment, size):
    path = image_shards(tmp_path, size=size, counts=(20, 4))
    exact, fast = (module(path, augment=augment, resize=resize, flip_prob=0.5) for resize in ("pillow", "torch"))
    indices = np.arange(20)
    wanted, found = (data.fetch_train(3, indices)["image"].int() for data in (exact, fast))
    # noise is the worst case for rounding; another place or scale would differ by tens
    assert (wanted - found).abs().max() <= 3
    assert torch.equal(fast.fetch_val(0, indices[:4])["image"], exact.fetch_val(0, indices[:4])["image"])


@pytest.mark.parametrize(
    ("changes", "match"), [({"resize": "cv2"}, "must be pillow or torch"), ({"resize": "torch"}, "leave it out")]
)
def test_resize_that_is_unknown_or_does_nothing_is_refused(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        module(tmp_path, **changes)
