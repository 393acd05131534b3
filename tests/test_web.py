"""The folder of --format web in a real Chromium: the tokenizer and the rules in JavaScript are
Python's, so are the logits and the texts, and the page writes without a server or a network.
"""
import contextlib
import dataclasses
import itertools
import json
import random
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
from browser import a_browser, hosted, page_in
from conftest import call, only_this_machine
from tiny import tiny_model

import export
from common.files import ROOT, read_json, write_json
from edge import engine, folder as edge_folder
from hf.awkward import awkward_strings
from sampling import decode, exported, unmasking
from sampling.settings import Settings
from text.starter import grammar

pytest.importorskip("onnxruntime", reason="the starter model, which the tests use, is exported")
pytest.importorskip("onnx", reason="only exporting needs it")

from starter_model import STARTER, starter_model  # noqa: E402

from web import folder as web_folder  # noqa: E402

PACKAGE = ROOT / "node_modules" / web_folder.PACKAGE
NEEDS_PACKAGE = pytest.mark.skipif(
    not PACKAGE.is_dir(), reason=f"npm install {web_folder.PACKAGE} in the repository runs this"
)
PROMPT = "भारत में आज मौसम"
VOCAB = 23
EOS = 3
NEVER = -1e30


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Instead of conftest's: this machine may be connected to, and nothing else."""
    only_this_machine(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The starter model in 8 bits, its matrices for browsers."""
    path = tmp_path_factory.mktemp("web") / "starter"
    path.mkdir()
    saved = SimpleNamespace(
        tokenizer_bytes=(STARTER / engine.TOKENIZER).read_bytes(),
        config=read_json(STARTER / engine.CONFIG), step=800, state={},
    )
    edge_folder.write_folder(starter_model(), saved, path, 8, 32, wide=True)
    return path


@pytest.fixture(scope="module")
def model(folder):
    """The same in Python: (engine, tokenizer, saved)."""
    return exported.load(folder, SimpleNamespace(device="auto", threads=1))


@pytest.fixture(scope="module")
def site(folder, model):
    """With the page, and the runtime where npm's package is."""
    web_folder.write_page(folder, web_folder.served_of("starter", *model))
    for there, here in web_folder.RUNTIME.items():
        if PACKAGE.is_dir():
            shutil.copyfile(PACKAGE / there, folder / here)
    return folder


@pytest.fixture(scope="module")
def chromium():
    with a_browser() as found:
        yield found


@pytest.fixture(scope="module")
def modules(chromium, site):
    """A page of the host's with no policy of its own, for modules that are called one by one."""
    with hosted(site) as home, page_in(chromium) as (page, _):
        page.goto(home + "model.json")
        yield page


def ask(page, script, given):
    """What the body of an asynchronous JavaScript function of `given` returns. As JSON: Playwright
    takes seconds for ten thousand numbers.
    """
    function = f"""async (text) => {{
      const given = JSON.parse(text);
      const answer = async () => {{ {script} }};
      return JSON.stringify(await answer());
    }}"""
    return json.loads(page.evaluate(function, json.dumps(given)))


# ---- the tokenizer -------------------------------------------------------------------------------

TOKENIZER = """
const { Tokenizer } = await import("/tokenizer.js");
const tokenizer = new Tokenizer(await (await fetch("/tokenizer.json")).json());
"""


def test_the_tokenizer_gives_pythons_ids(modules, model):
    _, tokenizer, _ = model
    texts = awkward_strings(5000, 7) + ["", " ", "x" * 3000, "\ud800 a", "क" * 500]
    texts.append((ROOT / "docs/SERVE.md").read_text(encoding="utf-8"))
    script = "return given.texts.map((text) => tokenizer.encode(text));"
    found = ask(modules, TOKENIZER + script, {"texts": texts})
    wrong = [text for text, ids in zip(texts, found, strict=True) if ids != tokenizer.encode(text)]
    assert not wrong, (len(wrong), wrong[0])


def test_the_tokenizer_gives_pythons_text(modules, model):
    """Of any ids, such as the bytes of half a letter."""
    _, tokenizer, _ = model
    rnd = random.Random(0)
    rows = []
    for _ in range(1000):
        bound = rnd.choice([300, tokenizer.vocab_size + 1])         # bytes are the first pieces
        rows.append([rnd.randrange(bound) for _ in range(rnd.randint(0, 12))])
    script = "return given.rows.map((ids) => [tokenizer.decode(ids), tokenizer.written(ids)])"
    found = ask(modules, TOKENIZER + script, {"rows": rows})
    for ids, texts in zip(rows, found, strict=True):
        assert texts == [tokenizer.decode(ids), tokenizer.written(ids)], ids


# ---- the rules -----------------------------------------------------------------------------------

class Hashed:
    """A denoiser whose logits are made of hashes of all that a row sees: the same numbers in
    JavaScript, see HASHED.
    """

    def __init__(self, causal):
        self.cfg = SimpleNamespace(
            mask_id=VOCAB, pad_id=0, vocab_size=VOCAB, n_layers=1, causal=causal
        )

    def new_cache(self, rows, length):
        return SimpleNamespace(ids=[], nbytes=0, select=lambda kept: None)

    def step(self, x0, cache):
        states = []
        for token in x0[0].tolist():
            cache.ids.append(token)
            states.append(hash_of(cache.ids))
        return np.array([states])

    def states(self, xt, cache, depth=None):
        found = []
        for row in xt.tolist():
            seen = hash_of(cache.ids + row)
            found.append([hash_of([seen, place]) for place in range(len(row))])
        return np.array(found)

    def logits(self, states, rows, positions):
        z = np.full((len(positions), VOCAB + 1), -np.inf, np.float32)
        for n, state in enumerate(states[rows, positions].tolist()):
            for v in range(1, VOCAB):
                z[n, v] = hash_of([state, v]) / 2 ** 18
        return z


def hash_of(numbers):
    found = 17
    for number in numbers:
        found = (found * found + number * 7919 + 1) % 1000003
    return found


HASHED = """
const { generate, infill, distribution } = await import("/decode.js");
const next = (found, number) => (found * found + number * 7919 + 1) % 1000003;
const hash = (numbers) => numbers.reduce(next, 17);
const V = given.vocab;
const denoiser = (causal) => ({
  maskId: V, padId: 0, causal,
  newCache: () => ({ ids: [] }),
  read(ids, cache) { cache.ids.push(...ids); },
  async step(ids, cache) { return ids.map((id) => hash([...(cache.ids.push(id), cache.ids)])); },
  async states(ids, cache) {
    const seen = hash([...cache.ids, ...ids]);
    return ids.map((_, place) => hash([seen, place]));
  },
  async stepAndStates(clean, ids, cache) {
    cache.ids.push(...clean);
    return this.states(ids, cache);
  },
  async logits(states) {
    return states.map((state) => Float32Array.from({ length: V + 1 }, (_, v) => (
      v > 0 && v < V ? hash([state, v]) / 2 ** 18 : -Infinity)));
  },
});
"""


def random_case(rnd):
    """A prompt, or a text with gaps; Settings that decode.js knows."""
    settings = Settings(
        max_new_tokens=rnd.randint(1, 30),
        steps=rnd.randint(1, 40),
        mode=rnd.choice(["full", "block", "block_frozen"]),
        block_size=rnd.choice([1, 2, 5, 16]),
        sampler=rnd.choice(["confidence", "threshold"]),
        threshold=rnd.choice([0.0, 0.3, 0.5, 0.9]),
        temperature=0,
        repetition_penalty=rnd.choice([1.0, 1.5]),
        guidance_scale=rnd.choice([1.0, 1.0, 2.5]),
        null_prompt=rnd.choice([None, None, (2, 0)]),
        eos_id=rnd.choice([EOS, None]),
    )
    ids = [2, *(rnd.randrange(4, VOCAB) for _ in range(rnd.randint(0, 8)))]
    gaps = rnd.random() < 0.2
    if gaps:
        ids += [rnd.choice([5, VOCAB]) for _ in range(9)]
        settings = dataclasses.replace(settings, guidance_scale=1.0, null_prompt=None)
    return {
        "ids": ids,
        "settings": dataclasses.asdict(settings) | {"seed": 1},
        "gaps": gaps,
        "causal": not gaps and rnd.random() < 0.2,
    }, settings


def test_the_rules_write_pythons_greedy_text(modules):
    """In any mode, by both rules, guided or not, of pairs or not, up to an end or not: ids and
    number of forwards.
    """
    rnd = random.Random(1)
    cases = [random_case(rnd) for _ in range(200)]
    script = """
    const found = [];
    for (const { ids, settings, gaps, causal } of given.cases) {
      const result = await (gaps ? infill : generate)(denoiser(causal), ids, settings);
      found.push([result.ids, result.forwards]);
    }
    return found;
    """
    given = {"vocab": VOCAB, "cases": [case for case, _ in cases]}
    found = ask(modules, HASHED + script, given)
    for (case, settings), (ids, forwards) in zip(cases, found, strict=True):
        write = decode.infill if case["gaps"] else decode.generate
        right = write(Hashed(case["causal"]), case["ids"], settings, [1])
        assert ids == right.full_rows[0], case
        assert forwards == right.row_forwards[0], case


def test_the_chances_of_a_draw_are_pythons(modules):
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((40, 500)).astype(np.float32) * 3
    logits[:, ::7] = NEVER
    rnd = random.Random(0)
    settings = []
    for _ in logits:
        settings.append({
            "temperature": rnd.choice([0.3, 0.7, 1.0, 2.0]),
            "top_k": rnd.choice([0, 1, 40, 600]),
            "top_p": rnd.choice([1.0, 0.95, 0.5, 0.01]),
        })
    script = """
    return given.logits.map((row, i) => {
      const logits = Float32Array.from(row);
      return [...distribution(logits, Math.max(...logits), given.settings[i])];
    });
    """
    given = {"vocab": VOCAB, "logits": logits.tolist(), "settings": settings}
    for row, how, found in zip(logits, settings, ask(modules, HASHED + script, given), strict=True):
        right = unmasking.distribution(row[None], **how)[0]
        assert np.allclose(np.array(found) / sum(found), right, rtol=1e-9, atol=1e-15), how
        assert ((np.array(found) > 0) == (right > 0)).all(), how


def test_the_draws_have_their_chances_and_repeat(modules):
    """5,000 texts of one token: each token as often as its chance says; the same seed, the same
    text.
    """
    script = """
    const { ids, settings } = given;
    const found = [];
    for (let seed = 0; seed < 5000; seed++) {
      found.push((await generate(denoiser(false), ids, { ...settings, seed })).ids[0]);
    }
    const again = await generate(denoiser(false), ids, { ...settings, seed: 4999 });
    return [found, again.ids[0]];
    """
    settings = Settings(1, 1, mode="block_frozen", block_size=1, temperature=1.0, top_k=6)
    given = {"vocab": VOCAB, "ids": [2, 9], "settings": dataclasses.asdict(settings)}
    found, again = ask(modules, HASHED + script, given)
    assert again == found[-1]
    fake = Hashed(False)
    states = fake.step(np.array([[2, 9]]), fake.new_cache(1, 2))
    logits = fake.logits(states, np.array([0]), np.array([1]))
    right = unmasking.distribution(logits, 1.0, 6, 1.0)[0]
    share = np.bincount(found, minlength=len(right)) / len(found)
    assert np.abs(share - right).max() < 5 * (0.25 / len(found)) ** 0.5


# ---- the export ----------------------------------------------------------------------------------

def test_a_missing_package_is_told_at_once(tmp_path, monkeypatch, capsys):
    """Before anything is loaded: where it would be, and how to get it."""
    monkeypatch.chdir(tmp_path)
    assert call(export.main, "--ckpt", "nothing", "--format", "web") == 3
    told = capsys.readouterr().err
    assert "npm install onnxruntime-web@" in told and "--web_runtime" in told
    assert call(export.main, "--ckpt", "nothing", "--web_runtime", "here") == 2
    assert "--web_runtime is for --format web" in capsys.readouterr().err


def test_the_page_is_the_servers(site):
    """One page: without the two lines of the export it is serving/page.html."""
    here = (site / "index.html").read_text(encoding="utf-8").splitlines()
    there = (ROOT / "serving/page.html").read_text(encoding="utf-8").splitlines()
    added = [line for line in here if line not in there]
    assert len(added) == 2 and added[1] == '<script src="transport.js"></script>'
    assert [line for line in here if line not in added] == there


# ---- the model -----------------------------------------------------------------------------------

OPEN = """
const { openModel } = await import("/model.js");
const { generate } = await import("/decode.js");
const read = async (name) => (await fetch(given.folder + name)).arrayBuffer();
globalThis.models ??= {};
models[given.folder] ??= await openModel(await import("/onnxruntime.js"), read);
const model = models[given.folder];
const text = (rows) => rows.map((row) => row.join(",")).join(";").replaceAll("Infinity", "inf");
"""


def numbers(text):
    """What `text` of OPEN made of rows of logits: JSON would have no infinity."""
    return np.array([row.split(",") for row in text.split(";")], np.float32)


@pytest.fixture(scope="module")
def prompts(model):
    """The ids of 50 prompts, beginnings of the starter corpus' documents, of 2 to 80 tokens."""
    _, tokenizer, _ = model
    found = []
    documents = itertools.islice(grammar.starter_documents(3, 0.5), 50)
    for number, (_, text) in enumerate(documents):
        found.append([tokenizer.bos_id, *tokenizer.encode(text)[:1 + number * 79 // 49]])
    return found


def python_logits(runner, ids):
    """Of the next token, and of three masks behind the text."""
    cache = runner.new_cache(1, len(ids) + 3)
    states = runner.step(np.array([ids]), cache)
    after = runner.logits(states, np.array([0]), np.array([len(ids) - 1]))
    block = np.full((1, 3), runner.cfg.mask_id)
    states = runner.states(block, cache)
    return np.concatenate((after, runner.logits(states, np.zeros(3, int), np.arange(3))))


@NEEDS_PACKAGE
def test_the_logits_of_8_bits_are_pythons(modules, model, prompts):
    """The aim was 1e-3: nothing but weights is rounded, so they are far nearer."""
    script = """
    const rows = [];
    for (const ids of given.prompts) {
      const cache = model.newCache();
      rows.push(...await model.logits((await model.step(ids, cache)).slice(-1)));
      rows.push(...await model.logits(await model.states(Array(3).fill(model.maskId), cache)));
    }
    return text(rows);
    """
    found = numbers(ask(modules, OPEN + script, {"prompts": prompts, "folder": "/"}))
    right = np.concatenate([python_logits(model[0], ids) for ids in prompts])
    assert found.shape == right.shape == (200, right.shape[1])
    assert np.allclose(found, right, rtol=0, atol=1e-4)


@NEEDS_PACKAGE
@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize("changes", [{}, {"conv_kernel": 5}, {"d_mem": 4}, {"causal": True}])
def test_the_logits_of_every_path_are_pythons(modules, site, changes, bits):
    """To 1e-4: of one row, two chunks, blocks alone and behind clean rows."""
    net = tiny_model("primary", away=0.1, **changes)
    path = site / f"tiny{len(list(site.iterdir()))}"
    path.mkdir()
    saved = SimpleNamespace(
        tokenizer_bytes=b"pieces", config={"model": net.cfg.to_dict(), "args": {}}, step=0, state={}
    )
    edge_folder.write_folder(net, saved, path, bits, 32, wide=True)
    write_json(path / "model.json", {"shape": net.cfg.to_dict()})
    script = """
    const cache = model.newCache();
    const rows = await model.step(given.ids, cache);
    rows.push(...await model.step([7], cache));
    if (!model.causal) {
      const masks = Array(5).fill(model.maskId);
      rows.push(...await model.states(masks, cache));
      rows.push(...await model.stepAndStates(given.ids.slice(0, 70), masks, cache));
      rows.push(...await model.states(masks, model.newCache()));
    }
    return text(await model.logits(rows));
    """
    ids = np.random.default_rng(0).integers(4, 40, (1, 90))
    given = {"ids": ids[0].tolist(), "folder": f"/{path.name}/"}
    found = numbers(ask(modules, OPEN + script, given))

    runner = engine.load(path, 1)
    cache = runner.new_cache(1, 200)
    rows = [runner.step(ids, cache), runner.step(np.array([[7]]), cache)]
    if not net.cfg.causal:
        masks = np.full((1, 5), net.cfg.mask_id)
        rows.append(runner.states(masks, cache))
        rows.append(runner.step_and_states(ids[:, :70], masks, cache))
        rows.append(runner.states(masks, runner.new_cache(1, 0)))
    rows = np.concatenate(rows, axis=1)
    places = np.arange(rows.shape[1])
    right = runner.logits(rows, np.zeros_like(places), places)
    assert found.shape == right.shape and np.allclose(found, right, rtol=0, atol=1e-4)


@NEEDS_PACKAGE
@pytest.mark.parametrize("block", [1, 32])
def test_the_greedy_text_is_pythons(modules, model, prompts, block):
    runner, tokenizer, _ = model
    settings = Settings(
        32, block, mode="block_frozen", block_size=block, sampler="threshold", temperature=0,
        eos_id=tokenizer.eos_id,
    )
    script = """
    const found = [];
    for (const ids of given.prompts) {
      const result = await generate(model, ids, given.settings);
      found.push([result.ids, result.forwards]);
    }
    return found;
    """
    few = prompts[::2][:20]
    given = {"folder": "/", "prompts": few, "settings": dataclasses.asdict(settings) | {"seed": 0}}
    for ids, found in zip(few, ask(modules, OPEN + script, given), strict=True):
        right = decode.generate(runner, ids, settings, [0])
        assert found == [right.full_rows[0], right.row_forwards[0]], ids


# ---- the page ------------------------------------------------------------------------------------

@contextlib.contextmanager
def page_of(chromium, site):
    """The page on a static host -> (it, what it said to the console and asked of other hosts)."""
    with hosted(site) as home, page_in(chromium, locale="en-GB") as (page, trouble):
        page.on(
            "request", lambda request: request.url.startswith((home, "data:"))
            or trouble.append(request.url)
        )
        page.goto(home)
        page.wait_for_selector("#model:not(:empty)")
        yield page, trouble


def finished(page):
    page.wait_for_selector("#copy:enabled", timeout=60_000)
    until(page, "!drawing")


def until(page, holds):
    """Wait for an expression; the page's policy lets Playwright's own waiting evaluate nothing."""
    end = time.monotonic() + 60
    while not page.evaluate(holds):
        assert time.monotonic() < end, holds
        time.sleep(0.02)


@NEEDS_PACKAGE
def test_the_page_writes_without_a_network(chromium, site, model):
    """Behind its beginning nothing is asked of any host: the text is Python's, gaps are filled, it
    replays, it stops, and it fits a phone.
    """
    runner, tokenizer, _ = model
    with page_of(chromium, site) as (page, trouble):
        page.context.set_offline(True)
        page.fill("#prompt", PROMPT)
        page.evaluate("at('temperature').value = 0; at('length').value = 60; showValues()")
        page.click("#write")
        finished(page)
        assert not page.inner_text("#error")
        settings = Settings(
            60, 64, mode="block_frozen", block_size=64, sampler="threshold", threshold=0.9,
            temperature=0, eos_id=tokenizer.eos_id,
        )
        ids = [tokenizer.bos_id, *tokenizer.encode(PROMPT)]
        right = decode.generate(runner, ids, settings, [0])
        assert page.evaluate("run.text") == PROMPT + tokenizer.written(right.rows[0])
        assert f"{right.forwards} forwards" in page.inner_text("#numbers")
        assert page.locator("#out .mask").count() == 0 < page.locator("#out .c4").count()

        # the time slider
        page.focus("#time")
        page.keyboard.press("Home")
        until(page, "!drawing")
        assert page.locator("#out .mask").count() == 60

        # gaps; a text of a seed again
        page.fill("#prompt", "मैं कल ____ गया था और ____ खाए।")
        page.fill("#seed", "4")
        page.evaluate("at('temperature').value = 1")
        page.click("#write")
        finished(page)
        filled = page.evaluate("run.text")
        assert filled.startswith("मैं कल ") and filled.endswith(" खाए।") and "_" not in filled
        assert page.inner_text("#out") == filled
        page.click("#write")
        finished(page)
        assert page.evaluate("run.text") == filled

        # stop
        page.fill("#prompt", PROMPT)
        page.evaluate("at('length').value = 512; at('steps').value = 128; showValues()")
        page.check("[value=full]")
        page.click("#write")
        until(page, "run.shots.length > 2")
        page.keyboard.press("Escape")
        finished(page)
        assert page.inner_text("#told") == "stopped"
        assert page.locator("#out .mask").count() > 0

        # what cannot be is told, and the next text comes
        page.evaluate("at('length').max = 5000; at('length').value = 5000")
        page.click("#write")
        page.wait_for_selector("#error:not(:empty)")
        assert "this page writes 2048 at most" in page.inner_text("#error")

        # a phone, in the dark
        page.set_viewport_size({"width": 390, "height": 800})
        page.emulate_media(color_scheme="dark")
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(wide) == 0
    assert not trouble


@NEEDS_PACKAGE
def test_a_browser_that_cannot_is_told_so(chromium, site):
    """Without vectors in WebAssembly, or with a part of the folder missing: one sentence."""
    with hosted(site) as home, page_in(chromium, locale="hi-IN") as (page, trouble):
        page.add_init_script("WebAssembly.validate = () => false")
        page.goto(home)
        page.wait_for_selector("#error:not(:empty)")
        assert "WebAssembly SIMD नहीं है" in page.inner_text("#error")
        assert not trouble
    with hosted(site) as home, page_in(chromium, locale="en-GB") as (page, trouble):
        page.route("**/weights.bin", lambda route: route.fulfill(status=404))
        page.goto(home)
        page.wait_for_selector("#error:not(:empty)")
        assert "weights.bin is not beside this page" in page.inner_text("#error")
