"""bigram.py: the simplest language model. It reads one character and guesses the next.
    python bigram.py --prompt="ROMEO:"    trains on input.txt, then writes (--help: all options)
Expect seconds on any computer, a validation loss near 2.5, and text that is right in little more
than pairs of letters. gpt.py is this script with a transformer in place of the table.
Shapes in comments: B batch_size, T time (at most block_size), V vocab_size.
"""
# %% Imports
import hashlib, math, os, re, sys, time
from pathlib import Path
import numpy as np
import requests
import torch
import torch.nn.functional as F
from torch import nn

# %% Hyperparameters: change them here or by --name=value. Of two values, the first is for CUDA.
argv = [] if (notebook := "ipykernel" in sys.modules) else sys.argv[1:]  # none in a notebook
device = "cuda" if torch.cuda.is_available() else "cpu"  # what computes: cuda, cpu or mps?
gpu = [device, *(a[9:] for a in argv if a[:9] == "--device=")][-1][:4] == "cuda"  # which preset?
text_file = "input.txt"  # what to learn from: any text in UTF-8; input.txt, if missing, comes from
text_url = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"  # here
text_sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # its checksum
seed = 1337  # the same seed on the same machine gives the same run
batch_size = 16 if gpu else 8  # how many windows of text are learnt from at once?
block_size = 256  # how long is a window, in characters: the most a prediction can look back on?
max_iters = 2000 if gpu else 1200  # how many times are the weights adjusted?
learning_rate = 0.05  # how far does each adjustment go?
eval_interval = 400 if gpu else 300  # how many adjustments between two measurements of the loss?
prompt = ""  # what does the sample continue? Empty: a new line; -: what you type
samples = 1  # how many continuations of it?
max_new_tokens = 500  # how many characters does each have?
temperature = 0.8  # below 1 keeps to likely characters, above 1 dares more
top_k = 0  # draw from the k likeliest characters only; 0: from all

# %% Machinery (to skip on a first reading): mistakes told in one line, and --name=value.
def check(fine, problem):
    """Unless all is fine, say in one line what is not and end with exit status 2."""
    if not fine:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
def explain(kind, error, trace):
    """The hook for uncaught errors: one line if the user can mend it, else the traceback."""
    if kind in (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C; or `| head`, which has seen enough
        os._exit(130 if kind is KeyboardInterrupt else 0)
    hints = {UnicodeDecodeError: f"text_file={text_file} is not UTF-8; save it as UTF-8 first",
             requests.RequestException: f"no {text_url} ({error}): save it as input.txt by hand",
             torch.OutOfMemoryError: f"out of memory; lower batch_size={batch_size}",
             OSError: f"{error}; give the path of a text in UTF-8"}
    for known, hint in hints.items():
        check(not isinstance(error, known), hint)
    sys.__excepthook__(kind, error, trace)
def write_whole(path, write):
    """Let write(part) make a file, then call it path: no one ever finds half a file there."""
    part = Path(f"{path}.part")
    try:
        write(part)
        part.replace(path)
    except (OSError, RuntimeError) as why:
        part.unlink(missing_ok=True)
        check(False, f"cannot write {path} (is the disk full?): {str(why).splitlines()[0]}")
sys.excepthook = explain
notebook or sys.stdout.reconfigure(errors="replace", line_buffering=True)  # prints ? if it must
settings = {k: v for k, v in globals().items() if type(v) in (int, float, str) and k[0] != "_"}
if "--help" in argv:
    block = Path(__file__).read_text("utf-8").partition("# %% Machinery")[0]
    for name, gloss in re.findall(r"(?m)^(\w+) = .+  # (.+)", block):
        name in settings and print(f"--{name}={settings[name]!r}  {gloss}")
    sys.exit()
for arg in argv:
    name, equals, value = arg.removeprefix("--").partition("=")
    check(arg[:2] == "--" and equals and name in settings,
          f"{arg} is not --name=value with a name out of {', '.join(settings)}")
    try:
        globals()[name] = type(settings[name])(value)
    except ValueError:
        check(False, f"{name}={value} should be of type {type(settings[name]).__name__}")
for name, least in dict(batch_size=1, block_size=1, max_iters=0, learning_rate=0, eval_interval=1,
                        seed=0, samples=1, max_new_tokens=0, temperature=0.001, top_k=0).items():
    check(globals()[name] >= least, f"{name}={globals()[name]} should be {least} or more")
try:
    torch.zeros(1, device=device)
except Exception as why:
    check(False, f"device={device} cannot be used ({str(why).splitlines()[0]}); try --device=cpu")
torch.manual_seed(seed)

# %% The text: input.txt beside this script, downloaded where it is missing; or a file of yours.
default = text_file == "input.txt"
path = (Path(globals().get("__file__", "")).parent if default else Path()) / text_file
if default and not path.exists():
    reply = requests.get(text_url, timeout=30)
    reply.raise_for_status()
    check(hashlib.sha256(reply.content).hexdigest() == text_sha256,
          f"{text_url} is not the text expected; save the right one by hand as {path}")
    write_whole(path, lambda part: part.write_bytes(reply.content))
text = path.read_text(encoding="utf-8-sig")
# The vocabulary: every distinct character is a token, its place in the sorted list is its id.
chars = sorted(set(text))
vocab_size, char_to_id = len(chars), {char: i for i, char in enumerate(chars)}
def encode(string):
    """String to token ids (T,); characters outside the vocabulary are an error, and named."""
    unknown = [f"{c!r} ({string.count(c)} times)" for c in sorted(set(string) - set(chars))[:20]]
    check(not unknown, f"{', '.join(unknown)} not in the vocabulary, {''.join(chars)[:500]!r}")
    return torch.from_numpy(np.fromiter(map(char_to_id.get, string), np.int32, len(string)))
def decode(ids):
    """Token ids to the string they stand for; the inverse of encode."""
    return "".join(chars[i] for i in ids)
# The last tenth is never trained on: the loss there tells learning from learning by heart.
train_data, val_data = encode(text).to(device).tensor_split([int(0.9 * len(text))])
check(len(val_data) > block_size, f"{text_file=} too short for {block_size=}")
newline = "\n" if "\n" in chars else chars[0]  # the start where none is given
encode("" if prompt == "-" else prompt)  # complain now, not after the training

# %% Batches: windows of the text in random order; one pass (epoch) ends before the next begins.
rng = torch.Generator(device).manual_seed(seed)  # for windows only: samples change no training
window = torch.arange(block_size + 1, device=device)
queue = window[:0]  # empty: places in the text where the windows still to come start
def get_batch():
    """Return inputs and targets, both (B, T). The targets are the inputs one character later, so
    every position is an example: given the characters up to here, which one comes next?"""
    global queue
    while len(queue) < batch_size:  # too few left: cut the text anew, at other places
        end = len(train_data) - block_size
        offset = torch.randint(min(block_size, end), (1,), device=device, generator=rng).item()
        cuts = torch.arange(offset, end, block_size, device=device)
        queue = torch.cat([queue, cuts[torch.randperm(len(cuts), device=device, generator=rng)]])
    at, queue = queue[:batch_size, None], queue[batch_size:]  # (B, 1)
    chunk = train_data[at + window].long()  # (B, T+1): each start (B, 1) + window (T+1)
    return chunk[:, :-1], chunk[:, 1:]

# %% The model: from the characters so far to a score (logit) for each one that might be next.
class LanguageModel(nn.Module):
    """Row i of a table holds the scores of the characters that may follow character i."""
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
    def forward(self, idx, targets=None):
        """Map ids (B, T) to logits (B, T, V) and, given targets (B, T), their loss (nats: ln)."""
        assert idx.shape[1] <= block_size, f"{idx.shape[1]} characters exceed {block_size=}"
        logits = self.table(idx)  # (B, T, V)
        # Mean of -ln(probability of the target). cross_entropy wants (B, V, T): .mT swaps two dims.
        return logits, (None if targets is None else F.cross_entropy(logits.mT, targets))
    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=0, seed=None, stream=False):
        """Continue B rows of ids one by one, repeatably with a seed; stream prints the first."""
        training, idx = self.training, idx.to(next(self.parameters()).device)
        rng = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        self.eval()
        for _ in range(max_new_tokens):
            T = min(idx.shape[1], block_size)  # Always fill the window: new lengths can be slow,
            full = F.pad(idx[:, -T:], (0, block_size - T))  # and no character looks ahead.
            logits = self(full)[0][:, T - 1]  # (B, V): [0] logits, T - 1 the last character
            logits = logits / temperature  # below 1 widens the gaps: the likeliest wins more often
            kth = logits.topk(min(top_k or vocab_size, vocab_size)).values[:, -1:]  # (B, 1): k-th
            logits = logits.masked_fill(logits < kth, -math.inf)  # those below it: probability 0
            new = torch.multinomial(logits.softmax(dim=-1), 1, generator=rng)  # (B, 1)
            idx = torch.cat([idx, new], dim=1)
            stream and print(decode(new[0]), end="", flush=True)
        self.train(training)
        return idx
model = LanguageModel().to(device)  # made here, with random weights; next, what adjusts them
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)  # each at its own pace
def write(start, length, seed):
    """Print a start and its continuation, character by character as they are drawn."""
    print(start, end="")
    model.generate(encode(start)[None], length, temperature, top_k, seed, stream=True)
    print()

# %% Measuring: always on the same windows, so the same model always gets the same number.
@torch.no_grad()
def estimate_loss():
    """Mean losses on train_data and val_data, nats per character, of 2**18 characters at most."""
    losses, count = [], min(len(val_data) - 1, 2**18) // block_size
    model.eval()  # evaluation mode: nothing is left to chance
    for split in (train_data, val_data):
        # The split can be cut into many windows; measure count of them, spread evenly.
        places = (torch.arange(count, device=device) * ((len(split) - 1) // block_size)) // count
        chunks = split[places[:, None] * block_size + window].long().split(batch_size)
        losses.append(sum(float(model(c[:, :-1], c[:, 1:])[1]) * len(c) for c in chunks) / count)
    model.train()
    return losses
terminal, times, recent = sys.stdout.isatty(), [], []
def show_progress(step, loss):
    """After each step: end a run gone wrong; tell speed and time left (once if no terminal)."""
    times.append(time.perf_counter())
    recent.append(loss.detach())
    value = float(recent[-2:][0])  # the step before: to read this one, we would wait for a GPU
    check(math.isfinite(value), f"the loss is {value} since step {step - 1}: lower the rates")
    pace = (times[-1] - times[0] + 1e-9) / max(1, len(times) - 1)  # seconds per step
    speed, left = batch_size * block_size / pace, pace * (max_iters - 1 - step) / 60
    if terminal or len(times) == 10:
        print(f"{step + 1} of {max_iters}: loss {value:.3f}, {speed:,.0f} characters/s, "
              f"{left:.1f} minutes left ", end="\r" if terminal else "\n")

# %% Training
print(f"{device}: {sum(p.numel() for p in model.parameters()):,} parameters learn {text_file}, "
      f"{len(text):,} characters\nguessing among {vocab_size}: loss {math.log(vocab_size):.4f}")
for step in range(max_iters + 1):
    last = step == max_iters  # no more adjustments, only measure
    if step % eval_interval == 0 or last:
        train_loss, val_loss = estimate_loss()
        terminal and print(" " * 79, end="\r")  # wipe the status line
        print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        check(math.isfinite(val_loss), f"the loss is {val_loss} since step {step}: lower the rates")
        write(newline, 80, seed)
    if last:
        break
    inputs, targets = get_batch()
    logits, loss = model(inputs, targets)
    model.zero_grad()  # or the new gradients would be added to the old
    loss.backward()
    optimizer.step()
    show_progress(step, loss)

# %% Writing: the prompt, and what might come after it.
for start in ((line.rstrip("\n") for line in sys.stdin) if prompt == "-" else [prompt]):
    known = set(start) <= set(chars)
    known or print(f"some of these characters are unknown; known are {''.join(chars)!r}")
    for i in range(samples if known else 0):
        print(f"--- sample {i + 1} of {samples} ---")
        write(start or newline, max_new_tokens, seed + i)
