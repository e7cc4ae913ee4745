"""A day and a half of the month that month.py simulates, and what is promised of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.month import DAY_S, Month


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_run_goes_on_without_the_bad_machine() -> None:
    result = Month(3, days=1.5).run()
    assert not result.gave_up
    assert 0 < result.old_rule_s < 1.5 * DAY_S
    assert result.goodput > 0.7
    assert result.bad_attempts >= 3
    assert result.bad_s < 0.02 * 1.5 * DAY_S
    assert result.restarts["drained"] > 20
    assert result.restarts["added"] > 50
    assert result.resizes_lost == 0
    assert result.counted_s == pytest.approx(result.useful_s)
    assert result.page_bytes < 20_000
    assert result.objects < 50


def test_run_gives_up_where_the_bad_machine_stays() -> None:
    result = Month(3, days=1.5, leave_out=False).run()
    assert "21 attempt(s) in a row failed" in result.gave_up
    assert result.ended_s < 0.1 * DAY_S
    assert result.goodput < 0.01


def test_month_is_the_same_again() -> None:
    assert Month(5, days=0.1).run() == Month(5, days=0.1).run() != Month(6, days=0.1).run()
