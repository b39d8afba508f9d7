"""Generation on real ranks, against transformers' own generate and against itself in other layouts."""

import numpy as np
import pytest
import torch
from deepspeed.runtime.rollout import RolloutEngine
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.rollout import local_cases
from toolkit.ranks.memory import cgroup_free_bytes
from toolkit.rollout.local import GatheredRollout, SeededSampling
from toolkit.rollout.sampling import choose_tokens

PROMPTS = [
    "Return the number",
    "What is a file? " * 3,
    "a",
    "Copy a file to a folder",
    "missing",
    "Below is an instruction",
]


@pytest.mark.multiprocess
def test_greedy_text_is_that_of_transformers(tiny, ranks2):
    found = ranks2.run(local_cases.sampled_texts, tiny, PROMPTS, 2, max_new_tokens=15, temperature=0.0)[0]
    model = AutoModelForCausalLM.from_pretrained(tiny / "student")
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    for prompt, ids in zip(PROMPTS, found, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        wanted = model.generate(**inputs, max_new_tokens=15, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        assert ids == wanted


@pytest.mark.multiprocess
def test_sampled_text_does_not_depend_on_ranks_or_batches(tiny, ranks1, ranks2):
    settings = dict(max_new_tokens=15, temperature=0.9, top_p=0.95, top_k=50)
    one = ranks1.run(local_cases.sampled_texts, tiny, PROMPTS, None, **settings)[0]
    two, other = ranks2.run(local_cases.sampled_texts, tiny, PROMPTS, 2, **settings)
    assert one == two == other
    assert len({tuple(ids) for ids in one}) > 1
    greedy = ranks1.run(local_cases.sampled_texts, tiny, PROMPTS, None, max_new_tokens=15, temperature=0.0)[0]
    assert greedy != one


@pytest.mark.multiprocess
def test_rank_without_prompts_does_not_hang(tiny, ranks2):
    assert len(ranks2.run(local_cases.sampled_texts, tiny, PROMPTS[:1], None, max_new_tokens=9)[0]) == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]])  # ragged ends, and a rank without a prompt
def test_sharded_text_is_gathered_text(tiny, ranks2, prompts):
    settings = dict(max_new_tokens=15, temperature=0.9)
    gathered = ranks2.run(local_cases.sampled_texts_and_mode, tiny, prompts, "always", **settings)[0]
    sharded = ranks2.run(local_cases.sampled_texts_and_mode, tiny, prompts, "never", **settings)[0]
    assert gathered == (sharded[0], "gathered") and sharded[1] == "sharded"


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("gather", "name", "call"),
    [("always", "choose_tokens", 4), ("never", "choose_tokens", 4), ("never", "row_tokens", 1),
     ("never", "Passes.prompt", 2)],
)  # fmt: skip
def test_a_rank_that_fails_ends_generation_on_all(tiny, ranks2, gather, name, call):
    """After a pass, before the first one, and where the others make one; and the next call knows nothing of it."""
    for said, texts, wanted in ranks2.run(local_cases.texts_around_a_failure, tiny, PROMPTS, gather, name, call, (1,)):
        assert said == f"generation failed on rank 1: MemoryError: made to fail in {name}"
        assert texts == wanted


@pytest.mark.multiprocess
def test_an_unknown_id_is_told_on_all_ranks(tiny, ranks2):
    for said in ranks2.run(local_cases.error_of_unknown_ids, tiny):
        assert "prompt 0 of 1 holds the ids 5 to 1000000, the vocabulary ends at" in said


@pytest.mark.multiprocess
def test_one_rank_without_memory_makes_all_ranks_generate_sharded(tiny, ranks2):
    for free_bytes, mode in (([2**30, 2**30], "gathered"), ([2**30, 2**12], "sharded")):
        for found in ranks2.run(
            local_cases.sampled_texts_and_mode, tiny, PROMPTS, "auto", free_bytes, max_new_tokens=4
        ):
            assert found[1] == mode


@pytest.mark.multiprocess
def test_a_batch_that_exceeds_the_cache_budget_is_split(tiny, ranks1):
    settings = dict(max_new_tokens=60, temperature=0.9)
    whole, free = ranks1.run(local_cases.texts_within_budget, tiny, PROMPTS * 12, None, **settings)[0]
    split, bound = ranks1.run(local_cases.texts_within_budget, tiny, PROMPTS * 12, 1, **settings)[0]
    assert split == whole
    assert free.peak_rows == 72 > bound.peak_rows and free.cache_mib > 1 >= bound.cache_mib
    assert bound.tokens == sum(len(text) for text in split) and bound.texts == 72


@pytest.mark.multiprocess
def test_eos_ends_a_text_and_is_learned_though_it_is_the_pad_token(tiny, ranks1):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "student")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    texts = ranks1.run(local_cases.sampled_texts, tiny, PROMPTS * 12, None, max_new_tokens=60, temperature=1.5)[0]
    eos = tokenizer.eos_token_id
    ended = [ids for ids in texts if eos in ids]
    assert ended and len(ended) < len(texts)  # both kinds are there
    assert all(ids.index(eos) == len(ids) - 1 for ids in ended)
    assert all(len(ids) == 60 for ids in texts if eos not in ids)


def cgroup(root, path, **files):
    folder = root / path
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_memory_limits_of_containers_and_jobs_count(tmp_path):
    own = tmp_path / "own"
    assert cgroup_free_bytes(tmp_path, own) == float("inf")  # no cgroups at all
    v2 = tmp_path / "v2"
    own.write_text("0::/job/step\n")
    stat = "anon 1\ninactive_file 300\nactive_file 5\n"
    cgroup(v2, "job", memory__max="5000\n", memory__current="4000\n", memory__stat=stat)
    assert cgroup_free_bytes(v2, own) == 1300  # the job's, which its step has no folder for here
    cgroup(v2, "job/step", memory__max="max\n", memory__current="4000\n", memory__stat=stat)
    assert cgroup_free_bytes(v2, own) == 1300  # the step is not limited, what it is part of is
    (v2 / "job/step/memory.max").write_text("4100\n")
    assert cgroup_free_bytes(v2, own) == 400
    (v2 / "job/step/memory.current").write_text("9000\n")
    assert cgroup_free_bytes(v2, own) == 0
    v1 = tmp_path / "v1"
    own.write_text("11:cpu,cpuacct:/host/path\n4:memory:/host/path\n1:name=systemd:/x\n")
    v1_files = dict(
        memory__limit_in_bytes="10000", memory__usage_in_bytes="2500", memory__stat="total_inactive_file 500"
    )
    cgroup(v1, "memory", **v1_files)  # a container's own, under a path of its host
    assert cgroup_free_bytes(v1, own) == 8000
    (v1 / "memory/memory.limit_in_bytes").write_text("9223372036854771712")  # v1's way to say: none
    assert cgroup_free_bytes(v1, own) > 2**60


def test_it_is_a_deepspeed_rollout_engine_and_counts_seeds():
    assert issubclass(GatheredRollout, RolloutEngine)
    with pytest.raises(ValueError, match="1 prompts with 2 seeds"):
        GatheredRollout(None, None).complete([np.array([1])], SeededSampling(3, seeds=[1, 2]))


def test_tokens_are_chosen_as_often_as_they_are_likely():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, float("-inf")]])
    draws = (torch.arange(20000) + 0.5) / 20000

    def shares(**settings):
        chosen = choose_tokens(logits.expand(20000, -1), SeededSampling(1, **settings), draws.double())
        return torch.bincount(chosen, minlength=5) / 20000

    torch.testing.assert_close(shares(), logits.softmax(-1)[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(temperature=2.0), (logits / 2).softmax(-1)[0], atol=2e-4, rtol=0)
    kept = torch.tensor([[float("-inf"), 1.0, 2.0, float("-inf"), float("-inf")]]).softmax(-1)[0]
    torch.testing.assert_close(shares(top_k=2), kept, atol=2e-4, rtol=0)
    torch.testing.assert_close(shares(top_p=0.8), kept, atol=2e-4, rtol=0)  # the likeliest has 0.64, the next 0.24
    assert shares(top_p=0.1)[2] == 1
    assert shares(temperature=0.0)[2] == 1
    assert (
        choose_tokens(
            logits,
            SeededSampling(1),
            torch.tensor([1.0], dtype=torch.float64).nextafter(torch.zeros(1, dtype=torch.float64)),
        )
        == 3
    )
