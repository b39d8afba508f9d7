"""Generation by a ZeRO-3 sharded model: parameters are gathered once, hooks are off, and no rank waits for another.

Shapes: B rows, T tokens so far, V the vocabulary's real size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import deepspeed
import numpy as np
import torch
from deepspeed.runtime.rollout import RolloutBatch, RolloutEngine, RolloutRequest, SamplingConfig
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from toolkit.batch import Example
from toolkit.faults import Halving
from toolkit.models.engines import logit_rules
from toolkit.models.vocabulary import Vocabulary
from toolkit.rollout.schedule import philox


@dataclass
class SeededSampling(SamplingConfig):
    """DeepSpeed's sampling settings and a seed for each prompt, so that a text depends neither on the rows generated
    beside it nor on the number of ranks. temperature <= 0 is greedy."""

    seeds: Sequence[int] = ()


class GatheredRollout(RolloutEngine):
    """Generates on each rank for itself, from parameters gathered once a call.

    engine: a deepspeed engine whose module has the language model as `.model`. batch_rows: rows decoded together.
    """

    name = "gathered"

    def __init__(self, engine: Any, vocabulary: Vocabulary, batch_rows: int | None = None):
        self.engine, self.vocabulary = engine, vocabulary
        self.rows = Halving("generation", "rows", batch_rows)

    def sync_weights(self, step: int) -> None:
        """The engine's own weights are used: nothing to push."""

    def complete(self, prompts: Sequence[np.ndarray], sampling: SeededSampling) -> list[Example]:
        """Prompts (int [L] each) and what the model says after them, order kept.

        Every rank calls it, with any number of prompts, none included: only the gathering is collective.
        Raises ValueError unless there is one seed a prompt.
        """
        if len(sampling.seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts with {len(sampling.seeds)} seeds; give one seed for each prompt")
        left = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        found: list[Example | None] = [None] * len(prompts)

        def answer(size: float | None) -> tuple[list[int], RolloutBatch]:
            rows = left if size is None else left[: int(size)]
            part = replace(sampling, seeds=[sampling.seeds[row] for row in rows])
            request = _left_padded([prompts[row] for row in rows], self.vocabulary.pad_id, _device(model))
            return rows, _decode(model, request, part, self.vocabulary)

        with whole_model(self.engine) as model:
            while left:
                rows, batch = self.rows.run(answer, whole=len(left))
                left = left[len(rows) :]
                for row, example in zip(rows, _examples(batch), strict=True):
                    found[row] = example
        return found  # type: ignore[return-value]

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """DeepSpeed's interface: one batch, `n_samples_per_prompt` texts for each row, beside each other."""
        repeats = sampling.n_samples_per_prompt
        request = RolloutRequest(
            request.prompt_ids.repeat_interleave(repeats, 0),
            request.prompt_attention_mask.repeat_interleave(repeats, 0),
        )
        rows = len(request.prompt_ids)
        seeds = getattr(sampling, "seeds", None) or range(rows)
        if len(seeds) != rows:
            raise ValueError(f"{rows} texts asked for with {len(seeds)} seeds; give one seed for each text")
        seeded = SeededSampling(**{**vars(sampling), "seeds": seeds})
        with whole_model(self.engine) as model:
            return _decode(model, request, seeded, self.vocabulary)


@contextmanager
def whole_model(engine: Any) -> Iterator[PreTrainedModel]:
    """The engine's model with all parameters on this rank and without ZeRO hooks, in eval mode. Collective to enter and
    to leave; between the two the ranks are free. Hooks and mode come back even when generation fails."""
    model, was_training = engine.module.model, engine.module.training
    engine.module.eval()
    try:
        if engine.zero_optimization_stage() < 3:
            yield model
            return
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
            # With the hooks on, every layer is gathered and released for every token, gathered before or not.
            offload._remove_module_hooks()
            offload.forward_hooks.clear()  # deepspeed keeps the dead handles, and pushes the module once per set-up
            offload.backward_hooks.clear()
            FWD_MODULE_STACK.pop()
            try:
                yield model
            finally:
                offload.setup_zero_stage3_hooks()
    finally:
        engine.module.train(was_training)


@torch.no_grad()
def _decode(
    model: PreTrainedModel, request: RolloutRequest, sampling: SeededSampling, vocabulary: Vocabulary
) -> RolloutBatch:
    ids_BT, mask_BT = request.prompt_ids, request.prompt_attention_mask
    rows, prompt_width = ids_BT.shape
    draws_BT = torch.tensor(
        np.stack([np.random.Generator(philox(seed)).random(sampling.max_new_tokens) for seed in sampling.seeds]),
        device=ids_BT.device,
    )
    eos_ids = torch.tensor(vocabulary.eos_ids, device=ids_BT.device)
    texts_BT = ids_BT.new_full((rows, sampling.max_new_tokens), vocabulary.pad_id)
    lengths_B = ids_BT.new_zeros(rows)
    alive = torch.arange(rows, device=ids_BT.device)  # which row each line of the running batch is
    positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
    step_ids_BT, step_mask_BT = ids_BT, mask_BT
    cache = DynamicCache(config=model.config)
    cache_argument = {_cache_name(model): cache}
    for t in range(sampling.max_new_tokens):
        hidden_BTH = model.base_model(
            input_ids=step_ids_BT,
            attention_mask=step_mask_BT,
            position_ids=positions_BT,
            use_cache=True,
            **cache_argument,
        ).last_hidden_state
        next_B = choose_tokens(_logits(model, hidden_BTH[:, -1], vocabulary.size), sampling, draws_BT[alive, t])
        texts_BT[alive, t] = next_B
        lengths_B[alive] = t + 1
        going_B = ~torch.isin(next_B, eos_ids)
        if not going_B.all():
            keep = going_B.nonzero().squeeze(1)
            if not len(keep):
                break
            cache.batch_select_indices(keep)
            alive, next_B = alive[keep], next_B[keep]
            step_mask_BT, positions_BT = step_mask_BT[keep], positions_BT[keep]
        step_ids_BT = next_B[:, None]
        step_mask_BT = torch.cat([step_mask_BT, step_mask_BT.new_ones(len(alive), 1)], 1)
        positions_BT = positions_BT[:, -1:] + 1
    longest = int(lengths_B.max())
    response_mask_BT = torch.arange(longest, device=ids_BT.device) < lengths_B[:, None]
    return RolloutBatch(
        input_ids=torch.cat([ids_BT, texts_BT[:, :longest]], 1),
        attention_mask=torch.cat([mask_BT, response_mask_BT.to(mask_BT.dtype)], 1),
        response_start_idx=ids_BT.new_full((rows,), prompt_width),
    )


def _cache_name(model: PreTrainedModel) -> str:
    """transformers renames `past_key_values` to `cache`, model by model."""
    return "cache" if "cache" in inspect.signature(model.base_model.forward).parameters else "past_key_values"


def _logits(model: PreTrainedModel, hidden_BH: Tensor, vocab_size: int) -> Tensor:
    scale, soft_cap = logit_rules(model.config)
    logits_BV = model.get_output_embeddings()(hidden_BH)[:, :vocab_size].float() * scale
    return logits_BV if soft_cap is None else soft_cap * torch.tanh(logits_BV / soft_cap)


def sequence_seed(seed: int, step: int, row: int) -> int:
    """The seed of one generated text: of row `row` of the global batch, whichever rank it is on."""
    return int(philox(seed, step, row).random_raw())


def choose_tokens(logits_BV: Tensor, sampling: SamplingConfig, draws_B: Tensor) -> Tensor:
    """Greedy for temperature <= 0; else the inverse of the cumulative distribution at `draws_B` (uniform in [0, 1)),
    after top-k and then nucleus (top-p, arXiv 1904.09751) filtering. The likeliest token always stays."""
    if sampling.temperature <= 0:
        return logits_BV.argmax(-1)
    probs_BV = torch.softmax(logits_BV.double() / sampling.temperature, -1)
    if 0 < sampling.top_k < probs_BV.shape[1] or sampling.top_p < 1:
        sorted_BV, index_BV = probs_BV.sort(-1, descending=True)
        if 0 < sampling.top_k < probs_BV.shape[1]:
            sorted_BV[:, sampling.top_k :] = 0
            sorted_BV /= sorted_BV.sum(-1, keepdim=True)
        if sampling.top_p < 1:
            sorted_BV[(sorted_BV.cumsum(-1) - sorted_BV) >= sampling.top_p] = 0
        probs_BV = torch.zeros_like(probs_BV).scatter_(1, index_BV, sorted_BV)
    cumulative_BV = probs_BV.cumsum(-1)
    return torch.searchsorted(cumulative_BV, draws_B[:, None] * cumulative_BV[:, -1:], right=True).squeeze(1)


def _left_padded(prompts: Sequence[np.ndarray], pad_id: int, device: torch.device) -> RolloutRequest:
    width = max(len(prompt) for prompt in prompts)
    ids_BT = np.full((len(prompts), width), pad_id, dtype=np.int64)
    mask_BT = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids_BT[row, width - len(prompt) :] = prompt
        mask_BT[row, width - len(prompt) :] = 1
    return RolloutRequest(torch.from_numpy(ids_BT).to(device), torch.from_numpy(mask_BT).to(device))


def _examples(batch: RolloutBatch) -> Iterator[Example]:
    ids_BT, mask_BT = batch.input_ids.cpu().numpy(), batch.attention_mask.cpu().numpy().astype(bool)
    for ids, mask, start in zip(ids_BT, mask_BT, batch.response_start_idx.tolist(), strict=True):
        yield Example(ids[mask].astype(np.int32), int(mask[:start].sum()))


def _device(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device
