import pytest

from smalto.data.shards import CODES, read_meta
from smalto.planning.dataset import IMAGENET, code_shard_bytes, stored_bytes, training_images
from smalto.planning.schedule import find_schedule
from test_extract import CODEBOOK, GRID, extract, images  # noqa: F401


def test_codes_take_the_bytes_that_were_planned(images, tmp_path):  # noqa: F811
    folder = tmp_path / "codes"
    extract(images, folder, crop_range=[1.25])
    meta = read_meta(folder, CODES)
    for split in meta["splits"].values():
        planned = code_shard_bytes(
            split["num_images"], crops=10, num_tokens=GRID**2, codebook_size=CODEBOOK, block_size=7, shard_size=21
        )
        assert planned == sum((folder / shard["name"]).stat().st_size for shard in split["shards"])
    data = {"path": str(folder), "batch_size": 4}
    assert training_images(data, wanted=None) == (meta["splits"]["train"]["num_images"], f"{folder}/meta.json")
    assert stored_bytes(data) == sum(file.stat().st_size for file in folder.glob("*.tar"))


def test_imagenet_is_assumed_where_nothing_is(tmp_path):
    number, source = training_images({"path": str(tmp_path / "none")}, wanted=None)
    assert number == IMAGENET
    assert "assumed" in source
    assert training_images({"num_train": 5}, wanted=None)[0] == 5
    assert training_images({"num_train": 5}, wanted=7)[0] == 7


@pytest.mark.parametrize(
    ("max_steps", "max_epochs", "steps"), [(-1, 300, 300 * 5004), (1000, 300, 1000), (10**9, 1, 5004), (-1, -1, None)]
)
def test_the_first_limit_ends_a_training(max_steps, max_epochs, steps):
    trainer = {"max_steps": max_steps, "max_epochs": max_epochs, "accumulate_grad_batches": 1}
    found = find_schedule(trainer, num_images=IMAGENET, batch_size=256, tokens_per_image=256)
    assert found.steps == steps
    assert found.tokens == (None if steps is None else steps * 256 * 256)
    twice = find_schedule(
        {**trainer, "accumulate_grad_batches": 2}, num_images=1025, batch_size=256, tokens_per_image=1
    )
    assert (twice.steps_per_epoch, twice.images_per_step) == (2, 512)
    with pytest.raises(ValueError, match=r"data\.batch_size=256"):
        find_schedule(trainer, num_images=100, batch_size=256, tokens_per_image=1)
