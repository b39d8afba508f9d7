"""Training on text from a server: what it says, by which weights, and how its faults reach the ranks."""

import json
import socket
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, OPTConfig

from tests.rollout import vllm_cases
from tests.rollout.stand_in_vllm import StandIn
from tests.run import run_cases
from tests.tiny import make_tokenizer, tiny_overrides
from toolkit.rollout.vllm import NoAnswer, Server

STUDENT = "tied"  # with 8 rows in its head that no token has


@pytest.fixture
def server(tiny, tmp_path):
    """One that starts with the folder that a run writes for it."""
    made = StandIn(tmp_path / "start")
    made.settings = {
        "student__path": f"{tiny}/{STUDENT}", "rollout__engine": "vllm", "rollout__server": made.url,
        "rollout__weights_dir": str(tmp_path),
    }  # fmt: skip
    yield made
    made.close()


def run(tiny, ranks, name, **changes):
    settings = {
        "student__path": f"{tiny}/{STUDENT}", "schedule__policy": "on_policy", "rollout__temperature": 0,
        "rollout__capacity": 8, "train__steps": 6, "validation__rows": 2,
    }  # fmt: skip
    ranks.run(run_cases.run_tiny, tiny_overrides(tiny, name=name, **settings | changes))
    records = [json.loads(line) for line in (tiny / "runs" / name / "metrics.jsonl").open()]
    return load_file(tiny / "runs" / name / "student" / "model.safetensors"), records


def distance(one, other):
    return max((one[name].double() - other[name].double()).abs().max().item() for name in one)


@pytest.mark.multiprocess
def test_training_by_a_server_is_training_by_the_student_itself(tiny, ranks2, server):
    """The same greedy text at every step, so the same weights at the end; and each rank asked for its own rows."""
    alone, _ = run(tiny, ranks2, "alone")
    served, records = run(tiny, ranks2, "served", **server.settings)
    assert distance(served, alone) < 1e-5
    still, _ = run(tiny, ranks2, "still", schedule__policy="off")
    assert distance(still, alone) > 1e-3
    assert [record["rollout_mode"] for record in records] == ["vllm"] * 6
    assert [record["staleness_steps"] for record in records] == [0] * 6
    assert len(server.log) == 6 * 8 and len({str(prompt) for prompt, _, _ in server.log[:8]}) == 8
    # Prompts come back after 5 steps of 8 rows: what the server keeps of them is by older weights.
    assert {str(prompt) for prompt, _, _ in server.log[40:]} & {str(prompt) for prompt, _, _ in server.log[:40]}
    assert len(server.reloads) == 7  # at the start, and the weights of steps 0 to 5
    assert server.reloads[0] == server.reloads[1] and len(set(server.reloads)) == 6
    assert [digest for _, _, digest in server.log[::8]] == server.reloads[1:]
    assert {path.name for path in server.folder.parent.iterdir()} == {"start", "step-00000005"}
    # What the server reads has a head of its own; what the run leaves is tied, as the student was.
    assert load_file(server.folder / "model.safetensors").keys() - served.keys() == {"lm_head.weight"}


@pytest.mark.multiprocess
def test_text_is_as_old_as_the_weights_that_said_it(tiny, ranks2, server):
    _, records = run(tiny, ranks2, "stale", **server.settings, rollout__sync_every_steps=2, train__steps=5)
    assert [record["staleness_steps"] for record in records] == [0, 1, 0, 1, 0]
    digests = [digest for _, _, digest in server.log[::8]]
    assert digests[0] == digests[1] != digests[2] == digests[3] != digests[4]
    _, records = run(
        tiny, ranks2, "fresh", **server.settings, rollout__sync_every_steps=3, rollout__train_on_fresh=True,
        train__steps=4,
    )  # fmt: skip
    assert [record["staleness_steps"] for record in records] == [0, 1, 2, 0]


@pytest.mark.multiprocess
def test_texts_end_at_eos_and_depend_on_their_seed_alone(tiny, ranks2, server):
    prompts = ["Return the number", "a", "What is a file?"] * 8
    server.own_ends |= set(range(0, 300, 5))  # generation_config.json may list more ends than the tokenizer has
    ours, theirs = ranks2.run(
        vllm_cases.server_texts, tiny, server.settings, prompts, max_new_tokens=40, temperature=1.3
    )
    assert ours[0] == theirs[0]  # every text, asked for by the one rank and by the other
    eos = AutoTokenizer.from_pretrained(tiny / STUDENT).eos_token_id
    ended = [text for text in ours[0] if eos in text]
    assert 0 < len(ended) < len(prompts) and len({tuple(text) for text in ours[0]}) > 8
    assert all(text.index(eos) == len(text) - 1 for text in ended)
    assert all(len(text) == 40 for text in ours[0] if eos not in text)
    stats = ours[1]
    assert (stats.mode, stats.texts, stats.tokens) == ("vllm", len(prompts), sum(map(len, ours[0])))
    padded, is_text = ours[2]
    assert [ids[:n] for ids, n in zip(padded, is_text, strict=True)] == ours[0][:3]  # DeepSpeed's interface


@pytest.mark.multiprocess
def test_faults_of_a_server_are_told_on_every_rank(tiny, ranks2, server):
    faults = (
        ("with 500: made to fail", {"status": 500}),
        ("did not answer in time", {"delay_s": 6}),
        ("says the id 400000, the student's vocabulary ends at", {"choice": {"token_ids": [7, 400000]}}),
        ("start it with --generation-config vllm", {"choice": {"token_ids": [7, 9], "finish_reason": "stop"}}),
        ("goes on after EOS", {"choice": {"token_ids": [7, 1, 9]}}),
        ("answers with token_ids = None", {"choice": {"token_ids": None}}),
        ("start it with --max-model-len", {"max_model_len": 20}),
        ("start it with VLLM_SERVER_DEV_MODE=1", {"no_dev_mode": True}),
        ("None", {"status": 503, "failures": 2}),  # tried again
        ("None", {"noise_nats": 0.02}),  # numbers that come out otherwise each time, as where others use it too
        ("None", {"root": f"{server.folder.parent.name}/start"}),  # from the working directory of the server
        ("was started with elsewhere/start, and not with the folder", {"root": "elsewhere/start"}),
        ("a reload that fails ends vLLM's engine", {"sees_other_files": True}),
    )
    for found in ranks2.run(vllm_cases.server_errors, tiny, server.settings, [fault for _, fault in faults]):
        for (wanted, _), said in zip(faults, found, strict=True):
            assert wanted in said


@pytest.mark.multiprocess
def test_a_server_of_another_model_is_refused_before_it_reloads(tiny, ranks2, server):
    """A reload of weights that do not fit would end its engine."""
    other = StandIn(tiny / "teacher")
    for (said,) in ranks2.run(vllm_cases.server_errors, tiny, server.settings | {"rollout__server": other.url}, [{}]):
        assert f"was started with {tiny}/teacher, and not with the folder" in said and str(server.folder) in said
    assert other.reloads == [] and not other.is_down
    other.close()


@pytest.mark.multiprocess
def test_a_server_that_keeps_a_part_of_its_weights_is_noticed_at_the_start(tiny, ranks2, server):
    parts = ["lm_head.weight", "embed_tokens", "layers.1.self_attn", "layers.0.mlp", "model.norm", ""]
    faults = [{}, *({"starts_again": True, "keeps": part} for part in parts)]
    for fine, *found in ranks2.run(vllm_cases.server_errors, tiny, server.settings, faults):
        assert fine == "None"
        for part, said in zip(parts, found, strict=True):
            assert "speaks by other weights than those in" in said and "hand-over" in said, part


@pytest.mark.multiprocess
@pytest.mark.parametrize("learning_rate", (1e-6, 1e-4, 1))
def test_a_server_that_goes_on_with_old_weights_is_noticed_at_the_next_push(tiny, ranks2, server, learning_rate):
    """At a small rate the student's change is far below what bf16 would round away."""
    server.fault = {"keeps": "", "keeps_after": 2}  # the hand-over, and the push of step 0
    settings = {"schedule__policy": "on_policy", "optimizer__name": "adamw", "optimizer__lr": learning_rate}
    for code, said in ranks2.run(run_cases.run_expecting_exit, tiny_overrides(
        tiny, name="kept", train__steps=40, **settings | server.settings)):  # fmt: skip
        assert code == 2
        if said:
            assert "speaks by " in said and "step-00000001" in said, said
            assert "an earlier push" in said or learning_rate == 1
    assert len(server.reloads) == 3


@pytest.mark.multiprocess
@pytest.mark.parametrize("family", (GPT2Config, OPTConfig))
def test_a_tied_head_is_written_as_a_tensor_of_its_own_for_a_server(tiny, ranks1, family):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 408}
    sizes = {"word_embed_proj_dim": 32, "ffn_dim": 64} if family is OPTConfig else {}
    config = family(**shape, **sizes, eos_token_id=1, bos_token_id=0, pad_token_id=1)
    torch.manual_seed(5)
    folder = tiny / family.model_type
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    ((own, read),) = ranks1.run(
        vllm_cases.exported_logits, tiny, torch.arange(20)[None], name=family.model_type, student__path=str(folder)
    )
    assert (own - read).abs().max() < 1e-5
    written = tiny / "runs" / family.model_type / "untied"
    assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(written / "model.safetensors")


@pytest.mark.multiprocess
def test_a_server_that_is_not_there_ends_all_ranks(tiny, ranks2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for code, said in ranks2.run(run_cases.run_expecting_exit, tiny_overrides(
        tiny, name="down", schedule__policy="on_policy", rollout__engine="vllm", rollout__server=f"http://127.0.0.1:{port}",
        rollout__server_timeout_s=2)):  # fmt: skip
        assert code == 2
        if said:
            assert "no vLLM server answers" in said and "pip install vllm" in said
            assert f"VLLM_SERVER_DEV_MODE=1 vllm serve {tiny}/runs/down/vllm/start --generation-config vllm" in said


def test_answers_that_are_not_vllms_are_told(tiny):
    server = StandIn(tiny / STUDENT)

    def ask(path, **changes):
        return Server(server.url).ask("POST", path, time.monotonic() + 60, {"prompt": [1]} | changes)

    with pytest.raises(ValueError, match=r"404: .*The model `x` does not exist"):
        ask("/v1/completions", model="x")
    with pytest.raises(ValueError, match=r"400: unknown fields \['seeds'\]"):
        ask("/v1/completions", seeds=[1])
    server.close()
    with pytest.raises(NoAnswer, match="no vLLM server answers at"):
        Server(server.url).ask("GET", "/v1/models", time.monotonic() + 1)


def test_an_address_that_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match=r"rollout\.server = 'http://localhost:port' is no address \(.*port"):
        Server("http://localhost:port")
