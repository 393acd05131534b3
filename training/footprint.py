"""The peak memory of a training of the transformer, by part, from shapes alone.

    peak = footprint(args, shape, length=2048, mixed=True)
    peak.total, peak.parts, peak.moment     # bytes; {part: bytes} that add up; when it is reached

Used by training/launch_plan.py, and of_a_parameter by recovery.py and setup.py. No torch: a plan
has to be instant. The peak is the largest of several moments of a step, and the parts are those of
that moment. What autograd keeps of a layer is checked against autograd itself, the totals against
the peak of real processes (docs/LAUNCH_1B.md). Not in it: the interpreter with PyTorch, a GPU's
context and the allocator's own losses.

Legend: D width, V vocabulary rows, E numbers of a head's key; a row is one input of a layer, of the
clean stream or of a noisy block; `number` is the bytes of a number in the products.
"""
from typing import NamedTuple

from model_config import (
    attention_heads,
    attention_params,
    block_params,
    count_params,
    rows_of_step,
)

CHUNK = 512          # positions of which masking.LinearCrossEntropy holds the logits at once


class Footprint(NamedTuple):
    """Bytes of one process, on a GPU or a CPU, at the moment that needs the most."""
    parts: dict
    moment: str

    @property
    def total(self):
        return sum(self.parts.values())


def footprint(args, shape, length, mixed, ranks=1):
    """The Footprint of training rows of this length. mixed: products in 16 bits. ranks: processes
    that share the rows of a step, and with --fsdp the weights.
    """
    moments = {}
    for rows in step_rows(args, shape, length):
        for name, parts in Moments(args, shape, length, rows, mixed, ranks).all().items():
            if name not in moments or sum(parts.values()) > sum(moments[name].values()):
                moments[name] = parts
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    return Footprint(moments[moment], moment)


def of_a_parameter(args):
    """Bytes of one parameter: {part: bytes}. In Muon, the embedding has AdamW's state."""
    weight = 2 if args.param_dtype == "bf16" else 4
    kept = {"adamw": 2, "lion": 1, "muon": 1}[args.optimizer]
    return {
        "weights": weight,
        "gradients": 4,
        "optimizer": weight * kept,
        "average": 4 if args.ema else 0,
    }


def step_rows(args, shape, length):
    """The rows of a step by each of the run's block rules."""
    return [rows_of_step(shape, length, block) for block in args.block_rules_at(length)]


# --------------------------------------------------------------------------------------------------
# one layer

def kept_of_layer(shape, rows, number):
    """Bytes that autograd keeps of one layer for one training row, where nothing is computed again:
    what the test of saved tensors finds. The mask, which all layers share, is not in it.
    """
    heads = attention_heads(shape)
    both = rows.clean + rows.noisy
    d, ff = shape.d_model, shape.d_ff
    norms = 2 * both * (8 * d + number * d)     # input, normalised input, output of each
    feed_forward = 4 * both * ff                # gate and up, the gate's silu, their product

    # the kernel's output, the same as rows, a sum of exponentials for each head
    output = heads.queries * (max(heads.key, heads.value) + heads.value)
    sums = 4 * both * heads.queries
    numbers = both * output + read_by_kernel(shape, rows) + feed_forward
    return norms + sums + number * numbers


def read_by_kernel(shape, rows):
    """Numbers of the queries, keys and values of one training row that a layer keeps: where one
    tensor is made of another, both or the second alone.
    """
    heads = attention_heads(shape)
    both = rows.clean + rows.noisy
    q = heads.queries * heads.key
    k = heads.keys * heads.key
    v = heads.keys * heads.value
    projected = k + v if shape.tie_qk else q + k + v
    turned = q + k
    if shape.tie_qk and shape.attn != "decoupled":
        turned = k                              # the queries are the keys
    if shape.learned_temp:
        turned += q

    joined = 0
    if heads.keys < heads.queries and rows.noisy and not shape.null_attn:
        joined = both * v                       # of shared keys, where a mask is: attention.kernel
    if shape.null_attn:                         # it stands in front of the keys of both streams
        projected = 0
        turned = q if rows.noisy else 0
        joined = (rows.clean + 1) * (q + k + v)
        if rows.noisy:
            joined += (both + 1) * (k + v)
    elif rows.noisy and rows.clean == rows.blocks == 1:
        joined = (both - 1) * (k + v)           # one block: without its front row

    # the narrower of keys and values is filled up, once for each stream
    queries, keys = heads.queries * heads.value, heads.keys * heads.value
    if heads.key < heads.value:
        turned = 0
        joined += both * queries + rows.clean * keys
        joined += both * keys if rows.noisy else 0
    elif heads.key > heads.value:
        projected = 0
        joined += rows.clean * k
        joined += both * k if rows.noisy else 0
    return both * (projected + turned) + joined


def layer_matrices(shape):
    """Parameters of one layer's matrices."""
    return attention_params(shape) + 3 * shape.d_model * shape.d_ff


# --------------------------------------------------------------------------------------------------
# the moments of a step

class Moments:
    """What is there at each moment of a step: {part: bytes}."""

    def __init__(self, args, shape, length, rows, mixed, ranks):
        self.args = args
        self.shape = shape
        self.rows = rows
        self.number = 2 if mixed else 4
        self.each = of_a_parameter(args)
        self.weight = self.each["weights"]
        self.shards = ranks if args.fsdp else 1
        share = max(1, args.rows_at(length) // ranks)
        self.micro = min(args.batch_at(length), share)
        self.accumulates = share > self.micro
        self.head = shape.rows * shape.d_model                      # V x D
        self.both = self.micro * (rows.clean + rows.noisy)          # rows of a forward
        self.row = 4 * shape.d_model                                # bytes of a state

        # positions that the head answers for
        asked = 0
        if rows.clean > 1 or not rows.noisy:
            asked += length
        if rows.noisy:
            asked += length * args.max_mask_rate
        self.asked = self.micro * asked

    def all(self):
        """{moment: its parts}"""
        return {
            "in the head, forward": self.head_forward(),
            "in the head, backward": self.head_backward(),
            "in the last layer, backward": self.layer_backward(last=True),
            "in the first layer, backward": self.layer_backward(last=False),
            "in the embedding, backward": self.embedding_backward(),
            "in the update": self.update(),
        }

    # ---- what stays from step to step ------------------------------------------------------------

    def fixed(self, gradients):
        """Weights, so many bytes of gradients unless earlier forwards have left all of them,
        optimizer, average.
        """
        parts = {name: size * count_params(self.shape) for name, size in self.each.items()}
        if not self.accumulates:
            parts["gradients"] = gradients
        if self.args.optimizer == "muon":
            parts["optimizer"] += self.weight * self.head           # AdamW takes the embedding
        return {name: size / self.shards for name, size in parts.items()}

    def gathered(self):
        """With --fsdp: two layers in the products' type, one layer's gradients, the head."""
        if self.shards == 1:
            return 0
        layer = layer_matrices(self.shape)
        return 2 * self.number * layer + (self.number + 4) * layer + 8 * self.head

    # ---- what the layers keep --------------------------------------------------------------------

    def kept(self, layers):
        """What so many layers keep for the backward pass, and the mask that they share."""
        mask = 0
        if self.rows.noisy and self.rows.clean + self.rows.blocks > 2:
            mask = self.number * self.rows.noisy * (self.rows.clean + self.rows.noisy)
        if self.args.activation_checkpointing:
            return layers * self.both * self.row + mask
        each = self.micro * kept_of_layer(self.shape, self.rows, self.number)
        return layers * each + mask

    def copies(self, layers):
        """16-bit copies of the matrices of so many layers, made by autocast of float32 ones."""
        if self.number == self.weight or self.shards > 1:
            return 0
        return self.number * layers * layer_matrices(self.shape)

    # ---- the moments -----------------------------------------------------------------------------

    def head_forward(self):
        """A chunk of logits is there; autocast still holds all copies."""
        layers = self.shape.n_layers
        logits = self.chunk_of_logits()
        logits += 4 * self.head                                     # the gradient of its matrix
        copies = self.copies(layers)
        if self.number < self.weight:
            copies += self.number * self.head
        # input, normalised input and output of the last norm; answers; states and their gradient
        states = self.row * (3 * self.both + 2 * self.asked)
        return self.fixed(gradients=0) | {
            "copies": copies + self.gathered(),
            "activations": self.kept(layers) + states,
            "logits": logits,
        }

    def chunk_of_logits(self):
        """The most that one chunk takes of logits and their gradients; those of the chunk before
        are still there while it begins.
        """
        logits = min(CHUNK, self.asked) * self.shape.rows
        before = logits if self.asked > CHUNK else 0
        if self.number == 4:
            # log-probabilities, and a copy for their sum; or the product of the matrix's gradient
            return max(8 * logits + 4 * before, 4 * logits + 4 * self.head)
        # a CPU widens a 16-bit product before it adds it to float32 numbers
        product = 6 if self.args.device == "cpu" else 2
        return max(
            6 * logits + 6 * before,                                # in 16 bits, then in 32
            8 * logits + 2 * before,
            6 * logits + product * self.head,
        )

    def head_backward(self):
        """The gradients of the states and of the matrix are scaled, each into a second one."""
        layers = self.shape.n_layers
        copies = 0
        if not self.args.activation_checkpointing:
            copies = self.copies(layers)                            # the layers keep them
        states = self.row * (2 * self.both + 2 * self.asked)
        return self.fixed(gradients=0) | {
            "copies": copies + self.gathered(),
            "activations": self.kept(layers) + states,
            "logits": 8 * self.head,
        }

    def layer_backward(self, last):
        """Inside of the last layer, the first one that runs back, or of the first one. The gradient
        of the head's matrix waits for that of the embedding, which is the same matrix.
        """
        layers = self.shape.n_layers
        shape = self.shape
        done = 0 if last else layers - 1
        gradients = 4 * done * layer_matrices(shape)
        copies = self.copies(1 if self.args.activation_checkpointing else layers - done)
        kept = self.kept(layers - done)
        if self.args.activation_checkpointing:
            kept += self.micro * kept_of_layer(shape, self.rows, self.number)

        # inside of the feed-forward: two more of its width; or one matrix's gradient, when its
        # four have gone and their gradients, of the width of two, have come
        wide = self.both * self.number * shape.d_ff
        matrix = (self.number + 4 if self.number == 2 else 4) * 2 * shape.d_model * shape.d_ff
        inside = max(2 * wide, matrix - 2 * wide) + 2 * self.both * self.row
        return self.fixed(gradients=gradients) | {
            "copies": copies + self.gathered(),
            "activations": kept + inside,
            "logits": 4 * self.head,
        }

    def embedding_backward(self):
        """The embedding's gradient beside the head's."""
        return self.fixed(gradients=4 * block_params(self.shape)) | {
            "copies": self.gathered(),
            "activations": self.both * self.row,
            "logits": 8 * self.head,
        }

    def update(self):
        """What the optimizer takes for a while, of the largest tensor: Lion one like it, Muon two
        and a half; of bf16 weights Muon five float32 ones, the others some pieces.
        """
        matrix = 2 * self.shape.d_model * self.shape.d_ff
        largest = {"adamw": 0, "lion": 4 * max(self.head, matrix), "muon": 10 * matrix}
        if self.weight == 2:
            largest = {"adamw": 1e8, "lion": 1e8, "muon": 20 * matrix}
        return self.fixed(gradients=4 * count_params(self.shape)) | {
            "copies": largest[self.args.optimizer] / self.shards,
            "activations": 0,
            "logits": 0,
        }
