from collections import Counter

from smalto.sampling.requests import balanced_labels, image_seeds


def test_labels_go_round_the_classes():
    assert balanced_labels(range(7), [3, 1, 8]).tolist() == [3, 1, 8, 3, 1, 8, 3]
    assert set(Counter(balanced_labels(range(1000), range(10)).tolist()).values()) == {100}


def test_label_and_seed_follow_the_number_of_the_image():
    every = range(40)
    some = [33, 5, 6]
    assert balanced_labels(some, range(7)).tolist() == balanced_labels(every, range(7))[some].tolist()
    assert image_seeds(9, some).tolist() == image_seeds(9, every)[some].tolist()


def test_seeds_differ_between_images_and_runs():
    seeds = [seed for run in range(5) for seed in image_seeds(run, range(1000)).tolist()]
    assert len(set(seeds)) == 5000
    assert min(seeds) >= 0


def test_neighbouring_runs_share_no_seeds():
    # seed + index, the usual shortcut, makes image 1 of run 0 image 0 of run 1.
    assert not set(image_seeds(0, range(1000)).tolist()) & set(image_seeds(1, range(1000)).tolist())
