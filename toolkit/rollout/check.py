"""Whether a model says, through a decode loop and its cache, what it says without: asked of the model itself."""

import numpy as np
import torch

from toolkit.models.engines import both_logits, evaluation_mode
from toolkit.models.head import TOLERANCE
from toolkit.rollout.local import GatheredRollout
from toolkit.rollout.sampling import SeededSampling

LENGTHS, NEW_TOKENS, ROWS = (3, 8, 1, 6, 5), 6, 3
#: share of the tokens that may differ: rounding in bf16 may send one to other experts
DIFFERING = {torch.float32: 0.0, torch.bfloat16: 0.2}


def check_generation(role: str, rollout: GatheredRollout) -> None:
    """Each token of some greedy texts has to be the likeliest by one pass over the whole text too; in bf16, most. A few
    small passes; collective. Raises ValueError for a model that the decode loops do not fit, and where its own code
    fails in one."""
    vocabulary, model = rollout.vocabulary, rollout.engine.module.model
    # Prompts of several lengths, in fewer rows than prompts, and every third id ends a text: rows end, move and refill.
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, vocabulary.size, length).astype(np.int32) for length in LENGTHS]
    several_ends = vocabulary._replace(eos_ids=tuple(range(0, vocabulary.size, 3)))
    trial = GatheredRollout(rollout.engine, several_ends, ROWS, rollout.cache_mib, rollout.gather)
    greedy = SeededSampling(max_new_tokens=NEW_TOKENS, temperature=0.0, seeds=range(len(prompts)))
    about = (
        f"the {role}, a {model.config.model_type} model, cannot be made to speak by the decode loops here: {{}}. Use a "
        "model of another family, or ask for no text of it: schedule.policy=off, validation.samples=0, "
        "validation.scored_rows=0"
    )
    try:
        examples = trial.complete(prompts, greedy)
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(about.format(f"{type(error).__name__}: {error}")) from error
    # The same texts in one pass: by how much of a logit each chosen token falls short of the likeliest.
    batch = vocabulary.layout.batch(examples, vocabulary.pad_id)
    with evaluation_mode(rollout.engine):
        logits_NV = both_logits(rollout.engine, batch)[0][:, : vocabulary.size].float()
    said_N1 = batch.targets_N.to(logits_NV.device)[:, None]
    short_N = logits_NV.amax(1) - logits_NV.gather(1, said_N1)[:, 0]
    differing = float((short_N > TOLERANCE[model.dtype] * logits_NV.abs().max()).float().mean())
    if differing > DIFFERING[model.dtype]:
        raise ValueError(about.format("token by token it says other text than in one pass"))
