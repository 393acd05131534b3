// Text out of a denoiser: the loop of sampling/decode.py and rules of sampling/unmasking.py, for one
// text at a time.
//
//     const { ids, forwards } = await generate(model, prompt, settings, onStep);
//     const { ids, forwards } = await infill(model, idsWithMasks, settings, onStep);
//
// settings has the names of sampling.settings.Settings. What is here:
//   modes     block_frozen (left to right in blocks of one token), block, full; gaps
//   rules     confidence with the linear schedule, threshold
//   tokens    temperature (0: greedy), top_k, top_p, repetition_penalty, guidance_scale; the frame
//             of a model of pairs (null_prompt); an end of text
// Not here: the other rules, drafts (speculate), remask, alg_temp, the cosine schedule. Greedy text
// is Python's. Draws are those of another generator, so a seed gives other text than in Python.
//
// model: maskId, padId, causal, newCache(), read(ids, cache), and as promises step(ids, cache),
// states(ids, cache), stepAndStates(ids, ids, cache) -> [state of each row], logits(states) ->
// [Float32Array (V,) of each]. web/model.js is one. onStep(canvas, lo, hi) is called, and waited
// for, after each forward.

const PLAUSIBLE = 0.1;  // of the best token's chance
const FINE = 1e6;  // chances that differ by less than one of so many parts are equal

export async function generate(model, prompt, asked, onStep) {
  let settings = asked;
  if (model.causal) {
    const guidance_scale = asked.null_prompt ? asked.guidance_scale : 1;
    settings = { ...asked, mode: "block_frozen", block_size: 1, guidance_scale };
  }
  const P = prompt.length;
  const T = P + settings.max_new_tokens;
  const canvas = newCanvas(model, prompt.concat(Array(T - P).fill(model.maskId)), settings);
  const text = { model, canvas, P, settings, cache: null, bare: null };

  // The cache, with the prompt in it; left to right, the first forward reads its last token
  if (settings.mode === "block_frozen") {
    text.cache = model.newCache();
    const known = isLeftToRight(settings) ? P - 1 : P;
    if (known) model.read(prompt.slice(0, known), text.cache);
    if (settings.guidance_scale !== 1 && settings.null_prompt) {
      text.bare = model.newCache();
      // left to right, the first forward reads the last token of both, which is the same one
      const end = isLeftToRight(settings) ? -1 : undefined;
      await model.step(settings.null_prompt.slice(0, end), text.bare);
    }
  }

  // Block after block
  let lo = P;
  while (lo < T && !canvas.done) {
    const size = settings.mode === "full" ? T - P : settings.block_size;
    const hi = Math.min(T, lo + size);
    await fillBlock(text, lo, hi, await forwardOfBlock(text, lo, hi), onStep);
    lo = hi;
  }
  const written = canvas.ids.slice(P, lo);
  const end = written.indexOf(settings.eos_id);
  return { ids: end < 0 ? written : written.slice(0, end + 1), forwards: canvas.forwards };
}

// Every mask of a text (BOS included) is filled, everything else stays -> the whole text.
export async function infill(model, ids, asked, onStep) {
  if (model.causal) throw new Error("this model sees only what stands before a gap: it fills none");
  const settings = { ...asked, mode: "full", eos_id: null, guidance_scale: 1 };
  const canvas = newCanvas(model, [...ids], settings);
  const text = { model, canvas, P: 1, settings, cache: null, bare: null };
  await fillBlock(text, 0, ids.length, forwardOf(text, 0, ids.length), onStep);
  return { ids: canvas.ids, forwards: canvas.forwards };
}

function newCanvas(model, ids, settings) {
  return {
    ids,
    maskId: model.maskId,
    chance: new Float32Array(ids.length).fill(1),     // of each token when it was chosen
    done: false,
    forwards: 0,
    uniform: generatorOf(settings.seed),
  };
}

function isLeftToRight(settings) {
  return settings.mode === "block_frozen" && settings.block_size === 1
    && (settings.guidance_scale === 1 || Boolean(settings.null_prompt));
}

// ---- the forward of a block ---------------------------------------------------------------------

// forwardOf, and the block before [lo, hi) joins the cache: in its first forward, or before it.
async function forwardOfBlock(text, lo, hi) {
  const { model, canvas, cache, bare, P, settings } = text;
  const forward = forwardOf(text, lo, hi);
  if (!cache || lo === P || isLeftToRight(settings)) return forward;
  const finished = canvas.ids.slice(lo - settings.block_size, lo);
  if (settings.guidance_scale !== 1) {
    await model.step(finished, cache);
    if (bare) await model.step(finished, bare);
    return forward;
  }
  let waits = true;
  return async () => {
    if (!waits) return forward();
    waits = false;
    return [await model.stepAndStates(finished, canvas.ids.slice(lo, hi), cache)];
  };
}

// A function -> [states of the positions [lo, hi)]; if guided, those without the prompt are second.
function forwardOf({ model, canvas, cache, bare, P, settings }, lo, hi) {
  const ids = canvas.ids;
  const guided = settings.guidance_scale !== 1;
  if (isLeftToRight(settings)) {
    return async () => {
      const sides = [await model.step([ids[lo - 1]], cache)];
      if (bare) sides.push(await model.step([ids[lo - 1]], bare));
      return sides;
    };
  }
  if (cache) {
    const context = guided ? bare ?? model.newCache() : null;
    return async () => {
      const block = ids.slice(lo, hi);
      const sides = [await model.states(block, cache)];
      if (guided) sides.push(await model.states(block, context));
      return sides;
    };
  }

  // nothing stands before the ids
  const empty = model.newCache();
  return async () => {
    const sides = [(await model.states(ids.slice(0, hi), empty)).slice(lo)];
    if (guided) {
      const nothing = settings.null_prompt ?? [ids[0], ...Array(P - 1).fill(model.maskId)];
      const states = await model.states([...nothing, ...ids.slice(P, hi)], empty);
      sides.push(states.slice(nothing.length + lo - P));
    }
    return sides;
  };
}

// ---- one block ----------------------------------------------------------------------------------

async function fillBlock({ model, canvas, settings }, lo, hi, forward, onStep) {
  const { ids, maskId } = canvas;
  const toDecide = places(ids, lo, hi, maskId).length;
  const steps = Math.min(settings.steps, toDecide);
  for (let step = 0; step < steps && !canvas.done; step++) {
    const masked = places(ids, lo, hi, maskId);
    if (!masked.length) break;

    // One forward, and what it says about every mask
    const sides = await forward();
    const logits = await readLogits(model, sides, masked.map((at) => at - lo), settings);
    canvas.forwards += 1;
    if (settings.repetition_penalty !== 1) discourage(logits, canvas, hi, settings);

    // Positions first, by what the model thinks; then their tokens
    const looks = logits.map(lookAt);
    let chosen = masked.map((_, i) => i);
    if (step + 1 < steps) {
      chosen = choose(looks, Math.ceil(masked.length / (steps - step)), settings);
    }
    for (const i of chosen) {
      const token = draw(logits[i], looks[i], settings, canvas.uniform);
      ids[masked[i]] = token;
      canvas.chance[masked[i]] = Math.exp(logits[i][token] - looks[i].top) / looks[i].mass;
    }

    // It is finished when an end of text stands and nothing before it is masked
    const end = ids.slice(lo, hi).indexOf(settings.eos_id);
    if (end >= 0 && !places(ids, lo, lo + end, maskId).length) canvas.done = true;
    await onStep?.(canvas, lo, hi);
  }
}

function places(ids, lo, hi, token) {
  const found = [];
  for (let at = lo; at < hi; at++) if (ids[at] === token) found.push(at);
  return found;
}

async function readLogits(model, sides, rows, settings) {
  const found = [];
  for (const states of sides) found.push(await model.logits(rows.map((row) => states[row])));
  const [logits, without] = found;
  if (!without) return logits;

  // Guidance: away from what the model says without the prompt, and no unlikely token is lifted
  return logits.map((given, i) => {
    const here = logSoftmax(given);
    const there = logSoftmax(without[i]);
    const likely = Math.fround(lookAt(here).top + Math.log(PLAUSIBLE));
    const guided = (v) => {
      const z = there[v] + settings.guidance_scale * (here[v] - there[v]);
      return settings.guidance_scale > 1 && here[v] < likely ? Math.min(z, here[v]) : z;
    };
    return given.map((logit, v) => (logit === -Infinity ? logit : guided(v)));
  });
}

function logSoftmax(logits) {
  const { top, mass } = lookAt(logits);
  return logits.map((z) => z - top - Math.log(mass));
}

// Tokens that stand in the text lose, whatever their sign.
function discourage(logits, canvas, hi, settings) {
  const seen = new Set(canvas.ids.slice(0, hi));
  seen.delete(canvas.maskId);
  for (const one of logits) {
    for (const token of seen) {
      if (one[token] > 0) one[token] /= settings.repetition_penalty;
      else one[token] *= settings.repetition_penalty;
    }
  }
}

// ---- the rules: which positions, the surest first -----------------------------------------------

// What the model thinks of one position. mass: of all tokens, in multiples of the best one.
function lookAt(logits) {
  let best = 0;
  for (let v = 1; v < logits.length; v++) if (logits[v] > logits[best]) best = v;
  const top = logits[best];
  let mass = 0;
  for (let v = 0; v < logits.length; v++) mass += Math.exp(logits[v] - top);
  if (!Number.isFinite(mass)) {
    throw new Error("the model returned NaN or infinity: its files are damaged, export it again");
  }
  return { best, top, mass, sure: Math.fround(1 / Math.fround(mass)) };
}

const RULES = {
  confidence: (looks, count) => surest(looks).slice(0, count),
  threshold: (looks, count, settings) => {
    const enough = looks.filter((look) => look.sure >= settings.threshold).length;
    return surest(looks).slice(0, Math.max(1, enough));
  },
};

// Of equals the first; what rounding alone sets apart is equal.
function surest(looks) {
  const sure = looks.map((look) => Math.floor(look.sure * FINE + 0.5));
  return looks.map((_, i) => i).sort((a, b) => sure[b] - sure[a] || a - b);
}

// In the answer of a model of pairs nothing behind the first end that it guesses, and the end only
// with all before it.
function choose(looks, count, settings) {
  const rule = RULES[settings.sampler];
  const end = looks.findIndex((look) => look.best === settings.eos_id);
  if (!settings.null_prompt || end < 0) return rule(looks, count, settings);
  const chosen = rule(looks.slice(0, end + 1), count, settings);
  if (chosen.length === end + 1) return chosen;
  return rule(looks.slice(0, end), count, settings);
}

// ---- the tokens ---------------------------------------------------------------------------------

function draw(logits, look, settings, uniform) {
  if (settings.temperature === 0) return look.best;
  const p = distribution(logits, look.top, settings);
  let total = 0;
  for (const chance of p) total += chance;

  // the first token whose mass, together with all before it, is above the draw
  const bound = uniform() * total;
  let mass = 0;
  for (let v = 0; v < p.length; v++) {
    mass += p[v];
    if (mass > bound) return v;
  }
  return look.best;
}

// Probabilities after temperature, top_k, top_p; they need not sum to 1.
export function distribution(logits, top, { temperature, top_k, top_p }) {
  const V = logits.length;
  const z = Float64Array.from(logits, (logit) => (logit - top) / temperature);
  let least = -Infinity;
  if (top_k && top_k < V) least = z.slice().sort()[V - top_k];
  const p = z.map((one) => (one < least ? 0 : Math.exp(one)));
  if (top_p >= 1) return p;

  // keep until the mass before a token reaches top_p. All that is below the bound together has too
  // little to be kept, so it need not be sorted.
  const total = p.reduce((sum, one) => sum + one, 0);
  const bound = total * (1 - top_p) / V;
  const order = [...p.keys()].filter((v) => p[v] >= bound).sort((a, b) => p[b] - p[a] || a - b);
  const kept = new Float64Array(V);
  let before = 0;
  for (const v of order) {
    if (before >= top_p * total) break;
    kept[v] = p[v];
    before += p[v];
  }
  return kept;
}

// Uniform draws from [0, 1): a counter, and its bits mixed by two multiplications.
function generatorOf(seed) {
  let count = (seed ^ Math.floor(seed / 2 ** 32)) | 0;
  return () => {
    count = (count + 0x9e3779b9) | 0;
    let bits = Math.imul(count ^ (count >>> 16), 0x21f0aaad);
    bits = Math.imul(bits ^ (bits >>> 15), 0x735a2d97);
    return ((bits ^ (bits >>> 15)) >>> 0) / 2 ** 32;
  };
}
