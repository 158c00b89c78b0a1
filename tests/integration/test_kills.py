"""A short run of the tool that kills commands, and a mixture that it must find."""

import random
from contextlib import contextmanager

import pytest

from tests.kills import opened


@pytest.mark.parametrize(("command", "count"), [("fit", 5), ("heal", 3), ("report", 2), ("eval", 3)])
def test_a_command_that_is_killed_is_run_again(command, count):
    with opened(command) as victim:
        points = random.Random(0).sample(victim.points(), count)
        assert not [finding for point in points if (finding := victim.stop_at(*point))]


def test_a_file_that_is_written_in_place_is_found(monkeypatch):
    """The figures of an evaluation, half written over the figures before."""

    @contextmanager
    def in_place(target):
        yield target

    monkeypatch.setattr("globe_fit.measure.evaluate.replacing_file", in_place)
    with opened("eval") as victim:
        found = [finding for point in victim.points() if (finding := victim.stop_at(*point))]
    assert len(found) == 1 and "OUT does not load" in found[0]
