"""gpt.py: a GPT that learns to write like Shakespeare, one character at a time.

    python gpt.py                 trains for a few minutes, then writes
    python gpt.py --load=gpt.pt   starts from the saved model, and writes

Part one, the first 500 lines, builds a small but complete GPT, one idea per step, and
trains it. You can stop there: part two only makes it better. Skip what is marked Extra.
Shapes in comments: B batch_size, T time, C n_embd, D head_size, V vocab_size.
"""

# %%
import argparse
import copy
import hashlib
import os
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# %% [markdown]
# ## Hyperparameters: the numbers that are not learned

# %%
gpu = torch.cuda.is_available() and "--device=cpu" not in sys.argv
device = "cuda" if gpu else "cpu"
text_file = "input.txt"              # what to learn from: any text in UTF-8
batch_size = 16 if gpu else 8        # how many pieces of text in a training step?
block_size = 256                     # context length: how far back can it look?
max_iters = 1000 if gpu else 1500    # how many training steps?
plain_iters = 300                    # how many for the plain GPT of part one?
eval_interval = 250 if gpu else 300  # how many steps between evaluations?
n_embd = 384 if gpu else 192         # embedding dimension: numbers per character
n_head = 3 if gpu else 2             # attention heads: things to look for at once
n_layer = 6 if gpu else 4            # depth: how many blocks in a row?
dropout = 0.05 if gpu else 0.0       # what fraction is zeroed in training? (Step 7)
learning_rate = 0.004                # how far does a step move the parameters?
muon_lr = 0.02                       # the same for Muon's matrices (Step 11)
momentum = 0.95 if gpu else 0.9      # how much of earlier gradients does Muon keep?
weight_decay = 0.3 if gpu else 0.1   # how strongly does Muon pull towards 0?
max_new_tokens = 500                 # how many characters should it write?
temperature = 0.8                    # below 1 favours likely characters
seed = 1337                          # random seed: the same seed, the same run

# %% [markdown]
# ## Extra: options
# Skip this. It makes every number an option, as in `gpt.py --max_iters=300`.

# %%
prompt = ""      # text for the model to continue
samples = 1      # how many continuations?
save = "gpt.pt"  # where to save the best model
load = ""        # which saved model to start from
numbers = {name: value for name, value in list(globals().items())
           if type(value) in (int, float, str) and name[0] != "_"}
parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
for name, value in numbers.items():
    parser.add_argument(f"--{name}", type=type(value), default=argparse.SUPPRESS)
typed = vars(parser.parse_args([] if "ipykernel" in sys.modules else None))
globals().update(typed)
if load:
    checkpoint = torch.load(load, "cpu")
    globals().update(checkpoint["options"] | {"save": load} | typed)
if min(batch_size, block_size, n_embd, n_head, n_layer) < 1 or n_embd % (4 * n_head):
    parser.error("sizes should be at least 1, and n_embd a multiple of 4 * n_head")
if "cuda" in device:
    torch.cuda.set_device(int(os.getenv("LOCAL_RANK", 0)))  # torchrun sets it

# %% [markdown]
# ## The text
# Nine plays by Shakespeare, about a million characters.

# %%
url = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
sha256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
try:
    if text_file == "input.txt" and not Path(text_file).exists():
        torch.hub.download_url_to_file(url, text_file, sha256, progress=False)
    text = Path(text_file).read_text(encoding="utf-8")
    if len(text) <= 10 * block_size:  # Extra
        raise ValueError(f"it should have more than {10 * block_size} characters")
except (OSError, ValueError, RuntimeError) as error:
    parser.error(f"{text_file}: {error}; put a text in UTF-8 there")

# %% [markdown]
# ## The vocabulary
# We give each distinct character a number, its *id*. A model reads and writes *tokens*:
# ours are characters, those of larger models are pieces of words.

# %%
chars = sorted(set(text))
if load:  # Extra: its characters keep their ids, new ones come after them
    chars = checkpoint["chars"] + sorted(set(text) - set(checkpoint["chars"]))
vocab_size = len(chars)
char_to_id = {char: i for i, char in enumerate(chars)}


def encode(string):
    """Turn a string into a tensor of ids (T,)."""
    return torch.tensor([char_to_id[char] for char in string])


def decode(ids):
    """Turn ids back into the string they stand for."""
    return "".join(chars[i] for i in ids)


print(f"{len(text):,} characters, {vocab_size} distinct: {''.join(chars)!r}")
print(f"{text[:5]!r} becomes {encode(text[:5]).tolist()}")

# The last tenth is for *validation*: we never train on it, so it shows whether the
# model is learning to write, or only memorising the text.
data = encode(text).to(device)
n = int(0.9 * len(data))
train_data, val_data = data[:n], data[n:]

# %% [markdown]
# ## Batches
# Each training step learns from `batch_size` pieces of text, each `block_size`
# characters long. The targets are the inputs shifted by one character, so every
# position is a training example: given the characters up to here, which one is next?
#
# We cut the text into pieces, shuffle them, and deal them out like cards, so that all
# of it is read equally often. When we run out, we cut it again, in other places.

# %%
torch.manual_seed(seed)
deck = []  # where the pieces begin
first = 0
while len(deck) <= max(plain_iters, max_iters) * batch_size:
    cuts = torch.arange(first, len(train_data) - block_size, block_size)
    deck += cuts[torch.randperm(len(cuts))].tolist()
    first = (first + 100) % block_size  # next time, cut in other places


def get_batch(step):
    """Return the inputs and the targets of this step (1, 2, ...), both (B, T)."""
    starts = deck[(step - 1) * batch_size:step * batch_size]
    pieces = torch.stack([train_data[i:i + block_size + 1] for i in starts])  # (B, T+1)
    return pieces[:, :-1], pieces[:, 1:]


inputs, targets = get_batch(1)
for t in range(4):
    print(f"after {decode(inputs[0, :t + 1])!r} comes {chars[targets[0, t]]!r}")

# %% [markdown]
# ## What a language model does
# Given the characters so far, a language model gives every character in the vocabulary
# a number, its *logit*: the higher it is, the likelier that character is next. Softmax
# turns logits into probabilities, which are positive and add up to 1:
#
# probability = exp(logit) / (sum of exp over all logits)
#
# The *loss* is -ln(probability of the character that really came next), averaged over
# all positions. Blind guessing among 60 characters would give ln(60) = 4.1. At 1.4, the
# model is as unsure as if it had to pick one of exp(1.4) = 4 characters.
#
# Training means adjusting the *parameters* of the model, the numbers in it that are
# learned, so that the loss goes down. The *gradient* of a parameter tells us how fast
# the loss rises as we raise it. PyTorch finds all gradients at once, by working back
# from the loss through the model (*backpropagation*).

# %% [markdown]
# # Part one: a GPT
# GPT stands for *generative pretrained transformer*. It turns each character into a
# vector of numbers, x. Then, block after block, it adds to x what *attention* gathers
# from earlier positions, and what *feed-forward* makes of it. In the end, x becomes
# the logits of the next character.
#
# Each section ends with a number in brackets: the validation loss of the model so far,
# after 300 training steps (README.md shows how to run it). This is how models write at
# different losses:
#
# - 2.50 (a table): `Athtimacowin muphe hirkend y t dinspst CAshorar ad il`
# - 2.05 (part one): `Were sir chouly my genty?`
# - 1.37 (gpt.py, 1,500 steps): `Till the sin the vice of our testimony.`
#
# ## Step 1: embedding
# The simplest model, in bigram.py, is a table with a row for each character, holding a
# logit for each one that might come next. But what a table learns about `a` tells it
# nothing about `e`. So we give each character a vector of `n_embd` numbers, its
# *embedding*, which is learned: characters that behave alike can become alike. A linear
# layer, `lm_head`, turns a vector into logits:
#
# logits = lm_head(token_embedding(ids))
#
# So far, this is no smarter than the table, but now we have vectors to add to. (2.51)

# %% [markdown]
# ## Step 2: attention
# Each vector only knows about its own character. To guess what comes after `Rome`, the
# model looks at the vector of the `e`. The simplest way to add what came before is the
# *mean* of all vectors so far. As a matrix product, this is `equal_weights @ x`: row t
# has equal weights for positions 0 to t, and 0 for later ones. Those must stay hidden:
# they are what it has to guess.

# %%
may_see = torch.ones(4, 4).tril()  # row t is 1 at positions 0 to t, then 0
equal_weights = may_see / may_see.sum(dim=1, keepdim=True)
means = equal_weights @ torch.tensor([2.0, 4.0, 6.0, 8.0])
print(f"{equal_weights}\nmeans of 2, 4, 6, 8 so far: {means.tolist()}")

# %% [markdown]
# A plain mean treats every character the same. *Attention* is also a mean, but the
# model works out the weights itself, afresh for each text. Three linear layers turn
# each position's vector x into three vectors of D numbers:
#
# - the **query** says what this position is looking for,
# - the **key** says what it has to offer,
# - the **value** is what it hands over.
#
# The query of the `e` in `Rome` might ask: where are the capital letters? The key of
# the `R` says: I am one. Its value says: I am an R.
#
# The dot product of a query and a key (multiply matching numbers, then add up), divided
# by sqrt(D), is their *score*: the better the two fit, the larger it is. Softmax turns
# the scores of a position into attention weights, and the output is the mean of the
# values with these weights. If the scores of `R`, `o`, `m` and `e` are 2, 0, 0 and 1,
# their weights are 0.61, 0.08, 0.08 and 0.22, so what the `e` gets is mostly the value
# of the `R`.
#
# attention = softmax(queries @ keys.T / sqrt(D) + mask) @ values
#
# The mask gives later positions a score of minus infinity, so their weight is 0.
#
# Why sqrt(D)? A dot product is a sum of D products, some positive, some negative. They
# partly cancel out, so it grows only like sqrt(D). If scores were large, softmax would
# give nearly all the weight to one position. A small change to the scores would hardly
# matter then: gradients would be almost 0, and the model could not learn.
# (Vaswani et al. 2017, arXiv:1706.03762)
#
# What attention finds is added to x (in `Block`, Step 6). On its own, it doesn't help
# yet: it sees which characters came before, but not in what order. (2.52)

# %%
head_size = n_embd // n_head  # D in the shapes; n_head comes in Step 4
may_see = torch.ones(block_size, block_size, device=device).tril()  # (T, T)
mask = torch.where(may_see == 1, 0.0, -torch.inf)  # (T, T)


class Head(nn.Module):
    """One head of attention: (B, T, C) to (B, T, D)."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.query(x), self.key(x), self.value(x)  # each (B, T, D)
        q, k = rotate(q), rotate(k)                          # Step 3, next
        scores = q @ k.mT / head_size**0.5                   # (B, T, T)
        weights = F.softmax(scores + mask[:T, :T], dim=-1)   # (B, T, T)
        return weights @ v                                   # (B, T, D)


# %% [markdown]
# ## Step 3: positions
# So far, attention ignores distance. To change that, we turn each query and key by an
# angle that depends on its position. Take its numbers in pairs (i with i + D/2), and
# think of each pair as a clock with one hand, which moves on by, say, 10 degrees from
# one position to the next: a query at position 7 has turned by 70 degrees, a key at
# position 5 by 50. Their dot product depends on the angle between the two hands, which
# has changed by 20 degrees. At positions 107 and 105, it would still be 20 degrees:
# only the distance counts.
#
# This is how a head can find the character just before. Suppose that before the turn,
# all its keys point to 0 degrees, and all its queries to -10. At position 7, the query
# is turned by 70, to 60. At position 6, the key is turned by 60, to 60 as well. These
# two fit best. This clock repeats every 36 positions, but other pairs turn at other
# speeds, and tell the laps apart.
#
# How do we turn a hand whose tip is at (a, b)? The hand (1, 0) turns to (cos, sin), and
# (0, 1) to (-sin, cos), so (a, b) turns to a * (cos, sin) + b * (-sin, cos).
#
# (RoPE: Su et al. 2021, arXiv:2104.09864) (2.34)

# %%
# From one position to the next, the fastest clock turns by 1 radian (57 degrees), and
# the slowest one by 1/10000.
speeds = 10000 ** -torch.linspace(0, 1, head_size // 2)      # (D/2,)
angles = torch.arange(block_size)[:, None] * speeds          # (T, D/2)
cos, sin = angles.cos().to(device), angles.sin().to(device)  # each (T, D/2)


def rotate(x):
    """Turn each pair x[i], x[i + D/2] of x (B, T, D) by its angle at each position."""
    T = x.shape[1]
    a, b = x.chunk(2, dim=-1)             # each (B, T, D/2)
    turned_a = a * cos[:T] - b * sin[:T]  # (B, T, D/2)
    turned_b = a * sin[:T] + b * cos[:T]  # (B, T, D/2)
    return torch.cat([turned_a, turned_b], dim=-1)


# %% [markdown]
# ## Step 4: several heads
# One head has one set of weights, so it looks for one thing at a time. Several heads
# look for several things at once, each with vectors of D = C / `n_head` numbers.
# Put side by side, their outputs make C numbers again. A linear layer, `proj`, mixes
# them. (2.28)

# %%
class MultiHeadAttention(nn.Module):
    """Several heads side by side: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([Head() for _ in range(n_head)])
        self.proj = nn.Linear(n_embd, n_embd)

    def forward(self, x):
        found = torch.cat([head(x) for head in self.heads], dim=-1)  # (B, T, C)
        return self.proj(found)                                      # (B, T, C)


# %% [markdown]
# ## Step 5: feed-forward
# Attention gathers. Then each position draws its own conclusions. A linear layer looks
# for `4 * n_embd` patterns in the vector: each row of its parameters is one, and its
# dot product with the vector is large where the two fit, as with query and key. ReLU
# sets negative numbers to 0, meaning "not found". A second linear layer turns the
# patterns that were found into conclusions. Without ReLU in between, two linear layers
# could do no more than one. (2.18)

# %%
class FeedForward(nn.Module):
    """Two linear layers with ReLU in between: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd)
        self.down = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


# %% [markdown]
# ## Step 6: the block
# A block is attention, then feed-forward. Each *adds* what it finds to x (a *residual
# connection*), so that nothing in x gets lost. In training, gradients pass back
# through the sum unchanged, so they don't fade, however many blocks there are.
#
# With every addition, the numbers in x can grow. So we put a *LayerNorm* before each
# part and before `lm_head`: it shifts and scales each vector to mean 0 and variance 1
# (then by learned amounts), so that all numbers have about the same size. (2.11)

# %%
class Block(nn.Module):
    """Attention, then feed-forward, both added to x: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention()
        self.feed_forward = FeedForward()
        self.norm1 = nn.LayerNorm(n_embd)
        self.norm2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        x = x + self.feed_forward(self.norm2(x))
        return x


# %% [markdown]
# ## Step 7: depth
# `n_layer` blocks in a row: each can build on what the one before found. The first
# might put letters together into words, and the second look at earlier words.
#
# A large model can memorise a small text. *Dropout* works against that: in training, it
# zeroes random numbers in the embeddings, so that a passage hardly ever looks the same
# twice. (2.05)

# %%
class GPT(nn.Module):
    """From the characters so far to the logits of the one that comes next."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, n_embd)          # Step 1
        self.dropout = nn.Dropout(dropout)                               # Step 7
        self.blocks = nn.Sequential(*[Block() for _ in range(n_layer)])  # Step 7
        self.norm = nn.LayerNorm(n_embd)                                 # Step 6
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)         # Step 1
        nn.init.zeros_(self.lm_head.weight)  # at first, it guesses blindly

    def forward(self, idx, targets=None):
        """Turn idx (B, T) into logits (B, T, V) and, with targets (B, T), the loss."""
        x = self.token_embedding(idx)  # (B, T, C), Step 1
        x = self.dropout(x)            # (B, T, C), Step 7
        x = self.blocks(x)             # (B, T, C), Step 7
        x = self.norm(x)               # (B, T, C), Step 6
        logits = self.lm_head(x)       # (B, T, V), Step 1
        if targets is None:
            return logits, None
        # cross_entropy does both softmax and -ln. It wants a row for each example.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


# %% [markdown]
# ## Model and training step
# The *optimizer*, AdamW, moves every parameter against its gradient, since that lowers
# the loss. How far? It takes the mean of the last few gradients of a parameter, divided
# by their usual size. So every parameter moves by about `learning_rate`, whether its
# gradients are large or small.

# %%
torch.manual_seed(seed)
model = GPT().to(device)
optimizers = [torch.optim.AdamW(model.parameters(), lr=learning_rate)]


def train_step(inputs, targets):
    """Update all parameters once, using this batch, (B, T) each; return its loss."""
    model.train()                              # with dropout
    logits, loss = model(inputs, targets)
    model.zero_grad()                          # clear the gradients of the last step
    loss.backward()                            # find the gradients of the loss
    for optimizer in optimizers:               # only one so far
        optimizer.step()                       # move all parameters against them
    model.eval()                               # no dropout in anything else
    return loss


# %% [markdown]
# ## Writing
# We draw the next character at random, the likely ones more often, append it to the
# text, and ask the model again.

# %%
@torch.inference_mode()
def write(start, max_new_tokens, seed):
    """Print start, and what the model writes after it, character by character."""
    torch.manual_seed(seed)
    print(start, end="")
    idx = encode(start or chars[0]).to(device)           # (T,)
    for _ in range(max_new_tokens):
        logits, _ = model(idx[None, -block_size:])       # (1, T, V)
        logits = logits[0, -1] / max(temperature, 1e-6)  # (V,): after the last one
        probs = F.softmax(logits, dim=-1)                # (V,)
        new = torch.multinomial(probs, 1)                # (1,): draw one
        idx = torch.cat([idx, new])                      # append it
        print(decode(new), end="", flush=True)
    print()


# %% [markdown]
# ## Evaluation
# We always measure the loss on the same pieces of text, cut by `unfold`.

# %%
@torch.inference_mode()
def estimate_loss(data):
    """Return the mean loss per character over data (ids)."""
    pieces = data.unfold(0, size=block_size + 1, step=block_size)  # (pieces, T+1)
    total = 0.0
    for batch in pieces.split(batch_size):
        logits, loss = model(batch[:, :-1], batch[:, 1:])
        total += loss.item() * len(batch)
    return total / len(pieces)


def evaluate(step):
    """Measure, print and return the losses (training, validation) after this step."""
    train_loss = estimate_loss(train_data[:2**15])  # a part is enough
    val_loss = estimate_loss(val_data[:2**18])      # all, if it is not huge
    print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
    return train_loss, val_loss


# %% [markdown]
# ## Training the plain GPT
# This is a complete GPT. GPT-2 is basically the same, just larger, with a learned
# vector for each position and a smoother ReLU. Training takes a minute or so.

# %%
if plain_iters and not load:
    evaluate(0)
    for step in range(1, plain_iters + 1):
        inputs, targets = get_batch(step)
        train_step(inputs, targets)
    evaluate(plain_iters)
    print("the plain GPT writes:")
    write("", max_new_tokens, seed + 1)

# %% [markdown]
# # Part two: improvements
# With these improvements, 300 training steps give 1.56 instead of 2.05. Some classes
# are defined again below. `GPT` and `MultiHeadAttention` look them up by name, so from
# here on, `GPT()` is made of the new ones.
#
# ## Step 8: normalised queries and keys
# A score can be large because a query and a key fit, or just because one of them has
# large numbers. A LayerNorm brings both to the same length, so that only their
# directions count. (QK-norm: Dehghani et al. 2023, arXiv:2302.05442) (1.96)
#
# ## Step 9: gates
# Attention weights add up to 1, so a head always passes something on, even if nothing
# fits. A *gate* lets it stay silent: one more linear layer computes factors between 0
# and 2, about 1 at first, which scale what the head found. (After Qiu et al. 2025,
# arXiv:2505.06708)
#
# Feed-forward gets a gate instead of ReLU: each pattern has a partner, and only counts
# if the partner shows up too. `silu` is a smooth ReLU. (SwiGLU: Shazeer 2020,
# arXiv:2002.05202) (1.89)

# %%
class Head(nn.Module):
    """One head of attention: (B, T, C) to (B, T, D)."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(n_embd, head_size, bias=False)
        self.key = nn.Linear(n_embd, head_size, bias=False)
        self.value = nn.Linear(n_embd, head_size, bias=False)
        self.norm = nn.LayerNorm(head_size, elementwise_affine=False)  # Step 8
        self.gate = nn.Linear(n_embd, head_size)                       # Step 9

    def forward(self, x):
        T = x.shape[1]
        q, k, v = self.query(x), self.key(x), self.value(x)    # each (B, T, D)
        q, k = self.norm(q), self.norm(k)                      # Step 8
        q, k = rotate(q), rotate(k)
        scores = q @ k.mT / head_size**0.5                     # (B, T, T)
        weights = F.softmax(scores + mask[:T, :T], dim=-1)     # (B, T, T)
        self.weights = weights.detach()                        # Extra: for the picture
        found = weights @ v                                    # (B, T, D)
        return found * 2 * torch.sigmoid(self.gate(x))         # (B, T, D), Step 9


class FeedForward(nn.Module):
    """Feed-forward with a gate: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        size = 8 * n_embd // 3  # so that three layers are as large as two were before
        self.gate = nn.Linear(n_embd, size)                  # Step 9
        self.up = nn.Linear(n_embd, size)
        self.down = nn.Linear(size, n_embd)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))  # (B, T, C), Step 9


# %% [markdown]
# ## Step 10: token shift
# The characters just before matter most, so we let attention and feed-forward see them
# directly: we replace a quarter of each vector with that of the position before, and a
# quarter with that of the one before it. Attention could find them too, but would have
# to learn how. (After Peng et al. 2023, arXiv:2305.13048) (1.68)

# %%
def shift(x):
    """Give each position of x (B, T, C) a part of the two before it."""
    x = x.to(dtype)  # Extra, below
    T, C = x.shape[1:]
    own, one_back, two_back = x.split([C // 2, C // 4, C // 4], dim=-1)
    one_back = F.pad(one_back, (0, 0, 1, 0))[:, :T]  # shifted right by one, 0 comes in
    two_back = F.pad(two_back, (0, 0, 2, 0))[:, :T]  # shifted right by two
    return torch.cat([own, one_back, two_back], dim=-1)


class Block(nn.Module):
    """Attention, then feed-forward, both added to x: (B, T, C) to (B, T, C)."""

    def __init__(self):
        super().__init__()
        self.attention = MultiHeadAttention()
        self.feed_forward = FeedForward()
        self.norm1 = nn.LayerNorm(n_embd)
        self.norm2 = nn.LayerNorm(n_embd)

    def forward(self, x):
        with autocast:  # Extra, below
            x = x + self.attention(shift(self.norm1(x)))     # Step 10
            x = x + self.feed_forward(shift(self.norm2(x)))  # Step 10
        return x


# %% [markdown]
# ## Extra: 16-bit numbers
# Some processors are faster with them.

# %%
fast = torch.cpu._is_avx512_bf16_supported()
if "cuda" in device:
    fast = torch.cuda.is_bf16_supported(including_emulation=False)
dtype = torch.bfloat16 if fast else torch.float32
autocast = torch.autocast(torch.device(device).type, dtype, fast, cache_enabled=False)
mask = mask.to(dtype)

# %% [markdown]
# ## Step 11: Muon
# You can take this step on trust, and skip to "The new model".
#
# The gradient of a matrix is a matrix too. All a matrix can do to a vector is rotate
# it, stretch it along each axis by some factor, and rotate it again. These factors are
# its *singular values*. In a gradient, a few are large and most are small, though the
# small ones may stand for things that are just as useful, only rarer. Muon makes them
# all about equal. (Jordan 2024, kellerjordan.github.io/posts/muon)
#
# How? Take a number between 0.01 and 1, put it into
# 3.4445 x - 4.7750 x^3 + 2.0315 x^5, put the result in again, and so on: from 0.01 you
# get 0.03, 0.12, 0.40, 1.09, 0.70. Wherever you start, you end up between 0.7 and 1.1.
# Now let x be a matrix. x @ x.T @ x has the same rotations, and its singular values are
# cubed. So the same formula works on all singular values at once.
#
# Muon moves the matrices in the blocks, and AdamW everything else. (1.64)

# %%
def equalise(x):
    """Bring the singular values of the matrices x (N, rows, columns) to about 1."""
    if x.shape[1] > x.shape[2]:
        return equalise(x.mT).mT  # wide matrices are cheaper
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values <= 1
    x = x.to(dtype)                                    # Extra
    for _ in range(5):
        s = x @ x.mT                                   # s @ x is x^3, s @ s @ x is x^5
        # p = 2.0315 s @ s - 4.7750 s, then 3.4445 x + p @ x; baddbmm is faster
        p = torch.baddbmm(s, s, s, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, p, x, beta=3.4445)
    return x


class Muon(torch.optim.Optimizer):
    """Moves matrices, by changes whose singular values are all about 1."""

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        matrices = [m for m in self.param_groups[0]["params"] if m.grad is not None]
        for shape in {m.shape for m in matrices}:
            group = [m for m in matrices if m.shape == shape]  # faster as one stack
            gradients = torch.stack([m.grad for m in group])   # (N, rows, columns)
            mean = self.state[group[0]].setdefault("mean", torch.zeros_like(gradients))
            mean.lerp_(gradients, 1 - momentum)                # a running mean
            gradients.lerp_(mean, momentum)                    # Nesterov momentum
            size = lr * max(1, shape[0] / shape[1]) ** 0.5     # each row moves by lr
            for m, change in zip(group, equalise(gradients)):
                m.copy_((1 - lr * weight_decay) * m - size * change)


# %% [markdown]
# ## The new model

# %%
torch.manual_seed(seed)
model = GPT().to(device)
matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if p not in set(matrices)]
muon = Muon(matrices, {"lr": muon_lr})
optimizers = [torch.optim.AdamW(others, lr=learning_rate, fused=True), muon]

# %% [markdown]
# ## Step 12: learning-rate schedule
# We take big steps first, then smaller ones: close to the goal, big ones would
# overshoot. (1.56)

# %%
def set_learning_rates(step):
    """Set all learning rates for this step: full in the first, near 0 in the last."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * (1 - (step - 1) / max_iters)


# %% [markdown]
# ## Extra: the saved model
# With the file, you can resume, or go on with another text (*fine-tuning*). To skip
# this, go to "The run".

# %%
options = {name: globals()[name] for name in numbers
           if name not in ("load", "save", "device")}
fingerprint = hashlib.sha256(text.encode()).hexdigest()
unwrapped = model
best = {"step": 0, "val_loss": torch.inf, "losses": {}}
if save and not os.access(Path(save).parent, os.W_OK):
    parser.error(f"{save=} is not in a writable folder")
if set(prompt) - set(chars):
    parser.error(f"{set(prompt) - set(chars)} in the prompt is not in {text_file}")
if load:
    saved = checkpoint["options"]
    for name in ("block_size", "n_embd", "n_head", "n_layer"):
        if options[name] != saved[name]:
            parser.error(f"{load} was made with {name}={saved[name]}")
    parameters = checkpoint["model"]
    for name in ("token_embedding.weight", "lm_head.weight"):
        rows = parameters[name]  # new characters start as the mean
        mean = rows.mean(dim=0).expand(vocab_size - len(rows), -1)
        parameters[name] = torch.cat([rows, mean])
    model.load_state_dict(parameters)
    if saved["text_file"] == text_file:  # else it starts from step 0
        best = checkpoint
        for optimizer, state in zip(optimizers, best["optimizers"]):
            optimizer.load_state_dict(copy.deepcopy(state))
losses, first_step = best["losses"], best["step"]  # {step: (training, validation)}
if max(losses, default=0) >= max_iters:
    first_step = max_iters  # finished: it only writes
elif first_step and best["fingerprint"] != fingerprint:
    parser.error(f"{load} was trained on a different {text_file}; rename this one")
file = load if best["step"] and save == load else ""


def keep(step):
    """Save the best model so far."""
    global file
    if losses[step][1] < best["val_loss"]:
        best.update(copy.deepcopy({
            "model": unwrapped.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step, "val_loss": losses[step][1], "chars": chars,
            "fingerprint": fingerprint}))
    best["options"] = options
    if not save or not best["step"]:
        return
    if not file:  # the first free name
        file = Path(save)
        number = 1
        while file.exists():
            number += 1
            file = Path(save).with_stem(f"{Path(save).stem}{number}")
        print(f"the best model is saved as {file}")
    torch.save(best, f"{file}.part")
    os.replace(f"{file}.part", file)  # never half written


# %% [markdown]
# ## Extra: speed and progress
# A GPU outruns Python here, so we record the forward and backward passes once, and then
# replay them.

# %%
if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started several processes
    torch.distributed.init_process_group("nccl" if "cuda" in device else "gloo")
    model = nn.parallel.DistributedDataParallel(model)  # averages their gradients
    world = torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()  # 0, 1, ...
    deck = deck[rank::world]  # each gets a part of every batch
    batch_size //= world
    seed += rank
    if rank:  # only the first one prints and saves
        sys.stdout = None
        save = file = ""
elif "cuda" in device and first_step < max_iters:
    model.train()
    model = torch.cuda.make_graphed_callables(
        model, get_batch(1), allow_unused_input=True)


def show_progress(step, loss):
    """Now and then, print how far training has got, and how long is left."""
    if step % 100 == 10:
        seconds = (time.time() - began) / (step - first_step)  # for one step
        print(f"step {step} of {max_iters}: loss {loss:.3f}, "
              f"{seconds * (max_iters - step) / 60:.1f} minutes left", flush=True)


# %% [markdown]
# ## The run
# Press Ctrl-C to stop.

# %%
print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
model.eval()
if first_step < max_iters:
    losses[first_step] = evaluate(first_step)
began = time.time()
try:
    for step in range(first_step + 1, max_iters + 1):
        torch.manual_seed(seed + step)  # for dropout, Step 7
        set_learning_rates(step)        # Step 12
        inputs, targets = get_batch(step)
        loss = train_step(inputs, targets)
        show_progress(step, loss)  # Extra
        if step % eval_interval == 0 or step == max_iters:
            losses[step] = evaluate(step)
            keep(step)  # Extra
            write("", 80, seed)
except KeyboardInterrupt:  # Extra
    print(f"\nstopped; --load={file} goes on from step {best['step']}" if file else
          "\nstopped; nothing was saved")

# %% [markdown]
# ## The sample

# %%
if best["step"]:  # Extra
    unwrapped.load_state_dict(best["model"])
    print(f"the best model (step {best['step']}, val loss {best['val_loss']:.4f}):")
model.eval()
for i in range(samples):
    print(f"--- sample {i + 1} of {samples} ---")
    write(prompt, max_new_tokens, seed + i)

# %% [markdown]
# ## Extra: a picture
# With matplotlib: the losses, and what the heads of the last block look at.

# %%
try:
    if file:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, n_head + 1, figsize=(15, 5))
        axes[0].plot(*zip(*sorted(losses.items())))
        axes[0].legend(["train", "val"])
        line = inputs[0, :32]
        unwrapped(line[None])  # each head keeps its attention weights
        for axis, head in zip(axes[1:], unwrapped.blocks[-1].attention.heads):
            axis.imshow(head.weights[0].tolist())
            axis.set_xticks(range(len(line)), decode(line))
        figure.savefig(f"{file}.png")
except Exception as error:
    print(f"no picture: {error}")
