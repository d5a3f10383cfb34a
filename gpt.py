"""gpt.py: a GPT, which learns to write from one text and shows how on the way.
    python gpt.py --prompt="ROMEO:"       trains on input.txt, then writes (--help: all options)
Expect a validation loss of about 1.41 in two minutes on two CPU cores. Where there is a CUDA GPU,
it trains a larger model, for a loss lower by 0.05 (README). "Step N" marks what is new compared
to bigram.py, where the lesson starts; N is the order to teach in, the lines are in running order.
Shapes: B batch_size, T time (up to block_size), C n_embd, H n_head, D head size C/H, V vocab_size.
"""
# %% Imports
import hashlib, math, os, re, sys, time
import signal, warnings  # Step 15
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
learning_rate = 0.004  # how far does each adjustment by AdamW go? (Step 12)
n_embd = 384 if gpu else 192  # how many numbers describe a character? (Step 1)
n_head = 4 if gpu else 2  # how many heads look back side by side? (Step 4)
n_layer = 6 if gpu else 4  # how many blocks follow one another? (Step 9)
dropout = 0.1 if gpu else 0.0  # what part of the characters is blanked in training? (Step 10)
muon_lr = 0.02  # how far does each adjustment by Muon go? (Step 12)
weight_decay = 0.3 if gpu else 0.1  # how strongly does Muon pull weights to zero? (Step 12)
dtype = "auto"  # float32, bfloat16, or the faster of them? (Step 14)
save = "gpt.pt"  # where is the best model kept? Empty: in memory (Step 15)
load = ""  # which kept model to start from? (Step 15)
resume = ""  # which kept run to go on with? (Step 15)
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
# Step 15: keep the best model. A kept one brings its settings; the command line overrides.
kept, no_text = None, False
if load or resume:
    given = {name: globals()[name] for name in [arg[2:].partition("=")[0] for arg in argv]}
    warnings.simplefilter("ignore")  # where the file is no model, the line below is enough
    try:
        kept = torch.load(resume or load, map_location="cpu", weights_only=True)
        shape = {k: kept["settings"][k] for k in ("n_embd", "n_head", "n_layer", "block_size")}
        globals().update(kept["settings"] | given)
    except Exception as why:
        check(False, f"{resume or load} is no model kept by gpt.py ({type(why).__name__})")
    check(shape | given == given | shape, f"the model in {resume or load} has to keep {shape}")
    no_text = not resume and max_iters == 0
    text_file, save = ("nothing new", "") if no_text else (text_file, save)
for name, least in dict(batch_size=1, block_size=1, max_iters=0, learning_rate=0, eval_interval=1,
                        seed=0, samples=1, max_new_tokens=0, temperature=0.001, top_k=0,
                        n_embd=1, n_head=1, n_layer=1,  # Step 1, Step 4, Step 9
                        dropout=0, muon_lr=0, weight_decay=0).items():
    check(globals()[name] >= least, f"{name}={globals()[name]} should be {least} or more")
check(dropout < 1, f"{dropout=} should be below 1")  # Step 10
check(n_embd % (4 * n_head) == 0, f"{n_embd=} should be a multiple of 4 * n_head = {4 * n_head}")
check(dtype in ("auto", "bfloat16", "float32"), f"{dtype=} should be auto, bfloat16 or float32")
check(not save or os.access(Path(save).parent, os.W_OK), f"{save=} has no writable folder")
# Step 16: several devices. Every process started by torchrun works on its share of each batch.
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
check(batch_size % world == 0, f"{batch_size=} should be a multiple of the {world} processes")
if world > 1:
    torch.distributed.init_process_group("nccl" if gpu else "gloo")
    sys.stdout = open(os.devnull, "w") if rank else sys.stdout  # the first one speaks for all
try:
    world > 1 and gpu and torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # Step 16
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
text = "" if no_text else path.read_text(encoding="utf-8-sig")  # Step 15: to write, none is needed
# The vocabulary: every distinct character is a token, its place in the sorted list is its id.
chars = sorted(set(text))
chars = kept["chars"] if kept else chars  # Step 15
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
check(no_text or len(val_data) > block_size, f"{text_file=} too short for {block_size=}")  # Step 15
newline = "\n" if "\n" in chars else chars[0]  # the start where none is given
encode("" if prompt == "-" else prompt)  # complain now, not after the training

# %% Step 14: bf16. To skip: products in 16 bits, less exact, but much faster on some processors.
can = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
fast = dtype == "bfloat16" or can.get("avx512_bf16") or can.get("amx_bf16") or (
    gpu and torch.cuda.is_bf16_supported(including_emulation=False))
fast_dtype = torch.bfloat16 if fast and dtype != "float32" else torch.float32
autocast = torch.autocast(torch.device(device).type, fast_dtype, fast_dtype != torch.float32)

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
    at = at[rank::world]  # Step 16: of the B windows, those that this process has to learn from
    chunk = train_data[at + window].long()  # (B, T+1): each start (B, 1) + window (T+1)
    return chunk[:, :-1], chunk[:, 1:]

# %% Step 2: attention. Every position (place in a window) looks back and gathers what it needs.
class Attention(nn.Module):
    """(B, T, C) to (B, T, C): weighted sums of what came so far (Vaswani 2017, arXiv:1706.03762).
    To see one head first, read it with n_head = 1: then H is 1, and D is C."""
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)  # three maps in one: q, k and v
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        # A position that saw the next character would copy it: -inf (softmax: 0) hides later ones.
        mask = torch.full((block_size, block_size), -math.inf).triu(1)  # (T, T), 0 up to itself
        self.register_buffer("mask", mask, persistent=False)  # goes along to a GPU, is not saved
    def forward(self, x):
        T = x.shape[1]
        # A query says what a position seeks, a key what it offers, a value what it hands over.
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # each (B, T, C), next (B, T, H, D)
        # Step 4: several heads. Each seeks its own, in D of the C numbers; @ takes the last dims.
        q, k, v = (z.unflatten(-1, (n_head, -1)).transpose(1, 2) for z in (q, k, v))  # (B, H, T, D)
        # Step 5: normalised queries and keys. D numbers get a mean square of 1: only direction
        # counts, and scores (divided below) stay within sqrt(D) (Henry 2020, arXiv:2010.04245).
        q, k = F.rms_norm(q, q.shape[-1:]), F.rms_norm(k, k.shape[-1:])  # each (B, H, T, D)
        q, k = rotate(q), rotate(k)  # Step 3. What is passed on, v, has no need to turn.
        # Sums of D random products grow like sqrt(D); divided by it, they start near 1. If softmax
        # (e^score / sum of its row) gave one position nearly all, small changes would do nothing.
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT  # (B, H, T, T): does q (row) fit k (column)?
        weights = (scores + self.mask[:T, :T].to(q.dtype)).softmax(dim=-1)  # (B, H, T, T)
        gathered = weights @ v  # (B, H, T, D)
        self.pattern = weights.detach()  # Step 17 shows it
        return self.proj(gathered.transpose(1, 2).flatten(2))  # (B, T, C): heads joined and mixed

# %% Step 3: positions. Attention knows no order; so pairs of numbers turn as the text goes on.
speeds = 10000 ** -torch.linspace(0, 1, n_embd // n_head // 2, device=device)  # (D/2), 1 to 0.0001
angles = torch.arange(block_size, device=device)[:, None] * speeds  # (T, D/2)
def rotate(x):
    """Turn pair x[i], x[i + D/2] by position * speeds[i] radians: fast ones tell near places apart,
    slow ones far. Of q turned by m and k by n, q @ k.mT sees m - n (Su 2021, arXiv:2104.09864)."""
    cos, sin = angles[:x.shape[2]].cos().to(x), angles[:x.shape[2]].sin().to(x)  # each (T, D/2)
    a, b = x.chunk(2, dim=-1)  # each (B, H, T, D/2)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)

# %% Step 6: feed-forward. What a position has gathered, it now thinks over by itself.
class FeedForward(nn.Module):
    """(B, T, C) to (B, T, C). Without ReLU (negative numbers to 0), two maps would be as one."""
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(n_embd, 4 * n_embd, bias=False)  # looks for 4C patterns (4 by custom)
        self.down = nn.Linear(4 * n_embd, n_embd, bias=False)  # adds up what those found mean
    def forward(self, x):
        return self.down(self.up(x).relu_().square())  # square: So et al. 2021, arXiv:2109.08668

# %% Step 7: token shift. Neighbours matter most, so they are at hand without any attention.
def shift(x):
    """Keep half the numbers of x (B, T, C), take a quarter from the position before, and a quarter
    from the one before that; pad puts zeros first (after Peng et al. 2023, arXiv:2305.13048)."""
    x0, x1, x2 = x.split([n_embd // 2, n_embd // 4, n_embd // 4], dim=-1)
    x1, x2 = F.pad(x1, (0, 0, 1, 0))[:, :-1], F.pad(x2, (0, 0, 2, 0))[:, :-2]  # each (B, T, C/4)
    return torch.cat([x0, x1, x2], dim=-1)

# %% A block: communication (Steps 2 to 5), then computation (Step 6); Step 7 before each.
class Block(nn.Module):
    """(B, T, C) to (B, T, C): attention between positions, then feed-forward at each of them."""
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        # Step 8: residual connections and LayerNorm. x + f(x), f being attention or feed-forward,
        # passes gradients whole: its slope is 1 + f'. x may grow: f reads it at mean 0, variance 1.
        self.norm1, self.norm2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
    def forward(self, x):
        x = x + self.attention(shift(self.norm1(x)))  # (B, T, C)
        return x + self.feed_forward(shift(self.norm2(x)))

# %% The model: from the characters so far to a score (logit) for each one that might be next.
class LanguageModel(nn.Module):
    """A GPT. Step 1: an embedding and a head. An id becomes C numbers; lm_head makes V scores."""
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, n_embd)
        # Step 9: depth. Blocks in a row: what one has found out, the next can build on.
        self.blocks = nn.Sequential(*[Block() for _ in range(n_layer)])
        self.norm = nn.LayerNorm(n_embd, bias=False)  # Step 8: lm_head, too, reads normed numbers
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        # Step 10: dropout. In training, whole characters are blanked at random, so that a passage
        # is never the same twice and hard to learn by heart. In use, nothing has to be hidden.
        self.dropout = nn.Dropout1d(dropout)  # all C of a position to 0; the rest grows to make up
        # Step 11: initialisation. Zeros: all equally likely. Only they have a gradient, at first.
        nn.init.zeros_(self.lm_head.weight)
    @autocast  # Step 14: in here, matrix products are in fast_dtype
    def forward(self, idx, targets=None):
        """Map ids (B, T) to logits (B, T, V) and, given targets (B, T), their loss (nats: ln)."""
        assert idx.shape[1] <= block_size, f"{idx.shape[1]} characters exceed {block_size=}"
        x = self.dropout(self.embedding(idx))  # (B, T, C), Step 1, Step 10
        x = self.blocks(x)  # (B, T, C), Step 9
        logits = self.lm_head(self.norm(x)).float()  # (B, T, V), from here on in 32 bits
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

# %% Step 12: Muon. Gradients push mostly along few directions; now all directions learn alike.
class Muon(torch.optim.Optimizer):
    """For matrices in blocks. AdamW divides each number of a gradient by its usual size; Muon makes
    it alike in all directions of its matrix (Jordan 2024, kellerjordan.github.io/posts/muon)."""
    def __init__(self, matrices, lr):
        by_shape = {m.shape: [w for w in matrices if w.shape == m.shape] for m in matrices}
        super().__init__([{"params": same} for same in by_shape.values()], {"lr": lr})
    @torch.no_grad()
    def step(self):
        """Adjust all of one shape as a stack (N, rows, columns); the first holds all means."""
        for group in self.param_groups:
            lr, grad = group["lr"], torch.stack([weight.grad for weight in group["params"]])
            mean = self.state[group["params"][0]].setdefault("mean", torch.zeros_like(grad))
            mean.lerp_(grad, 0.05)  # momentum: 0.95 old + 0.05 new; new once more below (Nesterov)
            scale = lr * max(1, grad.shape[1] / grad.shape[2])**0.5  # so that outputs change alike
            for weight, change in zip(group["params"], orthogonalize(grad.lerp(mean, 0.95))):
                weight.mul_(1 - lr * weight_decay).sub_(scale * change)
def orthogonalize(m):
    """Bring singular values s of matrices m, how far they stretch, near 1 (tiny s less): 5 times, s
    becomes 3.4445 s - 4.7750 s^3 + 2.0315 s^5 (Newton-Schulz; the numbers were found by search)."""
    x = (m.mT if m.shape[1] > m.shape[2] else m).to(fast_dtype)  # wide: a is small
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value exceeds 1
    for _ in range(5):
        a = x @ x.mT  # a x: x with s^3; a a x: with s^5. baddbmm(c, m, n): beta c + alpha m n
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if m.shape[1] > m.shape[2] else x).to(m)
model = LanguageModel().to(device)  # made here, with random weights; next, what adjusts them
matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]  # Step 12
others = [w for w in model.parameters() if w not in set(matrices)]  # embedding, lm_head, norms
optimizer, muon = torch.optim.AdamW(others, lr=learning_rate), Muon(matrices, lr=muon_lr)
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

# %% Step 15 (to skip): the best model and the state of the run, in one file.
parts = {"model": model, "optimizer": optimizer, "muon": muon}
best, first_step, interrupted = {"val_loss": math.inf, "curve": {}}, 0, []
if kept:
    model.load_state_dict(kept["best"]["weights"])
if resume:
    best, first_step, queue = kept["best"], kept["step"], kept["queue"].to(device)
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    if kept["device"] == device:  # random states of one kind of device mean nothing to another
        rng.set_state(kept["batches"])
        (torch.cuda if gpu else torch).set_rng_state(kept["rng"])
    if first_step >= max_iters:
        print(f"the run in {resume} is finished: it has made its {first_step} adjustments")
        first_step = max_iters + 1
def keep(step, train_loss, val_loss):
    """Note the losses and, if val_loss is the lowest so far, the weights; write all to save."""
    best["curve"][step] = [train_loss, val_loss]
    if val_loss < best["val_loss"]:
        weights = {name: weight.cpu().clone() for name, weight in model.state_dict().items()}
        best.update(step=step, val_loss=val_loss, weights=weights)
    if save and step and not rank:
        own = ("device", "save", "load", "resume", "prompt")
        state = {name: part.state_dict() for name, part in parts.items()} | {
            "settings": {k: globals()[k] for k in settings if k not in own}, "chars": chars,
            "best": best, "step": step, "queue": queue, "device": device,
            "batches": rng.get_state(), "rng": (torch.cuda if gpu else torch).get_rng_state()}
        write_whole(save, lambda part: torch.save(state, part))

# %% Training
print(f"{device}: {sum(p.numel() for p in model.parameters()):,} parameters learn {text_file}, "
      f"{len(text):,} characters\nguessing among {vocab_size}: loss {math.log(vocab_size):.4f}")
def interrupt(number, frame):
    """End the training after this adjustment; a second Ctrl-C ends everything (Step 15)."""
    interrupted.append(signal.signal(number, usual))
usual = signal.signal(signal.SIGINT, interrupt)
for step in [] if no_text else range(first_step, max_iters + 1):  # Step 15
    last = step == max_iters  # no more adjustments, only measure
    last = last or bool(interrupted)  # Step 15
    if step % eval_interval == 0 or last:
        train_loss, val_loss = estimate_loss()
        terminal and print(" " * 79, end="\r")  # wipe the status line
        print(f"step {step}: train loss {train_loss:.4f}, val loss {val_loss:.4f}")
        check(math.isfinite(val_loss), f"the loss is {val_loss} since step {step}: lower the rates")
        keep(step, train_loss, val_loss)  # Step 15
        write(newline, 80, seed)
    if last:
        break
    # Step 13: learning-rate schedule. Long strides at first; ever shorter ones, to settle down.
    fraction = 1 - step / max_iters
    for which, full_rate in ((optimizer, learning_rate), (muon, muon_lr)):
        for group in which.param_groups:
            group["lr"] = fraction * full_rate
    inputs, targets = get_batch()
    logits, loss = model(inputs, targets)
    model.zero_grad()  # or the new gradients would be added to the old
    loss.backward()
    for weight in (model.parameters() if world > 1 else []):  # Step 16: to stay equal,
        torch.distributed.all_reduce(weight.grad.div_(world))  # all take the mean gradient
    optimizer.step()
    muon.step()  # Step 12
    show_progress(step, loss)

# %% Step 15 (to skip): from here on, the best model.
signal.signal(signal.SIGINT, usual)
if interrupted and save:
    print(f"stopped by Ctrl-C; --resume={save} goes on")
if not no_text:
    model.load_state_dict(best["weights"])
    print(f"the best model, of step {best['step']} with val loss {best['val_loss']:.4f}, writes:")
world > 1 and torch.distributed.destroy_process_group()  # Step 16

# %% Writing: the prompt, and what might come after it.
for start in ((line.rstrip("\n") for line in sys.stdin) if prompt == "-" else [prompt]):
    known = set(start) <= set(chars)
    known or print(f"some of these characters are unknown; known are {''.join(chars)!r}")
    for i in range(samples if known else 0):
        print(f"--- sample {i + 1} of {samples} ---")
        write(start or newline, max_new_tokens, seed + i)

# %% Step 17: look inside. How the loss fell, and where each head of the last block looks.
try:
    import matplotlib.pyplot as plt
except ImportError:
    plt = None
    print("pip install matplotlib, and each training ends with a picture of the model, gpt.png")
if plt and best["curve"] and not rank:
    seen = encode(((prompt if prompt != "-" else "") + decode(val_data[:32]))[:min(32, block_size)])
    model.eval()(seen[None].to(device))  # sets the patterns
    figure, axes = plt.subplots(1, n_head + 1, figsize=(5 * n_head + 5, 5), layout="constrained")
    axes[0].plot(list(best["curve"]), list(best["curve"].values()), label=["train", "val"])
    axes[0].legend(), axes[0].set(xlabel="adjustments", title="loss, nats per character")
    for head, axis in enumerate(axes[1:]):
        axis.imshow(model.blocks[-1].attention.pattern[0, head].float().cpu().numpy(), cmap="Blues")
        axis.set(title=f"head {head + 1}", xlabel="looked at", ylabel="looking")
        for ticks in (axis.set_xticks, axis.set_yticks):
            ticks(range(len(seen)), [repr(char)[1:-1] for char in decode(seen)])
    write_whole("gpt.png", lambda part: figure.savefig(part, format="png"))
