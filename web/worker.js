// The model in a thread of the browser's own, so that the page stays awake while it computes. Asked
// by transport.js; its answers are the events of the server's POST /steps.

import * as ort from "./onnxruntime.js";
import { generate, infill } from "./decode.js";
import { openModel } from "./model.js";
import { GappedText, Shown } from "./shown.js";
import { Tokenizer } from "./tokenizer.js";

const MOST_SEED = 2 ** 31;
const stopped = new Set();                      // requests that nobody waits for any more

async function read(name) {
  const response = await fetch(new URL(name, import.meta.url));
  if (!response.ok) throw new Error(`${name} is not beside this page: put the whole folder there`);
  return response.arrayBuffer();
}

const json = async (name) => JSON.parse(new TextDecoder().decode(await read(name)));

async function load() {
  const about = await json("model.json");
  const tokenizer = new Tokenizer(await json("tokenizer.json"));
  return { about, tokenizer, model: await openModel(ort, read) };
}

const loading = load();
let last = loading.catch(() => {});             // requests are answered one after the other

self.onmessage = ({ data: { id, asked, body } }) => {
  if (asked === "stop") {
    stopped.add(id);
    return;
  }
  const tell = (name, data) => self.postMessage({ id, name, data });
  last = last.then(async () => {
    try {
      const loaded = await loading;
      if (asked === "describe") tell("done", loaded.about);
      else await write(loaded, body, id, tell);
    } catch (error) {
      tell("error", { error: { message: error.message } });
    }
  });
};

// The settings of a body that the page sends: what it does not say is the checkpoint's.
function settingsOf(about, body, masked) {
  const settings = { ...about.settings, ...body };
  settings.max_new_tokens = masked ?? body.max_tokens;
  settings.seed = body.seed ?? Math.floor(Math.random() * MOST_SEED);
  settings.sampler = body.steps || masked ? "confidence" : body.sampler ?? settings.sampler;
  if (!body.steps) {
    // a rule that stops by itself may take a forward for each token
    const whole = masked || body.mode === "full";
    settings.steps = whole ? settings.max_new_tokens : settings.block_size;
  }
  return settings;
}

async function write({ about, tokenizer, model }, body, id, tell) {
  const gapped = body.text === undefined ? null : new GappedText(body.text, tokenizer);
  const ids = gapped?.ids ?? [tokenizer.bosId, ...tokenizer.encode(body.prompt)];
  if (about.shape.framed) ids.push(tokenizer.padId);
  const settings = settingsOf(about, body, gapped?.masked);
  const length = gapped ? ids.length : ids.length + settings.max_new_tokens;
  if (length > about.aria.max_length) {
    throw new Error(`prompt and new tokens are ${length}, this page writes `
      + `${about.aria.max_length} at most: ask for fewer`);
  }

  // the beginning
  let end = ids.length;
  if (!gapped) {
    const block = settings.mode === "full" ? Infinity : settings.block_size;
    end = Math.min(length, ids.length + (model.causal ? 1 : block));
  }
  const shown = new Shown(tokenizer, gapped ? null : settings.eos_id, gapped);
  const begun = { seed: settings.seed, notices: [], parts: shown.start(ids, end) };
  if (!gapped) begun.prompt = body.prompt + (about.shape.framed ? "\n" : "");
  tell("start", begun);

  // every forward
  const started = performance.now();
  const seconds = () => (performance.now() - started) / 1000;
  const onStep = async (canvas, lo, hi) => {
    const parts = shown.step(canvas, lo, hi);
    tell("step", { parts, forwards: canvas.forwards, seconds: seconds() });
    await pause();
    if (stopped.delete(id)) throw new Error("stopped");
  };
  const result = await (gapped ? infill : generate)(model, ids, settings, onStep);

  // the end
  let text = gapped?.filled(result.ids);
  if (!gapped) text = (about.shape.framed ? "" : body.prompt) + tokenizer.written(result.ids);
  tell("done", { text, forwards: result.forwards, seconds: seconds() });
}

// Let the page's messages in.
const { port1, port2 } = new MessageChannel();
function pause() {
  return new Promise((resolve) => {
    port1.onmessage = resolve;
    port2.postMessage(null);
  });
}
