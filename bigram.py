"""bigram.py: the simplest language model. From one character, it guesses the next.

    python bigram.py                     learns from input.txt in seconds, then writes
    python bigram.py --prompt="ROMEO:"   the same, and writes on from your words

The whole machine: character -> id -> a row of a table, with a score for every character
that may come next -> draw one, append it, repeat.

gpt.py is this script with a transformer in place of the table.

Shapes in comments: B batch_size, T time (up to block_size), V vocab_size.
"""

# %%
import argparse
import hashlib
import inspect
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import requests  # missing? python -m pip install torch numpy requests
import torch
import torch.nn.functional as F
from torch import nn

# %% [markdown]
# ## Hyperparameters
# The numbers that are not learned but chosen. Change them here, or on the command
# line, for example with `--max_iters=300`.

# %%
text_file = "input.txt"  # what to learn from: any text in UTF-8
device = "cuda" if torch.cuda.is_available() else "cpu"  # on which device to compute?
seed = 1337              # of random numbers: the same seed gives the same run
batch_size = 8           # how many pieces of text are learned from at once?
block_size = 256         # context length: how many characters does a piece have?
max_iters = 1500         # training steps: how often are the weights adjusted?
eval_interval = 300      # how many steps from one evaluation to the next?
prompt = ""              # what shall the model continue? (With -, you type it)
samples = 1              # how many continuations?
max_new_tokens = 500     # how many characters shall it write?
temperature = 0.8        # below 1 keeps to likely characters, above 1 dares more
top_k = 0                # draw from the k likeliest characters only (0: from all)
learning_rate = 0.05     # how far does one step go?


# %% [markdown]
# ## Options
# Each line above is also an option of the command line, which is read here. Nothing
# of this is about language models: on a first reading, skip to "The text".

# %%
script = Path(vars().get("__file__", "notebook"))
parser = argparse.ArgumentParser(script.name, usage=argparse.SUPPRESS,
                                 argument_default=argparse.SUPPRESS, allow_abbrev=False)
kinds = {"text_file": str, "device": str, "prompt": str, "save": str, "load": str,
         "dtype": str, "temperature": float, "learning_rate": float, "dropout": float,
         "muon_lr": float, "momentum": float, "weight_decay": float}  # all others: int
given, glosses = {}, {}
if __name__ == "__main__" and Path(sys.argv[0]).name in script.parts:  # no notebook
    # What --help says of an option is its comment in the cell above, if it has one.
    source = inspect.getsource(sys.modules["__main__"]).split("## Options")[0]
    glosses = dict(re.findall(r"(?m)^(\w+) = [^{\n]+?(?:# (.+))?$", source))
    for name, gloss in glosses.items():
        gloss = gloss.replace("%", "%%")  # as argparse wants it
        parser.add_argument(f"--{name}", type=kinds.get(name, int), help=gloss)
    given = vars(parser.parse_args())

    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # Ctrl-C: no traceback
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)       # `| head`: none either

vars().update(given)
for name in glosses:
    value, kind = vars()[name], kinds.get(name, int)
    # An int will do for a float.
    if type(value) is not kind and (type(value), kind) != (int, float):
        parser.error(f"{name}={value!r} should be of type {kind.__name__}")
    least = 1 if name.startswith("n_") or name.endswith(("_size", "_interval")) else 0
    most = 2**15 if name == "block_size" else 2**31
    if kind is not str and not least <= value < most:
        parser.error(f"{name}={value} should be at least {least}, and below {most}")

for stream in (sys.stdin, sys.stdout):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace", line_buffering=True)  # prints ? if it must
try:
    torch.zeros(1, device=device).item()
except Exception as error:
    parser.error(f"{device=} cannot be used ({str(error).splitlines()[0]})")

# %% [markdown]
# ## The text
# `input.txt` has nine plays by Shakespeare: about a million characters, of 63
# kinds. The model will see nothing else, ever, and all losses told here are
# measured on it. Where the file is missing, the well-known Tiny Shakespeare is
# downloaded in its place: the same plays, with a few other lines, and 65 kinds of
# characters.
#
# (If you have skipped the options: `parser.error` ends the script with a message,
# `script` is this file, and `given` has the options of the command line.)

# %%
url = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text():
    """Return the text of text_file; input.txt lies beside this script."""
    path = Path(text_file)
    try:
        if text_file == "input.txt" and "text_file" not in given:
            path = script.resolve().parent / text_file
            if not path.exists():
                download(path)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        parser.error(f"no text in UTF-8 at {path} ({error}); put one there by hand")


def download(path):
    """Save the text at url as path, if its checksum is right."""
    reply = requests.get(url, timeout=30)
    reply.raise_for_status()
    if hashlib.sha256(reply.content).hexdigest() != sha256:
        raise OSError(f"{url} is not the text expected")
    unfinished = Path(f"{path}.{os.getpid()}.part")
    unfinished.write_bytes(reply.content)
    unfinished.replace(path)  # so that half a text is never taken for the whole


text = read_text()
print(f"{len(text):,} characters, which begin with {text[:14]!r}")

# %% [markdown]
# ## The vocabulary
# A model computes with numbers, so every distinct character gets one, its *id*: its
# place in the sorted list. The units that a model reads and writes are called
# *tokens*. Here, a token is a character.

# %%
chars = sorted(set(text))
vocab_size = len(chars)
char_to_id = {char: i for i, char in enumerate(chars)}


def encode(string):
    """Turn a string into a tensor of ids (T,)."""
    return torch.tensor([char_to_id[char] for char in string], dtype=torch.long)


def decode(ids):
    """Turn ids back into the string they stand for."""
    return "".join(chars[i] for i in ids)


print(f"{vocab_size} distinct ones: {''.join(chars)!r}")
print(f"{text[:5]!r} becomes {encode(text[:5]).tolist()}")
if prompt != "-" and not set(prompt) <= set(chars):
    parser.error(f"prompt={prompt!r} has characters that are not in the text")

# The last tenth is for *validation*: it is never trained on, and so it tells whether
# the model learns, or memorises.
data = encode(text).to(device)
train_data = data[:int(0.9 * len(data))]
val_data = data[int(0.9 * len(data)):]
if len(val_data) <= block_size:
    parser.error(f"{text_file} has {len(text)} characters, too few for {block_size=}: "
                 f"it should have {10 * (block_size + 1)} or more")

# %% [markdown]
# ## Batches
# The model learns from pieces of `block_size` characters, `batch_size` of them in
# each step. The targets are the inputs one character later. So each position in a
# piece is an example of its own: given the characters up to here, which one comes
# next?
#
# The text is used like a deck of cards, so that all of it is learned from equally
# often. It is cut into pieces, which are shuffled and dealt. When none is left, it
# is cut anew, at other places, and shuffled again.

# %%
chance = torch.Generator().manual_seed(seed)
# After each cut, there is room for a piece, and for the offset that moves it (below).
cuts = torch.arange(0, len(train_data) - 2 * block_size, block_size)
starts = []  # where the pieces begin, in the order in which they are dealt


def deal(step):
    """Return where the pieces of this step (1, 2, ...) begin: B positions."""
    while len(starts) < step * batch_size:  # too few: cut anew, and shuffle
        offset = torch.randint(block_size, (1,), generator=chance)
        shuffled = cuts[torch.randperm(len(cuts), generator=chance)]
        starts.extend((shuffled + offset).tolist())
    return starts[(step - 1) * batch_size:step * batch_size]


def get_batch(step):
    """Return the inputs and the targets of this step, both (B, T)."""
    pieces = [train_data[i:i + block_size + 1] for i in deal(step)]
    pieces = torch.stack(pieces)  # (B, T+1)
    return pieces[:, :-1], pieces[:, 1:]


inputs, targets = get_batch(1)
for t, target in enumerate(targets[0, :4], start=1):
    print(f"after {decode(inputs[0, :t])!r} comes {chars[target]!r}")

# %% [markdown]
# ## What a language model does
# From the characters so far, a language model gives each character of the
# vocabulary a score, also called a *logit*: the higher, the likelier this character
# comes next. Softmax turns the scores into probabilities, which are positive and
# add up to 1:
#
# probability = exp(score) / (sum of exp over all scores)
#
# The *loss* is -ln(probability of the character that really came), averaged over
# all positions. Guessing blindly among 63 characters gives a loss of ln(63) = 4.14.
# A loss of 1.4 means being as unsure as among exp(1.4) = 4 characters.
#
# To train a model is to make its loss small, by adjusting its *weights*, which are
# the numbers in it that are learned. The *gradient* of a number (a weight, or a
# result in between) tells how fast the loss rises as this number rises. PyTorch
# finds the gradients of all numbers on one way back through the model, from the
# loss to the inputs, each from those after it: a number that is multiplied by 3 on
# its way to the next one has 3 times the gradient of that one. This is called
# *backpropagation*.

# %% [markdown]
# ## The model: a table
# The simplest model looks at one character only. It has a table with a row for each
# character: the scores of all characters that may come after it. All it can learn
# is which pairs (*bigrams*) are common.

# %%
class LanguageModel(nn.Module):
    """From the characters so far to a score for each character that may come next."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)  # at first, it guesses blindly

    def forward(self, idx, targets=None):
        """Turn idx (B, T) into logits (B, T, V) and, with targets (B, T), the loss."""
        logits = self.table(idx)  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy does both softmax and -ln. It wants a row for each example.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# ## Model and optimizer
# Here the model is made; it has learned nothing yet. In each step of the training,
# an optimizer moves every weight a little against its gradient. AdamW takes a
# running mean of each gradient over the last steps, and divides it by the usual
# size of this gradient. So every weight moves by about `learning_rate`, and by less
# where the gradient keeps changing its sign. It also pulls every weight slightly
# towards zero.

# %%
torch.manual_seed(seed)
model = LanguageModel().to(device)
optimizers = [torch.optim.AdamW(model.parameters(), lr=learning_rate)]  # or several

# %% [markdown]
# ## Writing
# One character is drawn from those that may come next, the likely ones more often.
# It is appended to the text, and the model is asked again.

# %%
# No gradients are needed here.
@torch.inference_mode()
def generate(idx, max_new_tokens, temperature=1.0, top_k=0):
    """Continue idx, ids (T,): yield max_new_tokens new ids, one at a time."""
    for _ in range(max_new_tokens):
        logits, _ = model(idx[None, -block_size:])  # (1, T, V), T at most block_size
        logits = logits[0, -1]                      # (V,): scores after the last one
        logits = logits / max(temperature, 1e-6)    # below 1, likely ones gain
        if top_k:  # all but the k likeliest become impossible
            least = logits.topk(min(top_k, vocab_size)).values[-1]
            logits = logits.masked_fill(logits < least, -math.inf)
        probs = F.softmax(logits, dim=-1)           # (V,)
        new = torch.multinomial(probs, 1)           # (1,): draw one
        idx = torch.cat([idx, new])                 # append it
        yield new.item()


def write(start, length, seed):
    """Print start, and what the model writes after it as it comes."""
    torch.manual_seed(seed)
    print(start, end="")
    idx = encode(start or chars[0]).to(device)  # chars[0] is the end of a line here
    for new in generate(idx, length, temperature, top_k):
        print(chars[new], end="", flush=True)
    print()


# %% [markdown]
# ## Evaluation
# The loss is always measured on the same pieces, one after the other, so that the
# same model always gets the same number.

# %%
@torch.inference_mode()
def estimate_loss(data):
    """Return the mean loss over data (ids), in nats (ln, not log2) per character."""
    # A new piece begins every block_size characters, and is one longer for the targets.
    pieces = data.unfold(0, size=block_size + 1, step=block_size)  # (pieces, T+1)
    total = 0.0
    for batch in pieces.split(batch_size):
        logits, loss = model(batch[:, :-1], batch[:, 1:])
        total += loss.item() * len(batch)
    if not math.isfinite(total):
        parser.error("the loss is no longer a number; lower the learning rates")
    return total / len(pieces)


losses = {}  # {step: (training loss, validation loss)}


def evaluate(step):
    """Measure and print the losses after this step, and a short sample."""
    train_loss = estimate_loss(train_data[:2**15])  # a part of it is enough
    val_loss = estimate_loss(val_data[:2**18])      # all of it, if it is not huge
    line = f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}"
    # Wide enough to cover the progress line (further below).
    print(line.ljust(79))
    write("", 80, seed)
    losses[step] = train_loss, val_loss


# %% [markdown]
# ## Training
# One step: take a batch, compute the loss, let backpropagation find out how each
# weight changes the loss, and move each weight a little the other way. The whole
# training, further below, is this loop, with a look at the losses now and then:
#
#     for step in range(1, max_iters + 1):
#         inputs, targets = get_batch(step)
#         train_step(inputs, targets)

# %%
def train_step(inputs, targets):
    """Adjust all weights once, by this batch, (B, T) each; return its loss."""
    logits, loss = model(inputs, targets)
    model.zero_grad()      # forget the gradients of the step before
    loss.backward()        # find the gradient of the loss for every weight

    for optimizer in optimizers:
        optimizer.step()   # move every weight a little against its gradient
    return loss


# %% [markdown]
# # Running it
#
# ## Progress
# On a terminal, a line tells how far the training is.

# %%
def show_progress(step, loss):
    """Print it every ten steps; the run, below, began after first_step."""
    if step % 10 == 0 and os.isatty(1):
        minutes = (time.time() - began) / (step - first_step) / 60  # for one step
        print(f"step {step} of {max_iters}: loss {loss.item():.3f}, "
              f"{minutes * (max_iters - step):4.1f} minutes left ", end="\r")


# %% [markdown]
# ## The run
# The training, step after step, with a look at the losses and a sample now and
# then.

# %%
print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
first_step = 0
evaluate(first_step)

began = time.time()
for step in range(first_step + 1, max_iters + 1):
    inputs, targets = get_batch(step)
    loss = train_step(inputs, targets)
    show_progress(step, loss)
    if step % eval_interval == 0 or step == max_iters:
        evaluate(step)

# %% [markdown]
# ## The sample
# What has it learned to write?

# %%
prompts = [prompt]
if prompt == "-":  # each line that you type is one
    prompts = (line.rstrip("\r\n") for line in sys.stdin)
for start in prompts:
    if not set(start) <= set(chars):
        print(f"it knows these characters only: {''.join(chars)!r}")
        continue
    for i in range(samples):
        print(f"--- sample {i + 1} of {samples} ---")
        write(start, max_new_tokens, seed + i)
