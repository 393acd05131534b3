"""The block rule, the exact frozen cache, the parameter counts and the gradients of both denoisers.
"""
import itertools
import math

import pytest
import torch
from tiny import TINIER, half_masked as texts, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import config
import masking
import model_config
from layers import LocalConv, rotary_table
from model import build_model

MODELS = ("primary", "backup")


def tiny(model, vocab=40, **changes):
    shape = dict(n_layers=3, n_heads=4, conv_kernel=5)
    return tiny_model(model, vocab, seed=1, away=0.1, **shape | changes)


def edges(length, block, first):
    return list(itertools.pairwise([0, *range(first, length, block), length]))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block", [1, 2, 3, 7, 16, 64])
@pytest.mark.parametrize("length", [17, 64, 71])
@torch.no_grad()
def test_cache_is_exact(model, block, length):
    """The most important test: logits decoded with the frozen cache equal logits of the training
    form, to 1e-5 in float32.
    """
    net = tiny(model)
    x0, xt = texts(length)
    for first in (
        sorted({1, (block + 1) // 2, block} & set(range(1, length + 1)))
        if block < length
        else [length]
    ):
        whole = net.logits(net.block_states(xt, x0, block, first))[..., 1:40]
        cache = net.new_cache(2, length)
        for lo, hi in edges(length, block, first):
            part = net(xt[:, lo:hi], cache)[..., 1:40]
            assert (part - whole[:, lo:hi]).abs().max() <= 1e-5
            net.commit(x0[:, lo:hi], cache)
        assert cache.length == length


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_block_rule(model):
    """Changing a clean token of block b moves no logit of blocks <= b; changing a noisy one moves
    its own block and no other.
    """
    net, block, length = tiny(model), 8, 40
    x0, xt = texts(length)
    base = net.block_states(xt, x0, block)
    for position in (0, 7, 8, 21, 39):
        b = position // block
        other = x0.clone()
        other[:, position] = other[:, position] % 39 + 1
        moved = (net.block_states(xt, other, block) - base).abs().amax(-1)
        assert (moved[:, :(b + 1) * block] == 0).all()
        assert b == 4 or (moved[:, (b + 1) * block:] > 0).any()
        noisy = xt.clone()
        noisy[:, position] = noisy[:, position] % 39 + 1
        moved = (net.block_states(noisy, x0, block) - base).abs().amax(-1)
        own = slice(b * block, (b + 1) * block)
        assert (moved[:, own] > 0).all()
        moved[:, own] = 0
        assert (moved == 0).all()


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_block_of_the_whole_sequence_is_plain_bidirectional_diffusion(model):
    net = tiny(model)
    x0, xt = texts(24)
    torch.testing.assert_close(net.block_states(xt, x0, 24), net.states(xt), atol=0, rtol=0)
    torch.testing.assert_close(net.block_states(xt, x0, 999), net.states(xt), atol=0, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_shorter_first_block_counts_whatever_the_block(model):
    """Blocks as long as the text, or longer, behind a first one of 5 tokens: two blocks, as
    decoding with the cache has them.
    """
    net = tiny(model)
    x0, xt = texts(24)
    cache = net.new_cache(2, 24)
    net.commit(x0[:, :5], cache)
    want = torch.cat((net.states(xt[:, :5]), net.states(xt[:, 5:], cache)), dim=1)
    for block in (19, 23, 24, 25, 999):
        torch.testing.assert_close(net.block_states(xt, x0, block, 5), want, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(net.block_states(xt, x0, 24, 24), net.states(xt), atol=0, rtol=0)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_order_enters_the_denoiser(model):
    """Swap two distant inputs: the outputs are not just swapped (M3), with every other token hidden
    too.
    """
    net = tiny(model)
    xt = torch.full((1, 30), 40)
    xt[0, 5], xt[0, 20] = 7, 9
    swapped = xt.clone()
    swapped[0, 5], swapped[0, 20] = 9, 7
    a, b = net.states(xt), net.states(swapped)
    b_back = b.clone()
    b_back[0, 5], b_back[0, 20] = b[0, 20], b[0, 5]
    assert (a - b_back).abs().max() > 1e-3
    near = torch.full((1, 30), 40)
    near[0, 5], near[0, 6] = 7, 9
    far = torch.full((1, 30), 40)
    far[0, 5], far[0, 7] = 7, 9
    assert (net.states(near)[0, 4] - net.states(far)[0, 4]).abs().max() > 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient_in_one_step(model):
    net = tiny(model)
    x0, xt = texts(33)
    net.block_states(xt, x0, 8).square().sum().backward()
    net.logits(net.states(xt))[..., 1:40].logsumexp(-1).sum().backward()
    dead = [name for name, p in net.named_parameters() if p.grad is None or not (p.grad != 0).any()]
    assert dead == []


def test_a_parameter_without_a_rule_is_an_error():
    from layers import initialise
    net = tiny("primary")
    net.stray = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="stray"):
        initialise(net)


@torch.no_grad()
def test_cache_sizes():
    """EcoHybrid's cache does not grow with the context; the transformer's is preallocated; nbytes
    is the tensors' size.
    """
    eco, backup = tiny("primary"), tiny("backup")
    for layer in eco.layers:
        layer.decay.fill_(3.0)                          # a slot forgets within 20 tokens
    cache, sizes, norms = eco.new_cache(1, 0), set(), []
    for _ in range(64):
        eco.commit(texts(16, batch=1)[0], cache)
        sizes.add(cache.nbytes)
        norms.append(float(cache.num.norm()))
    assert (
        sizes == {sum(t.numel() * t.element_size() for t in (cache.num, cache.halo))}
        and cache.length == 1024
    )
    assert max(norms) < 4 * min(norms)                  # bounded over 64 blocks (C1)
    small, large = backup.new_cache(1, 10), backup.new_cache(1, 100)
    assert large.nbytes == 10 * small.nbytes == 2 * 3 * 32 * 100 * 4
    backup.commit(texts(10, batch=1)[0], small)
    # a full cache slides: the oldest position leaves
    backup.commit(texts(11, batch=1)[0][:, :1], small)
    assert (small.held, small.length) == (10, 11)
    with pytest.raises(ValueError, match="10 positions, 11"):
        backup.commit(texts(11, batch=1)[0], small)
    cache.reset()
    assert cache.length == 0 and not cache.num.any()


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_cache_after_reset_is_a_new_one(model):
    net = tiny(model)
    x0, xt = texts(16)
    used, fresh = net.new_cache(2, 32), net.new_cache(2, 32)
    net.commit(texts(9)[0], used)
    used.reset()
    for cache in (used, fresh):
        net.commit(x0[:, :8], cache)
    torch.testing.assert_close(net(xt[:, 8:], used), net(xt[:, 8:], fresh), atol=0, rtol=0)


@pytest.mark.parametrize("model", MODELS)
def test_parameter_count_is_the_formula(model):
    for changes in (
        {},
        dict(d_model=48, n_heads=6, d_ff=100, n_layers=2, memory_slots=7, conv_kernel=3, d_mem=12),
    ):
        net = tiny(model, **changes)
        assert sum(p.numel() for p in net.parameters()) == model_config.count_params(net.cfg)


@torch.no_grad()
def test_rotary_table_is_float32_and_exact():
    """8,192 positions give 8,192 different rows, whatever the model is cast to (C5)."""
    cos, sin = rotary_table(torch.arange(8192), 16)
    assert cos.dtype == torch.float32
    assert len(torch.unique(torch.cat((cos, sin), 1), dim=0)) == 8192
    net = tiny("backup").to(torch.bfloat16)
    assert net.table(5000, 3)[0].dtype == torch.float32
    torch.testing.assert_close(
        net.table(5000, 3)[0], rotary_table(torch.arange(5000, 5003), 8)[0], atol=0, rtol=0
    )


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_mask_and_pad_are_never_an_answer(model):
    net = tiny(model)
    net.head.weight[[0, 40]] += 100
    z = net(texts(12)[1])
    assert (
        z.dtype == torch.float32
        and torch.isneginf(z[..., [0, 40]]).all()
        and torch.isfinite(z[..., 1:40]).all()
    )


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(model):
    net = tiny(model)
    x0, xt = texts(24, batch=3)
    together = net.block_states(xt, x0, 8)
    for row in range(3):
        torch.testing.assert_close(
            net.block_states(xt[row : row + 1], x0[row : row + 1], 8)[0],
            together[row],
            atol=1e-5,
            rtol=1e-5,
        )


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("block", [8, 99])
def test_early_exits_see_what_decoding_at_that_depth_sees(model, block):
    """Training's early hidden states are the cached block's at that depth, and every exit's norm
    gets its gradient.
    """
    torch.manual_seed(0)
    cfg = tiny_config(model, n_layers=3, exits=True)
    net = build_model(cfg)
    assert sum(p.numel() for p in net.parameters()) == model_config.count_params(cfg)
    with torch.no_grad():
        net.exits.early_norm.add_(torch.randn_like(net.exits.early_norm))
    xt, x0 = torch.randint(4, 41, (2, 24)), torch.randint(4, 40, (2, 24))
    plain = net.block_states(xt, x0, block)
    for depth in (1, 2):
        last, early = net.block_states(xt, x0, block, None, depth)
        torch.testing.assert_close(last, plain, atol=0, rtol=0)
        cache = net.new_cache(2, 24)
        lo, hi = (0, 24) if block > 24 else (8, 16)
        if lo:
            net.commit(x0[:, :lo], cache)
        torch.testing.assert_close(
            net.states(xt[:, lo:hi], cache, depth), early[:, lo:hi], atol=1e-5, rtol=1e-5
        )
        early.square().sum().backward()
        assert net.exits.early_norm.grad[depth - 1].abs().sum() > 0


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40, 64, 300])
@torch.no_grad()
def test_prefixes_in_groups_are_prefixes(n):
    """The sums over earlier blocks, however many there are, against a loop."""
    layer = tiny("primary").layers[0]
    own, before = torch.randn(2, n, 4, 4, 4), torch.zeros(2, 4, 4, 4)
    found = layer.prefix(own, 3)
    for b in range(n):
        torch.testing.assert_close(found[:, b], before, atol=1e-4, rtol=1e-4)
        before = before * layer.decay_factor(3) + own[:, b]


@torch.no_grad()
def test_a_slot_is_read_by_its_direction():
    """softmax(q.(u + name) / sqrt E) u with u = N / rms(N): the same for N of any size, also in
    float16, and 0 reads as 0.
    """
    layer = tiny("primary").layers[0]
    q, num = torch.randn(2, 3, 16), torch.randn(2, 4, 4, 4)
    u, z = num / num.square().mean(-1, keepdim=True).sqrt(), q.unflatten(-1, (4, 4)).transpose(1, 2)
    share = ((z @ (u + layer.slot_key).mT) / 2).softmax(-1)
    expected = (share @ u).transpose(1, 2).flatten(2)
    for size in (1e-6, 1.0, 1e6):
        torch.testing.assert_close(layer.read(q, num * size), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            layer.read(q.half(), num * size), expected.half(), atol=2e-2, rtol=2e-2
        )
        torch.testing.assert_close(
            layer.read(q.bfloat16(), num * size), expected.bfloat16(), atol=1e-1, rtol=1e-1
        )
    assert not layer.read(q, torch.zeros_like(num)).any()


@pytest.mark.parametrize("n, streams", [(1, 2), (5, 1), (16, 2), (17, 2), (40, 1), (300, 2)])
def test_single_tokens_read_as_their_sums_would_be_read(n, streams):
    """read_tokens, which never makes a token's N, against read on it: values, and the gradient of
    everything it uses.
    """
    layer = tiny("primary").layers[0]
    q, v = (torch.randn(streams, 2, n, 1, 16, requires_grad=True) for _ in range(2))
    s, s_clean, v_clean = (
        3 * torch.randn(*shape, n, 1, 16) for shape in ((streams, 2), (2,), (2,))
    )
    used = [
        q,
        v,
        s.requires_grad_(),
        v_clean.requires_grad_(),
        s_clean.requires_grad_(),
        layer.decay,
        layer.slot_key,
    ]
    lean = layer.read_tokens(q, v, s, v_clean, s_clean)
    weight = torch.randn_like(lean)
    grads = torch.autograd.grad((lean * weight).sum(), used)

    def agrees(made):
        torch.testing.assert_close(lean, made, atol=1e-5, rtol=1e-5)
        others = torch.autograd.grad((made * weight).sum(), used, allow_unused=True)
        for got, wanted in zip(grads, others, strict=True):
            if wanted is None:  # a single token has no tokens before it
                wanted = torch.zeros_like(got)
            torch.testing.assert_close(
                got, wanted, atol=1e-4 * float(wanted.abs().max()) + 1e-6, rtol=1e-3
            )

    agrees(layer.read(q, layer.write(v, s) + layer.prefix(layer.write(v_clean, s_clean), 1)))
    if n <= 40:  # it takes n^2 / 2 steps
        agrees(layer.read_tokens_plainly(q, v, s, v_clean, s_clean))


@torch.no_grad()
def test_sums_stay_within_float16():
    """4,096 tokens that all write with the largest weight: finite, where e^8 each would not be
    (--amp_dtype fp16).
    """
    layer = tiny("primary").layers[0]
    total = layer.write(torch.ones(1, 4096, 16).half(), torch.full((1, 4096, 16), 99.0).half())
    assert torch.isfinite(total).all() and total.max() > 1e4


@pytest.mark.parametrize("reach", [1, 3])
@torch.no_grad()
def test_one_token_is_convolved_as_in_a_sequence(reach):
    conv = LocalConv(8, 2 * reach + 1)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(5, reach + 2, 8)
    two = conv(x[:, reach:], x[:, :reach])  # of a block of two tokens, without the second one
    one = conv(x[:, reach:reach + 1], x[:, :reach])
    torch.testing.assert_close(one[:, 0], two[:, 0] - x[:, reach + 1] * conv.weight[:, reach + 1])


@pytest.mark.parametrize("block", [1, 2, 5, 16])
def test_commit_and_states_is_commit_then_states(block):
    """One pass for a finished block and the first forward of the next: same hidden states, same
    cache, from an empty one too.
    """
    net = tiny_model("primary", n_layers=3, conv_kernel=7)
    one, two = net.new_cache(2), net.new_cache(2)
    with torch.no_grad():
        for _ in range(4):
            x0, xt = torch.randint(4, 40, (2, block)), torch.randint(4, 41, (2, block))
            net.commit(x0, one)
            want, got = net.states(xt, one), net.commit_and_states(x0, xt, two)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            for name in ("num", "halo"):
                torch.testing.assert_close(
                    getattr(two, name), getattr(one, name), atol=1e-5, rtol=1e-5
                )
            assert one.length == two.length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [1, 3])
def test_gradients_are_finite_where_a_block_has_few_tokens(dtype, first):
    """A slot's sum begins with one token of the smallest weight: its value still has rms 1, and all
    gradients are numbers.
    """
    net = tiny("primary")
    with torch.no_grad():
        for layer in net.layers:
            layer.in_proj.weight[-layer.H * layer.M:] *= 100  # scores at both ends of their range
    x0, xt = texts(19)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        net.block_states(xt, x0, 4, first).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_scale_of_a_slot_cancels():
    """read() of N and of N times anything is the same; nothing written is no NaN and no infinite
    gradient.
    """
    layer, g = tiny("primary").layers[0], torch.Generator().manual_seed(0)
    q, num = torch.randn(2, 5, 16, generator=g), torch.randn(2, 4, 4, 4, generator=g)
    want = layer.read(q, num)
    for scale in (1e-6, 1e-3, 1e8):
        torch.testing.assert_close(layer.read(q, num * scale), want, atol=1e-6, rtol=1e-5)
    empty = torch.zeros(2, 4, 4, 4, requires_grad=True)
    out = layer.read(q, empty)
    out.sum().backward()
    assert (out == 0).all() and torch.isfinite(empty.grad).all()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block, many", [(1, 9), (2, 5), (7, 3), (16, 4)])
@torch.no_grad()
def test_many_blocks_are_committed_as_one_after_another(model, block, many):
    """commit(x0, cache, block) of a whole prompt leaves the cache of a commit per block, behind an
    empty cache and a full one.
    """
    net, room = tiny(model), 3 + 2 * many * block
    one, all_at_once = net.new_cache(2, room), net.new_cache(2, room)
    x0 = texts(room)[0]
    for cache in (one, all_at_once):
        net.commit(x0[:, :3], cache)
    for lo in range(3, room, block):
        net.commit(x0[:, lo:lo + block], one)
    for lo in (3, 3 + many * block):
        net.commit(x0[:, lo:lo + many * block], all_at_once, block)
    assert one.length == all_at_once.length == room
    for name in ("num", "halo") if model == "primary" else ("k", "v"):
        want = getattr(one, name)
        torch.testing.assert_close(
            getattr(all_at_once, name), want, atol=1e-5 * float(want.abs().max()), rtol=1e-5
        )
    xt = texts(8)[1]
    torch.testing.assert_close(
        net(xt, all_at_once)[..., 1:40], net(xt, one)[..., 1:40], atol=1e-5, rtol=1e-5
    )


def depthwise_backward(grad, x, w, *_, **__):
    # torch's own formula counts every channel with every other
    return 2 * 2 * math.prod(grad) * math.prod(w[1:])


@pytest.mark.parametrize("block", [128, 48, 16, 4, 1])
@pytest.mark.parametrize("exits", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_the_flops_formula_counts_what_a_step_does(model, exits, block):
    """train_flops against torch's counter during a real forward and backward, within 5 %: left to
    right, whole rows, and both streams, also with a shorter last block.
    """
    length, rows = 128, 2
    cfg = model_config.ModelConfig(
        model=model,
        vocab_size=300,
        d_model=64,
        n_layers=3,
        n_heads=4,
        d_ff=96,
        memory_slots=8,
        exits=exits,
    )
    if block == 1:
        masks = masking.left_to_right(rows, length)
    else:
        masks = masking.corrupt(config.TrainArgs(seq_len=length), 1, 1, rows, length, block)
        if block < length:
            masks = masks._replace(clean_share=0.5)
    net = build_model(cfg)
    x0 = torch.randint(1, 300, (rows, length))
    with (
        FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.convolution_backward: depthwise_backward}
        ) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        early = 1 if exits else None
        out = masking.denoising_loss(net, x0, masks, "elbo", early=early, early_weight=0.5)
        out.loss.backward()
    share = masks.masked_count / (rows * length)
    formula = rows * length * model_config.train_flops(cfg, length, block, share)
    assert formula == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_the_mean_flops_of_a_run_are_those_of_its_steps():
    """The drawn steps of a run, with those that are left to right alone while it fades, where what
    is hidden plays no part.
    """
    cfg = model_config.ModelConfig(
        model="primary", vocab_size=300, d_model=64, n_layers=3, n_heads=4, d_ff=96, memory_slots=8
    )
    args = config.TrainArgs(seq_len=128, max_steps=1000, ar_fade=0.5, train_block_sizes="T,16,4")
    total = 0
    drawn = set()
    for step in range(args.max_steps):
        block, first = masking.pick_blocks(
            args.block_choices, 128, 1, step, args.single_chance(step)
        )
        drawn.add(block)
        share = 1.0
        if block > 1:
            masks = masking.corrupt(args, 1, step, 4, 128, block, first)
            share = masks.masked_count / (4 * 128)
        total += model_config.train_flops(cfg, 128, block, share)
    assert drawn == {128, 16, 4, 1}
    counted = model_config.flops_per_token(cfg, 128, args.rule_shares, 0.5)
    assert counted == pytest.approx(total / args.max_steps, rel=0.02)

    alone = model_config.flops_per_token(cfg, 128, {1: 1.0}, 0.4)
    assert alone == round(model_config.train_flops(cfg, 128, 1, 0.0))
    assert alone == round(model_config.train_flops(cfg, 128, 1, 1.0))
    assert alone < model_config.train_flops(cfg, 128, 16, 0.0)


# ---- --activation_checkpointing ------------------------------------------------------------------

def one_step(net, block, recompute, dtype=None):
    """Loss, gradients and {storage: bytes} of what autograd keeps for the backward pass, parameters
    left out.
    """
    torch.manual_seed(5)  # dropout
    net.recompute, kept, known = (
        recompute,
        {},
        {p.untyped_storage().data_ptr() for p in net.parameters()},
    )
    x0 = texts(48)[0]
    masks = masking.corrupt(config.TrainArgs(), 1, 0, len(x0), 48, block, 3 if block < 48 else 48)

    def keep(t):
        if t.untyped_storage().data_ptr() not in known:
            # held, so that its place is not given to another
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        out = masking.denoising_loss(
            net,
            x0,
            masks,
            "elbo",
            1.0,
            **({"early": 1, "early_weight": 0.5} if net.cfg.exits else {}),
        )
    net.zero_grad()
    out.loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return float(out.loss.detach()), grads, sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("model, exits", [("primary", True), ("backup", False)])
@pytest.mark.parametrize("block", [48, 8])
def test_recomputed_layers_give_the_same_gradients(model, exits, block):
    """With dropout, whose masks have to come back: another mask would show in every gradient."""
    net = tiny(model, dropout=0.2, exits=exits).train()
    loss, grads, _ = one_step(net, block, False)
    again, regrads, _ = one_step(net, block, True)
    assert again == loss and grads.keys() == regrads.keys() and len(grads) > 10
    for name in grads:
        torch.testing.assert_close(
            regrads[name], grads[name], rtol=0, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )
    with torch.no_grad():
        assert not net.block_states(*texts(48), block).requires_grad, (
            "an evaluation has nothing to recompute"
        )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block", [48, 8])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_layers_keep_their_input_alone(model, block, dtype):
    """What each further layer keeps for the backward pass: its input, 4 bytes per token, unit of
    width and stream.
    """
    extra = {}
    for recompute in (False, True):
        small, large = (
            one_step(tiny(model, n_layers=n, memory_slots=2), block, recompute, dtype)[2]
            for n in (2, 4)
        )
        # its short first block is padded to 8
        slots = 56 if model == "primary" and block == 8 else 48
        extra[recompute] = (large - small) / 2 / (2 * slots * 32)                # rows x T x D
    assert extra[True] == 4 * (1 if block == 48 else 2)
    assert extra[True] < extra[False] / 6


@pytest.mark.parametrize("d_mem", [2, 4, 6])
def test_single_tokens_are_exact_however_slim_a_head_is(d_mem):
    """Heads of one, two and three numbers: training's form of single tokens gives what decoding
    with its cache gives.
    """
    net = tiny_model("primary", shape=TINIER, memory_slots=16, d_mem=d_mem)
    x0 = torch.randint(4, 40, (8, 96))
    xt = torch.full_like(x0, net.cfg.mask_id)
    with torch.no_grad():
        for layer in net.layers:
            layer.in_proj.weight.mul_(2)                # sums that nearly cancel are found sooner
        trained, cache = net.logits(net.block_states(xt, x0, 1))[..., 4:-1], net.new_cache(8, 96)
        for i in range(96):
            decoded = net.logits(net.states(xt[:, i:i + 1], cache))[:, 0, 4:-1]
            assert (trained[:, i] - decoded).abs().max() < 5e-6, i
            net.commit(x0[:, i:i + 1], cache)
