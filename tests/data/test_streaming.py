import gzip
import http.server
import io
import shlex
import tarfile
import threading
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from smalto.data.image_stream import StreamLoader
from smalto.data.images import ImageShards
from smalto.data.shards import tar_members
from smalto.data.streaming import StreamedImages
from smalto.data.tar_stream import expand_urls, read_samples, shard_order, shuffled
from smalto.data.write import TarShard

SIZE = 8


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number, number, number)).save(buffer, "PNG")
    return buffer.getvalue()


def shards(folder, *, count=4, images=6, name="part-{:03d}.tar"):
    """Image n is a plane of colour n with label n; members as sorted names have them: .cls before .png."""
    folder.mkdir(exist_ok=True, parents=True)
    for number in range(count):
        with TarShard(folder / name.format(number)) as shard:
            for n in range(number * images, (number + 1) * images):
                shard.add(f"{n:06d}.cls", str(n).encode())
                shard.add(f"{n:06d}.png", png(n))
            shard.close()
    return folder


def module(urls, **changes):
    options = {
        "urls": urls if isinstance(urls, list) else str(urls),
        "image_size": SIZE,
        "batch_size": 4,
        "steps_per_epoch": 6,
        "augment": "center_crop",
        "flip_prob": 0.5,
        "buffer_size": 5,
        "num_workers": 0,
        "seed": 0,
    }
    data = StreamedImages(**(options | changes))
    data.setup()
    return data


def epoch(loader: StreamLoader, number: int = 0) -> list[list[int]]:
    loader.set_epoch(number)
    batches = list(loader)
    for batch in batches:
        assert batch["image"].dtype == torch.uint8
        assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["label"])
    return [batch["label"].tolist() for batch in batches]


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_start_gives_the_same_batches_with_any_number_of_shards(tmp_path, workers):
    # three workers, two shards: some start with what another has read already, none waits
    shards(tmp_path, count=2)
    loaders = [module(tmp_path, num_workers=workers, batch_size=2).train_dataloader() for _ in range(2)]
    epochs = [[epoch(loader, e) for e in range(2)] for loader in loaders]
    for loader in loaders:
        loader.close()
    assert epochs[0] == epochs[1]
    assert [len(e) for e in epochs[0]] == [6, 6] == [len(loader) for loader in loaders]
    assert epochs[0][0] != epochs[0][1]


def test_two_processes_of_three_workers_read_every_shard_once_a_pass():
    orders = [shard_order(0, (0, 0), 10, consumer, 6) for consumer in range(6)]
    drawn = [[next(order) for order in orders] for _ in range(10)]  # 60 draws: six passes
    flat = [shard for row in drawn for shard in row]
    for start in range(0, 60, 10):
        assert sorted(flat[start : start + 10]) == list(range(10))
    assert flat[:10] != flat[10:20]
    assert [next(shard_order(0, start, 10, 0, 1)) for start in [(0, 0)] * 2] == [flat[0]] * 2
    assert {next(shard_order(0, (0, batch), 10, 0, 1)) for batch in range(30)} == set(range(10))


def test_an_approximate_epoch_sees_images_about_once(tmp_path):
    shards(tmp_path, count=10, images=10)
    labels = epoch(module(tmp_path, steps_per_epoch=25, buffer_size=20).train_dataloader())
    counts = Counter(label for batch in labels for label in batch)
    assert sum(counts.values()) == 100
    assert max(counts.values()) <= 2  # the reservoir keeps at most 20 from a pass to the next
    assert len(counts) >= 80
    assert [label for batch in labels for label in batch] != sorted(counts)


def test_ranks_get_equal_numbers_of_different_images(tmp_path):
    class Trainer:
        world_size = 2

    shards(tmp_path, count=4)
    seen = []
    for rank in range(2):
        data = module(tmp_path, steps_per_epoch=3, buffer_size=1)
        data.trainer = Trainer()
        data.trainer.global_rank = rank
        seen.append(epoch(data.train_dataloader()))
    assert [[len(batch) for batch in batches] for batches in seen] == [[2, 2, 2]] * 2
    assert not {i for b in seen[0] for i in b} & {i for b in seen[1] for i in b}


def test_going_on_counts_the_rest_of_the_epoch_and_reads_another_stream(tmp_path):
    shards(tmp_path)
    first = module(tmp_path).train_dataloader()
    whole = epoch(first)
    states = []
    again = []
    for _ in range(2):
        loader = module(tmp_path).train_dataloader()
        loader.load_state_dict({"epoch": 0, "batches": 4})
        again.append(epoch(loader))
        states.append(loader.state_dict())
    assert len(again[0]) == 2
    assert again[0] == again[1] != whole[:2]
    assert states == [{"epoch": 0, "batches": 6}] * 2
    loader.load_state_dict(first.state_dict())  # at the end of an epoch: a whole one follows
    assert len(epoch(loader, 1)) == 6


def test_commands_and_web_addresses(tmp_path):
    folder = shards(tmp_path / "a b", count=2)
    quiet = partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        web = f"http://127.0.0.1:{server.server_port}/part-{{000..001}}.tar"
        pipe = f"pipe:cat {shlex.quote(str(folder))}/part-{{000..001}}.tar"
        labels = []
        for urls in (web, pipe, folder, folder / "part-*.tar", [str(folder / "part-{000,001}.tar")]):
            labels.append(epoch(module(urls).train_dataloader()))
        server.shutdown()
    assert all(other == labels[0] for other in labels)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        """Nothing."""


def test_urls(tmp_path):
    assert expand_urls(["pipe:get {1..2}", "https://x/{a,b}.tar"]) == [
        "pipe:get 1",
        "pipe:get 2",
        "https://x/a.tar",
        "https://x/b.tar",
    ]
    with pytest.raises(FileNotFoundError, match="nothing"):
        expand_urls(str(tmp_path / "nothing-*.tar"))
    with pytest.raises(ValueError, match="at least one shard"):
        expand_urls([])


def test_damage_is_counted_and_the_rest_is_used(tmp_path, caplog):
    shards(tmp_path)
    cut = tmp_path / "part-000.tar"
    cut.write_bytes(cut.read_bytes()[:1600])  # inside the first image
    whole = module(tmp_path, max_skipped=0.5, steps_per_epoch=30)
    labels = {label for batch in epoch(whole.train_dataloader()) for label in batch}
    assert labels == set(range(6, 24))
    assert "left out the rest of" in caplog.text
    with pytest.raises(ValueError, match=r"11 images or shards of .* max_skipped is 0.0.*part-000.tar"):
        epoch(module(tmp_path, max_skipped=0.0, steps_per_epoch=400).train_dataloader())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.tar", "pipe:exit 3", "pipe:echo nothing"])
def test_shards_that_never_come_end_the_run_with_their_name(url):
    with pytest.raises(ValueError, match="could not be read") as caught:
        epoch(module(url).train_dataloader())
    assert url.removeprefix("pipe:") in str(caught.value)


def test_a_failing_command_is_noticed_after_whole_looking_output(tmp_path):
    shards(tmp_path, count=1)
    with pytest.raises(OSError, match="ended with code 4"):
        list(read_samples(f"pipe:cat {shlex.quote(str(tmp_path))}/part-000.tar; exit 4"))


@pytest.mark.parametrize("member", ["000000.cls", "000000.png"])
def test_a_shard_cut_between_members_is_noticed(tmp_path, member):
    shard = shards(tmp_path, count=1) / "part-000.tar"
    end = {m.name: m.offset + -(-m.size // 512) * 512 for m in tar_members(shard)}[member]
    shard.write_bytes(shard.read_bytes()[:end])
    with pytest.raises(OSError, match="without tar's end mark"):
        list(read_samples(str(shard)))


def test_compressed_shards_are_streamed(tmp_path):
    whole = shards(tmp_path, count=1) / "part-000.tar"
    packed = tmp_path / "part.tar.gz"
    packed.write_bytes(gzip.compress(whole.read_bytes()))
    assert list(read_samples(str(packed))) == list(read_samples(str(whole)))
    packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with pytest.raises((EOFError, OSError, tarfile.TarError)):
        list(read_samples(str(packed)))


def test_the_reservoir_loses_nothing():
    rng = np.random.default_rng(0)
    items = list(shuffled(iter(range(100)), 10, rng))
    assert len(set(items)) == len(items) == 90  # ten stay inside; an endless stream has no end to give them at
    assert items != sorted(items)


def test_validation_is_exact(tmp_path):
    shards(tmp_path / "train")
    shards(tmp_path / "val", count=1, name="val-{:03d}.tar")
    shards(tmp_path / "val", count=1, name="train-{:03d}.tar")
    data = module(tmp_path / "train", val_path=str(tmp_path / "val"), val_batch_size=4)
    assert [batch["label"].tolist() for batch in data.val_dataloader()] == [[0, 1, 2, 3], [4, 5]]
    assert module(tmp_path / "train").val_dataloader() == []


def test_indexed_images_from_shards_of_others(tmp_path):
    shards(tmp_path, count=2, name="train-{:03d}.tar")
    shards(tmp_path, count=1, name="val-{:03d}.tar")
    options = {"image_size": SIZE, "batch_size": 4, "flip_prob": 0, "num_workers": 0, "seed": 0}
    for path in (tmp_path, tmp_path / "{train,val}-*.tar"):
        data = ImageShards(path=path, augment="center_crop", **options)
        data.setup()
        assert (data.num_train, data.num_val, data.num_classes) == (12, 6, 12)
        batch = data.fetch_train(0, np.arange(12))
        assert torch.equal(batch["image"][:, 0, 0, 0].long(), batch["label"])
    with pytest.raises(ValueError, match="different sizes"):
        ImageShards(path=tmp_path, augment="none", **options).setup()


def test_wrong_arguments_are_told_at_once():
    with pytest.raises(ValueError, match=r"image_size .*steps_per_epoch .*augment .*flip_prob .*max_skipped "):
        module("x", image_size=0, steps_per_epoch=0, augment="none", flip_prob=2, max_skipped=1)
