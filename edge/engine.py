"""Runs an exported model without PyTorch: an engine as sampling/decode.py sees one.

    engine = load("exports/hindi")          # what python -m export wrote
    cache = engine.new_cache(batch, length)
    states = engine.step(ids, cache)        # (B, T) int64 -> (B, T, D) float32
    logits = engine.logits(states, rows, positions)                     # (N, V)

Needs numpy and onnxruntime. Threads are set once, for the first engine of a process; no thread
waits busily for the next call.

Legend: B batch, T clean rows, S block, R rows of both streams, D width, V vocabulary rows, C
positions of the transformer's cache, E head size, N rows of any kind.
"""
import copy
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

try:
    import onnxruntime
    from onnxruntime import OrtValue
except ModuleNotFoundError:
    onnxruntime = None      # load() says what to install

from common.console import Damage, UserError
from common.files import file_sha256, read_json
from edge import blocks, drafts
from model_config import ModelConfig

FORMAT = "aria-edge-4"
MANIFEST = "MANIFEST.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.model"
WEIGHTS = "weights.bin"
DRAFTS = "drafts.bin"
AGAIN = "write it again with python -m export"
SHORT = 16             # rows of a text's beginning that are read one by one: no graph for many
                       # rows has to be opened, which takes longer and as much memory again
PROMPT_ROWS = 256      # rows of a transformer's prompt at once
HIDDEN = -1e30         # what is added to the score of a key that a row must not see


# ---- the folder ----------------------------------------------------------------------------------

def is_export(folder):
    """Is this a folder that python -m export wrote, whole or damaged?"""
    return (Path(folder) / WEIGHTS).is_file() or (
        (Path(folder) / MANIFEST).is_file() and not (Path(folder) / "state.json").exists()
    )


def read_manifest(folder):
    """The checked manifest of an exported folder: its format is ours, its files have their hashes.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} is no exported model, as it has no {MANIFEST}: {AGAIN}")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{folder} is of format {manifest.get('format')}, this version reads {FORMAT}: {AGAIN}"
        )
    files = manifest.get("files")
    if not isinstance(files, dict) or not {CONFIG, TOKENIZER, WEIGHTS} <= set(files):
        raise Damage(f"{folder / MANIFEST} does not list the files of a model: {AGAIN}")
    for name, entry in files.items():
        path = folder / name
        if Path(name).name != name or not isinstance(entry, dict):
            raise Damage(f"{folder / MANIFEST} lists {name!r}, which is no file of it: {AGAIN}")
        if not path.is_file():
            raise Damage(f"{path} is missing: {AGAIN}")
        if path.stat().st_size != entry.get("bytes") or file_sha256(path) != entry.get("sha256"):
            raise Damage(f"{path} is damaged, it is not the file that was exported: {AGAIN}")
    return manifest


def load(folder, threads=None):
    """An exported folder -> its engine."""
    if onnxruntime is None:
        raise UserError(
            "the package onnxruntime is needed to run an exported model: python -m pip install -r "
            "requirements_edge.txt",
            code=3,
        )
    folder = Path(folder)
    manifest = read_manifest(folder)
    config = read_json(folder / CONFIG)
    if not all(isinstance(config.get(part), dict) for part in ("model", "args")):
        raise Damage(f"{folder / CONFIG} does not say what was trained: {AGAIN}")
    shape = ModelConfig.from_dict(config["model"])
    engine = {"primary": EcoEngine, "backup": TransformerEngine}[shape.model]
    return engine(folder, shape, manifest, config, threads)


@dataclass
class Machine:
    """What an older CPU does worse (graphs.Products)."""
    cuts_off: bool = False      # products of unsigned with signed bytes are not exact
    slow_row: bool = False      # the way for one row makes float32 of all weights, each time


# ---- what both engines are -----------------------------------------------------------------------

class Engine:
    """The sessions of a folder's graphs, each made when it is first used."""

    exact_rows = True

    def __init__(self, folder, cfg, manifest, config, threads):
        self.folder = folder
        self.cfg = cfg
        self.manifest = manifest
        self.config = config
        self.threads = threads or default_threads()
        self.sessions = {}
        self.tried = None       # the states of the last try_step, whose rows are each as one row
        self.never = [cfg.pad_id, cfg.mask_id]
        # numbers of the folder, so that a seed keeps its text
        for name in ("round_cost", "try_cost"):
            if name in manifest:
                setattr(self, name, manifest[name])

    @cached_property
    def drafts(self):
        """The table of drafts, or None."""
        if DRAFTS not in self.manifest["files"] or self.machine.slow_row:
            return None
        return drafts.Drafts(drafts.read(self.folder / DRAFTS, self.manifest["drafts"]))

    def tokenizer_bytes(self):
        return (self.folder / TOKENIZER).read_bytes()

    def session(self, name):
        if name not in self.sessions:
            self.sessions[name] = self.open(self.suitable(name))
        return self.sessions[name]

    def has(self, name):
        """Is there a graph of this name?"""
        return f"{name}.onnx" in self.manifest["files"]

    @cached_property
    def machine(self):
        """How this machine multiplies bytes, by products whose right answers are known."""
        if not self.has("probe"):
            return Machine()
        found = self.run("probe", {})
        return Machine(
            cuts_off=bool(found["bytes"].min() < 31.9),
            slow_row=bool(found["blocks"].max() > 32.05),
        )

    def suitable(self, name):
        """The graph of this name that is right on this machine."""
        unsigned = f"{name}_unsigned"
        if self.has(unsigned) and self.machine.cuts_off:
            return unsigned
        return name

    def open(self, name):
        """A session of one graph, and the names of its results."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # the graphs are fused as they are written: a search for more takes longer than it gives
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if a_core_is_free():
            # between the products of a call a thread waits busily, as waking it takes longer than a
            # product of one row; between calls all sleep
            options.add_session_config_entry("session.force_spinning_stop", "1")
        else:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        made = self.made_weights(name)
        options.add_external_initializers(list(made), list(made.values()))
        path = self.folder / f"{name}.onnx"
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the runtime raises many types
            first_line = (str(error).splitlines() or ["it gives no reason"])[0]
            raise UserError(
                f"onnxruntime {onnxruntime.__version__} cannot run {path} ({first_line}): install "
                "the version of requirements_edge.txt, or export with other --bits"
            ) from None
        return session, [result.name for result in session.get_outputs()]

    def made_weights(self, name):
        """What a graph wants in another form than it has in the file: {tensor: its value}."""
        file = np.memmap(self.folder / WEIGHTS, np.uint8, "r")
        found = {}
        for form, make in blocks.FORMS.items():
            for tensor, place in self.manifest.get(form, {}).get(name, {}).items():
                found[tensor] = OrtValue.ortvalue_from_numpy(make(file, *place))
        return found

    def run(self, name, feeds):
        """The results of a graph by their names."""
        session, names = self.session(name)
        return dict(zip(names, session.run(names, feeds), strict=True))

    def logits(self, states, rows, positions):
        """(B, R, D), whose (N,) rows and (N,) positions are asked -> (N, V); the mask's and the
        pad's logit is -inf.

        Which graph is asked says the number of rows of a text, not that of the texts: what else is
        in the batch changes no number.
        """
        # which of the two is for a row's text to say, not for the other rows of the batch
        name = "head"
        single = states.shape[1] == 1 or states is self.tried
        if single and self.has("head_one") and not self.machine.slow_row:
            name = "head_one"
        z = self.run(name, {"states": states[rows, positions]})["logits"]          # (N, V)
        z[:, self.never] = -np.inf
        return z

    def start(self, batch):
        """What opens every text: the mask's row (B, 1)."""
        return np.full((batch, 1), self.cfg.mask_id, np.int64)

    def all_layers(self, depth):
        if depth not in (None, self.cfg.n_layers):
            raise UserError(
                "an exported model runs all its layers: leave out --min_decode_layers, or use the "
                "checkpoint"
            )


def default_threads():
    """The cores that this process may use, at most 8: a short product gains nothing from more."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1
    return min(cores, 8)


def a_core_is_free():
    """Has the machine less to do than it has cores? A thread that waits busily for one without a
    core makes everything slower.
    """
    try:
        return os.getloadavg()[0] < os.cpu_count()
    except (AttributeError, OSError):  # Windows
        return True


def whole(ids):
    return np.ascontiguousarray(ids, np.int64)


# ---- EcoHybrid -----------------------------------------------------------------------------------

class EcoCache:
    """As in eco_hybrid.py: per layer num (B, H, M, E) and halo (B, r + 1, D), in lists.

    `waiting`: tokens that have joined the context in name, and are read together with what comes
    next. `bound`: the graph `next` tied to these very arrays, which it changes in place.
    """

    def __init__(self, engine, batch):
        cfg = engine.cfg
        self.engine = engine
        sums = (batch, cfg.n_heads, cfg.memory_slots, cfg.d_mem // cfg.n_heads)
        last = (batch, cfg.conv_kernel // 2 + 1, cfg.d_model)
        self.num = [np.zeros(sums, np.float32) for _ in range(cfg.n_layers)]
        self.halo = [np.zeros(last, np.float32) for _ in range(cfg.n_layers)]
        self.front = None               # the last token that was read (B, 1)
        self.length = 0                 # rows that were read, the start included
        self.waiting = None             # (B, T)
        self.tried = None               # what try_step read (1, T), and the states behind each
        self.bound = None

    @property
    def nbytes(self):
        return sum(array.nbytes for array in (*self.num, *self.halo))

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.num = [array[rows] for array in self.num]
        self.halo = [array[rows] for array in self.halo]
        self.front = self.front[rows]
        if self.waiting is not None:
            self.waiting = self.waiting[rows]
        self.bound = None

    def beside(self, other):
        """A cache of the rows of both: the two sides of guidance in one batch."""
        self.engine.settle(self)
        self.engine.settle(other)
        both = copy.copy(self)
        both.num = [np.concatenate(pair) for pair in zip(self.num, other.num, strict=True)]
        both.halo = [np.concatenate(pair) for pair in zip(self.halo, other.halo, strict=True)]
        both.front = np.concatenate((self.front, other.front))
        both.bound = None
        return both

    def feeds(self):
        named = {f"num_{i}": array for i, array in enumerate(self.num)}
        for i, array in enumerate(self.halo):
            named[f"halo_{i}"] = array
        return named

    def take(self, found, x0):
        """The state behind the clean rows x0 (B, T) becomes the cache's."""
        for i in range(len(self.num)):
            np.copyto(self.num[i], found[f"new_num_{i}"])
            np.copyto(self.halo[i], found[f"new_halo_{i}"])
        self.joined(x0)

    def joined(self, x0):
        """The rows x0 (B, T) are part of the context."""
        self.front = x0[:, -1:]
        self.length += x0.shape[1]

    def wait(self, x0):
        """The rows x0 (B, T) join, and are read when something is asked."""
        if self.waiting is not None:
            self.waiting = np.concatenate((self.waiting, x0), axis=1)
        else:
            self.waiting = x0.copy()
        self.joined(x0)

    def keep(self, tokens):
        """The first so many tokens of the last try_step join the context."""
        x0, found = self.tried
        self.tried = None
        rows = tokens
        if self.waiting is not None:    # they were read in front
            rows += self.waiting.shape[1]
            self.waiting = None
        at = slice(rows - 1, rows)
        for i in range(len(self.num)):
            np.divide(found[f"new_num_{i}"][at], found[f"grown_{i}"][at], out=self.num[i])
            behind = found[f"new_halo_{i}"][:, rows:]
            np.copyto(self.halo[i], behind[:, :self.halo[i].shape[1]])
        self.joined(x0[:, :tokens])

    def with_waiting(self, x0):
        """Clean rows (B, T), behind those that wait -> all of them, how many have waited."""
        if self.waiting is None:
            return x0, 0
        ids = np.concatenate((self.waiting, x0), axis=1)
        waited = self.waiting.shape[1]
        self.waiting = None
        self.length -= waited           # take() counts them
        return ids, waited


class OneRow:
    """The graph `next` with the arrays of one cache bound to it: a token costs no copy, as the new
    state is written where the old one was read.
    """

    def __init__(self, session, cache, width):
        batch = len(cache.num[0])
        self.session = session
        self.ids = np.zeros((batch, 1), np.int64)
        self.answers = np.zeros((batch, 1, width), np.float32)
        self.binding = session.io_binding()
        tied = cache.feeds()
        for name, array in (*tied.items(), ("clean", self.ids)):
            self.binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, array in tied.items():
            self.binding.bind_ortvalue_output(f"new_{name}", OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_ortvalue_output("answers", OrtValue.ortvalue_from_numpy(self.answers))

    def run(self, x0):
        """(B, 1) -> (B, 1, D)."""
        self.ids[:] = x0
        self.session.run_with_iobinding(self.binding)
        return self.answers.copy()


class EcoEngine(Engine):
    """EcoHybrid's graphs: `next` for one clean row, `tried` for a few of one text that may leave
    again, `rows` for everything else. Each keeps its own copy of the weights in memory, so what is
    not asked for is not opened.
    """

    def empty_cache(self, batch, length):
        """A cache in which not even the start is."""
        return EcoCache(self, batch)

    def new_cache(self, batch, length):
        cache = self.empty_cache(batch, length)
        cache.wait(self.start(batch))
        return cache

    def read(self, x0, cache):
        """The next tokens (B, T) join the context, and nobody asks for their states."""
        cache.wait(whole(x0))

    def settle(self, cache):
        """What waits is read now."""
        if cache.waiting is not None:
            self.step(cache.waiting[:, :0], cache)

    def rows(self, cache, clean=None, noisy=None):
        """Clean rows (B, T), a noisy block with its front row (B, S + 1), or both, behind the
        cache, which the clean ones join -> states.
        """
        nothing = np.zeros((len(cache.num[0]), 0), np.int64)
        feeds = cache.feeds()
        feeds["clean"] = nothing if clean is None else clean
        if not self.cfg.causal:
            feeds["noisy"] = nothing if noisy is None else noisy
        found = self.run("rows", feeds)
        if clean is not None:
            cache.take(found, clean)
        return found["answers"]

    def step(self, x0, cache):
        opens = cache.waiting is not None and cache.length == cache.waiting.shape[1]
        ids, waited = cache.with_waiting(whole(x0))
        T = ids.shape[1]
        answers = []
        one_by_one = T == 1 or (opens and T <= SHORT)
        if one_by_one and not self.machine.slow_row:
            for t in range(T):
                answers.append(self.next_row(ids[:, t:t + 1], cache))
        else:
            most = self.manifest["chunk"]
            for first in range(0, T, most):
                clean = np.ascontiguousarray(ids[:, first:first + most])
                answers.append(self.rows(cache, clean))
        if len(answers) > 1:
            answers = [np.concatenate(answers, axis=1)]
        return answers[0][:, waited:]                                              # (B, T, D)

    def next_row(self, x0, cache):
        """One clean row (B, 1)."""
        if cache.bound is None:
            session, _ = self.session("next")
            cache.bound = OneRow(session, cache, self.cfg.d_model)
        cache.joined(x0)
        return cache.bound.run(x0)

    def try_step(self, x0, cache):
        x0 = whole(x0)
        clean = x0
        if cache.waiting is not None and cache.waiting.shape[1] > SHORT:
            self.settle(cache)
        if cache.waiting is not None:
            clean = np.concatenate((cache.waiting, x0), axis=1)
        found = self.run("tried", cache.feeds() | {"clean": clean})
        cache.tried = (x0, found)
        self.tried = found["answers"][:, -x0.shape[1]:]
        return self.tried

    def states(self, xt, cache, depth=None):
        self.all_layers(depth)
        if cache.waiting is not None:
            return self.step_and_states(cache.waiting[:, :0], xt, cache)
        noisy = np.concatenate((cache.front, whole(xt)), axis=1)                   # (B, S + 1)
        return self.rows(cache, noisy=noisy)

    def step_and_states(self, x0, xt, cache):
        x0, _ = cache.with_waiting(whole(x0))
        most = self.manifest["chunk"]
        ahead = (x0.shape[1] - 1) // most * most
        if ahead:
            self.step(x0[:, :ahead], cache)
            x0 = np.ascontiguousarray(x0[:, ahead:])
        noisy = np.concatenate((x0[:, -1:], whole(xt)), axis=1)
        return self.rows(cache, x0, noisy)


# ---- the transformer -----------------------------------------------------------------------------

class KVCache:
    """As in model.py: keys and values of each layer (B, H, C, E), preallocated. A text that is
    longer slides; `held` counts the positions that are there.
    """

    def __init__(self, cfg, batch, room):
        shape = (batch, cfg.n_heads, room, cfg.d_model // cfg.n_heads)
        self.k = [np.zeros(shape, np.float32) for _ in range(cfg.n_layers)]
        self.v = [np.zeros(shape, np.float32) for _ in range(cfg.n_layers)]
        self.front = None
        self.tried = None               # what try_step read (B, T)
        self.length = 0
        self.held = 0

    @property
    def room(self):
        return self.k[0].shape[2]

    @property
    def nbytes(self):
        return sum(array.nbytes for array in (*self.k, *self.v))

    def select(self, rows):
        """Keep only these rows of the batch."""
        self.k = [np.ascontiguousarray(array[rows]) for array in self.k]
        self.v = [np.ascontiguousarray(array[rows]) for array in self.v]
        self.front = self.front[rows]

    def make_room(self, tokens):
        """Before so many tokens are read: if they do not fit, the oldest leave."""
        if tokens > self.room:
            raise ValueError(f"the cache holds {self.room} positions, {tokens} come at once")
        gone = self.held + tokens - self.room
        if gone > 0:
            self.held -= gone
            for array in (*self.k, *self.v):
                array[:, :, :self.held] = array[:, :, gone:gone + self.held].copy()

    def feeds(self):
        named = {f"k_{i}": array for i, array in enumerate(self.k)}
        for i, array in enumerate(self.v):
            named[f"v_{i}"] = array
        return named

    def write(self, found, T):
        """The keys and values of T clean rows, a graph's first ones, behind what is held; they
        count only after advance().
        """
        end = self.held + T
        for i in range(len(self.k)):
            self.k[i][:, :, self.held:end] = found[f"new_k_{i}"][:, :, :T]
            self.v[i][:, :, self.held:end] = found[f"new_v_{i}"][:, :, :T]

    def advance(self, x0):
        self.held += x0.shape[1]
        self.length += x0.shape[1]
        self.front = x0[:, -1:]

    def take(self, found, x0):
        """The clean rows x0 (B, T), a graph's first ones, join it."""
        self.write(found, x0.shape[1])
        self.advance(x0)

    def keep(self, tokens):
        """The first so many tokens of the last try_step join the context: they stand behind it."""
        self.advance(self.tried[:, :tokens])
        self.tried = None


class TransformerEngine(Engine):
    """The transformer's one graph: its rows see the cache and each other as a mask says."""

    def empty_cache(self, batch, length):
        """A cache in which not even the start is."""
        return KVCache(self.cfg, batch, length + 1)

    def new_cache(self, batch, length):
        cache = self.empty_cache(batch, length)
        self.step(self.start(batch), cache)
        return cache

    def rows(self, ids, clean, cache):
        """ids (B, R) of so many clean rows and a noisy block with its front row -> the graph's
        results.
        """
        R = ids.shape[1]
        noisy = R - clean
        positions = np.arange(cache.length, cache.length + clean)
        if noisy:
            front = cache.length + clean - 1
            positions = np.concatenate((positions, np.arange(front, front + noisy)))
        cos, sin = rotary_table(positions, self.cfg.d_model // self.cfg.n_heads)
        mask = self.mask(R, clean, cache)
        feeds = {"ids": ids, "cos": cos, "sin": sin, "mask": mask, **cache.feeds()}
        return self.run("rows", feeds)

    @staticmethod
    def mask(R, clean, cache):
        """What R rows see of [the cache, the rows] (R, C + R): clean rows what is before them,
        noisy ones all but their front row's key.
        """
        seen = np.zeros((R, cache.room + R), bool)
        seen[:, :cache.held] = True
        own = seen[:, cache.room:]                                                 # (R, R)
        own[:, :clean] = np.tri(R, clean, dtype=bool)
        own[clean:, clean + 1:] = True
        return np.where(seen, 0, HIDDEN).astype(np.float32)

    def step(self, x0, cache):
        x0 = whole(x0)
        cache.make_room(x0.shape[1])
        answers = []
        for first in range(0, x0.shape[1], PROMPT_ROWS):
            rows = np.ascontiguousarray(x0[:, first:first + PROMPT_ROWS])
            found = self.rows(rows, rows.shape[1], cache)
            cache.take(found, rows)
            answers.append(found["answers"])
        if len(answers) == 1:
            return answers[0]
        return np.concatenate(answers, axis=1)

    def try_step(self, x0, cache):
        x0 = whole(x0)
        if cache.held + x0.shape[1] > cache.room:
            raise ValueError("the oldest positions would leave the cache, and cannot come back")
        found = self.rows(x0, x0.shape[1], cache)
        cache.write(found, x0.shape[1])
        cache.tried = x0
        return found["answers"]

    def states(self, xt, cache, depth=None):
        self.all_layers(depth)
        ids = np.concatenate((cache.front, whole(xt)), axis=1)
        return self.rows(ids, 0, cache)["answers"][:, :-1]

    def step_and_states(self, x0, xt, cache):
        x0 = whole(x0)
        cache.make_room(x0.shape[1])
        ids = np.concatenate((x0, x0[:, -1:], whole(xt)), axis=1)
        clean = x0.shape[1]
        found = self.rows(ids, clean, cache)
        cache.take(found, x0)
        return found["answers"][:, clean:-1]


def rotary_table(positions, head_size, base=10_000.0):
    """cos and sin for integer positions (N,) -> two float32 arrays (N, E/2), as in layers.py."""
    inverse = base ** (-np.arange(0, head_size, 2) / head_size)                    # (E/2,)
    angle = positions[:, None] * inverse
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
