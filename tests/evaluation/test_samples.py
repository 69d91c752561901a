import pytest
import torch
from tiny_features import TinyFeatures

from forked_ranks import run_ranks
from picture_files import make_pixels
from smalto.data.ranks import Ranks
from smalto.evaluation import blocks as blocks_module
from smalto.evaluation.begun import batches
from smalto.evaluation.blocks import FeatureBlocks
from smalto.evaluation.samples import from_codes, measure_samples, settings_grid
from smalto.metrics.rules import Rules
from smalto.metrics.suite import GenerationMetrics
from smalto.sampling.requests import balanced_labels, random_labels, wanted_labels
from smalto.sampling.service import ImageBatch
from smalto.types import SamplingConfig

RULES = Rules(split_size=40, kid_subsets=3, kid_subset_size=20)
IMAGES = make_pixels(90, seed=1, shift=0.2)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(blocks_module.FeatureBlocks.__init__, "__kwdefaults__", {"edges": (), "size": 25})


def real_side() -> GenerationMetrics:
    suite = GenerationMetrics(features=TinyFeatures(), num_classes=3, rules=RULES, distributed=False)
    suite.update_real(make_pixels(60, seed=0), torch.arange(60) % 3)
    suite.finish_real()
    return suite


def draw(indices, batch_size):
    for chosen in batches(indices, batch_size):
        yield ImageBatch(chosen, balanced_labels(chosen, range(3)), IMAGES[chosen.start : chosen.stop])


def measured(tmp_path, *, tiers=(90,), batch_size=10, ranks=None, source=draw, keep=None):
    return measure_samples(
        source,
        suite=real_side(),
        tiers=tiers,
        blocks_dir=tmp_path / "blocks",
        batch_size=batch_size,
        name="samples",
        ranks=ranks or Ranks(),
        keep=keep,
    )


def direct(count):
    suite = real_side()
    suite.update_fake(IMAGES[:count], balanced_labels(range(count), range(3)), torch.arange(count))
    return suite.compute().values


def close_to(values):
    """A row's place in a chunk can move the last bit of a float32 feature."""
    return pytest.approx(values, rel=1e-7)


def test_tiers_share_one_pass(tmp_path):
    seen = []
    found = measured(tmp_path, tiers=(30, 60, 90), keep=lambda indices, image: seen.extend(indices))
    assert seen == list(range(90)), "every image was drawn once"
    for count, scores in found.items():
        assert scores.values == close_to(direct(count))
    assert found[30].values["fid_tiny"] != found[90].values["fid_tiny"]


@pytest.mark.parametrize("batch_size", [1, 7, 90])
def test_batch_size_does_not_matter(tmp_path, batch_size):
    assert measured(tmp_path, batch_size=batch_size)[90].values == close_to(direct(90))


def test_a_killed_measurement_goes_on(tmp_path):
    drawn = []

    def killed(indices, batch_size):
        for batch in draw(indices, batch_size):
            drawn.append(batch.indices.start)
            if len(drawn) == 5:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, source=killed)
    found = measured(tmp_path, source=killed)
    assert drawn == [0, 10, 20, 25, 35, 25, 35, 45, 50, 60, 70, 75, 85], "finished blocks were not drawn again"
    assert found[90].values == close_to(direct(90))


@pytest.mark.parametrize("spoiled", [b"", b"PK\3\4 not", None])
def test_a_damaged_block_is_measured_again(tmp_path, caplog, spoiled):
    def killed(indices, batch_size):
        if indices.start >= 75:
            raise KeyboardInterrupt
        yield from draw(indices, batch_size)

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, source=killed)
    block = tmp_path / "blocks/00000025-00000050.npz"
    block.write_bytes(block.read_bytes()[:-50] if spoiled is None else spoiled)
    drawn: list[int] = []
    found = measured(tmp_path, keep=lambda indices, image: drawn.extend(indices))
    assert drawn == [*range(25, 50), *range(75, 90)]
    assert f"{block} cannot be read" in caplog.text
    assert found[90].values == close_to(direct(90))


def test_two_processes_measure_what_one_does(tmp_path):
    expected = measured(tmp_path / "one")

    def measure(rank):
        with Ranks() as ranks:
            found = measured(tmp_path / "two", ranks=ranks)
            return {count: scores.values for count, scores in found.items()}

    first, second = run_ranks(measure, 2)
    assert first == {90: expected[90].values}, "to the last digit: the blocks are the same"
    assert second == {}


def test_blocks_end_at_every_tier_and_go_when_done(tmp_path):
    blocks = FeatureBlocks(tmp_path / "b", count=70, edges=(30, 70), size=25)
    assert [(b.start, b.stop) for b in blocks.blocks] == [(0, 25), (25, 30), (30, 50), (50, 70)]
    assert blocks.missing(rank=1, world_size=2) == [range(25, 30), range(50, 70)]
    found = TinyFeatures()(IMAGES[25:30])
    blocks.write(range(25, 30), found, None)
    assert blocks.missing() == [range(0, 25), range(30, 50), range(50, 70)]
    blocks.remove()
    assert not (tmp_path / "b").exists()


def test_grid_of_settings():
    base = SamplingConfig(cfg_scale=2.0, top_k=7)
    assert settings_grid(base, cfg_scale=None, top_k=None) == [base]
    grid = settings_grid(base, cfg_scale=[1.0, 3.0], temperature=[0.5, 1.0], top_p=None)
    assert [(s.cfg_scale, s.temperature, s.top_k) for s in grid] == [(1, 0.5, 7), (1, 1, 7), (3, 0.5, 7), (3, 1, 7)]


def test_labels_depend_on_the_number_of_the_image_alone():
    labels = random_labels(range(3000), range(10), seed=0)
    assert torch.equal(labels[100:110], random_labels(range(100, 110), range(10), seed=0))
    assert not torch.equal(labels, random_labels(range(3000), range(10), seed=1))
    # 300 of each on average, with a standard deviation of 16.
    assert 220 < int(labels.bincount(minlength=10).min()) <= int(labels.bincount(minlength=10).max()) < 380
    assert wanted_labels("balanced", range(20), range(10), 0).bincount().tolist() == [2] * 10
    with pytest.raises(ValueError, match="balanced"):
        wanted_labels("even", range(2), range(2), 0)


def test_blind_codes_follow_their_counts():
    class Task:
        device = torch.device("cpu")

        def decode_codes(self, codes):
            return codes

    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    blind = from_codes(Task(), weights=weights, classes=range(2), labels="balanced", seed=0)
    batch = next(blind(range(0, 400), 400))
    codes, labels = batch.images, batch.labels
    assert codes.shape == (400, 2)
    assert set(codes[:, 0].tolist()) == {0}
    assert 150 < int((codes[:, 1] == 1).sum()) < 250
    assert torch.equal(next(blind(range(7, 9), 2)).images, codes[7:9])
    assert labels.tolist() == [0, 1] * 200
