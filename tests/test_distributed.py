"""Laws of training in several processes: two are as one, and what one leaves the other goes on with.

Slow, because each start of `torchrun` loads torch three times, which takes 5 seconds or more; so one start
serves most of the tests: `distributed_runs.runs`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import distributed_runs
import pytest
import torch
from distributed_runs import ALIKE, RESUMED

from lmtutorial.checkpoint import load_model
from lmtutorial.cli import main
from lmtutorial.tensorfile import read_tree
from lmtutorial.train import TrainConfig

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="torchrun starts processes as POSIX systems do"),
    pytest.mark.timeout(600),
]


def torchrun(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        start_new_session=True,  # a process group of its own, as a terminal gives it
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process began, two processes went on with, and they left."""
    folder = tmp_path_factory.mktemp("runs")
    for name in RESUMED:
        distributed_runs.begin(name, folder / "begun-by-one" / name)
    process = torchrun(distributed_runs.__file__, "runs", str(folder))
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    return folder


def skip_if_not_possible(name):
    if not distributed_runs.is_possible(name):
        pytest.skip("this torch spreads weights over GPUs only")


def results(folder, name):
    """(history, weights) as each process wrote them."""
    trees = [read_tree(path) for path in sorted(folder.glob(f"{name}-[0-9].safetensors"))]
    return [(tree["history"], tree["weights"]) for tree in trees]


def assert_close(one, two, name):
    """Muon computes in bfloat16; all losses are computed in float32, the rest in float64."""
    (history, weights), (other_history, other_weights) = one, two
    tolerance = 1e-2 if "muon" in name else 1e-7
    for column in ("step", "train_loss", "learning_rate", "gradient_norm", "skipped"):
        assert history[column] == pytest.approx(other_history[column], rel=max(tolerance, 1e-6))
    looks = [[loss for loss in h["validation_loss"] if loss is not None] for h in (history, other_history)]
    assert looks[0] == pytest.approx(looks[1], rel=max(tolerance, 1e-6))
    assert history["stopped"] == other_history["stopped"]
    torch.testing.assert_close(weights, other_weights, rtol=tolerance, atol=tolerance)


def assert_equal(one, two):
    (history, weights), (other_history, other_weights) = one, two
    for column in ("step", "train_loss", "validation_loss", "gradient_norm", "best_step", "stopped"):
        assert history[column] == other_history[column]
    torch.testing.assert_close(weights, other_weights, rtol=0, atol=0)


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_as_one_does(folder, tmp_path, name):
    skip_if_not_possible(name)
    distributed_runs.run(name, tmp_path)
    (alone,), (first, second) = results(tmp_path, name), results(folder / "whole", name)
    assert_close(first, alone, name)
    assert_equal(first, second)
    if name == "lstm-stops-early":
        assert alone[0]["stopped"] == "patience"


@pytest.mark.parametrize("name", RESUMED)
def test_what_one_process_began_two_go_on_with_and_the_other_way_round(folder, tmp_path, name):
    skip_if_not_possible(name)
    distributed_runs.run(name, tmp_path, resume=folder / "begun-by-two" / name)
    distributed_runs.run(name, tmp_path / "whole")
    (whole,), (resumed,) = results(tmp_path / "whole", name), results(tmp_path, name)
    assert_close(resumed, whole, name)
    assert_close(results(folder / "resumed-by-two", name)[0], whole, name)


def test_as_many_processes_as_before_go_on_bit_for_bit_each_with_its_own_dropout(folder):
    whole, resumed = (results(folder / where, "dropout") for where in ("whole", "resumed-by-two"))
    for one, other in zip(whole, resumed, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("name", ["lstm-sharded", "transformer-sharded"])
def test_weights_that_are_spread_are_saved_whole(folder, name):
    """The file is the one that a process alone writes."""
    skip_if_not_possible(name)
    for file in ("last.safetensors", "best.safetensors"):
        alone, spread = (read_tree(folder / f"begun-by-{number}" / name / file) for number in ("one", "two"))
        assert [spread[part] for part in ("kind", "config")] == [alone[part] for part in ("kind", "config")]
        for part in ("model", "optimizer"):
            torch.testing.assert_close(spread[part], alone[part], rtol=1e-7, atol=1e-7)
    model = load_model(folder / "begun-by-two" / name / "best.safetensors")
    assert type(model).__name__.lower() == name.split("-")[0]


def test_a_loss_that_is_not_finite_in_one_process_stops_both(folder):
    texts = [(folder / "diverged" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert texts[0] == texts[1]
    assert texts[0].startswith("training stopped after step 5: a weight is no longer finite")
    assert not (folder / "diverged" / "last.safetensors").exists()


def test_a_process_that_is_killed_ends_the_other_soon_with_a_message_and_a_checkpoint(tmp_path):
    process = torchrun(distributed_runs.__file__, "killed", str(tmp_path))
    assert process.stdout is not None
    process.stdout.readline()
    began = time.monotonic()
    _, errors = process.communicate(timeout=300)
    assert time.monotonic() - began < 60
    assert process.returncode == 1
    assert (
        "ProcessLostError: training stopped after step 12: another of the 2 processes died; "
        f"{tmp_path / 'last.safetensors'} is from step 10\n" in errors
    )
    name, changes = "transformer", {"steps": 15, "schedule": "constant"}
    distributed_runs.run(name, tmp_path / "resumed", resume=tmp_path, **changes)
    distributed_runs.run(name, tmp_path / "whole", **changes)
    (resumed,), (whole,) = (results(tmp_path / part, name) for part in ("resumed", "whole"))
    assert_close(resumed, whole, name)


def test_a_process_that_waits_for_one_that_hangs_can_be_ended(tmp_path):
    """The waiting is not done in Python, so that no handler of signals runs."""
    skip_if_not_possible("sharded")
    process = torchrun(distributed_runs.__file__, "stopped-sharded", str(tmp_path))
    assert process.stdout is not None
    assert process.stderr is not None
    stopped = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    words = next(line for line in process.stderr if line.startswith("lmtutorial:"))
    assert "after step 12: another of the 2 processes" in words
    os.kill(stopped, signal.SIGKILL)
    process.communicate(timeout=300)


def test_muon_on_weights_that_are_spread_is_refused():
    with pytest.raises(ValueError, match="shard is True and optimizer is 'muon'"):
        TrainConfig(shard=True, optimizer="muon")


FLAGS = ["--tokenizer", "char", "--width", "16", "--batch", "4", "--time", "16", "--device", "cpu"]
FLAGS += ["--max-seconds", "None", "--eval-every", "20"]


def test_the_command_line_trains_in_two_processes_ctrl_c_saves_and_one_goes_on(tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("the king is dead, long live the queen and the fool\n" * 100)
    command = ["-m", "lmtutorial.cli", "train", "--corpus", str(text), "--out", str(out), *FLAGS]
    process = torchrun(*command, "--steps", "100000")
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.endswith("on cpu, in 2 processes\n")
    while not process.stdout.readline().startswith("step"):
        assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert "lmtutorial/cli.py" not in errors  # the only traceback is torchrun's own
    lines = [line for line in printed.splitlines() if not line.startswith("step")]
    assert lines == ["stopped: Ctrl-C; all is saved", f"go on with:  lmtutorial train --resume {out}"]
    step = read_tree(out / "last.safetensors")["state"]["step"]
    assert main(["train", "--resume", str(out), "--steps", str(step + 5)]) == 0
    assert "stopped: all steps are done" in capsys.readouterr().out
    process = torchrun(*command[:3], "--resume", str(out), "--steps", str(step + 9))
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    begins = [line.split()[0] for line in printed.splitlines()]
    assert begins == ["text:", "step", "stopped:", "validation:", "write"]
    assert read_tree(out / "last.safetensors")["state"]["step"] == step + 9
