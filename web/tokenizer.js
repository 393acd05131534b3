// Text to ids and back, as text/tokenizer.py does it, out of the tokenizer.json that
// hf/tokenizer_json.py makes: its normaliser, BPE, and bytes for letters that are no piece.
//
//     const tokenizer = new Tokenizer(JSON.parse(text));
//     tokenizer.decode(tokenizer.encode("भारत"))           // "भारत"
//
// No id of a special piece comes out of a text: "<s>" and "<mask>" stay text.

const SPACE = "\u2581";
const PAD = 0;
const BOS = 2;
const EOS = 3;
// what belongs to the letter before it: marks, joiners, skin tones
const JOINS = /^[\p{M}\u200c\u200d\u{1f3fb}-\u{1f3ff}]+/u;

export class Tokenizer {
  constructor(json) {
    this.ids = new Map(Object.entries(json.model.vocab));
    this.pieces = [];
    for (const [piece, id] of this.ids) this.pieces[id] = piece;
    this.maskId = this.ids.get("<mask>");
    [this.padId, this.bosId, this.eosId] = [PAD, BOS, EOS];

    this.ranks = new Map();                     // "left right" -> when this pair is merged
    json.model.merges.forEach(([left, right], rank) => this.ranks.set(`${left} ${right}`, rank));
    this.words = new Map();                     // those that were encoded: word -> ids

    this.steps = json.normalizer.normalizers.map(normaliserStep);
    // no piece goes across a line break, nor, as a rule, across the beginning of a word
    const cutsAtSpaces = json.pre_tokenizer.pretokenizers.length > 1;
    this.parts = cutsAtSpaces ? /\n|\u2581?[^\n\u2581]+|\u2581/gu : /\n|[^\n]+/gu;
  }

  normalise(text) {
    text = text.replace(/\p{Surrogate}/gu, "\ufffd");     // half of a letter
    for (const step of this.steps) text = step(text);
    return text;
  }

  encode(text) {
    const ids = [];
    for (const word of this.normalise(text).match(this.parts) ?? []) {
      if (!this.words.has(word)) this.words.set(word, this.merged(word));
      for (const id of this.words.get(word)) ids.push(id);
    }
    return ids;
  }

  // The ids of one word: neighbours are merged, the pair of the lowest rank first, and of equals
  // the leftmost.
  merged(word) {
    const parts = [];
    for (const letter of word) {
      if (this.ids.has(letter)) parts.push(letter);
      else parts.push(...bytesOf(letter));
    }
    const rank = (i) => this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
    const ranks = parts.map((_, i) => rank(i));
    for (;;) {
      let best = 0;
      for (let i = 1; i < ranks.length; i++) if (ranks[i] < ranks[best]) best = i;
      if (!(ranks[best] < Infinity)) break;
      parts.splice(best, 2, parts[best] + parts[best + 1]);
      ranks.splice(best, 1);
      ranks[best] = rank(best);
      if (best > 0) ranks[best - 1] = rank(best - 1);
    }
    return parts.map((part) => this.ids.get(part));
  }

  // Special pieces and the mask are left out.
  decode(ids) {
    const bytes = [];
    for (const id of ids) {
      if (id <= EOS || id >= this.maskId) continue;
      const piece = this.pieces[id];
      const byte = piece.match(/^<0x(..)>$/);
      if (byte) bytes.push(parseInt(byte[1], 16));
      else for (const one of UTF8.encode(piece.replaceAll(SPACE, " "))) bytes.push(one);
    }
    return textOf(Uint8Array.from(bytes));
  }

  // What a model wrote: its end may cut a letter that is made of bytes.
  written(ids) {
    return this.decode(ids).replace(/\ufffd+$/, "");
  }

  opensWord(id) {
    return this.pieces[id].startsWith(SPACE) || this.pieces[id].startsWith("\n");
  }
}

// The beginning of a text without what belongs to a letter that is not there.
export function fromALetter(text) {
  return text.replace(JOINS, "");
}

function normaliserStep(step) {
  if (step.type === "NFC") return (text) => text.normalize("NFC");
  const pattern = new RegExp(step.pattern.Regex, "gu");
  return (text) => text.replace(pattern, () => step.content);
}

// ---- bytes --------------------------------------------------------------------------------------

const UTF8 = new TextEncoder();
const STRICT = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

function bytesOf(letter) {
  const names = [];
  for (const byte of UTF8.encode(letter)) {
    names.push(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  }
  return names;
}

// A byte that begins no letter becomes U+FFFD, as SentencePiece has it.
function textOf(bytes) {
  try {
    return STRICT.decode(bytes);
  } catch {
    let text = "";
    for (let i = 0; i < bytes.length;) {
      const size = 1 + (bytes[i] >= 0xc0) + (bytes[i] >= 0xe0) + (bytes[i] >= 0xf0);
      try {
        text += STRICT.decode(bytes.subarray(i, i + size));
        i += size;
      } catch {
        text += "\ufffd";
        i += 1;
      }
    }
    return text;
  }
}
