"""The model against oracles: PyTorch's own functions, counting, and identities that must hold."""
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, TEXT, names, run


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """The globals of gpt.py with a tiny model whose weights are all random, none of them zero."""
    space = loaded("gpt.py", tmp_path_factory.mktemp("gpt"))
    torch.manual_seed(0)
    for weight in space["model"].parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return space


def loaded(script, folder, **numbers):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return names(script, **numbers)


def test_attention_is_pytorchs(gpt):
    attention, x = gpt["model"].blocks[0].attention, torch.randn(3, 11, gpt["n_embd"])
    q, k, v = attention.qkv(x).view(3, 11, 3, gpt["n_head"], -1).permute(2, 0, 3, 1, 4)
    q, k = (gpt["rotate"](F.rms_norm(z, z.shape[-1:])) for z in (q, k))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = attention.proj(expected.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(attention(x), expected, rtol=1e-4, atol=1e-5)


def test_no_position_sees_a_later_one(gpt):
    idx = torch.randint(gpt["vocab_size"], (2, gpt["block_size"]))
    before = gpt["model"].eval()(idx)[0]
    for place in (1, 7, gpt["block_size"] - 1):
        changed = idx.clone()
        changed[:, place] = (changed[:, place] + 1) % gpt["vocab_size"]
        after = gpt["model"](changed)[0]
        assert torch.equal(before[:, :place], after[:, :place])
        assert (before[:, place:] != after[:, place:]).any(dim=2).all()


def test_rotation_tells_distance_and_nothing_else(gpt):
    q, k = torch.randn(2, 1, 1, 1, gpt["n_embd"] // gpt["n_head"])
    spread = [gpt["rotate"](z.expand(1, 1, 16, -1))[0, 0] for z in (q, k)]
    products = spread[0] @ spread[1].T
    for distance in range(-9, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert products[0].std() > 0.1
    torch.testing.assert_close(spread[0].norm(dim=1), q.norm().expand(16))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_shift_takes_half_from_here_and_a_quarter_from_each_of_two_before(gpt, length):
    x = torch.randn(2, length, gpt["n_embd"])
    half, quarter = gpt["n_embd"] // 2, gpt["n_embd"] // 4
    expected = torch.zeros_like(x)
    for t in range(length):
        expected[:, t, :half] = x[:, t, :half]
        if t >= 1:
            expected[:, t, half:half + quarter] = x[:, t - 1, half:half + quarter]
        if t >= 2:
            expected[:, t, half + quarter:] = x[:, t - 2, half + quarter:]
    assert torch.equal(gpt["shift"](x), expected)


def test_untrained_loss_is_that_of_a_blind_guess(tmp_path):
    space = loaded("gpt.py", tmp_path)
    train_loss, val_loss = space["estimate_loss"]()
    assert train_loss == pytest.approx(math.log(space["vocab_size"]), abs=1e-5)
    assert val_loss == pytest.approx(math.log(space["vocab_size"]), abs=1e-5)


def test_forward_returns_logits_and_the_mean_of_minus_log_probability(gpt):
    idx, targets = torch.randint(gpt["vocab_size"], (2, 3, 5))
    logits, none = gpt["model"](idx)
    assert none is None
    loss = gpt["model"](idx, targets)[1]
    odds = np.exp(logits.detach().numpy().astype(float))
    right = np.take_along_axis(odds, targets.numpy()[..., None], axis=2)[..., 0] / odds.sum(axis=2)
    assert loss.item() == pytest.approx(-np.log(right).mean(), rel=1e-5)
    with pytest.raises(AssertionError, match="block_size"):
        gpt["model"](torch.zeros(1, gpt["block_size"] + 1, dtype=torch.long))


def test_a_model_learns_one_batch_by_heart(tmp_path):
    space = loaded("gpt.py", tmp_path, n_embd=32)
    inputs, targets = space["get_batch"]()
    for _ in range(100):
        loss = space["model"](inputs, targets)[1]
        space["model"].zero_grad()
        loss.backward()
        space["optimizer"].step()
        space["muon"].step()
    assert loss.item() < 0.1


def best_bigram():
    """The loss of the best possible bigram on the training split, by counting pairs."""
    ids = np.unique(list(TEXT), return_inverse=True)[1][:int(0.9 * len(TEXT))]
    pairs = np.zeros((ids.max() + 1, ids.max() + 1))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1)
    odds = pairs / np.maximum(pairs.sum(axis=1, keepdims=True), 1)
    return -(pairs[pairs > 0] * np.log(odds[pairs > 0])).sum() / pairs.sum()


def test_bigram_comes_close_to_the_best_bigram(tmp_path):
    space = loaded("bigram.py", tmp_path, batch_size=8, block_size=256, max_iters=1500,
                   eval_interval=1500)
    with torch.no_grad():
        data = space["train_data"].long()
        loss = F.cross_entropy(space["model"].table.weight[data[:-1]], data[1:]).item()
    assert best_bigram() <= loss < best_bigram() + 0.02


def test_muon_does_what_pytorchs_does(gpt):
    torch.manual_seed(1)
    shapes = [(24, 24), (24, 24), (48, 12), (12, 48)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(weight.detach().clone()) for weight in ours]
    start = [weight.detach().clone() for weight in ours]
    a = gpt["Muon"](ours, lr=0.02)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=gpt["weight_decay"], momentum=0.95)
    for _ in range(4):
        for x, y in zip(ours, theirs):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y, before in zip(ours, theirs, start):  # PyTorch's computes in bf16: about 3 digits
        assert (x - y).norm() / (y - before).norm() < 0.02


@pytest.mark.parametrize("shape", [(1, 24, 24), (2, 48, 12), (2, 12, 48)])
def test_orthogonalize_is_newton_schulz(gpt, shape):
    torch.manual_seed(2)
    m = torch.randn(shape)
    x = m.double() / m.double().norm(dim=(1, 2), keepdim=True)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    for _ in range(5):  # on each singular value, the polynomial acts alone
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ v
    torch.testing.assert_close(gpt["orthogonalize"](m).double(), expected, rtol=1e-3, atol=1e-4)
    wide = gpt["orthogonalize"](torch.randn(3, 12, 48))
    assert (torch.linalg.svdvals(wide) - 1).abs().max() < 0.35


def test_generate(gpt):
    model, size = gpt["model"], gpt["block_size"]
    idx = torch.randint(gpt["vocab_size"], (2, size + 9))
    for mode in (True, False):
        model.train(mode)
        out = model.generate(idx, 6, seed=5)
        assert model.training is mode and not out.requires_grad
        assert out.shape == (2, size + 15) and torch.equal(out[:, :size + 9], idx)
    assert torch.equal(out, model.generate(idx, 6, seed=5))
    assert not torch.equal(out, model.generate(idx, 6, seed=6))
    cropped = model.generate(idx[:, -size:], 6, seed=5)  # more context than that is never seen
    assert torch.equal(cropped[:, size:], out[:, size + 9:])
    for start in (idx[:, :1], idx[:, :size - 2], idx):
        expected = start
        for _ in range(4):
            best = model(expected[:, -size:])[0][:, -1].argmax(dim=1, keepdim=True)
            expected = torch.cat([expected, best], dim=1)
        assert torch.equal(model.generate(start, 4, top_k=1), expected)
    assert torch.equal(model.generate(idx, 4, temperature=1e-7, seed=1), expected)


def test_dropout_blanks_whole_characters_and_only_in_training(tmp_path):
    space = loaded("gpt.py", tmp_path, dropout=0.5)
    model, (inputs, _) = space["model"], space["get_batch"]()
    seen = []
    model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    plain = model.embedding(inputs).detach()  # (B, T, C)
    model.train()
    for _ in range(100):
        model(inputs)
    got = torch.stack(seen)  # (100, B, T, C)
    blank = (got == 0).all(dim=-1)  # (100, B, T)
    assert torch.equal(got[~blank], (plain * 2).expand_as(got)[~blank])
    spread = math.sqrt(0.5 * 0.5 / blank.numel())
    assert abs(blank.float().mean() - 0.5) < 4 * spread
    model.eval()
    model(inputs)
    assert torch.equal(seen[-1], plain)
    assert space["estimate_loss"]() == space["estimate_loss"]()


def test_learning_rates_fall_to_zero(tmp_path):
    source = (ROOT / "gpt.py").read_text(encoding="utf-8")
    assert source.count("    muon.step()  # Step 12\n") == 1
    edited = tmp_path / "gpt.py"
    edited.write_text(source.replace("    muon.step()  # Step 12\n", "    muon.step()\n    print("
                      "'rates', optimizer.param_groups[0]['lr'], muon.param_groups[0]['lr'])\n"),
                      encoding="utf-8")
    done = run(edited, f"--text_file={ROOT / 'input.txt'}", "--max_iters=40",
               "--eval_interval=40", cwd=tmp_path)
    seen = re.findall(r"^rates (\S+) (\S+)", done.stdout, re.M)
    assert len(seen) == 40
    for step, (adamw, muon) in enumerate(seen):
        share = 1 - step / 40
        assert float(adamw) == pytest.approx(0.004 * share)
        assert float(muon) == pytest.approx(0.02 * share)


def test_a_real_run_beats_every_bigram(tmp_path):
    done = run(ROOT / "gpt.py", "--n_embd=96", "--n_head=2", "--n_layer=2", "--block_size=128",
               "--batch_size=8", "--max_iters=250", "--eval_interval=250", "--save=",
               cwd=tmp_path, tiny=False)
    losses = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$", done.stdout, re.M)
    assert [int(step) for step, _, _ in losses] == [0, 250]
    assert float(losses[-1][2]) < 2.0 < best_bigram() - 0.4
