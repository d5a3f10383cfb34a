"""Several processes, started by PyTorch's launcher, train like one."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, names, options, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the launcher needs libuv there")
NUMBERS = {**TINY, "batch_size": 8}


def launcher(script, *args, cwd):
    """Start a script in two processes; return the launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               "--master_addr=127.0.0.1", f"--master_port={port}", str(script), *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def launch(script, *args, cwd):
    """Run a script in two processes; return the finished launcher."""
    started = launcher(script, *args, cwd=cwd)
    stdout, stderr = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, stdout, stderr)


def gradients(text, folder):
    """In one process of all: save the gradients of one step, and what its dropout hides."""
    space = names("gpt.py", folder, **NUMBERS, text_file=text)
    rank, model, adamw = space["rank"], space["model"], space["optimizers"][0]
    torch.manual_seed(0)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.train()
    model(*space["get_batch"](1))[1].backward()
    adamw.param_groups[0]["lr"] = 0.0
    adamw.step()
    torch.save([weight.grad for weight in model.parameters()], Path(folder, f"gradients{rank}"))
    model.dropout.p = 0.5
    model.dropout.register_forward_hook(
        lambda layer, args, out: torch.save((out == 0).all(-1), Path(folder, f"hidden{rank}")))
    model(*space["get_batch"](1))


def test_gradients_are_means_and_dropouts_differ(small_text, tmp_path):
    """A sum would not do, though AdamW and Muon would hardly notice."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    gradients(small_text, one)
    done = launch(__file__, small_text, two, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    alone = torch.load(one / "gradients0")
    assert min(gradient.abs().max() for gradient in alone) > 1e-4
    for rank in (0, 1):
        for found, expected in zip(torch.load(two / f"gradients{rank}"), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    first, second = (torch.load(two / f"hidden{rank}") for rank in (0, 1))
    assert first.shape == second.shape == (4, 16)
    assert 0 < first.sum() < 64 and not torch.equal(first, second)


def test_two_processes_follow_one(small_text, tmp_path):
    """The same losses, only one that speaks in the end, and one that saves."""
    args = [*options("gpt.py", NUMBERS), f"--text_file={small_text}", "--max_iters=8",
            "--eval_interval=1", "--save=gpt.pt"]
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    one = run(ROOT / "gpt.py", *args, cwd=tmp_path / "one").stdout
    two = launch(ROOT / "gpt.py", *args, cwd=tmp_path / "two")
    assert two.returncode == 0, two.stderr
    alone, both = ([float(loss) for loss in re.findall(r"(?m)^step .* val loss (\S+)", out)]
                   for out in (one, two.stdout))
    assert len(both) == 9 and both == pytest.approx(alone, abs=1e-3)
    assert both[8] < both[0] - 0.05
    for line in ("characters, which begin", "parameters on cpu", "--- sample 1 of 1 ---"):
        assert two.stdout.count(line) == 1
    assert {path.name for path in (tmp_path / "two").iterdir()} <= {"gpt.pt", "gpt.pt.png"}


def test_ctrl_c_ends_all_processes_between_two_steps(small_text, tmp_path):
    started = launcher(ROOT / "gpt.py", *options("gpt.py", NUMBERS), f"--text_file={small_text}",
                       "--max_iters=100000", "--eval_interval=20", "--save=gpt.pt", cwd=tmp_path)
    while not (tmp_path / "gpt.pt").exists() and started.poll() is None:
        time.sleep(0.1)
    started.send_signal(signal.SIGINT)
    said, errors = started.communicate(timeout=100)
    last = max(map(int, re.findall(r"(?m)^step (\d+):", said)))
    assert 20 <= last < 100000 and f"--load=gpt.pt --text_file={small_text} goes on\n" in said
    assert said.count("--- sample 1 of 1 ---") == 1 and "Error" not in errors
    assert torch.load(tmp_path / "gpt.pt", weights_only=True)["step"] == last


def test_a_batch_that_cannot_be_divided(small_text, tmp_path):
    done = launch(ROOT / "gpt.py", *options("gpt.py", NUMBERS), f"--text_file={small_text}",
                  "--batch_size=7", cwd=tmp_path)
    assert done.returncode != 0 and "step 0" not in done.stdout
    assert re.search("(?m)^gpt.py: error: batch_size=7 should be a multiple of 2.*$", done.stderr)
    assert "ValueError" not in done.stderr


if __name__ == "__main__":  # by launch
    torch.distributed.destroy_process_group = lambda: None  # gpt.py is not to end it yet
    gradients(*sys.argv[1:])
