import pytest
from tiny_features import TinyFeatures

from smalto.metrics.rules import Rules


@pytest.fixture
def tiny() -> TinyFeatures:
    return TinyFeatures()


@pytest.fixture
def rules() -> Rules:
    return Rules(split_size=40, kid_subsets=3, kid_subset_size=20)
