"""The model against oracles: PyTorch's own functions, counting, and identities that must hold."""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TEXT, names, run


def loaded(folder, script="gpt.py", **numbers):
    """The globals of a script whose weights are all random, none of them zero."""
    space = names(script, folder, **numbers)
    torch.manual_seed(0)
    for weight in space["model"].parameters():
        torch.nn.init.normal_(weight, std=0.3)
    space["model"].eval()
    return space


@pytest.fixture(scope="module", params=[1, 2], ids=["part1", "part2"])
def gpt(request, tmp_path_factory):
    """Both models of gpt.py, one after the other."""
    return loaded(tmp_path_factory.mktemp("gpt"), part=request.param)


@pytest.fixture(scope="module")
def modern(tmp_path_factory):
    """The model of part two."""
    return loaded(tmp_path_factory.mktemp("modern"))


def turned(x):
    """Rotary positions of x (..., T, D): each pair as a complex number, times e^(i angle)."""
    T, D = x.shape[-2:]
    speed = 1e-4 ** (torch.arange(D // 2, dtype=torch.float64) / (D // 2 - 1))
    turn = torch.polar(torch.ones(T, D // 2, dtype=torch.float64),
                       torch.arange(T, dtype=torch.float64)[:, None] * speed)
    y = torch.complex(x[..., :D // 2], x[..., D // 2:]) * turn
    return torch.cat([y.real, y.imag], dim=-1)


def reference(space, idx):
    """The logits of the whole model, in plain functions of its weights, in 64 bits."""
    w = {name: weight.detach().double() for name, weight in space["model"].named_parameters()}
    modern, C, T = space["part"] == 2, space["n_embd"], idx.shape[1]

    def norm(x, name):
        return F.layer_norm(x, (C,), w[f"{name}.weight"], w[f"{name}.bias"])

    def mixed(x):
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        before2 = torch.cat([torch.zeros_like(x[:, :1]), before[:, :-1]], dim=1)
        place = torch.arange(C)
        x = torch.where(place < C // 2, x, torch.where(place < C * 3 // 4, before, before2))
        return x

    x = w["token_embedding.weight"][idx]
    if not modern:
        speed = space["block_size"] ** (-torch.arange(C // 2).double() / (C // 2 - 1))
        turn = torch.arange(T).double()[:, None] * speed
        x = x + torch.cat([turn.sin(), turn.cos()], dim=1)
    for i in range(space["n_layer"]):
        at = f"blocks.{i}"
        y = norm(x, f"{at}.norm1")
        y = mixed(y) if modern else y
        heads = []
        for h in range(space["n_head"]):
            q, k, v = (y @ w[f"{at}.attention.heads.{h}.{name}.weight"].T
                       for name in ("query", "key", "value"))
            if modern:
                q, k = ((z - z.mean(-1, keepdim=True)) / z.std(-1, keepdim=True, correction=0)
                        for z in (q, k))
                q, k = turned(q), turned(k)
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if modern:
                gate = F.linear(y, w[f"{at}.attention.heads.{h}.gate.weight"],
                                w[f"{at}.attention.heads.{h}.gate.bias"])
                found = found * 2 / (1 + (-gate).exp())
            heads.append(found)
        y = torch.cat(heads, dim=-1)
        x = x + F.linear(y, w[f"{at}.attention.proj.weight"], w[f"{at}.attention.proj.bias"])
        y = norm(x, f"{at}.norm2")
        y = mixed(y) if modern else y
        up = F.linear(y, w[f"{at}.feed_forward.up.weight"], w[f"{at}.feed_forward.up.bias"])
        if modern:
            gate = F.linear(y, w[f"{at}.feed_forward.gate.weight"],
                            w[f"{at}.feed_forward.gate.bias"])
            y = up * gate / (1 + (-gate).exp())
        else:
            y = up.clamp(min=0)
        x = x + F.linear(y, w[f"{at}.feed_forward.down.weight"], w[f"{at}.feed_forward.down.bias"])
    return norm(x, "norm") @ w["lm_head.weight"].T


@pytest.mark.parametrize("length", [1, 2, 16])
def test_the_whole_model_logit_for_logit(gpt, length):
    idx = torch.randint(gpt["vocab_size"], (3, length))
    logits, none = gpt["model"](idx)
    assert none is None and logits.std() > 0.1
    torch.testing.assert_close(logits.double(), reference(gpt, idx), rtol=1e-3, atol=1e-4)


def test_no_position_sees_a_later_one(gpt):
    idx = torch.randint(gpt["vocab_size"], (2, gpt["block_size"]))
    before = gpt["model"](idx)[0]
    for place in (1, 7, gpt["block_size"] - 1):
        changed = idx.clone()
        changed[:, place] = (changed[:, place] + 1) % gpt["vocab_size"]
        after = gpt["model"](changed)[0]
        assert torch.equal(before[:, :place], after[:, :place])
        assert (before[:, place:] != after[:, place:]).any(dim=2).all()


def test_rotation_tells_distance_and_nothing_else(modern):
    q, k = torch.randn(2, 1, 1, modern["n_embd"] // modern["n_head"])
    spread = [modern["rotate"](z.expand(1, 16, -1))[0] for z in (q, k)]
    products = spread[0] @ spread[1].T
    for distance in range(-9, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1


@pytest.mark.parametrize("length", [1, 2, 5])
def test_shift_takes_half_from_here_and_a_quarter_from_each_of_two_before(modern, length):
    x = torch.randn(2, length, modern["n_embd"], requires_grad=True)
    half, quarter = modern["n_embd"] // 2, modern["n_embd"] // 4
    expected = torch.zeros_like(x)
    for t in range(length):
        expected[:, t, :half] = x[:, t, :half]
        if t >= 1:
            expected[:, t, half:half + quarter] = x[:, t - 1, half:half + quarter]
        if t >= 2:
            expected[:, t, half + quarter:] = x[:, t - 2, half + quarter:]
    assert torch.equal(modern["shift"](x), expected)


def test_forward_returns_the_mean_of_minus_log_probability(gpt):
    idx, targets = torch.randint(gpt["vocab_size"], (2, 3, 5))
    logits, loss = gpt["model"](idx, targets)
    odds = np.exp(logits.detach().numpy().astype(float))
    right = np.take_along_axis(odds, targets.numpy()[..., None], axis=2)[..., 0] / odds.sum(axis=2)
    assert loss.item() == pytest.approx(-np.log(right).mean(), rel=1e-5)


@pytest.mark.parametrize("script, part", [("bigram.py", 1), ("gpt.py", 1), ("gpt.py", 2)])
def test_untrained_loss_is_that_of_a_blind_guess(script, part, tmp_path):
    space = names(script, tmp_path, part=part)
    for data in (space["train_data"], space["val_data"]):
        assert space["estimate_loss"](data[:5000]) == pytest.approx(
            math.log(space["vocab_size"]), abs=1e-5)


def test_a_model_learns_one_batch_by_heart(tmp_path):
    for part in (1, 2):
        space = names("gpt.py", tmp_path, part=part, n_embd=32)
        inputs, targets = space["get_batch"](1)
        for _ in range(150):
            loss = space["model"](inputs, targets)[1]
            space["model"].zero_grad()
            loss.backward()
            for optimizer in space["optimizers"]:
                optimizer.step()
        assert loss.item() < 0.2


def best_bigram():
    """The loss of the best possible bigram on the training split, by counting pairs."""
    ids = np.unique(list(TEXT), return_inverse=True)[1][:int(0.9 * len(TEXT))]
    pairs = np.zeros((ids.max() + 1, ids.max() + 1))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    odds = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    return -(pairs[pairs > 0] * np.log(odds[pairs > 0])).sum() / pairs.sum()


def test_bigram_comes_close_to_the_best_bigram(tmp_path):
    space = names("bigram.py", tmp_path, batch_size=8, block_size=256, max_iters=1500,
                  eval_interval=1500, text_file=ROOT / "input.txt")
    with torch.no_grad():
        data = space["train_data"]
        loss = F.cross_entropy(space["model"].table.weight[data[:-1]], data[1:]).item()
    assert best_bigram() <= loss < best_bigram() + 0.02


def test_a_real_run_beats_every_bigram(tmp_path):
    done = run(ROOT / "gpt.py", "--n_embd=96", "--block_size=128", "--batch_size=8",
               "--max_iters=250", "--eval_interval=250", cwd=tmp_path)  # on input.txt
    losses = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)", done.stdout, re.M)
    assert [int(step) for step, _, _ in losses] == [0, 250]
    assert float(losses[-1][2]) < 2.0 < best_bigram() - 0.4


def test_optimizers_share_out_all_weights(gpt, tmp_path):
    model, optimizers = gpt["model"], gpt["optimizers"]
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(model.parameters())
    assert [type(o).__name__ for o in optimizers] == ["AdamW", "Muon"][:gpt["part"]]
    if gpt["part"] == 2:
        muon = {name for name, p in model.named_parameters() if any(
            p is q for group in optimizers[1].param_groups for q in group["params"])}
        assert muon == {name for name, p in model.named_parameters()
                        if name.startswith("blocks.") and "norm" not in name
                        and name.endswith(".weight")}
        assert {name for name, _ in model.named_parameters()} - muon >= {
            "token_embedding.weight", "lm_head.weight"}


def test_muon_does_what_pytorchs_does(modern):
    torch.manual_seed(1)
    shapes = [(24, 24), (24, 24), (48, 12), (12, 48)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    a = modern["Muon"](ours, lr=0.02)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=modern["weight_decay"],
                         momentum=modern["momentum"])
    for _ in range(4):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y, before in zip(ours, theirs, start):  # PyTorch's computes in bf16: about 3 digits
        assert (x - y).norm() / (y - before).norm() < 0.02


@pytest.mark.parametrize("shape", [(24, 24), (48, 12), (12, 48)])
def test_equalize_is_a_polynomial_of_each_singular_value(modern, shape):
    torch.manual_seed(2)
    stack = torch.randn(2, *shape) * torch.tensor([1.0, 100.0])[:, None, None]
    for m, result in zip(stack.double(), modern["equalize"](stack)):
        u, s, v = torch.linalg.svd(m / m.norm(), full_matrices=False)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        torch.testing.assert_close(result.double(), u @ s.diag() @ v, rtol=1e-3, atol=1e-4)


def test_the_numbers_in_the_text_on_muon():
    source = (ROOT / "gpt.py").read_text(encoding="utf-8").replace("\n# ", " ")
    start, told, low, high = re.search(
        r"From ([\d.]+) you get ([\d., ]+), and from anywhere between 0.01 and 1, .*? about "
        r"([\d.]+) and (\d\.\d)", source).groups()
    x, seen = float(start), []
    for _ in told.split(", "):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
        seen.append(f"{x:.2f}")
    assert seen == told.split(", ")
    x = np.linspace(0.01, 1, 100000)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert (x.min().round(1), x.max().round(1)) == (float(low), float(high))


def test_the_numbers_in_the_text_on_attention_and_muon(modern, tmp_path):
    """The weights of four scores, products of clocks, sizes of scores, what Muon makes of two."""
    source = (ROOT / "gpt.py").read_text(encoding="utf-8").replace("\n# ", " ")
    scores, weights = re.search(r"be ([\d, and]+)\. Softmax makes the weights \(about\) "
                                r"([\d., and]+) of them", source).groups()
    scores, weights = (list(map(float, re.findall(r"[\d.]+", told))) for told in (scores, weights))
    assert torch.tensor(scores).softmax(0).numpy().round(2).tolist() == pytest.approx(weights)

    told = re.search(r"positions 3, 4 and 5 are ([\d.]+), ([\d.]+) and ([\d.]+)\.", source).groups()
    one = names("gpt.py", tmp_path, n_embd=192, block_size=256, part=1)
    fastest = one["positions"][:, [0, 96]].double()  # its hand at each position
    assert [f"{float(fastest[4] @ fastest[at]):.3g}" for at in (3, 4, 5)] == list(told)

    before, after = re.search(r"scores are about ([\d.]+) in size at first, .*?they are about "
                              r"([\d.]+) in size", source).groups()
    torch.manual_seed(0)
    x = F.layer_norm(torch.randn(2000, 192), (192,))
    q, k = (torch.nn.Linear(192, 96, bias=False)(x).detach() for _ in range(2))
    assert (q @ k.T / 96**0.5).std().item() == pytest.approx(float(before), abs=0.05)
    q, k = F.layer_norm(q, (96,)), F.layer_norm(k, (96,))
    assert (q @ k.T / 96**0.5).std().item() == pytest.approx(float(after), abs=0.05)

    first, second, made = re.search(r"with ([\d.]+) and ([\d.]+) on its diagonal it makes one with "
                                    r"([\d.]+ and [\d.]+),", source).groups()
    result = modern["equalize"](torch.tensor([float(first), float(second)]).diag()[None])[0]
    assert " and ".join(f"{x:.1f}" for x in result.diag().tolist()) == made


def test_generate(gpt):
    model, size = gpt["model"], gpt["block_size"]
    idx = torch.randint(gpt["vocab_size"], (size + 9,))

    def new(idx, count, seed=0, **kwargs):
        torch.manual_seed(seed)
        return list(gpt["generate"](idx, count, **kwargs))

    out = new(idx, 6)
    assert len(out) == 6 and torch.is_grad_enabled()
    assert out == new(idx, 6) != new(idx, 6, seed=1)
    assert out == new(idx[-size:], 6)  # more context than block_size is never seen
    for start in (idx[:1], idx[:size - 2], idx):
        expected = start
        for _ in range(4):
            best = model(expected[None, -size:])[0][0, -1].argmax()
            expected = torch.cat([expected, best[None]])
        expected = expected[len(start):].tolist()
        assert new(start, 4, top_k=1) == expected == new(start, 4, temperature=0)


def test_samples_follow_the_probabilities(gpt):
    idx = torch.randint(gpt["vocab_size"], (5,))
    logits = gpt["model"](idx[None])[0][0, -1].double() / 2
    torch.manual_seed(0)
    for top_k in (0, 3):
        if top_k:
            logits[logits < logits.sort().values[-3]] = -math.inf
        drawn = [next(gpt["generate"](idx, 1, temperature=2, top_k=top_k)) for _ in range(1500)]
        share = torch.bincount(torch.tensor(drawn), minlength=gpt["vocab_size"]) / 1500
        p = logits.softmax(dim=0)
        assert len(set(drawn)) == 3 if top_k else len(set(drawn)) > 9
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / 1500).sqrt() + 1e-9).all()


def test_write_uses_seed_temperature_and_top_k(gpt, capsys):
    start = gpt["chars"][5]

    def written(**numbers):
        kept = {name: gpt[name] for name in numbers}
        gpt.update(numbers)
        gpt["write"](start, 40, 7)
        gpt.update(kept)
        return capsys.readouterr().out

    torch.manual_seed(7)
    idx = gpt["encode"](start)
    expected = gpt["decode"](gpt["generate"](idx, 40, gpt["temperature"], gpt["top_k"]))
    assert written() == start + expected + "\n"
    assert len({written(), written(temperature=3.0), written(top_k=1)}) == 3


def test_dropout_hides_whole_characters_in_training_only(tmp_path):
    for part in (1, 2):
        space = loaded(tmp_path, part=part, dropout=0.5)
        model, (inputs, _) = space["model"], space["get_batch"](1)
        seen = []
        model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
        model(inputs)
        plain = seen.pop()
        model.train()
        for _ in range(100):
            model(inputs)
        hidden = (torch.stack(seen) == 0).all(dim=-1)  # (100, B, T)
        assert torch.equal(torch.stack(seen)[~hidden],
                           (2 * plain).expand(100, *plain.shape)[~hidden])
        assert abs(hidden.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(hidden.numel())


def test_dropout_is_on_while_gradients_are_wanted(tmp_path):
    space, modes = loaded(tmp_path, dropout=0.5), []
    space.update(max_iters=5)
    space["model"].register_forward_pre_hook(
        lambda model, _: modes.append((model.training, torch.is_grad_enabled())))
    for step in range(1, 6):
        space["train_step"](*space["get_batch"](step))
        space["evaluate"](step)
    assert modes.count((True, True)) == 5
    assert set(modes) == {(True, True), (False, False)} and not space["model"].training
    assert list(space["losses"]) == [0, 1, 2, 3, 4, 5]


def test_learning_rates_fall_to_zero(tmp_path):
    space = names("gpt.py", tmp_path)
    space["max_iters"] = 40
    for step in range(1, 41):
        space["set_learning_rates"](step)
        for optimizer, rate in zip(space["optimizers"], (0.004, 0.02)):
            rates = [group["lr"] for group in optimizer.param_groups]
            assert rates == pytest.approx([rate * (41 - step) / 40] * len(rates))


def test_training_is_adamw_and_muon_by_the_book(tmp_path):
    """Three steps against a loop written anew with fresh optimizers."""
    a, b = (names("gpt.py", tmp_path) for _ in range(2))
    a["max_iters"] = 3
    for step in (1, 2, 3):
        torch.manual_seed(1337 + step)
        a["set_learning_rates"](step)
        a["train_step"](*a["get_renamed_batch"](step))
        for optimizer, rate in zip(b["optimizers"], (0.004, 0.02)):
            for group in optimizer.param_groups:
                group["lr"] = rate * (4 - step) / 3
        torch.manual_seed(1337 + step)
        inputs, targets = b["get_renamed_batch"](step)
        loss = F.cross_entropy(b["model"](inputs)[0].transpose(1, 2), targets)
        grads = torch.autograd.grad(loss, list(b["model"].parameters()))
        for weight, grad in zip(b["model"].parameters(), grads):
            weight.grad = grad
        for optimizer in b["optimizers"]:
            optimizer.step()
    for x, y in zip(a["model"].parameters(), b["model"].parameters()):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", [1, 2])
def test_only_part_two_has_a_schedule_and_other_names(part, tmp_path):
    numbers = {"part": part, "dropout": 0.2}
    run = names("gpt.py", tmp_path, max_iters=3, **numbers)
    space = names("gpt.py", tmp_path, **numbers)
    for step in (1, 2, 3):
        torch.manual_seed(1337 + step)
        batch = space["get_renamed_batch" if part == 2 else "get_batch"](step)
        for optimizer in space["optimizers"] if part == 2 else []:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * (4 - step) / 3
        space["train_step"](*batch)
    space["evaluate"](3)
    assert run["losses"][3] == space["losses"][3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_is_in_the_dtype_that_was_asked_for(dtype, tmp_path):
    space = names("gpt.py", tmp_path, dtype=dtype)
    wanted, seen = getattr(torch, dtype), []
    for layer in space["model"].modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    for block in space["model"].blocks:
        block.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    inputs, targets = space["get_batch"](1)
    with space["autocast"]:
        losses = [space["model"](inputs, targets)[1]]
        losses[0].backward()
        for optimizer in space["optimizers"]:
            optimizer.step()
        losses.append(space["model"](inputs, targets)[1])
    assert set(seen) == {wanted} and losses[0].dtype == torch.float32
    assert losses[1] < losses[0] - 0.001  # the new weights are used, not a copy of the old
    seen.clear()
    list(space["generate"](inputs[0], 2))
    assert set(seen) == {torch.float32}


def test_bf16_is_chosen_where_the_processor_has_it(tmp_path, monkeypatch):
    for unit, fast in (("avx512_bf16", True), ("amx_bf16", True), ("avx2", False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {unit: True})
        assert names("gpt.py", tmp_path, dtype="auto")["autocast"]._enabled == fast


def test_the_gpu_preset_makes_a_larger_model(tmp_path):
    space = names("gpt.py", tmp_path)
    preset = {name: space["gpu_preset"][name] for name in ("n_embd", "n_head", "n_layer")}
    larger = names("gpt.py", tmp_path, block_size=256, **preset)
    assert sum(p.numel() for p in larger["model"].parameters()) == pytest.approx(11.6e6, rel=0.01)
