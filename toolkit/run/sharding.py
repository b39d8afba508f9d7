"""How the models of a run are held on its ranks, chosen from the memory plan before any weight is read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from toolkit.models.load import configuration
from toolkit.plan import DEVICES, Machine, ModelShape, Plan, plan_run
from toolkit.ranks import collectives
from toolkit.ranks.memory import free_bytes, node_free_bytes, ranks_of_node
from toolkit.settings import ModelConfig, RunConfig
from toolkit.settings.ds_files import sharding_of_file


def settle_sharding(config: RunConfig, teacher_path: str, student_path: str) -> tuple[RunConfig, Plan]:
    """`config` with "sharded" or "resident" in the place of each sharding=auto, and with rollout.gather as the plan has
    it; and the plan. Alike on all ranks. Collective.

    teacher_path, student_path: what `materialize` returned. Raises ValueError, with the plan's table, where the ranks
    have no room for any layout that the settings allow, unless these say for each model how it is held.
    """
    machine = measured_machine()

    def shape(model: ModelConfig, path: str) -> ModelShape:
        return ModelShape.of(configuration(model, path).to_dict(), trust_remote_code=model.trust_remote_code)

    def planned() -> Plan:
        teacher = shape(config.teacher, teacher_path) if config.has_teacher else None
        return plan_run(config, machine, teacher, shape(config.student, student_path))

    plan = collectives.together(planned)
    refusal, of_all = plan.refusal(), [config.student, *([config.teacher] if config.has_teacher else [])]
    if refusal and any(model.sharding == "auto" for model in of_all):
        raise ValueError(f"{refusal}\n\nTo try it all the same set student.sharding and teacher.sharding.")
    if refusal:
        plan = dataclasses.replace(plan, why=f"warning: this run may not fit: {plan.why}")
    held = [f"student.sharding={plan.student}", f"rollout.gather={plan.gather}"]
    if plan.teacher:
        held.append(f"teacher.sharding={plan.teacher}")
    return config.with_overrides(held), plan


def as_before(config: RunConfig, saved: Mapping[str, Any]) -> RunConfig:
    """`config` with the layout of the run that it goes on with, where it and its DeepSpeed files leave that open.

    saved: settings of that run, which had sharded models if it was of a version that knew of nothing else.
    """
    changes = []
    for role, model in (("teacher", config.teacher), ("student", config.student)):
        was = saved.get(role, {})
        before = was.get("sharding") or sharding_of_file(was.get("ds_config") or model.ds_config) or "sharded"
        if model.sharding == "auto" and sharding_of_file(model.ds_config) is None:
            changes.append(f"{role}.sharding={before}")
    return config.with_overrides(changes)


def measured_machine() -> Machine:
    """The ranks' own machine, by the least that one of them has free. Collective."""
    is_gpu, local = collectives.device().type == "cuda", ranks_of_node()
    least = [-collectives.max_over_ranks(-size) for size in (free_bytes(), node_free_bytes())]
    name = torch.cuda.get_device_name().lower() if is_gpu else "cpu"
    device = next((known for known in DEVICES if known in name), "a100" if is_gpu else "cpu")
    return Machine(max(1, collectives.world() // local), local, least[0], least[1], device)
