"""The graphs of a trained model, in the operators of ONNX Runtime.

    weights = Weights(folder / "weights.bin")
    graphs = build(cfg, parameters, Products(weights, bits, block))     # {name: onnx model}

Written by hand and not traced: a forward of one token is bound by the number of operators, and the
runtime's fused ones (norm with residual, attention over slots, products of blocks of bits) make it
a third of what a tracer gives. export.py compares every graph with PyTorch before it is used.

EcoHybrid:
    next              one clean row (B, 1) behind the state -> states (B, 1, D), the new state
    rows              up to CHUNK clean rows (B, T), a noisy block with its front row (B, S + 1), or
                      both -> states of the block, or of the clean rows if there is none
    tried             clean rows of one text (1, T), T <= CHUNK -> states (1, T, D), the state
                      behind each of them
The transformer:
    rows              rows (B, R), and a mask of what they see of the cache and of each other ->
                      states (B, R, D), their keys and values
Both:
    head              states (N, D) -> logits (N, V)
    head_one          the same for one state, (1, D) -> (1, V): where products have a way for it
    rows_unsigned, head_unsigned, probe
                      in 8 bits, for older CPUs, and what tells them: see Products

Legend: B batch, T clean rows, S block, R rows of both streams, D width, H heads, E head size, M
slots, F feed-forward width, r the convolution's reach, C positions of the transformer's cache.
"""
import copy
import math

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edge import blocks

OPSET = 21
CHUNK = 64             # clean rows that a graph reads at once; longer text comes in chunks
HALF = CHUNK // 2
SLIM = 4               # as in eco_hybrid.py: in slimmer heads every state is made
SCORE_CAP = 8.0
SHARED = -6.0
FASTEST = 1.0
ALL = 1 << 30           # where a slice ends that goes to the end
ALIGN = 4096           # weights begin at pages, so that a runtime can map them
ACCURACY_FLOAT = 1      # of MatMulNBits: what is multiplied stays float32, or is rounded to bytes
ACCURACY_BYTES = 4
WIDENED = "widened"     # the file of matrices that are made when a graph is opened


class Weights:
    """One file of tensors that all graphs share."""

    def __init__(self, path):
        self.name = path.name
        self.file = open(path, "wb")
        self.places = {}
        # tensors that are made when a graph is opened, by what is made of them (blocks.FORMS) and
        # graph: {tensor: where it is in the file, its shape there}
        self.made = {form: {} for form in blocks.FORMS}

    def add(self, name, array):
        """Write a tensor once -> its name."""
        if name not in self.places:
            array = np.ascontiguousarray(array)
            self.file.write(b"\0" * (-self.file.tell() % ALIGN))
            place = self.file.tell()
            self.file.write(array.tobytes())
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            self.places[name] = (kind, array.shape, place, array.nbytes)
        return name

    def turn(self, graph, name, inputs, form="turned"):
        """The bytes (O, n, b) of a matrix that a graph wants as (I, O), signed ("turned") or
        "unsigned": whoever opens the graph turns them -> the name of what comes of it.
        """
        _, (outputs, *row), place, _ = self.places[name]
        turned = f"{name}.{form}"
        kind = TensorProto.INT8 if form == "turned" else TensorProto.UINT8
        graph.root.made[form][turned] = (place, outputs, math.prod(row), inputs)
        self.places[turned] = (kind, (inputs, outputs), place, inputs * outputs)
        graph.root.used[turned] = self.initializer(turned)
        return turned

    def repeat(self, graph, name, count):
        """Scales (O,) that a graph wants once for each of an output's blocks, (O * count,)."""
        kind, (outputs,), place, size = self.places[name]
        repeated = f"{name}.repeated"
        graph.root.made["repeated"][repeated] = (place, outputs, count)
        self.places[repeated] = (kind, (outputs * count,), place, size * count)
        graph.root.used[repeated] = self.initializer(repeated)
        return repeated

    def widen(self, graph, name, inputs):
        """The same in float32 (blocks.widened). That takes more room than the bytes, so it lies in
        a file of its own, which whoever opens the graph makes: one after the other in the order of
        the manifest.
        """
        _, (outputs, *row), place, _ = self.places[name]
        widened = f"{name}.widened"
        others = graph.root.made["widened"]
        before = sum(outputs * inputs for _, outputs, _, inputs in others.values())
        others[widened] = (place, outputs, math.prod(row), inputs)
        found = (TensorProto.FLOAT, (inputs, outputs), 4 * before, 4 * inputs * outputs)
        graph.root.used[widened] = external(widened, WIDENED, *found)
        return widened

    def initializer(self, name):
        """The tensor's place in the file, as a graph says it."""
        return external(name, self.name, *self.places[name])

    def close(self):
        self.file.close()


def external(name, file, kind, shape, place, size):
    """A tensor that lies in a file beside its graph."""
    tensor = TensorProto(name=name, data_type=kind, dims=shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", place), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


class Graph:
    """Nodes, one after the other; a value is its name."""

    def __init__(self, weights, root=None):
        self.weights = weights
        self.root = root or self    # whose initializers and names a branch shares
        self.nodes = []
        self.inputs = []
        self.outputs = []
        self.used = {}              # initializers by name
        self.made = {form: {} for form in blocks.FORMS}     # those of them in Weights.made
        self.constants = {}
        self.count = 0

    def fresh(self):
        self.root.count += 1
        return f"v{self.root.count}"

    def op(self, kind, *inputs, results=1, names=None, domain="", **attributes):
        """Add a node -> the name of its result, or of its results."""
        names = names or [self.fresh() for _ in range(results)]
        node = helper.make_node(kind, list(inputs), names, domain=domain, **attributes)
        self.nodes.append(node)
        return names[0] if len(names) == 1 else names

    def fused(self, kind, *inputs, **attributes):
        """An operator of ONNX Runtime's own."""
        return self.op(kind, *inputs, domain="com.microsoft", **attributes)

    def choose(self, condition, then, otherwise):
        """then(graph) or otherwise(graph), whichever a condition asks for when the graph runs; each
        gives the names of as many float tensors.
        """
        branches = []
        for make in (then, otherwise):
            branch = Graph(self.weights, self.root)
            results = []
            for value in make(branch):
                inside = any(value in node.output for node in branch.nodes)
                results.append(value if inside else branch.op("Identity", value))
            told = [helper.make_tensor_value_info(x, TensorProto.FLOAT, None) for x in results]
            branches.append(helper.make_graph(branch.nodes, self.fresh(), [], told))
        return self.op(
            "If", condition, results=len(results), then_branch=branches[0], else_branch=branches[1]
        )

    def input(self, name, kind, shape):
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, value, name, kind, shape):
        """Give a value its name as a result of the graph."""
        rename(self.nodes, value, name)
        self.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def weight(self, name, array):
        """A tensor of the weights file."""
        self.weights.add(name, array)
        self.root.used[name] = self.weights.initializer(name)
        return name

    def constant(self, value, kind=np.float32):
        """A small tensor inside the graph."""
        array = np.asarray(value, kind)
        key = (array.dtype.str, array.shape, array.tobytes())
        known = self.root.constants
        if key not in known:
            name = f"c{len(known)}"
            known[key] = name
            self.root.used[name] = numpy_helper.from_array(array, name)
        return known[key]

    def ints(self, *values):
        return self.constant(values, np.int64)

    def model(self, name):
        for form, tensors in self.made.items():
            if tensors:
                self.weights.made[form][name] = tensors
        graph = helper.make_graph(
            self.nodes, name, self.inputs, self.outputs, list(self.used.values())
        )
        sets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=sets, ir_version=10)

    def product(self, x, y, turn_x=0, turn_y=0, factor=1.0):
        """x (..., N, K) times y (..., K, M); the last two axes of one may come turned."""
        return self.fused("FusedMatMul", x, y, transA=turn_x, transB=turn_y, alpha=factor)

    # ---- pieces that both denoisers use ----------------------------------------------------------

    def rows(self, x, first, end):
        """x (B, R, ...) -> its rows [first, end); both are numbers or names."""
        if not isinstance(first, str):
            first = self.ints(first)
        if not isinstance(end, str):
            end = self.ints(end)
        return self.op("Slice", x, first, end, self.ints(1))

    def norm(self, x, weight, epsilon=1e-6):
        return self.op("SimplifiedLayerNormalization", x, weight, axis=-1, epsilon=epsilon)

    def add_norm(self, x, y, weight):
        """x + y, and its norm."""
        normed, total = self.fresh(), self.fresh()
        self.fused(
            "SkipSimplifiedLayerNormalization", x, y, weight,
            names=[normed, "", "", total], epsilon=1e-6,
        )
        return total, normed

    def gated(self, gate, up):
        """silu(gate) * up."""
        return self.op("Mul", self.fused("QuickGelu", gate, alpha=1.0), up)

    def split(self, x, *sizes):
        """x (..., X) -> its parts of these sizes."""
        return self.op("Split", x, self.ints(*sizes), results=len(sizes), axis=-1)

    def heads(self, x, count, size, order=(0, 2, 1, 3)):
        """(B, R, H*X) -> (B, H, R, X), or its axes in another order."""
        parts = self.op("Reshape", x, self.ints(0, 0, count, size))                # (B, R, H, X)
        return self.op("Transpose", parts, perm=order)

    def together(self, x, width):
        """(B, H, R, X) -> (B, R, H*X)."""
        x = self.op("Transpose", x, perm=(0, 2, 1, 3))
        return self.op("Reshape", x, self.ints(0, 0, width))


def rename(nodes, old, new):
    """Another name for a value, in the branches of nodes, too."""
    for node in nodes:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new
        for attribute in node.attribute:
            if attribute.HasField("g"):
                rename(attribute.g.node, old, new)


class Products:
    """How a model's matrices are kept: float32; 8 bits with a scale for each output; or 4 bits in
    blocks, and then the tied matrix of embedding and head has 8.

    A product of 8 bits has two ways, and both round what is multiplied, too, so that a row's answer
    does not depend on the other rows. For one row MatMulNBits is fastest, one operator that reads
    the bytes as they are; so it is for the few rows of a draft, which have to be what one row is.
    From 8 rows on a product of bytes takes half of its time, as CPUs have units for it: seven
    operators, and the bytes turned around.

    What is multiplied are unsigned bytes, times signed ones of the weights. CPUs of before about
    2019 add two such products up in 16 bits, and cut off what does not fit, which doubles what 8
    bits lose. `unsigned` makes the weights unsigned, too, which those CPUs do in 32 bits, and takes
    them 1.2 to 1.6x as long; newer CPUs have units for the first kind alone.

    wide: bytes become float32 when a graph is opened, and nothing but weights is rounded, in 4 bits
    as well. That is for browsers: their last digit of float32 is another than a CPU's, and what is
    rounded to bytes would hang on it.
    """

    def __init__(self, weights, bits, block, wide=False, unsigned=False):
        self.weights = weights
        self.bits = bits
        self.block = block
        self.wide = wide
        self.unsigned = unsigned
        self.one_row = bits != 32 and not wide          # has one row a way of its own?

    def linear(self, graph, x, name, matrix, one_row=False):
        """x (..., I) times a matrix (O, I) -> (..., O)."""
        if self.bits == 32:
            return graph.op("MatMul", x, graph.weight(name, matrix.T))
        if self.bits == 4:
            codes, scales = blocks.pack(matrix, self.block)
            codes = graph.weight(f"{name}.codes", codes)
            scales = graph.weight(f"{name}.scales", scales.reshape(-1))
            return self.in_blocks(graph, x, codes, scales, matrix.shape, self.bits, self.block)
        return self.in_8_bits(graph, x, name, matrix, one_row)

    def in_8_bits(self, graph, x, name, matrix, one_row):
        """The same, whatever the bits of other matrices."""
        if self.wide:
            return self.of_widened(graph, x, name, matrix)
        if one_row:
            return self.of_one_row(graph, x, name, matrix)
        return self.of_bytes(graph, x, name, matrix)

    def in_blocks(self, graph, x, codes, scales, shape, bits, block):
        """x (..., I) times codes with a scale for each block -> (..., O)."""
        return graph.fused(
            "MatMulNBits", x, codes, scales,
            K=shape[1], N=shape[0], bits=bits, block_size=block,
            accuracy_level=ACCURACY_FLOAT if self.wide else ACCURACY_BYTES,
        )

    def byte_weights(self, graph, name, matrix):
        """A matrix (O, I) in the file: bytes (O, n, b) and a scale for each output (O,)."""
        codes, scales = blocks.pack_rows(matrix)
        return graph.weight(f"{name}.bytes", codes), scales

    def of_one_row(self, graph, x, name, matrix):
        codes, scales = self.byte_weights(graph, name, matrix)
        block = blocks.block_of(matrix.shape[1])
        scales = self.weights.add(f"{name}.scales", scales)
        scales = self.weights.repeat(graph, scales, -(-matrix.shape[1] // block))  # (O * n,)
        return self.in_blocks(graph, x, codes, scales, matrix.shape, 8, block)

    def of_widened(self, graph, x, name, matrix):
        codes, scales = self.byte_weights(graph, name, matrix)
        codes = self.weights.widen(graph, codes, matrix.shape[1])
        product = graph.op("MatMul", x, codes)
        return graph.op("Mul", product, graph.weight(f"{name}.scales", scales))

    def of_bytes(self, graph, x, name, matrix):
        codes, scales = self.byte_weights(graph, name, matrix)
        form = "unsigned" if self.unsigned else "turned"
        codes = self.weights.turn(graph, codes, matrix.shape[1], form)
        scales = graph.weight(f"{name}.scales", scales)
        return self.product_of_bytes(graph, x, codes, scales)

    def product_of_bytes(self, graph, x, codes, scales):
        """x (..., I), each row rounded by its own largest number, times bytes (I, O)."""
        top = graph.op("ReduceMax", graph.op("Abs", x), graph.ints(-1), keepdims=1)  # (..., 1)
        top = graph.op("Add", top, graph.constant(1e-12))
        step = graph.constant(1 / 127)
        middle = graph.constant(blocks.MIDDLE, np.uint8)
        rounded = graph.op("QuantizeLinear", graph.op("Div", x, top), step, middle)
        zeros = [middle, middle] if self.unsigned else [middle]
        product = graph.fused("MatMulIntegerToFloat", rounded, codes, step, scales, *zeros)
        return graph.op("Mul", product, top)

    def embed(self, graph, ids, matrix):
        """ids (B, R) -> rows of the tied matrix (V, D), (B, R, D)."""
        if self.bits == 32:
            return graph.op("Gather", graph.weight("head.weight", matrix), ids)
        matrix, factors = blocks.even(matrix)
        codes, scales = self.byte_weights(graph, "head.weight", matrix)
        values = graph.op("Gather", codes, ids)                                    # (B, R, n, b)
        values = graph.op("Reshape", values, graph.ints(0, 0, -1))
        if matrix.shape[1] % blocks.block_of(matrix.shape[1]):
            width = graph.ints(matrix.shape[1])
            values = graph.op("Slice", values, graph.ints(0), width, graph.ints(2))
        values = graph.op("Cast", values, to=TensorProto.FLOAT)                    # (B, R, D)
        values = graph.op("Sub", values, graph.constant(blocks.MIDDLE))
        scale = graph.op("Gather", graph.weight("head.weight.scales", scales), ids)
        scale = graph.op("Unsqueeze", scale, graph.ints(2))                        # (B, R, 1)
        values = graph.op("Mul", values, scale)
        return graph.op("Mul", values, graph.weight("head.factors", factors))

    def head(self, name, matrix):
        """The graph head, or head_one."""
        graph = Graph(self.weights)
        x = graph.input("states", TensorProto.FLOAT, ["N", matrix.shape[1]])
        if self.bits == 32:
            z = graph.op("Gemm", x, graph.weight("head.weight", matrix), transB=1)
        else:
            matrix, factors = blocks.even(matrix)
            x = graph.op("Mul", x, graph.weight("head.factors", factors))
            z = self.in_8_bits(graph, x, "head.weight", matrix, name == "head_one")
        graph.output(z, "logits", TensorProto.FLOAT, ["N", matrix.shape[0]])
        return graph.model(name)


    def probe(self):
        """The graph probe: 32 times 1, and as often what a byte beside 1 cannot hold, in both ways
        to multiply. Of `bytes`, an answer below 32 says that this CPU cuts products off; of
        `blocks`, one above 32 that nothing was rounded: it has no such product, and makes float32
        of all weights each time.
        """
        graph = Graph(self.weights)
        rows, inputs, outputs = 8, 64, 16
        row = np.where(np.arange(inputs) < 32, 1, 0.003)
        x = graph.constant(np.tile(row, (rows, 1)))
        scales = graph.constant(np.full(outputs, 1 / 127))
        codes = graph.constant(np.full((inputs, outputs), 127), np.int8)
        product = self.product_of_bytes(graph, x, codes, scales)
        graph.output(product, "bytes", TensorProto.FLOAT, [rows, outputs])
        codes = graph.constant(np.full((outputs, 1, inputs), blocks.MIDDLE + 127), np.uint8)
        shape = (outputs, inputs)
        product = self.in_blocks(graph, graph.constant(row[None]), codes, scales, shape, 8, inputs)
        graph.output(product, "blocks", TensorProto.FLOAT, [1, outputs])
        return graph.model("probe")


class Eco:
    """EcoHybrid's graphs. The state of layer i is num_i (B, H, M, E) and halo_i (B, r + 1, D)."""

    def __init__(self, cfg, parameters, products):
        self.cfg = cfg
        self.parameters = parameters
        self.products = products
        self.H = cfg.n_heads
        self.M = cfg.memory_slots
        self.E = cfg.d_mem // cfg.n_heads
        self.reach = cfg.conv_kernel // 2

    def graph(self, name, clean, noisy):
        """clean: None, "one" row, a "chunk" of rows, or rows that are "tried". noisy: is there a
        block? Both "any": what a call has, is seen when it runs; a stream that it has not is of no
        rows.
        """
        cfg = self.cfg
        graph = Graph(self.products.weights)
        self.asked = (clean, noisy)
        parts = []
        if clean:
            length = 1 if clean == "one" else "T"
            parts.append(graph.input("clean", TensorProto.INT64, ["B", length]))
        if noisy:
            parts.append(graph.input("noisy", TensorProto.INT64, ["B", "R"]))
        ids = parts[0]
        if len(parts) > 1:
            ids = graph.op("Concat", *parts, axis=1)
        self.count_rows(graph, clean, noisy)

        head = self.parameters["head.weight"]
        x = self.products.embed(graph, ids, head)                                  # (B, R, D)
        h = graph.norm(x, self.vector(graph, "layers.0.norm.weight"))
        states = []
        for i in range(cfg.n_layers):
            num = graph.input(f"num_{i}", TensorProto.FLOAT, ["B", self.H, self.M, self.E])
            halo = graph.input(
                f"halo_{i}", TensorProto.FLOAT, ["B", self.reach + 1, cfg.d_model]
            )
            y, num, halo = self.layer(graph, i, h, num, halo)
            states.append((num, halo))
            after = f"layers.{i + 1}.norm.weight"
            if i + 1 == cfg.n_layers:
                after = "exits.final_norm.weight"
            x, h = graph.add_norm(x, y, self.vector(graph, after))
        if noisy:
            h = graph.rows(h, *self.answering)                                     # (B, S, D)
        graph.output(h, "answers", TensorProto.FLOAT, ["B", "A", cfg.d_model])
        if clean:
            behind = "T" if clean == "tried" else "B"
            rows = "L" if clean == "tried" else self.reach + 1
            for i, (num, halo) in enumerate(states):
                if clean == "tried":
                    num, grown = num
                    graph.output(grown, f"grown_{i}", TensorProto.FLOAT, ["T", self.H, self.M, 1])
                shape = [behind, self.H, self.M, self.E]
                graph.output(num, f"new_num_{i}", TensorProto.FLOAT, shape)
                graph.output(halo, f"new_halo_{i}", TensorProto.FLOAT, ["B", rows, cfg.d_model])
        return graph.model(name)

    def count_rows(self, graph, clean, noisy):
        """What all layers use: the number of clean rows, and which of them see which."""
        self.answering = (0, -1)
        self.length = None
        if clean == "one":
            self.length = graph.ints(1)
        elif clean:
            self.length = graph.op("Shape", "clean", start=1, end=2)               # (1,)
            if clean != "tried":
                self.squares(graph)
        if noisy and clean:
            self.answering = (self.length, -1)
        if noisy == "any":
            block = graph.op("Shape", "noisy", start=1, end=2)
            self.has_noisy = graph.op("Greater", block, graph.ints(0))
            self.has_clean = graph.op("Greater", self.length, graph.ints(0))
            first = graph.op("Where", self.has_noisy, self.length, graph.ints(0))
            end = graph.op("Where", self.has_noisy, graph.ints(-1), graph.ints(ALL))
            self.answering = (first, end)

    def squares(self, graph):
        """(T, T): 1 where a clean row sees another, itself included or not."""
        two = graph.op("Concat", self.length, self.length, axis=0)
        up_to = np.tril(np.ones((CHUNK, CHUNK), np.float32))
        zeros = graph.ints(0, 0)
        self.up_to = graph.op("Slice", graph.constant(up_to), zeros, two)
        self.earlier = graph.op("Slice", graph.constant(np.tril(up_to, -1)), zeros, two)
        self.last = graph.op("Sub", self.length, graph.ints(1))

    def by_streams(self, graph, make):
        """make(graph, clean, noisy) for the streams that there are."""
        clean, noisy = self.asked
        if noisy != "any":
            return make(graph, clean, noisy)

        def with_clean(branch):
            return branch.choose(
                self.has_noisy,
                lambda inner: make(inner, "chunk", True),
                lambda inner: make(inner, "chunk", False),
            )

        return graph.choose(
            self.has_clean, with_clean, lambda branch: make(branch, None, True)
        )

    def vector(self, graph, name):
        return graph.weight(name, self.parameters[name])

    def layer(self, graph, i, h, num, halo):
        """The normed input h (B, R, D) behind a state -> what is added to x, the new state."""
        p = f"layers.{i}."
        cfg = self.cfg
        h, halo = self.by_streams(
            graph, lambda inner, clean, noisy: self.convolve(inner, p, h, halo, clean, noisy)
        )
        matrix = self.parameters[p + "in_proj.weight"].copy()
        # the scores of writes, divided by their cap: a power of two, so nothing is rounded
        matrix[-self.H * self.M:] /= SCORE_CAP
        # what all writes share is part of their values
        matrix[2 * cfg.d_ff + cfg.d_mem:][:cfg.d_mem] *= math.exp(SHARED)
        one_row = self.asked[0] in ("one", "tried")     # a row's numbers are the same in both
        wide = self.products.linear(graph, h, p + "in_proj", matrix, one_row)
        sizes = (cfg.d_ff, cfg.d_ff, cfg.d_mem, cfg.d_mem, self.H * self.M)
        gate, up, *asked = graph.split(wide, *sizes)
        memory, num = self.by_streams(
            graph, lambda inner, clean, noisy: self.remember(inner, p, asked, num, clean, noisy)
        )
        y = graph.op("Concat", graph.gated(gate, up), memory, axis=-1)             # (B, R, F + H*E)
        matrix = self.parameters[p + "out_proj.weight"]
        return self.products.linear(graph, y, p + "out_proj", matrix, one_row), num, halo

    def remember(self, graph, p, asked, num, clean, noisy):
        """q, v, s of all rows -> what they read of the memory (B, R, H*E), the state behind the
        clean ones.
        """
        answers = []
        if clean:
            mine = asked
            if noisy:
                mine = [graph.rows(part, 0, self.length) for part in asked]
            read = {"one": self.read_one, "chunk": self.read_chunk, "tried": self.read_tried}[clean]
            y, num = read(graph, p, *mine, num)
            answers.append(y)
        if noisy:
            mine = asked
            if clean:
                mine = [graph.rows(part, self.length, ALL) for part in asked]
            answers.append(self.read_block(graph, p, *mine, num))
        if len(answers) == 1:
            return answers[0], num
        return graph.op("Concat", *answers, axis=1), num

    # ---- the convolution -------------------------------------------------------------------------

    def convolve(self, graph, p, h, halo, clean, noisy):
        """h (B, R, D) -> the same after the convolution, and the halo behind the clean rows."""
        reach = self.reach
        weight = self.parameters[p + "conv.weight"]                                # (D, k)
        h_clean = h_noisy = h
        if clean and noisy:
            h_clean = graph.rows(h, 0, self.length)
            h_noisy = graph.rows(h, self.length, ALL)
        parts = []
        if clean == "one":
            halo = graph.op("Concat", graph.rows(halo, 1, ALL), h_clean, axis=1)
            taps = graph.weight(p + "conv.causal", weight[:, :reach + 1].T)        # (r + 1, D)
            product = graph.op("Mul", halo, taps)
            parts.append(graph.op("ReduceSum", product, graph.ints(1), keepdims=1))
        elif clean:
            seen = graph.op("Concat", halo, h_clean, axis=1)                       # (B, r+1+T, D)
            parts.append(self.taps(graph, p, seen, 1, reach + 1, self.length))
            # of rows that are tried, whoever keeps some of them cuts it
            halo = seen if clean == "tried" else graph.rows(seen, -reach - 1, ALL)
        if noisy:
            before = graph.rows(halo, 0, reach)
            seen = graph.op("Concat", before, h_noisy, axis=1)
            shape = graph.op("Shape", h_noisy, start=1, end=2)
            pads = graph.ints(0, 0, 0, 0, reach, 0)
            seen = graph.op("Pad", seen, pads)                                     # (B, r+S+1+r, D)
            parts.append(self.taps(graph, p, seen, 0, 2 * reach + 1, shape))
        if len(parts) > 1:
            return graph.op("Concat", *parts, axis=1), halo
        return parts[0], halo

    def taps(self, graph, p, seen, first, count, length):
        """The sum of `count` weighted views of `seen`, of so many rows each."""
        weight = self.parameters[p + "conv.weight"]
        total = None
        for tap in range(count):
            begin = graph.ints(first + tap)
            view = graph.rows(seen, begin, graph.op("Add", begin, length))
            term = graph.op("Mul", view, graph.weight(f"{p}conv.{tap}", weight[:, tap]))
            total = term if total is None else graph.op("Add", total, term)
        return total

    # ---- the memory ------------------------------------------------------------------------------

    def decay_rate(self, p):
        decay = self.parameters[p + "decay"].astype(np.float64)
        return np.minimum(np.exp(-decay), FASTEST)                                 # (H, M)

    def strengths(self, graph, s):
        """Scores, divided by their cap -> weights of the writes, but for what all share."""
        return graph.op("Exp", graph.op("Mul", graph.op("Tanh", s), graph.constant(SCORE_CAP)))

    def read(self, graph, p, q, num):
        """q (B, R, H*E) attends over the slots of num (B, H, M, E) -> (B, R, H*E).

        LpNormalization takes half of the time of the norm that the layers have; its rows have a
        length of one instead of E ** 0.5, which keys and answers make up for.
        """
        root = self.E ** 0.5
        values = graph.op("LpNormalization", num, axis=-1, p=2)
        keys = (self.parameters[p + "slot_key"] / root).astype(np.float32)         # (H, M, E)
        keys = graph.op("Add", values, graph.weight(p + "slot_key.short", keys))
        y = graph.fused("MultiHeadAttention", q, keys, values, num_heads=self.H, scale=1.0)
        return graph.op("Mul", y, graph.constant(root))

    def read_one(self, graph, p, q, v, s, num):
        """One clean row reads the state behind itself."""
        w = graph.op("Reshape", self.strengths(graph, s), graph.ints(0, self.H, self.M, 1))
        v = graph.op("Reshape", v, graph.ints(0, self.H, 1, self.E))
        fade = np.exp(-self.decay_rate(p))[..., None].astype(np.float32)
        old = graph.op("Mul", num, graph.weight(p + "fade", fade))
        num = graph.op("Add", old, graph.op("Mul", w, v))                          # (B, H, M, E)
        return self.read(graph, p, q, num), num

    def read_tried(self, graph, p, q, v, s, num):
        """A few clean rows of one text (1, T), each reads the state behind itself, as if they were
        texts beside each other -> the answers, (all these states, what each has to be divided by):
        as in read_chunk, they are sums, and reading leaves out of what size a state is.
        """
        rate = self.decay_rate(p)                                                  # (H, M)
        place = np.arange(CHUNK)[:, None, None]
        grown = np.exp((place - HALF) * rate)[..., None]                        # (CHUNK, H, M, 1)
        grown = graph.weight(p + "grown.tried", grown.astype(np.float32))
        here = graph.op("Slice", grown, graph.ints(0), self.length, graph.ints(0))
        shrunk = np.exp(-(HALF + 1) * rate)[..., None].astype(np.float32)          # (H, M, 1)
        w = graph.op("Reshape", self.strengths(graph, s), graph.ints(-1, self.H, self.M, 1))
        v = graph.op("Reshape", v, graph.ints(-1, self.H, 1, self.E))
        wrote = graph.op("Mul", graph.op("Mul", w, here), v)                       # (T, H, M, E)
        start = graph.op("Mul", num, graph.weight(p + "shrunk", shrunk))           # (1, H, M, E)
        sums = graph.op("CumSum", wrote, graph.constant(0, np.int64))
        states = graph.op("Add", sums, start)                                      # (T, H, M, E)
        q = graph.op("Reshape", q, graph.ints(-1, 1, self.H * self.E))
        y = self.read(graph, p, q, states)                                         # (T, 1, H*E)
        return graph.op("Reshape", y, graph.ints(1, -1, self.H * self.E)), (states, here)

    def read_block(self, graph, p, q, v, s, num):
        """A noisy block reads the state and itself; its front row writes nothing."""
        w = self.strengths(graph, graph.rows(s, 1, ALL))
        w = graph.heads(w, self.H, self.M, (0, 2, 3, 1))                           # (B, H, M, S)
        v = graph.heads(graph.rows(v, 1, ALL), self.H, self.E)                 # (B, H, S, E)
        own = graph.op("MatMul", w, v)                                             # (B, H, M, E)
        return self.read(graph, p, q, graph.op("Add", own, num))

    def read_chunk(self, graph, p, q, v, s, num):
        """Up to CHUNK clean rows, each reads the state behind itself: EcoLayer.read_causal, whose
        docstring explains the terms.
        """
        rate = self.decay_rate(p)[:, None, :]                                      # (H, 1, M)
        place = np.arange(CHUNK)[:, None]
        grown = np.exp((place - HALF) * rate).astype(np.float32)                   # (H, CHUNK, M)
        grown = graph.weight(p + "grown", grown)
        here = graph.op("Slice", grown, graph.ints(0), self.length, graph.ints(1))
        q = graph.heads(q, self.H, self.E)                                         # (B, H, T, E)
        v = graph.heads(v, self.H, self.E)
        w = graph.heads(self.strengths(graph, s), self.H, self.M)
        a = graph.op("Mul", w, here)                                               # (B, H, T, M)
        shrunk = np.exp(-(HALF + 1) * rate[:, 0, :, None]).astype(np.float32)      # (H, M, 1)
        start = graph.op("Mul", num, graph.weight(p + "shrunk", shrunk))           # (B, H, M, E)
        total = graph.op("Add", start, graph.product(a, v, turn_x=1))              # (B, H, M, E)
        fade = graph.op("Gather", grown, self.last, axis=1)                        # (H, 1, M)
        fade = graph.op("Transpose", fade, perm=(0, 2, 1))                         # (H, M, 1)
        after = graph.op("Div", total, fade)
        attend = self.attend_slim if self.E < SLIM else self.attend_chunk
        y = attend(graph, p, q, v, a, start, here)                                 # (B, H, T, E)
        return graph.together(y, self.H * self.E), after

    def attend_chunk(self, graph, p, q, v, a, start, grown):
        """The answers of a chunk's rows, without any row's state."""
        def by_state(x, seen):
            pairs = graph.op("Mul", graph.product(x, v, turn_y=1), seen)           # (B, H, T, T)
            older = graph.product(x, start, turn_y=1)
            return graph.op("Add", graph.op("MatMul", pairs, a), older)

        q_state = by_state(q, self.up_to)                                          # (B, H, T, M)
        v_state = by_state(v, self.earlier)

        # 1 / rms of each row's state
        length = graph.op("ReduceSumSquare", v, graph.ints(-1), keepdims=1)        # (B, H, T, 1)
        first = graph.op("ReduceSumSquare", start, graph.ints(-1), keepdims=0)     # (B, H, M)
        first = graph.op("Unsqueeze", first, graph.ints(2))                        # (B, H, 1, M)
        squares = graph.op("Mul", graph.op("Mul", a, a), length)
        terms = graph.op("Add", first, graph.op("MatMul", self.up_to, squares))
        crossed = graph.product(self.up_to, graph.op("Mul", a, v_state), factor=2.0)
        square = graph.op("Add", terms, crossed)
        rounding = graph.op("Mul", terms, graph.constant(np.finfo(np.float32).eps))
        tiny = graph.op("Mul", graph.op("Mul", grown, grown), graph.constant(1e-20))
        least = graph.op("Add", rounding, tiny)
        root = graph.op("Sqrt", graph.op("Max", square, least))
        scale = graph.op("Div", graph.constant(self.E ** 0.5), root)               # (B, H, T, M)

        # the shares of the slots, and the answer
        key = self.parameters[p + "slot_key"].swapaxes(1, 2)                       # (H, E, M)
        name = graph.op("MatMul", q, graph.weight(p + "slot_key.turned", key))
        score = graph.op("Add", graph.op("Mul", q_state, scale), name)
        score = graph.op("Mul", score, graph.constant(self.E ** -0.5))
        share = graph.op("Mul", graph.op("Softmax", score, axis=-1), scale)
        pairs = graph.op("Mul", graph.product(share, a, turn_y=1), self.up_to)
        return graph.op("Add", graph.op("MatMul", pairs, v), graph.op("MatMul", share, start))

    def attend_slim(self, graph, p, q, v, a, start, grown):
        """The same, and every row's state is made: for heads of few numbers."""
        a = graph.op("Unsqueeze", a, graph.ints(4))                                # (B, H, T, M, 1)
        v = graph.op("Unsqueeze", v, graph.ints(3))                                # (B, H, T, 1, E)
        axis = graph.constant(2, np.int64)
        sums = graph.op("CumSum", graph.op("Mul", a, v), axis)                     # (B, H, T, M, E)
        states = graph.op("Add", sums, graph.op("Unsqueeze", start, graph.ints(2)))
        ones = graph.weight(f"ones.{self.E}", np.ones(self.E, np.float32))
        values = graph.norm(states, ones, 1e-20)
        key = self.parameters[p + "slot_key"][:, None]                             # (H, 1, M, E)
        keys = graph.op("Add", values, graph.weight(p + "slot_key.wide", key))
        keys = graph.op("Transpose", keys, perm=(0, 1, 2, 4, 3))
        q = graph.op("Unsqueeze", q, graph.ints(3))                                # (B, H, T, 1, E)
        score = graph.op("Mul", graph.op("MatMul", q, keys), graph.constant(self.E ** -0.5))
        y = graph.op("MatMul", graph.op("Softmax", score, axis=-1), values)
        return graph.op("Squeeze", y, graph.ints(3))                               # (B, H, T, E)


class Transformer:
    """The transformer's one graph: step, states and both in one differ by the mask alone. The cache
    of layer i is k_i and v_i (B, H, C, E), of which nothing is copied.
    """

    def __init__(self, cfg, parameters, products):
        self.cfg = cfg
        self.parameters = parameters
        self.products = products
        self.H = cfg.n_heads
        self.E = cfg.d_model // cfg.n_heads

    def graph(self, name):
        cfg = self.cfg
        graph = Graph(self.products.weights)
        ids = graph.input("ids", TensorProto.INT64, ["B", "R"])
        self.table = (
            graph.input("cos", TensorProto.FLOAT, ["R", self.E // 2]),
            graph.input("sin", TensorProto.FLOAT, ["R", self.E // 2]),
        )
        self.mask = graph.input("mask", TensorProto.FLOAT, ["R", "K"])
        x = self.products.embed(graph, ids, self.parameters["head.weight"])
        h = graph.norm(x, self.vector(graph, "layers.0.attn_norm.weight"))
        held = []
        for i in range(cfg.n_layers):
            p = f"layers.{i}."
            shape = ["B", self.H, "C", self.E]
            old_k = graph.input(f"k_{i}", TensorProto.FLOAT, shape)
            old_v = graph.input(f"v_{i}", TensorProto.FLOAT, shape)
            y, k, v = self.attention(graph, p + "attn.", h, old_k, old_v)
            held.append((k, v))
            x, h = graph.add_norm(x, y, self.vector(graph, p + "ff_norm.weight"))
            y = self.feed_forward(graph, p + "ff.", h)
            after = f"layers.{i + 1}.attn_norm.weight"
            if i + 1 == cfg.n_layers:
                after = "exits.final_norm.weight"
            x, h = graph.add_norm(x, y, self.vector(graph, after))
        graph.output(h, "answers", TensorProto.FLOAT, ["B", "R", cfg.d_model])
        for i, (k, v) in enumerate(held):
            shape = ["B", self.H, "R", self.E]
            graph.output(k, f"new_k_{i}", TensorProto.FLOAT, shape)
            graph.output(v, f"new_v_{i}", TensorProto.FLOAT, shape)
        return graph.model(name)

    def vector(self, graph, name):
        return graph.weight(name, self.parameters[name])

    def linear(self, graph, x, name):
        return self.products.linear(graph, x, name, self.parameters[name + ".weight"])

    def feed_forward(self, graph, p, h):
        gate, up = graph.split(self.linear(graph, h, p + "in_proj"), self.cfg.d_ff, self.cfg.d_ff)
        return self.linear(graph, graph.gated(gate, up), p + "out_proj")

    def attention(self, graph, p, h, old_k, old_v):
        """Rows h (B, R, D) -> what attention makes of them, their keys and values (B, H, R, E)."""
        wide = self.linear(graph, h, p + "qkv_proj")
        q, k, v = graph.split(wide, *[self.cfg.d_model] * 3)
        q, k, v = (graph.heads(part, self.H, self.E) for part in (q, k, v))        # (B, H, R, E)
        q = self.rotated(graph, q)
        k = self.rotated(graph, k)
        scores = [
            graph.product(q, keys, turn_y=1, factor=self.E ** -0.5) for keys in (old_k, k)
        ]
        scores = graph.op("Concat", *scores, axis=-1)                              # (B, H, R, C+R)
        share = graph.op("Softmax", graph.op("Add", scores, self.mask), axis=-1)
        room = graph.op("Shape", old_k, start=2, end=3)
        rows = graph.op("Shape", k, start=2, end=3)
        sizes = graph.op("Concat", room, rows, axis=0)
        of_old, of_new = graph.op("Split", share, sizes, results=2, axis=-1)
        y = graph.op("Add", graph.op("MatMul", of_old, old_v), graph.op("MatMul", of_new, v))
        return self.linear(graph, graph.together(y, self.cfg.d_model), p + "out_proj"), k, v

    def rotated(self, graph, x):
        """The rows of the table belong to the rows of x, from the first on."""
        return graph.fused("RotaryEmbedding", x, graph.ints(0), *self.table)


def build(cfg, parameters, products):
    """{name: the graph}, whose weights are in the products' file."""
    head = parameters["head.weight"]
    if products.bits != 32:
        parameters = blocks.even_layers(cfg, parameters)
    graphs = {}
    if cfg.model == "primary":
        eco = Eco(cfg, parameters, products)
        graphs["next"] = eco.graph("next", "one", False)
        if not cfg.causal or cfg.interlaced:
            graphs["tried"] = eco.graph("tried", "tried", False)
    graphs["rows"] = rows(cfg, parameters, products, "rows")
    graphs["head"] = products.head("head", head)
    if products.one_row:
        graphs["head_one"] = products.head("head_one", head)
        graphs["probe"] = products.probe()
        unsigned = copy.copy(products)
        unsigned.unsigned = True
        if products.bits == 8:
            graphs["rows_unsigned"] = rows(cfg, parameters, unsigned, "rows_unsigned")
        graphs["head_unsigned"] = unsigned.head("head_unsigned", head)
    return graphs


def rows(cfg, parameters, products, name):
    if cfg.model == "backup":
        return Transformer(cfg, parameters, products).graph(name)
    eco = Eco(cfg, parameters, products)
    if cfg.causal:
        return eco.graph(name, "chunk", False)
    return eco.graph(name, "any", "any")
