"""What an exported folder answers where there is no Aria: started by hf/folder.py as a script.

    python -I hf/proof.py FOLDER QUESTIONS ANSWERS      # -I: nothing of this project is found

Loads the folder with transformers as its users do, offline. QUESTIONS is JSON that hf/folder.py
writes; ANSWERS gets two files, ANSWERS.json with ids and ANSWERS.safetensors with logits.
"""
import importlib
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
sys.dont_write_bytecode = True      # nothing but what was exported lies in the folder

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402


@torch.no_grad()
def main(folder, questions, answers):
    with open(questions, encoding="utf-8") as file:
        asked = json.load(file)
    torch.set_num_threads(asked["threads"])
    sys.path.insert(0, folder)
    modeling = importlib.import_module("modeling_aria")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = modeling.AriaDiffusionForCausalLM.from_pretrained(folder).eval()

    # ids of the strings, logits of the rows, text behind the prompt
    ids = torch.tensor(asked["ids"])
    prompt = torch.tensor([asked["prompt"]])
    found = {
        "strings": tokenizer(asked["strings"])["input_ids"],
        "mask_id": tokenizer.mask_token_id,
        "written": {},
    }
    tensors = {"next": model(input_ids=ids).logits}
    for block in asked["blocks"]:
        written = model.generate(
            prompt, max_new_tokens=asked["new"], block_size=block, temperature=0
        )
        found["written"][block] = written[0].tolist()
    if asked["masked"]:
        filling = modeling.AriaDiffusionForMaskedLM.from_pretrained(folder).eval()
        tensors["masked"] = filling(input_ids=torch.tensor(asked["masked"])).logits

    with open(answers + ".json", "w", encoding="utf-8") as file:
        json.dump(found, file)
    save_file(tensors, answers + ".safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
