"""The model and its training against oracles: PyTorch's own functions, counting, identities."""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPT, TEXT, TINY, edited, play, play_in_32_bits

PROSE = GPT.replace("\n# ", " ")


def loaded(script, folder, **numbers):
    """The globals of a script whose parameters are all random, none of them zero."""
    space = play_in_32_bits(script, folder, **numbers).space
    torch.manual_seed(0)
    for parameter in space["model"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    space["model"].eval()
    return space


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    return loaded("gpt.py", tmp_path_factory.mktemp("gpt"))


@pytest.fixture(scope="module")
def plain(series, tmp_path_factory):
    """The plain GPT at the end of part one."""
    return loaded(series / "07_depth.py", tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module", params=["plain", "gpt"])
def both(request):
    return request.getfixturevalue(request.param)


def turned(x):
    """Rotary positions of x (..., T, D): each pair as a complex number, times e^(i angle)."""
    T, D = x.shape[-2:]
    speed = 1e-4 ** (torch.arange(D // 2, dtype=torch.float64) / (D // 2 - 1))
    turn = torch.polar(torch.ones(T, D // 2, dtype=torch.float64),
                       torch.arange(T, dtype=torch.float64)[:, None] * speed)
    y = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def reference(space, idx):
    """The logits of the whole model, in plain functions of its parameters, in 64 bits."""
    w = {name: p.detach().double() for name, p in space["model"].named_parameters()}
    modern, C = "shift" in space, space["n_embd"]

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def mixed(x):
        one = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        two = torch.cat([torch.zeros_like(x[:, :1]), one[:, :-1]], dim=1)
        place = torch.arange(C)
        return torch.where(place < C // 2, x, torch.where(place < C * 3 // 4, one, two))

    x = w["token_embedding.weight"][idx]
    for block in (f"blocks.{i}" for i in range(space["n_layer"])):
        y = norm(x, f"{block}.norm1")
        y = mixed(y) if modern else y
        found = []
        for head in (f"{block}.attention.heads.{i}" for i in range(space["n_head"])):
            q, k, v = (linear(y, f"{head}.{name}") for name in ("query", "key", "value"))
            if modern:
                q, k = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, correction=0)
                        for z in (q, k))
            found.append(F.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True))
            if modern:
                found[-1] = found[-1] * 2 / (1 + (-linear(y, f"{head}.gate")).exp())
        x = x + linear(torch.cat(found, dim=-1), f"{block}.attention.proj")
        y, ff = norm(x, f"{block}.norm2"), f"{block}.feed_forward"
        y = mixed(y) if modern else y
        gate = linear(y, f"{ff}.gate") if modern else None
        up = linear(y, f"{ff}.up")
        x = x + linear(up * gate / (1 + (-gate).exp()) if modern else up.clamp(min=0), f"{ff}.down")
    return norm(x, "norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("length", [1, 2, 16])
def test_the_whole_model_logit_for_logit(both, length):
    idx = torch.randint(both["vocab_size"], (3, length))
    logits, none = both["model"](idx)
    assert none is None and logits.std() > 0.1
    torch.testing.assert_close(logits.double(), reference(both, idx), rtol=1e-3, atol=1e-4)


def test_no_position_sees_a_later_one(both):
    idx = torch.randint(both["vocab_size"], (2, 16))
    before = both["model"](idx)[0]
    for place in (1, 7, 15):
        changed = idx.clone()
        changed[:, place] = (changed[:, place] + 1) % both["vocab_size"]
        after = both["model"](changed)[0]
        assert torch.equal(before[:, :place], after[:, :place])
        assert (before[:, place:] != after[:, place:]).any(dim=2).all()


def test_rotation_tells_distance_and_nothing_else(gpt):
    q, k = torch.randn(2, 1, 1, 8)
    products = gpt["rotate"](q.expand(1, 16, -1))[0] @ gpt["rotate"](k.expand(1, 16, -1))[0].T
    for distance in range(-9, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


def test_the_loss_is_the_mean_of_minus_log_probability(both):
    idx, targets = torch.randint(both["vocab_size"], (2, 3, 5))
    logits, loss = both["model"](idx, targets)
    odds = np.exp(logits.detach().numpy().astype(float))
    right = np.take_along_axis(odds, targets.numpy()[..., None], axis=2)[..., 0] / odds.sum(axis=2)
    assert loss.item() == pytest.approx(-np.log(right).mean(), rel=1e-5)


@pytest.mark.parametrize("script", ["bigram.py", "07_depth.py", "gpt.py"])
def test_untrained_it_guesses_blindly(script, series, tmp_path):
    done = play(script if "_" not in script else series / script, tmp_path)
    assert done.losses[0] == pytest.approx(math.log(done.space["vocab_size"]), abs=1e-4)


def best_bigram():
    """The loss of the best possible bigram on the training split, by counting pairs."""
    ids = np.unique(list(TEXT), return_inverse=True)[1][:int(0.9 * len(TEXT))]
    pairs = np.zeros((ids.max() + 1, ids.max() + 1))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    odds = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    return -(pairs[pairs > 0] * np.log(odds[pairs > 0])).sum() / pairs.sum()


def test_the_bigram_comes_close_to_the_best_bigram(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    space = play("bigram.py", tmp_path, tiny=False, max_iters=1500, eval_interval=1500).space
    with torch.no_grad():
        data = space["train_data"]
        loss = F.cross_entropy(space["model"].table.weight[data[:-1]], data[1:]).item()
    assert best_bigram() <= loss < best_bigram() + 0.02


def test_a_real_run_beats_every_bigram(tmp_path):
    (tmp_path / "input.txt").write_text(TEXT, encoding="utf-8")
    done = play("gpt.py", tmp_path, n_embd=96, block_size=128, batch_size=8, max_iters=250,
                eval_interval=250)
    assert list(done.losses) == [0, 250] and done.losses[250] < 2.0 < best_bigram() - 0.4


def test_the_optimizers_share_out_all_parameters(gpt):
    adamw, muon = ([p for group in o.param_groups for p in group["params"]]
                   for o in gpt["optimizers"])
    named = dict(gpt["model"].named_parameters())
    assert len(adamw) + len(muon) == len(named) and {*adamw, *muon} == set(named.values())
    assert {name for name, p in named.items() if any(p is m for m in muon)} == {
        name for name in named if name.startswith("blocks.") and "norm" not in name
        and name.endswith(".weight")}


def test_muon_does_what_pytorchs_does(gpt):
    torch.manual_seed(1)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(24, 24), (24, 24), (48, 12),
                                                                 (12, 48)]]
    theirs = [torch.nn.Parameter(m.detach().clone()) for m in ours]
    start = [m.detach().clone() for m in ours]
    a = gpt["Muon"](ours, {"lr": 0.02})
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9)
    for _ in range(4):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y, before in zip(ours, theirs, start):  # PyTorch's computes in bf16: about 3 digits
        assert (x - y).norm() / (y - before).norm() < 0.02


@pytest.mark.parametrize("shape", [(24, 24), (48, 12), (12, 48)])
def test_equalise_is_a_polynomial_of_each_singular_value(gpt, shape):
    torch.manual_seed(2)
    stack = torch.randn(2, *shape) * torch.tensor([1.0, 100.0])[:, None, None]
    for m, result in zip(stack.double(), gpt["equalise"](stack)):
        u, s, v = torch.linalg.svd(m / m.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(result.double(), u @ s.diag() @ v, rtol=1e-3, atol=1e-4)


def test_the_numbers_in_the_texts():
    """The attention weights of Rome, and where the polynomial of Muon leads."""
    scores, weights = re.search(r"of `R`, `o`, `m` and `e` are ([\d, and]+), their weights are "
                                r"([\d., and]+),", PROSE).groups()
    scores, weights = (list(map(float, re.findall(r"[\d.]+", told))) for told in (scores, weights))
    assert torch.tensor(scores).softmax(0).numpy().round(2).tolist() == pytest.approx(weights)
    start, told, low, high = re.search(r"from ([\d.]+) you get ([\d., ]+)\. Wherever you start, "
                                       r"you end up between ([\d.]+) and (\d\.\d)", PROSE).groups()
    x, seen = float(start), []
    for _ in told.split(", "):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        seen.append(f"{x:.2f}")
    assert seen == told.split(", ")
    x = np.linspace(0.01, 1, 100000)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert (x.min().round(1), x.max().round(1)) == (float(low), float(high))


def test_training_is_what_it_says(tmp_path, monkeypatch):
    """A run of three steps against a loop written anew, with an AdamW of its own."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    numbers = {"max_iters": 3, "eval_interval": 3, "dropout": 0.2}
    a, b = (play("gpt.py", tmp_path, **{**numbers, "max_iters": n}).space for n in (3, 0))
    model, (_, muon) = b["model"], b["optimizers"]
    adamw = torch.optim.AdamW(b["others"], lr=0.004)
    model.train()
    for step in (1, 2, 3):
        torch.manual_seed(1337 + step)
        inputs, targets = b["get_batch"](step)
        loss = F.cross_entropy(model(inputs)[0].transpose(1, 2), targets)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        for parameter, grad in zip(model.parameters(), grads):
            parameter.grad = grad
        adamw.param_groups[0]["lr"] = 0.004 * (4 - step) / 3
        muon.param_groups[0]["lr"] = 0.02 * (4 - step) / 3
        adamw.step()
        muon.step()
    for x, y in zip(a["model"].parameters(), model.parameters()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_dropout_is_on_in_training_only(series, tmp_path):
    for script in (series / "07_depth.py", "gpt.py"):
        source = (tmp_path / "edited.py")
        text = script.read_text() if script != "gpt.py" else GPT
        source.write_text(text.replace("super().__init__()\n        self.token", (
            "super().__init__()\n        self.modes = []\n        self.register_forward_pre_hook("
            "lambda m, _: m.modes.append((m.training, torch.is_grad_enabled())))\n"
            "        self.token")), encoding="utf-8")
        modes = play(source, tmp_path, dropout=0.5).space["model"].modes
        assert modes.count((True, True)) == 10 and set(modes) == {(True, True), (False, False)}


def test_sixteen_bits_where_they_are_fast(tmp_path, monkeypatch):
    """In all linear layers of the blocks; logits, parameters and gradients have 32 bits."""
    for fast, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
        space, seen = play("gpt.py", tmp_path, max_iters=0).space, []
        for layer in space["model"].blocks.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
        space["train_step"](*space["get_batch"](1))
        assert set(seen) == {wanted} == {space["shift"](torch.zeros(1, 2, 16)).dtype}
        assert space["model"](space["inputs"])[0].dtype == torch.float32
        assert {p.grad.dtype for p in space["model"].parameters()} == {torch.float32}


def test_writing_follows_the_probabilities(both, capsys, monkeypatch):
    """Each new character is drawn from the softmax of the logits, divided by the temperature."""
    def written(start, count, seed):
        both["write"](start, count, seed)
        return capsys.readouterr().out[len(start):-1]

    assert written("The", 30, 1) == written("The", 30, 1) != written("The", 30, 2)
    long = TEXT[:50]
    assert written(long, 20, 3) == written(long[-16:], 20, 3)  # block_size is all it sees
    monkeypatch.setitem(both, "temperature", 2.0)
    logits = both["model"](both["encode"]("The")[None])[0][0, -1].double() / 2
    p = logits.softmax(dim=0)
    drawn = [both["char_to_id"][written("The", 1, seed)] for seed in range(1500)]
    share = torch.bincount(torch.tensor(drawn), minlength=both["vocab_size"]) / 1500
    assert ((share - p).abs() < 4.5 * (p * (1 - p) / 1500).sqrt() + 1e-9).all()
    monkeypatch.setitem(both, "temperature", 0)
    assert written("The", 1, 1) == both["chars"][logits.argmax()]


@pytest.mark.parametrize("line", [
    *re.findall(r"(?m)^        (x = x \+ self\..+)$", GPT), "x = self.blocks(x) ",
    "x = self.norm(x) ", "q, k = rotate(q), rotate(k)",
    "q, k = self.norm(q), self.norm(k)"])
def test_any_line_of_the_model_can_be_taken_out(line, tmp_path):
    source = edited(GPT, **{**TINY, "max_iters": 40, "eval_interval": 40})
    assert line in source
    (tmp_path / "edited.py").write_text(source.replace(line, "pass  # "), encoding="utf-8")
    done = play(tmp_path / "edited.py", tmp_path, tiny=False)
    assert done.status == 0 and done.losses[40] < done.losses[0] - 0.2, done.err
