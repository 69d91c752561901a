import pytest
import torch

from smalto.models.conditioner import ClassConditioner, TextConditioner


@pytest.fixture
def by_class() -> ClassConditioner:
    return ClassConditioner(dim=4, num_classes=10, drop_prob=0.1)


@pytest.fixture
def by_text() -> TextConditioner:
    return TextConditioner(dim=4, text_dim=6, num_tokens=3, drop_prob=0.1)


def test_class_tokens_are_rows_of_the_table(by_class):
    label = torch.tensor([3, 0, 9])
    assert torch.equal(by_class.eval()(label), by_class.embedding.weight[label].unsqueeze(1))


def test_null_class_is_the_last_row(by_class):
    null = by_class.null(2)
    assert null.tolist() == [10, 10]
    assert torch.equal(by_class.eval()(null)[0, 0], by_class.embedding.weight[10])


# 20,000 Bernoulli trials of probability 0.1 have standard deviation 0.0021; five of them.
MANY, SLACK = 20_000, 0.011


def test_labels_are_dropped_in_training_only(by_class):
    label = torch.full((MANY,), 3)
    null = by_class.embedding.weight[10]
    assert not (by_class.eval()(label) == null).all(-1).any()
    dropped = (by_class.train()(label) == null).all(-1).float().mean()
    assert abs(float(dropped) - 0.1) < SLACK
    assert label.unique().tolist() == [3], "the caller's labels are not touched"


def test_texts_are_dropped_whole_and_in_training_only(by_text, generator):
    text = torch.randn(1, 3, 6, generator=generator).expand(MANY, -1, -1)
    kept, null = by_text.eval()(text[:1]), by_text(by_text.null(1))
    # Batched and single products of the same numbers may differ in the last bit.
    torch.testing.assert_close(by_text(text), kept.expand(MANY, -1, -1), atol=1e-6, rtol=0)
    out = by_text.train()(text)
    is_kept, is_null = ((out - one).abs().amax((1, 2)) < 1e-6 for one in (kept, null))
    assert (is_kept ^ is_null).all(), "never half a text"
    assert abs(float(is_null.float().mean()) - 0.1) < SLACK


@pytest.mark.parametrize("text", [False, True])
def test_nothing_is_dropped_at_probability_zero(text, generator):
    if text:
        net = TextConditioner(dim=4, text_dim=6, num_tokens=3, drop_prob=0.0)
        condition = torch.randn(500, 3, 6, generator=generator)
    else:
        net = ClassConditioner(dim=4, num_classes=10, drop_prob=0.0)
        condition = torch.randint(10, (500,), generator=generator)
    assert torch.equal(net.train()(condition), net.eval()(condition))


def test_null_text_repeats_the_null_features(by_text):
    assert torch.equal(by_text.null(2), by_text.null_features.expand(2, 3, 6))


def test_null_text_learns_from_dropped_samples(by_text, generator):
    by_text.train()(torch.randn(200, 3, 6, generator=generator)).sum().backward()
    assert by_text.null_features.grad.abs().sum() > 0


def test_null_text_can_be_left_as_it_is(generator):
    net = TextConditioner(dim=4, text_dim=6, num_tokens=3, drop_prob=0.9, train_null=False)
    net.train()(torch.randn(50, 3, 6, generator=generator)).sum().backward()
    assert net.null_features.grad is None
    assert "null_features" in net.state_dict()


def test_null_features_start_at_unit_length():
    net = TextConditioner(dim=4, text_dim=500, num_tokens=40, drop_prob=0.1)
    # Normal entries over sqrt(width): squared row norms average 1 with standard error sqrt(2 / 20000) = 0.01.
    assert net.null_features.pow(2).sum(1).mean().item() == pytest.approx(1, abs=0.05)


def test_padding_stays_zero(by_text):
    assert (by_text.eval()(torch.zeros(2, 3, 6)) == 0).all()


def test_text_projection_in_closed_form():
    net = TextConditioner(dim=1, text_dim=1, num_tokens=1, drop_prob=0.0)
    net.fc1.weight.data.fill_(1.0)
    net.fc2.weight.data.fill_(2.0)
    # The tanh form of GELU at 1: 0.841192; the exact form would be 0.841345.
    assert net(torch.ones(1, 1, 1)).item() == pytest.approx(2 * 0.841192, abs=2e-6)


@pytest.mark.parametrize("label", [[-1, 2], [0, 10]])
def test_refuses_unknown_classes(by_class, label):
    with pytest.raises(ValueError, match=rf"{min(label)} to {max(label)}.*classes 0 to 9"):
        by_class.check(torch.tensor(label))


def test_accepts_all_known_classes(by_class):
    by_class.check(torch.arange(10))
    by_class.check(torch.empty(0, dtype=torch.int64))


def test_refuses_text_of_another_shape(by_text):
    by_text.check(torch.zeros(7, 3, 6))
    with pytest.raises(ValueError, match=r"\(7, 2, 6\).*\(batch, 3, 6\)"):
        by_text.check(torch.zeros(7, 2, 6))


@pytest.mark.parametrize("drop_prob", [-0.1, 1.0])
def test_refuses_what_is_no_probability(drop_prob):
    with pytest.raises(ValueError, match=f"drop_prob is {drop_prob}"):
        ClassConditioner(dim=4, num_classes=10, drop_prob=drop_prob)
    with pytest.raises(ValueError, match=f"drop_prob is {drop_prob}"):
        TextConditioner(dim=4, text_dim=6, num_tokens=3, drop_prob=drop_prob)
