"""What the parts of gpu_check.py share: arguments, numbers that are kept as they come, tables, and the shapes."""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from toolkit.tables import Cell, format_table

#: part of a card's name -> dense bf16 TFLOP/s with fp32 sums, by NVIDIA's data sheets; the first that fits counts
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "H20": 148, "H800": 989, "A100": 312,
    "A800": 312, "B200": 2250, "L40S": 362,
}  # fmt: skip
TINY = dict(
    model_type="llama", vocab_size=320, max_position_embeddings=128, rms_norm_eps=1e-6, hidden_size=32,
    num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
)  # fmt: skip


@dataclass
class Record:
    """Numbers of a part, written anew with each change: a part that is stopped leaves what it had. Tables go to the
    stdout that the process began with; all else that is printed, by libraries too, goes to stderr."""

    file: Path | None
    numbers: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        sys.stdout.flush()
        self.stdout = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def keep(self, **numbers: object) -> None:
        """Adds these numbers by name, and writes all of them."""
        self.numbers |= numbers
        if self.file:
            unfinished = self.file.with_suffix(".new")
            unfinished.write_text(json.dumps(self.numbers, indent=1))
            unfinished.replace(self.file)

    def say(self, text: str) -> None:
        """A paragraph of the report."""
        print(text + "\n", file=self.stdout, flush=True)

    def table(self, headers: list[str], rows: list[list[Cell]]) -> None:
        """A table of the report."""
        self.say(format_table(headers, rows))


def parser_of(documentation: str | None) -> argparse.ArgumentParser:
    """With the options of all parts."""
    parser = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs, and no figures")
    parser.add_argument("--json", type=Path)
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options. Ends the program where they ask for a GPU and there is none."""
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --tiny tries whether everything runs")
    return options


def peak_tflops(card: str) -> float | None:
    """Of the data sheet; None for a card that is not known."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in card), None)


def shapes(tiny: bool) -> tuple[dict, dict]:
    """Of teacher and student, those of recipes/llama_7b_to_1b.py: OpenLLaMA-7B, and its 1.3B student."""
    from recipes.llama_7b_to_1b import RECIPE, SHAPE_7B

    if tiny:
        return TINY, TINY | dict(hidden_size=16, num_hidden_layers=2)
    init = RECIPE.init
    cut = dict(hidden_size=init.hidden, num_hidden_layers=init.layers, num_attention_heads=init.heads)
    return SHAPE_7B, SHAPE_7B | cut | dict(num_key_value_heads=init.kv_heads, intermediate_size=init.mlp)


def synchronize(device: str) -> None:
    """Waits for the GPU, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()
