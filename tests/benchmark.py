"""Measure what the README claims, and print it as Markdown.

    python tests/benchmark.py                          gpt.py as it is, over three seeds
    python tests/benchmark.py --extra=--max_iters=500  with further options
    python tests/benchmark.py --rival='COMMAND'        and in turns with it another command
    python tests/benchmark.py --model=gpt.pt --text=T  the loss of a kept model on another text

Each run is a process of its own in an empty folder, beside a copy of the text. The loss is that
of the last step, on the whole validation split. All is included in the times: starting, the plain
GPT of part one, evaluations, and writing 500 characters.
"""
import argparse
import contextlib
import io
import math
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def machine():
    """Name the processor or the GPU, the number of cores in use, and torch."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = (torch.cuda.get_device_name() if torch.cuda.is_available()
            else (models or [platform.processor()])[0])
    cores = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    return f"{name}, {cores} cores, torch {torch.__version__}"


def run(*options):
    """Run gpt.py with these options; return its last validation loss, its seconds, its output."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "gpt.py", folder)
        shutil.copy(ROOT / "input.txt", folder)
        began = time.time()
        done = subprocess.run([sys.executable, "gpt.py", *options], cwd=folder, text=True,
                              encoding="utf-8", stdout=subprocess.PIPE, check=True)
    losses = re.findall(r"(?m)^step \d+: train loss \S+, val loss (\S+)", done.stdout)
    return float(losses[-1]), time.time() - began, done.stdout


def loss_on(model, text_file):
    """Return the loss of a kept model over all of a text, in windows of its own block_size."""
    sys.argv = ["gpt.py", f"--load={model}", "--max_iters=0", "--max_new_tokens=0", "--save="]
    with contextlib.redirect_stdout(io.StringIO()):
        space = runpy.run_path(str(ROOT / "gpt.py"), run_name="__main__")
    text = Path(text_file).read_text(encoding="utf-8")
    known = [char for char in text if char in space["char_to_id"]]
    data = space["encode"](known).to(space["device"])
    return space["estimate_loss"](data), len(data), len(text) - len(known)


def main():
    """Measure, then print."""
    parser = argparse.ArgumentParser(description="Measure what the README claims.")
    parser.add_argument("--seeds", default="1337,1338,1339")
    parser.add_argument("--extra", action="append", default=[], help="a further option of gpt.py")
    parser.add_argument("--rival", default="", help="a command to run in turns with gpt.py")
    parser.add_argument("--model", default="", help="a kept model")
    parser.add_argument("--text", default="", help="a text to measure it on")
    args = parser.parse_args()
    print(machine(), "\n")
    if args.model:
        loss, measured, unknown = loss_on(args.model, args.text)
        print(f"{args.model}, {args.text}: {loss:.4f} ({measured:,} characters, {unknown} unknown)")
        return
    print("| seed | val loss | seconds | rival, seconds |\n|---|---|---|---|")
    losses = []
    for seed in args.seeds.split(","):
        loss, seconds, output = run(f"--seed={seed}", *args.extra)
        losses.append(loss)
        began = time.time()
        if args.rival:
            subprocess.run(shlex.split(args.rival), stdout=subprocess.DEVNULL, check=True)
        print(f"| {seed} | {loss:.4f} | {seconds:.0f} | {time.time() - began:.0f} |", flush=True)
    mean = sum(losses) / len(losses)
    error = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / max(1, len(losses) - 1)
                      / len(losses))
    print(f"\nmean {mean:.4f}, standard error {error:.4f}\n\n{output[output.index('--- sample'):]}")


if __name__ == "__main__":
    main()
