"""The five instruction sets of MiniLLM (Gu et al. 2024, arXiv 2306.08543), which the papers after it evaluate on.

Their files are jsonl with "instruction", "input" and "output", which is a text or a list of texts.
"""

from __future__ import annotations

#: fields of DataConfig that read MiniLLM's layout, from a file as from the hub
LAYOUT = {"prompt_field": "instruction", "input_field": "input", "response_field": "output"}
_HUB = "hf://datasets/MiniLLM/"
#: name -> fields of DataConfig. One file each: beside it lies a .txt, which `datasets` would read as data too.
SETS = {
    "dolly": LAYOUT | {"source": f"{_HUB}dolly/valid.jsonl"},  # 500 rows
    "self_inst": LAYOUT | {"source": f"{_HUB}self-inst/valid.jsonl"},  # 242 rows
    "vicuna": LAYOUT | {"source": f"{_HUB}Vicuna/valid.jsonl"},  # 80 rows
    "sni": LAYOUT | {"source": f"{_HUB}sinst/11_/valid.jsonl"},  # 1,694 rows: answers of 11 words and more
    "unni": LAYOUT | {"source": f"{_HUB}uinst/11_/valid.jsonl", "max_rows": 10_000},  # the first 10,000 of the file
}
