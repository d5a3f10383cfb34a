"""The steps from bigram.py to gpt.py, one script each: to walk, to type, to run, to measure.

    python tests/steps.py --write=FOLDER   write 00_bigram.py, 01_embedding.py, ... into FOLDER
    python tests/steps.py --write=FOLDER --bare   without options, download and checks: to type
    python tests/steps.py --show           list the steps with their losses
    python tests/steps.py --show=3         what changes in step 3
    python tests/steps.py --measure        train them all (--iters, --seeds, --jobs)
    python tests/steps.py --readme         write what was measured into README.md

All scripts come from gpt.py. What carries the name of a later step is deleted from it: a text
section and the cell below it, a block below a comment, a line with a comment at its end (and
what is indented below that line). A few lines of gpt.py do the work of two steps: for those,
EDITS has the form they had before. "Extra" counts as the last step of all, and is never in.
"""
import argparse
import difflib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ROOT / "tests" / "steps.json"
EXTRA = 99

# Headings of gpt.py that do not name the step they come with.
OWNERS = {"The block": 2, "The GPT": 2, "The end of part one": 10,
          "Part two: what has been found since": 10, "The modern GPT": 10,
          "Muon, the optimizer": 15, "Model and optimizers of part two": 10, "Extras": EXTRA}

# How a line reads before the step: (as it stands in gpt.py, as it stood), each found just once.
EDITS = {
    2: [("model = GPT(Block).to(device)  # since Step 2, a GPT",
         "model = LanguageModel().to(device)")],
    4: [("    def __init__(self):\n        super().__init__()\n        self.attention = Head()\n",
         ""),
        ("        x = x + self.attention(x)\n",
         "        T = x.shape[1]\n        x = x + equal_weights[:T, :T] @ x\n")],
    5: [("self.attention = MultiHeadAttention(Head)", "self.attention = Head()"),
        ("D = n_embd // n_head", "D = n_embd")],
    7: [("self.attention(self.norm1(x))\n"
         "        x = x + self.feed_forward(self.norm2(x))  # Step 6",
         "self.attention(x)\n        x = x + self.feed_forward(x)  # Step 6")],
    8: [("self.blocks = nn.Sequential(*[block_class() for _ in range(n_layer)])",
         "self.block = block_class()"),
        ("x = self.blocks(x)" + 18 * " ", "x = self.block(x)" + 19 * " ")],
    11: [("MultiHeadAttention(NormedHead)", "MultiHeadAttention(RotaryHead)"),
         ("        self.norm2 = nn.LayerNorm(n_embd)\n\n",
          "        self.norm2 = nn.LayerNorm(n_embd)\n"
          "        nn.init.zeros_(self.attention.proj.weight)\n"
          "        nn.init.zeros_(self.feed_forward.down.weight)\n\n")],
    12: [("MultiHeadAttention(GatedHead)", "MultiHeadAttention(NormedHead)")],
    13: [("self.feed_forward = GatedFeedForward()", "self.feed_forward = FeedForward()")],
    14: [("shift(self.norm1(x))", "self.norm1(x)"), ("shift(self.norm2(x))", "self.norm2(x)")],
    15: [("[torch.optim.AdamW(others, lr=learning_rate), Muon(matrices, muon_lr)]",
          "[torch.optim.AdamW(model.parameters(), lr=learning_rate)]")],
    16: [("    if part == 2:\n        set_learning_rates(step)  # Step 16\n", "")],
    17: [("        set_learning_rates(step)                   # Step 16\n"
          "        inputs, targets = get_renamed_batch(step)  # Step 17\n"
          "    else:\n        inputs, targets = get_batch(step)\n",
          "        set_learning_rates(step)  # Step 16\n    inputs, targets = get_batch(step)\n")],
    EXTRA: [
        ("if not finished:  # Extra\n    evaluate(first_step)\n    keep(first_step)\n",
         "first_step = 0\nevaluate(first_step)\n"),
        ("until_ctrl_c(range(first_step + 1, max_iters + 1)):  # Extra",
         "range(first_step + 1, max_iters + 1):"),
        ("#\n# (Extra: `first_step` is 0, or where the checkpoint stopped, and `finished` tells\n"
         "# that there is nothing to train. `until_ctrl_c` gives out the steps, until Ctrl-C\n"
         "# is pressed. `keep` writes the checkpoint.)\n", ""),
        ("#\n# (Extra: `checkpoint` and `finished` are about going on with an earlier run.)\n", ""),
    ],
}

# What takes a step out of the whole: edits of gpt.py, and options.
WITHOUT = {
    4: [("x + self.attention(shift", "x + 0 * self.attention(shift")],
    5: ["--n_head=1"],
    6: [("x + self.feed_forward(shift", "x + 0 * self.feed_forward(shift")],
    7: [("shift(self.norm1(x))", "shift(x)"), ("shift(self.norm2(x))", "shift(x)"),
        ("        return self.norm(x)            #", "        return x  #")],
    8: ["--n_layer=1"],
    16: [("share = 1 - (step - 1) / max_iters", "share = 1")],
    10: [("class NormedHead(RotaryHead)", "class NormedHead(Head)"),
         ("        x = self.token_embedding(idx)  # (B, T, C)\n",
          "        return super().vectors(idx)\n")],
    11: [("class GatedHead(NormedHead)", "class GatedHead(RotaryHead)")],
    12: EDITS[12],
    13: EDITS[13],
    14: EDITS[14],
    15: EDITS[15],
    17: [("names.sort(key=len)", "names = []")],
}
WITHOUT["4 and 14"] = [
    ("x + self.attention(shift(self.norm1(x)))", "x + 0 * self.attention(self.norm1(x))"),
    ("shift(self.norm2(x))", "self.norm2(x)")]
WITHOUT["dealing"] = [
    ("        offset = torch.randint(block_size, (1,), generator=chance)\n"
     "        shuffled = cuts[torch.randperm(len(cuts), generator=chance)]\n"
     "        starts.extend((shuffled + offset).tolist())\n",
     "        starts.extend(torch.randint(len(train_data) - block_size, (batch_size,),\n"
     "                                    generator=chance).tolist())\n")]
WITHOUT["15, rate 0.002"] = [*WITHOUT[15], "--learning_rate=0.002"]
WITHOUT["15, rate 0.008"] = [*WITHOUT[15], "--learning_rate=0.008"]

# What a bare script does without: (a pattern, what stands in its place), each found just once.
BARE = [
    (r"(?<=Change them here), or on the command\n.*", "."),
    (r"(?<=max_iters = )1500 ", "300  "),
    (r"(?<=what shall the model continue\?) .*\nsamples = .*", ""),
    (r"# %% \[markdown\]\n# ## Options\n[\s\S]*?(?=# %% \[markdown\]\n# ## The text)", ""),
    (r" Where the file is missing, [\s\S]*? command line\.\)", ""),
    (r"url = [\s\S]*?text = read_text\(\)", 'text = open(text_file, encoding="utf-8").read()'),
    (r"if prompt != .*\n    parser.*\n", ""),
    (r"if len\(val_data\) .*\n    parser.*\n.*\n", ""),
    (r"    if not math.isfinite.*\n    .*\n", ""),
    (r"    # Wide enough .*\n    print\(line\.ljust\(79\)\)", "    print(line)"),
    (r"# ## Progress[\s\S]*?end=.*\n\n\n# %% \[markdown\]\n", ""),
    (r"began = time.*\n", ""),
    (r"    show_progress.*\n", ""),
    (r"losses = \{\}.*\n\n\n", ""),
    (r"    losses\[step\] = .*\n", ""),
    (r"first_step = 0\nevaluate\(first_step\)", "evaluate(0)"),
    (r"range\(first_step \+ 1, ", "range(1, "),
    (r"prompts = \[prompt\]\n[\s\S]*", "write(prompt, max_new_tokens, seed)\n"),
]


def read(name):
    """Return the source of one of the pair."""
    return (ROOT / name).read_text(encoding="utf-8")


def step_of(text):
    """Return the number of the step that a heading or a comment names, EXTRA, or None."""
    if text.strip("# ") in OWNERS:
        return OWNERS[text.strip("# ")]
    found = re.search(r"\bStep (\d+)|\b(Extra)\b", text)
    return found and (EXTRA if found[2] else int(found[1]))


def edit(source, pairs):
    """Replace each old by its new; an old that is not there just once is an error."""
    for old, new in pairs:
        if source.count(old) != 1:
            raise ValueError(f"{old!r} stands {source.count(old)} times in the source")
        source = source.replace(old, new)
    return source


def cells(source):
    """Yield the cells of a source as (is it text?, its lines without the line # %%)."""
    for cell in re.split(r"(?m)^# %%", source)[1:]:
        mark, _, body = cell.partition("\n")
        yield mark.strip() == "[markdown]", body.split("\n")


def sections(lines):
    """Split the lines of a text cell at its headings."""
    parts = [[]]
    for line in lines:
        if re.match(r"# #+ ", line) and parts[-1]:
            parts.append([])
        parts[-1].append(line)
    return parts


def without_later(lines, last):
    """Return the lines of a code cell without what belongs to steps after last."""
    kept, to_blank, below = [], False, None
    for line in lines:
        if not line.strip():
            to_blank = False
        elif below is not None and len(line) - len(line.lstrip()) <= below:
            below = None
        if to_blank or (below is not None and line.strip()):
            continue
        comment = re.search(r"(?<=#) .*$", line)
        step = step_of(comment[0]) if comment else None
        if step is None or step <= last:
            kept.append(line)
        elif re.match(r"\s*# (Step|Extra)\b", line):
            to_blank = True
        elif line.split("#")[0].rstrip().endswith(":"):
            below = len(line) - len(line.lstrip())
    return kept


def script(last):
    """Return the source of the script that ends with this step (0: bigram.py)."""
    if last == 0:
        return read("bigram.py")
    source = read("gpt.py")
    for step, pairs in sorted(EDITS.items(), reverse=True):
        if step > last:
            source = edit(source, pairs)
    source = source.partition("\n# %%")[2]
    out, owner = [head(last) + "\n\n"], 0
    for is_text, lines in cells("# %%" + source):
        if is_text:
            parts = sections(lines)
            owners = [step_of(part[0]) or 0 if part[0].startswith(("# # ", "# ## ")) else owner
                      for part in parts]
            owner = owners[0]
            kept = [line for part, step in zip(parts, owners) if step <= last for line in part]
            if "".join(kept).strip("# "):
                out.append("# %% [markdown]\n" + "\n".join(kept).rstrip("\n# ") + "\n\n")
        elif owner <= last:
            kept = "\n".join(without_later(lines, last))
            if kept.strip():
                out.append("# %%\n" + re.sub(r"\n{4,}", "\n\n\n", kept.lstrip("\n")))
    text = "".join(out).rstrip() + "\n"
    return re.sub(r"(\n    .*)\n\n\n(?=    )", r"\1\n\n", text)


def bare(source):
    """Return a script without options, download and checks, and what only these import."""
    source = re.sub(r"(?m)^    python bigram\.py .*\n", "", source)  # bigram.py says its options
    for pattern, new in BARE:
        source, count = re.subn(pattern, lambda _: new, source)
        if count != 1:
            raise ValueError(f"{pattern!r} stands {count} times in the source")
    kept, code = [], re.sub(r"(?m)(^|  )#.*", "", source)
    for line in source.split("\n"):
        name = re.match(r"(?:import|from) .*?(\w+)(  #.*)?$", line)
        if not name or re.search(rf"\b{name[1]}\.\w", code):
            kept.append(line)
    return "\n".join(kept)


def titles():
    """Return {number: title} of the steps, as gpt.py has them."""
    found = re.findall(r"(?m)^# ## Step (\d+): (.+)$", read("gpt.py"))
    return {int(number): title for number, title in found}


def head(last):
    """Return the docstring of a script between the first and the last step."""
    title = titles()[last]
    whole = {9: "This is part one of gpt.py: a complete GPT (a generative pre-trained "
                "transformer).\n\n",
             max(titles()): "This is gpt.py without its extras: checkpoints, bf16, several "
                            "processes, a picture.\n\n"}.get(last, "")
    return (f'"""Step {last} on the way from bigram.py to gpt.py: {title}.\n\n{whole}'
            "Shapes in comments: B batch_size, T time (up to block_size), C n_embd, D head size,"
            '\nV vocab_size.\n"""')


def file_name(last):
    """Return the name of this step's script."""
    title = "bigram" if last == 0 else re.sub(r"\W+", "_", titles()[last])
    return f"{last:02d}_{title}.py"


def write_all(folder, form=str):
    """Write the scripts of all steps into this folder, in this form (bare, or as they are)."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in [0, *titles()]:
        (folder / file_name(step)).write_text(form(script(step)), encoding="utf-8")
        print(folder / file_name(step))
    shutil.copy(ROOT / "input.txt", folder)


def difference(step):
    """Return what changes in the code in this step, as the lines of a diff."""
    old, new = ([line for is_text, lines in cells(bare(script(n))) if not is_text
                 for line in lines] for n in (step - 1, step))
    lines = []
    # (autojunk would leave frequent lines out of account, so that some go and come back.)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    for hunk in matcher.get_grouped_opcodes():
        lines.append("@@ ... @@")  # the numbers of lines would be those of no file
        for kind, a, b, c, d in hunk:
            if kind == "equal":
                lines += [f" {line}" for line in old[a:b]]
            else:
                lines += [f"-{line}" for line in old[a:b]] + [f"+{line}" for line in new[c:d]]
    return lines


def text_below(heading, name="gpt.py"):
    """Return the text section with this heading, in paragraphs."""
    for is_text, lines in cells(read(name)):
        for part in sections(lines) if is_text else []:
            if part[0].strip("# ").startswith(heading):
                return re.sub(r"(?m)^# ?", "", "\n".join(part[1:])).strip()


def text_of(step):
    """Return the text of a step, as gpt.py has it, in paragraphs."""
    # Something with a heading of its own comes with these.
    also = {2: ["The block", "The GPT"], 10: ["The modern GPT"], 15: ["Muon, the optimizer"]}
    text = text_below(f"Step {step}:")
    for heading in also.get(step, []):
        text += f"\n\n**{heading}.** {text_below(heading)}"
    return text


def lines_of(step):
    """Count the lines of code that a step adds, comments and blank lines left out."""
    added = [line[1:].strip() for line in difference(step) if line.startswith("+")]
    return sum(bool(line) and not line.startswith(("#", '"""')) for line in added)


def show(step):
    """Print what changes in a step, in colour on a terminal; without a step, list all."""
    if step is None:
        for number, title in {0: "bigram", **titles()}.items():
            losses = found(number)
            loss = f"{sum(losses) / len(losses):.3f}" if losses else "?"
            print(f"{number:2} {title:30} loss {loss}")
        return
    print(f"Step {step}: {titles()[step]}\n\n{text_of(step)}\n")
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"}
    for line in difference(step):
        colour = colours.get(line[:1], "") if sys.stdout.isatty() else ""
        print(f"{colour}{line}\033[0m" if colour else line)


def variants():
    """Return {name: (source, options)} of all that is measured: steps, and the whole without.

    The whole is gpt.py itself, in bf16 where the processor has it: much faster, and the same loss.
    """
    whole = read("gpt.py")
    runs = {str(step): (script(step), []) for step in [0, *titles()]}
    runs[str(max(titles()))] = whole, ["--save="]
    for step, changes in WITHOUT.items():
        pairs = [change for change in changes if not isinstance(change, str)]
        options = [change for change in changes if isinstance(change, str)]
        runs[f"without {step}"] = edit(whole, pairs), ["--save=", *options]
    return runs


def results():
    """Return what has been measured so far: {"iters/seed/name": [loss, sample]}."""
    return json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}


def by_seed(name, iters=300):
    """Return {seed: loss} as measured for a step, or for "without N"."""
    keys = {key: key.split("/") for key in sorted(results())}
    return {seed: results()[key][0] for key, (count, seed, what) in keys.items()
            if (count, what) == (str(iters), str(name))}


def found(name, iters=300):
    """Return the losses measured for a step, or for "without N", over all seeds."""
    return list(by_seed(name, iters).values())


def measure(iters, seeds, jobs, only):
    """Train all variants that have not been trained yet; go on where a run was cut off."""
    lock, runs, done_before = Lock(), variants(), results()

    def train(work):
        seed, name = work
        key = f"{iters}/{seed}/{name}"
        if key in done_before:
            return
        source, options = runs[name]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "script.py").write_text(source, encoding="utf-8")
            done = subprocess.run(
                [sys.executable, "script.py", f"--text_file={ROOT / 'input.txt'}",
                 f"--seed={seed}", f"--max_iters={iters}", f"--eval_interval={iters}",
                 "--max_new_tokens=160", *options], cwd=folder, text=True, encoding="utf-8",
                capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        losses = re.findall(r"(?m)^step \d+: train loss \S+, val loss (\S+)", done.stdout)
        if done.returncode or not losses:
            print(f"{key} has failed: {done.stderr or done.stdout}", flush=True)
            return
        sample = done.stdout.split("--- sample 1 of 1 ---\n")[1]
        with lock:
            MEASURED.write_text(json.dumps({**results(), key: [float(losses[-1]), sample]},
                                           indent=0, sort_keys=True), encoding="utf-8")
            print(f"{key}: {losses[-1]}", flush=True)

    work = [(seed, name) for seed in seeds for name in runs if re.search(only, name)]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, work))


def mean(name, iters=300):
    """Return the mean loss measured for a step, or for "without N"; nan if there is none."""
    losses = found(name, iters)
    return sum(losses) / len(losses) if losses else math.nan


def sample_of(step):
    """Return two lines that the model of a step has written (seed 1337)."""
    _, sample = results().get(f"300/1337/{step}", (math.nan, ""))
    return "\n".join([line for line in sample.split("\n") if line.strip()][:2])


def chart():
    """Return the losses of all steps as a drawing for GitHub."""
    steps = [0, *titles()]
    return ["```mermaid",
            '%%{init: {"themeVariables": {"xyChart": {"plotColorPalette": "#2563eb"}}}}%%',
            "xychart-beta", '    title "validation loss after 300 steps of training"',
            f'    x-axis "step of the lesson" {steps}',
            '    y-axis "loss" 1.4 --> 2.6',
            f"    line [{', '.join(f'{mean(step):.3f}' for step in steps)}]", "```", ""]


def table():
    """Return the table of all steps; what has not been measured gets no column."""
    names = {"whole without it": 300, "the same, 1,500 steps": 1500}
    names = {title: iters for title, iters in names.items()
             if sum(bool(found(f"without {step}", iters)) for step in titles()) > 1}
    rows = ["| " + " | ".join(["step", "", "lines added", "loss with it", "change", *names]) + " |",
            "|---" * (5 + len(names)) + "|"]
    for step, title in {0: "bigram", **titles()}.items():
        change = f"{mean(step) - mean(step - 1):+.3f}" if step else ""
        row = [step, title, lines_of(step) if step else "", f"{mean(step):.3f}", change]
        for iters in names.values():
            whole, without = by_seed(max(titles()), iters), by_seed(f"without {step}", iters)
            more = [loss - whole[seed] for seed, loss in without.items() if seed in whole]
            row.append(f"{mean(f'without {step}', iters):.3f} ({sum(more) / len(more):+.3f})"
                       if more else "")
        rows.append("| " + " | ".join(map(str, row)) + " |")
    return [*rows, ""]


def worth():
    """Return the table of what stands in for attention and for Muon, as far as measured."""
    runs = {"the whole": max(titles()), "without attention": "without 4",
            "without token shift": "without 14", "without both": "without 4 and 14",
            "AdamW in place of Muon, learning rate 0.002": "without 15, rate 0.002",
            "AdamW in place of Muon, learning rate 0.004": "without 15",
            "AdamW in place of Muon, learning rate 0.008": "without 15, rate 0.008"}
    rows, head = [[title] for title in runs], [""]
    for iters in (300, 1500):  # all on the seeds on which attention was taken out
        seeds = list(by_seed("without 4", iters))
        head.append(f"loss after {iters:,} steps (seeds: {', '.join(seeds)})")
        for row, name in zip(rows, runs.values()):
            losses = [loss for seed, loss in by_seed(name, iters).items() if seed in seeds]
            row.append(f"{sum(losses) / len(losses):.3f}" if losses else "")
    return ["| " + " | ".join(row) + " |" for row in [head, ["---"] * 3, *rows]] + [""]


def walk():
    """Return the steps one by one: text, losses, the sample, the difference."""
    out = ["### Step 0: a table", "", text_below("What a language model does", "bigram.py"), "",
           text_below("The model: a table", "bigram.py"), "",
           f"Loss: **{mean(0):.3f}**. It writes:", "", "```", sample_of(0), "```", ""]
    for step, title in titles().items():
        # What gpt.py says of the loss would stand just above the same losses.
        text = re.sub(r"\s+After\s+300\s+steps,\s+the\s+loss\s+is\s+\S+\s+instead\s+of\s+\d\.\d+\.",
                      "", text_of(step))
        whole = {9: "a complete GPT", max(titles()): "gpt.py without its extras"}.get(step)
        sample = results().get(f"300/1337/{step}", ("", ""))[1].strip()
        if not whole:
            sample = sample_of(step)
        one = [by_seed(number).get("1337", math.nan) for number in (step - 1, step)]
        out += [f"### Step {step}: {title}", "", text, "",
                f"Loss: {mean(step - 1):.3f} before, **{mean(step):.3f}** after. "
                f"(With seed 1337, as in your own run: {one[0]:.3f} and {one[1]:.3f}.) "
                + (f"**This is {whole}.** " if whole else "") + "It writes:", "",
                "```", sample, "```", "",
                f"<details><summary>The difference ({lines_of(step)} lines of code)</summary>",
                "", "```diff", *difference(step), "```", "", "</details>", ""]
    return out


def readme(text):
    """Return the README with all that stands between the markers written anew."""
    for name, lines in (("chart", chart()), ("table", table()), ("worth", worth()),
                        ("walk", walk())):
        begin, end = f"<!-- {name}: by tests/steps.py -->\n", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        if not rest:
            raise ValueError(f"README.md has no {begin!r}")
        text = before + begin + "\n".join(["", *lines]) + end + rest.partition(end)[2]
    return text


def main():
    """Do what the options say."""
    parser = argparse.ArgumentParser(description="The steps from bigram.py to gpt.py.")
    parser.add_argument("--write", metavar="FOLDER", type=Path, help="write all scripts there")
    parser.add_argument("--bare", action="store_true", help="... without options and checks")
    parser.add_argument("--show", metavar="N", type=int, nargs="?", const=-1,
                        help="print what changes in step N; without N, list the steps")
    parser.add_argument("--measure", action="store_true", help="train every step, and the "
                        "whole without each; finished runs are kept in tests/steps.json")
    parser.add_argument("--iters", type=int, default=300, help="steps of training (300)")
    parser.add_argument("--seeds", default="1337,1338,1339", help="comma-separated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--only", default="", help="a pattern: the names to measure")
    parser.add_argument("--readme", action="store_true", help="write it into README.md")
    args = parser.parse_args()
    if args.show is not None and args.show not in (-1, *titles()):
        parser.error(f"--show={args.show}: the steps are 1 to {max(titles())}")
    if args.write:
        write_all(args.write, bare if args.bare else str)
    if args.show is not None:
        show(None if args.show == -1 else args.show)
    if args.measure:
        measure(args.iters, args.seeds.split(","), args.jobs, args.only)
        print("\n".join(table()))
    if args.readme:
        path = ROOT / "README.md"
        path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    if not any((args.write, args.show is not None, args.measure, args.readme)):
        parser.print_help()


if __name__ == "__main__":
    main()
