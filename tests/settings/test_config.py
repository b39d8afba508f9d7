"""Settings: overrides, their types, what is refused and how it is said, and the way to a file and back."""

import dataclasses

import pytest
import yaml

from toolkit.settings import RunConfig

BASE = RunConfig().with_overrides(["teacher.path=t", "student.path=s"])


def test_overrides_take_the_type_of_the_setting():
    config = BASE.with_overrides([
        "name=12", "train.steps=3", "optimizer.lr=5e-4", "optimizer.min_lr=0", "loss.temperature=2",
        "optimizer.betas=[0.8, 9e-1]", "student.drop_layers=[1, 2]", "rollout.train_on_fresh=true",
        "rollout.max_new_tokens=7", "data.input_field=context", "teacher.tokenizer=", "output_dir=a=b",
    ])  # fmt: skip
    assert (config.name, config.train.steps, config.optimizer.lr) == ("12", 3, 5e-4)
    assert (config.optimizer.min_lr, config.loss.temperature) == (0.0, 2.0)
    assert isinstance(config.optimizer.min_lr, float) and isinstance(config.loss.temperature, float)
    assert config.optimizer.betas == (0.8, 0.9) and config.student.drop_layers == (1, 2)
    assert config.rollout.train_on_fresh is True and config.rollout.max_new_tokens == 7
    assert (config.data.input_field, config.teacher.tokenizer, config.output_dir) == ("context", "", "a=b")
    assert config.with_overrides(["rollout.max_new_tokens=null", "train.steps=4", "train.steps=5"]) == (
        dataclasses.replace(
            config,
            rollout=dataclasses.replace(config.rollout, max_new_tokens=None),
            train=dataclasses.replace(config.train, steps=5),
        )
    )
    assert BASE.rollout.max_new_tokens is None and BASE.train.steps == 100  # the recipe is left as it was


def test_shape_is_set_whole_or_by_field():
    config = BASE.with_overrides(
        ["student.shape={model_type: llama, hidden_size: 4}", "student.shape.hidden_size=8", "teacher.shape.x=1e-6"]
    )
    assert config.student.shape == {"model_type": "llama", "hidden_size": 8}
    assert BASE.student.shape == {} and BASE.teacher.shape == {}


@pytest.mark.parametrize(("override", "told"), [
    ("train.stps=3", "did you mean 'train.steps'"),
    ("trian.steps=3", "did you mean 'train'"),
    ("teacher.pth=x", "did you mean 'teacher.path'"),
    ("steps=3", "write train.steps"),
    ("path=x", "write teacher.path or student.path"),
    ("train=3", "train.steps"),
    ("train.steps.more=3", "single setting"),
    ("train={stps: 3}", "did you mean 'train.steps'"),
    ("train.steps", "not key=value"),
    ("train.steps=[1", "not valid YAML"),
    ("train.steps=many", "train.steps = 'many' is a str"),
    ("train.steps=1.5", "train.steps = 1.5 is a float"),
    ("train.steps=true", "train.steps = True is a bool"),
    ("train.steps=null", "train.steps = None"),
    ("optimizer.lr=fast", "optimizer.lr = 'fast'"),
    ("optimizer.lr=true", "optimizer.lr = True"),
    ("optimizer.betas=0.9", "optimizer.betas = 0.9"),
    ("student.drop_layers=[1, a]", "student.drop_layers = 'a'"),
    ("name=[x]", "name = ['x']"),
    ("rollout.train_on_fresh=1", "rollout.train_on_fresh = 1"),
])  # fmt: skip
def test_wrong_keys_and_types_are_named(override, told):
    with pytest.raises(ValueError) as error:
        BASE.with_overrides([override])
    assert told in str(error.value)


@pytest.mark.parametrize("text", ["1.10", "0123", "12:30", "1_000", "0x1F", "2024-01-01", "true", "off"])
def test_text_stays_as_it_was_typed(text):
    assert BASE.with_overrides([f"name={text}"]).name == text
    assert BASE.with_overrides([f"data.input_field={text}"]).data.input_field == text


@pytest.mark.parametrize(("override", "told"), [
    ("precision=fp16", "precision = 'fp16'"),
    ("name=", "name = ''"),
    ("name=a/b", "name = 'a/b'"),
    ("name=..", "name = '..'"),
    ("seed=-1", "seed = -1"),
    ("teacher.path=", "teacher.path is empty"),
    ("student.path=", "student.path is empty"),
    ("student.ds_config=", "student.ds_config is empty"),
    ("student.num_layers=2", "student.drop_layers"),
    ("student={random_weights: true, num_layers: 0}", "student.num_layers = 0"),
    ("student={random_weights: true, drop_layers: [1]}", "student.num_layers"),
    ("teacher.rows_per_pass=0", "teacher.rows_per_pass = 0"),
    ("student.lora.rank=-1", "student.lora.rank = -1"),
    ("student.lora={rank: 4, alpha: 0}", "student.lora.alpha = 0"),
    ("student.lora={rank: 4, dropout: 1}", "student.lora.dropout = 1"),
    ("student.lora.adapter=x", "needs student.lora.rank"),
    ("teacher.lora.rank=4", "only the student is trained"),
    ("loss.divergence=skll", "did you mean 'skl'"),
    ("loss.alpha=1", "alpha is 1.0"),
    ("loss.alpha=-0.1", "alpha is -0.1"),
    ("loss={divergence: jsd, beta: 1}", "beta is 1.0"),
    ("loss.temperature=0", "loss.temperature = 0.0"),
    ("loss.temperature=.nan", "loss.temperature = nan"),
    ("loss.cross_entropy_weight=-1", "loss.cross_entropy_weight = -1.0"),
    ("loss.student_text_cross_entropy_weight=-1", "loss.student_text_cross_entropy_weight = -1.0"),
    ("loss={divergence: none, cross_entropy_weight: 1}", 'schedule.policy = "adaptive"'),
    ("loss.memory_budget_mib=0", "loss.memory_budget_mib = 0"),
    ("optimizer.name=adam", "did you mean 'adamw'"),
    ("optimizer.lr=0", "optimizer.lr = 0.0"),
    ("optimizer.lr=1e-9", "optimizer.min_lr = 1e-07 is above"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps = -1"),
    ("optimizer.warmup_steps=100", "leaves nothing of train.steps = 100"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay = -1.0"),
    ("optimizer.max_grad_norm=-1", "optimizer.max_grad_norm = -1.0"),
    ("optimizer.betas=[0.9]", "optimizer.betas = (0.9,)"),
    ("optimizer.betas=[0.9, 1]", "optimizer.betas = (0.9, 1.0)"),
    ("train.steps=0", "train.steps = 0"),
    ("train.rows_per_step=0", "train.rows_per_step = 0"),
    ("train.rows_per_micro_batch=0", "train.rows_per_micro_batch = 0"),
    ("rollout.capacity=0", "rollout.capacity = 0"),
    ("rollout.windows=0", "rollout.windows = 0"),
    ("rollout={windows: 3, capacity: 16}", "rollout.windows = 3 of train.rows_per_step = 8 sequences do not fit"),
    ("rollout.capacity=7", "rollout.windows = 1 of train.rows_per_step = 8 sequences do not fit"),
    ("rollout.engine=vlm", "did you mean 'vllm'"),
    ("rollout.engine=vllm", "rollout.server = ''"),
    ("rollout={engine: vllm, server: 'localhost:8000'}", "as in http://localhost:8000"),
    ("rollout={engine: vllm, server: 'http://a:1', server_timeout_s: 1800}", "not below faults.hang_s = 1800"),
    ("rollout.sync_every_steps=0", "rollout.sync_every_steps = 0"),
    ("rollout.server_timeout_s=0", "rollout.server_timeout_s = 0.0"),
    ("rollout.max_new_tokens=0", "rollout.max_new_tokens = 0"),
    ("rollout.temperature=-1", "rollout.temperature = -1.0"),
    ("rollout.top_p=0", "rollout.top_p = 0.0"),
    ("rollout.top_p=1.1", "rollout.top_p = 1.1"),
    ("rollout.top_k=-1", "rollout.top_k = -1"),
    ("validation.every_steps=0", "validation.every_steps = 0"),
    ("validation.rows=0", "validation.rows = 0"),
    ("validation.scored_rows=-1", "validation.scored_rows = -1"),
    ("validation.sampling_temperature=-1", "validation.sampling_temperature = -1.0"),
    ("schedule.policy=adaptve", "did you mean 'adaptive'"),
    ("schedule.phi_initial=2", "schedule.phi_initial = 2.0"),
    ("schedule.epsilon=-1", "schedule.epsilon = -1.0"),
    ("data.template=alpacca", "did you mean 'alpaca'"),
    ("data.max_prompt_length=512", "data.max_prompt_length = 512"),
    ("data.validation_fraction=1", "data.validation_fraction = 1.0"),
    ("data.kind=text", "schedule.policy = 'adaptive' asks for generated answers"),
    ("data.streaming=true", "data.streaming is for plain text"),
    ("text.weight=0", "text.weight = 0"),
    ("rollout={engine: vllm, server: 'http://x:1', sync_every_steps: 8, max_age_steps: 4}",
     "rollout.max_age_steps = 4 with rollout.sync_every_steps = 8"),
    ("loss.alpha_per_sequence=true data.packing=true", "with data.packing = True and data.kind = 'instructions'"),
    ("loss.alpha_per_sequence=true data.kind=text schedule.policy=off", "and data.kind = 'text'"),
])  # fmt: skip
def test_validate_names_the_setting_that_cannot_work(override, told):
    config = BASE.with_overrides(override.split() if " data." in override else [override])
    with pytest.raises(ValueError) as error:
        config.validate()
    assert told in str(error.value)


@pytest.mark.parametrize("overrides", [
    [], ["loss.alpha=0"], ["rollout.temperature=0"], ["optimizer.warmup_steps=99"], ["optimizer.max_grad_norm=0"],
    ["student={path: '', random_weights: true, num_layers: 1, shape: {model_type: llama}}"],
])  # fmt: skip
def test_validate_lets_what_works_pass(overrides):
    BASE.with_overrides(overrides).validate()


def test_a_token_budget_leaves_the_number_of_micro_batches_open():
    config = BASE.with_overrides(["train.rows_per_step=6", "train.tokens_per_micro_batch=600"])
    config.validate()
    assert config.accumulation(3) == 1
    with pytest.raises(ValueError, match=r"train.rows_per_step = 6 is not a multiple of the 4 ranks"):
        config.accumulation(4)
    with pytest.raises(
        ValueError, match=r"train.tokens_per_micro_batch = 600 is less than one row of data.max_length = 700"
    ):
        config.with_overrides(["data.max_length=700"]).validate()
    with pytest.raises(ValueError, match=r"less than one row of text.max_length = 800"):
        config.with_overrides(["text.source=x.txt", "text.max_length=800"]).validate()


def test_micro_batches_have_the_most_rows_that_divide_a_rank_s_share():
    config = BASE.with_overrides(["train.rows_per_step=24", "train.rows_per_micro_batch=4"])
    assert [config.accumulation(world) for world in (1, 2, 3, 6, 12, 24)] == [6, 3, 2, 1, 1, 1]
    assert [config.rows_per_micro_batch(world) for world in (1, 2, 3, 6, 12, 24)] == [4, 4, 4, 4, 2, 1]
    assert config.with_overrides(["train.rows_per_micro_batch=5"]).rows_per_micro_batch(1) == 4
    for world in (5, 48):
        with pytest.raises(ValueError, match=rf"train.rows_per_step = 24 is not a multiple of the {world} ranks"):
            config.accumulation(world)
    config = config.with_overrides(["text.source=x.txt", "text.rows_per_step=8"])
    assert [config.accumulation(world) for world in (1, 2, 4, 8)] == [8, 4, 4, 4]
    assert [config.rows_per_micro_batch(world) for world in (1, 2, 4, 8)] == [4, 4, 2, 1]
    assert config.with_overrides(["text.rows_per_step=null"]).accumulation(2) == 6  # as many as train.rows_per_step
    with pytest.raises(ValueError, match=r"text.rows_per_step = 8 is not a multiple of the 3 ranks"):
        config.accumulation(3)


def test_new_tokens_fill_the_window_unless_set():
    assert BASE.max_new_tokens == 512 - 256
    assert BASE.with_overrides(["rollout.max_new_tokens=9"]).max_new_tokens == 9


def test_saved_config_comes_back_equal(tmp_path):
    config = BASE.with_overrides([
        "student.drop_layers=[1, 2]", "student.shape={model_type: llama, rms_norm_eps: 1e-6}", "optimizer.lr=1e-5",
        "optimizer.betas=[0.5, 0.6]", "rollout.max_age_steps=4", "data.max_rows=9", "schedule.policy=mixed", "seed=7",
    ])  # fmt: skip
    config.save(tmp_path / "config.yaml")
    loaded = RunConfig.from_dict(yaml.safe_load((tmp_path / "config.yaml").read_text()))
    assert loaded == config and loaded != BASE
    assert RunConfig.from_dict({"train.steps": 3, "loss": {"alpha": 0}}).train.steps == 3
    with pytest.raises(ValueError, match=r"did you mean 'loss\.alpha'"):
        RunConfig.from_dict({"loss": {"alfa": 0}})


def test_off_is_a_name_and_not_a_boolean():
    assert RunConfig().with_overrides(["schedule.policy=off"]).schedule.policy == "off"
    with pytest.raises(ValueError, match=r"rollout\.train_on_fresh = 'off' is a str"):
        RunConfig().with_overrides(["rollout.train_on_fresh=off"])
    assert RunConfig().with_overrides(["rollout.train_on_fresh=True"]).rollout.train_on_fresh is True
