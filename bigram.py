"""bigram.py: the simplest language model. It guesses each character from the last one.

    python bigram.py   trains for a few seconds, then writes

The model is a table: after this character, how likely is each other one?
gpt.py is this script with a transformer instead of the table.

Shapes in comments: B batch_size, T time (up to block_size), V vocab_size.
"""

# %%
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# %% [markdown]
# ## Hyperparameters: the numbers that are not learned

# %%
text_file = "input.txt"  # what to learn from: any text in UTF-8
batch_size = 8           # how many pieces of text does a training step learn from?
block_size = 256         # context length: how many characters can the model look at?
max_iters = 300          # how many training steps?
eval_interval = 100      # how many steps between evaluations?
learning_rate = 0.05     # how far does a training step move the parameters?
max_new_tokens = 500     # how many characters should it write?
temperature = 0.8        # below 1 favours likely characters, above 1 takes risks
seed = 1337              # random seed: the same seed gives the same run
device = "cuda" if torch.cuda.is_available() else "cpu"

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
except (OSError, UnicodeError, RuntimeError) as error:
    print(f"{text_file}: {error}; put a text in UTF-8 there", file=sys.stderr)
    sys.exit(2)

# %% [markdown]
# ## The vocabulary
# We give each distinct character a number, its *id*. A model reads and writes *tokens*:
# ours are characters, those of larger models are pieces of words.

# %%
chars = sorted(set(text))
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
while len(deck) <= max_iters * batch_size:
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
# ## The model: a table
# The simplest model looks at only one character. Its table has a row for each
# character: the logits of all characters that might come next. All it can learn is
# which pairs (*bigrams*) are common.

# %%
class LanguageModel(nn.Module):
    """From the characters so far to the logits of the one that comes next."""

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
# ## Model and training step
# The *optimizer*, AdamW, moves every parameter against its gradient, since that lowers
# the loss. How far? It takes the mean of the last few gradients of a parameter, divided
# by their usual size. So every parameter moves by about `learning_rate`, whether its
# gradients are large or small.

# %%
torch.manual_seed(seed)
model = LanguageModel().to(device)
optimizers = [torch.optim.AdamW(model.parameters(), lr=learning_rate)]


def train_step(inputs, targets):
    """Update all parameters once, using this batch, (B, T) each; return its loss."""
    logits, loss = model(inputs, targets)
    model.zero_grad()                          # clear the gradients of the last step
    loss.backward()                            # find the gradients of the loss
    for optimizer in optimizers:               # only one so far
        optimizer.step()                       # move all parameters against them
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
    """Measure and print the losses after this step."""
    train_loss = estimate_loss(train_data[:2**15])  # a part is enough
    val_loss = estimate_loss(val_data[:2**18])      # all, if it is not huge
    print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")


# %% [markdown]
# ## The run
# The training, with a look at the losses and a sample now and then.

# %%
print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}")
evaluate(0)
for step in range(1, max_iters + 1):
    inputs, targets = get_batch(step)
    train_step(inputs, targets)
    if step % eval_interval == 0 or step == max_iters:
        evaluate(step)
        write("", 80, seed)

# %% [markdown]
# ## The sample

# %%
write("", max_new_tokens, seed)
