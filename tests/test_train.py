"""Laws of the training loop: it is plain training, goes on where it stopped, and keeps what was good."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmtutorial.batches import Batch, StreamBatches, WindowBatches
from lmtutorial.checkpoint import load_checkpoint, load_model
from lmtutorial.devices import cpu_computes_lstm_in_bfloat16
from lmtutorial.metrics import evaluate
from lmtutorial.models.lstm import LSTM, LSTMConfig
from lmtutorial.models.transformer import Transformer, TransformerConfig
from lmtutorial.tensorfile import read_tree
from lmtutorial.train import TrainConfig, train

VOCAB = 11
TOKENS = torch.randint(VOCAB, (150,), generator=torch.Generator().manual_seed(0)).tolist()
HELD_OUT = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()


def lstm(dropout=0.3, seed=0):
    torch.manual_seed(seed)
    return LSTM(LSTMConfig(vocab_size=VOCAB, width=8, layers=2, dropout=dropout))


def streams():
    return StreamBatches(TOKENS, batch=3, time=8)  # 7 batches an epoch


def windows():
    return WindowBatches(TOKENS, batch=3, time=8, seed=5)


def held_out():
    return StreamBatches(HELD_OUT, batch=2, time=10)


def losses(history):
    return history.step, history.train_loss, history.validation_loss, history.learning_rate


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("carry", [True, False])
def test_the_loop_is_plain_training_written_out(carry):
    """AdamW, clipping, cosine and truncated BPTT, against the same in a dozen plain lines."""
    model, reference = lstm(dropout=0.0).double(), lstm(dropout=0.0).double()
    config = TrainConfig(
        steps=10, learning_rate=0.05, warmup=3, floor=0.1, weight_decay=0.2, clip=0.01, log_every=1
    )
    history = train(model, streams() if carry else windows(), config)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in reference.named_parameters() if p.dim() == 2 and n.startswith("lstm")]},
            {
                "params": [p for n, p in reference.named_parameters() if p.dim() < 2 or "embed" in n],
                "weight_decay": 0.0,
            },
        ],
        weight_decay=0.2,
        betas=(0.9, 0.99),
    )
    state, expected = None, []
    epochs = streams() if carry else windows()
    batches = (batch for _ in range(3) for batch in epochs)
    for step in range(10):
        inputs, targets, continues = next(batches)
        state = tuple(s.detach() for s in state) if continues else None
        x, state = reference.lstm(reference.embedding(inputs), state)
        loss = F.cross_entropy(reference.head(x).flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
        for p in reference.parameters():
            p.grad *= min(1.0, 0.01 / (norm.item() + 1e-6))
        share = (step - 3) / 7
        warm, cosine = (step + 1) / 3, 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (warm if step < 3 else cosine)
        optimizer.step()
        expected.append(loss.item())
    assert history.train_loss == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "stop", "precision"),
    [(streams, stop, "float32") for stop in (1, 5, 7, 9)]
    + [(windows, 5, "float32"), (windows, 7, "float32")]
    + [(streams, 5, "bfloat16")] * cpu_computes_lstm_in_bfloat16(),
)
def test_ten_steps_are_some_and_a_resume_bit_for_bit(tmp_path, make, stop, precision):
    """With dropout, a carried state, an epoch's end at step 7, and rows that straddle the seam."""
    config = TrainConfig(
        steps=10, warmup=3, log_every=3, eval_every=4, precision=precision, out=tmp_path / "whole"
    )
    whole, model = lstm(), lstm()
    expected = train(whole, make(), config, validation=held_out())

    config = dataclasses.replace(config, out=tmp_path / "halves", save_every=stop)

    class StopError(Exception):
        pass

    class Stopping:
        """Batches that break off after `stop` of them, as a crash would."""

        def __init__(self):
            self.batches, self.given = make(), 0
            self.state_dict, self.load_state_dict = self.batches.state_dict, self.batches.load_state_dict

        def __iter__(self):
            for batch in self.batches:
                if self.given == stop:
                    raise StopError
                self.given += 1
                yield batch

    with pytest.raises(StopError):
        train(model, Stopping(), config, validation=held_out())
    torch.rand(7)  # whatever happens in between
    again = lstm(seed=9)
    history = train(again, make(), config, validation=held_out(), resume=tmp_path / "halves")
    assert losses(history) == losses(expected)
    assert torch.equal(weights(again), weights(whole))
    a, b = (read_tree(tmp_path / name / "last.safetensors") for name in ("whole", "halves"))
    for name, moments in a["optimizer"].items():
        assert all(torch.equal(moments[key], b["optimizer"][name][key]) for key in moments)
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("whole", "halves")]
    steps = [[(json.loads(row)["step"], json.loads(row)["train_loss"]) for row in log] for log in logs]
    assert steps[0] == steps[1]


CHILD = """
import pathlib, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_train import *
out = pathlib.Path(sys.argv[2])
config = TrainConfig(steps=300, warmup=3, log_every=3, eval_every=50, save_every=1, out=out)
train(lstm(), streams(), config, validation=held_out(), on_log=lambda row: print(row["step"], flush=True))
"""


def start_child(out):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, os.path.dirname(__file__), str(out)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "3\n"
    return child


@pytest.mark.skipif(os.name != "posix", reason="kill -9 is a POSIX signal")
def test_resume_after_kill_9_is_bit_for_bit(tmp_path):
    config = TrainConfig(
        steps=300, warmup=3, log_every=3, eval_every=50, save_every=300, out=tmp_path / "whole"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = lstm()
        expected = train(whole, streams(), config, validation=held_out())
        child = start_child(tmp_path / "killed")
        time.sleep(0.1)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        at = read_tree(tmp_path / "killed" / "last.safetensors")["state"]["step"]
        assert 3 <= at < 300
        again = lstm(seed=9)
        config = dataclasses.replace(config, out=tmp_path / "killed")
        history = train(again, streams(), config, validation=held_out(), resume=tmp_path / "killed")
    finally:
        torch.set_num_threads(threads)
    assert losses(history) == losses(expected)
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_ends_between_two_updates_with_a_checkpoint(tmp_path):
    config = TrainConfig(steps=300, log_every=2, out=tmp_path)
    whole, model = lstm(), lstm()
    train(whole, streams(), dataclasses.replace(config, out=None))

    def press(row):
        if row["step"] == 6:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    history = train(model, streams(), config, on_log=press)
    assert history.stopped == "interrupted"
    assert history.step[-1] == 6
    assert signal.getsignal(signal.SIGINT) is handler
    history = train(model, streams(), config, resume=tmp_path)
    assert history.stopped == "steps"
    assert torch.equal(weights(model), weights(whole))


def test_a_second_ctrl_c_interrupts_at_once(tmp_path):
    def press(row):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        train(lstm(), streams(), TrainConfig(steps=9, log_every=2), on_log=press)


def test_training_works_outside_the_main_thread():
    done = []
    thread = threading.Thread(target=lambda: done.append(train(lstm(), streams(), TrainConfig(steps=3))))
    thread.start()
    thread.join()
    assert done[0].stopped == "steps"


def test_a_run_that_reached_its_end_resumes_to_nothing_and_more_steps_go_on(tmp_path):
    config = TrainConfig(steps=5, schedule="constant", log_every=1, out=tmp_path)
    model, whole = lstm(), lstm()
    train(model, streams(), config)
    assert train(model, streams(), config, resume=tmp_path).step == [1, 2, 3, 4, 5]
    config = dataclasses.replace(config, steps=10)
    history = train(model, streams(), config, resume=tmp_path)
    expected = train(whole, streams(), dataclasses.replace(config, out=None))
    assert losses(history) == losses(expected)
    assert torch.equal(weights(model), weights(whole))


def test_early_stopping_keeps_the_best_checkpoint_and_says_when(tmp_path):
    config = TrainConfig(
        steps=500,
        learning_rate=0.05,
        schedule="constant",
        eval_every=5,
        patience=3,
        log_every=5,
        out=tmp_path,
    )
    history = train(lstm(dropout=0.0), streams(), config, validation=held_out())
    looks = dict(zip(history.step, history.validation_loss, strict=True))
    assert history.stopped == "patience"
    assert history.step[-1] == history.best_step + 15
    assert history.best_loss == min(looks.values()) == looks[history.best_step]
    best = evaluate(load_model(tmp_path / "best.safetensors"), held_out()).loss
    last = evaluate(load_model(tmp_path / "last.safetensors"), held_out()).loss
    assert best == pytest.approx(history.best_loss, rel=1e-6)
    assert last == pytest.approx(history.validation_loss[-1], rel=1e-6)
    assert last > best


def test_a_loss_that_is_no_longer_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    class Poisoned(LSTM):
        def forward(self, tokens, cache=None):
            logits = super().forward(tokens, cache)
            self.seen = getattr(self, "seen", 0) + 1
            return logits * (math.nan if self.seen > 6 else 1.0)

    torch.manual_seed(0)
    model = Poisoned(LSTMConfig(vocab_size=VOCAB, width=8))
    config = TrainConfig(steps=50, save_every=2, log_every=1000, out=tmp_path)
    with pytest.raises(FloatingPointError, match=r"after step 8: .* is from step 6"):
        train(model, streams(), config)
    good = LSTM(LSTMConfig(vocab_size=VOCAB, width=8))
    assert load_checkpoint(tmp_path / "last.safetensors", model=good)["step"] == 6
    assert weights(good).isfinite().all()
    with pytest.raises(FloatingPointError, match="train_loss became nan"):
        train(model, streams(), dataclasses.replace(config, out=None, log_every=1))


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    """The update of a step may spoil the weights after its loss was still finite."""
    model = lstm()

    def spoil(row):
        if row["step"] == 4:
            with torch.no_grad():
                model.head.bias[0] = math.inf

    with pytest.raises(FloatingPointError, match="a weight is no longer finite"):
        train(model, streams(), TrainConfig(steps=9, log_every=1, save_every=2, out=tmp_path), on_log=spoil)
    assert read_tree(tmp_path / "last.safetensors")["state"]["step"] == 2


class Bigram(torch.nn.Module):
    """Logits from the last token alone, through a matrix product that autocast lowers on any device."""

    context, vocab_size, device = None, VOCAB, torch.device("cpu")

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.hidden = torch.nn.Linear(VOCAB, 8)
        self.head = torch.nn.Linear(8, VOCAB)
        self.types = set()

    def forward(self, tokens, cache=None):
        logits = self.head(self.hidden(F.one_hot(tokens, VOCAB).float()).tanh())
        self.types.add(logits.dtype)
        return logits


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_lower_precision_learns_the_same_and_keeps_float32_weights(precision, monkeypatch):
    exact, model = Bigram(), Bigram()
    config = TrainConfig(steps=30, learning_rate=0.02, log_every=10, precision="float32")
    expected = train(exact, windows(), config)
    monkeypatch.setattr("lmtutorial.update.choose_precision", lambda *_: precision)
    history = train(model, windows(), config)
    assert model.types == {precision}
    assert history.train_loss == pytest.approx(expected.train_loss, rel=0.02)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_bfloat16_trains_the_lstm_or_says_before_the_first_step_that_this_cpu_cannot():
    config = TrainConfig(steps=30, learning_rate=0.02, log_every=10, precision="float32")
    expected = train(lstm(dropout=0.0), streams(), config)
    config = dataclasses.replace(config, precision="bfloat16")
    if cpu_computes_lstm_in_bfloat16():
        history = train(lstm(dropout=0.0), streams(), config)
        assert history.train_loss == pytest.approx(expected.train_loss, rel=0.02)
    else:
        with pytest.raises(ValueError, match="'bfloat16', in which torch computes no LSTM on this CPU"):
            train(lstm(dropout=0.0), streams(), config)


def test_a_cpu_without_lstms_in_bfloat16_refuses_them_and_no_other_model(monkeypatch):
    monkeypatch.setattr("lmtutorial.update.cpu_computes_lstm_in_bfloat16", lambda: False)
    config = TrainConfig(steps=2, precision="bfloat16")
    with pytest.raises(ValueError, match="it must be float32, or auto"):
        train(lstm(), streams(), config)
    assert train(Bigram(), windows(), config).stopped == "steps"


def test_float16_resumes_with_its_loss_scale(tmp_path, monkeypatch):
    monkeypatch.setattr("lmtutorial.update.choose_precision", lambda *_: torch.float16)
    config = TrainConfig(steps=8, schedule="constant", log_every=1)
    whole, model = Bigram(), Bigram()
    train(whole, windows(), dataclasses.replace(config, out=tmp_path / "a"))
    half = dataclasses.replace(config, out=tmp_path / "b")
    train(model, windows(), dataclasses.replace(half, steps=4))
    train(model, windows(), half, resume=tmp_path / "b")
    a, b = (read_tree(tmp_path / name / "last.safetensors")["state"]["scaler"] for name in "ab")
    assert a["_growth_tracker"] > 4
    assert a == b
    assert torch.equal(weights(model), weights(whole))


def test_a_time_limit_ends_the_run_and_the_cosine_with_it():
    config = TrainConfig(steps=None, max_seconds=0.6, learning_rate=0.01, warmup=2, floor=0.0, log_every=1)
    history = train(lstm(), streams(), config)
    assert history.stopped == "time"
    assert 0.6 <= history.seconds[-1] < 3
    assert max(history.learning_rate) == pytest.approx(0.01, rel=0.2)
    assert history.learning_rate[-1] < 0.002


def test_the_log_is_json_lines_of_the_history(tmp_path):
    rows = []
    config = TrainConfig(steps=10, log_every=4, eval_every=5, out=tmp_path)
    history = train(lstm(), streams(), config, validation=held_out(), on_log=rows.append)
    assert history.step == [4, 5, 8, 10]
    assert [loss is not None for loss in history.validation_loss] == [False, True, False, True]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == rows
    assert history.rows() == rows


def test_the_train_loss_is_total_nats_over_total_tokens():
    """The last batch of an epoch holds fewer targets; a mean of means would weigh it too much."""
    batches, model = StreamBatches(TOKENS[:20], batch=1, time=8), lstm(dropout=0.0)
    expected = evaluate(model, batches).loss
    history = train(model, batches, TrainConfig(steps=3, learning_rate=1e-12, log_every=3, warmup=0))
    assert history.train_loss == [pytest.approx(expected, rel=1e-5)]


def test_batches_without_a_target_are_passed_over():
    empty = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.full((2, 3), -100), None)
    full = Batch(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64), None)
    a, b = lstm(), lstm()
    train(a, [empty, full, empty], TrainConfig(steps=4, log_every=1))
    train(b, [full], TrainConfig(steps=4, log_every=1))
    assert torch.equal(weights(a), weights(b))
    with pytest.raises(ValueError, match="batches held no target"):
        train(a, [empty], TrainConfig(steps=4))


def test_training_neither_reads_nor_moves_the_random_numbers_of_its_caller():
    torch.manual_seed(3)
    expected = torch.rand(3)
    results = []
    for seed in (3, 4):
        model = lstm()
        torch.manual_seed(seed)
        train(model, streams(), TrainConfig(steps=3))
        results.append(weights(model))
        if seed == 3:
            assert torch.equal(torch.rand(3), expected)
    assert torch.equal(*results)


def test_a_new_run_in_an_old_folder_leaves_no_old_checkpoint(tmp_path):
    config = TrainConfig(steps=4, eval_every=2, out=str(tmp_path))
    train(lstm(), streams(), config, validation=held_out())
    train(lstm(), streams(), config)
    assert not (tmp_path / "best.safetensors").exists()


def test_what_cannot_be_resumed_is_refused(tmp_path):
    config = TrainConfig(steps=4, eval_every=2, out=tmp_path)
    train(lstm(), streams(), config, validation=held_out())
    with pytest.raises(ValueError, match="a list of batches cannot be resumed"):
        train(lstm(), list(streams()), config, resume=tmp_path)
    with pytest.raises(ValueError, match="the file holds no optimizer"):
        train(lstm(), streams(), config, resume=tmp_path / "best.safetensors")
    wide = LSTM(LSTMConfig(vocab_size=VOCAB, width=9, layers=2))
    with pytest.raises(ValueError, match=r"embedding\.weight has shape \(11, 8\) in the file and \(11, 9\)"):
        train(wide, streams(), config, resume=tmp_path)
    assert (tmp_path / "last.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be at least 1"),
        ({"steps": None}, "steps, max_seconds and max_tokens are all None"),
        ({"max_seconds": -1.0}, r"max_seconds is -1\.0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"learning_rate": 0.0}, r"learning_rate is 0\.0"),
        ({"clip": 0.0}, r"clip is 0\.0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"floor": 2.0}, r"floor is 2\.0"),
        ({"patience": 0}, "patience is 0"),
        ({"schedule": "step"}, "schedule is 'step'; it must be one of constant, cosine, linear, wsd"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; it must be one of adamw, muon"),
        ({"skip_spikes": 1.0}, r"skip_spikes is 1\.0; it must be above 1"),
        ({"ema": 1.0}, r"ema is 1\.0; it is a decay"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"tensorboard": True}, "give a folder"),
        ({"precision": "int8"}, "precision is 'int8'; it must be one of auto"),
        ({"weight_decay": -1.0}, r"weight_decay is -1\.0"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0\.9, 1\.0\)"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_with_the_value(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def transformer(**options):
    torch.manual_seed(0)
    return Transformer(TransformerConfig(VOCAB, context=8, width=16, layers=2, heads=2, **options)).double()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "make", [transformer, lambda: lstm(dropout=0.0).double()], ids=["transformer", "lstm"]
)
def test_batches_that_are_accumulated_equal_one_large_batch(make, optimizer):
    """Also where they hold different numbers of targets: the sum is divided once, by all of them."""
    options = {"steps": 6, "warmup": 0, "clip": 0.1, "log_every": 1, "optimizer": optimizer}
    whole, parts = make(), make()
    rows = list(WindowBatches(TOKENS, batch=4, time=8))
    halves = [Batch(b.inputs[half], b.targets[half]) for b in rows for half in (slice(2), slice(2, 4))]
    one = train(whole, rows, TrainConfig(**options))
    two = train(parts, halves, TrainConfig(**options, accumulation=2))
    assert one.train_loss == pytest.approx(two.train_loss)
    assert one.gradient_norm == pytest.approx(two.gradient_norm)
    tolerance = 1e-9 if optimizer == "adamw" else 1e-2  # Muon computes in bfloat16
    torch.testing.assert_close(weights(whole), weights(parts), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "options", [{"optimizer": "muon"}, {"ema": 0.9}, {"accumulation": 2}, {"skip_spikes": 3.0}]
)
def test_every_way_to_train_goes_on_bit_for_bit(tmp_path, options):
    config = TrainConfig(steps=10, warmup=3, log_every=3, eval_every=5, schedule="constant", **options)
    whole, model = transformer(dropout=0.3), transformer(dropout=0.3)
    expected = train(whole, windows(), config, validation=windows())
    begun = dataclasses.replace(config, steps=5, out=tmp_path)
    train(transformer(dropout=0.3), windows(), begun, validation=windows())
    history = train(model, windows(), config, validation=windows(), resume=tmp_path)
    assert torch.equal(weights(model), weights(whole))
    assert history.validation_loss[-1] == expected.validation_loss[-1]


def test_the_average_of_the_weights_is_what_is_measured_kept_and_left_in_the_model(tmp_path):
    decay, steps = 0.8, 12
    config = TrainConfig(steps=1, schedule="constant", warmup=0, learning_rate=0.05)
    plain, average, trail = lstm(dropout=0.0), None, []
    average = weights(plain)
    for step in range(steps):  # the run without an average, looked at after each update
        trail = lstm(dropout=0.0)
        train(trail, streams(), dataclasses.replace(config, steps=step + 1))
        average = average + (1 - min(decay, (1 + step) / (10 + step))) * (weights(trail) - average)
    averaged = lstm(dropout=0.0)
    config = dataclasses.replace(config, steps=steps, ema=decay, out=tmp_path, eval_every=steps)
    history = train(averaged, streams(), config, validation=held_out())
    torch.testing.assert_close(weights(averaged), average, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights(load_model(tmp_path / "best.safetensors")), weights(averaged))
    torch.testing.assert_close(weights(load_model(tmp_path / "last.safetensors")), weights(trail))
    assert history.validation_loss[-1] == pytest.approx(evaluate(averaged, held_out()).loss)


class Poisoned:
    """Batches of which one makes the loss explode: its model multiplies its logits by `factor`."""

    def __init__(self, model, at, factor):
        self.model, self.at, self.factor, self.calls = model, at, factor, 0
        model.head.register_forward_hook(self.hook)

    def hook(self, _module, _inputs, logits):
        self.calls += self.model.training
        return logits * self.factor if self.model.training and self.calls == self.at else logits


@pytest.mark.parametrize("factor", [1e4, math.nan], ids=["a spike", "not a number"])
def test_an_update_with_an_unusual_gradient_is_left_out(factor):
    model = lstm(dropout=0.0)
    Poisoned(model, at=30, factor=factor)
    before, after = [], []
    model.register_forward_pre_hook(lambda m, _: (before if len(before) < 30 else after).append(weights(m)))
    config = TrainConfig(steps=40, skip_spikes=5.0, log_every=5, clip=None)
    history = train(model, streams(), config)
    assert history.skipped == [0] * 5 + [1] * 3
    assert torch.equal(before[-1], after[0])
    assert all(math.isfinite(loss) for loss in history.train_loss)


def test_a_run_of_nothing_but_unusual_gradients_ends():
    model = lstm()
    model.head.register_forward_hook(lambda _m, _i, logits: logits * math.nan)
    with pytest.raises(FloatingPointError, match="20 updates in a row were skipped"):
        train(model, streams(), TrainConfig(steps=100, skip_spikes=5.0, log_every=5))


@pytest.mark.parametrize("schedule", ["linear", "wsd"])
def test_a_token_limit_ends_the_run_and_its_schedule_with_it(schedule):
    config = TrainConfig(steps=None, max_tokens=24 * 30, schedule=schedule, warmup=2, floor=0.0, log_every=1)
    history = train(lstm(), StreamBatches(TOKENS * 2, batch=3, time=8), config)
    assert history.stopped == "tokens"
    assert sum(1 for _ in history.step) == pytest.approx(30, abs=2)
    assert history.learning_rate[-1] < 0.15 * config.learning_rate


def test_the_gradients_length_is_logged_before_clipping():
    rows = {}
    for clip in (None, 1e-3):
        rows[clip] = train(lstm(dropout=0.0), streams(), TrainConfig(steps=1, clip=clip, log_every=1))
    assert rows[None].gradient_norm == rows[1e-3].gradient_norm
    assert rows[None].gradient_norm[0] > 1e-3


def test_tensorboard_gets_the_rows_of_the_log(tmp_path):
    config = TrainConfig(steps=20, log_every=5, out=tmp_path, tensorboard=True)
    history = train(lstm(), streams(), config)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("train_loss")]
    assert logged == pytest.approx(history.train_loss)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs a C++ compiler")
@pytest.mark.skipif(" " in torch.__file__, reason="torch does not quote its own path for the C++ compiler")
@pytest.mark.timeout(600)
def test_a_compiled_run_learns_the_same_and_its_checkpoint_has_plain_names(tmp_path):
    """Slow: the compiler takes about half a minute."""
    options = {"steps": 8, "warmup": 0, "eval_every": 8, "log_every": 1}
    plain = train(transformer().float(), windows(), TrainConfig(**options), validation=windows())
    config = TrainConfig(**options, compile=True, out=tmp_path)
    compiled = train(transformer().float(), windows(), config, validation=windows())
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-4)
    load_checkpoint(tmp_path / "best.safetensors", model=transformer().float())
