"""Data: sources -> templates -> tokens -> examples. `load_data` does all of it. Imports batch, ranks,
settings and storage."""
# ruff: noqa: F401 (what is imported here is what other rooms may use)

from toolkit.data.dataset import PromptDataset
from toolkit.data.load import Data, load_data, load_text, split_rows
from toolkit.data.sources import load_rows, references
from toolkit.data.templates import end_with_turns, get_template
from toolkit.data.text import TextStream
from toolkit.data.tokens import Tokenized, tokenize_rows
from toolkit.settings import DataConfig, TextConfig
