"""Processes of one job wait for decisions of the first, not for ever."""

import time
from datetime import timedelta

from forked_ranks import run_ranks
from smalto.data import ranks as ranks_module
from smalto.data.ranks import Ranks
from smalto.errors import InputError, UserError


def said(function) -> str:
    try:
        return str(function())
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def test_the_first_decides_and_what_stops_it_stops_all():
    def decided(rank):
        def refuse():
            raise InputError("labels is empty")

        with Ranks() as ranks:
            return ranks.decide(lambda: f"of rank {rank}"), said(lambda: ranks.decide(refuse))

    first, second = run_ranks(decided, 2)
    assert first == ("of rank 0", "InputError: labels is empty")
    assert second == ("of rank 0", "UserError: the first process stopped: labels is empty")


def test_who_does_not_come_to_a_decision_is_named(monkeypatch):
    monkeypatch.setattr(ranks_module, "DECISION", timedelta(seconds=1))

    def late(rank):
        with Ranks() as ranks:
            ranks.wait()
            if rank == 1:
                time.sleep(2.5)
                return "elsewhere"
            began = time.monotonic()
            return said(lambda: ranks.share("x")), time.monotonic() - began

    (message, seconds), _ = run_ranks(late, 2)
    assert message.startswith("UserError: process 0 waited in vain")
    assert seconds < 2.3
