"""What the pools' ranks run: whole runs, observed. Nothing here is a test."""

import contextlib
import hashlib
import io

import torch

from toolkit.config import RunConfig
from toolkit.loop import DistillationLoop
from toolkit.run import main


def run_tiny(overrides):
    """The summary of a whole run through `main`."""
    return _main(overrides)


def run_expecting_exit(overrides):
    """(exit code, what was said on stderr) of a run that has to fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _main(overrides)
    except SystemExit as exit_:
        return exit_.code, said.getvalue()
    return 0, said.getvalue()


def run_recording_sources(overrides):
    """For each step (source, hash of this rank's examples)."""
    seen, original = [], DistillationLoop.choose_examples

    def choose(self, step):
        source, examples = original(self, step)
        digest = hashlib.sha256(b"".join(e.tokens.tobytes() for e in examples)).hexdigest()
        seen.append((source.value, digest))
        return source, examples

    return _observed(choose, overrides, seen)


def run_generating_aside(overrides, fail=False):
    """A run that generates before every step and throws the text away; with `fail`, generation raises half-way."""
    from toolkit.rollout.engine import SeededSampling

    original = DistillationLoop.choose_examples

    def choose(self, step):
        prompts = [example.prompt for example in self.dataset.examples[:3]]
        if fail:
            prompts = [prompts[0], prompts[1] + 10**6]  # not in the embedding: raises inside the model
        try:
            self.rollout.complete(prompts, SeededSampling(5, seeds=range(len(prompts))))
        except IndexError:
            assert fail
        else:
            assert not fail
        return original(self, step)

    return _observed(choose, overrides, None)


def _observed(choose, overrides, result):
    original = DistillationLoop.choose_examples
    DistillationLoop.choose_examples = choose
    try:
        summary = _main(overrides)
    finally:
        DistillationLoop.choose_examples = original
    return summary if result is None else result


def _main(overrides):
    from toolkit import distributed

    keep, distributed.stop = distributed.stop, lambda: None  # the pool goes on using its group
    try:
        return main(RunConfig(name="tiny"), overrides)
    finally:
        distributed.stop = keep
        torch.distributed.barrier()


def with_engine(folder, work):
    """`work(rollout, tokenizer)` on a ZeRO-3 student of its own, in the middle of nothing else."""
    from pathlib import Path

    from tests.tiny import tiny_overrides
    from toolkit import distributed
    from toolkit.models import build_student, load_tokenizer, materialize, shared_vocabulary
    from toolkit.rollout.engine import GatheredRollout

    config = RunConfig().with_overrides(tiny_overrides(folder, train__micro_rows=8 // distributed.world()))
    path = materialize(config.student, Path(config.cache_dir))
    tokenizer = load_tokenizer(config.student, path)
    vocabulary = shared_vocabulary(tokenizer, tokenizer)
    student = build_student(config, path, torch.float32, vocabulary)
    return work(GatheredRollout(student.engine, vocabulary), tokenizer)


def sampled_texts(folder, prompts, batch_rows, gather="always", **sampling):
    """Token ids of the answers to `prompts`, dealt over the ranks and put together again."""
    return _sampled(folder, prompts, batch_rows, gather, **sampling)[0]


def sampled_texts_and_mode(folder, prompts, gather, free_bytes=None, **sampling):
    """The same with the mode that ran; `free_bytes`: this rank's free memory, as far as the choice knows."""
    from toolkit import distributed
    from toolkit.rollout import engine

    kept = engine._free_bytes
    if free_bytes is not None:
        engine._free_bytes = lambda: free_bytes[distributed.rank()]
    try:
        return _sampled(folder, prompts, None, gather, **sampling)
    finally:
        engine._free_bytes = kept


def texts_within_budget(folder, prompts, cache_mib, **sampling):
    """(token ids, what the engine says of the call) with a bound on the key-value cache; one rank."""
    from toolkit.rollout.engine import SeededSampling

    def work(rollout, tokenizer):
        rollout.cache_mib = cache_mib
        seeded = SeededSampling(seeds=range(len(prompts)), **sampling)
        found = rollout.complete([tokenizer(prompt)["input_ids"] for prompt in prompts], seeded)
        return [example.response.tolist() for example in found], rollout.last

    return with_engine(folder, work)


def _sampled(folder, prompts, batch_rows, gather, **sampling):
    from toolkit import distributed
    from toolkit.rollout.engine import SeededSampling, sequence_seed

    def work(rollout, tokenizer):
        rollout.batch_rows, rollout.gather = batch_rows, gather
        rank, world = distributed.rank(), distributed.world()
        rows = range(rank, len(prompts), world)
        seeded = SeededSampling(seeds=[sequence_seed(7, 0, row) for row in rows], **sampling)
        found = rollout.complete([tokenizer(prompts[row])["input_ids"] for row in rows], seeded)
        dealt = distributed.gather_objects([example.response.tolist() for example in found])
        return [dealt[row % world][row // world] for row in range(len(prompts))], rollout.last.mode

    return with_engine(folder, work)


def hooks_around_generation(folder):
    """(forward hooks before, inside, after) and whether parameters are partitioned again after generation."""
    from toolkit.rollout.engine import whole_model

    def count(module):
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())

    def work(rollout, tokenizer):
        module = rollout.engine.module.model
        before = count(module)
        with whole_model(rollout.engine) as model:
            inside, whole = count(module), all(p.numel() == p.ds_numel for p in model.parameters())
        for _ in range(3):
            with whole_model(rollout.engine):
                pass
        weight = module.model.layers[0].mlp.up_proj.weight
        offload = rollout.engine.optimizer.parameter_offload
        return before, inside, count(module), whole, weight.numel(), len(offload.forward_hooks)

    return with_engine(folder, work)


def loaded(path, dtype, model=None):
    """(elements of a large parameter held outside its partition, all parameters gathered) after a ZeRO-3 load."""
    import deepspeed

    from toolkit.config import ModelConfig
    from toolkit.models import load_model

    ds_config = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    found = load_model(model or ModelConfig(path=path), path, ds_config, dtype, seed=3)
    local = found.get_output_embeddings().weight.numel()
    with deepspeed.zero.GatheredParameters(list(found.parameters()), modifier_rank=None):
        return local, {name: parameter.detach().clone() for name, parameter in found.named_parameters()}
