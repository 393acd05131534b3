"""The likelihood of one set of weights by public engines and by ours: do they agree, at what cost?

    python benchmarks/likelihood_peers.py --peers DIR
    python benchmarks/likelihood_peers.py --peers DIR --ckpt checkpoints/eco_hybrid_hi

The first takes tiny models and enumerates every mask; the second adds trained weights on held-out
text. The cost is the number of forwards.

    aria     estimators.bound (exact count, stratified), and with t iid; chain_rule
    llada    LLaDA's get_log_likelihood.py: exact count, a row's counts evenly spaced
    radd     RADD's losses.py: k_DCE (exact count, iid), lambda_DCE (rate stratified), t_DCE and
             t_DSE (time stratified, from 1e-3 on, log-linear noise); ar_forward, which leaves
             nothing to chance (and runs on 1,024 tokens only), beside chain_rule

The peers' files run unchanged, from --peers (benchmarks/peers.py says what lies where); an engine
that is not there is skipped, with none of them the exit status is 3. Those engines know no blocks,
so a row is one block here: BOS and T - 1 tokens. BOS is given, all else counts: to LLaDA BOS is the
prompt and the rest the answer; RADD, which masks all that it is shown, is shown the T - 1 tokens
only, and its adapter puts BOS in front of what it asks the model. The mask's and the pad's logits
stay -inf, so all engines share the probability among the same tokens.

Every engine scores each row from --copies forwards, --repeats times, engines in turn; the peers one
row at a time, as LLaDA does it (lambda_DCE ties a rate to a place in the batch: of several rows,
each would be scored at its own rates only). A standard error is that of the masks, the text being
fixed: from the variance over repeats of each row. Two engines agree if they differ by at most
2 sqrt(se^2 + se^2); beside it the mean difference of a row in standard errors over rows. Prints
tables and one JSON document as the last line.
"""
import itertools
import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

from harness import arguments  # first: it puts the repository on the path

import masking
import config
import model_config
from benchmarks import peers
from common import machine
from evaluation import estimators
from model import build_model

BOS, BATCH = 2, 16            # BATCH: rows at once, LLaDA's default and everybody's here
RADD_LOSSES = ("k_DCE", "lambda_DCE", "t_DCE", "t_DSE")


# --------------------------------------------------------------------------------------------------
# our model, as each calls it

class Counted:
    """Our model and how many rows it was asked for."""

    def __init__(self, net):
        self.net, self.cfg, self.head, self.rows = net, net.cfg, net.head, 0
        self.logits = net.logits        # (..., D) -> (..., V)

    def block_states(self, xt, x0, block, first):
        self.rows += len(xt)
        return self.net.block_states(xt, x0, block, first)

    def answers(self, ids):
        # (B, T, V)
        return self.logits(self.block_states(ids, ids, ids.shape[1], ids.shape[1]))


class ForLLaDA:
    """ids (B, T) -> an object with .logits."""
    device = torch.device("cpu")

    def __init__(self, net):
        self.net = net

    def __call__(self, ids):
        return SimpleNamespace(logits=self.net.answers(ids))


class ForRADD(torch.nn.Module):
    """ids (B, T - 1) -> their log probabilities, given BOS in front of them. The mask is the last
    of V ids, as RADD has it.
    """

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, ids):
        ids = torch.nn.functional.pad(ids, (1, 0), value=BOS)
        return self.net.answers(ids)[:, 1:].log_softmax(-1)


# --------------------------------------------------------------------------------------------------
# engines

def as_piece(rows):
    return estimators.Piece(rows, 1, torch.arange(len(rows)))


def aria(net):
    """{name: function(rows (n, T), forwards of each row, seed) -> nats of each row (n,)}; so do the
    next two.
    """
    def exact_count(rows, copies, seed):
        return estimators.bound(net, [as_piece(rows)], rows.shape[1], copies, seed, BATCH)[0]

    def iid(rows, copies, seed):
        piece, total, g = as_piece(rows), 0.0, masking.step_generator(seed, 0, "iid")
        layout = estimators.lay_out(piece, rows.shape[1])
        for _ in range(copies):
            (mask, weight, _), = estimators.independent([piece], [layout], g, "linear")
            total = total + (
                estimators.surprise(net, rows, mask, layout, None, BATCH) * weight[:, layout.owner]
            ).sum(1)
        return total / copies
    return {"aria exact count": exact_count, "aria t iid": iid}


def llada(folder, net, batch=BATCH):
    path = peers.find(folder, "LLaDA/get_log_likelihood.py")
    with peers.stand_ins({"transformers": dict(AutoTokenizer=None, AutoModel=None)}):
        peer = peers.load(path, "llada_likelihood")

    def run(rows, copies, seed):
        torch.manual_seed(seed)
        return torch.tensor(
            [
                -peer.get_log_likelihood(
                    ForLLaDA(net),
                    row[:1],
                    row[1:],
                    mc_num=copies,
                    mask_id=net.cfg.mask_id,
                    batch_size=min(batch, copies),
                )
                for row in rows
            ],
            dtype=torch.float64,
        )

    return {"LLaDA get_log_likelihood": run}


def radd_loss(folder, net, kind):
    """RADD's loss: function(model, ids (B, L)) -> nats (B,)."""
    path = peers.find(folder, "RADD/losses.py")
    # losses.py imports it by this name
    noise = peers.load(peers.find(folder, "RADD/noise_lib.py"), "noise_lib")
    return peers.load(path, "radd_losses").get_loss_fn(
        noise.LogLinearNoise(), net.cfg.rows, train=False, loss_type=kind
    )


def radd(folder, net):
    def runner(loss):
        def run(rows, copies, seed):
            torch.manual_seed(seed)
            return torch.stack(
                [loss(ForRADD(net), row[1:].expand(copies, -1)).double().mean() for row in rows]
            )

        return run
    return {f"RADD {kind}": runner(radd_loss(folder, net, kind)) for kind in RADD_LOSSES}


def engines(folder, net):
    """Ours and those that are there."""
    return {
        **aria(net),
        **peers.collect(
            [("llada", lambda: llada(folder, net)), ("radd", lambda: radd(folder, net))]
        ),
    }


# --------------------------------------------------------------------------------------------------
# measuring

@torch.no_grad()
def measure(found, net, rows, copies, repeats, seed=0, tell=False):
    """-> [{"name", "nats" per token, "se", "variance" of a row's estimate, "forwards", "rows": per
    row}], engines in turn.
    """
    values, used = {name: [] for name in found}, Counter()
    for turn in range(repeats):
        for number, (name, engine) in enumerate(found.items()):
            before = net.rows
            # (n,)
            values[name].append(
                engine(rows, copies, 10**6 * seed + 1000 * turn + number).double()
                / (rows.shape[1] - 1)
            )
            used[name] += net.rows - before
        if tell:
            print(
                f"turn {turn + 1}: "
                + ", ".join(f"{name} {float(v[-1].mean()):.4f}" for name, v in values.items()),
                flush=True,
            )
    out = []
    for name, v in values.items():
        v = torch.stack(v)                                                         # (repeats, n)
        variance = v.var(0)  # (n,) of each row's masks
        out.append(
            {
                "name": name,
                "nats": float(v.mean()),
                "se": float(variance.sum().div(repeats).sqrt() / v.shape[1]),
                "variance": float(variance.mean()),
                "forwards": used[name],
                "rows": v.mean(0).tolist(),
            }
        )
    return out


def compare(measured):
    """Every two engines: their gap, what it may be, and the same paired over rows."""
    pairs = []
    for a, b in itertools.combinations(measured, 2):
        gap, allowed = a["nats"] - b["nats"], 2 * math.hypot(a["se"], b["se"])
        by_row = torch.tensor(a["rows"]) - torch.tensor(b["rows"])
        error = float(by_row.std()) / math.sqrt(len(by_row)) if len(by_row) > 1 else 0.0
        pairs.append(
            {
                "a": a["name"],
                "b": b["name"],
                "gap": gap,
                "allowed": allowed,
                "inside": abs(gap) <= allowed,
                "paired": gap / error if error else None,
            }
        )
    return pairs


def report(measured, pairs):
    iid = next((m["variance"] for m in measured if m["name"] == "aria t iid"), math.nan)
    against = {p["b"]: p for p in pairs if p["a"] == measured[0]["name"]}
    print(
        "engine                             nats/token  forwards  row variance  t iid is      gap  "
        "allowed  paired"
    )
    for m in measured:
        p, times = against.get(m["name"]), iid / m["variance"] if m["variance"] else math.inf
        print(
            f"{m['name']:26} {m['nats']:9.4f} ± {m['se']:.4f} {m['forwards']:9,} "
            f"{m['variance']:13.6f} {times:8.1f}x",
            end="",
        )
        print(
            ""
            if p is None
            else f" {-p['gap']:+8.4f} {p['allowed']:8.4f} {-(p['paired'] or 0):+7.1f}"
            + (" inside" if p["inside"] else " OUTSIDE")
        )
    print(
        f"{sum(p['inside'] for p in pairs)} of {len(pairs)} pairs of engines inside each other's "
        "interval"
    )


# --------------------------------------------------------------------------------------------------
# every mask of a tiny model

def tiny(kind, length):
    """Random, and far from uniform, so that it matters what is hidden -> (model, a row of BOS and
    `length` tokens).
    """
    torch.manual_seed(0)
    net = build_model(
        model_config.ModelConfig(
            model=kind,
            vocab_size=9,
            d_model=16,
            n_layers=2,
            n_heads=2,
            d_ff=24,
            memory_slots=3,
            conv_kernel=3,
        )
    )
    net.head.weight.data *= 40
    return net.eval(), torch.tensor([BOS, 5, 7, 4, 8, 5, 6][:length + 1])


@torch.no_grad()
def every_mask(net, row):
    """All sets of hidden tokens -> how many are hidden (M,), what they cost by hand (M,), what
    estimators.surprise says (M,).
    """
    L = len(row) - 1
    masked = torch.tensor(list(itertools.product((False, True), repeat=L))[1:])  # (M, L)
    masked = torch.nn.functional.pad(masked, (1, 0))                               # (M, T)
    x = row.expand(len(masked), -1)
    # (M, T, V)
    logp = net(torch.where(masked, net.cfg.mask_id, x)).double().log_softmax(-1)
    by_hand = -(logp.gather(-1, x[..., None])[..., 0] * masked).sum(1)
    ours = (
        estimators.surprise(net, x, masked, estimators.lay_out(as_piece(x), L + 1)).double().sum(1)
    )
    return masked.sum(1), by_hand, ours


def expected(count, cost, chance):
    """Mean over the counts 1..L, with their chances, of L times the mean CE of so many hidden
    tokens.
    """
    L = int(count.max())
    return sum(p * L / k * float(cost[count == k].mean()) for k, p in chance.items())


def llada_counts(L, batch):
    """The chance of each count under LLaDA's evenly spaced ones: a half is rounded to the even
    neighbour.
    """
    drawn = Counter(
        (round(k + j * L / batch) - 1) % L + 1 for k in range(1, L + 1) for j in range(batch)
    )
    return {k: n / (L * batch) for k, n in drawn.items()}


def radd_times(L, eps=1e-3, points=200_000):
    """How much each count weighs under RADD's times: t uniform in (eps, 1), weight 1 / t, hidden
    with chance (1 - eps) t.
    """
    t = eps + (1 - eps) * (torch.arange(points, dtype=torch.float64) + 0.5) / points
    rate = (1 - eps) * t
    return {
        k: float((k / L / t * math.comb(L, k) * rate**k * (1 - rate) ** (L - k)).mean())
        for k in range(1, L + 1)
    }


@torch.no_grad()
def brute_force(folder, kind, length, repeats, copies=16 * BATCH):
    """One row of a tiny model: each engine against the sum over all masks, and against what its own
    law should give.
    """
    net, row = tiny(kind, length)
    net = Counted(net)
    count, by_hand, ours = every_mask(net.net, row)
    fair = {k: 1 / length for k in range(1, length + 1)}
    exact = expected(count, by_hand, fair) / length
    difference = abs(expected(count, ours, fair) / length - exact)
    print(
        f"{kind}, {length} tokens, {len(count)} masks: the bound is {exact:.6f} nats/token, from "
        f"our code {difference:.1e} off"
    )
    laws = {"RADD t_DCE": radd_times(length), "RADD t_DSE": radd_times(length)}
    found = engines(folder, net)
    if "LLaDA get_log_likelihood" in found:
        name = "LLaDA, batch 4"
        found |= {name: llada(folder, net, batch=4)["LLaDA get_log_likelihood"]}
        laws |= {
            name: llada_counts(length, 4),
            "LLaDA get_log_likelihood": llada_counts(length, BATCH),
        }
    measured, out = measure(found, net, row[None], copies, repeats), []
    for m in measured:
        law = expected(count, by_hand, laws.get(m["name"], fair)) / length
        off, off_law = (m["nats"] - exact) / m["se"], (m["nats"] - law) / m["se"]
        out.append(
            {
                "model": kind,
                "length": length,
                "exact": exact,
                "law": law,
                "ours_off": difference,
                **m,
            }
        )
        print(
            f"{m['name']:26} {m['nats']:9.4f} ± {m['se']:.4f} {m['forwards']:9,} {off:+6.1f} "
            "standard errors off; "
            f"its own law says {law:.4f}, {off_law:+.1f} off",
            flush=True,
        )
    return out


@torch.no_grad()
def left_to_right(folder):
    """chain_rule of a tiny model beside RADD's ar_forward, both without chance -> nats/token of
    each.
    """
    net, _ = tiny("primary", 6)
    row = torch.randint(4, 9, (1, 1025), generator=torch.Generator().manual_seed(0))
    row[0, 0] = BOS
    theirs = radd_loss(folder, net, "ar_forward")(ForRADD(Counted(net)), row[:, 1:])
    out = {
        "aria": float(estimators.chain_rule(net, [as_piece(row)], 1025)) / 1024,
        "RADD": float(theirs) / 1024,
    }
    print(
        "left to right, 1,024 tokens: chain_rule {aria:.6f}, RADD ar_forward {RADD:.6f} "
        "nats/token".format(
            **out
        ),
        flush=True,
    )
    return out


@torch.no_grad()
def fixed_places(folder, calls=3000):
    """Two rows as one batch, as RADD's evaluation would have it, and the batch turned round: a mean
    should not care.
    """
    net, row = tiny("backup", 6)
    batch, out = torch.stack((row, torch.where(row == BOS, BOS, 6))), []
    for kind, order in itertools.product(RADD_LOSSES[:2], ([0, 1], [1, 0])):
        torch.manual_seed(0)
        loss, model = radd_loss(folder, net, kind), ForRADD(Counted(net))
        values = (
            torch.stack([loss(model, batch[order, 1:]).double().mean() for _ in range(calls)]) / 6
        )
        out.append(
            {
                "name": kind,
                "order": order,
                "nats": float(values.mean()),
                "se": float(values.std()) / math.sqrt(calls),
            }
        )
        print(
            "one batch of two rows, RADD {name}, order {order}: {nats:.4f} ± {se:.4f}".format(
                **out[-1]
            ),
            flush=True,
        )
    return out


def held_out_rows(ckpt, data_dir, count):
    """The beginnings of held-out documents that fill a row, chosen at random but always the same ->
    model, (n, T), its path.
    """
    import checkpoint
    from evaluation import held_out
    net, tokenizer, saved = checkpoint.load_model(ckpt, "cpu", config.check_saved)
    T = saved.config["args"]["seq_len"]
    texts = held_out.read_documents(
        SimpleNamespace(text=None), data_dir or saved.config["args"]["data_dir"], tokenizer, saved
    )
    texts = [ids[:T] for ids in texts if len(ids) >= T]
    assert texts and tokenizer.bos_id == BOS, f"no held-out document fills a row of {T} tokens"
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count]
    return net, torch.tensor([texts[i] for i in order]), str(saved.path)


def main(argv=None):
    p = arguments(__doc__)
    p.add_argument("--peers", default="peers", help="folder of the peers, see benchmarks/peers.py")
    p.add_argument(
        "--ckpt", help="trained weights; without them only the enumeration on tiny models"
    )
    p.add_argument("--data_dir", help="held-out text, if not the run's own")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--copies", type=int, default=16, help="forwards of one row's estimate")
    p.add_argument("--repeats", type=int, default=4)
    p.add_argument(
        "--tiny_repeats",
        type=int,
        default=40,
        help="of the enumerated tiny models; 0: leave them out",
    )
    p.add_argument(
        "--only", nargs="+", help="with --ckpt: engines with one of these words in their name"
    )
    p.add_argument("--seed", type=int, default=0, help="other masks of the same rows, with --ckpt")
    p.add_argument("--threads", type=int, default=0)
    args = p.parse_args(argv)
    machine.start(args.threads)
    there = [
        name
        for name in ("LLaDA/get_log_likelihood.py", "RADD/losses.py")
        if Path(args.peers, name).exists()
    ]
    if not there:
        print(
            f"no peer is in {args.peers}: it should hold LLaDA/get_log_likelihood.py or "
            "RADD/losses.py"
        )
        return 3
    kinds = ("primary", "backup") if args.tiny_repeats else ()
    result = {
        "brute_force": [
            r for kind in kinds for r in brute_force(args.peers, kind, 6, args.tiny_repeats)
        ]
    }
    if kinds and "RADD/losses.py" in there:
        result |= {
            "left_to_right": left_to_right(args.peers),
            "fixed_places": fixed_places(args.peers),
        }
    if args.ckpt:
        net, rows, path = held_out_rows(args.ckpt, args.data_dir, args.rows)
        net = Counted(net)
        print(
            f"{path}: {len(rows)} rows of {rows.shape[1]} tokens, {args.repeats} times "
            f"{args.copies} forwards each",
            flush=True,
        )
        found = engines(args.peers, net)
        found = {
            name: run
            for name, run in found.items()
            if not args.only or any(word in name for word in args.only)
        }
        measured = measure(found, net, rows, args.copies, args.repeats, args.seed, tell=True)
        result |= {"checkpoint": path, "measured": measured, "pairs": compare(measured)}
        report(measured, result["pairs"])
    print(
        json.dumps({**result, "settings": vars(args), **machine.environment(torch.device("cpu"))})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
