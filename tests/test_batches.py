"""Laws of the two orders in which a text is read: nothing lost at a seam, nothing seen twice."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtutorial.batches import IGNORE, SlidingWindows, StreamBatches, WindowBatches, load_tokens, save_tokens

sizes = st.integers(1, 7)
lengths = st.integers(2, 80)
orders = st.sampled_from([StreamBatches, WindowBatches])


def pairs(batches):
    """Every (input, target) of one epoch; tokens are their own positions: a target is its input + 1."""
    return [
        (i, t)
        for inputs, targets, _ in batches
        for i, t in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True)
        if t != IGNORE
    ]


@given(orders, lengths, sizes, sizes)
def test_every_target_is_seen_exactly_once_an_epoch(order, length, batch, time):
    batches = order(range(length), batch, time)
    for _ in range(3):
        assert sorted(pairs(batches)) == [(i, i + 1) for i in range(length - 1)]


@given(orders, lengths, sizes, sizes)
def test_every_batch_has_the_same_shape_and_the_length_is_the_number_of_batches(order, length, batch, time):
    batches = order(range(length), batch, time)
    shapes = [(b.inputs.shape, b.targets.shape) for b in batches]
    assert shapes == [((batch, time), (batch, time))] * len(batches)


@given(lengths, sizes, sizes)
def test_a_stream_row_continues_the_same_row_of_the_batch_before(length, batch, time):
    before = None
    for inputs, targets, continues in StreamBatches(range(length), batch, time):
        assert continues == (before is not None)
        for b in range(batch):
            if before is not None and targets[b, 0] != IGNORE:
                assert inputs[b, 0] == before[b, -1]
        before = targets


@given(orders, lengths, sizes, sizes, st.integers(0, 30))
def test_resuming_from_a_saved_position_gives_the_batches_that_were_left(order, length, batch, time, stop):
    def endless(batches):
        while True:
            yield from batches

    one, other = order(range(length), batch, time), order(range(length), batch, time)
    steps = endless(one)
    for _ in range(stop):
        next(steps)
    other.load_state_dict(one.state_dict())
    rest = endless(other)
    for _ in range(5):
        a, b = next(steps), next(rest)
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.targets, b.targets)
        assert a.continues == b.continues


def test_windows_come_in_an_order_set_by_the_seed_and_new_each_epoch():
    def epochs(seed):
        batches = WindowBatches(range(200), 4, 5, seed)
        return [torch.cat([b.inputs for b in batches]).flatten().tolist() for _ in range(2)]

    assert epochs(0) == epochs(0)
    assert epochs(0)[0] != epochs(0)[1]
    assert epochs(0)[0] != epochs(1)[0]


@given(st.lists(st.integers(0, 70_000), min_size=2, max_size=50))
def test_saved_tokens_come_back_through_a_memory_map_and_feed_batches(tmp_path_factory, ids):
    tokens = load_tokens(save_tokens(tmp_path_factory.mktemp("tokens") / "t.npy", ids))
    assert isinstance(tokens, np.memmap)
    assert tokens.tolist() == ids
    assert tokens.dtype.itemsize <= 4
    inputs, targets, _ = next(iter(StreamBatches(tokens, 1, len(ids) - 1)))
    assert inputs[0].tolist() == ids[:-1]
    assert targets[0].tolist() == ids[1:]


def test_an_array_a_tensor_and_a_list_of_tokens_are_the_same():
    ids = [3, 1, 4, 1, 5]
    batches = [StreamBatches(t, 2, 2) for t in (ids, np.array(ids, np.uint16), torch.tensor(ids))]
    assert len({str([b.inputs.tolist() for b in each]) for each in batches}) == 1


@pytest.mark.parametrize(
    ("tokens", "batch", "time", "message"),
    [
        ([1], 1, 1, "1 tokens"),
        ([1, 2], 0, 1, "batch is 0"),
        ([1, 2], 1, -1, "time is -1"),
        ([1.5, 2.0], 1, 1, "float64"),
        ([[1, 2]], 1, 1, r"\(1, 2\)"),
    ],
)
def test_bad_input_is_refused_with_what_was_given(tokens, batch, time, message):
    with pytest.raises((ValueError, TypeError), match=message):
        WindowBatches(np.array(tokens), batch, time)


def test_negative_ids_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="-1"):
        save_tokens(tmp_path / "t.npy", [0, -1])


@settings(deadline=None)
@given(st.integers(2, 60), st.integers(1, 4), st.integers(1, 12), st.data())
def test_sliding_windows_count_every_target_once_after_enough_of_its_text(length, batch, time, data):
    stride = data.draw(st.integers(1, time))
    counted = []
    for inputs, targets, continues in SlidingWindows(range(length), batch, time, stride):
        assert continues is None
        for row, wanted in zip(inputs.tolist(), targets.tolist(), strict=True):
            for place, target in enumerate(wanted):
                if target != IGNORE:
                    assert row[place] == target - 1
                    assert place + 1 >= min(target, time - stride + 1)
                    counted.append(target)
    assert sorted(counted) == list(range(1, length))


def test_a_stride_over_the_window_is_refused():
    with pytest.raises(ValueError, match="stride is 5; it must be from 1 to time, which is 4"):
        SlidingWindows(range(9), batch=1, time=4, stride=5)
