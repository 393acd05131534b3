"use strict";

// The page's model in this very tab: stands in for the server that serving/page.html asks else.
globalThis.modelHere = (() => {
  const SAYS = {
    simd: {
      en: "This browser lacks WebAssembly SIMD, which the model needs: use a newer one (Chrome 91, Firefox 114, Safari 16.4 or later).",
      hi: "इस ब्राउज़र में WebAssembly SIMD नहीं है, जो मॉडल को चाहिए: नया ब्राउज़र लें (Chrome 91, Firefox 114, Safari 16.4 या बाद का)।",
    },
    file: {
      en: "A browser runs no model out of a file: in this folder, start python3 -m http.server and open http://localhost:8000/",
      hi: "ब्राउज़र फ़ाइल से मॉडल नहीं चलाता: इस फ़ोल्डर में python3 -m http.server चलाएँ और http://localhost:8000/ खोलें",
    },
    worker: {
      en: "The model could not be started: load this page again, and see that its whole folder is there.",
      hi: "मॉडल शुरू नहीं हो सका: पृष्ठ फिर से खोलें, और देखें कि पूरा फ़ोल्डर वहाँ है।",
    },
  };
  // the smallest program with a vector in it
  const VECTOR = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0,
    65, 0, 253, 15, 11];
  const waiting = new Map();                    // number of a request -> who is told of its events
  let worker = null;
  let requests = 0;

  function start() {
    const refuse = (reason) => { throw new Error(SAYS[reason][document.documentElement.lang]); };
    if (location.protocol === "file:") refuse("file");
    if (!globalThis.WebAssembly?.validate(Uint8Array.from(VECTOR))) refuse("simd");
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data: { id, name, data } }) => waiting.get(id)?.(name, data);
    worker.onerror = (event) => {
      event.preventDefault();
      const message = SAYS.worker[document.documentElement.lang];
      for (const take of waiting.values()) take("error", { error: { message } });
    };
  }

  // Ask the worker; take(name, data) is told of each event, "done" and "error" are the last.
  function ask(asked, body, signal, take) {
    if (!worker) start();
    const id = requests += 1;
    return new Promise((resolve, reject) => {
      const end = (done, value) => {
        waiting.delete(id);
        done(value);
      };
      signal?.addEventListener("abort", () => {
        worker.postMessage({ id, asked: "stop" });
        end(reject, new DOMException("stopped", "AbortError"));
      });
      waiting.set(id, (name, data) => {
        if (name === "error") {
          end(reject, new Error(data.error.message));
          return;
        }
        take?.(name, data);
        if (name === "done") end(resolve, data);
      });
      worker.postMessage({ id, asked, body });
    });
  }

  return {
    describe: async () => ask("describe"),
    steps: async (body, signal, take) => ask("write", body, signal, take),
  };
})();
