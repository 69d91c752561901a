import pytest

from smalto.errors import InputError
from smalto.sampling.class_labels import class_numbers, described

WORDS = ["crane", "dog", "10", "crane", "true", "2"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, list(range(6))),
        ([0, 5, 0], [0, 5, 0]),
        (3, [3]),
        ("dog", [1]),
        (["dog", 4], [1, 4]),
        (["2", "10", "true"], [5, 2, 4]),  # in quotes it is a name
        ([10], [2]),  # there is no class 10, but one of that name
    ],
)
def test_numbers_and_names(labels, expected):
    assert class_numbers(labels, names=WORDS, count=6) == expected


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([], "labels is empty"),
        ([True], r"True, which is neither a class number nor a name; .* quotes: 'labels=\[\"true\"\]'"),
        ([None], r"quotes: 'labels=\[\"null\"\]'"),
        ([1.0], "1.0, which is neither"),
        ([[1]], "neither a class number nor a name"),
        ({"a": 1}, "neither a class number nor a name"),
        ([6], r"labels has 6; the model knows classes 0 to 5 \(crane, dog, "),
        ([-1], "the model knows classes 0 to 5"),
        (["cat"], r"labels has 'cat'; give class numbers from 0 to 5, or names \(crane, dog"),
        (["crane"], "'crane', the name of classes 0, 3; give the number"),
        (
            2,
            r'labels has 2, which is class 2 = "10" by number and class 5 = "2" by name; .*\[\"10\"\].* or .*\[\"2\"\]',
        ),
    ],
)
def test_what_cannot_be_read_in_one_way_is_refused(labels, words):
    with pytest.raises(InputError, match=words):
        class_numbers(labels, names=WORDS, count=6)


def test_names_of_classes_that_the_model_does_not_know_are_refused():
    with pytest.raises(InputError, match="'2'; the model knows classes 0 to 2"):
        class_numbers(["2"], names=WORDS, count=3)
    assert class_numbers([1], names=[], count=3) == [1]
    with pytest.raises(InputError, match="no names are known"):
        class_numbers(["1"], names=[], count=3)


@pytest.mark.parametrize(
    ("classes", "names", "expected"),
    [
        ([2, 1], WORDS, 'class 2 = "10", class 1 = "dog"'),
        ([7], [], "class 7"),
        (range(12), [], "all 12 classes"),
        (range(1, 12), [], ", ".join(f"class {i}" for i in range(1, 9)) + " and 3 more"),
    ],
)
def test_what_is_drawn_is_said_in_one_line(classes, names, expected):
    assert described(classes, names=names, count=12) == expected
