"""Students cut out of their teachers: exact where nothing is lost, and what is lost is what matters least."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.run import run_cases
from tests.tiny import make_tokenizer, tiny_overrides
from toolkit.cli import app
from toolkit.data import DataConfig
from toolkit.pruning import prune
from toolkit.pruning.depth import best_block, greedy
from toolkit.pruning.families import FAMILIES
from toolkit.pruning.made import calibration_data, materialize
from toolkit.pruning.text import calibration_ids
from toolkit.pruning.weights import LayerwiseModel, Weights, kl_to_teacher, run_choices
from toolkit.pruning.width import Meter, Sizes, Width, spread
from toolkit.pruning.write import write_part
from toolkit.settings import InitConfig, ModelConfig

TOKENIZER = make_tokenizer()
V, H, A, K, D, M, L = len(TOKENIZER), 32, 4, 2, 8, 48, 5
LLAMA = dict(
    vocab_size=V, hidden_size=H, intermediate_size=M, num_hidden_layers=L, num_attention_heads=A,
    num_key_value_heads=K, max_position_embeddings=128, initializer_range=0.2, rms_norm_eps=1e-12,
    bos_token_id=0, eos_token_id=1, pad_token_id=1,
)  # fmt: skip
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | dict(tie_word_embeddings=True))),
    "llama_biased": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | dict(attention_bias=True, mlp_bias=True))),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA, head_dim=D)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, head_dim=D)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**LLAMA)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(
        vocab_size=V, n_positions=128, n_embd=H, n_layer=L, n_head=A, n_inner=M, initializer_range=0.2,
        layer_norm_epsilon=1e-12, bos_token_id=0, eos_token_id=1,
    )),
    "opt": lambda: OPTForCausalLM(OPTConfig(
        vocab_size=V, hidden_size=H, ffn_dim=M, num_hidden_layers=L, num_attention_heads=A, init_std=0.2,
        max_position_embeddings=128, word_embed_proj_dim=H, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )),
}  # fmt: skip
IDS_BT = torch.randint(0, V, (2, 24), generator=torch.Generator().manual_seed(3))


def make(kind, seed=5):
    """A random model in which biases and norms are not the zeros and ones that they start as."""
    torch.manual_seed(seed)
    model = MAKERS[kind]().eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def save(model, folder, **how):
    model.save_pretrained(folder, **how)
    TOKENIZER.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    words = "Return the square of a number, or None where the number is missing. Copy a file to a folder. "
    (tmp_path / "text.txt").write_text(words * 20)
    return DataConfig(source=str(tmp_path / "text.txt"))


def pruned(path, data, folder, **settings):
    folder.mkdir()
    settings = {"rows": 3, "row_tokens": 32} | settings
    return prune(path, InitConfig(**settings), data, folder, lambda: TOKENIZER)


@torch.no_grad()
def logits(model_or_folder):
    model = model_or_folder
    if not isinstance(model, torch.nn.Module):
        model = AutoModelForCausalLM.from_pretrained(model).eval()
    return model(IDS_BT, use_cache=False).logits


def layers_of(model):
    base = getattr(model.base_model, "decoder", model.base_model)
    return base.h if hasattr(base, "h") else base.layers


def linear(module):
    """[out, in], whichever way the module keeps it, as a view."""
    return module.weight.data if isinstance(module, torch.nn.Linear) else module.weight.data.T


def parts(layer):
    """(q and k and v as a list of [out, in] views with biases, o, first MLP layers, last MLP layer)."""
    if hasattr(layer, "attn"):
        fused, bias = linear(layer.attn.c_attn), layer.attn.c_attn.bias.data
        qkv = list(zip(fused.chunk(3), bias.chunk(3), strict=True))
        return qkv, layer.attn.c_proj, [layer.mlp.c_fc], layer.mlp.c_proj
    attention = layer.self_attn
    qkv = [
        (linear(p), None if p.bias is None else p.bias.data)
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    if hasattr(layer, "mlp"):
        return qkv, attention.o_proj, [layer.mlp.gate_proj, layer.mlp.up_proj], layer.mlp.down_proj
    return qkv, attention.out_proj, [layer.fc1], layer.fc2


@torch.no_grad()
def kill(model, hidden, heads, mlp):
    """Nothing that is not in `hidden`, `heads`, `mlp` reaches anything else any more. For layer norms, which see the
    mean of all units, the living units' mean is made 0."""
    has_mean = model.config.model_type in ("gpt2", "opt")
    dead = [unit for unit in range(H) if unit not in hidden]
    dead_mlp = [unit for unit in range(M) if unit not in mlp]
    dead_heads = [unit for unit in range(A * D) if unit // D not in heads]

    def write(weight_HX):  # a view of something that is added to the residual stream
        weight_HX[dead] = 0
        if has_mean:
            weight_HX[hidden] -= weight_HX[hidden].mean(0, keepdim=True)

    base = getattr(model.base_model, "decoder", model.base_model)
    for name in ("embed_tokens", "wte", "wpe", "embed_positions"):
        if hasattr(base, name):
            write(getattr(base, name).weight.data.T)
    for layer in layers_of(model):
        _, o, _, down = parts(layer)
        linear(o)[:, dead_heads] = 0
        linear(down)[:, dead_mlp] = 0
        for module in (o, down):
            write(linear(module))
            if module.bias is not None:
                write(module.bias.data[:, None])
    for module in model.modules():
        if "LayerNorm" in type(module).__name__:
            module.bias[dead] = 0


@pytest.mark.parametrize("kind", MAKERS)
def test_cutting_what_is_dead_changes_nothing(tmp_path, kind):
    torch.manual_seed(0)
    is_grouped = kind not in ("gpt2", "opt")
    cases = [([0, 1], [0]), ([2, 3], [1]), ([0, 3], [0, 1])] if is_grouped else [([0, 1, 3], [0, 1, 3]), ([2], [2])]
    for number, (heads, groups) in enumerate(cases):
        model = make(kind)
        n_hidden = 24 if is_grouped else D * len(heads)
        hidden = torch.randperm(H)[:n_hidden].sort().values.tolist()
        mlp = torch.randperm(M)[:20].sort().values.tolist()
        kill(model, hidden, heads, mlp)
        path = save(model, tmp_path / f"{number}")
        factor = (H / n_hidden) ** 0.5  # a norm over fewer units, of which none is lost, divides by a larger number
        family = FAMILIES[model.config.model_type]
        norms = ["norm", *(f"{layer}.{norm}" for layer in range(L) for norm in family.norms)]
        width = Width(
            Sizes.of(model.config, L), torch.tensor(hidden), [torch.tensor(heads)] * L, [torch.tensor(groups)] * L,
            [torch.tensor(mlp)] * L, dict.fromkeys(norms, factor),
        )  # fmt: skip
        sizes = {"hidden_size": n_hidden, "num_attention_heads": len(heads)}
        if kind == "gpt2":
            sizes |= {"n_inner": 20}
        elif kind == "opt":
            sizes |= {"ffn_dim": 20, "word_embed_proj_dim": n_hidden}
        else:
            sizes |= {"intermediate_size": 20, "num_key_value_heads": len(groups), "head_dim": D}
        out = tmp_path / f"{number}-cut"
        out.mkdir()
        write_part(
            Weights(Path(path)), model.config, out, range(L), lambda n, t, w=width, f=family: w.cut(f, n, t), sizes
        )
        cut = AutoModelForCausalLM.from_pretrained(out).eval()
        for module in (*model.modules(), *cut.modules()):
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-12  # OPT's is fixed at 1e-5, which counts for more where units are cut
        expected = logits(model)
        assert expected.std() > 0.1
        torch.testing.assert_close(logits(cut), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", MAKERS)
def test_full_size_is_the_teacher_bit_for_bit(tmp_path, text, kind):
    path = save(make(kind), tmp_path / "teacher", max_shard_size="20KB")
    sizes = dict(layers=L, hidden=H, heads=A, mlp=M) | ({} if kind in ("gpt2", "opt") else dict(kv_heads=K))
    record = pruned(path, text, tmp_path / "student", **sizes)
    assert torch.equal(logits(tmp_path / "student"), logits(path))
    assert record["calibration"]["kl_nats"] == 0 and record["calibration"]["top1_agreement"] == 1


@pytest.mark.parametrize("kind", MAKERS)
def test_every_axis_is_cut_and_the_result_runs(tmp_path, text, kind):
    path = save(make(kind), tmp_path / "teacher")
    is_grouped = kind not in ("gpt2", "opt")
    sizes = dict(layers=3, hidden=24, heads=3, mlp=20) | ({"heads": 2, "kv_heads": 1} if is_grouped else {})
    record = pruned(path, text, tmp_path / "student", **sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    found = Sizes.of(model.config, model.config.num_hidden_layers)
    assert found == (3, 24, sizes["heads"], sizes.get("kv_heads", 3), 20, D)
    # The same number, by another way: transformers runs both, the text is the same, in float64.
    ids_RT = torch.tensor(TOKENIZER(Path(text.source).read_text())["input_ids"][: 3 * 32]).view(3, 32)
    with torch.no_grad():
        theirs, ours = (
            AutoModelForCausalLM.from_pretrained(folder)(ids_RT).logits.double().log_softmax(-1)
            for folder in (path, tmp_path / "student")
        )
    kl_nats = (theirs.exp() * (theirs - ours)).sum(-1).mean().item()
    assert record["calibration"]["kl_nats"] == pytest.approx(kl_nats, rel=1e-4)
    assert record["calibration"]["top1_agreement"] == (theirs.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert json.loads((tmp_path / "student" / "pruning.json").read_text()) == json.loads(json.dumps(record))


def layerwise(path, model):
    family = FAMILIES[model.config.model_type]
    return LayerwiseModel(Path(path), family, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kind", ["llama_tied", "qwen2", "smollm3", "gpt2", "opt"])
def test_the_kl_of_leaving_layers_out_is_that_of_the_model_without_them(tmp_path, kind):
    model = make(kind)
    own = layerwise(save(model, tmp_path / "model", max_shard_size="20KB"), model)
    choices = [(0, 2, 4), (0, 1, 2, 3), (1, 2, 3, 4), (0, 3, 4), (3,)]
    ended, whole_NH = run_choices(own, IDS_BT, choices)
    reference = logits(model).double().log_softmax(-1)
    layers = layers_of(model)
    owner = getattr(model.base_model, "decoder", model.base_model)
    layer_types = getattr(model.config, "layer_types", None)
    for choice in choices:
        setattr(owner, "h" if hasattr(owner, "h") else "layers", torch.nn.ModuleList(layers[i] for i in choice))
        model.config.num_hidden_layers = len(choice)
        if layer_types:
            model.config.layer_types = [layer_types[i] for i in choice]
        without = logits(model).double().log_softmax(-1)
        expected = (reference.exp() * (reference - without)).sum(-1).mean().item()
        kl_nats, agreement = kl_to_teacher(ended[choice], own.head_VH, whole_NH, own.head_VH, V)
        assert kl_nats == pytest.approx(expected, rel=1e-4)
        assert agreement == (reference.argmax(-1) == without.argmax(-1)).double().mean().item()
    assert all(parameter.is_meta for parameter in own.layers.parameters())  # no layer stays in memory


@torch.no_grad()
def without_effect(model, layers):
    for index in layers:
        _, o, _, down = parts(layers_of(model)[index])
        for module in (o, down):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_layers_without_effect_are_the_ones_left_out(tmp_path, text, kind):
    model = make(kind)
    without_effect(model, (2, 3))
    record = pruned(save(model, tmp_path / "block"), text, tmp_path / "block_out", layers=3)
    assert record["kept"]["layers"] == [0, 1, 4]
    assert set(record["depth_kl_nats"]) == {"0-1", "1-2", "2-3", "3-4"}
    assert record["depth_kl_nats"]["2-3"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(logits(tmp_path / "block_out"), logits(model))
    model = make(kind)
    without_effect(model, (1, 3))
    record = pruned(save(model, tmp_path / "apart"), text, tmp_path / "apart_out", layers=3, depth="greedy")
    assert record["kept"]["layers"] == [0, 2, 4] and set(record["depth_kl_nats"]) == {"1", "3"}
    torch.testing.assert_close(logits(tmp_path / "apart_out"), logits(model))


def test_the_choice_of_layers_asks_for_what_it_needs():
    asked = []

    def measure(choices):
        asked.append(choices)
        return {choice: float(sum(choice)) for choice in choices}

    assert best_block(6, 4, measure)[0] == (0, 1, 2, 3)
    assert [len(choices) for choices in asked] == [5]
    kept, path = greedy(4, 2, measure)
    assert kept == (0, 1) and list(path.items()) == [("3", 3.0), ("2", 1.0)]
    assert spread(30, 4) == [0, 10, 19, 29] and spread(5, 5) == [0, 1, 2, 3, 4] and spread(5, 1) == [0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_importance_finds_what_was_planted(tmp_path, text, kind):
    model, is_grouped = make(kind), kind == "llama"
    draws = torch.Generator().manual_seed(1)
    channels, heads = [], []
    hidden = torch.randperm(H, generator=draws)[:16].sort().values
    with torch.no_grad():
        for layer in layers_of(model):
            qkv, _, first, _ = parts(layer)
            channels.append(torch.randperm(M, generator=draws)[:12].sort().values)
            for module in first[-1:]:
                linear(module)[channels[-1]] *= 30
                if module.bias is not None:  # positive: a ReLU would hide the channel
                    module.bias[channels[-1]] = 300 + 30 * module.bias[channels[-1]].abs()
            heads.append(
                torch.randperm(K if is_grouped else A, generator=draws)[: 1 if is_grouped else 2].sort().values
            )
            units = (heads[-1][:, None] * D + torch.arange(D)).flatten()
            qkv[2][0][units] *= 30
            if qkv[2][1] is not None:
                qkv[2][1][units] *= 30
        for module in model.modules():
            if "Norm" in type(module).__name__:
                module.weight[hidden] = 3 + module.weight[hidden].abs()
    width = dict(hidden=16, heads=2, mlp=12) | ({"kv_heads": 1} if is_grouped else {})
    kept = pruned(save(model, tmp_path / "teacher"), text, tmp_path / "student", **width)["kept"]
    assert kept["hidden"] == hidden.tolist()
    assert kept["mlp"] == [c.tolist() for c in channels]
    assert kept["kv_heads"] == [h.tolist() for h in heads]
    group = A // K if is_grouped else 1
    assert kept["heads"] == [[group * k + j for k in h.tolist() for j in range(group)] for h in heads]


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_scores_are_minitrons_formula(tmp_path, kind):
    """Mean over tokens of |x|, L2 over rows; in float64, from transformers' own forward."""
    model = make(kind)
    own = layerwise(save(model, tmp_path / "model"), model)
    meter = Meter(own.family, Sizes.of(model.config, L), IDS_BT.shape[1], centred=kind == "opt")
    run_choices(own, IDS_BT, [(0, 1)], meter.watch)
    seen = {}

    def keep(name, take):
        return lambda module, args, out: seen.__setitem__(
            name, take(args, out).detach().double().view(*IDS_BT.shape, -1)
        )

    model = model.double()
    for index, layer in enumerate(layers_of(model)):
        _, o, _, down = parts(layer)
        o.register_forward_hook(keep(f"{index} heads", lambda args, out: args[0]))
        down.register_forward_hook(keep(f"{index} mlp", lambda args, out: args[0]))
    for name, module in model.named_modules():
        if "Norm" in type(module).__name__:
            module.register_forward_hook(keep(f"norm {name}", lambda args, out: out))
    logits(model)

    def score(x_BTX):
        return x_BTX.abs().mean(1).square().sum(0).sqrt()

    hidden_H = sum(score(x) for name, x in seen.items() if name.startswith("norm"))
    torch.testing.assert_close(meter.found.hidden_H, hidden_H, rtol=1e-4, atol=1e-6)
    assert len([name for name in seen if name.startswith("norm")]) == len(meter.found.shares_H) == 2 * L + 1
    for index in range(L):
        heads_A = score(seen[f"{index} heads"]).view(A, D).norm(dim=1)
        torch.testing.assert_close(meter.found.heads_LA[index], heads_A, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(meter.found.mlp_LM[index], score(seen[f"{index} mlp"]), rtol=1e-4, atol=1e-6)
    for share_H in meter.found.shares_H.values():
        assert share_H.sum().item() == pytest.approx(1)


def test_what_is_kept_of_a_normed_state_keeps_its_size(tmp_path, text):
    """The factors on the norms' weights, from the states that transformers' own forward brings to each norm."""
    model = make("llama")
    path = save(model, tmp_path / "teacher")
    kept = pruned(path, text, tmp_path / "student", hidden=16, heads=2)["kept"]
    plain = pruned(path, text, tmp_path / "plain", hidden=16, heads=2, keep_scale=False)["kept"]
    assert plain["norm_factors"] == {} and plain["hidden"] == kept["hidden"]
    seen = {}

    def see(name):
        return lambda module, args: seen.__setitem__(name, args[0].detach().double())

    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.register_forward_pre_hook(see(name.removeprefix("model.").removeprefix("layers.")))
    with torch.no_grad():
        model(calibration_ids(text, TOKENIZER, 3, 32))
    assert kept["norm_factors"].keys() == seen.keys() and len(seen) == 2 * L + 1
    teacher, student = (load_file(folder / "model.safetensors") for folder in (Path(path), tmp_path / "student"))
    for name, x_BTH in seen.items():
        normed_BTH = x_BTH / x_BTH.square().mean(-1, keepdim=True).sqrt()
        factor = normed_BTH[..., kept["hidden"]].square().mean().sqrt().item()
        assert kept["norm_factors"][name] == pytest.approx(factor, rel=1e-4) != 1
        full = f"model.{'layers.' if name != 'norm' else ''}{name}.weight"
        torch.testing.assert_close(student[full], teacher[full][kept["hidden"]] * factor, rtol=1e-4, atol=1e-6)


def test_tensors_that_the_teacher_does_without_do_not_matter(tmp_path, text):
    """GPT-2s saved by older versions of transformers hold masks; some folders hold the weights twice."""
    path = Path(save(make("gpt2"), tmp_path / "teacher"))
    tensors = load_file(path / "model.safetensors")
    tensors["transformer.h.3.attn.masked_bias"] = torch.tensor(-1e4)
    for name in ("model", "consolidated"):
        save_file(tensors, path / f"{name}.safetensors", metadata={"format": "pt"})
        tensors = {f"other.{key}": tensor for key, tensor in tensors.items()}
    record = pruned(str(path), text, tmp_path / "student", depth="1,3")
    assert record["teacher"]["sha256"].keys() == {"model.safetensors"}
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(ValueError, match="scale_attn_by_inverse_layer_idx = True"):
        pruned(str(path), text, tmp_path / "refused", depth="1,3")


def test_a_tokenizer_that_is_named_lies_beside_the_student(tmp_path, text):
    path = save(make("llama"), tmp_path / "teacher")
    make_tokenizer(bos=True).save_pretrained(tmp_path / "words")
    (tmp_path / "teacher" / "added_tokens.json").write_text("{}")
    out = tmp_path / "student"
    options = ["--teacher", path, "--tokenizer", str(tmp_path / "words"), "--row-tokens", "32"]
    main([*options, "--out", str(out), "--depth", "0,2"])
    assert AutoTokenizer.from_pretrained(out)("a")["input_ids"][0] == 0 and not (out / "added_tokens.json").exists()
    for file in (tmp_path / "teacher").glob("tokenizer*"):
        file.unlink()
    main([*options, "--out", str(out.with_name("bare")), "--mlp", "8"])
    assert AutoTokenizer.from_pretrained(out.with_name("bare"))("a")["input_ids"][0] == 0


def test_calibration_text_of_its_own_is_read_as_a_whole_where_it_is_at_hand(text):
    run = DataConfig(kind="text", source="some/set", subset="10B", streaming=True)
    assert calibration_data(run, InitConfig()) is run
    for name, streaming in (("python_docs", False), (text.source, False), ("other/set", True)):
        found = calibration_data(run, InitConfig(data=name))
        assert (found.source, found.subset, found.streaming, found.kind) == (name, None, streaming, "text")


def test_even_and_random_are_what_they_say(tmp_path, text):
    path = save(make("llama"), tmp_path / "teacher")
    kept = pruned(path, text, tmp_path / "even", layers=3, depth="even", mlp=4, hidden=4, heads=2, width="even")["kept"]
    assert kept["layers"] == [0, 2, 4] and kept["hidden"] == spread(H, 4) and kept["mlp"] == [spread(M, 4)] * 3
    settings = dict(layers=3, depth="random", mlp=4, width="random")
    first, again, other = (
        pruned(path, text, tmp_path / f"{seed}-{n}", seed=seed, **settings)["kept"] for n, seed in enumerate((1, 1, 2))
    )
    assert first == again and first["mlp"] != other["mlp"] and len(set(map(tuple, first["mlp"]))) > 1


def test_a_checkpoint_without_the_bases_name(tmp_path, text):
    """GPT-2's on the hub begins with wte, not with transformer.wte."""
    path = Path(save(make("gpt2"), tmp_path / "teacher"))
    tensors = load_file(path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    pruned(str(path), text, tmp_path / "student", layers=3, hidden=24, mlp=20)
    assert load_file(tmp_path / "student" / "model.safetensors")["h.2.mlp.c_fc.weight"].shape == (24, 20)
    pruned(str(path), text, tmp_path / "whole", mlp=M)
    assert torch.equal(logits(tmp_path / "whole"), logits(path))


def test_pickled_weights_give_the_student_that_safetensors_give(tmp_path, text):
    path = Path(save(make("llama"), tmp_path / "teacher"))
    settings = dict(layers=3, mlp=20)  # the embedding stays whole, and is tied
    pruned(str(path), text, tmp_path / "wanted", **settings)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    tied = {"lm_head.weight": tensors["model.embed_tokens.weight"]} if "lm_head.weight" not in tensors else {}
    for part, some in enumerate((names[:5], names[5:])):
        file = path / f"pytorch_model-0000{part + 1}-of-00002.bin"
        torch.save({name: tensors[name] for name in some} | (tied if "model.embed_tokens.weight" in some else {}), file)
    pruned(str(path), text, tmp_path / "found", **settings)
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("wanted", "found"))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    torch.save({"weight": print}, path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(ValueError, match=r"pytorch_model-00002-of-00002.bin is damaged.*or holds more than tensors"):
        pruned(str(path), text, tmp_path / "refused", **settings)


@pytest.mark.parametrize("depth", ["1,3", "even", "random"])
def test_t5_loses_layers_of_both_stacks(tmp_path, text, depth):
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=V, d_model=H, d_kv=D, d_ff=M, num_layers=4, num_heads=A, initializer_factor=3.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    record = pruned(save(model, tmp_path / "teacher"), text, tmp_path / "student", depth=depth, layers=2)
    kept = record["kept"]["layers"]
    if depth != "random":
        assert kept == {"1,3": [1, 3], "even": [0, 3]}[depth]
    found = T5ForConditionalGeneration.from_pretrained(tmp_path / "student").eval()
    assert (found.config.num_layers, found.config.num_decoder_layers) == (2, 2)
    for stack in (model.encoder, model.decoder):
        attention, first = stack.block[0].layer[0].SelfAttention, stack.block[kept[0]].layer[0].SelfAttention
        first.relative_attention_bias, first.has_relative_attention_bias = attention.relative_attention_bias, True
        stack.block = torch.nn.ModuleList(stack.block[layer] for layer in kept)
    with torch.no_grad():
        ours, theirs = (m(IDS_BT, decoder_input_ids=IDS_BT[:, :5], use_cache=False).logits for m in (found, model))
    torch.testing.assert_close(ours, theirs)


def test_what_does_not_work_is_not_kept(tmp_path, text):
    model = make("llama")
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    path = save(model, tmp_path / "teacher")
    for wanted in (
        ModelConfig(path=path, init=InitConfig(layers=2, depth="even")),
        ModelConfig(path=path, drop_layers=(1,)),
    ):
        with pytest.raises(ValueError, match=r"the model made does not work .*not finite"):
            materialize(wanted, tmp_path / "cache", text)
    out = tmp_path / "out" / "student"
    with pytest.raises(ValueError, match="the model made does not work"):
        main(["--teacher", path, "--out", str(out), "--mlp", "8", "--data", text.source, "--row-tokens", "32"])
    assert not list((tmp_path / "cache").iterdir()) and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("kind", "settings", "told"), [
    ("llama", dict(hidden=40), "hidden = 40, but the teacher has 32"),
    ("llama", dict(heads=3, kv_heads=2), "heads = 3 is not a multiple of kv_heads = 2"),
    ("llama", dict(heads=4, kv_heads=1), "4 query heads for each key-value head, and the teacher has 2"),
    ("llama", dict(hidden=30, heads=4), "hidden = 30 is not a multiple of heads = 4"),
    ("llama", dict(layers=6), "has 5 layers"),
    ("llama", dict(depth="1,5"), "layers [1, 5] are to be kept, but the model has layers 0 to 4"),
    ("llama", dict(depth="1,2", layers=3), "layers = 3 with depth = 1,2"),
    ("llama", dict(mlp=8, row_tokens=4096), "fewer than one row of 4096"),
    ("llama", dict(mlp=8, row_tokens=200), "longer than the teacher's 128 positions"),
    ("gpt2", dict(hidden=24, heads=2), "hidden = heads x 8"),
    ("gpt2", dict(kv_heads=2), "as many key-value heads as heads"),
    ("bloom", dict(mlp=8), "not there for models of type 'bloom'; it is for llama, "),
    ("bloom", dict(layers=1), "depth=even"),
    ("opt_projected", dict(mlp=8), "word_embed_proj_dim = 16, hidden_size = 32"),
    ("t5", dict(layers=1), "models of type 't5'"),
    ("t5_uneven", dict(layers=1, depth="even"), "2 encoder and 3 decoder layers"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, text, kind, settings, told):
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=H, n_layer=2, n_head=A))
    elif kind == "opt_projected":
        model = OPTForCausalLM(OPTConfig(
            vocab_size=V, hidden_size=H, ffn_dim=M, num_hidden_layers=2, num_attention_heads=A, word_embed_proj_dim=16,
            max_position_embeddings=64,
        ))  # fmt: skip
    elif kind.startswith("t5"):
        decoder = 3 if kind == "t5_uneven" else 2
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=V, d_model=H, d_kv=D, d_ff=M, num_layers=2, num_decoder_layers=decoder, num_heads=A)
        )
    else:
        model = make(kind)
    path = save(model, tmp_path / "teacher")
    with pytest.raises(ValueError, match=re.escape(told)):
        pruned(path, text, tmp_path / "student", **settings)


def main(arguments):
    """As `python -m toolkit init-student` does, in this process."""
    app(["init-student", *arguments], standalone_mode=False)()


def test_command(tmp_path, text, capsys):
    path = save(make("llama"), tmp_path / "teacher")
    out = tmp_path / "new" / "student"
    options = [
        "--teacher",
        path,
        "--out",
        str(out),
        "--layers",
        "3",
        "--hidden",
        "24",
        "--heads",
        "2",
        "--kv-heads",
        "1",
    ]
    options += ["--mlp", "20", "--data", text.source, "--rows", "2", "--row-tokens", "32"]
    main(options)
    printed = capsys.readouterr().out
    record = json.loads((out / "pruning.json").read_text())
    assert f"kept layers {','.join(map(str, record['kept']['layers']))}" in printed and "top-1 agreement" in printed
    assert record["calibration"]["rows"] == 2 and record["calibration"]["source"] == text.source
    assert list(record["teacher"]["sha256"]) == ["model.safetensors"] and (out / "tokenizer.json").is_file()
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"body": Path(text.source).read_text()}) + "\n" for _ in range(2)))
    again = [str(rows) if option == text.source else option for option in options] + ["--text-field", "body"]
    main([str(tmp_path / "as text") if option == str(out) else option for option in again])
    found = json.loads((tmp_path / "as text" / "pruning.json").read_text())
    assert found["calibration"]["sha256"] == record["calibration"]["sha256"] and found["kept"] == record["kept"]
    assert [p.name for p in out.parent.iterdir()] == ["student"]
    with pytest.raises(ValueError, match="is there already"):
        main(options)


def test_made_once_for_each_setting_and_text(tmp_path, text):
    path = save(make("llama"), tmp_path / "teacher")

    def made(**settings):
        return materialize(
            ModelConfig(path=path, init=InitConfig(rows=2, row_tokens=32, **settings)), tmp_path / "cache", text
        )

    first = made(mlp=20)
    assert made(mlp=20) == first and made(mlp=16) != first
    Path(text.source).write_text("Another text, which is long enough for two rows of tokens. " * 20)
    assert made(mlp=20) != first
    named = tmp_path / "other.txt"
    named.write_text("A text for the student alone, which the run does not train on. " * 20)
    record = json.loads((Path(made(mlp=20, data=str(named))) / "pruning.json").read_text())
    assert record["calibration"]["source"] == str(named)


@pytest.mark.multiprocess
def test_a_run_begins_with_a_pruned_student(tiny, tmp_path, ranks2):
    """On the run's own text, made by rank 0 and read by both."""
    settings = tiny_overrides(
        tiny, name="pruned", student__path=f"{tiny}/teacher", student__init={"hidden": 24, "mlp": 40, "row_tokens": 32},
        output_dir=str(tmp_path), cache_dir=str(tmp_path / "cache"), train__steps=1,
    )  # fmt: skip
    summary, other = ranks2.run(run_cases.run_tiny, settings)
    assert summary["validation"] == other["validation"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned" / "student")
    assert (model.config.hidden_size, model.config.intermediate_size) == (24, 40)
    (folder,) = (tmp_path / "cache").glob("*-pruned-*")
    assert json.loads((folder / "pruning.json").read_text())["calibration"]["source"] == f"{tiny}/rows.jsonl"


def test_calibration_text_of_a_stream_is_its_beginning(tmp_path):
    """A recipe streams what does not fit a disk, and a cut needs the first of it alone."""
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"Copy file {i} to the folder {i * i}."}) + "\n" for i in range(400)))
    data = DataConfig(kind="text", source=str(file))
    whole = calibration_ids(data, make_tokenizer(), rows=3, row_tokens=20)
    assert whole.shape == (3, 20)
    streamed = calibration_ids(dataclasses.replace(data, streaming=True), make_tokenizer(), rows=3, row_tokens=20)
    assert torch.equal(streamed, whole)
