"""The teacher that is loaded, behind an engine of its own, or nobody in its place.

Shapes: N response positions of a micro-batch, Ht the teacher's hidden size, V head rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from toolkit.batch import TokenBatch
from toolkit.divergences import Head
from toolkit.models import Vocabulary, load_model, zero
from toolkit.models.build import WholeModel, check_engine, name_of
from toolkit.models.ds_config import teacher_ds_config
from toolkit.models.engines import TeacherForward
from toolkit.models.head import head_of
from toolkit.models.parts import split_where_memory_runs_out
from toolkit.models.vocabulary import check_head
from toolkit.ranks import collectives
from toolkit.settings import RunConfig


class Teacher:
    """The frozen model that is imitated. It answers with hidden states at response positions, Ht numbers a token."""

    kind = "live"

    def __init__(self, engine: Any, rows_per_pass: int | None = None, window_rows: int = 1):
        self.engine, self.rows_per_pass, self.window_rows = engine, rows_per_pass, window_rows

    @property
    def model(self) -> PreTrainedModel:
        """The language model inside of the engine's module."""
        return self.engine.module.model

    @torch.no_grad()
    def signals(self, window: list[TokenBatch]) -> list[Tensor]:
        """For each micro-batch its hidden_NT, in the order of `targets_N`. Every rank has as many micro-batches in its
        window, so every rank makes as many passes, and enters as many all-gathers."""
        # How many micro-batches share a pass follows from settings alone: on other ranks they may have other numbers of
        # rows.
        per_pass = max(1, (self.rows_per_pass or self.window_rows) * len(window) // self.window_rows)
        found: list[Tensor] = []
        for start in range(0, len(window), per_pass):
            part = window[start : start + per_pass]
            joined = TokenBatch.concatenate(part)
            hidden_NT = self.engine(joined)
            found += hidden_NT.split([batch.num_targets for batch in part])
        return found

    @contextmanager
    def head(self) -> Iterator[Head]:
        """The gathered output projection, once for a whole window: no tile loop communicates."""
        parameters = list(self.model.get_output_embeddings().parameters())
        with zero.gathered(parameters):
            head = head_of(self.model)
            # .data: a partitioned parameter handed to another engine's forward would be released by its hooks.
            bias_V = None if head.bias_V is None else head.bias_V.data
            yield replace(head, weight_VH=head.weight_VH.data, bias_V=bias_V)


class NoTeacher:
    """In the place of a teacher where a run trains on the cross entropy with its data alone."""

    kind = None

    def signals(self, window: list[TokenBatch]) -> list[None]:
        """None for each micro-batch."""
        return [None] * len(window)

    @contextmanager
    def head(self) -> Iterator[None]:
        """None."""
        yield None


def build_teacher(config: RunConfig, path: str, dtype: torch.dtype, vocabulary: Vocabulary) -> Teacher:
    """The model at `path`, which `materialize` returned, frozen and behind an engine. Collective; raises ValueError on
    every rank for a model that cannot be loaded, does not fit the tokenizer, or makes its logits in an unknown way."""
    is_resident = config.teacher.sharding == "resident"
    ds_config = None if is_resident else teacher_ds_config(config, name_of(dtype))
    model = collectives.together(lambda: load_model(config.teacher, path, ds_config, dtype, config.seed))
    check_head("teacher", zero.whole_shape(model.get_output_embeddings().weight)[0], vocabulary)
    model.requires_grad_(False)
    split_where_memory_runs_out(model)
    module = TeacherForward(model)
    engine = WholeModel(module.to(collectives.device())) if ds_config is None else zero.initialize(module, ds_config)
    engine.eval()
    check_engine("teacher", engine, vocabulary)
    return Teacher(engine, config.teacher.rows_per_pass, config.train.rows_per_step // collectives.world())


def whole_teacher(model: PreTrainedModel, vocabulary: Vocabulary) -> Teacher:
    """A model that others are measured against: whole on each rank, without deepspeed. Raises ValueError as
    `build_teacher` does."""
    check_head("teacher", len(model.get_output_embeddings().weight), vocabulary)
    engine = WholeModel(TeacherForward(model))
    check_engine("teacher", engine, vocabulary)
    return Teacher(engine)
