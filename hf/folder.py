"""An exported folder for transformers is written, proved and put in its place. Used by export.py.

    path = export(args)

The proof runs in a process of its own that cannot find this project: it loads the folder as its
users do. Its logits must be ours, its ids those of our tokenizer on thousands of awkward strings,
its text ours.

Legend: B rows, L tokens of a row.
"""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import config
from common.console import UserError, commit_hash, say
from common.files import (
    ROOT,
    file_sha256,
    folder_aside,
    read_json,
    sealed,
    sync,
    to_json,
    write_file,
)
from edge import source
from hf.awkward import awkward_strings
from hf.card import model_card
from hf.join import FILES, joined
from hf.published import FORMAT, MANIFEST, PREFIX, TOKENIZER, WEIGHTS
from hf.tokenizer_json import special_pieces, tokenizer_json
from sampling import decode, settings
from sampling.torch_model import TorchModel

MODELING = "modeling_aria"
EXACT = 1e-5            # of the logits' size, between two ways to compute the same float32 numbers
STRINGS = 4000          # awkward ones whose ids are compared
NEW = 24                # tokens of a text that is compared
CAUSAL = "AriaDiffusionForCausalLM"
MASKED = "AriaDiffusionForMaskedLM"


def export(args):
    """Write the folder aside, and rename it when it has proved itself -> its path."""
    model, tokenizer, saved = source.load_checkpoint(args)
    output = source.output_of(args, saved, MANIFEST)
    why_not = settings.cannot_freeze(saved)
    if why_not:
        raise UserError(f"{why_not}, and left to right it would write poor text: export it with "
                        "--format onnx")
    card = model_card(args, output.name, model, tokenizer, saved)
    windows = source.held_out_windows(args.data_dir, tokenizer, saved)
    ids = source.text_for_logits(model.cfg, windows)
    with folder_aside(output) as aside:
        write_folder(aside, model, tokenizer, saved, card)
        prove(aside, model, tokenizer, saved, windows, ids)
    return output


# ---- the files -----------------------------------------------------------------------------------

def write_folder(folder, model, tokenizer, saved, card):
    folder.mkdir()
    tensors = {f"{PREFIX}{name}": value.float() for name, value in model.state_dict().items()}
    weights = folder / WEIGHTS
    save_file(tensors, weights, metadata={"format": "pt"})
    os.chmod(weights, 0o644)        # the library's 0600 is for its owner alone
    sync(weights)

    described = model_settings(model, tokenizer, saved)
    texts = {
        f"{MODELING}.py": joined(FILES, head_of_modeling()),
        "tokenizer.json": tokenizer_json(tokenizer, model.cfg.framed),
        "README.md": card,
    }
    for name, text in texts.items():
        write_file(folder / name, text.encode())
    write_file(folder / "config.json", to_json(described))
    write_file(folder / "tokenizer_config.json", to_json(tokenizer_settings(tokenizer, saved)))
    write_file(folder / TOKENIZER, saved.tokenizer_bytes)

    # last, what Aria itself needs to read the folder: --ckpt
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest = {
        "format": FORMAT,
        "step": saved.step,
        "data_sha256": saved.state.get("data_sha256"),
        "config": saved.config,
        "files": files,
    }
    write_file(folder / MANIFEST, to_json(sealed(manifest)))
    sync(folder)


def head_of_modeling():
    """The docstring of the modeling file."""
    return f"""Aria, a masked diffusion language model, for transformers, in one file.

Joined from Aria's own modules (commit {commit_hash(ROOT)}) by python -m export --format hf.
"""


def model_settings(model, tokenizer, saved):
    """config.json."""
    cfg = model.cfg
    classes = {"AutoConfig": "AriaDiffusionConfig", "AutoModel": CAUSAL,
               "AutoModelForCausalLM": CAUSAL}
    if not cfg.causal:
        classes["AutoModelForMaskedLM"] = MASKED
    shape = cfg.to_dict() | {"rows": cfg.rows, "mask_id": cfg.mask_id, "pad_id": cfg.pad_id}
    block = 1 if cfg.causal else settings.usual_block(saved)
    return {
        "model_type": "aria_diffusion",
        "architectures": [CAUSAL],
        "auto_map": {auto: f"{MODELING}.{name}" for auto, name in classes.items()},
        "dtype": "float32",
        "vocab_size": cfg.rows,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.n_layers,
        "num_attention_heads": cfg.n_heads,
        "max_position_embeddings": config.trained_length(saved),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": pad_of(tokenizer),
        "mask_token_id": cfg.mask_id,
        "shape": shape,
        "writing": {
            "max_new_tokens": config.LONGEST,
            "block_size": block,
            "threshold": config.DecodeFlags.threshold,
            "temperature": config.NEWER["temperature"],
            "top_k": config.NEWER["top_k"],
            "top_p": config.DecodeFlags.top_p,
        },
    }


def pad_of(tokenizer):
    """What fills a row up. GPT-2's tokenizer has no pad: there the end of text does."""
    return tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id


def tokenizer_settings(tokenizer, saved):
    """tokenizer_config.json. split_special_tokens: what a text says is text, be it "<mask>"."""
    names = special_pieces(tokenizer)
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "pad_token": names[pad_of(tokenizer)],
        "mask_token": names[tokenizer.vocab_size],
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": config.trained_length(saved),
    }
    if tokenizer.unk_id is not None:
        found["unk_token"] = names[tokenizer.unk_id]
    return found


# ---- the proof -----------------------------------------------------------------------------------

def prove(folder, model, tokenizer, saved, windows, ids):
    """Does the folder answer what we answer, about the text ids (B, L)? A UserError says where it
    does not.
    """
    strings = awkward_strings(STRINGS, 0) + [tokenizer.decode(window) for window in windows]
    asked = {
        "threads": torch.get_num_threads(),
        "strings": strings,
        "ids": ids.tolist(),
        "masked": None,
        "prompt": ids[0, :12].tolist(),
        "new": NEW,
        "blocks": [1],
    }
    if not model.cfg.causal:
        half = ids.copy()
        half[:, ::2] = model.cfg.mask_id
        asked["masked"] = half.tolist()
        asked["blocks"].append(settings.usual_block(saved))
    found, logits = answers(folder, asked)

    # ids
    wrong = []
    for text, theirs in zip(strings, found["strings"], strict=True):
        if theirs != settings.opening(tokenizer, text, model.cfg.framed):
            wrong.append(text)
    if wrong or found["mask_id"] != model.cfg.mask_id:
        raise broken(f"{len(wrong)} of {len(strings)} strings get other ids, such as {wrong[:1]!a}")
    say(f"tokenizer.json gives our ids for {len(strings)} awkward strings")

    # logits, text
    largest = max(apart(logits[name], right) for name, right in our_logits(model, asked).items())
    if not largest <= EXACT:
        raise broken(f"its logits are {largest:.1e} of their size away")
    say(f"transformers gives our logits: {largest:.1e} of their size apart at most")
    for block in asked["blocks"]:
        if found["written"][str(block)] != our_text(model, tokenizer, asked, block):
            raise broken(f"in blocks of {block} it writes another text")


def answers(folder, asked):
    """What hf/proof.py finds -> (ids, {name: logits})."""
    with tempfile.TemporaryDirectory() as scratch:
        questions = Path(scratch, "questions.json")
        write_file(questions, to_json(asked))
        words = [sys.executable, "-I", ROOT / "hf" / "proof.py", folder, questions,
                 Path(scratch, "answers")]
        done = subprocess.run(
            [str(word) for word in words],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it gives no reason"])[-1]
            raise broken(f"transformers cannot load it ({last})")
        return read_json(Path(scratch, "answers.json")), load_file(
            Path(scratch, "answers.safetensors")
        )


def broken(what):
    return UserError(
        f"the exported folder does not do what the checkpoint does: {what}; nothing was written; "
        "please report it with this checkpoint's config.json and the version of transformers"
    )


@torch.no_grad()
def our_logits(model, asked):
    """{name: logits}, as hf/proof.py has them."""
    ids = torch.tensor(asked["ids"])                                               # (B, L)
    text = torch.nn.functional.pad(ids, (0, 1))
    found = {"next": model.logits(model.clean_states(text)[:, 1:])}
    if asked["masked"]:
        xt = torch.tensor(asked["masked"])
        found["masked"] = model.logits(model.block_states(xt, xt, xt.shape[1]))
    return found


def apart(found, right):
    """The largest difference of two tensors of logits, in parts of their size; what is never an
    answer is so in both.
    """
    answer = torch.isfinite(right)
    if found.shape != right.shape or not torch.equal(answer, torch.isfinite(found)):
        return float("inf")
    return float((found - right)[answer].abs().max() / right[answer].abs().max())


def our_text(model, tokenizer, asked, block):
    """The greedy text behind the prompt, by sampling/decode.py, an end of text included."""
    how = settings.Settings(
        max_new_tokens=asked["new"],
        steps=block,
        mode="block_frozen",
        block_size=block,
        sampler="threshold",
        temperature=0,
        eos_id=tokenizer.eos_id,
    )
    result = decode.generate(TorchModel(model), asked["prompt"], how, [0])
    return [*asked["prompt"], *result.full_rows[0]]
