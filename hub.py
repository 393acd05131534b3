"""Text from the Hugging Face hub: one table of pinned sources, streamed into data/raw, resumable, added up to a budget.

Used by prepare (--source hindi, --source fineweb):
    files = download("hindi", folder, hinglish_ratio=0.35, chars=60_000_000, log=print)

Nothing but plain files is read (no loading scripts, ever). A source that is gone or gated is left out with a notice; one that
breaks is tried again with growing waits and keeps what it gave. Each source is one file, .part until it is whole, with a
.state.json beside it: what it is, how much there is, and where the stream stopped, so that a second run continues there.
"""
import contextlib
import errno
import json
import os
import time
from dataclasses import asdict, dataclass

from tqdm import tqdm

import knobs
from knobs import UserError

WAITS = (1, 2, 4, 8, 16)                   # seconds before the next try; one new row, and they start over
SYNC_ROWS = 1000                           # rows between two states on disk


@dataclass(frozen=True)
class Source:
    """revision None: the newest at the first download, recorded then and kept. share: of what its kind still misses."""
    name: str
    kind: str                              # hindi, hinglish, english
    repo: str
    revision: str | None
    licence: str                           # as its card says; read the card before you publish anything
    config: str | None = None
    data_dir: str | None = None
    split: str = "train"
    field: str = "text"
    share: float = 1.0


# The pins are those that public projects record for these sets. None of them was loaded on the machine this was written on.
SOURCES = {
    "hindi": (
        Source("sangraha", "hindi", "ai4bharat/sangraha", None, "CC BY 4.0", data_dir="verified/hin", share=0.6),
        Source("wikipedia", "hindi", "wikimedia/wikipedia", "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", "CC BY-SA 3.0, GFDL",
               config="20231101.hi"),
        Source("fineweb2", "hindi", "HuggingFaceFW/fineweb-2", "af9c13333eb981300149d5ca60a8e9d659b276b9", "ODC-By 1.0",
               config="hin_Deva"),
        Source("hinmix", "hinglish", "kartikagg98/HINMIX_hi-en", "5735b2d0737980b03c50ee643ad8ac31da5d8531", "Apache-2.0",
               config="lcsalign-hicmrom", share=0.5),
        Source("hinmix_noisy", "hinglish", "kartikagg98/HINMIX_hi-en", "5735b2d0737980b03c50ee643ad8ac31da5d8531",
               "Apache-2.0", config="lcsalign-noisyhicmrom"),
    ),
    "fineweb": (
        Source("fineweb_edu", "english", "HuggingFaceFW/fineweb-edu", "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "ODC-By 1.0",
               config="sample-10BT"),
    ),
}


class Gone(Exception):
    """The hub has no such set, or not for us: no use in trying again."""


def open_stream(source, revision, state):
    """The rows of a source from a saved place on, as a datasets.IterableDataset."""
    import datasets
    datasets.config.STREAMING_READ_MAX_RETRIES = 2         # the waits are ours: see WAITS
    datasets.config.STREAMING_READ_RETRY_INTERVAL = 1
    try:
        rows = datasets.load_dataset(source.repo, source.config, data_dir=source.data_dir, split=source.split,
                                     revision=revision, streaming=True)
    except (datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DatasetGenerationError, ValueError,
            datasets.data_files.EmptyDatasetError) as error:
        raise Gone(str(error).split("\n")[0][:200]) from None
    if state:
        rows.load_state_dict(state)
    return rows


def newest(source):
    """The commit that a set without a pin is at today."""
    from huggingface_hub import HfApi
    return HfApi().dataset_info(source.repo).sha


def reachable():
    """Does anything answer at the hub's address? The library's own tries would take minutes to find that out."""
    from huggingface_hub import constants, get_session
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:                                      # whatever the HTTP client of the day raises
        return False
    return True


class Raw:
    """One source's file in data/raw, with its state."""

    def __init__(self, source, folder):
        self.source = source
        self.path = folder / f"{source.kind}_{source.name}.jsonl"
        self.part, self.state_path = self.path.with_suffix(".jsonl.part"), self.path.with_suffix(".state.json")
        self.state = dict(asdict(source), rows=0, bytes=0, chars=0, ended=False, at=None)
        with contextlib.suppress(UserError, OSError):      # nothing usable there: from the beginning
            saved = knobs.read_json(self.state_path)
            there = (self.path if self.path.exists() else self.part).stat().st_size
            fixed = [key for key in asdict(source) if key != "share" and (key != "revision" or source.revision)]
            if set(saved) == set(self.state) and there >= saved["bytes"] and all(saved[k] == self.state[k] for k in fixed):
                self.state = saved

    def fetch(self, chars, log):
        """Rows until there are so many characters or the source ends, with new tries; what came stays. -> characters."""
        if self.state["chars"] >= chars or self.state["ended"]:
            return self.state["chars"]
        if not reachable():
            return self.state["chars"]
        if self.path.exists():
            os.replace(self.path, self.part)
        name, tries = f"{self.source.repo} {self.source.config or self.source.data_dir or ''}".strip(), 0
        with open(self.part, "ab") as f, tqdm(total=chars, initial=self.state["chars"], unit=" characters", unit_scale=True,
                                              desc=self.source.name, disable=None) as bar:
            while True:
                f.truncate(self.state["bytes"])
                before = self.state["rows"]
                try:
                    self.stream(f, chars, bar)
                    break
                except Gone as error:
                    log(f"notice: {name} is left out: {error}")
                    break
                except Exception as error:                 # datasets and its HTTP client raise types of their own
                    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                        raise
                    tries = 0 if self.state["rows"] > before else tries + 1
                    why = f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}"
                    if tries >= len(WAITS):
                        log(f"notice: {name} broke off, {self.state['chars']:,} characters of it are kept ({why})")
                        break
                    log(f"notice: {name}: trying again in {WAITS[tries]} s ({why})")
                    time.sleep(WAITS[tries])
        if self.state["rows"]:
            os.replace(self.part, self.path)
        else:
            self.part.unlink()
        return self.state["chars"]

    def stream(self, f, chars, bar):
        """One try: rows into the file, a state on the disk every SYNC_ROWS, and at the end however it comes."""
        s = self.state
        s["revision"] = s["revision"] or newest(self.source)
        rows, new, more = open_stream(self.source, s["revision"], s["at"]), 0, 0

        def sync():
            nonlocal new, more
            f.flush()
            os.fsync(f.fileno())
            s.update(rows=s["rows"] + new, chars=s["chars"] + more, bytes=os.fstat(f.fileno()).st_size, at=rows.state_dict())
            knobs.write_json(self.state_path, s)
            new = more = 0
        try:
            for row in rows:
                text = row.get(self.source.field)
                if not isinstance(text, str):
                    raise Gone(f"its rows have no text in {self.source.field!r}, but {', '.join(row)[:100]}")
                f.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                new, more = new + 1, more + len(text)
                bar.update(len(text))
                if s["chars"] + more >= chars:
                    break
                if new == SYNC_ROWS:
                    sync()
            else:
                s["ended"] = True
        finally:
            if new or s["ended"]:
                sync()


def download(which, folder, hinglish_ratio, chars, log):
    """Files with about so many characters in all, the wanted share of them Hinglish; [(path, record for meta.json)]."""
    kinds = {"hindi": {"hindi": 1 - hinglish_ratio, "hinglish": hinglish_ratio}, "fineweb": {"english": 1.0}}[which]
    knobs.need("datasets", "to read the hub")
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for kind, share in kinds.items():
        missing = int(share * chars)
        for raw in (Raw(source, folder) for source in SOURCES[which] if source.kind == kind):
            if missing > 0:
                missing -= raw.fetch(int(raw.source.share * missing), log)
                found += [raw] * (raw.state["rows"] > 0)
        if missing > 0 and share:
            log(f"notice: {kind}: {missing:,} of {int(share * chars):,} characters are missing, no source gave more"
                + ("" if reachable() else " (the hub does not answer)"))
    if not found:
        raise UserError("nothing could be read from the hub: check the network and run it again, or use your own text "
                        "(--source files --input FILES) or the starter corpus (--source builtin)", code=3)
    keep = ("name", "kind", "repo", "config", "data_dir", "split", "revision", "licence", "rows", "bytes", "chars", "ended")
    records = [{key: raw.state[key] for key in keep} | {"file": raw.path.name} for raw in found]
    knobs.write_json(folder / "sources.json", {"sources": records})
    return [(raw.path, record) for raw, record in zip(found, records, strict=True)]
