import numpy as np
import torch

from smalto.data.synthetic import SyntheticCodes, SyntheticImages


def images(**changes):
    options = {"image_size": 16, "num_classes": 4, "num_train": 64, "num_val": 32, "batch_size": 8, "seed": 0}
    return SyntheticImages(**(options | changes))


def codes(**changes):
    options = {
        "codebook_size": 32,
        "code_shape": [[4, 4]],
        "num_classes": 4,
        "num_train": 64,
        "num_val": 32,
        "batch_size": 8,
        "seed": 0,
    }
    return SyntheticCodes(**(options | changes))


def test_batches_keep_the_contract():
    image = next(iter(images().train_dataloader()))
    assert image["image"].dtype == torch.uint8
    assert image["image"].shape == (8, 3, 16, 16)
    assert image["label"].dtype == torch.int64
    code = next(iter(codes().val_dataloader()))
    assert code["codes"].dtype == torch.int64
    assert code["codes"].shape == (8, 16)
    assert 0 <= code["codes"].min() <= code["codes"].max() < 32


def test_images_repeat_and_validation_is_new():
    a, b = images(), images()
    assert torch.equal(a.fetch_train(0, np.arange(8))["image"], b.fetch_train(5, np.arange(8))["image"])
    assert not torch.equal(a.fetch_train(0, np.arange(8))["image"], a.fetch_val(0, np.arange(8))["image"])
    other = images(seed=1).fetch_train(0, np.arange(8))["image"]
    assert not torch.equal(a.fetch_train(0, np.arange(8))["image"], other)


def test_the_class_of_an_image_can_be_learnt():
    # nearest class mean of the colour variances already tells the classes
    data = images(num_val=32)
    train, val = data.fetch_train(0, np.arange(64)), data.fetch_val(0, np.arange(32))
    feature = {k: b["image"].float().var((2, 3)) for k, b in (("train", train), ("val", val))}
    means = torch.stack([feature["train"][train["label"] == c].mean(0) for c in range(4)])
    guess = torch.cdist(feature["val"], means).argmin(1)
    assert (guess == val["label"]).float().mean() > 0.9


def test_codes_follow_the_step_of_their_class():
    batch = codes(noise=0.0).fetch_train(0, np.arange(64))
    steps = (batch["codes"].diff(dim=1)) % 32
    assert (steps == batch["label"][:, None] + 1).all()
    noisy = codes(noise=0.3).fetch_train(0, np.arange(64))["codes"]
    share = (noisy != batch["codes"]).float().mean().item()
    # 1,024 codes, replaced with 0.3 by a random one of 32: five standard errors
    assert abs(share - 0.3 * 31 / 32) < 5 * (0.3 * 0.7 / 1024) ** 0.5
