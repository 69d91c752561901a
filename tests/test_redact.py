"""Credentials are taken out of what is written down, and nothing else is."""

import time

import pytest

from smalto.redact import MARK, redacted, redacted_places

CREDENTIALS = {
    "https://ann:hunter2@mlflow.example.org/x": "https://***@mlflow.example.org/x",
    "https://ann:hun@ter2@mlflow.example.org:5000": "https://***@mlflow.example.org:5000",
    "postgresql+psycopg2://ann:hun/ter2@db:5432/mlflow": "postgresql+psycopg2://***@db:5432/mlflow",
    "HTTPS://hunter2@example.org/x": "HTTPS://***@example.org/x",
    "https://b.s3.amazonaws.com/{000..009}.tar?X-Amz-Expires=9&X-Amz-Signature=hunter2": (
        "https://b.s3.amazonaws.com/{000..009}.tar?***"
    ),
    "https://a.example/x?sig=hunter2::https://ann:hunter2@b.example/y": "https://a.example/x?***::https://***@b.example/y",
    "https://a.example/x?sig=hunter2,https://b.example/y?sig=hunter2": "https://a.example/x?***,https://b.example/y?***",
    "smalto train 'data.urls=https://a.example/x?sig=hunter2' seed=1": (
        "smalto train 'data.urls=https://a.example/x?***' seed=1"
    ),
    "pipe:curl -H 'Authorization: Bearer hunter2' https://a.example/x.tar": (
        "pipe:curl -H 'Authorization: Bearer ***' https://a.example/x.tar"
    ),
    "pipe:fetch --token hunter2 --password=hunter2 x": "pipe:fetch --token *** --password=*** x",
}


@pytest.mark.parametrize(("text", "kept"), CREDENTIALS.items())
def test_a_credential_is_gone_and_the_rest_stays(text: str, kept: str) -> None:
    assert redacted(text) == kept
    assert redacted(kept) == kept, "what was redacted stays as it is"
    assert redacted_places({"a": {"b": [text, kept]}}) == ["a.b.1"]


@pytest.mark.parametrize(
    "text",
    [
        "sqlite:////data/@me/outputs/mlflow.db",
        "http://localhost:5000/a@b",
        "s3://bucket/prefix:a/x.tar",
        "outputs/what?/x@y.tar",
        "data/{000..009}.tar",
        "smalto train task.net.num_tokens=5 tokenizer=vq_f16 conditioner.token_dim=3",
        "",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert redacted(text) == text


def test_plain_data_is_walked_and_not_changed() -> None:
    given = {"logger": [{"uri": "http://a:hunter2@b"}, 5, None, 1.5, True], "token": "hunter2", "num_tokens": 5}
    found = redacted(given)
    assert found == {"logger": [{"uri": "http://***@b"}, 5, None, 1.5, True], "token": MARK, "num_tokens": 5}
    assert given["token"] == "hunter2"
    assert redacted_places(found) == ["logger.0.uri", "token"]


@pytest.mark.parametrize(
    "part", ["a.", "a+b-", "x://", "http://u:", "x://a?,b", "token ", "--token ", "?,a.", "authorization: "]
)
def test_long_texts_take_no_more_than_their_length(part):
    """A config or a message of a server may be of any length: at 40 kB one took ten seconds."""
    began = time.process_time()
    redacted(part * (100_000 // len(part)))
    assert time.process_time() - began < 2
