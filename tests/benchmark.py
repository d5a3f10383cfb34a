"""Measure what the README claims, and print it as Markdown.

    python tests/benchmark.py                       the preset of this machine, over three seeds
    python tests/benchmark.py --rival='COMMAND'     and in turns with it another command's time
    python tests/benchmark.py --extra=--dtype=float32    with further arguments for gpt.py

Each run is a subprocess of gpt.py in an empty folder. Before and after it the best rate of this
machine's own matrix product is taken, so that the share of it that training reaches is fair
although the speed of a machine drifts. Finished runs are kept in tests/results/benchmark.json.
"""
import argparse
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests" / "results" / "benchmark.json"
CUDA = torch.cuda.is_available()


def machine():
    """Name the processor or the GPU, its cores, and torch."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = torch.cuda.get_device_name() if CUDA else (models or [platform.processor()])[0]
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}"


def matrix_rate():
    """Return the best rate of a matrix product here, in operations per second: bf16, else f32."""
    best, device = 0, "cuda" if CUDA else "cpu"
    for dtype in (torch.bfloat16, torch.float32):
        for size in (1024, 2048, 8192 if CUDA else 4096):
            a = torch.randn(size, size, device=device).to(dtype)
            for _ in range(3):
                a @ a
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < 0.5:
                a @ a
                count += 1
                if CUDA:
                    torch.cuda.synchronize()
            best = max(best, 2 * size**3 * count / (time.perf_counter() - began))
    return best


def run(source, *args):
    """Run this source of gpt.py with these arguments; return its times, losses and peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "gpt.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-u", "gpt.py", f"--text_file={ROOT / 'input.txt'}", *args]
        rate, began, curve, lines, times = matrix_rate(), time.time(), [], [], []
        process = subprocess.Popen(command, cwd=folder, text=True, encoding="utf-8",
                                   stdout=subprocess.PIPE)
        for line in process.stdout:
            lines.append(line)
            times.append(time.time() - began)
            if found := re.match(r"step (\d+): train loss (\S+), val loss (\S+)", line):
                curve.append([times[-1], int(found[1]), float(found[3])])
        _, status, usage = os.wait4(process.pid, 0)
        seconds, rate = time.time() - began, max(rate, matrix_rate())
    text = "".join(lines)
    if status:
        raise RuntimeError(text)
    parameters = int(re.search(r"([\d,]+) parameters", text)[1].replace(",", ""))
    sample = next(i for i, line in enumerate(lines) if line.startswith("--- sample"))
    return {"curve": curve, "seconds": seconds, "rate": rate, "parameters": parameters,
            "loss": min(loss for _, _, loss in curve), "memory": usage.ru_maxrss / 2**20,
            "sample": seconds - times[sample], "text": "".join(lines[sample + 1:])}


def main():
    """Measure, then print."""
    parser = argparse.ArgumentParser(description="Measure what the README claims.")
    parser.add_argument("--seeds", default="1337,1338,1339")
    parser.add_argument("--extra", action="append", default=[], help="a further argument of gpt.py")
    parser.add_argument("--rival", default="", help="a command to run in turns with gpt.py")
    parser.add_argument("--iters", type=int, default=0, help="0: those of the preset")
    args = parser.parse_args()
    print(machine(), "\n")
    extra = args.extra + ([f"--max_iters={args.iters}"] if args.iters else [])
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    batch = 16 * 256 if CUDA else 8 * 256
    print("| seed | val loss | whole run, s | characters/s | share of the matrix rate | "
          "sample, s | memory, GiB | rival, s | ratio |\n|---|---|---|---|---|---|---|---|---|")
    rows = []
    for seed in args.seeds.split(","):
        key = json.dumps([machine(), seed, extra, args.rival, hash_of(source)])
        if key not in kept:
            row = run(source, f"--seed={seed}", *extra)
            if args.rival:
                began = time.time()
                subprocess.run(shlex.split(args.rival), stdout=subprocess.DEVNULL, check=True)
                row["rival"] = time.time() - began
            kept[key] = row
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept), encoding="utf-8")
        row = kept[key]
        rows.append(row)
        took, steps = row["curve"][-1][0] - row["curve"][0][0], row["curve"][-1][1]
        speed = steps * batch / took  # with all that happens between: measuring, saving
        share = 6 * row["parameters"] * speed / row["rate"]
        rival = row.get("rival", math.nan)
        print(f"| {seed} | {row['loss']:.4f} | {row['seconds']:.0f} | {speed:,.0f} | {share:.0%} | "
              f"{row['sample']:.1f} | {row['memory']:.2f} | {rival:.0f} | "
              f"{row['seconds'] / rival:.2f} |", flush=True)
    mean = sum(row["loss"] for row in rows) / len(rows)
    print(f"\nMean validation loss {mean:.4f}.\n\n```mermaid")
    print('%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#2563eb"}}}}%%')
    print(f'xychart-beta\n    title "gpt.py, seed {args.seeds.split(",")[0]}"')
    print(f'    x-axis "seconds" [{", ".join(f"{t:.0f}" for t, _, _ in rows[0]["curve"])}]')
    print('    y-axis "validation loss" 1 --> 4.5')
    print(f'    line [{", ".join(f"{loss:.3f}" for _, _, loss in rows[0]["curve"])}]\n```\n')
    print(f"```\n{rows[0]['text']}```")


def hash_of(source):
    """Return a short fingerprint of the code, comments left out."""
    import ast
    import hashlib
    return hashlib.sha256(ast.dump(ast.parse(source)).encode()).hexdigest()[:12]


if __name__ == "__main__":
    main()
