"""What the pools' ranks run for the tests of a vLLM server. Nothing here is a test."""

import contextlib
import dataclasses
import time

import torch
from deepspeed.runtime.rollout import RolloutRequest
from transformers import AutoModelForCausalLM

from tests.rollout.local_cases import with_student
from toolkit.models.export import export_student
from toolkit.ranks import collectives
from toolkit.rollout.local import SeededSampling
from toolkit.rollout.vllm import VllmRollout


def with_server(folder, settings, work):
    """`work(rollout, tokenizer)` with a rollout that asks the server of `settings`."""
    return with_student(
        folder, lambda config, *made: work(VllmRollout(config, *made), made[1]), name="served",
        **{"rollout__server_timeout_s": 60} | settings,
    )  # fmt: skip


def server_texts(folder, settings, prompts, **sampling):
    """(token ids of the answers, all asked for by every rank, in another order on each; what the engine says of the
    call; the first three by DeepSpeed's interface, as (ids, their numbers))."""

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

    def work(config, student, tokenizer, vocabulary):
        target = config.run_dir / "untied"
        export_student(student, tokenizer, target, untie_head=True)
        with torch.no_grad():
            own = student.model.eval()(input_ids=ids.to(collectives.device()), use_cache=False).logits.cpu()
            read = AutoModelForCausalLM.from_pretrained(target).eval()(input_ids=ids).logits
        return own, read

    return with_student(folder, work, **changes)
