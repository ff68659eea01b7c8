"""Who decodes when, with lanes that only count; and text up to a stop string."""

from types import SimpleNamespace

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifp_mlx.engine.errors import OutOfMemory
from ifp_mlx.engine.events import CancelToken, Done
from ifp_mlx.engine.forms import Use
from ifp_mlx.engine.lanes import Schedule, Text, Ticket
from ifp_mlx.engine.sampling import Sampling
from ifp_mlx.selection.masks import Selection
from ifp_mlx.selection.request import Request


class Spelling:
    """A tokenizer whose tokens are pieces of text, by number."""

    def __init__(self, pieces):
        self._pieces = pieces
        self.detokenizer = self
        self.last_segment = ""

    def add_token(self, token):
        self.last_segment = self._pieces[token]

    def finalize(self):
        self.last_segment = ""


ALPHABET = st.text("ab c", min_size=1, max_size=4)


@given(st.lists(ALPHABET, max_size=12), st.lists(ALPHABET, max_size=3))
def test_text_ends_before_a_stop_and_is_whole_without(pieces, stops):
    text, whole = Text(Spelling(pieces), tuple(stops)), "".join(pieces)
    shown = ""
    for token in range(len(pieces)):
        shown += text.add(token)
        assert whole.startswith(shown)
        if text.stopped:
            break
    shown += text.finish()
    assert not any(stop in shown for stop in stops)
    if text.stopped:
        assert any(whole[len(shown) :].startswith(stop) for stop in stops)
    else:
        assert shown == whole


class CountingLane:
    """A lane whose requests need so many steps."""

    def __init__(self, use, batch):
        self.use = use
        self.running, self.draining, self._batch = {}, False, batch
        self.steps = 0

    @property
    def full(self):
        return self.draining or len(self.running) >= self._batch

    @property
    def kv_bytes(self):
        return sum(request.kv_bytes for request in self.running.values())

    def admit(self, request):
        self.running[id(request)] = request

    def step(self):
        self.steps += 1
        for key, request in list(self.running.items()):
            request.left -= 1
            if request.stop.cancelled or request.left <= 0:
                del self.running[key]
                request.finish("cancelled" if request.stop.cancelled else "stop")

    def fail(self, error):
        for request in self.running.values():
            request.emit(error)
        self.running.clear()

    def close(self):
        assert not self.running


def crowd(*, budget=2, batch=2, limit=None):
    """Return a schedule of models of weight 1, and the lanes it opened."""
    opened = []

    def open_lane(request):
        lane = CountingLane(request.use, batch)
        opened.append(lane)
        return lane

    return Schedule(open_lane, lambda *masks: len(masks), budget, limit), opened


def request_of(mask, steps, events, kv_bytes=0):
    selection = Selection((mx.array([mask], dtype=mx.int32),), None, 100)
    request = Ticket("x", Request(), Sampling(), CancelToken(), events.append)
    request.use, request.tokens, request.kv_bytes = Use(selection), [1], kv_bytes
    request.left = steps
    return request


def run(schedule, turns=10_000):
    for turn in range(turns):
        if not schedule.busy:
            return turn
        schedule.turn()
    raise AssertionError("it does not end")


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), max_size=20),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_everybody_is_served_once_within_the_budget(crowd_of, budget, batch):
    schedule, _ = crowd(budget=budget, batch=batch)
    events = [[] for _ in crowd_of]
    for (mask, steps), heard in zip(crowd_of, events, strict=True):
        schedule.add(request_of(mask, steps, heard))
    while schedule.busy:
        schedule.turn()
        assert len(schedule.lanes) <= budget
        assert all(len(lane.running) <= batch for lane in schedule.lanes.values())
    for heard in events:
        assert [type(event) for event in heard] == [Done]


def test_masks_that_fit_together_take_every_turn():
    schedule, opened = crowd(budget=3)
    for mask in range(3):
        schedule.add(request_of(mask, 5, []))
    assert run(schedule) == 5
    assert [lane.steps for lane in opened] == [5, 5, 5]


def test_a_stream_of_one_mask_does_not_starve_another():
    schedule, _ = crowd(budget=1, batch=2)
    other = []
    schedule.add(request_of(0, 4, []))
    schedule.add(request_of(1, 4, other))
    for _ in range(12):  # more of the first mask keep coming
        schedule.add(request_of(0, 4, []))
        schedule.turn()
    assert [type(event) for event in other] == [Done]


def test_want_of_memory_holds_back_and_nobody_passes_by():
    schedule, _ = crowd(batch=9, limit=10)
    order = []
    for name, kv_bytes in (("a", 5), ("large", 6), ("small", 1)):
        request = request_of(0, 3, [], kv_bytes)
        request.emit = lambda event, name=name: order.append(name)
        schedule.add(request)
    run(schedule)
    assert order == ["a", "large", "small"]


def test_a_waiting_request_can_be_cancelled():
    schedule, _ = crowd(budget=1)
    events = []
    schedule.add(request_of(0, 5, []))
    waiting = request_of(1, 5, events)
    schedule.add(waiting)
    schedule.turn()
    waiting.stop.cancel()
    schedule.turn()
    assert [event.finish_reason for event in events] == ["cancelled"]


def test_a_lane_that_cannot_open_fails_its_request_alone():
    schedule, _ = crowd()
    opening, events, others = schedule._open, [], []

    def refuse(request):
        if request.use.selection.indices[0].item() == 1:
            raise OutOfMemory("too large")
        return opening(request)

    schedule._open = refuse
    schedule.add(request_of(1, 2, events))
    schedule.add(request_of(2, 2, others))
    run(schedule)
    assert [str(error) for error in events] == ["too large"]
    assert [type(event) for event in others] == [Done]


def test_cancelling_everything_ends_everything():
    schedule, _ = crowd(budget=1)
    events = []
    for mask in (0, 0, 1):
        schedule.add(request_of(mask, 100, events))
    schedule.turn()
    schedule.cancel()
    assert [event.finish_reason for event in events] == ["cancelled"] * 3


def test_failing_everything_tells_everyone():
    schedule, _ = crowd(budget=1)
    events, error = [], SimpleNamespace()
    for mask in (0, 1):
        schedule.add(request_of(mask, 100, events))
    schedule.turn()
    schedule.fail(error)
    assert events == [error, error]
    assert not schedule.busy


@pytest.mark.parametrize("stops", [(), ("never",)])
def test_text_keeps_what_might_have_begun_a_stop(stops):
    text = Text(Spelling(["a ne", "ve"]), stops)
    assert text.add(0) + text.add(1) + text.finish() == "a neve"
