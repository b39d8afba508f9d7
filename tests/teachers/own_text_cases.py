"""What the pools' ranks run for the tests of the teacher's own text. Nothing here is a test."""

from unittest import mock

import torch
from transformers import AutoModelForCausalLM

from tests.run.run_cases import run_tiny
from toolkit.data import load_data
from toolkit.models import load_tokenizer, shared_vocabulary
from toolkit.ranks import heartbeat
from toolkit.rollout.decode import decode
from toolkit.rollout.local import GatheredRollout, SeededSampling, sequence_seed
from toolkit.run import distill
from toolkit.settings import RunConfig
from toolkit.teachers import own_text


def teacher_answers(overrides, count):
    """What a dense copy of the teacher answers to the first `count` training prompts, one by one."""
    config = RunConfig().with_overrides(overrides)
    tokenizer = load_tokenizer(config.teacher, config.teacher.path)
    data = load_data(config.data, tokenizer, config.seed)
    model = AutoModelForCausalLM.from_pretrained(config.teacher.path, dtype=torch.float32).eval()
    vocabulary = shared_vocabulary(tokenizer, tokenizer)
    texts = []
    for row in range(count):
        sampling = SeededSampling(config.max_new_tokens, 1.0, seeds=[sequence_seed(config.seed, 0, row)])
        texts += decode(model, [data.train[row].prompt], sampling, vocabulary, 1)[0]
    return texts


def run_watching_teacher_text(overrides, file_rows):
    """(how often the watchdog was told of the phase teacher_text, whether it was told of progress within each call that
    generated in it) of a run that keeps the teacher's text in files of so many rows."""
    calls, phases, complete = [], [], GatheredRollout.complete

    class Watched(distill.Watchdog):
        def progress(self, phase, step=None):
            phases.append(phase)
            super().progress(phase, step)

    def watched(self, *args):
        before_s = heartbeat._last_s
        texts = complete(self, *args)
        if phases[-1] == "teacher_text":
            calls.append(heartbeat._last_s > before_s)
        return texts

    with (
        mock.patch.object(distill, "Watchdog", Watched),
        mock.patch.object(own_text, "FILE_ROWS", file_rows),
        mock.patch.object(GatheredRollout, "complete", watched),
    ):
        run_tiny(overrides)
    return phases.count("teacher_text") - 1, calls
