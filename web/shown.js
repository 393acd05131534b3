// What the page is told of a text that is being written, as serving/steps.py does it, and texts with
// gaps, as sampling/written.py does them.
//
//     const shown = new Shown(tokenizer, eosId, gapped);       // gapped: null for a prompt
//     const first = shown.start(ids, end);                     // the positions up to `end`
//     const changed = shown.step(canvas, lo, hi);              // after a forward

import { fromALetter } from "./tokenizer.js";

const GAP = /\[MASK\]|__+/g;

// A text with ____ or [MASK] in it: its ids, with masks in its gaps, and the text again when they
// are filled.
export class GappedText {
  constructor(text, tokenizer) {
    this.tokenizer = tokenizer;
    this.fixed = text.split(GAP);
    const sizes = [...text.matchAll(GAP)].map(([gap]) => (
      gap === "[MASK]" ? 1 : Math.floor(gap.length / 2)));
    this.ids = [tokenizer.bosId];
    this.gaps = [];                             // [first, end] of each in the ids
    this.fixed.forEach((part, i) => {
      const size = sizes[i] ?? 0;
      // a piece carries the space before it, so the space before a gap is its first piece's
      if (size && part.endsWith(" ")) part = part.slice(0, -1);
      this.ids.push(...tokenizer.encode(part));
      this.gaps.push([this.ids.length, this.ids.length + size]);
      this.ids.push(...Array(size).fill(tokenizer.maskId));
    });
    this.masked = sizes.reduce((sum, size) => sum + size, 0);
  }

  filled(ids) {
    return this.fixed.map((part, i) => {
      const answer = this.tokenizer.written(ids.slice(...this.gaps[i]));
      return part + (part.endsWith(" ") ? answer.replace(/^ /, "") : answer);
    }).join("");
  }
}

// The parts that the page has, so that it is told of changes alone. A part is a word, a mask, or the
// end of the text: {at: first position, n: positions, text, p: the least confidence, end}.
export class Shown {
  constructor(tokenizer, eosId, gapped) {
    this.tokenizer = tokenizer;
    this.eosId = eosId;
    this.gapped = gapped;
    this.parts = new Set();                     // as JSON
  }

  // ids as they are at the beginning; of a prompt, what follows it up to `end` is masked.
  start(ids, end) {
    const chance = Array(end).fill(1);
    if (this.gapped) {
      this.written = new Set([...ids.keys()].filter((at) => ids[at] === this.tokenizer.maskId));
      return this.changed(this.partsOf(ids, chance, 1, end));
    }
    const masks = ids.concat(Array(end - ids.length).fill(this.tokenizer.maskId));
    return this.changed(this.partsOf(masks, chance, ids.length, end));
  }

  step({ ids, chance }, lo, hi) {
    return this.changed(this.partsOf(ids, chance, Math.max(1, lo), hi));
  }

  changed(parts) {
    const before = this.parts;
    this.parts = new Set(parts.map((part) => JSON.stringify(part)));
    return parts.filter((part) => !before.has(JSON.stringify(part)));
  }

  partsOf(ids, chance, lo, hi) {
    const { maskId } = this.tokenizer;
    const alone = (id) => id === maskId || id === this.eosId;
    const parts = [];
    for (let at = lo; at < hi;) {
      const first = at;
      at += 1;
      while (!alone(ids[first]) && at < hi && !alone(ids[at])
          && !this.tokenizer.opensWord(ids[at])) at += 1;
      const part = { at: first, n: at - first };
      if (ids[first] !== maskId) Object.assign(part, this.seen(ids, chance, first, at, lo));
      parts.push(part);
    }
    return parts;
  }

  // The text and confidence of the positions [first, end).
  seen(ids, chance, first, end, lo) {
    const rounded = (p) => Math.round(p * 1000) / 1000;
    if (ids[first] === this.eosId) return { text: "", end: true, p: rounded(chance[first]) };
    let text = this.tokenizer.decode(ids.slice(first, end)).replace(/^\ufffd+|\ufffd+$/g, "");
    // what belongs to a letter that is not there yet waits for it
    if (first > lo && ids[first - 1] === this.tokenizer.maskId) text = fromALetter(text);
    let p = Infinity;
    for (let at = first; at < end; at++) {
      if (!this.gapped || this.written.has(at)) p = Math.min(p, chance[at]);
    }
    return p === Infinity ? { text } : { text, p: rounded(p) };
  }
}
