from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_graphs import FakeBackend, cpu_as_device
from torch import Tensor

from raylight.parallel import heartbeat
from raylight.parallel.graph_capture import Cost
from raylight.parallel.graph_inputs import WatchedOptions
from raylight.parallel.graph_pool import GraphPool
from raylight.parallel.graphs import ForwardGraphs


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with cpu_as_device(), torch.inference_mode():
        yield


class Model:
    """A forward of two tensors and options; `graphs` is its graphs."""

    def __init__(self, largest_number: int = 6) -> None:
        self.backend = FakeBackend()
        self.pool = GraphPool(self.backend, largest_number)
        self.resets = 0
        self.graphs = ForwardGraphs("Model", self.forward, self.reset, self.pool)
        self.context = "context"
        self.always = True

    def reset(self) -> None:
        self.resets += 1

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
        x, scale = args
        for item in kwargs.get("control", {}).get("output", []):
            x = x + item
        return x * scale * options.get("factor", 1)

    def __call__(self, x: Tensor, scale: Any = 2, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        return self.graphs.call(self.context, list, self.always, (x, scale), kwargs, options or {})

    def often(self, times: int, *args: Any, **kwargs: Any) -> None:
        for _ in range(times):
            self(*args, **kwargs)

    @property
    def counts(self) -> tuple[int, int]:
        return self.backend.captures, self.backend.replays


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape)


def test_replays_from_the_third_call_on_with_the_content_of_each() -> None:
    model = Model()
    for call in range(5):
        x, added = drawn(2, 3), drawn(2, 3)
        control = {"output": [added, None][:1]}
        assert torch.equal(model(x, control=control), (x + added) * 2)
        assert model.counts == ((0, 0) if call < 2 else (1, call - 1))


def test_an_output_is_not_changed_by_the_next_replay() -> None:
    model = Model()
    model.often(2, drawn(3))
    x = drawn(3)
    first = model(x)
    kept = first.clone()
    model(drawn(3))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "a number", "context", "structure", "mode"])
def test_captures_anew_for_another(change: str) -> None:
    model = Model()
    x = drawn(2, 2)
    model.often(4, x, control={"output": [x]})
    assert model.counts == (1, 2)
    control, scale = {"output": [x]}, 2
    if change == "context":
        model.context = "another"
    if change == "structure":
        control = {"output": [x, x]}
    other = {"shape": drawn(3, 2), "stride": x.T, "dtype": x.double()}.get(change, x)
    if change in ("shape", "stride", "dtype"):
        control = {"output": [other]}
    scale = 3 if change == "a number" else 2
    with torch.inference_mode(change != "mode"), torch.no_grad():
        expected = model.forward((other, scale), {"control": control}, {})
        for _ in range(4):
            assert torch.equal(model(other, scale, control=control), expected)
    assert model.counts == (2, 4)


def test_options_that_are_not_read_may_change() -> None:
    model = Model()
    for step in range(5):
        model(drawn(2), options={"factor": 3, "step": step, "lock": object(), "sigmas": drawn(step + 1)})
    assert model.counts == (1, 3)


def test_options_that_are_read_make_another_graph() -> None:
    model = Model()
    x = drawn(2)
    for factor in (3, 3, 3, 4, 4, 4, 3, 4):
        assert torch.equal(model(x, options={"factor": factor}), x * 2 * factor)
    assert model.counts == (2, 5)  # 4 was recorded once more, not run as it is


def test_an_option_that_changes_each_time_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    x = drawn(2)
    with caplog.at_level(logging.INFO, "raylight"):
        for factor in range(12):
            assert torch.equal(model(x, options={"factor": factor}), x * 2 * factor)
    assert model.counts == (0, 0)
    assert "changes each time (factor)" in caplog.text


class Counting(Model):
    """A forward that counts in its options."""

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
        options["state"]["count"] += 1
        return super().forward(args, kwargs, options) * options["state"]["count"]


def test_what_a_forward_changes_in_its_options_is_not_frozen(caplog: pytest.LogCaptureFixture) -> None:
    model, x, options = Counting(), drawn(2), {"state": {"count": 0}, "lock": object()}
    with caplog.at_level(logging.INFO, "raylight"):
        for call in range(5):
            assert torch.equal(model(x, options=options), x * 2 * (call + 1))
    assert model.counts == (0, 0)
    assert "it changes what it is given in its options (state)" in caplog.text


def test_tensors_among_options_are_copied() -> None:
    model = Model()
    for _ in range(4):
        x, factor = drawn(2), drawn(2)
        assert torch.equal(model(x, options={"factor": factor}), x * 2 * factor)
    assert model.counts == (1, 2)


def test_an_object_of_an_unknown_kind_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    with caplog.at_level(logging.INFO, "raylight"):
        model.often(4, drawn(2), of=lambda: None)
    assert model.counts == (0, 0)
    assert caplog.text.count("an input is a builtins.function") == 1


def test_random_numbers_are_not_captured() -> None:
    model = Model()
    model.graphs = ForwardGraphs("Model", lambda args, *_: args[0] * torch.rand(1), model.reset, model.pool)
    results = [model(torch.ones(1)).item() for _ in range(5)]
    assert len(set(results)) == 5
    assert model.graphs.reasons == {"it draws random numbers"}


def test_a_failed_capture_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    model.backend.fails = RuntimeError("not here\nand more")
    state = torch.get_rng_state()
    x = torch.ones(2)
    with caplog.at_level(logging.INFO, "raylight"):
        for _ in range(6):
            assert torch.equal(model(x), x * 2)
    assert (model.counts, model.resets) == ((1, 0), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert "it cannot be captured: RuntimeError: not here" in caplog.text
    model.backend.fails = None
    model.often(4, drawn(5))  # others are
    assert model.backend.replays == 2


def test_memory_that_is_short() -> None:
    model = Model()
    model.backend.room = 0
    model.often(4, drawn(2))
    assert model.counts == (0, 0)
    assert any("of GPU memory are missing" in reason for reason in model.graphs.reasons)


def test_graphs_that_do_not_fit_beside_each_other_do_not_take_turns_for_ever() -> None:
    model = Model()
    model.backend.room = 1
    small, large = drawn(2), drawn(3)
    for _ in range(40):
        assert torch.equal(model(small), small * 2)
        assert torch.equal(model(large), large * 2)
    assert model.backend.captures < 10
    assert model.backend.held_bytes <= 1


def test_the_least_recently_used_graph_goes() -> None:
    model = Model(largest_number=2)
    one, two, three = drawn(1), drawn(2), drawn(3)
    for x in (one, two):
        model.often(3, x)
    model(one)
    model.often(3, three)  # instead of two
    captures, replays = model.counts
    model(one)
    assert model.counts == (captures, replays + 1)
    model(two)
    assert model.counts == (captures, replays + 1)


def test_many_sizes_hold_few_graphs() -> None:
    model = Model(largest_number=3)
    for size in range(1, 200):
        model.often(3, drawn(size))
    assert len(model.pool._graphs) <= 3
    assert len(model.graphs._kinds) <= 64


def test_a_long_forward_is_captured_only_on_demand() -> None:
    model = Model()
    model.always, model.backend.cost = False, Cost(0.1, 2.0, 1)
    model.often(5, drawn(2))
    assert model.counts == (0, 0)
    assert any("would gain little" in reason for reason in model.graphs.reasons)
    model.graphs.clear()
    model.always = True
    model.often(5, drawn(2))
    assert model.counts == (1, 3)


def test_graphs_that_are_dropped_give_their_memory_back() -> None:
    model, x = Model(), drawn(2)
    model.often(4, x)
    model.pool.drop_all()
    assert (model.backend.releases, model.pool.held_bytes) == (1, 0)
    model.often(3, x)
    assert model.counts == (2, 3)
    model.graphs.clear()
    assert model.backend.releases == 2


def test_graphs_that_are_dropped_after_each_run_are_captured_again() -> None:
    """As on a GPU that ComfyUI needs, too."""
    model, x = Model(), drawn(2)
    for _ in range(6):
        model.often(4, x)
        model.pool.drop_all()
    assert model.counts == (6, 12)
    assert not model.graphs.reasons


def test_a_graph_that_makes_room_is_gone_before_the_next_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Model(), drawn(2)
    model.often(3, x, options={"factor": 3})
    ((graph, _),) = model.pool._graphs.values()
    first = weakref.ref(graph.captured)
    del graph
    # Its memory is free when nothing refers to it any more.
    monkeypatch.setattr(model.backend, "shortage", lambda cost: 1 if first() else 0, raising=False)
    model.often(3, x, options={"factor": 4})
    assert model.backend.captures == 2
    assert not model.graphs.reasons


@pytest.mark.parametrize("fails", [False, True])
def test_a_rank_shows_the_progress_of_one_without_graphs(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are compared by their collectives and heartbeats, and one may capture what another runs as it is."""
    group = "group", "[0, 1]", "cuda"
    counted = 0  # by PyTorch

    def forward(args: tuple[Any, ...], *_: Any) -> Tensor:
        nonlocal counted
        counted += 3
        heartbeat.beat()
        return args[0] * 2

    def capture(function: Callable[[], Any]) -> Any:
        output = function()
        if fails:
            raise RuntimeError("not here")
        return SimpleNamespace(replay=lambda: output)

    monkeypatch.setattr(heartbeat, "_of_graphs", {})
    monkeypatch.setattr(heartbeat, "begun", lambda: {group: counted + heartbeat._of_graphs.get(group, 0)})
    model = Model()
    model.graphs = ForwardGraphs("Model", forward, model.reset, model.pool)
    monkeypatch.setattr(model.backend, "capture", capture)
    before = heartbeat.beats()
    for call in range(1, 7):
        model(torch.ones(2))
        assert (heartbeat.beats() - before, heartbeat.begun()) == (call, {group: 3 * call})
    assert model.pool.replays == (0 if fails else 4)


def test_options_tell_what_was_read() -> None:
    options = WatchedOptions({"a": 1, "b": 2, "c": 3, "uuids": 4})
    options["own"] = 5
    assert (options["own"], options.get("a"), "missing" in options) == (5, 1, False)
    copy = options.copy()
    copy["b"] = 6
    assert copy["b"] == 6
    assert options.reads == {"a", "missing"}
    assert {**options} == {"a": 1, "b": 2, "c": 3, "uuids": 4, "own": 5}
    assert options.reads >= {"a", "b", "c", "*"}
