"""What is each step of gpt.py worth? Take it out, train the rest, compare.

    python tests/steps.py            gpt.py without one step at a time, against the whole script
    python tests/steps.py --ladder   from bigram.py upwards, one more step at a time

Both train every script for the same number of steps with the same seeds and print a Markdown
table. A step is taken out by editing the source text, and each edit has to apply exactly once:
it is the very edit that a reader would make. Finished runs are kept in tests/results/steps.json,
so that a measurement that was cut off goes on where it stopped.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests" / "results" / "steps.json"
NORMS = "nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)"
ADAMW = "optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)"
BOTH = "optimizer, muon = torch.optim.AdamW(others, lr=learning_rate), Muon(matrices, lr=muon_lr)"
RMS = "F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])"

# For each step: the edits that take it out, and the names that nothing uses any more then.
# SKIP is what stands for a part of a block that is gone: see without().
EDITS = {
    2: [("Attention(), FeedForward()", "None, FeedForward()"), ("self.attention(", "SKIP(")],
    3: [("        q, k = rotate(q), rotate(k)  # Step 3", "        # Step 3")],
    4: [("n_head = 4 if gpu else 2", "n_head = 1")],
    5: [(RMS, "q, k")],
    6: [(", FeedForward()", ", None"), ("self.feed_forward(", "SKIP(")],
    7: [("shift(self.norm1(x))", "(self.norm1(x))"), ("shift(self.norm2(x))", "(self.norm2(x))")],
    8: [("        x = x + ", "        x = "), ("        return x + ", "        return "),
        (NORMS, "nn.Identity(), nn.Identity()"),
        ("self.norm = nn.LayerNorm(n_embd, bias=False)", "self.norm = nn.Identity()")],
    9: [("n_layer = 6 if gpu else 4", "n_layer = 1")],
    11: [("        nn.init.zeros_(self.lm_head.weight)\n", "")],
    12: [(BOTH, ADAMW), (', "muon": muon}', "}"), (", (muon, muon_lr))", ",)"),
         ("    muon.step()  # Step 12\n", "")],
    13: [("    fraction = 1 - step / max_iters\n", "    fraction = 1\n")],
    14: [('dtype = "auto"', 'dtype = "float32"'),
         ("    @autocast  # Step 14: in here, matrix products are in fast_dtype\n", "")],
}
UNUSED = {2: ["Attention"], 3: ["speeds", "angles", "rotate"], 6: ["FeedForward"], 7: ["shift"],
          12: ["Muon", "orthogonalize", "matrices", "others"], 14: ["can", "fast", "autocast"]}
NOTES = {12: "AdamW at 0.004 for all weights", 14: "in float32"}
LADDER = [1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13]


def titles(source):
    """Return {number: title} as gpt.py names its steps: what stands between 'Step N: ' and '.'"""
    return {int(n): title for n, title in re.findall(r"\bStep (\d+): ([^.\n]+)\.", source)}


def without(source, gone):
    """Return the source text without these steps; an edit that does not fit once is an error."""
    for step in sorted(gone):
        for old, new in EDITS[step]:
            if source.count(old) != 1:
                raise ValueError(f"step {step}: {old!r} stands {source.count(old)} times in gpt.py")
            # In x + f(x) a missing f gives zero; without residual connections it passes x on.
            new = new.replace("SKIP", "" if 8 in gone else "torch.zeros_like")
            source = source.replace(old, new)
    return source


def code_lines(source, step):
    """Count the lines that a step takes: those it edits, and the code that is unused without it."""
    count = sum(max(1, old.count("\n")) for old, _ in EDITS[step])
    for node in ast.parse(source).body:
        name = getattr(node, "name", None) or ast.unparse(getattr(node, "targets", [node])[0])
        if name in UNUSED.get(step, []):
            text = [line.strip() for line in ast.unparse(node).splitlines()]
            doc = ast.get_docstring(node, clean=False) if hasattr(node, "name") else None
            inner = [ast.get_docstring(n, clean=False) for n in ast.walk(node)
                     if isinstance(n, ast.FunctionDef) and n is not node]
            docs = sum(d.count("\n") + 1 for d in [doc, *inner] if d)
            count += sum(bool(line) for line in text) - docs
    return count


def train(source, numbers, kept, lock):
    """Train this source with these numbers, unless that is done already: (loss, seconds)."""
    code = ast.dump(ast.parse(source))  # comments left out
    key = hashlib.sha256((code + repr(sorted(numbers.items()))).encode()).hexdigest()[:16]
    if key not in kept:
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "script.py")
            source = source.split("# %% Step 17")[0]  # no picture is wanted
            script.write_text(source, encoding="utf-8")
            options = [f"--{name}={value}" for name, value in numbers.items()]
            began = time.time()
            done = subprocess.run([sys.executable, script, *options], cwd=folder, text=True,
                                  capture_output=True, encoding="utf-8")
            losses = re.findall(r"^step \d+: train loss \S+, val loss (\S+)$", done.stdout, re.M)
            if done.returncode or not losses:
                raise RuntimeError(done.stderr or done.stdout)
        with lock:
            kept[key] = [float(losses[-1]), time.time() - began]
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps(kept, indent=0), encoding="utf-8")
    return kept[key]


def main():
    """Measure, then print the table."""
    parser = argparse.ArgumentParser(description="What is each step of gpt.py worth?")
    parser.add_argument("--ladder", action="store_true", help="from the bigram upwards")
    parser.add_argument("--iters", type=int, default=500, help="steps of every run (500)")
    parser.add_argument("--seeds", default="1337,1338,1339", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--only", default="", help="comma-separated steps")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    gpt, seeds = (ROOT / "gpt.py").read_text(encoding="utf-8"), args.seeds.split(",")
    named, lock = titles(gpt), Lock()
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    only = [int(step) for step in args.only.split(",") if step]
    if args.ladder:
        rungs = {0: (ROOT / "bigram.py").read_text(encoding="utf-8")}
        for step in LADDER:
            rungs[step] = without(gpt, [s for s in EDITS if s in LADDER and s > step])
    else:
        rungs = {0: gpt} | {s: without(gpt, [s]) for s in EDITS if not only or s in only}
    common = {"text_file": ROOT / "input.txt", "max_iters": args.iters, "eval_interval": args.iters,
              "max_new_tokens": 0}
    work = [(step, {**common, "seed": seed} | ({} if args.ladder and not step else {"save": ""}))
            for seed in seeds for step in rungs]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = list(pool.map(lambda item: train(rungs[item[0]], item[1], kept, lock), work))
    losses = {step: [d[0] for w, d in zip(work, done) if w[0] == step] for step in rungs}
    mean = {step: sum(values) / len(values) for step, values in losses.items()}
    print(f"{args.iters} steps, seeds {args.seeds}, means.\n")
    if args.ladder:
        print("| step | | loss | gain |\n|---|---|---|---|")
        for before, step in zip([None, *rungs], rungs):
            gain = "" if before is None else f"{mean[before] - mean[step]:+.3f}"
            title = named.get(step, "`bigram.py`")
            print(f"| {step or ''} | {title} | {mean[step]:.3f} | {gain} |")
        return
    print("| step | | lines | loss without it | worse by (each seed) |\n|---|---|---|---|---|")
    print(f"| | the whole of `gpt.py` | | {mean[0]:.3f} | |")
    for step, title in sorted(named.items()):
        if step in rungs:
            each = ", ".join(f"{a - b:+.3f}" for a, b in zip(losses[step], losses[0]))
            note = f" ({NOTES[step]})" if step in NOTES else ""
            print(f"| {step} | {title}{note} | {code_lines(gpt, step)} | {mean[step]:.3f} | "
                  f"{mean[step] - mean[0]:+.3f} ({each}) |")
        elif not only:
            print(f"| {step} | {title} | | | |")


if __name__ == "__main__":
    main()
