"""gpt.py: a GPT that learns to write from one text, a character at a time.

    python gpt.py                     learns for some minutes, then writes
    python gpt.py --prompt="ROMEO:"   the same, and writes on from your words
    python gpt.py --part=1            the same with the model of part one only

The whole machine: characters -> ids -> vectors (embedding) -> blocks, each attention
(look back) and feed-forward (think) -> a score for every character that may come next
-> draw one, append it, repeat.

On a first reading, look at the hyperparameters, go on at "The text", stop where part
one ends, and look at "Running it" at the end: this is a complete GPT (a generative
pre-trained transformer), and its training (--part=1 runs it). Part two is what has
been found since: it learns more in as many steps. What is called "Extra" teaches
nothing about GPTs.

bigram.py is this script with the simplest model there is, and each "Step" is one idea
on the way from there to here. Each is also a short script of its own, without options
and extras: in the repository, `python tests/steps.py --write=bare --bare` writes them
all. bare/09_dropout.py is part one, and nothing else.

Shapes in comments: B batch_size, T time (up to block_size), C n_embd, D head size
(C / n_head), V vocab_size.
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
import zipfile  # Extra
from contextlib import contextmanager  # Extra
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
learning_rate = 0.004    # how far does one step of AdamW go? (Step 1)
n_embd = 192             # embedding dimension: how many numbers per character? (Step 1)
n_head = 2               # attention heads: in how many ways to look back? (Step 5)
n_layer = 4              # depth: how many blocks follow one another? (Step 8)
dropout = 0.0            # what share of the characters is hidden in training? (Step 9)
part = 2                 # which model: that of part one, or that of part two? (Step 10)
muon_lr = 0.02           # how far does one step of Muon go? (Step 15)
momentum = 0.9           # how much of earlier gradients does Muon keep? (Step 15)
weight_decay = 0.1       # how strongly does Muon pull weights to zero? (Step 15)
save = "gpt.pt"          # where is the best model kept? Empty: nowhere (Extra)
load = ""                # which checkpoint to start from? (Extra)
dtype = "auto"           # bfloat16 where the processor has it, or float32? (Extra)

# Extra: on a CUDA GPU, these take the place of the numbers above. Change them here.
gpu_preset = {"batch_size": 16, "max_iters": 1000, "eval_interval": 250, "n_embd": 384,
              "n_head": 3, "n_layer": 6, "dropout": 0.05, "momentum": 0.95,
              "weight_decay": 0.3}

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

in_cell = {k: v for k, v in vars().items() if type(v) in (int, float)}  # Extra
if "cuda" in str(given.get("device", device)):  # Extra
    vars().update(gpu_preset)
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
# ## Extra: start from a checkpoint
# Without `--load`, this does nothing. A checkpoint brings its numbers along, except
# for those that you give, or have changed above.

# %%
SETTINGS = ["part", "block_size", "n_embd", "n_head", "n_layer", "seed", "batch_size",
            "max_iters", "eval_interval", "max_new_tokens", "temperature", "top_k",
            "learning_rate", "dropout", "muon_lr", "momentum", "weight_decay"]
as_written = {name: [in_cell[name], gpu_preset.get(name, in_cell[name])]
              for name in SETTINGS}  # for the CPU, and for a GPU
PARTS = {"settings", "as_written", "model", "optimizers", "step", "best", "losses",
         "chars", "excerpt", "text_sha256"}


def read_checkpoint(path):
    """Return the checkpoint in this file; complain if it is none, or damaged."""
    if not Path(path).exists():
        parser.error(f"there is no file {path}")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # the name of a part, or None
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not damaged and set(checkpoint) == PARTS:
            names = [list(checkpoint["settings"]), list(checkpoint["as_written"])]
            numbers = [*map(torch.tensor, checkpoint["settings"].values()),
                       *checkpoint["best"]["weights"].values()]
            if names == 2 * [SETTINGS] and all(n.isfinite().all() for n in numbers):
                return checkpoint
    except Exception:
        pass  # whatever is wrong with it, it is none of ours
    parser.error(f"{path} is no checkpoint of this gpt.py, or it is damaged; "
                 "move it away, or name another file")


checkpoint = read_checkpoint(load) if load else None
if checkpoint:
    # Which of the two in as_written?
    here = 1 if "cuda" in device else 0
    for name, value in checkpoint["settings"].items():
        changed = as_written[name][here] != checkpoint["as_written"][name][here]
        if name not in given and not changed:
            vars()[name] = value
    same_size = checkpoint["settings"]["block_size"] == block_size
another_text = "text_file" in given or text_file != "input.txt"
finished = (checkpoint and checkpoint["step"] >= max_iters and same_size
            and not another_text)

# Of several processes (torchrun), each has its own GPU, and only the first one speaks.
if "cuda" in device:
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
if torch.distributed.is_torchelastic_launched() and os.environ["RANK"] != "0":
    sys.stdout, sys.stdin = open(os.devnull, "w"), open(os.devnull)

if part not in (1, 2):
    parser.error(f"{part=} should be 1 or 2")
if n_embd % 4 or n_embd % (2 * n_head):
    parser.error(f"{n_embd=} should be a multiple of 4 and of 2 * {n_head=}")
if n_layer * n_embd * (batch_size * block_size + n_embd) > 2**32:
    parser.error("too large for any memory; lower n_layer, n_embd, or batch_size")
if max(dropout, momentum) >= 1:
    parser.error(f"{dropout=} and {momentum=} should be below 1")
if dtype not in ("auto", "bfloat16", "float32"):
    parser.error(f"{dtype=} should be auto, bfloat16 or float32")

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
#
# (Extra: `checkpoint` and `finished` are about going on with an earlier run.)

# %%
url = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text():
    """Return the text of text_file; input.txt lies beside this script."""
    if finished:  # Extra: what its checkpoint has of the text is enough
        return checkpoint["excerpt"]
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
if checkpoint:  # Extra: another text may have characters that the checkpoint lacks
    chars = checkpoint["chars"] + sorted(set(text) - set(checkpoint["chars"]))
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
# # Part one: a GPT
#
# Each step adds an idea, and most of them tell what it brings. "The loss is 2.34
# instead of 2.53" means: with all ideas up to this one, the loss in validation is
# 2.34, and without this one, it is 2.53. (Both are measured after 300 steps of
# training, `max_iters = 300`, with the numbers for a CPU, and are means over three
# seeds. In part one, a difference of less than 0.05 may be chance. The README tells
# how to get a script for each idea.) The first three gain nothing yet: they prepare
# the fourth, attention, which gains a lot.
#
# What do such losses mean? Models that have them write like this:
#
# - 2.50 (a table): `Athtimacowin muphe hirkend y t dinsp me comurar andil`
# - 2.13 (part one): `Enw me' mme him ake you din prow come a pand afthe`
# - 1.36 (part two, after 1,500 steps): `But, may win my master and your best`
#
# ## Step 1: embedding
# The simplest model is a table with a row of scores for each character: what comes
# after it? (This is bigram.py.) But a table knows characters by name only. What it
# learns about `a` tells it nothing about `e`. So we give each character a vector of
# `n_embd` numbers, its *embedding*, which is learned like all other weights.
# (`nn.Embedding` is a table of them: for an id, it gives the row of this number.)
# Characters that behave alike can become alike. A linear layer, `lm_head` (the head
# of a language model), then turns a vector into scores. On its own, this can say no
# more than the table. But from now on there are vectors, to which more can be
# added. (From here on, the `learning_rate` is 0.004 instead of 0.05. In the table,
# each score is a weight of its own. Now it is a sum of `n_embd` products, whose
# weights all move at once, so each should move less.) After 300 steps, the loss is
# 2.51 instead of 2.50.
#
# Most of the later steps change how the vectors are made. So this is a method of
# its own, which they can replace.

# %%
class LanguageModel(nn.Module):
    """From the characters so far to a score for each character that may come next."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, n_embd)  # Step 1
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        nn.init.zeros_(self.lm_head.weight)  # at first, it guesses blindly

    def vectors(self, idx):
        """Return a vector for each position: idx (B, T) to (B, T, C)."""
        return self.token_embedding(idx)

    def forward(self, idx, targets=None):
        """Turn idx (B, T) into logits (B, T, V) and, with targets (B, T), the loss."""
        x = self.vectors(idx)     # (B, T, C), Step 1
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits, None
        # cross_entropy does both softmax and -ln. It wants a row for each example.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# ## Step 2: a mean of the text so far
# So far each vector knows one character only. To guess what follows `Rome`, the
# model looks at the `e`. The simplest way to tell the `e` what came before it is
# the *mean* of all vectors so far. Let x be the vectors of all positions. Then all
# means are one product of matrices, `equal_weights @ x` (the same weights for every
# piece of the batch). Row t of `equal_weights` has equal numbers for the positions
# 0 to t. It has 0 for the later ones, which must stay hidden: they are what the
# model is to guess. The means are then added to x, so that it keeps what it knows:
# x + equal_weights @ x.
#
# A plain mean does not help yet: all characters count alike in it, be they near or
# far, and whether they tell much or little. After 300 steps, the loss is 2.52
# instead of 2.51. But attention, soon, will be a mean as well, with better weights.
# (It takes the place of this one. So gpt.py only shows here what these weights do.)

# %%
# Row t is True for the positions 0 to t (tril keeps the lower left of a matrix).
may_see = torch.ones(block_size, block_size, device=device).tril().bool()  # (T, T)
equal_weights = may_see / may_see.sum(dim=1, keepdim=True)                 # (T, T)
print("weights of a plain mean, for 4 positions:")
print(equal_weights[:4, :4].cpu().numpy().round(2))
numbers = torch.tensor([2.0, 4.0, 6.0, 8.0], device=device)
means = equal_weights[:4, :4] @ numbers[:block_size]
print(f"means of 2, 4, 6, 8 so far: {means.cpu().numpy().round(2)}")

# %% [markdown]
# ## Step 3: positions
# A mean does not care about order: it is the same, whatever comes first. So a
# vector that tells the position is added to each vector of a character. Its numbers
# belong together in pairs, the sine and the cosine of an angle (number i and number
# i + C/2 are a pair). Think of each pair as a clock with one hand: these two
# numbers say where the tip of the hand is. From one position to the next, the hand
# turns by a fixed angle. Let that be 10 degrees: at positions 4 and 5 it is at 40
# and 50 degrees, and at positions 104 and 105 at 320 and 330. So one position back
# always means 10 degrees back. Some clocks are fast, to tell near positions apart,
# and some are slow, for far ones. (Does adding not spoil the character? With so
# many numbers in a vector, the model learns to keep the two apart.)
#
# In a plain mean, this does not help yet. It adds up the characters, and it adds up
# the clocks, and does not tell any more which clock came with which character. The
# next step can use them. After 300 steps, the loss is 2.53 instead of 2.52. (After
# Vaswani et al. 2017, arXiv:1706.03762. GPT-2 has a table of learned vectors
# instead.)

# %%
# From one position to the next, the fastest clock turns by 1 (in radians, which is 57
# degrees), and the slowest one by 1 / block_size. In between, each is slower than the
# one before by the same factor.
speeds = block_size ** -torch.linspace(0, 1, n_embd // 2)              # (C/2,)
angles = torch.arange(block_size)[:, None] * speeds                    # (T, C/2)
positions = torch.cat([angles.sin(), angles.cos()], dim=1).to(device)  # (T, C)

# %% [markdown]
# ## Step 4: attention
# Attention takes the place of the plain mean, and is added to x as that was. It is
# a mean as well, but the model computes the weights for itself, anew for each text.
# With three linear layers (without a bias, each is a product with a matrix and no
# more), each position makes three vectors of D numbers from its vector x. (All this
# together is called a *head*. As long as there is only one, D = C.)
#
# - the **query** says what this position is looking for,
# - the **key** says what it has to offer to others,
# - the **value** is what it hands over to them.
#
# For example, the query of the `e` in `Rome` may ask: where are capital letters?
# The key of the `R` says: I am one. Its value tells: I am an R.
#
# The product of a query and a key (multiply number by number, then add up) is a
# *score*: the better the two fit, the larger it is. Softmax turns each row of
# scores into weights, positive and adding up to 1. The mean with these weights is
# taken over the values. (The names are the usual ones, but ambiguous: these scores
# are not those of characters, these weights are computed, not learned, and
# `lm_head` is no head of attention.)
#
# Let the scores of `R`, `o`, `m` and `e` be 2, 0, 0 and 1. Softmax makes the
# weights (about) 0.61, 0.08, 0.08 and 0.22 of them. So what the `e` gets is mostly
# the value of the `R`.
#
# In one line:
#
# attention = softmax(queries @ keys.T / sqrt(D) + mask) @ values
#
# The mask gives later positions a score of minus infinity, which softmax turns into
# a weight of 0.
#
# Why sqrt(D)? A score is a sum of D products, some positive and some negative.
# These partly cancel, so the sum is not D times as large as one of them, but
# typically sqrt(D) times. Softmax of large scores gives nearly all the weight to
# one position, and then a small change of the scores has hardly any effect, so
# little can be learned from it. (Vaswani et al. 2017)
#
# How can a head find the character just before? By the clocks. The product of two
# hands is largest where they point the same way. A linear layer can turn the hands
# that it gets (any turn is a product with a matrix). So let the keys be the clocks
# as they are, and the queries the clocks turned back by one step. At position 5,
# the hand of the query then is not at 50 degrees but at 40, as is that of the key
# at position 4. So these two fit best. With the fastest clock, which turns by 57
# degrees, the products with the keys of the positions 3, 4 and 5 are 0.54, 1 and
# 0.54. (Clocks of other speeds rule out the positions at which this one fits
# again.) This is learned once, and works everywhere. After 300 steps, the loss is
# 2.34 instead of 2.53.

# %%
# The mask is added to the scores: 0 where a position may look, else minus infinity.
mask = torch.where(may_see, 0.0, -math.inf)  # (T, T)


class Head(nn.Module):
    """One head of attention: (B, T, C) to (B, T, D). Part two changes `scores`."""

    def __init__(self):
        super().__init__()
        D = n_embd // n_head
        self.query = nn.Linear(n_embd, D, bias=False)
        self.key = nn.Linear(n_embd, D, bias=False)
        self.value = nn.Linear(n_embd, D, bias=False)

    def scores(self, q, k):
        """Return how well each query (a row) fits each key (a column): (B, T, T)."""
        return q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])

    def weights(self, x):
        """Return how much each position (row) takes from each (column): (B, T, T)."""
        T = x.shape[1]
        q, k = self.query(x), self.key(x)  # each (B, T, D)
        scores = self.scores(q, k)         # (B, T, T)
        scores = scores + mask[:T, :T]     # (B, T, T)
        return F.softmax(scores, dim=-1)   # (B, T, T)

    def forward(self, x):
        v = self.value(x)           # (B, T, D)
        return self.weights(x) @ v  # (B, T, D)


# %% [markdown]
# ## Step 5: several heads
# One head has one row of weights for each position, so it looks for one thing at a
# time. Several heads look for several things at once. Each of them makes vectors of
# D = `n_embd / n_head` numbers. Side by side, these are `n_embd` numbers again, so
# together they have no more weights than a single large one. A linear layer,
# `proj`, mixes what they found. (This is added to x. Without `proj`, each head
# could only add to its own D numbers of it.) After 300 steps, the loss is 2.31
# instead of 2.34. (With one of the three seeds, the loss is not lower.)

# %%
class MultiHeadAttention(nn.Module):
    """Several heads side by side: (B, T, C) to (B, T, C)."""

    def __init__(self, head_class):  # part two has other heads
        super().__init__()
        self.heads = nn.ModuleList([head_class() for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        found = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, C)
        return self.proj(found)                                      # (B, T, C)


# %% [markdown]
# ## Step 6: feed-forward
# Attention gathers. Then each position works out, by itself, what follows from what
# it has. A linear layer looks for `4 * n_embd` patterns in the vector: each is a
# row of learned numbers, and the product with it is large where the two fit, as
# with query and key. ReLU sets negative numbers (patterns that are not there) to 0.
# A second linear layer turns the patterns that are there into conclusions. Without
# ReLU in between, two linear layers could do no more than one (the product of two
# matrices is just another matrix). Most of the weights of a block are here. After
# 300 steps, the loss is 2.18 instead of 2.31.

# %%
class FeedForward(nn.Module):
    """Two linear layers with ReLU in between: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd)
        self.down = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        x = F.relu(self.up(x))  # (B, T, 4C)
        return self.down(x)     # (B, T, C)


# %% [markdown]
# ## The block
# A block does not replace the vector x by what it has found. It *adds* it to x,
# which is called a *residual connection*. So what x already knows is not lost. It
# also helps the training: on its way back from the loss, the gradient would be
# changed by each layer, and might fade; but it passes through a sum unchanged.
#
# ## Step 7: LayerNorm
# With every addition (soon there will be many), the numbers in x can grow. So a
# LayerNorm stands before attention, one before feed-forward, and one before
# `lm_head`. It shifts and scales each vector, so that its numbers have mean 0 and
# variance 1. (Then it multiplies by one learned vector, and adds another.) So what
# follows always reads numbers of a steady size, however large x becomes. After 300
# steps, the loss is 2.14 instead of 2.18. (It gains with each of the three seeds.)

# %%
class Block(nn.Module):
    """Adds to x what it has found: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(Head)
        self.feed_forward = FeedForward()              # Step 6
        self.norm1 = nn.LayerNorm(n_embd)              # Step 7
        self.norm2 = nn.LayerNorm(n_embd)              # Step 7
        nn.init.zeros_(self.attention.proj.weight)     # Step 8
        nn.init.zeros_(self.feed_forward.down.weight)  # Step 8

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.feed_forward(self.norm2(x))  # Step 6
        return x


# %% [markdown]
# ## The GPT
# It is the language model of Step 1, with better vectors.
#
# ## Step 8: depth
# `n_layer` blocks in a row: what one block has found, the next one can build on.
# The first block may combine letters into words, and the second one may look for
# the words before. This takes a longer training: after 300 steps, the validation
# loss is no different yet; after 1,200 steps, it is 1.81 with four blocks instead
# of 1.85 with one.
#
# A deep model is harder to train, so the last layer of attention and that of
# feed-forward begin at zero. At first a block adds next to nothing, and the deep
# model is as simple as a shallow one. (Zeros can learn: in w * x, the gradient of w
# is x times that of the product, also where w is 0. What stands before zeros learns
# as soon as they are no longer 0.)
#
# ## Step 9: dropout
# A large model can learn a small text by heart. During training, dropout sets
# vectors to 0, chosen at random (and scales the others up to make up for it), so
# that the model hardly ever sees a passage the same way twice. Here it hides the
# whole vector of a position (`nn.Dropout1d`). Most GPTs hide single numbers instead
# (`nn.Dropout`), inside the blocks as well. `model.train()` switches it on, and
# `model.eval()` off. With the numbers for a CPU, the rate is 0, because the
# training is too short to learn by heart. A short text is learned by heart soon:
# with the first 20,000 characters only, the loss of this model in validation falls
# to 1.96 within 300 steps, and has risen to 4.20 after 1,000, where the model is
# sure, and wrong. With a rate of 0.2, it falls to 1.98, and has risen to 2.10. (So
# it also helps to stop early.)

# %%
class GPT(LanguageModel):
    """The language model whose vectors know the text so far."""

    def __init__(self, block_class):  # part two has other blocks
        super().__init__()
        self.blocks = nn.Sequential(*[block_class() for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embd)      # Step 7
        self.dropout = nn.Dropout1d(dropout)  # Step 9: of whole vectors

    def vectors(self, idx):
        """Return a vector for each position: idx (B, T) to (B, T, C)."""
        x = self.token_embedding(idx)       # (B, T, C)
        x = x + positions[:idx.shape[1]]    # (B, T, C), Step 3
        x = self.dropout(x)                 # (B, T, C), Step 9
        x = self.blocks(x)                  # (B, T, C)
        x = self.norm(x)                    # (B, T, C), Step 7
        return x


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
model = GPT(Block).to(device)  # since Step 2, a GPT
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
    model.train()          # Step 9: with dropout
    logits, loss = model(inputs, targets)
    model.zero_grad()      # forget the gradients of the step before
    loss.backward()        # find the gradient of the loss for every weight

    for optimizer in optimizers:
        optimizer.step()   # move every weight a little against its gradient
    model.eval()           # Step 9: all but training is done without dropout
    return loss


# %% [markdown]
# ## The end of part one
# This was a whole GPT: GPT-2 of 2019 is made in this way, only much larger. (The
# main differences: it reads pieces of words; it has GELU, a smoother ReLU; a
# learned table of positions; and one matrix for both embedding and `lm_head`.) You
# can stop here: the cell "The run" near the end trains it, if `part` is 1 (it is 2,
# unless you change it). (After 1,500 steps, its loss is 1.78. That of part two is
# 1.36.)

# %% [markdown]
# # Part two: what has been found since
# The model of GPT-2 has none of the pieces that follow. The eight steps of part two
# bring down the loss after 300 steps, together, from 2.14 to 1.52.
#
# ## Step 10: rotary positions
# Of two positions, the distance should count, not where they stand. With the clocks
# of Step 3, a model has to learn this; it can also be built in. So do not add
# clocks to the vectors; *turn* the queries and keys themselves. Take their numbers
# in pairs: each pair is a hand of a clock. Turn it by an angle that is the position
# times a speed. At a speed of 10 degrees, a query at position 7 is turned by 70
# degrees, and a key at position 5 by 50. The product of two hands depends on their
# lengths, which stay as they are, and on the angle between them. The turning
# changes this angle by 20 degrees here, and at the positions 107 and 105 by 20
# degrees again. (Su et al. 2021, arXiv:2104.09864, known as RoPE) Values are not
# turned: they say what is there, not where.
#
# How is a hand turned? Its tip is at (a, b). The hand (1, 0) turns to (cos, sin),
# and the hand (0, 1) to (-sin, cos). So (a, b) turns to a times the one plus b
# times the other.
#
# The model of part two, further below, begins with this step. It adds no clocks
# (Step 3). After 300 steps, the loss is 2.03 instead of 2.14.

# %%
# Speeds and angles, as in Step 3, but for the D numbers of a head. (From 1 down to
# about 1/10000 is the usual choice.)
speeds = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2)  # (D/2,)
angles = torch.arange(block_size)[:, None] * speeds             # (T, D/2), in radians
cos, sin = angles.cos().to(device), angles.sin().to(device)     # each (T, D/2)


def rotate(x):
    """Turn each pair x[i], x[i + D/2] of x (B, T, D) by its angle at each position."""
    T = x.shape[1]
    a, b = x.chunk(2, dim=-1)             # each (B, T, D/2), the tips of the hands
    turned_a = a * cos[:T] - b * sin[:T]  # (B, T, D/2), and where they are afterwards
    turned_b = a * sin[:T] + b * cos[:T]  # (B, T, D/2)
    return torch.cat([turned_a, turned_b], dim=-1)


class RotaryHead(Head):
    """A head whose scores depend on distances."""

    def scores(self, q, k):
        return super().scores(rotate(q), rotate(k))


# %% [markdown]
# ## Step 11: normalised queries and keys
# A score can be large because the query fits the key, or just because one of them
# has large numbers. So both pass through a LayerNorm (Step 7, here without learned
# vectors). After it, the squares of the D numbers add up to D, so all queries and
# keys have the same length, sqrt(D). Then only the angle between them counts, and
# no score exceeds D / sqrt(D) = sqrt(D).
#
# It also helps in the beginning. `nn.Linear` begins with small weights, so scores
# are about 0.3 in size at first, and attention is nearly a plain mean. With the
# LayerNorm, they are about 1 in size. From here on, no layer of a block begins at
# zero any more (Step 8), since the complete model learns better without these
# zeros. (Dehghani et al. 2023, arXiv:2302.05442, known as QK-norm) After 300 steps,
# the loss is 1.97 instead of 2.03. (This is for both changes.)

# %%
class NormedHead(RotaryHead):
    """A rotary head in which only the directions of queries and keys count."""

    def scores(self, q, k):
        q = F.layer_norm(q, q.shape[-1:])
        k = F.layer_norm(k, k.shape[-1:])
        return super().scores(q, k)  # which turns them


# %% [markdown]
# ## Step 12: gated heads
# The weights of the mean add up to 1. So a head hands something over even where
# nothing fits. With a *gate*, it can keep silent. A gate is a vector of factors, by
# which what was found is multiplied, number by number: a factor near 0 holds a
# number back. One more linear layer computes the factors, from the same vector that
# the head reads. `sigmoid` turns any number into one between 0 and 1, and 0 into
# 0.5. It is doubled, so that the factors are about 1 at first. (After Qiu et al.
# 2025, arXiv:2505.06708) The model is 8% larger with these gates. After 300 steps,
# the loss is 1.91 instead of 1.97.

# %%
class GatedHead(NormedHead):
    """A normed head with a gate behind it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(n_embd, n_embd // n_head)

    def forward(self, x):
        gate = 2 * torch.sigmoid(self.gate(x))  # (B, T, D), between 0 and 2
        return gate * super().forward(x)        # (B, T, D)


# %% [markdown]
# ## Step 13: gated feed-forward
# In feed-forward with ReLU, each pattern counts by itself. Here, two layers look
# for patterns, and their results are multiplied: one pattern counts only together
# with another. One of the two is the gate: it passes through `F.silu`, a smooth
# ReLU. The three layers are narrower (8/3 C instead of 4 C), so that they have as
# many weights as the two had. (Shazeer 2020, arXiv:2002.05202, known as SwiGLU)
# After 300 steps, the loss is 1.90 instead of 1.91. In the complete model, a gated
# feed-forward is worth more: without it, the loss would be 1.55, not 1.52.

# %%
class GatedFeedForward(nn.Module):
    """Feed-forward with a gate in place of ReLU: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        size = 8 * n_embd // 3
        self.gate = nn.Linear(n_embd, size)
        self.up = nn.Linear(n_embd, size)
        self.down = nn.Linear(size, n_embd)

    def forward(self, x):
        x = F.silu(self.gate(x)) * self.up(x)  # (B, T, 8C/3)
        return self.down(x)                    # (B, T, C)


# %% [markdown]
# ## Step 14: token shift
# The characters just before matter most. So what attention and feed-forward read
# contains them already. In what they read, the first half of each vector is its
# own. The third quarter is replaced by the third quarter of the position before,
# and the last quarter by the last quarter of the one before that. (Nothing is lost:
# x itself keeps all its numbers. And the model learns what to put into which
# quarter.) Attention could find these characters as well, but it would have to
# learn this first, and would need a head for each. (After Peng et al. 2023,
# arXiv:2305.13048, who mix learned shares of a position and the one before it)
# After 300 steps, the loss is 1.69 instead of 1.90.

# %%
def shift(x):
    """Mix each position of x (B, T, C) with the two before it."""
    C = x.shape[-1]
    own, one_back, two_back = x.split([C // 2, C // 4, C // 4], dim=-1)
    one_back = one_back.roll(1, dims=1)  # move every position on by one
    two_back = two_back.roll(2, dims=1)  # ... by two
    one_back[:, :1] = 0                  # what came round from the end must not be seen
    two_back[:, :2] = 0
    return torch.cat([own, one_back, two_back], dim=-1)


# %% [markdown]
# ## The modern GPT
# The pieces of part two put together. As Step 10 says, no clocks are added.

# %%
class ModernBlock(nn.Module):
    """A block made of the pieces of part two: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention(GatedHead)
        self.feed_forward = GatedFeedForward()
        self.norm1 = nn.LayerNorm(n_embd)
        self.norm2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.attention(shift(self.norm1(x)))
        x = x + self.feed_forward(shift(self.norm2(x)))
        return x


class ModernGPT(GPT):
    """A GPT that adds no positions to the vectors."""

    def vectors(self, idx):
        x = self.token_embedding(idx)  # (B, T, C)
        x = self.dropout(x)            # (B, T, C)
        x = self.blocks(x)             # (B, T, C)
        return self.norm(x)            # (B, T, C)


# %% [markdown]
# ## Step 15: Muon
# The weights of a linear layer are a matrix, and so is their gradient. The simplest
# matrices have numbers on their diagonal only. The first number of the input is
# multiplied by the first of these, the second by the second, and so on. Let us call
# them *strengths*. Any other matrix does the same between two turns (or
# mirrorings): it turns the input, multiplies each number by a strength, and turns
# the result.
#
# In a gradient, a few strengths are large, and many are small, though what they
# stand for is often just as useful. Muon makes all of them about equal, so that
# rare things are learned too. For example, of a matrix with 3 and 0.1 on its
# diagonal it makes one with 0.7 and 1.1, which is about equal. (In the language of
# mathematics, the strengths are the *singular values* of the matrix, and Muon sets
# nearly all of them to about 1.)
#
# How can all strengths become about 1, without finding out the turns? (You may
# believe that they do, and go on.) First, how a *number* becomes about 1, by
# multiplying and adding alone. Take one between 0.01 and 1, put it into this
# formula, put the result in again, and so on:
#
# 3.4445 x - 4.7750 x^3 + 2.0315 x^5
#
# From 0.01 you get 0.03, 0.12, 0.40, 1.09, 0.70, and from anywhere between 0.01 and
# 1, five rounds lead to a number between about 0.7 and 1.1 (much smaller ones end
# lower).
#
# Now let x be a matrix with numbers on its diagonal only, scaled so that none is
# above 1. In x @ x.T @ x, each of them stands to the power of 3. So the same
# formula, in matrices, does this to all of them at once. And turns do not disturb
# it: x.T has those of x backwards, so where x and x.T meet, they cancel, and at the
# two ends of x @ x.T @ x stand those of x itself. (Jordan 2024,
# kellerjordan.github.io/posts/muon; the three factors were found by search.)
#
# Muon adjusts the matrices in the blocks. All other weights are left to AdamW,
# including the embedding and `lm_head`: there AdamW does better, as Jordan found.
# After 300 steps, the loss is 1.64 instead of 1.69. (What Muon gains seems little
# for so much thought. But with the two steps to come, Muon is worth more: without
# it, the whole would end at 1.57, and with it, it ends at 1.52.)

# %%
def equalize(m):
    """Set nearly all singular values of the matrices m (N, rows, columns) near 1."""
    tall = m.shape[1] > m.shape[2]
    x = m.mT if tall else m  # (mT: transposed) lying flat, it makes s smaller, below
    # The norm (root of the sum of squares) is at least the largest strength: now none
    # is above 1. (1e-7 is there in case the norm is 0.)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        s = x @ x.mT  # so s @ x stands for x^3, and s @ s @ x for x^5
        # Now x becomes 3.4445 * x - 4.7750 * s @ x + 2.0315 * s @ s @ x. In two parts,
        # and by baddbmm, it is faster: (a, b, c) is beta * a + alpha * b @ c.
        p = torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, p, x, beta=3.4445)
    return x.mT if tall else x


# %% [markdown]
# ## Muon, the optimizer
# One batch tells little. So, like AdamW, Muon keeps a running mean of the gradients
# of many steps, in which the newest counts `1 - momentum`. In the change that it
# makes, the newest counts nearly twice as much. (This is *Nesterov's momentum*.
# `m.lerp(a, share)` goes this share of the way from m to a, and `lerp_` changes m
# itself.)
#
# Then all strengths are made equal. Matrices with more rows than columns may change
# more, as was found by trial. Weight decay pulls all weights slightly towards zero,
# and the change, times the learning rate, is subtracted.
#
# (For speed, weights of the same shape go together, as one stack of matrices, and
# `_foreach_` takes a whole list at once, as in torch's own optimizers.)

# %%
class Muon(torch.optim.Optimizer):
    """Adjusts matrices by changes with nearly all singular values near 1."""

    def __init__(self, matrices, lr):
        shapes = {}  # {shape: all weights of this shape}
        for weight in matrices:
            shapes.setdefault(weight.shape, []).append(weight)
        super().__init__([{"params": same} for same in shapes.values()], {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights, lr = group["params"], group["lr"]
            gradients = torch.stack([weight.grad for weight in weights])

            # What is kept between steps is kept under the first of the weights.
            state = self.state[weights[0]]
            running_mean = state.setdefault("mean", torch.zeros_like(gradients))
            running_mean.lerp_(gradients, 1 - momentum)
            newer = running_mean.lerp(gradients, 1 - momentum)

            changes = equalize(newer).float()  # (N, rows, columns), float32
            rows, columns = weights[0].shape
            changes *= max(1, rows / columns) ** 0.5

            torch._foreach_mul_(weights, 1 - lr * weight_decay)
            torch._foreach_sub_(weights, changes.unbind(), alpha=lr)


# %% [markdown]
# ## Model and optimizers of part two
# They take the place of those of part one.

# %%
if part == 2:
    torch.manual_seed(seed)
    model = ModernGPT(ModernBlock).to(device)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]    # Step 15
    others = [p for p in model.parameters() if p not in set(matrices)]  # Step 15
    optimizers = [torch.optim.AdamW(others, lr=learning_rate), Muon(matrices, muon_lr)]

# %% [markdown]
# ## Step 16: learning-rate schedule
# Long strides at first, then shorter and shorter ones. When the goal is near, long
# strides would only step over it, back and forth. Many short strides also average
# out what single batches get wrong. So the learning rates fall from step to step,
# towards 0.
#
# This step is no younger than GPT-2. It stands here because the model of part one,
# in so few steps, gained nothing from it. After 300 steps, the loss is 1.56 instead
# of 1.64.

# %%
def set_learning_rates(step):
    """Set all learning rates for this step: full in the first, near 0 in the last."""
    share = 1 - (step - 1) / max_iters
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = share * optimizer.defaults["lr"]  # as given, above


# %% [markdown]
# ## Step 17: data augmentation
# In training, the model learns who speaks with whom, since the same people talk for
# a whole play. In validation, this is of no use: most of the people there hardly
# occur in the text of training. *Data augmentation* changes the text a little at
# each reading, in a way that leaves it good text, or nearly. Here, names change
# places: in one piece, every `ROMEO` becomes `HENRY`, and `Romeo` becomes `Henry`;
# in the next piece, it may be another name. Now the model has to look back to see
# who is there, and this is of use with any names. (The price: it no longer knows
# that Romeo loves Juliet.)
#
# The name that takes the place of another has the same length, so that the piece
# keeps its length. Only batches are changed: all else has the text as it is.
#
# After 300 steps, the loss is 1.52 instead of 1.56. Most of the gain is in the
# lines that say who speaks.

# %%
# Names stand in the text as ROMEO (who speaks) and as Romeo, but never as romeo.
# (KING is left out, since there is also king.) A set has no fixed order: sort it.
train_text = text[:len(train_data)]
words = {match[0] for match in re.finditer(r"\w{3,}", train_text)}  # 3 letters or more
capitals = {word for word in words if word.isupper()}
ordinary = words - capitals
names = [word for word in sorted(capitals)
         if word.title() in ordinary and word.lower() not in ordinary]
names.sort(key=len)  # short ones first


def rename(piece):
    """Return this piece of the text (a string) with other names in it."""
    # Shuffle the names, and sort them by length again. Those of equal length stay
    # shuffled, and each now stands where `names` has a name of its length.
    shuffled = [names[n] for n in torch.randperm(len(names)).tolist()]
    shuffled.sort(key=len)
    exchange = dict(zip(names, shuffled))  # such as ROMEO: HENRY
    exchange |= {name.title(): exchange[name].title() for name in names}

    def other(match):
        """Return what takes the place of the word found; most words stay."""
        word = match[0]
        return exchange.get(word, word)

    return re.sub(r"\w+", other, piece)


def get_renamed_batch(step):
    """Return what get_batch does, but with names exchanged in each piece."""
    pieces = [rename(train_text[i:i + block_size + 1]) for i in deal(step)]
    pieces = torch.stack([encode(piece) for piece in pieces]).to(device)  # (B, T+1)
    return pieces[:, :-1], pieces[:, 1:]


# %% [markdown]
# # Extras
# What makes the script of use, and teaches nothing about GPTs: skip to "Running
# it".
#
# ## Extra: bf16
# Where the processor has units for numbers of 16 bits (bfloat16), matrix products
# are faster with them, and the loss is nearly the same. On a CPU, moving numbers
# about takes longer than computing. So there, what stands between the products is
# of 16 bits as well.

# %%
if device.startswith("cuda"):
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
else:
    units = torch.cpu.get_capabilities()
    fast = device == "cpu" and bool(units.get("avx512_bf16") or units.get("amx_bf16"))
use_bf16 = dtype == "bfloat16" or (dtype == "auto" and fast)
# The recording further below must find nothing cached.
autocast = torch.autocast(torch.device(device).type, torch.bfloat16, use_bf16,
                          cache_enabled=False)
train_step, estimate_loss = autocast(train_step), autocast(estimate_loss)


def shorten(blocks, args):
    """Give the blocks vectors in bf16 if products are (in a sample, they are not)."""
    return args[0].bfloat16() if torch.is_autocast_enabled("cpu") else args[0]


if use_bf16 and device == "cpu":
    model.blocks.register_forward_pre_hook(shorten)
    cos, sin, mask = cos.bfloat16(), sin.bfloat16(), mask.bfloat16()

# %% [markdown]
# ## Extra: out of memory
# Larger numbers need more memory. Where it runs out, one line says so.

# %%
@contextmanager
def memory_in_plain_words():
    """Complain in one line if what is done needs more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if type(error) is not MemoryError and "allocate" not in str(error):
            raise
        parser.error(f"out of memory; lower {batch_size=}, {block_size=} or {n_embd=}")


train_step = memory_in_plain_words()(train_step)
estimate_loss = memory_in_plain_words()(estimate_loss)

# %% [markdown]
# ## Extra: keep the best model
# At each evaluation, all that is needed to go on is written to the file `save`.
# With `--load`, a run goes on from there as if it had never stopped. With another
# text as well, it starts anew with the weights it has, and learns the new
# characters.

# %%
text_sha256 = hashlib.sha256(text.encode()).hexdigest()
best, first_step = {"val_loss": math.inf}, 0
ours = {}  # {file that this run may replace: when it was written}

if checkpoint:
    named = "save" in given or save != "gpt.pt"
    same_text = finished or checkpoint["text_sha256"] == text_sha256
    if not same_text and not another_text:
        parser.error(f"{load} has learned another text; name it with --text_file")
    try:
        if checkpoint["settings"]["part"] != part or (part == 1 and not same_size):
            raise ValueError
        if same_text:
            best, first_step = dict(checkpoint["best"]), checkpoint["step"]
            losses.update(checkpoint["losses"])
            model.load_state_dict(checkpoint["model"])
            for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            save = save if named else load
            ours[load] = Path(load).stat().st_mtime_ns
            print(f"{load}: {first_step} of {max_iters} steps are made")
        else:
            weights = checkpoint["best"]["weights"]
            for name in ("token_embedding.weight", "lm_head.weight"):
                new = model.state_dict()[name][len(weights[name]):]
                weights[name] = torch.cat([weights[name], new.cpu()])
            model.load_state_dict(weights)
            save = save if named else Path(text_file).stem + ".pt"
            print(f"{load} learns {len(new)} new characters, to be saved as {save}")
    except (KeyError, RuntimeError, ValueError):
        parser.error(f"the model in {load} does not fit these numbers, or this gpt.py")

if save and Path(save).exists() and save not in ours:
    read_checkpoint(save)  # complains if something else would be replaced
folder = Path(save).parent
if save and not finished and not (folder.is_dir() and os.access(folder, os.W_OK)):
    parser.error(f"save={save} is in no folder that can be written to")


def keep(step):
    """Note the weights, if they are the best so far, and write all to the file."""
    val_loss = losses[step][1]
    if step == 0 or val_loss < best["val_loss"]:
        weights = {name: w.cpu().clone() for name, w in model.state_dict().items()}
        best.update(step=step, val_loss=val_loss, weights=weights)
    if not save or rank or step == first_step:
        return
    file = Path(save)
    unfinished = Path(f"{file}.{os.getpid()}.part")
    try:
        torch.save({
            "settings": {name: globals()[name] for name in SETTINGS},
            "as_written": as_written,
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step, "best": best, "losses": losses, "chars": chars,
            "excerpt": text[:20 * block_size], "text_sha256": text_sha256}, unfinished)
        if file.exists() and ours.get(save) != file.stat().st_mtime_ns:
            # Another run has made this file: keep it.
            number = 1
            while file.with_suffix(f".{number}.pt").exists():
                number += 1
            moved = file.rename(file.with_suffix(f".{number}.pt"))
            print(f"{save} is now {moved}")
        unfinished.replace(file)
        ours[save] = file.stat().st_mtime_ns
    except (OSError, RuntimeError) as error:
        parser.error(f"cannot write {save} ({str(error).splitlines()[0]})")
    finally:
        unfinished.unlink(missing_ok=True)


# %% [markdown]
# ## Extra: Ctrl-C
# The first Ctrl-C ends the training between two steps, so that the file is whole.

# %%
interrupted = []  # not empty after Ctrl-C


def on_ctrl_c(number, frame):
    """Remember it. A second one ends the script at once."""
    interrupted.append(number)
    signal.signal(signal.SIGINT, usual)


def stopped():
    """Return whether Ctrl-C has been pressed, in any of the processes."""
    pressed = len(interrupted)
    if world > 1:
        pressed = torch.tensor(pressed, device=device)
        torch.distributed.all_reduce(pressed)
    return pressed > 0


def until_ctrl_c(steps):
    """Yield the steps, until Ctrl-C. Then evaluate and keep the model, and end."""
    interrupted.clear()
    signal.signal(signal.SIGINT, on_ctrl_c)
    for step in steps:
        yield step
        if stopped():
            if step not in losses:
                evaluate(step)
                keep(step)
            learned = f" --text_file={text_file}" if another_text else ""
            how = f"; --load={save}{learned} goes on" if save else ""
            if step < max_iters:
                print(f"stopped by Ctrl-C{how}")
            break


# In a notebook, this cell may be run again, while on_ctrl_c is in place.
usual = vars().get("usual", signal.getsignal(signal.SIGINT))

# %% [markdown]
# ## Extra: several processes
# `torchrun --nproc_per_node=2 gpt.py` starts two. Each learns from its share of
# every batch, and all take the mean of their gradients: so their models stay equal.
# Each evaluates for itself, which takes no longer than if one did it for all.

# %%
world, rank = 1, 0  # how many processes are there, and which of them is this?


def take_share(model, args):
    """Give the model only what this process learns from, and a dropout of its own."""
    if model.training:
        torch.manual_seed(torch.initial_seed() * world + rank)
        return tuple(ids[rank::world] for ids in args)


def average_gradients(*_):
    """Give all processes the mean of their gradients."""
    for weight in model.parameters():
        torch.distributed.all_reduce(weight.grad)
        weight.grad /= world


if torch.distributed.is_torchelastic_launched():
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if batch_size % world:
        parser.error(f"{batch_size=} should be a multiple of {world} processes")
    torch.distributed.init_process_group()
    model.register_forward_pre_hook(take_share)
    # Before the first optimizer makes its step, all gradients are averaged.
    optimizers[0].register_step_pre_hook(average_gradients)

# %% [markdown]
# ## Extra: a recording for the GPU
# A model of this size is computed faster than Python can say what to compute. So on
# a GPU, the way through the model and back is recorded once, and then played again
# in each step. (In a notebook, run this cell again after a change further up.)

# %%
if device == "cuda" and not (finished or torch.distributed.is_torchelastic_launched()):
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    # The recording goes on reading these, so they must stay in memory.
    recorded = mask, positions, cos, sin

    # In a notebook, a recording made before is dropped.
    vars(model).pop("forward", None)
    model.train()
    with autocast, memory_in_plain_words():
        model = torch.cuda.make_graphed_callables(model, get_batch(1))
    model.eval()

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
#
# (Extra: `first_step` is 0, or where the checkpoint stopped, and `finished` tells
# that there is nothing to train. `until_ctrl_c` gives out the steps, until Ctrl-C
# is pressed. `keep` writes the checkpoint.)

# %%
print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
model.eval()  # Step 9: only train_step switches dropout on
if not finished:  # Extra
    evaluate(first_step)
    keep(first_step)

began = time.time()
for step in until_ctrl_c(range(first_step + 1, max_iters + 1)):  # Extra
    torch.manual_seed(seed + step)  # Step 9: each step has its own random numbers
    if part == 2:
        set_learning_rates(step)                   # Step 16
        inputs, targets = get_renamed_batch(step)  # Step 17
    else:
        inputs, targets = get_batch(step)
    loss = train_step(inputs, targets)
    show_progress(step, loss)
    if step % eval_interval == 0 or step == max_iters:
        evaluate(step)
        keep(step)  # Extra

# %% [markdown]
# ## Extra: from here on, the best model
# It is the one with the lowest loss in validation. It need not be the last.

# %%
signal.signal(signal.SIGINT, usual)
model.load_state_dict(best["weights"])
model.eval()  # in case the training was cut off
print(f"the best model (step {best['step']}, val loss {best['val_loss']:.4f}) writes:")
if world > 1:
    torch.distributed.destroy_process_group()

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

# %% [markdown]
# ## Extra: a picture of attention
# Where matplotlib is installed, gpt.pt.png (beside gpt.pt) shows where each head of
# the last block looks (rows look at columns), and how the loss fell.

# %%
def draw(attention, args):
    """Draw the attention weights of all heads for the first text of args."""
    for axis, head in zip(axes[1:], attention.heads):
        axis.imshow(head.weights(args[0])[0].cpu().numpy())


try:
    import matplotlib.pyplot as plt
    if save and rank == 0 and not finished:
        figure, axes = plt.subplots(1, n_head + 1, figsize=(4 * n_head + 4, 4))
        axes[0].plot(list(losses), list(losses.values()), label=["train", "val"])
        axes[0].legend()
        hook = model.blocks[-1].attention.register_forward_pre_hook(draw)
        list(generate(val_data[:32], 1))  # the next character after 32
        hook.remove()
        figure.savefig(f"{Path(save)}.png")
except ModuleNotFoundError:
    pass  # it is not installed
except Exception as error:
    print(f"no picture: {error}")
