import math

import pytest
import torch
from tiny_features import TinyFeatures

from smalto.losses.perceptual import PerceptualLoss
from smalto.metrics.codebook import QueueUsage
from smalto.metrics.image import LPIPS, PSNR
from smalto.metrics.reconstruction import ReconstructionMetrics
from smalto.metrics.scores import Scores


def test_everything_of_a_pair(real, generator):
    network = PerceptualLoss(net="squeeze_caffe").eval()
    metrics = ReconstructionMetrics(
        features=TinyFeatures(), perceptual=network, perceptual_name=network.name, codebook_size=16
    )
    image = real[0]
    noisy = (image.float() + 20 * torch.randn(image.shape, generator=generator)).clamp(0, 255).byte()
    codes = torch.randint(8, (200, 4), generator=generator)
    for part in torch.arange(200).split(64):
        metrics.update(image[part], noisy[part], codes[part])
    first = metrics.compute()
    names = {"psnr", "ssim", "lpips_squeeze_caffe", "codebook_usage", "codebook_queue_usage", "rfid_tiny", "rsfid_tiny"}
    assert names <= set(first.values)
    assert set(first.errors) == {"psnr", "ssim", "lpips_squeeze_caffe"}
    assert first.values["codebook_usage"] == first.values["codebook_queue_usage"] == 0.5
    metrics.reset()
    metrics.update(image, image, codes)
    second = metrics.compute().values
    assert second["rfid_tiny"] < 1e-9, "the originals' side was kept"
    assert second["lpips_squeeze_caffe"] == 0.0
    assert second["psnr"] > first.values["psnr"]


def test_put_aside_and_gone_on_with(real):
    image = real[0][:60]

    def measured(*, interrupt: bool) -> dict[str, float]:
        metrics = ReconstructionMetrics(features=TinyFeatures(), codebook_size=4)
        metrics.update(image[:40], image[:40] // 2, torch.zeros(40, 2, dtype=torch.int64))
        if interrupt:
            state = metrics.state()
            metrics = ReconstructionMetrics(features=TinyFeatures(), codebook_size=4)
            metrics.load_state(state)
        metrics.update(image[40:], image[40:] // 2, torch.ones(20, 2, dtype=torch.int64))
        return metrics.compute().values

    assert measured(interrupt=True) == measured(interrupt=False)


def test_standard_error_of_a_mean_over_images(real):
    image = real[0][:50]
    each = []
    for one in image:
        metric = PSNR()
        metric.update(one[None], one[None] // 2)
        each.append(float(metric.compute()))
    metric = PSNR()
    metric.update(image, image // 2)
    mean, error = metric.mean_and_error()
    values = torch.tensor(each, dtype=torch.float64)
    assert mean == pytest.approx(float(values.mean()))
    assert error == pytest.approx(float(values.std() / 50**0.5))
    alone = PSNR()
    alone.update(image[:1], image[:1])
    assert math.isnan(alone.mean_and_error()[1])


def test_lpips_is_the_networks_mean_and_not_part_of_the_state(real):
    network = PerceptualLoss(net="squeeze_caffe").eval()
    metric = LPIPS(network=network)
    image = real[0][:6]
    metric.update(image[:4], image[:4] // 2)
    metric.update(image[4:], image[4:] // 2)
    with torch.no_grad():
        expected = network(image / 127.5 - 1, (image // 2) / 127.5 - 1).mean()
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-5)
    assert not list(metric.parameters())


def test_the_papers_queue_forgets(generator):
    """A codebook that a set uses fully looks less used in a queue of its last codes: two numbers, two names."""
    queue = QueueUsage(codebook_size=1000, queue_size=300)
    codes = torch.randperm(1000, generator=generator)
    for part in codes.split(64):
        queue.update(part)
    assert float(queue.compute()) == 0.3
    queue.update(torch.zeros(1000, dtype=torch.int64))
    assert float(queue.compute()) == 0.001
    assert float(QueueUsage(codebook_size=10).compute()) == 0.0
    with pytest.raises(ValueError, match="codebook has 10"):
        QueueUsage(codebook_size=10).update(torch.tensor([10]))


def test_scores_hold_finite_numbers_only():
    scores = Scores()
    scores.add("a", math.nan)
    scores.add("b", 2.0, math.inf)
    scores.add_share("c", 0.25, 100)
    assert (scores.values, scores.errors) == ({"b": 2.0, "c": 0.25}, {"c": pytest.approx(0.0433, abs=1e-4)})
    assert scores.missing == {"a": "the result is nan"}
    assert scores.renamed("_x").logged() == {"b_x": 2.0, "c_x": 0.25, "se/c_x": scores.errors["c"]}
