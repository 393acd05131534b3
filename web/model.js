// An exported model in the browser: what edge/engine.py is to ONNX Runtime, for one text at a time.
//
//     const model = await openModel(ort, read);            // read(name) -> promise of an ArrayBuffer
//     const cache = model.newCache();
//     const states = await model.step(ids, cache);         // a Float32Array (D,) for each of the ids
//     const logits = await model.logits(states);           // a Float32Array (V,) for each of them
//
// ort: the package onnxruntime-web.

const WEIGHTS = "weights.bin";
// `next` gives a token of its own nothing here, and would be another copy of the weights.
const GRAPHS = ["rows", "head"];
const WIDENED = "widened";  // the file of matrices that become float32, which is made here
const CODE_OF_0 = 128;  // of an unsigned byte

export async function openModel(ort, read) {
  const parse = (bytes) => JSON.parse(new TextDecoder().decode(bytes));
  const { shape } = parse(await read("model.json"));
  const manifest = parse(await read("MANIFEST.json"));
  const weights = new Uint8Array(await read(WEIGHTS));
  const model = new EcoModel(ort, shape, manifest, weights);
  for (const name of GRAPHS) await model.open(name, new Uint8Array(await read(`${name}.onnx`)));
  model.weights = null;                         // each graph has its own copy
  return model;
}

class EcoModel {
  constructor(ort, shape, manifest, weights) {
    this.ort = ort;
    this.shape = shape;
    this.manifest = manifest;
    this.weights = weights;
    this.sessions = {};
    this.causal = shape.causal;
    this.maskId = shape.vocab_size;
    this.padId = shape.pad ? 0 : this.maskId;
  }

  // ---- graphs -----------------------------------------------------------------------------------

  async open(name, graph) {
    this.sessions[name] = await this.ort.InferenceSession.create(graph, {
      executionProviders: ["wasm"],
      graphOptimizationLevel: "disabled",       // the graphs are fused as they are written
      logSeverityLevel: 3,
      externalData: [
        { path: WEIGHTS, data: this.weights },
        { path: WIDENED, data: this.widenedFor(name) },
      ],
    });
  }

  // The matrices that a graph wants in float32, turned around, one after the other, as
  // blocks.widened in edge/ makes each of its bytes.
  widenedFor(name) {
    const asked = Object.values(this.manifest.widened[name] ?? {});
    const size = asked.reduce((total, [, outputs, , inputs]) => total + outputs * inputs, 0);
    const found = new Float32Array(size);
    let at = 0;
    for (const [place, outputs, row, inputs] of asked) {
      for (let i = 0; i < inputs; i++) {
        for (let o = 0; o < outputs; o++) {
          found[at++] = this.weights[place + o * row + i] - CODE_OF_0;
        }
      }
    }
    return new Uint8Array(found.buffer);
  }

  tokens(ids) {
    return new this.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  }

  rowsOf(tensor) {
    const width = tensor.dims.at(-1);
    const rows = [];
    for (let at = 0; at < tensor.data.length; at += width) {
      rows.push(tensor.data.subarray(at, at + width));
    }
    return rows;
  }

  async logits(states) {
    const width = states[0].length;
    const all = new Float32Array(states.length * width);
    states.forEach((state, i) => all.set(state, i * width));
    const found = await this.sessions.head.run({
      states: new this.ort.Tensor("float32", all, [states.length, width]),
    });
    const rows = this.rowsOf(found.logits);
    for (const row of rows) row[this.maskId] = row[this.padId] = -Infinity;
    return rows;
  }

  // ---- the cache --------------------------------------------------------------------------------

  // state: what the graphs make of the context. waiting: ids that have joined it in name, and are
  // read together with what comes next. front: its last id.
  newCache() {
    const { n_layers, n_heads, memory_slots, d_mem, d_model, conv_kernel } = this.shape;
    const state = {};
    for (let i = 0; i < n_layers; i++) {
      state[`num_${i}`] = this.zeros(1, n_heads, memory_slots, d_mem / n_heads);
      state[`halo_${i}`] = this.zeros(1, Math.floor(conv_kernel / 2) + 1, d_model);
    }
    return { state, waiting: [this.maskId], front: this.maskId };
  }

  zeros(...dims) {
    const size = dims.reduce((product, n) => product * n);
    return new this.ort.Tensor("float32", new Float32Array(size), dims);
  }

  // All ids that are to be read now: those that wait, and these.
  withWaiting(cache, ids) {
    const all = [...cache.waiting, ...ids];
    cache.waiting = [];
    cache.front = all.at(-1);
    return all;
  }

  // ---- what decode.js asks for ------------------------------------------------------------------

  // Ids join the context, and nobody asks for their states.
  read(ids, cache) {
    cache.waiting = cache.waiting.concat(ids);
    cache.front = ids.at(-1);
  }

  async step(ids, cache) {
    const waited = cache.waiting.length;
    const all = this.withWaiting(cache, ids);
    const most = this.manifest.chunk;
    const answers = [];
    for (let first = 0; first < all.length; first += most) {
      answers.push(...await this.rows(cache, all.slice(first, first + most), []));
    }
    return answers.slice(waited);
  }

  // The states of a noisy block behind the context.
  async states(ids, cache) {
    if (cache.waiting.length) return this.stepAndStates([], ids, cache);
    return this.rows(cache, [], [cache.front, ...ids]);
  }

  // Clean ids join the context -> the states of a noisy block behind them.
  async stepAndStates(clean, ids, cache) {
    const all = this.withWaiting(cache, clean);
    const most = this.manifest.chunk;
    const ahead = Math.floor((all.length - 1) / most) * most;
    if (ahead) await this.step(all.slice(0, ahead), cache);
    cache.front = all.at(-1);
    return this.rows(cache, all.slice(ahead), [cache.front, ...ids]);
  }

  async rows(cache, clean, noisy) {
    const feeds = { ...cache.state, clean: this.tokens(clean) };
    if (!this.causal) feeds.noisy = this.tokens(noisy);
    const found = await this.sessions.rows.run(feeds);
    if (clean.length) {
      for (const part of Object.keys(cache.state)) cache.state[part] = found[`new_${part}`];
    }
    return this.rowsOf(found.answers);
  }
}
