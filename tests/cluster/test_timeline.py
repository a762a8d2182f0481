"""The times of a start."""

from __future__ import annotations

from raylight.cluster.timeline import StartTimes, Timeline


def test_times_count_from_the_beginning_and_are_those_of_the_last_worker() -> None:
    timeline = Timeline()
    timeline.began -= 10
    timeline.mark("met", timeline.began + 3)
    timeline.mark("Ray", timeline.began + 2)
    timeline.ranks = [
        {"actor": timeline.began + 4, "process": timeline.began + 1},
        {"actor": timeline.began + 2.5, "process": timeline.began + 1.5},
    ]
    times = StartTimes.of(timeline, (2, {"torch": 1.0, "numpy": 0.5}))
    assert list(times.session.items()) == [("Ray", 2), ("met", 3)]
    assert list(times.ranks.items()) == [("process", 1.5), ("actor", 4)]
    assert 10 <= times.total_s < 20
    assert str(times) == "Ray 2.0, met 3.0; last worker: process 1.5, actor 4.0; 2 forked; their imports took 1.5"
