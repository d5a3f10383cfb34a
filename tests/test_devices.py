"""Several processes, started by PyTorch's launcher, train like one."""
import os
import re
import socket
import subprocess
import sys

import pytest

from conftest import ROOT, TINY, options, run

NUMBERS = {**TINY, "batch_size": 8, "max_iters": 40, "max_new_tokens": 9}


def launch(folder, *args, nodes=1):
    """Run gpt.py in two processes, on one machine or on two that are played by two launchers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={2 // nodes}",
               f"--nnodes={nodes}", "--master_addr=127.0.0.1", f"--master_port={port}"]
    args = [ROOT / "gpt.py", *options("gpt.py", NUMBERS), *args]
    started = [subprocess.Popen([*command, f"--node_rank={rank}", *args], cwd=folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
               for rank in range(nodes)]
    return [(*node.communicate(timeout=200), node.returncode) for node in started]


def losses(output):
    return [float(loss) for loss in re.findall(r"^step \d+: .*, val loss (\S+)$", output, re.M)]


@pytest.mark.skipif(sys.platform == "win32", reason="the launcher needs libuv there")
@pytest.mark.parametrize("nodes, steps, tolerance", [(1, 5, 1.01e-4), (1, 40, 0.02), (2, 40, 0.02)])
def test_two_processes_follow_one(nodes, steps, tolerance, small_text, tmp_path):
    args = [f"--text_file={small_text}", f"--max_iters={steps}",
            f"--eval_interval={1 if steps == 5 else steps}"]
    (tmp_path / "alone").mkdir()
    alone = losses(run(ROOT / "gpt.py", *options("gpt.py", NUMBERS), *args,
                       cwd=tmp_path / "alone").stdout)
    (tmp_path / "both").mkdir()
    done = launch(tmp_path / "both", *args, "--save=gpt.pt", nodes=nodes)
    assert [status for _, _, status in done] == [0] * nodes, done
    spoke = "".join(out for out, _, _ in done)
    found = losses(spoke)
    assert len(found) == len(alone) == (6 if steps == 5 else 2)
    assert spoke.count("--- sample 1 of 1 ---") == 1
    assert found == pytest.approx(alone, abs=tolerance) and alone[-1] < alone[0] - steps / 200
    assert {path.name for path in (tmp_path / "both").iterdir()} <= {"gpt.pt", "gpt.png"}


@pytest.mark.skipif(sys.platform == "win32", reason="the launcher needs libuv there")
def test_a_batch_that_cannot_be_divided(small_text, tmp_path):
    [(out, err, status)] = launch(tmp_path, f"--text_file={small_text}", "--batch_size=7")
    assert status != 0 and out == ""
    assert "error: batch_size=7 should be a multiple of the 2 processes\n" in err
