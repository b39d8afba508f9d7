"""Wrong input ends every rank with exit code 2 and a message that says what, where and what to do; nothing hangs."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import RwkvConfig, RwkvForCausalLM

from tests.run import run_cases
from tests.tiny import make_tokenizer, save_llama, tiny_overrides

pytestmark = pytest.mark.multiprocess
LONG = json.dumps({"prompt": "a", "response": "many words " * 80})
ROW = json.dumps({"prompt": "a", "response": "b"})


@pytest.fixture
def refused(tiny, ranks2):
    """Checks that a run with these changed settings is refused on both ranks, and that rank 0 alone says why."""

    def check(message, **changes):
        (code, said), other = ranks2.run(run_cases.run_expecting_exit, tiny_overrides(tiny, **changes))
        assert code == 2 and other[0] == 2
        errors = [line for line in (said + other[1]).splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], said

    return check


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("did you mean 'loss.alpha'", {"loss.alhpa": 0.1}),
        ("did you mean 'srkl'", {"loss.divergence": "srk"}),
        ("alpha is 1", {"loss.alpha": 1.0}),
        ("did you mean 'adaptive'", {"schedule.policy": "adaptve"}),
        ("no DeepSpeed config at nowhere.json", {"student.ds_config": "nowhere.json"}),
        ("train.rows_per_step = 7 is not a multiple of the 2 ranks", {"train.rows_per_step": 7}),
        ("40 training rows, fewer than train.rows_per_step = 64", {"train.rows_per_step": 64}),
    ],
)
def test_settings(refused, message, changes):
    refused(message, **changes)


@pytest.mark.parametrize(
    ("text", "message", "changes"),
    [
        (None, "rows.jsonl", {}),
        ("", "rows.jsonl", {}),
        (f"{ROW}\n{{broken\n{ROW}\n", "rows.jsonl:2", {}),
        (f'{ROW}\n{{"prompt": "only"}}\n', "rows.jsonl:2", {}),
        (f'{ROW}\n{{"prompt": "c", "response": ""}}\n', "rows.jsonl:2", {}),
        ('{"prompt": "only"}\n', "rows.jsonl", {"data.on_bad_row": "skip"}),
        (LONG, "max_length", {"data.on_long_response": "stop"}),
        (
            LONG,
            "data.max_length",
            {"data.on_long_response": "skip"},
        ),
    ],
)
def test_data(refused, tmp_path, text, message, changes):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    refused(message, data__source=f"{tmp_path}/rows.jsonl", **changes)


def test_broken_rows_are_skipped_and_counted_where_that_is_asked_for(tiny, ranks2, tmp_path):
    rows = (tiny / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text("{broken\n" + rows + '{"prompt": "only"}\n')
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name="skipped", data__source=f"{tmp_path}/rows.jsonl", data__on_bad_row="skip",
        train__steps=1))[0]  # fmt: skip
    assert summary["data"]["train_skipped_bad"] == 2 and summary["data"]["train_rows"] == 40


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt"])
def test_a_model_with_fewer_positions_than_a_text_has_tokens(refused, tiny, model_type):
    sizes = {
        "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16},
        "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                  "max_position_embeddings": 16},
        "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
                "word_embed_proj_dim": 32, "max_position_embeddings": 16},
    }[model_type]  # fmt: skip
    shape = {"model_type": model_type, "vocab_size": 400, **sizes}
    changes = {
        "student.path": "", "student.random_weights": True, "student.shape": shape,
        "student.tokenizer": f"{tiny}/student",
    }  # fmt: skip
    refused("has 16 positions (max_position_embeddings), and texts take up to ", **changes)


def test_a_stream_that_one_rank_cannot_read(refused, tmp_path):
    """Each rank reads a file of its own."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name, value in (("a", "some words of text"), ("b", 7)):
        (texts / f"{name}.jsonl").write_text(json.dumps({"text": value}) + "\n")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "other words of text"}) + "\n")
    refused("b.jsonl:1: 'text' is 7 (int), not text", **{
        "data.kind": "text", "data.streaming": True, "data.source": str(texts), "data.max_length": 16,
        "data.validation_source": f"{tmp_path}/held.jsonl",
    })  # fmt: skip


def test_a_model_folder_without_weights(refused, tiny, tmp_path):
    shutil.copytree(tiny / "student", tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    refused("has no weights", student__path=f"{tmp_path}/bare")


def test_weights_that_are_cut_off_are_refused_without_a_hang(refused, tiny, tmp_path):
    shutil.copytree(tiny / "student", tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    refused("is damaged or cut off", student__path=f"{tmp_path}/cut")


def test_a_refused_run_leaves_an_older_one_alone(refused, tiny, ranks2):
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="older", train__steps=1))
    before = (tiny / "runs" / "older" / "metrics.jsonl").read_text()
    refused("rows.jsonl", name="older", data__source=f"{tiny}/no/rows.jsonl")
    assert (tiny / "runs" / "older" / "metrics.jsonl").read_text() == before


def test_a_student_with_another_tokenizer(refused, tmp_path):
    other = make_tokenizer()
    other.add_tokens(["another"])
    save_llama(tmp_path / "other", other, seed=4)
    refused("'another' is id None for the teacher", student__path=f"{tmp_path}/other")


def test_weights_that_lack_a_layer_are_not_filled_with_random_numbers(refused, tiny, tmp_path):
    shutil.copytree(tiny / "student", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refused("lack 9 parameters of the configuration, the first is model.layers.2", student__path=f"{tmp_path}/short")


def test_rows_that_are_not_the_same_on_all_nodes_are_refused(tiny, ranks2, tmp_path):
    """As many, so that nothing would stop: ranks would take their parts of two different lists."""
    overrides = []
    for rank in range(2):
        file = tmp_path / str(rank) / "rows.jsonl"
        file.parent.mkdir()
        lines = (tiny / "rows.jsonl").read_text().splitlines()
        file.write_text("\n".join(lines[rank:] + lines[:rank]) + "\n")
        overrides.append(tiny_overrides(tiny, name="two lists", data__source=str(file)))
    (code, said), other = ranks2.run(run_cases.run_with_own, overrides)
    assert code == other[0] == 2 and "what has this name is not the same everywhere" in said and other[1] == ""


def test_a_sharding_that_no_checkpoint_is_made_of_is_refused_at_the_start(refused, tmp_path):
    for sharding in ({"stage": 0}, {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}):
        (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": sharding}))
        refused("checkpoints are made of ZeRO stages 1, 2 and 3", **{"student.ds_config": f"{tmp_path}/ds.json"})


def test_weights_of_another_shape(refused, tiny, tmp_path):
    folder = shutil.copytree(tiny / "student", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    refused("have other shapes than the configuration asks for, 2 of them: lm_head", student__path=str(folder))


def test_layers_that_the_configuration_leaves_out(refused, tiny, tmp_path):
    folder = shutil.copytree(tiny / "teacher", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    refused("hold layers.1, and by config.json the model has 1 of them", teacher__path=str(folder))


def test_a_family_whose_code_fails_where_weights_are_partitioned(refused, tmp_path):
    tokenizer, shape = make_tokenizer(), {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}
    RwkvForCausalLM(RwkvConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for role in ("teacher", "student"):
        refused("a rwkv model, cannot be loaded under ZeRO-3", **{f"{role}__path": str(tmp_path)})


def test_a_teacher_under_a_stage_that_shards_an_optimizer(refused):
    refused("stage = 2, and a teacher is not trained: give 3", teacher__ds_config="ds_configs/student_zero2.json")


def test_a_quantised_model_is_refused(refused, tiny, tmp_path):
    """It would be whole on every rank."""
    folder = shutil.copytree(tiny / "teacher", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused("are quantised (quantization_config of config.json)", teacher__path=str(folder))


def test_a_monitor_that_cannot_start_is_told_before_models_are_loaded(refused, tmp_path):
    config = json.loads(Path("tests/student_sharded.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(config | {"comet": {"enabled": True}}))
    refused("enables (comet) could not be started: ", student__ds_config=f"{tmp_path}/ds.json")
