"""What an older transformers reads of model folders. A program of its own, with that version first on its path:

python read_by_transformers4.py FOLDERS.json FOUND.pt

FOLDERS.json lists folders, FOUND.pt gets for each what `found_in` returns.
"""

import json
import sys

import torch
import transformers

IDS_BT = torch.arange(5, 85)[None]  # longer than the 64 positions that scaled models were made for
TEXT = "<s>Copy a file to a folder, or None: 42 äß\n\n  two  spaces <|end|>"


def found_in(folder):
    """Logits, and of the tokenizer the ids of TEXT, what it makes of them, and the names of its outputs."""
    with open(f"{folder}/config.json") as file:
        is_encoder_decoder = json.load(file).get("is_encoder_decoder")
    kind = transformers.AutoModelForSeq2SeqLM if is_encoder_decoder else transformers.AutoModelForCausalLM
    model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    extra = {"decoder_input_ids": IDS_BT[:, :9]} if is_encoder_decoder else {}
    with torch.no_grad():
        logits_BTV = model.eval()(IDS_BT, use_cache=False, **extra).logits
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(TEXT)
    return {
        "logits": logits_BTV,
        "report": {name: sorted(map(str, values)) for name, values in report.items() if values},
        "ends": model.generation_config.eos_token_id,
        "ids": ids["input_ids"],
        "outputs": sorted(ids),
        "text": tokenizer.decode(ids["input_ids"]),
        "plain_text": tokenizer.decode(ids["input_ids"], skip_special_tokens=True),
        "special": sorted(tokenizer.all_special_tokens),
        "chat": tokenizer.chat_template
        and tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
    }


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        folders = json.load(file)
    torch.save({folder: found_in(folder) for folder in folders}, sys.argv[2])
