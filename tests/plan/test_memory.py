"""Bytes of a rank, counted by hand for tiny shapes, and what autograd really keeps."""

from contextlib import nullcontext

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.plan.plan_cases import EVERY_WEIGHT, STUDENT_NUMEL, TEACHER_NUMEL, machine, run_config, shapes
from toolkit.models import attention
from toolkit.plan import ModelShape, memory, plan_run
from toolkit.plan.layout import Sharding, bucket_fill, kept_for_backward, share
from toolkit.plan.memory import ALWAYS, saved_bytes
from toolkit.plan.shape import Weight
from toolkit.settings.ds_files import read_ds_config


def planned(config, on):
    return plan_run(config, on, *shapes())


def named(plan, name, when=ALWAYS):
    return sum(part.bytes for part in plan.parts if (part.name, part.when) == (name, when))


SHARDED = ("student.sharding=sharded", "teacher.sharding=sharded")
RESIDENT = ("student.sharding=resident", "teacher.sharding=resident")


def test_a_sharded_pair_keeps_its_share_of_every_weight(tmp_path):
    plan = planned(run_config(tmp_path, *SHARDED, **EVERY_WEIGHT), machine(4))
    assert (plan.student, plan.teacher) == ("sharded", "sharded")
    # bf16, and a quarter: all sizes are multiples of 4
    assert named(plan, "teacher's shard") == 2 * TEACHER_NUMEL / 4
    assert named(plan, "student's shard") == 2 * STUDENT_NUMEL / 4
    assert named(plan, "fp32 weights") == 4 * STUDENT_NUMEL / 4
    assert named(plan, "optimizer's states") == 8 * STUDENT_NUMEL / 4
    # 4 rows a rank are 2 micro-batches, whose gradients are summed up in fp32
    assert plan.work.micro_batches == 2
    assert named(plan, "gradients") == 4 * STUDENT_NUMEL / 4
    # On a GPU the whole bucket is allocated, 1,000 gradients of 2 bytes
    assert named(plan, "bucket of gradients") == 2000


def test_a_share_that_does_not_divide_is_padded(tmp_path):
    assert share([Weight("a", (5,)), Weight("b", (3, 4))], 4) == 2 + 3
    plan = planned(run_config(tmp_path, *SHARDED, "train.rows_per_step=15", **EVERY_WEIGHT), machine(3))
    # embedding and head 171 each, a layer 4 x 22 + 3 x 43 + 2 x 3, the norm 3
    assert named(plan, "fp32 weights") == 4 * (2 * 171 + 2 * (4 * 22 + 3 * 43 + 6) + 3)


def test_a_resident_pair_is_whole_and_its_optimizer_is_not(tmp_path):
    plan = planned(run_config(tmp_path, *RESIDENT), machine(4))
    assert named(plan, "teacher's weights") == 2 * TEACHER_NUMEL
    assert named(plan, "student's weights") == 2 * STUDENT_NUMEL
    assert named(plan, "fp32 weights") == 4 * STUDENT_NUMEL / 4
    assert named(plan, "optimizer's states") == 8 * STUDENT_NUMEL / 4
    assert not named(plan, "teacher's shard") and not named(plan, "student's shard")


def test_one_micro_batch_pays_for_no_sum_in_fp32(tmp_path):
    plan = planned(run_config(tmp_path, *SHARDED, "train.rows_per_micro_batch=8", **EVERY_WEIGHT), machine(2))
    assert plan.work.micro_batches == 1
    assert named(plan, "gradients") == 2 * STUDENT_NUMEL / 2


def test_a_bucket_is_copied_where_it_is_sent_and_widened_where_gradients_add_up_in_fp32(tmp_path):
    """From the head on, 512 + 8 + 2 x 8 + 3 x 128 + 64 = 984 of 1,000 gradients; the next would be 64 more."""
    sharded = planned(run_config(tmp_path, *SHARDED, **EVERY_WEIGHT), machine(4))
    assert named(sharded, "bucket of gradients, as it is sent", "gradients sent") == 2 * 984
    assert named(sharded, "gradients in fp32", "gradients sent") == 4 * 984 / 4
    resident = planned(run_config(tmp_path, *RESIDENT), machine(4))
    assert named(resident, "bucket of gradients, as it is sent", "gradients sent") == 2 * 984
    assert named(resident, "gradients in fp32", "gradients sent") == 4 * 512
    assert named(resident, "gradients, summed up", "gradients sent") == 4 * STUDENT_NUMEL / 4
    one = planned(run_config(tmp_path, *RESIDENT, "train.rows_per_micro_batch=8"), machine(2))
    assert not named(one, "gradients in fp32", "gradients sent")
    assert named(one, "gradients, flat and in fp32", "optimizer") == (2 + 4) * STUDENT_NUMEL / 2
    assert named(one, "gradients of this micro-batch", "gradients sent") == 2 * STUDENT_NUMEL / 2


def test_a_gradient_that_is_larger_than_the_bucket_is_sent_by_itself(tmp_path):
    resident = planned(run_config(tmp_path, *RESIDENT, reduce_bucket_size=500), machine(4))
    assert named(resident, "large gradient, as it is sent", "backward") == 2 * 512
    assert named(resident, "gradients in fp32", "backward") == 4 * 512
    sharded = planned(run_config(tmp_path, *SHARDED, reduce_bucket_size=500, **EVERY_WEIGHT), machine(4))
    assert named(sharded, "gradients in fp32", "backward") == 4 * 512 / 4
    assert not named(sharded, "large gradient, as it is sent", "backward")


def test_sgd_has_no_states_and_adapters_are_all_that_is_trained(tmp_path):
    plan = planned(run_config(tmp_path, *SHARDED, "optimizer.name=sgd", **EVERY_WEIGHT), machine(2))
    assert not named(plan, "optimizer's states")
    lora = ("student.lora.rank=2", "student.lora.target_modules=[q_proj]")
    plan = planned(run_config(tmp_path, *SHARDED, *lora, **EVERY_WEIGHT), machine(2))
    # 2 layers, each with A of 2 x 8 and B of 8 x 2
    assert named(plan, "fp32 weights") == 4 * 2 * 32 / 2
    assert not named(plan, "loss: gradient of the head", "forward and loss")


def test_the_teacher_s_window_and_head_wait_for_the_student(tmp_path):
    plan = planned(run_config(tmp_path, *SHARDED, **EVERY_WEIGHT), machine(2))
    # 8 rows of a rank with responses of 24 tokens, 16 numbers each; the head is 64 x 16
    for phase in ("teacher", "forward and loss", "optimizer"):
        assert named(plan, "teacher's hidden states", phase) == 2 * 8 * 24 * 16
    assert named(plan, "teacher's head, gathered", "forward and loss") == 2 * 64 * 16


def test_loss_tiles_and_the_head_s_gradient(tmp_path):
    plan = planned(run_config(tmp_path, *SHARDED, **EVERY_WEIGHT), machine(2))
    # One tile: 2 x 24 tokens by 64 columns, logits of both models in fp32 and the gradient in bf16
    assert named(plan, "loss: tiles of logits", "forward and loss") == 48 * 64 * (4 + 4 + 2)
    assert named(plan, "loss: gradient of the head", "forward and loss") == 2 * 64 * 8
    # Without a teacher there is one model's tile
    alone = run_config(tmp_path, "loss.divergence=none", "loss.cross_entropy_weight=1.0")
    plan = plan_run(alone, machine(2), None, shapes()[1])
    assert named(plan, "loss: tiles of logits", "forward and loss") == 48 * 64 * (4 + 2)
    assert plan.teacher == ""


def test_generation_takes_the_whole_student_and_its_cache(tmp_path):
    settings = (*SHARDED, "schedule.policy=on_policy", "rollout.gather=always")
    plan = planned(run_config(tmp_path, *settings, **EVERY_WEIGHT), machine(2))
    assert named(plan, "whole model, gathered", "generation") == 2 * STUDENT_NUMEL
    # 8 rows of 32 places, keys and values of 8 numbers in 2 layers
    assert named(plan, "key-value cache", "generation") == 2 * 8 * 32 * 2 * 8 * 2
    few = planned(run_config(tmp_path, *settings, "rollout.rows_at_once=3", **EVERY_WEIGHT), machine(2))
    assert named(few, "key-value cache", "generation") == 2 * 3 * 32 * 2 * 8 * 2
    # never: two of the largest part at a time, which is a layer of 656
    never = planned(run_config(tmp_path, *settings[:-1], "rollout.gather=never", **EVERY_WEIGHT), machine(2))
    assert named(never, "gathered layers", "generation") == 2 * 2 * 656
    assert named(plan, "whole model, gathered", "generation") > named(never, "gathered layers", "generation")


def test_text_of_a_whole_data_set_takes_what_is_left_and_no_more(tmp_path):
    """How many prompts there are is not known: as many rows run at once as there is room for."""
    settings = ("data.responses=teacher", "train.rows_per_micro_batch=1")
    for memory_bytes in (2**20, 2**30):
        plan = planned(run_config(tmp_path, *settings), machine(2, memory_bytes))
        assert plan.fits and plan.refusal() is None
        rows = named(plan, "key-value cache", "teacher's answers") / (2 * 2 * 16 * 3 * 32)
        assert rows == int(rows) > 10
        # Logits of 3 x 4 x 64 bytes a row and activations of 8 tokens stand beside the cache's half
        assert plan.peak[1] <= plan.machine.room


def test_a_replay_buffer_and_offloaded_parts_lie_on_the_host(tmp_path):
    offload = {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}
    config = run_config(tmp_path, "schedule.policy=on_policy", "rollout.capacity=10", **offload)
    plan = planned(config, machine(2))
    assert (plan.student, plan.teacher) == ("sharded", "sharded")  # the file decides
    host = {part.name: part.bytes for part in plan.parts if part.where == "host"}
    assert host["replay buffer"] == 5 * 32 * 4
    assert host["teacher's shard"] == TEACHER_NUMEL
    assert host["optimizer's states"] == 8 * STUDENT_NUMEL / 2
    assert not any(part.name == "fp32 weights" and part.where == "device" for part in plan.parts)


def test_small_parameters_stay_whole_as_long_as_the_model_s_threshold_lasts(tmp_path):
    student = shapes()[1]
    zero = {"stage": 3, "stage3_param_persistence_threshold": 8}
    norms = Sharding.of({"zero_optimization": zero}).persistent(student)
    assert [weight.numel for weight in norms] == [8] * 5
    zero["stage3_model_persistence_threshold"] = 20
    assert len(Sharding.of({"zero_optimization": zero}).persistent(student)) == 2


def test_a_bucket_is_sent_before_it_would_overflow():
    weights = [Weight(name, (numel,)) for name, numel in (("a", 3), ("b", 40), ("c", 5), ("d", 2), ("e", 6))]
    # From the last on: 6, 8, then 5 more would be 13; 5; the 40 goes alone; 3
    assert bucket_fill(weights, 10) == 8
    assert bucket_fill(weights, 100) == 56


def test_what_is_used_again_soon_stays_gathered():
    student = shapes()[1]
    assert kept_for_backward(student, 10**9) == STUDENT_NUMEL
    # The head, and what follows within 2 x 512 elements of it: the norm and the last layer's last weights
    assert kept_for_backward(student, 1) == 512
    assert kept_for_backward(student, 1041) == 512 + 8 + 8


def saved_by_autograd(model, ids_BT):
    """Bytes of the storages that a forward pass keeps for its backward pass, the weights' left out."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        del out
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("writes_scores", [False, True])
def test_activations_are_what_autograd_keeps(kv_heads, writes_scores):
    sizes = dict(hidden_size=128, intermediate_size=320, num_attention_heads=8, num_key_value_heads=kv_heads)
    ids_BT = torch.zeros(2, 96, dtype=torch.long)

    def found(layers):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=layers, **sizes)).bfloat16()
        with nullcontext() if writes_scores else attention.as_transformers_does():
            return saved_by_autograd(model, ids_BT)

    attention.install()

    of_one = found(3) - found(2)
    shape = ModelShape.of(dict(model_type="llama", vocab_size=32, num_hidden_layers=1, **sizes))
    scores = ids_BT.shape[1] if writes_scores else 0
    assert saved_bytes(shape, 2, scores) * ids_BT.numel() == pytest.approx(of_one, rel=0.06)


def test_a_cpu_s_attention_writes_scores_down_up_to_the_size_that_the_models_know(tmp_path):
    assert memory.MOST_SCORE_BYTES == attention.MOST_SCORE_BYTES
    config = run_config(tmp_path, "train.rows_per_micro_batch=4")

    def of(length, on):
        long = config.with_overrides([f"data.max_length={length}"])
        return named(planned(long, machine(2, device=on)), "student's activations", "forward and loss")

    # 2 x 4 rows x 2 heads x length^2 reach 32 MiB at a length of 1,448
    assert of(1448, "cpu") - of(1448, "h100") == 4 * 1448 * 2 * 2 * (2 * 1448 - 4)
    assert of(1456, "cpu") == of(1456, "h100")


def test_the_shipped_files_are_read_as_they_are():
    teacher = Sharding.of(read_ds_config("ds_configs/teacher_zero3_hpz.json"))
    assert (teacher.stage, teacher.secondary, teacher.persistence) == (3, 8, 100_000)
    student = Sharding.of(read_ds_config("ds_configs/student_zero2.json"))
    assert (student.stage, student.is_partitioned, student.overlaps) == (2, False, True)
