"""Laws of `lmtutorial.tensorfile` and `lmtutorial.checkpoint`: what goes in comes out, or nothing changes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lmtutorial.checkpoint import find_checkpoint, load_checkpoint, load_model, save_checkpoint
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.optimizer_groups import build_optimizer
from lmtutorial.tensorfile import read_tree, write_tree

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    return (torch.randn(shape) * 50).to(draw(st.sampled_from(DTYPES)))


LEAVES = (
    tensors()
    | st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False).map(lambda x: max(min(x, 1e300), -1e300))
)
KEYS = st.text(max_size=4).filter(lambda key: not key.startswith("__"))
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@settings(max_examples=60)
@given(tree=st.dictionaries(KEYS, TREES, max_size=4))
def test_every_tree_comes_back_as_it_was(tree, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    assert same(tree, read_tree(write_tree(path, tree)))


def test_trees_whose_places_would_be_spelled_alike_are_kept_apart(tmp_path):
    tree = {"a": {"b": torch.zeros(1)}, "a.b": torch.ones(2), "": {"a.b": torch.full((3,), 2.0)}}
    assert same(tree, read_tree(write_tree(tmp_path / "x.safetensors", tree)))


def test_tensors_that_share_memory_or_carry_gradients_are_saved_by_value(tmp_path):
    base = torch.arange(6.0, requires_grad=True)
    tree = {"row": base[:3] * 1, "view": base.detach()[1:4], "flipped": base.view(2, 3).T}
    back = read_tree(write_tree(tmp_path / "x.safetensors", tree))
    assert all(torch.equal(tree[name].detach(), back[name]) and not back[name].requires_grad for name in tree)


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": {"b": {1, 2}}}, TypeError, r"a\.b is of type set"),
        ({"a": {3: 1}}, TypeError, r"a has the key 3"),
        ({"a": {"__tensor__": 1}}, TypeError, r"a has the key '__tensor__'"),
        ({"a": float("nan")}, ValueError, "not JSON compliant"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_the_old_file_stays(tmp_path, tree, error, message):
    path = write_tree(tmp_path / "x.safetensors", {"old": 1})
    with pytest.raises(error, match=message):
        write_tree(path, tree)
    assert read_tree(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_disk_that_fails_leaves_the_old_file_and_nothing_beside(tmp_path, monkeypatch):
    path = write_tree(tmp_path / "x.safetensors", {"old": 1})

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_tree(path, {"new": torch.zeros(1000)})
    assert read_tree(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["x.safetensors"]


@settings(max_examples=30)
@given(data=st.data())
def test_a_file_cut_anywhere_is_refused(data, tmp_path_factory):
    path = write_tree(
        tmp_path_factory.mktemp("cut") / "x.safetensors", {"weight": torch.randn(50), "step": 3}
    )
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        read_tree(path)


def test_a_pickle_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(Trap(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged, or no safetensors file"):
        load_model(tmp_path / "model.safetensors")
    assert not (tmp_path / "sprung").exists()


def trained(config, steps=3):
    torch.manual_seed(1)
    model = LSTM(config)
    optimizer = build_optimizer(model, 1e-2, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randint(config.vocab_size, (2, 5))).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_model_and_its_optimizer_come_back_bit_for_bit(tmp_path, tied, layers):
    config = LSTMConfig(vocab_size=11, width=6, layers=layers, dropout=0.2, tied=tied)
    model, optimizer = trained(config)
    path = save_checkpoint(tmp_path / "x.safetensors", model=model, optimizer=optimizer, state={"step": 3})
    other = LSTM(config)
    again = build_optimizer(other, 1e-2, weight_decay=0.1)
    assert load_checkpoint(path, model=other, optimizer=again) == {"step": 3}
    assert same(model.state_dict(), other.state_dict())
    assert same(list(optimizer.state_dict()["state"].values()), list(again.state_dict()["state"].values()))
    assert (other.head.weight is other.embedding.weight) == tied


def test_a_model_is_rebuilt_from_the_file_alone_in_a_fresh_process(tmp_path):
    model, _ = trained(LSTMConfig(vocab_size=11, width=6, layers=2, tied=False))
    path = save_checkpoint(tmp_path / "x.safetensors", model=model)
    program = (
        "import sys, torch; from lmtutorial.checkpoint import load_model; "
        "print(load_model(sys.argv[1])(torch.arange(11)[None]).double().flatten().tolist())"
    )
    output = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    expected = model.eval()(torch.arange(11)[None]).double().flatten().tolist()
    assert json.loads(output.stdout) == pytest.approx(expected, abs=1e-5)


def test_a_tied_head_is_stored_once(tmp_path):
    model, _ = trained(LSTMConfig(vocab_size=11, width=6))
    stored = read_tree(save_checkpoint(tmp_path / "x.safetensors", model=model))["model"]
    assert "head.weight" not in stored
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in model.parameters())


def test_what_does_not_fit_is_refused_with_both_shapes_and_nothing_changes(tmp_path):
    model, optimizer = trained(LSTMConfig(vocab_size=11, width=6))
    path = save_checkpoint(tmp_path / "x.safetensors", model=model, optimizer=optimizer)
    other, other_optimizer = trained(LSTMConfig(vocab_size=12, width=6))
    before = [t.clone() for t in other.state_dict().values()]
    with pytest.raises(
        ValueError, match=r"embedding\.weight has shape \(11, 6\) in the file and \(12, 6\) in"
    ):
        load_checkpoint(path, model=other, optimizer=other_optimizer)
    assert same(before, list(other.state_dict().values()))


def test_missing_and_unknown_tensors_are_named(tmp_path):
    path = save_checkpoint(tmp_path / "x.safetensors", model=nn.Linear(3, 2, bias=False))
    with pytest.raises(ValueError, match=r"bias \(2,\) is in the model but not in the file"):
        load_checkpoint(path, model=nn.Linear(3, 2))
    path = save_checkpoint(tmp_path / "x.safetensors", model=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"bias \(2,\) is in the file but not in the model"):
        load_checkpoint(path, model=nn.Linear(3, 2, bias=False))


def test_an_optimizer_that_does_not_fit_is_refused_and_nothing_changes(tmp_path):
    model, optimizer = trained(LSTMConfig(vocab_size=11, width=6))
    path = save_checkpoint(tmp_path / "x.safetensors", model=model)
    fresh = LSTM(model.config)
    before = [t.clone() for t in fresh.state_dict().values()]
    with pytest.raises(ValueError, match="holds no optimizer"):
        load_checkpoint(path, model=fresh, optimizer=build_optimizer(fresh, 1e-2))
    optimizer.state[model.head.bias]["exp_avg"] = torch.zeros(4)
    save_checkpoint(path, model=model, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"exp_avg of head\.bias has shape \(4,\), the parameter \(11,\)"):
        load_checkpoint(path, model=fresh, optimizer=build_optimizer(fresh, 1e-2))
    assert same(before, list(fresh.state_dict().values()))


def test_other_safetensors_files_and_unknown_kinds_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not one of lmtutorial's"):
        load_model(tmp_path / "other.safetensors")
    path = save_checkpoint(tmp_path / "x.safetensors", model=nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"holds a model of kind 'Linear'; lstm, transformer can be built"):
        load_model(path)
    with pytest.raises(FileNotFoundError, match=r"missing\.safetensors"):
        load_model(tmp_path / "missing.safetensors")
    tree = read_tree(path)
    with pytest.raises(ValueError, match="version 99"):
        load_checkpoint(write_tree(path, {**tree, "version": 99}), model=nn.Linear(3, 2))


def test_a_folder_stands_for_the_first_checkpoint_in_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no best\.safetensors or last\.safetensors"):
        find_checkpoint(tmp_path, "best", "last")
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        find_checkpoint(tmp_path / "nowhere", "best")
    last = save_checkpoint(tmp_path / "last.safetensors", model=nn.Linear(1, 1))
    assert find_checkpoint(tmp_path, "best", "last") == last == find_checkpoint(last, "best")
    best = save_checkpoint(tmp_path / "best.safetensors", model=nn.Linear(1, 1))
    assert find_checkpoint(str(tmp_path), "best", "last") == best


WRITER = """
import sys, torch
from lmtutorial.tensorfile import write_tree
number = 0
while True:
    write_tree(sys.argv[1], {"number": number, "tensor": torch.full((200_000,), float(number))})
    if number == 0: print("first", flush=True)
    number += 1
"""


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")
def test_kill_9_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.safetensors"
    rng = random.Random(0)
    seen = set()
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "first\n"
        time.sleep(rng.uniform(0.0, 0.25))
        child.send_signal(signal.SIGKILL)
        child.communicate()
        tree = read_tree(path)
        assert torch.equal(tree["tensor"], torch.full((200_000,), float(tree["number"])))
        assert {Path(name).name for name in os.listdir(tmp_path)} <= {path.name, path.name + ".partial"}
        seen.add(tree["number"])
    write_tree(path, {"number": -1})
    assert os.listdir(tmp_path) == [path.name]
    assert max(seen) > 0
