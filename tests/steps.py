"""The steps from bigram.py to gpt.py: a series of patches in tests/steps/, one for each.

    python tests/steps.py --write=FOLDER   write each step as a complete script, to read or run
    python tests/steps.py --save=FOLDER    make the patches anew from the scripts in FOLDER
    python tests/steps.py --show=3         print what changes in step 3
    python tests/steps.py --measure        train scripts that have no loss yet
    python tests/steps.py --readme         write the losses into the README and the patches

To change a step: --write, edit its script and those after it with any editor, then --save,
which writes bigram.py and gpt.py as well. Losses are kept in tests/steps/losses.json: remove
those that your change makes false, and measure again.
"""
import argparse
import ast
import difflib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "steps"
LOSSES = FOLDER / "losses.json"
SEEDS = (1337, 1338, 1339)

# What "`gpt.py` without it" means: changes to gpt.py.
WITHOUT = {
    "nothing": [],
    "attention": [("x = x + self.attention(shift(self.norm1(x)))", "pass")],
    "positions": [("q, k = rotate(q), rotate(k)", "pass")],
    "heads": [("n_head = 3 if gpu else 2", "n_head = 1")],
    "feed-forward": [("x = x + self.feed_forward(shift(self.norm2(x)))", "pass")],
    "block": [("self.norm1 = nn.LayerNorm(n_embd)", "self.norm1 = nn.Identity()"),
              ("self.norm2 = nn.LayerNorm(n_embd)", "self.norm2 = nn.Identity()"),
              ("self.norm = nn.LayerNorm(n_embd) ", "self.norm = nn.Identity() ")],
    "depth": [("n_layer = 6 if gpu else 4", "n_layer = 1")],
    "qk-norm": [("q, k = self.norm(q), self.norm(k)", "pass")],
    "gates": [("found * 2 * torch.sigmoid(self.gate(x))", "found"),
              ("F.silu(self.gate(x)) * self.up(x)", "F.silu(self.up(x))"),
              ("size = 8 * n_embd // 3", "size = 4 * n_embd")],
    "token-shift": [("shift(self.norm1(x))", "self.norm1(x)"),
                    ("shift(self.norm2(x))", "self.norm2(x)")],
    "muon": [("AdamW(others, lr=learning_rate, fused=True), muon]",
              "AdamW(model.parameters(), lr=learning_rate, fused=True)]")],
    "schedule": [("set_learning_rates(step) ", "pass ")],
}


def patches():
    """Return the patches of the series in order, as paths."""
    return sorted(FOLDER.glob("[0-9]*.patch"))


def apply(patch, source):
    """Return source with a unified diff applied; complain if anything is not as it says."""
    old, new, at = source.splitlines(keepends=True), [], 0
    for hunk in re.split(r"(?m)^(?=@@ )", patch)[1:]:
        head, *lines = hunk.splitlines(keepends=True)
        start = int(re.match(r"@@ -(\d+)", head)[1]) - 1
        new += old[at:start]
        at = start
        for line in lines:
            if line[0] in " -":
                if old[at] != line[1:]:
                    raise ValueError(f"line {at + 1} is {old[at]!r}, not {line[1:]!r}")
                at += 1
            if line[0] in " +":
                new.append(line[1:])
    return "".join(new + old[at:])


def scripts():
    """Return {name: source} of the whole series, from 00_bigram.py on, and what goes further."""
    source = (ROOT / "bigram.py").read_text(encoding="utf-8")
    made = {"00_bigram.py": source}
    for path in patches() + sorted(FOLDER.glob("further-*.patch")):
        source = apply(path.read_text(encoding="utf-8"), source)
        made[f"{path.stem.replace('-', '_')}.py"] = source
    return made


def diff(old, new, names):
    """Return the unified diff of two sources."""
    lines = [text.splitlines(keepends=True) for text in (old, new)]
    return "".join(difflib.unified_diff(*lines, *names))


def save(folder):
    """Make all patches anew from the scripts in folder, with the messages that they have."""
    paths = [*sorted(folder.glob("[0-9]*.py")), *sorted(folder.glob("further_*.py"))]
    made = {path.name: path.read_text(encoding="utf-8") for path in paths}
    names = list(made)
    for before, name in zip(names, names[1:]):
        path = FOLDER / f"{name[:-3].replace('_', '-')}.patch"
        message = path.read_text(encoding="utf-8").split("\n--- ")[0] if path.exists() else name
        path.write_text(f"{message}\n{diff(made[before], made[name], [before, name])}",
                        encoding="utf-8")
    (ROOT / "bigram.py").write_text(made[names[0]], encoding="utf-8")
    last = [name for name in names if name[0].isdigit()][-1]
    (ROOT / "gpt.py").write_text(made[last], encoding="utf-8")


def code(source):
    """Return the lines that are code: no comments, docstrings or blank lines, nothing twice."""
    kinds = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    rows = {row for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type not in kinds for row in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            rows -= set(range(node.lineno, node.end_lineno + 1))
    lines = source.splitlines()
    return [lines[row - 1].split("  # ")[0].rstrip() for row in sorted(rows) if row <= len(lines)]


def added(old, new):
    """Return how many lines of code the new source has that the old one has not."""
    return sum(line.startswith("+ ") for line in difflib.ndiff(code(old), code(new)))


def train(source, seed):
    """Run this script alone with this seed, on one core; return its last validation loss."""
    numbers = {"seed": seed, "max_iters": 300, "plain_iters": 0, "eval_interval": 300,
               "max_new_tokens": 1}
    for name, value in numbers.items():
        source = re.sub(rf"(?m)^{name} = .+?(?=  #)", f"{name} = {value}", source)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "script.py").write_text(source, encoding="utf-8")
        Path(folder, "input.txt").write_bytes((ROOT / "input.txt").read_bytes())
        done = subprocess.run([sys.executable, "script.py"], cwd=folder, text=True, check=True,
                              encoding="utf-8", stdout=subprocess.PIPE,
                              env={**os.environ, "OMP_NUM_THREADS": "1",
                                   "CUDA_VISIBLE_DEVICES": ""})
    return float(re.findall(r"(?m)^step 300: .* val loss (\S+)", done.stdout)[-1])


def measure(jobs):
    """Train all scripts before the extras, and gpt.py without each step."""
    kept = json.loads(LOSSES.read_text()) if LOSSES.exists() else {}
    *made, (_, whole) = [item for item in scripts().items() if item[0][0].isdigit()]
    without = []
    for name, changes in WITHOUT.items():
        source = whole
        for old, new in changes:
            assert old in source, old
            source = source.replace(old, new)
        without.append((f"without {name}", source))
    made = [(name[3:-3].replace("_", "-"), source) for name, source in made]

    def one(task):
        name, source, seed = task
        loss = train(source, seed)
        kept.setdefault(name, {})[str(seed)] = loss
        LOSSES.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(f"{name}, seed {seed}: {loss:.4f}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, [(name, source, seed) for part in (made, without) for seed in SEEDS
                            for name, source in part if str(seed) not in kept.get(name, {})]))


def told(losses):
    """Return the mean of the losses of some seeds as it is told, or nothing if there are none."""
    return f"{sum(losses.values()) / len(losses):.2f}" if losses else ""


def table():
    """Return the table of all steps, and the chart, in Markdown."""
    kept, made = json.loads(LOSSES.read_text()), list(scripts().items())
    rows = ["| step | lines of code | loss with it | `gpt.py` without it |", "|---|---|---|---|",
            f"| 0 [a table](bigram.py) | | {told(kept['bigram'])} | |"]
    for path, (_, old), (_, new) in zip(patches()[:-1], made, made[1:]):
        title, name = path.read_text("utf-8").split("\n")[0][5:].replace(":", "", 1), path.stem[3:]
        rows.append(f"| [{title}](tests/steps/{path.name}) | {added(old, new)} "
                    f"| {told(kept[name])} | {told(kept.get(f'without {name}', {}))} |")
    losses = [told(kept[name[3:-3].replace("_", "-")]) for name, _ in made if name[0].isdigit()
              and name[3:-3].replace("_", "-") in kept]
    chart = ["", "```mermaid", "xychart-beta",
             '    title "validation loss after 300 training steps"',
             f"    x-axis \"step\" [{', '.join(map(str, range(len(losses))))}]",
             '    y-axis "loss" 1.4 --> 2.6', f"    line [{', '.join(losses)}]", "```"]
    return "\n".join(rows + chart)


def readme():
    """Write the losses into the README and into the messages of the patches."""
    kept, path = json.loads(LOSSES.read_text()), ROOT / "README.md"
    before = "bigram"
    for patch in patches()[:-1]:
        name = patch.stem[3:]
        line = f"Loss: {told(kept[before])} before, {told(kept[name])} after."
        patch.write_text(re.sub(r"(?m)^Loss: .*", line, patch.read_text("utf-8"), count=1), "utf-8")
        before = name
    text = re.sub(r"(?s)(<!-- steps -->\n).*(<!-- end -->)", rf"\1{table()}\n\2",
                  path.read_text(encoding="utf-8"))
    path.write_text(text, encoding="utf-8")


def main():
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", metavar="FOLDER", type=Path)
    parser.add_argument("--save", metavar="FOLDER", type=Path)
    parser.add_argument("--show", metavar="N", type=int, choices=range(1, len(patches()) + 1))
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="how many trainings at once")
    args = parser.parse_args()
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        for name, source in scripts().items():
            (args.write / name).write_text(source, encoding="utf-8")
    if args.save:
        save(args.save)
    if args.show:
        print(patches()[args.show - 1].read_text(encoding="utf-8"), end="")
    if args.measure:
        measure(args.jobs)
    if args.readme:
        readme()


if __name__ == "__main__":
    main()
