"""What a micro-batch carries, how the layout of a model's rows shapes it, and an optimizer step's window of them. It
imports no other room."""

# ruff: noqa: F401 - the names imported here are what the room offers

from toolkit.batch.layout import DECODER_ONLY, DecoderOnly, EncoderDecoder, RowLayout, layout_of
from toolkit.batch.token_batch import Example, TokenBatch, round_up
from toolkit.batch.window import make_window
