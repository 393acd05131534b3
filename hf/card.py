"""The model card of an exported folder, in English and in Hindi. Used by hf/folder.py.

    text = model_card(args, name, model, tokenizer, saved)

Says what is known and nothing else: the shape, the data and their licences as the data folder has
them, the figures of python -m evaluate --out_json if they are given, and the limits. Its words are
in card.md.
"""
from pathlib import Path

import config
from common.console import UserError
from common.files import read_json
from model_config import count_params

TEMPLATE = Path(__file__).with_name("card.md")


def model_card(args, name, model, tokenizer, saved):
    """README.md of a model with this name."""
    licence = "No licence has been chosen for these weights: ask who published them."
    licence_hindi = "इन भारों के लिए अभी कोई लाइसेंस नहीं चुना गया है; प्रकाशित करने वाले से पूछें।"
    if args.licence:
        licence = f"The weights: {args.licence}. The licences of the data are above."
        licence_hindi = f"भार: {args.licence}। डेटा के लाइसेंस ऊपर हैं।"
    mask_use = ""
    if not model.cfg.causal:
        mask_use = " `AutoModelForMaskedLM` gives the\nchances behind every mask of a text."
    return TEMPLATE.read_text(encoding="utf-8").format(
        name=name,
        parameters=count_params(model.cfg),
        kind={"primary": "EcoHybrid", "backup": "transformer"}[model.cfg.model],
        step=saved.step,
        length=config.trained_length(saved),
        licence_line=f"license: {args.licence}\n" if args.licence else "",
        licence=licence,
        licence_hindi=licence_hindi,
        mask_use=mask_use,
        data=data_of(args.data_dir or saved.config["args"]["data_dir"], tokenizer),
        figures=figures_of(args.figures, saved),
    )


def data_of(data_dir, tokenizer):
    """What the data folder says about its text."""
    path = Path(data_dir, "meta.json")
    if not path.is_file():
        return f"The folder of its data (`{data_dir}`) was not there when this card was written."
    meta = read_json(path)
    if meta.get("tokenizer_sha256") != tokenizer.sha256:
        raise UserError(
            f"{data_dir} was made with another tokenizer than the checkpoint's, so it is not what "
            "the model was trained on: name its data with --data_dir"
        )
    lines = []
    for source in meta.get("sources", []):
        line = f"* {source.get('name')}"
        if source.get("repo"):
            line += f": `{source['repo']}`"
        if source.get("revision"):
            line += f" at `{source['revision']}`"
        lines.append(f"{line}. Licence: {source.get('licence') or 'not stated'}")
    scripts = meta.get("scripts", {}).get("train", {})
    if scripts:
        told = ", ".join(f"{script} {count:,}" for script, count in scripts.items())
        lines.append(f"\nDocuments by script: {told}.")
    return "\n".join(lines) or "Its data folder names no sources."


def figures_of(path, saved):
    """A table of what python -m evaluate --out_json has measured."""
    if not path:
        return "None was given when this card was written (`python -m export --figures`)."
    figures = read_json(path)
    if figures.get("step") != saved.step or not isinstance(figures.get("bound"), dict):
        raise UserError(
            f"--figures {path} is not of this checkpoint (step {saved.step}): write it with python "
            f"-m evaluate --ckpt {saved.path} --out_json FILE"
        )
    lines = [
        "On held-out text, by `python -m evaluate`:",
        "",
        "| blocks of | estimate | documents | nats/token | bits/byte |",
        "|---|---|---|---|---|",
    ]
    for block, found in figures["bound"].items():
        estimate = "exact, left to right" if block == "1" else "upper bound"
        lines.append(
            f"| {block} | {estimate} | {found['documents']} | {found['nats']:.4f} | "
            f"{found['bits_per_byte']:.4f} |"
        )
    return "\n".join(lines)
