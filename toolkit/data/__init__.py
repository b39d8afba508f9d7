"""Data: sources -> templates -> tokens -> examples. `load_data` does all of it."""

from toolkit.data.dataset import PromptDataset
from toolkit.data.load import Data, load_data, load_text, split_rows
from toolkit.data.sources import load_rows, references
from toolkit.data.templates import TEMPLATES, end_with_turns, get_template
from toolkit.data.text import TextStream
from toolkit.data.tokens import Tokenized, tokenize_rows
from toolkit.settings import DataConfig, TextConfig

__all__ = [
    "TEMPLATES",
    "Data",
    "DataConfig",
    "PromptDataset",
    "TextConfig",
    "TextStream",
    "Tokenized",
    "end_with_turns",
    "get_template",
    "load_data",
    "load_rows",
    "load_text",
    "references",
    "split_rows",
    "tokenize_rows",
]
