"""What the pools' ranks run: whole runs, observed. Nothing here is a test."""

import contextlib
import hashlib
import io
import operator
import os
from unittest import mock

import torch

from toolkit.run.loop import DistillationLoop
from toolkit.run.recipe import main
from toolkit.settings import RunConfig


def run_tiny(overrides):
    """The summary of a whole run through `main`."""
    return _main(overrides)


def run_with_own(overrides_by_rank):
    """(exit code, what was said on stderr) of a run that is started on each rank with settings of its own."""
    from toolkit.ranks import collectives

    return run_expecting_exit(overrides_by_rank[collectives.rank()])


def run_expecting_exit(overrides, recipe=None):
    """(exit code, what was said on stderr) of a run that has to fail."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _main(overrides, recipe)
    except SystemExit as exit_:
        return exit_.code, said.getvalue()
    return 0, said.getvalue()


def run_recording_sources(overrides):
    """For each step (source, hash of this rank's examples)."""
    seen = []

    def choose(loop, step, choose_examples):
        source, examples = choose_examples(loop, step)
        digest = hashlib.sha256(b"".join(e.tokens.tobytes() for e in examples)).hexdigest()
        seen.append((source.value, digest))
        return source, examples

    with choosing(choose):
        _main(overrides)
    return seen


def run_recording_texts(overrides):
    """For each call of a training step that generates: its prompts, the seeds of its texts, and these, on this rank.
    And what each step learns from."""
    from toolkit.rollout.local import GatheredRollout

    calls, learned, original = [], [], GatheredRollout.complete

    def choose(loop, step, choose_examples):
        def complete(self, prompts, sampling):
            found = original(self, prompts, sampling)
            texts = [example.tokens.tolist() for example in found]
            calls.append(([prompt.tolist() for prompt in prompts], list(sampling.seeds), texts))
            return found

        with mock.patch.object(GatheredRollout, "complete", complete):
            source, examples = choose_examples(loop, step)
        learned.append([example.tokens.tolist() for example in examples])
        return source, examples

    with choosing(choose):
        _main(overrides)
    return calls, learned


def run_generating_aside(overrides, fail=False):
    """A run that generates before every step and throws the text away; with `fail`, generation raises half-way."""
    from toolkit.rollout.local import SeededSampling

    def choose(loop, step, choose_examples):
        prompts = [example.prompt for example in loop.dataset.examples[:3]]
        try:
            with failing("choose_tokens", call=3) if fail else contextlib.nullcontext():
                loop.parts.rollout.complete(prompts, SeededSampling(5, seeds=range(len(prompts))))
        except RuntimeError as error:
            assert fail and "made to fail" in str(error)
        else:
            assert not fail
        return choose_examples(loop, step)

    with choosing(choose):
        return _main(overrides)


def teacher_answers(overrides, count):
    """What a dense copy of the teacher answers to the first `count` training prompts, one by one."""
    from transformers import AutoModelForCausalLM

    from toolkit.data import load_data
    from toolkit.models import load_tokenizer, shared_vocabulary
    from toolkit.rollout.decode import decode
    from toolkit.rollout.local import SeededSampling, sequence_seed

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


@contextlib.contextmanager
def failing(name, call, ranks=(0, 1)):
    """The decode loop with the `call`-th call of its function `name` raising on these ranks."""
    from toolkit.ranks import collectives
    from toolkit.rollout import decode

    *owners, name_there = name.split(".")
    owner = operator.attrgetter(*owners)(decode) if owners else decode
    original, calls = getattr(owner, name_there), []

    def work(*args, **kwargs):
        calls.append(name)
        if len(calls) == call and collectives.rank() in ranks:
            raise MemoryError(f"made to fail in {name}")
        return original(*args, **kwargs)

    with mock.patch.object(owner, name_there, work):
        yield


@contextlib.contextmanager
def choosing(choose):
    """`choose(loop, step, choose_examples)` in the place of the loop's `choose_examples`."""
    original = DistillationLoop.choose_examples
    with mock.patch.object(DistillationLoop, "choose_examples", lambda self, step: choose(self, step, original)):
        yield


@contextlib.contextmanager
def signalled(number, step_number, ranks=(0,)):
    """These ranks get a real signal while this step (counted from 1) runs."""
    from toolkit.ranks import collectives

    def choose(loop, step, choose_examples):
        if step + 1 == step_number and collectives.rank() in ranks:
            os.kill(os.getpid(), number)
        return choose_examples(loop, step)

    with choosing(choose):
        yield


def run_recipe(name, overrides):
    """The summary of a file of recipes/ with changed settings."""
    import importlib

    return _main(overrides, importlib.import_module(f"recipes.{name}").RECIPE)


def _main(overrides, recipe=None):
    from toolkit.ranks import launch

    try:
        with mock.patch.object(launch, "stop", lambda: None):  # the pool goes on using its group
            return main(recipe or RunConfig(name="tiny"), overrides)
    finally:
        torch.distributed.barrier()


def with_engine(folder, work):
    """`work(rollout, tokenizer)` on a ZeRO-3 student of its own, in the middle of nothing else."""
    from toolkit.rollout.local import GatheredRollout

    return with_student(
        folder,
        lambda config, student, tokenizer, vocabulary: work(GatheredRollout(student.engine, vocabulary), tokenizer),
    )


def with_student(folder, work, **changes):
    """`work(config, student, tokenizer, vocabulary)` likewise; changes: settings of the run that it is part of."""
    from pathlib import Path

    from tests.tiny import tiny_overrides
    from toolkit.models import build_student, load_tokenizer, row_layout, shared_vocabulary
    from toolkit.pruning.made import materialize
    from toolkit.ranks import collectives

    overrides = tiny_overrides(folder, train__rows_per_micro_batch=8 // collectives.world(), **changes)
    config = RunConfig().with_overrides(overrides)
    path = materialize(config.student, Path(config.cache_dir))
    tokenizer = load_tokenizer(config.student, path)
    vocabulary = shared_vocabulary(tokenizer, tokenizer)
    vocabulary = vocabulary._replace(layout=row_layout(config.student, path))
    return work(config, build_student(config, path, torch.float32, vocabulary), tokenizer, vocabulary)


def with_server(folder, settings, work):
    """`work(rollout, tokenizer)` with a rollout that asks the server of `settings`."""
    from toolkit.rollout.vllm import VllmRollout

    return with_student(
        folder, lambda config, *made: work(VllmRollout(config, *made), made[1]), name="served",
        **{"rollout__server_timeout_s": 60} | settings,
    )  # fmt: skip


def server_texts(folder, settings, prompts, **sampling):
    """(token ids of the answers, all asked for by every rank, in another order on each; what the engine says of the
    call; the first three by DeepSpeed's interface, as (ids, their numbers))."""
    from deepspeed.runtime.rollout import RolloutRequest

    from toolkit.ranks import collectives
    from toolkit.rollout.local import SeededSampling

    def work(rollout, tokenizer):
        rollout.start()
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        order = list(range(len(ids)))[:: 1 if collectives.rank() == 0 else -1]
        found = rollout.complete([ids[i] for i in order], SeededSampling(seeds=order, **sampling))
        texts = dict(zip(order, (example.response.tolist() for example in found), strict=True))
        stats, width = rollout.last, max(map(len, ids[:3]))
        batch = rollout.generate(
            RolloutRequest(
                torch.tensor([[0] * (width - len(row)) + row for row in ids[:3]]),
                torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids[:3]]),
            ),
            SeededSampling(seeds=[0, 1, 2], **sampling),
        )
        counts = batch.attention_mask[:, width:].sum(1).tolist()
        return [texts[i] for i in range(len(ids))], stats, (batch.input_ids[:, width:].tolist(), counts)

    return with_server(folder, settings, work)


def server_errors(folder, settings, faults):
    """What a start, a push and two texts raise here for each fault of the server, "None" for nothing."""
    import dataclasses
    import time

    from toolkit.ranks import collectives
    from toolkit.rollout.local import SeededSampling

    def work(rollout, tokenizer):
        said, patient = [], rollout.settings
        hasty = dataclasses.replace(patient, server_timeout_s=2)  # than the fault that answers late
        with contextlib.suppress(ValueError):
            rollout.start()  # before its folder is written there is no server to tell of a fault
        for fault in faults:
            torch.distributed.barrier()
            if collectives.rank() == 0:
                rollout.server.ask("POST", "/fault", time.monotonic() + 60, fault)
            torch.distributed.barrier()
            rollout.pushed, rollout.settings = False, patient
            try:
                rollout.start()
                rollout.sync_weights(3)
                rollout.settings = hasty if "delay_s" in fault else patient
                prompts = [[5, 6, 7]] * (2 if collectives.rank() else 0)  # only the second rank asks for text
                rollout.complete(prompts, SeededSampling(30, seeds=range(len(prompts))))
                said.append("None")
            except ValueError as error:
                said.append(str(error))
        return said

    return with_server(folder, settings, work)


def exported_logits(folder, ids, **changes):
    """Logits of the student, and of what its export with a head of its own is to transformers; both in fp32."""
    from transformers import AutoModelForCausalLM

    from toolkit import distributed
    from toolkit.models.export import export_student

    def work(config, student, tokenizer, vocabulary):
        target = config.run_dir / "untied"
        export_student(student, tokenizer, target, untie_head=True)
        with torch.no_grad():
            own = student.model.eval()(input_ids=ids.to(distributed.device()), use_cache=False).logits.cpu()
            read = AutoModelForCausalLM.from_pretrained(target).eval()(input_ids=ids).logits
        return own, read

    return with_student(folder, work, **changes)


def sampled_texts(folder, prompts, rows_at_once, gather="always", **sampling):
    """Token ids of the answers to `prompts`, dealt over the ranks and put together again."""
    return _sampled(folder, prompts, rows_at_once, gather, **sampling)[0]


def sampled_texts_and_mode(folder, prompts, gather, free_bytes=None, **sampling):
    """The same with the mode that ran; `free_bytes`: this rank's free memory, as far as the choice knows."""
    from toolkit.ranks import collectives
    from toolkit.rollout import local

    kept = local.free_bytes
    if free_bytes is not None:
        local.free_bytes = lambda: free_bytes[collectives.rank()]
    try:
        return _sampled(folder, prompts, None, gather, **sampling)
    finally:
        local.free_bytes = kept


def texts_within_budget(folder, prompts, cache_mib, **sampling):
    """(token ids, what the engine says of the call) with a bound on the key-value cache; one rank."""
    from toolkit.rollout.local import SeededSampling

    def work(rollout, tokenizer):
        rollout.cache_mib = cache_mib
        seeded = SeededSampling(seeds=range(len(prompts)), **sampling)
        found = rollout.complete([tokenizer(prompt)["input_ids"] for prompt in prompts], seeded)
        return [example.response.tolist() for example in found], rollout.last

    return with_engine(folder, work)


def _sampled(folder, prompts, rows_at_once, gather, **sampling):
    from toolkit.ranks import collectives
    from toolkit.rollout.local import SeededSampling, sequence_seed

    def work(rollout, tokenizer):
        rollout.rows.size, rollout.gather = rows_at_once, gather
        rank, world = collectives.rank(), collectives.world()
        rows = range(rank, len(prompts), world)
        seeded = SeededSampling(seeds=[sequence_seed(7, 0, row) for row in rows], **sampling)
        found = rollout.complete([tokenizer(prompts[row])["input_ids"] for row in rows], seeded)
        dealt = collectives.gather_objects([example.response.tolist() for example in found])
        return [dealt[row % world][row // world] for row in range(len(prompts))], rollout.last.mode

    return with_engine(folder, work)


def texts_around_a_failure(folder, prompts, gather, name, call, ranks):
    """(what was raised here, the texts afterwards, those of an engine that saw no failure)."""
    from toolkit.rollout.local import SeededSampling

    def work(rollout, tokenizer):
        rollout.gather, rollout.rows.size = gather, 2
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]

        def texts():
            found = rollout.complete(ids, SeededSampling(12, temperature=0.9, seeds=range(len(ids))))
            return [example.response.tolist() for example in found]

        said, wanted = None, texts()
        try:
            with failing(name, call, ranks):
                texts()
        except RuntimeError as error:
            said = str(error)
        return said, texts(), wanted

    return with_engine(folder, work)


def error_of_unknown_ids(folder):
    """What each rank raises where the prompts of the last one hold an id that the vocabulary does not have."""
    import numpy as np

    from toolkit.ranks import collectives
    from toolkit.rollout.local import SeededSampling

    def work(rollout, tokenizer):
        highest = 10**6 if collectives.rank() == collectives.world() - 1 else 7
        try:
            rollout.complete([np.array([5, highest])], SeededSampling(3, seeds=[1]))
        except ValueError as error:
            return str(error)

    return with_engine(folder, work)


def zero3_config(dtype):
    return {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def loaded(path, dtype, model=None):
    """(elements of a large parameter held outside its partition, all parameters gathered) after a ZeRO-3 load."""
    import deepspeed

    from toolkit.models import load_model
    from toolkit.settings import ModelConfig

    found = load_model(model or ModelConfig(path=path), path, zero3_config(dtype), dtype, seed=3)
    local = found.get_output_embeddings().weight.numel()
    with deepspeed.zero.GatheredParameters(list(found.parameters()), modifier_rank=None):
        return local, {name: parameter.detach().clone() for name, parameter in found.named_parameters()}


def run_until(overrides, stop_after, number, ranks=(0,), recipe=None):
    """(exit code, stdout, stderr) of a run in which these ranks get a real signal while step `stop_after` runs."""
    with signalled(number, stop_after, ranks):
        return run_saying(overrides, recipe)


def run_saying(overrides, recipe=None):
    """(exit code, stdout, stderr) of a run."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code, err = run_expecting_exit(overrides, recipe)
    return code, out.getvalue(), err


def run_telling(overrides, file):
    """The exit code of a run whose rank 0 writes what it says to `file`, at once."""
    from toolkit.ranks import collectives

    opened = file.open("w", buffering=1) if collectives.rank() == 0 else io.StringIO()
    with opened, contextlib.redirect_stdout(opened):
        return run_expecting_exit(overrides)[0]


def run_watching_teacher_text(overrides, file_rows):
    """(how often the watchdog was told of the phase teacher_text, whether it was told of progress within each call that
    generated in it) of a run that keeps the teacher's text in files of so many rows."""
    from toolkit.ranks import heartbeat
    from toolkit.rollout.local import GatheredRollout
    from toolkit.run import distill
    from toolkit.teachers import own_text

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
        _main(overrides)
    return phases.count("teacher_text") - 1, calls


POISONS = {
    "loss": lambda found: found._replace(
        loss=found.loss * float("nan"), divergence_nats=found.divergence_nats * float("inf")
    ),
    "gradient": lambda found: found._replace(loss=found.loss * float("nan")),
    "spike": lambda found: found._replace(loss=found.loss * 1e3, divergence_nats=found.divergence_nats * 1e3),
}


def run_poisoned(overrides, poison, steps, ranks=(1,)):
    """(exit code, stdout, stderr, digest of this rank's weights after each step) of a run whose loss or gradient goes
    wrong on these ranks at these steps (counted from 1)."""
    from toolkit.models import Student
    from toolkit.models.shards import pieces
    from toolkit.ranks import collectives

    step_of, loss_of, digests, now = DistillationLoop.step, Student.loss, [], []

    def step(self, index):
        now[:] = [index + 1]
        record = step_of(self, index)
        digest = hashlib.sha256()
        for piece in pieces(self.parts.student.engine):
            digest.update(piece.tensor.numpy().tobytes())
        digests.append(digest.hexdigest())
        return record

    def loss(self, *args, **kwargs):
        found = loss_of(self, *args, **kwargs)
        is_training = torch.is_grad_enabled() and now
        return POISONS[poison](found) if is_training and now[0] in steps and collectives.rank() in ranks else found

    with mock.patch.object(DistillationLoop, "step", step), mock.patch.object(Student, "loss", loss):
        return *run_saying(overrides), digests


def run_with_failing_writes(overrides, steps):
    """A run whose last rank cannot write more than 4 KiB at these steps: a limit that the kernel enforces, as it does
    that of a full disk."""
    from toolkit.ranks import collectives
    from toolkit.storage import manifest

    write = manifest.write_safetensors

    def limited(path, tensors):
        fails = int(path.parent.name[5:13]) in steps and collectives.rank() == collectives.world() - 1
        with no_room_for_files() if fails else contextlib.nullcontext():
            return write(path, tensors)

    with mock.patch.object(manifest, "write_safetensors", limited):
        return run_saying(overrides)


@contextlib.contextmanager
def no_room_for_files(most_bytes=4096):
    """No file of this process may grow above this: the kernel refuses the write, as it does on a full disk."""
    import resource
    import signal

    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)


def run_with_failing_exports(overrides, names):
    """(exit code, stdout, stderr) of a run in which there is no room for the exports into folders of these names."""
    from toolkit.run import build

    export = build.export_student

    def limited(student, tokenizer, folder):
        with no_room_for_files() if folder.name in names else contextlib.nullcontext():
            return export(student, tokenizer, folder)

    with mock.patch.object(build, "export_student", limited):
        return run_saying(overrides)


def run_with_a_tokenizer_that_cannot_be_saved(overrides):
    """(exit code, stdout, stderr) of a run whose tokenizer holds a setting that is not of JSON's types."""
    from toolkit.run import inputs

    load = inputs.load_tokenizer

    def loaded(model, path):
        tokenizer = load(model, path)
        tokenizer.init_kwargs["made_by"] = object()
        return tokenizer

    with mock.patch.object(inputs, "load_tokenizer", loaded):
        return run_saying(overrides)


def error_of_one_rank(kind, failing_rank):
    """What `together` raises here where its work raises `kind` on this one rank."""
    from toolkit.ranks import collectives

    def work():
        if collectives.rank() == failing_rank:
            raise kind("no room")

    try:
        collectives.together(work)
    except Exception as error:
        return type(error), str(error)


def words_of_one_message(failing_ranks, is_told):
    """(exit code, stderr) of this rank where a ValueError of these ranks meets `one_message`."""
    from toolkit.ranks import collectives, launch

    said = io.StringIO()
    try:
        with (
            mock.patch.object(launch, "stop", lambda: None),
            contextlib.redirect_stderr(said),
            launch.one_message(),
        ):
            if collectives.rank() in failing_ranks:
                raise (collectives.Told if is_told else ValueError)("this is wrong")
    except SystemExit as exit_:
        return exit_.code, said.getvalue()
    finally:
        torch.distributed.barrier()
    return 0, said.getvalue()


def error_of_folders(folders):
    """What `check_shared` raises here where each rank has a folder of its own."""
    from toolkit.ranks import collectives

    try:
        collectives.check_shared(folders[collectives.rank()], within_s=0.5)
    except ValueError as error:
        return str(error)


def run_until_with_failing_writes(overrides, stop_after, number, steps):
    """As `run_until`, with signals to rank 0 and checkpoints of these steps that cannot be written."""
    with signalled(number, stop_after):
        return run_with_failing_writes(overrides, steps)


def run_poisoned_until(overrides, poison, steps, stop_after, number):
    """As `run_poisoned`, with a signal to rank 0 while step `stop_after` runs."""
    with signalled(number, stop_after):
        return run_poisoned(overrides, poison, steps)


def run_short_of_memory(overrides, limits):
    """(exit code, stderr, the largest result in bytes of each part) of a run whose teacher layers, generation or loss
    on this rank may make no tensor above `limits` (bytes, by part; a part that is not named has no limit)."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from tests.allocations import MemoryLimit
    from toolkit.models import engines
    from toolkit.rollout import local

    parts = {
        "loss": (engines, "fused_linear_divergence", lambda *args, **kwargs: torch.is_grad_enabled()),
        "teacher": (LlamaDecoderLayer, "forward", lambda layer, *args, **kwargs: kwargs.get("past_key_values") is None
                    and not torch.is_grad_enabled() and not layer.training),
        "generation": (local, "decode", lambda *args, **kwargs: True),
    }  # fmt: skip
    watched = {part: MemoryLimit(limits.get(part, float("inf"))) for part in parts}

    def within(limit, is_meant, call):
        def limited(*args, **kwargs):
            with limit if is_meant(*args, **kwargs) else contextlib.nullcontext():
                return call(*args, **kwargs)

        return limited

    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in parts.values()]
    for (part, (owner, name, is_meant)), (*_, call) in zip(parts.items(), kept, strict=True):
        setattr(owner, name, within(watched[part], is_meant, call))
    try:
        code, _, said = run_saying(overrides)
    finally:
        for owner, name, call in kept:
            setattr(owner, name, call)
    return code, said, {part: limit.most_bytes for part, limit in watched.items()}


def run_short_on_last_rank(overrides, limits):
    from toolkit.ranks import collectives

    return run_short_of_memory(overrides, limits if collectives.rank() == collectives.world() - 1 else {})


def newest_checkpoint(folders):
    """The name of the one to resume from, where each rank sees a folder of its own."""
    from toolkit.ranks import collectives
    from toolkit.run.checkpoint import Checkpoints

    return Checkpoints(folders[collectives.rank()], keep=2).newest()[0].folder.name


def loss_step(folder, memory_budget_mib):
    """Of one micro-batch through teacher and student: the most elements of any tensor that was made, targets times
    vocabulary, tiles of the loss, and how often each head was put away (after each gather once)."""
    from pathlib import Path

    import numpy as np

    from tests.allocations import LargestTensor
    from tests.tiny import tiny_overrides
    from toolkit.batch import Example
    from toolkit.divergences.tiles import Tiles
    from toolkit.models import (
        build_student,
        load_tokenizer,
        objective_of,
        row_layout,
        shared_vocabulary,
    )
    from toolkit.pruning.made import materialize
    from toolkit.teachers.live import build_teacher

    overrides = tiny_overrides(folder, loss__memory_budget_mib=memory_budget_mib)
    config = RunConfig().with_overrides(overrides)
    paths = [materialize(model, Path(config.cache_dir)) for model in (config.teacher, config.student)]
    tokenizer = load_tokenizer(config.student, paths[1])
    vocabulary = shared_vocabulary(tokenizer, tokenizer)._replace(layout=row_layout(config.student, paths[1]))
    teacher = build_teacher(config, paths[0], torch.float32, vocabulary)
    student = build_student(config, paths[1], torch.float32, vocabulary)
    draw = np.random.default_rng(5)
    batch = vocabulary.layout.batch([Example(draw.integers(5, 300, 96), 10) for _ in range(16)], 0)
    heads = {
        "teacher": teacher.model.get_output_embeddings().weight,
        "student": student.model.get_output_embeddings().weight,
    }
    gathers = dict.fromkeys(heads, 0)

    def counted(name, partition):
        def call(*args, **kwargs):
            gathers[name] += 1
            return partition(*args, **kwargs)

        return call

    for name, head in heads.items():
        head.partition = counted(name, head.partition)
    tiles, project = [], Tiles._project

    def counting(self, tile, columns):
        tiles.append((tile, columns))
        return project(self, tile, columns)

    with mock.patch.object(Tiles, "_project", counting), LargestTensor() as largest:
        hidden_NT = teacher.signals([batch])[0]
        with teacher.head() as head:
            found = student.loss(batch, hidden_NT, head, objective_of(config.loss), 1e-4)
            student.engine.backward(found.loss)
        student.engine.step()
    return largest.numel, batch.num_targets * vocabulary.size, len(tiles), gathers


def run_with_last_words(overrides, prompts, ids):
    """(logits of the token ids by the gathered student, greedy texts by generation mode) at the end of a run."""
    from toolkit.rollout.local import SeededSampling, whole_model

    original, found = DistillationLoop.run, {}

    def run(self):
        result = original(self)
        rollout = self.parts.rollout
        with whole_model(self.parts.student.engine) as model, torch.no_grad():
            found["logits"] = model(ids).logits
        kept = rollout.gather
        for mode in ("always", "never"):
            rollout.gather = mode
            sampling = SeededSampling(12, temperature=0.0, seeds=range(len(prompts)))
            found[mode] = [example.response.tolist() for example in rollout.complete(prompts, sampling)]
            found[mode, "ran"] = rollout.last.mode
        rollout.gather = kept
        return result

    with mock.patch.object(DistillationLoop, "run", run):
        _main(overrides)
    return found


def held_after_a_step(overrides):
    """What this rank holds of a student after one step: elements by kind, dtypes, and the adapters it began with."""
    from pathlib import Path

    import deepspeed
    import numpy as np

    from toolkit.batch import Example, TokenBatch
    from toolkit.models import build_student, choose_dtype, load_tokenizer, objective_of, shared_vocabulary
    from toolkit.pruning.made import materialize

    config = RunConfig().with_overrides(overrides)
    path = materialize(config.student, Path(config.cache_dir))
    tokenizer = load_tokenizer(config.student, path)
    vocabulary = shared_vocabulary(tokenizer, tokenizer)
    student = build_student(config, path, choose_dtype(config.precision, torch.device("cpu")), vocabulary)
    engine, named = student.engine, dict(student.model.named_parameters())
    trained = {name: p for name, p in named.items() if p.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values()), modifier_rank=None):
        start = {name: p.detach().float().clone() for name, p in trained.items()}
    drawn = torch.rand(())
    batch = TokenBatch.from_examples([Example(np.arange(5, 25), 4)], 0)
    for _ in range(engine.gradient_accumulation_steps()):
        found = student.loss(batch, None, None, objective_of(config.loss))
        engine.backward(found.loss)
        engine.step()
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        masters, gradients = optimizer.fp32_partitioned_groups_flat, optimizer.grad_partitions_flat_buffer.numel()
    else:
        masters, gradients = optimizer.single_partition_of_fp32_groups, None
    states = [
        value.numel() for state in optimizer.optimizer.state.values() for value in state.values() if value.dim() == 1
    ]
    return {
        "start": start, "drawn": drawn, "dtypes": {p.dtype for p in named.values()},
        "master_dtypes": {flat.dtype for flat in masters},
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in trained.values()),
        "frozen": sum(getattr(p, "ds_numel", p.numel()) for name, p in named.items() if name not in trained),
        "frozen_here": sum(
            p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel()
            for name, p in named.items() if name not in trained
        ),
        "masters": sum(flat.numel() for flat in masters), "states": sum(states), "gradients": gradients,
        "frozen_with_gradient": [name for name, p in named.items() if name not in trained and p.grad is not None],
    }  # fmt: skip


def load_errors(paths):
    """What a ZeRO-3 load of this rank's own path raises here."""
    from toolkit.ranks import collectives

    try:
        loaded(paths[collectives.rank()], torch.float32)
    except ValueError as error:
        return str(error)


def all_tensors(paths, dtype):
    """By path and name every parameter and buffer of a model after a ZeRO-3 load, gathered."""
    import deepspeed

    from toolkit.models import load_model
    from toolkit.settings import ModelConfig

    found = {}
    for path in paths:
        model = load_model(ModelConfig(path=path), path, zero3_config(dtype), dtype)
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
            named = [*model.named_parameters(), *model.named_buffers()]
            found[path] = {name: tensor.detach().clone() for name, tensor in named}
    return found


def teacher_hidden(overrides, ids):
    """[N, H] of a run's teacher after each token of rows of ids but the last."""
    import numpy as np

    from toolkit.batch import Example, TokenBatch
    from toolkit.models import Vocabulary
    from toolkit.teachers.live import build_teacher

    config = RunConfig().with_overrides(overrides)
    teacher = build_teacher(config, config.teacher.path, torch.bfloat16, Vocabulary(90, (1,), 0))
    return teacher.signals([TokenBatch.from_examples([Example(np.asarray(row), 1) for row in ids], 0)])[0]
