"""Both denoisers: their two streams against a second implementation, the block rule, the exact
frozen cache, the primary's memory, parameter counts and gradients.
"""
import itertools
import math

import pytest
import torch
from by_definition import by_definition
from tiny import TINIER, half_masked as texts, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import config
import masking
import model_config
from eco_hybrid import CHUNK, FASTEST, Rows
from layers import LocalConv, initialise, rotary_table
from model import build_model

MODELS = ("primary", "backup")
KERNELS = [("primary", 3), ("primary", 5), ("primary", 7), ("backup", 3)]
V = 40          # the mask's id
ROUNDING = 1e-5  # of the size of what is compared


def tiny(model, vocab=V, **changes):
    """Slots that forget within one token and slots that remember all: a token that fades once too
    often, or not at all, shows.
    """
    shape = dict(n_layers=3, n_heads=4, conv_kernel=5)
    net = tiny_model(model, vocab, seed=1, away=0.1, **shape | changes)
    if model == "primary":
        forget_at_all_speeds(net)
    return net


@torch.no_grad()
def forget_at_all_speeds(net):
    for layer in net.layers:
        layer.decay.copy_(torch.linspace(-1.0, 5.0, layer.M))


def edges(length, block, first):
    return list(itertools.pairwise([0, *range(first, length, block), length]))


def firsts(length, block):
    """Lengths of the first block: one token, half a block, a whole one."""
    if block >= length:
        return [length]
    return sorted({1, (block + 1) // 2, block})


def other_tokens(ids, position):
    """The same ids with another token at this position."""
    changed = ids.clone()
    changed[:, position] = changed[:, position] % (V - 1) + 1
    return changed


def moved(found, base):
    """By how much the states about each token differ, (T,)."""
    return (found - base).abs().amax((0, 2))


def assert_same(found, wanted):
    """Equal up to the rounding of float32."""
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= ROUNDING * wanted.abs().max()


def memory_of(cache):
    """What a cache holds, in all layers."""
    if hasattr(cache, "num"):
        return cache.num, cache.halo
    return cache.k[:, :, :, :cache.held], cache.v[:, :, :, :cache.held]


def assert_same_cache(found, wanted):
    assert found.length == wanted.length
    assert torch.equal(found.front, wanted.front)
    for one, other in zip(memory_of(found), memory_of(wanted), strict=True):
        assert_same(one, other)


def pieces(length):
    """The same text at once, token by token, and in odd pieces -> lists of lengths."""
    odd = [1, CHUNK - 1, CHUNK, CHUNK + 1, 2, 5]
    odd.append(length - sum(odd))
    return [length], [1] * length, odd, odd[::-1]


# ---- the two streams -----------------------------------------------------------------------------

@pytest.mark.parametrize("model, kernel", KERNELS)
@pytest.mark.parametrize(
    "length, block, first",
    [
        (19, 19, 19), (19, 4, 4), (19, 4, 1), (19, 4, 3), (13, 5, 2), (7, 1, 1), (9, 6, 6),
        (6, 3, 3), (70, 33, 4),
    ],
)
@torch.no_grad()
def test_both_streams_are_what_their_definition_says(model, kernel, length, block, first):
    """The whole of the protocol at once: what a row sees, what has faded, where the start stands,
    that a front row writes nothing and nobody attends to it.
    """
    net = tiny(model, n_layers=2, conv_kernel=kernel)
    x0, xt = texts(length)
    (clean, noisy), = net.both_states(x0, xt, block, first)
    for row in range(2):
        wanted, wanted_noisy = by_definition(net, x0[row], xt[row], block, first)
        assert_same(clean[row].double(), wanted)
        assert_same(noisy[row].double(), wanted_noisy)


@pytest.mark.parametrize("model, kernel", KERNELS)
@torch.no_grad()
def test_the_clean_stream_is_causal(model, kernel):
    """A token is not seen by its own answer nor by an earlier one, and by each later one."""
    net = tiny(model, conv_kernel=kernel)
    x0, _ = texts(2 * CHUNK + 8)
    base = net.clean_states(x0)
    for i in (0, 1, 7, CHUNK - 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK + 7):
        change = moved(net.clean_states(other_tokens(x0, i)), base)
        assert (change[:i + 1] == 0).all(), "token i was seen before or at its own place"
        assert (change[i + 1:] > 0).all(), "a later answer does not know it"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block, first", [(40, 40), (40, 7), (16, 5), (4, 4), (4, 1), (1, 1)])
@torch.no_grad()
def test_the_clean_stream_does_not_know_the_blocks(model, block, first):
    """However noisy blocks cut the text, and whatever is in them."""
    net = tiny(model)
    x0, xt = texts(40)
    alone = net.clean_states(x0)
    for noisy in (xt, torch.full_like(xt, V), other_tokens(xt, 3)):
        (clean, _), = net.both_states(x0, noisy, block, first)
        assert_same(clean, alone)


@pytest.mark.parametrize("model, kernel", KERNELS)
@torch.no_grad()
def test_the_context_does_not_know_how_it_was_cut(model, kernel):
    """step() in one piece, token by token and in odd pieces: the same answers, those of training,
    and the same cache.
    """
    net = tiny(model, conv_kernel=kernel)
    x0, xt = texts(135)
    wanted = net.clean_states(x0)[:, 1:]                # each piece answers about the next token
    caches = []
    for cut in pieces(135):
        cache = net.new_cache(2, 135)
        assert cache.length == 1, "the start is read"
        answers = [net.step(part, cache) for part in x0.split(cut, dim=1)]
        assert_same(torch.cat(answers, dim=1)[:, :-1], wanted)
        assert cache.length == 136
        caches.append(cache)
    for cache in caches[1:]:
        assert_same_cache(cache, caches[0])
        assert_same(net.states(xt[:, :8], cache), net.states(xt[:, :8], caches[0]))


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_left_to_right_is_the_chain_of_single_steps(model):
    """The exact NLL in one pass, against a cache that reads one token after the other, with the
    first token's answer from the start alone.
    """
    net = tiny(model)
    x0, _ = texts(23, batch=3)
    cache = net.new_cache(3, 23)
    start = by_definition(net, x0[0])[0][0].float()     # the same for all rows
    states = start.expand(3, -1)
    nats = torch.zeros(3)
    for i in range(23):
        nats -= net.logits(states).log_softmax(-1).gather(1, x0[:, i:i + 1])[:, 0]
        states = net.step(x0[:, i:i + 1], cache)[:, 0]
    found = masking.row_bounds(net, x0, 1)
    torch.testing.assert_close(found[:, 0].float(), nats / 23, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[:, 1].float(), nats, atol=1e-5, rtol=1e-5)
    assert (found[:, 2] == 23).all()
    assert torch.equal(found, masking.row_bounds(net, x0, 1, seed=7)), "no mask is drawn"


@pytest.mark.parametrize("model, kernel", KERNELS)
@pytest.mark.parametrize("first", [1, 5, 8])
@torch.no_grad()
def test_block_rule(model, kernel, first):
    """A noisy block sees the clean text before it and itself, on both sides; no clean text at its
    place or behind, no other noisy block.
    """
    net = tiny(model, conv_kernel=kernel)
    x0, xt = texts(40)
    base = net.block_states(xt, x0, 8, first)
    for lo, hi in edges(40, 8, first):
        for position in {lo, (lo + hi) // 2, hi - 1}:
            change = moved(net.block_states(xt, other_tokens(x0, position), 8, first), base)
            assert (change[:hi] == 0).all(), "clean text of this block, or behind, was seen"
            assert (change[hi:] > 0).all(), "a later block does not know the clean text before it"
            change = moved(net.block_states(other_tokens(xt, position), x0, 8, first), base)
            assert (change[lo:hi] > 0).all(), "its own block does not see it everywhere"
            assert (change[:lo] == 0).all() and (change[hi:] == 0).all(), "another block saw it"


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block, first", [(24, 24), (999, 999), (8, 8), (8, 3), (5, 1), (1, 1)])
@torch.no_grad()
def test_a_stream_asked_alone_gives_the_same_answers(model, block, first):
    net = tiny(model)
    x0, xt = texts(24)
    (clean, noisy), = net.both_states(x0, xt, block, first)
    (none, alone), = net.both_states(x0, xt, block, first, with_clean=False)
    assert none is None
    assert_same(alone, noisy)
    assert_same(net.block_states(xt, x0, block, first), noisy)
    (read, none), = net.both_states(x0)
    assert none is None
    assert_same(read, clean)


@pytest.mark.parametrize("model, kernel", KERNELS)
@torch.no_grad()
def test_padding_of_a_short_block_changes_nothing(model, kernel):
    """A short first block is a text of its own that ends there, with the start right before its
    first token; a short last block is the same in a text whose blocks fit.
    """
    net = tiny(model, conv_kernel=kernel)
    x0, xt = texts(29)
    for first in range(1, 9):
        found = net.block_states(xt, x0, 8, first)
        assert_same(found[:, :first], net.block_states(xt[:, :first], x0[:, :first], first))
        shifted_back = net.block_states(xt[:, :first + 8], x0[:, :first + 8], 8, first)
        assert_same(found[:, :first + 8], shifted_back)
        (clean, _), = net.both_states(x0, xt, 8, first)
        assert_same(clean, net.clean_states(x0))
    whole = net.block_states(xt, x0, 8)
    for last in (1, 3, 7):  # its own tokens are the only ones behind the others
        cut = net.block_states(xt[:, :8 + last], x0[:, :8 + last], 8)
        assert_same(cut[:, :8], whole[:, :8])
        cache = net.new_cache(2, 29)
        net.step(x0[:, :8], cache)
        assert_same(cut[:, 8:], net.states(xt[:, 8:8 + last], cache))


# ---- the frozen cache ----------------------------------------------------------------------------

@pytest.mark.parametrize("model, kernel", KERNELS)
@pytest.mark.parametrize("block", [1, 2, 3, 7, 16, 33, 64])
@pytest.mark.parametrize("length", [17, 64, 71])
@torch.no_grad()
def test_cache_is_exact(model, kernel, block, length):
    """The most important test: logits decoded with the frozen cache equal logits of the training
    form.
    """
    net = tiny(model, conv_kernel=kernel)
    x0, xt = texts(length)
    for first in firsts(length, block):
        whole = net.logits(net.block_states(xt, x0, block, first))[..., 1:V]
        cache = net.new_cache(2, length)
        for lo, hi in edges(length, block, first):
            assert_same(net(xt[:, lo:hi], cache)[..., 1:V], whole[:, lo:hi])
            net.step(x0[:, lo:hi], cache)
        assert cache.length == length + 1


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_whole_row_stands_behind_the_start_alone(model):
    """One block of the whole sequence: plain bidirectional diffusion, whatever clean text is
    given.
    """
    net = tiny(model)
    x0, xt = texts(24)
    alone = net.states(xt, net.new_cache(2, 24))
    for block in (24, 999):
        assert_same(net.block_states(xt, x0, block), alone)
        assert_same(net.block_states(xt, x0.flip(1), block), alone)
    assert_same(net(xt)[..., 1:V], net.logits(alone)[..., 1:V])


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_a_shorter_first_block_counts_whatever_the_block(model):
    """Blocks as long as the text, or longer, behind a first one of 5 tokens: two blocks, as
    decoding with the cache has them.
    """
    net = tiny(model)
    x0, xt = texts(24)
    cache = net.new_cache(2, 24)
    before = net.states(xt[:, :5], cache)
    net.step(x0[:, :5], cache)
    wanted = torch.cat((before, net.states(xt[:, 5:], cache)), dim=1)
    for block in (19, 23, 24, 25, 999):
        assert_same(net.block_states(xt, x0, block, 5), wanted)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_asking_leaves_the_cache_as_it_was(model):
    net = tiny(model)
    x0, xt = texts(24)
    cache, other = net.new_cache(2, 24), net.new_cache(2, 24)
    for one in (cache, other):
        net.step(x0[:, :9], one)
    before = net.states(xt[:, 9:], cache)
    assert torch.equal(net.states(xt[:, 9:], cache), before)
    assert_same_cache(cache, other)


@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size, block", [(1, 1), (1, 5), (2, 2), (5, 3), (16, 16), (17, 4)])
@torch.no_grad()
def test_step_and_states_is_step_then_states(kernel, size, block):
    """One pass for a finished block and the first forward of the next: same states, same cache,
    behind the start alone too.
    """
    net = tiny("primary", conv_kernel=kernel)
    one, two = net.new_cache(2), net.new_cache(2)
    x0, xt = texts(4 * (size + block))
    for i in range(4):
        finished = x0[:, i * size:(i + 1) * size]
        asked = xt[:, i * block:(i + 1) * block]
        net.step(finished, one)
        wanted = net.states(asked, one)
        assert_same(net.step_and_states(finished, asked, two), wanted)
        assert_same_cache(two, one)


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_selected_rows_go_on_as_if_they_were_alone(model):
    net = tiny(model)
    x0, xt = texts(24, batch=4)
    cache = net.new_cache(4, 24)
    net.step(x0[:, :9], cache)
    rows = torch.tensor([3, 1])
    cache.select(rows)
    alone = net.new_cache(2, 24)
    net.step(x0[rows, :9], alone)
    assert_same_cache(cache, alone)
    assert_same(net.states(xt[rows, 9:], cache), net.states(xt[rows, 9:], alone))
    assert_same(net.step(x0[rows, 9:], cache), net.step(x0[rows, 9:], alone))
    assert_same_cache(cache, alone)


@torch.no_grad()
def test_two_contexts_beside_each_other_answer_as_each_alone():
    """Of different lengths: guidance asks behind the text and behind nothing in one batch."""
    net = tiny("primary")
    x0, xt = texts(24)
    cache, bare = net.new_cache(2), net.new_cache(2)
    net.step(x0[:, :9], cache)
    both = cache.beside(bare)
    found = net.states(xt[:, 9:].repeat(2, 1), both)
    assert_same(found[:2], net.states(xt[:, 9:], cache))
    assert_same(found[2:], net.states(xt[:, 9:], bare))
    assert len(cache.front) == 2, "the first one is as it was"


@torch.no_grad()
def test_cache_sizes():
    """EcoHybrid's cache does not grow with the context; the transformer's is preallocated; nbytes
    is the tensors' size.
    """
    eco, backup = tiny("primary"), tiny("backup")
    for layer in eco.layers:
        layer.decay.fill_(3.0)                          # a slot forgets within 20 tokens
    cache = eco.new_cache(1)
    sizes = set()
    norms = []
    for _ in range(64):
        eco.step(texts(16, batch=1)[0], cache)
        sizes.add(cache.nbytes)
        norms.append(float(cache.num.norm()))
    layers, heads, slots, width, head_size, halo = 3, 4, 4, 32, 4, 3
    assert sizes == {4 * layers * (heads * slots * head_size + halo * width)}
    assert cache.length == 1025
    assert max(norms) < 4 * min(norms)                  # bounded over 64 blocks

    # room for the start and so many tokens
    small, large = backup.new_cache(1, 10), backup.new_cache(1, 100)
    assert small.nbytes == 2 * layers * width * 11 * 4
    assert large.nbytes == 2 * layers * width * 101 * 4


@torch.no_grad()
def test_a_full_cache_slides():
    """Behind a full room the oldest rows leave: each row sees the last nine, itself included, at
    the positions where they stood.
    """
    net = tiny("backup", n_layers=2)
    x0, _ = texts(30, batch=1)
    cache = net.new_cache(1, 8)
    answers = [net.step(x0[:, i:i + 1], cache) for i in range(30)]
    assert (cache.held, cache.length) == (9, 31)
    read = torch.cat((x0, x0[:, :1]), dim=1)            # one more, so that the last is answered
    wanted, _ = by_definition(net, read[0], window=9)
    assert_same(torch.cat(answers, dim=1)[0].double(), wanted[1:])
    unlimited, _ = by_definition(net, read[0])
    assert (wanted - unlimited).abs().max() > 1e-2

    # in a larger piece all but as many as fit leave before it
    net.step(x0[:, :6], cache)
    assert (cache.held, cache.length) == (9, 37)
    with pytest.raises(ValueError, match="9 positions, 10"):
        net.step(x0[:, :10], cache)


# ---- the primary's convolution and memory --------------------------------------------------------

@pytest.mark.parametrize("reach", [1, 2, 3])
@torch.no_grad()
def test_the_clean_convolution_is_the_centred_one_without_what_follows(reach):
    conv = LocalConv(8, 2 * reach + 1)
    torch.nn.init.normal_(conv.weight)
    x = torch.randn(5, reach + 9, 8)                    # r neighbours, then nine rows
    for i in range(9):
        alone = conv(x[:, reach + i:reach + i + 1], x[:, i:reach + i])
        assert_same(conv.causal(x)[:, i], alone[:, 0])
    behind = conv(x[:, reach:], x[:, :reach])
    assert_same(behind, conv(x)[:, reach:])


def values(T, heads=4, E=4, M=4, batch=2, seed=0):
    """What tokens ask, write and score -> q, v (B, T, H*E), s (B, T, H*M), a state."""
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, T, heads * E, generator=g)
    v = torch.randn(batch, T, heads * E, generator=g)
    s = 3 * torch.randn(batch, T, heads * M, generator=g)
    num = torch.randn(batch, heads, M, E, generator=g)
    return q, v, s, num


def one_by_one(layer, q, v, s, num):
    """The reference that the layer keeps; no state is one that holds nothing."""
    if num is None:
        num = q.new_zeros(len(q), layer.H, layer.M, q.shape[-1] // layer.H, dtype=torch.float32)
    return layer.read_one_by_one(q, v, s, num)


LENGTHS = [1, 2, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 40, 2 * CHUNK + 5, 300]


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("T", LENGTHS)
def test_a_causal_read_is_that_of_one_token_after_another(T, behind):
    """read_causal, which makes no token's state: answers, the state behind them, and the gradient
    of all that enters.
    """
    layer = tiny("primary").layers[0]
    q, v, s, num = values(T)
    used = [q, v, s, layer.decay, layer.slot_key]
    if behind:
        used.append(num)
    else:
        num = None
    for x in used:
        x.requires_grad_()
    found, after = layer.read_causal(q, v, s, num)
    wanted, wanted_after = one_by_one(layer, q, v, s, num)
    assert_same(found, wanted)
    assert_same(after, wanted_after)

    weights = torch.randn_like(found), torch.randn_like(after)
    gradients = []
    for answers, state in ((found, after), (wanted, wanted_after)):
        total = (answers * weights[0]).sum() + (state * weights[1]).sum()
        gradients.append(torch.autograd.grad(total, used, allow_unused=True))
    for got, expected in zip(*gradients, strict=True):
        if expected is None or got is None:  # a single token has nothing that could have faded
            assert T == 1 and not behind
            continue
        assert torch.isfinite(got).all()
        torch.testing.assert_close(
            got, expected, atol=1e-4 * float(expected.abs().max()) + 1e-7, rtol=1e-3
        )


@pytest.mark.parametrize("heads, E", [(4, 1), (2, 2), (4, 3), (4, 4), (4, 8)])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("T", [17, CHUNK + 8])
def test_slim_heads_read_the_same(heads, E, T, seed):
    """Sums of one or two numbers nearly cancel now and then: then |U|^2 is all rounding."""
    layer = tiny("primary", n_heads=heads, d_mem=heads * E).layers[0]
    q, v, s, num = values(T, heads, E, seed=seed)
    for x in (q, v, s):
        x.requires_grad_()
    for state in (num, None):
        found, after = layer.read_causal(q, v, s, state)
        wanted, wanted_after = one_by_one(layer, q, v, s, state)
        assert_same(found, wanted)
        assert_same(after, wanted_after)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(found.sum(), (q, v, s)))


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("T", LENGTHS)
@torch.no_grad()
def test_a_causal_read_in_bf16(T, behind):
    layer = tiny("primary").layers[0]
    q, v, s, num = values(T)
    num = num if behind else None
    low, after = layer.read_causal(q.bfloat16(), v.bfloat16(), s.bfloat16(), num)
    wanted, wanted_after = one_by_one(layer, q, v, s, num)
    error = (low.float() - wanted).square().mean().sqrt()
    assert error < 0.03 * wanted.square().mean().sqrt()
    error = (after - wanted_after).square().mean().sqrt()
    assert after.dtype == torch.float32
    assert error < 0.03 * wanted_after.square().mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [-5.0, 0.0, 8.0])
@pytest.mark.parametrize("kind", ["cancelling", "nothing", "large", "sharp"])
def test_hard_values_stay_finite(dtype, decay, kind):
    """Slots that forget at once and slots that forget nothing, for values that cancel exactly, that
    are zero or large, and for scores at both ends of their range.
    """
    layer = tiny("primary").layers[0]
    torch.nn.init.constant_(layer.decay, decay)
    q, v, s, num = values(2 * CHUNK + 6)
    if kind == "cancelling":
        v[:, 1::2] = -v[:, ::2]
        s = torch.zeros_like(s)
    elif kind == "nothing":
        v = torch.zeros_like(v)
    elif kind == "large":
        v = 300 * v
    else:
        s = 100 * s.sign()
    used = [x.to(dtype).requires_grad_() for x in (q, v, s)] + [layer.decay, layer.slot_key]
    for state in (None, num):
        answers, after = layer.read_causal(*used[:3], state)
        assert torch.isfinite(answers).all() and torch.isfinite(after).all()
        gradients = torch.autograd.grad(answers.float().square().sum() + after.sum(), used)
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("decay", [-5.0, -1.0, 0.0, 8.0])
@pytest.mark.parametrize("size, score", [(1.0, 1.0), (0.1, 10.0), (100.0, 10.0), (1e-3, 1.0)])
@torch.no_grad()
def test_hard_values_are_read_the_same(decay, size, score):
    """Inside a chunk a token's weight grows by exp(1) a token at most; small values with the
    smallest weights are no nothing there.
    """
    layer = tiny("primary").layers[0]
    layer.decay.fill_(decay)
    q, v, s, num = values(2 * CHUNK + 6)
    for state in (size * num, None):
        found, after = layer.read_causal(q, size * v, score * s, state)
        wanted, wanted_after = one_by_one(layer, q, size * v, score * s, state)
        assert_same(found, wanted)
        assert_same(after, wanted_after)


@pytest.mark.parametrize("T", [1, 17, CHUNK + 8])
@torch.no_grad()
def test_float16_is_summed_in_float32(T):
    """Weights that grow by exp(16) inside a chunk leave float16's range, float32's they do not.
    """
    layer = tiny("primary").layers[0]
    layer.decay.fill_(-5.0)
    q, v, s, num = values(T)
    found, after = layer.read_causal(q.half(), v.half(), s.half(), num)
    wanted, wanted_after = one_by_one(layer, q.half().float(), v.half().float(), s.half(), num)
    torch.testing.assert_close(found.float(), wanted, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(after, wanted_after, atol=1e-2, rtol=1e-2)
    with torch.autocast("cpu", torch.float16):
        again, _ = layer.read_causal(q.half(), v.half(), s.half(), num)
    torch.testing.assert_close(again.float(), wanted, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("length, block, first", [(24, 24, 24), (24, 24, 5), (23, 4, 4), (23, 4, 1),
                                                  (23, 4, 3), (9, 1, 1), (80, 3, 2)])
@torch.no_grad()
def test_the_state_at_an_opening_is_faded_token_by_token(length, block, first):
    """states_at against sums over all rows up to each opening; some slots forget within a token, so
    that a block which enters as a bag would show.
    """
    layer = tiny("primary").layers[0]
    layer.decay.copy_(torch.tensor([-5.0, -1.0, 1.0, 8.0]))
    rows = Rows.of_training(2, length, block, first, True, 2, torch.device("cpu"))
    _, v, s, _ = values(length)
    found = layer.states_at(v, s, rows)                                        # (B, n, H, M, E)
    openings = [lo for lo, _ in edges(length, block, first)]
    assert rows.opens.tolist() == openings
    rate = torch.exp(-layer.decay).clamp(max=FASTEST)                          # (H, M)
    w = torch.exp(8 * torch.tanh(s / 8) - 6).unflatten(-1, (4, 4))             # (B, T, H, M)
    v = v.unflatten(-1, (4, 4))                                                # (B, T, H, E)
    for number, p in enumerate(openings):
        wanted = 0
        for j in range(p + 1):
            keep = torch.exp(-(p - j) * rate)
            wanted = wanted + (keep * w[:, j]).unsqueeze(-1) * v[:, j].unsqueeze(-2)
        assert_same(found[:, number], wanted)


@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 40, 64, 300])
@torch.no_grad()
def test_prefixes_in_groups_are_prefixes(n):
    """The sums over earlier groups, however many there are, against a loop."""
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


@torch.no_grad()
def test_sums_stay_within_float16():
    """4,096 tokens that all write with the largest weight: finite, where e^8 each would not be
    (--amp_dtype fp16).
    """
    layer = tiny("primary").layers[0]
    total = layer.write(torch.ones(1, 4096, 16).half(), torch.full((1, 4096, 16), 99.0).half())
    assert torch.isfinite(total).all() and total.max() > 1e4


@pytest.mark.parametrize("d_mem", [2, 4, 6])
@torch.no_grad()
def test_left_to_right_is_exact_however_slim_a_head_is(d_mem):
    """Heads of one, two and three numbers: training's clean stream gives what decoding with its
    cache gives.
    """
    net = tiny_model("primary", shape=TINIER, memory_slots=16, d_mem=d_mem)
    for layer in net.layers:
        layer.in_proj.weight.mul_(2)                    # sums that nearly cancel are found sooner
    x0 = torch.randint(4, V, (8, 96), generator=torch.Generator().manual_seed(d_mem))
    trained = net.logits(net.clean_states(x0))[..., 4:-1]
    cache = net.new_cache(8)
    for i in range(95):
        decoded = net.logits(net.step(x0[:, i:i + 1], cache))[:, 0, 4:-1]
        assert (trained[:, i + 1] - decoded).abs().max() < 5e-6, i


# ---- the network ---------------------------------------------------------------------------------

@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_order_enters_the_denoiser(model):
    """Swap two distant inputs: the outputs are not just swapped, with every other token hidden too.
    """
    net = tiny(model)

    def states_of(**tokens):
        xt = torch.full((1, 30), V)
        for place, token in tokens.items():
            xt[0, int(place[1:])] = token
        return net.block_states(xt, xt, 30)

    there, swapped = states_of(_5=7, _20=9), states_of(_5=9, _20=7)
    back = swapped.clone()
    back[0, 5], back[0, 20] = swapped[0, 20], swapped[0, 5]
    assert (there - back).abs().max() > 1e-3
    near, far = states_of(_5=7, _6=9), states_of(_5=7, _7=9)
    assert (near[0, 4] - far[0, 4]).abs().max() > 1e-4


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block", [33, 8, 1])
def test_every_parameter_gets_a_gradient_in_one_step(model, block):
    """In a step of the training loss, whatever it asks; in whole rows a slot has nothing that it
    could forget.
    """
    net = tiny(model).train()
    x0, _ = texts(33)
    masking.denoising_loss(net, x0, sample_of(block, 33), "masked_mean").loss.backward()
    dead = []
    for name, p in net.named_parameters():
        if p.grad is None or not p.grad.any():
            dead.append(name)
    forgets_nothing = model == "primary" and block == 33
    assert dead == [f"layers.{i}.decay" for i in range(3) if forgets_nothing]


def sample_of(block, length, rows=2, first=None):
    """What a training step of this block rule asks."""
    if block == 1:
        return masking.left_to_right(rows, length)
    masks = masking.corrupt(config.TrainArgs(), 1, 0, rows, length, block, first)
    if block < length:
        return masks._replace(clean_share=0.5)
    return masks


def test_a_parameter_without_a_rule_is_an_error():
    net = tiny("primary")
    net.stray = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="stray"):
        initialise(net)


@pytest.mark.parametrize("model", MODELS)
def test_parameter_count_is_the_formula(model):
    other = dict(
        d_model=48, n_heads=6, d_ff=100, n_layers=2, memory_slots=7, conv_kernel=3, d_mem=12
    )
    for changes in ({}, other, dict(exits=True), dict(causal=True)):
        net = tiny(model, **changes)
        assert sum(p.numel() for p in net.parameters()) == model_config.count_params(net.cfg)


@torch.no_grad()
def test_rotary_table_is_float32_and_exact():
    """8,192 positions give 8,192 different rows, whatever the model is cast to."""
    cos, sin = rotary_table(torch.arange(8192), 16)
    assert cos.dtype == torch.float32
    assert len(torch.unique(torch.cat((cos, sin), 1), dim=0)) == 8192
    net = tiny("backup").to(torch.bfloat16)
    found = net.table(net.positions(5000, 3))[0]
    assert found.dtype == torch.float32
    assert torch.equal(found, rotary_table(torch.arange(5000, 5003), 8)[0])


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_mask_and_pad_are_never_an_answer(model):
    net = tiny(model)
    net.head.weight[[0, V]] += 100
    x0, xt = texts(12)
    for z in (net(xt), net.logits(net.clean_states(x0)), net.logits(net.block_states(xt, x0, 4))):
        assert z.dtype == torch.float32
        assert torch.isneginf(z[..., [0, V]]).all()
        assert torch.isfinite(z[..., 1:V]).all()


@pytest.mark.parametrize("model", MODELS)
@torch.no_grad()
def test_rows_of_a_batch_do_not_mix(model):
    net = tiny(model)
    x0, xt = texts(24, batch=3)
    (clean, noisy), = net.both_states(x0, xt, 8, 3)
    for row in range(3):
        part = slice(row, row + 1)
        (clean_alone, noisy_alone), = net.both_states(x0[part], xt[part], 8, 3)
        assert_same(clean[part], clean_alone)
        assert_same(noisy[part], noisy_alone)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("block", [8, 99])
def test_early_exits_see_what_decoding_at_that_depth_sees(model, block):
    """Training's early states are the cached block's at that depth, and every exit's norm gets its
    gradient, from both streams.
    """
    torch.manual_seed(0)
    net = build_model(tiny_config(model, n_layers=3, exits=True))
    with torch.no_grad():
        net.exits.early_norm.add_(torch.randn_like(net.exits.early_norm))
    x0, xt = texts(24)
    lo, hi = (0, 24) if block > 24 else (8, 16)
    cache = net.new_cache(2, 24)
    if lo:
        net.step(x0[:, :lo], cache)
    (plain_clean, plain), = net.both_states(x0, xt, block)
    for depth in (1, 2):
        last, early = net.both_states(x0, xt, block, early=depth)
        assert_same(last[0], plain_clean)
        assert_same(last[1], plain)
        assert_same(net.states(xt[:, lo:hi], cache, depth), early[1][:, lo:hi])
        shorter = build_model(tiny_config(model, n_layers=depth))
        known = {name: p for name, p in net.state_dict().items() if "early_norm" not in name}
        known["exits.final_norm.weight"] = net.exits.early_norm[depth - 1]
        shorter.load_state_dict(known, strict=False)
        assert_same(early[0], shorter.clean_states(x0))
        for part in early:
            net.zero_grad()
            part.square().sum().backward(retain_graph=True)
            assert net.exits.early_norm.grad[depth - 1].abs().sum() > 0


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
        (clean, noisy), = net.both_states(x0, xt, 4, first)
        (clean.square().mean() + noisy.square().mean()).backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


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
    """Loss, gradients and the bytes that autograd keeps for the backward pass, parameters left out.
    """
    torch.manual_seed(5)  # dropout
    net.recompute = recompute
    known = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}
    first = min(block, 3) if block < 48 else None

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = t  # held, so that its place is not given to another
        return t

    early = {"early": 1, "early_weight": 0.5} if net.cfg.exits else {}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", dtype, enabled=dtype is not None),
    ):
        out = masking.denoising_loss(
            net, texts(48)[0], sample_of(block, 48, first=first), "elbo", **early
        )
    net.zero_grad()
    out.loss.backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return float(out.loss.detach()), grads, sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("model, exits", [("primary", True), ("backup", False)])
@pytest.mark.parametrize("block", [48, 8, 1])
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
    x0, xt = texts(48)
    with torch.no_grad():
        for states in net.both_states(x0, xt, block)[0]:
            assert not states.requires_grad, "an evaluation has nothing to recompute"


@pytest.mark.parametrize("model", ["primary", "backup"])
@pytest.mark.parametrize("call", [1, 2])
def test_an_error_inside_a_recomputed_layer_comes_out(model, call):
    """Of the forward pass (1) or when the layer is computed again (2): the error itself, out of
    memory too, and each layer ran once in each pass, not again by another way.
    """
    net = tiny(model, n_layers=3, memory_slots=2).train()
    inside = net.layers[1].norm if model == "primary" else net.layers[1].attn_norm
    real, calls = inside.forward, []

    def failing(x):
        calls.append(1)
        if len(calls) == call:
            raise torch.OutOfMemoryError("raised inside layer 2")
        return real(x)
    inside.forward = failing
    with pytest.raises(torch.OutOfMemoryError, match="raised inside layer 2"):
        one_step(net, 48, True)
    assert len(calls) == call
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in net.parameters())

    # and the same step can be done afterwards, with the same result
    del inside.forward
    net.zero_grad()
    loss, grads, _ = one_step(net, 48, True)
    again, plain, _ = one_step(tiny(model, n_layers=3, memory_slots=2).train(), 48, False)
    assert loss == again
    for name in plain:
        torch.testing.assert_close(grads[name], plain[name], rtol=0, atol=1e-6)


# clean rows, and noisy blocks with a front row each; the primary's blocks are all of one size
ROWS = {
    ("primary", 48): 1 + 49,
    ("primary", 8): 48 + 7 * 9,
    ("primary", 1): 48,
    ("backup", 48): 1 + 49,
    ("backup", 8): 48 + 48 + 7,
    ("backup", 1): 48,
}


@pytest.mark.parametrize("model, block", ROWS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recomputed_layers_keep_their_input_alone(model, block, dtype):
    """What each further layer keeps for the backward pass: its input, 4 bytes per row and unit of
    width.
    """
    extra = {}
    for recompute in (False, True):
        small, large = (
            one_step(tiny(model, n_layers=n, memory_slots=2), block, recompute, dtype)[2]
            for n in (2, 4)
        )
        extra[recompute] = (large - small) / 2 / (2 * 32)                        # sequences x D
    assert extra[True] == 4 * ROWS[model, block]
    assert extra[True] < extra[False] / 6
