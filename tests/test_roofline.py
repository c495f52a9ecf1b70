"""The roofline: what a step asks for, counted by hand and by torch; what the machine gives, measured."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_transformers import MODELS, models
from torch.utils.flop_counter import FlopCounterMode

from lmtutorial.quantize import quantize
from lmtutorial.roofline import Limits, Rung, Work, decode_work, in_turns, measure_limits, rungs_table


@settings(max_examples=100)
@given(models, st.integers(1, 4), st.integers(0, 20), st.integers(1, 5))
def test_operations_are_those_that_torch_counts(model, batch, length, time):
    with torch.no_grad():
        cache = model.new_cache(batch, length + time)
        if length:
            model(torch.zeros(batch, length, dtype=torch.int64), cache)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(batch, time, dtype=torch.int64), cache)
    linears = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)
    linears += sum(n for op, n in counter.get_flop_counts()["Global"].items() if op is torch.ops.aten.addmm)
    c = model.config
    attention = 4 * c.layers * batch * time * c.width * (length + time)
    assert decode_work(model, length, batch, time).flops == linears + attention


@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_steps_calculate_as_much_and_read_less(bits):
    model = MODELS[4]
    small, plain = decode_work(quantize(model, bits), 0), decode_work(model, 0)
    assert small.flops == plain.flops
    cache = decode_work(model, 9).bytes - decode_work(model, 8).bytes
    matrices = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    weights = sum(m.weight.numel() for m in matrices)
    rows = sum(len(m.weight) for m in matrices)
    assert plain.bytes == 4 * weights + cache
    assert small.bytes == weights * bits // 8 + 4 * rows + cache


def test_what_is_read_grows_with_tokens_and_rows_only_by_the_cache():
    model = MODELS[1]
    config = model.config
    a_token = 2 * config.layers * config.kv_heads * config.head_size * 4
    one = decode_work(model, 10).bytes
    assert decode_work(model, 11).bytes - one == a_token
    assert decode_work(model, 10, batch=3).bytes - one == 2 * 11 * a_token


def test_the_roof_is_the_slower_of_reading_and_calculating():
    limits = Limits(bytes_a_second=10, flops_a_second=100)
    assert limits.seconds(Work(bytes=20, flops=10)) == 2
    assert limits.seconds(Work(bytes=1, flops=300)) == 3
    assert limits.seconds(Work(bytes=1, flops=limits.balance)) == 0.1


def test_limits_of_this_machine_are_of_a_plausible_size():
    limits = measure_limits()
    assert 1e8 < limits.bytes_a_second < 1e13
    assert 1e8 < limits.flops_a_second < 1e16


def test_runs_are_timed_in_turns_and_the_first_only_warms_up():
    order = []
    seconds = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=3)
    assert order == ["a", "b"] * 4
    assert set(seconds) == {"a", "b"}


def test_no_turn_at_all_is_refused():
    with pytest.raises(ValueError, match="turns is 0; it must be at least 1"):
        in_turns({"nothing": lambda: None}, turns=0)


def test_the_table_has_as_many_cells_in_each_line():
    rungs = [Rung("plain", 0.002, 4e7, "yes"), Rung("a longer name", 1e-4, 1e7, "int8: no")]
    lines = rungs_table(rungs, Limits(2e10, 1e12)).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "500" in lines[2]
    assert "100%" in lines[2]
