"""python -m toolkit init-student: write a student that is a part of its teacher."""

from __future__ import annotations

import argparse
from pathlib import Path

from toolkit.data import DataConfig
from toolkit.models.load import default_cache_dir
from toolkit.pruning.made import is_at_hand, materialize, prune_model
from toolkit.ranks import collectives
from toolkit.settings import DEPTHS, TEMPLATE_NAMES, WIDTHS, InitConfig, ModelConfig
from toolkit.storage.appear import made_once

SIZES = ("layers", "hidden", "heads", "kv_heads", "mlp")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default, data = InitConfig(), DataConfig()
    parser.add_argument("--teacher", required=True, help="folder, hub name, .gguf file or package:NAME")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; it may not exist yet")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="of the student; by default as the teacher's")
    parser.add_argument("--depth", default=default.depth, help=f"{', '.join(DEPTHS)}, or the layers to keep: 0,1,9,10")
    parser.add_argument("--width", default=default.width, choices=WIDTHS)
    parser.add_argument(
        "--data", default=data.source, help="calibration text: a .txt file, or anything data.source takes"
    )
    parser.add_argument(
        "--text-field", help="read --data as plain text, this field of it: a jsonl or parquet file, a folder, a hub set"
    )
    parser.add_argument("--subset", help="of a hub set")
    parser.add_argument("--prompt-field", default=data.prompt_field)
    parser.add_argument("--response-field", default=data.response_field)
    parser.add_argument("--template", default=data.template, choices=TEMPLATE_NAMES)
    parser.add_argument("--rows", type=int, default=default.rows, help="of calibration text")
    parser.add_argument("--row-tokens", type=int, default=default.row_tokens)
    parser.add_argument("--seed", type=int, default=default.seed, help="of random choices")
    parser.add_argument("--tokenizer", default="", help="folder, hub name or .model file; by default the teacher's own")
    parser.add_argument("--trust-remote-code", action="store_true")


def run(options: argparse.Namespace) -> None:
    """Raises ValueError for wrong input; nothing is left behind then."""
    if options.out.exists():
        raise ValueError(f"{options.out} is there already; name another folder, or delete it")
    sizes = {name: getattr(options, name) for name in SIZES}
    init = InitConfig(
        **sizes, depth=options.depth, width=options.width, rows=options.rows, row_tokens=options.row_tokens,
        seed=options.seed,
    )  # fmt: skip
    init.validate("init-student")
    plain = {} if options.text_field is None else {
        "kind": "text", "text_field": options.text_field, "streaming": not is_at_hand(options.data),
    }  # fmt: skip
    data = DataConfig(
        source=options.data, subset=options.subset, prompt_field=options.prompt_field,
        response_field=options.response_field, template=options.template, **plain,
    )  # fmt: skip
    data.validate()
    model = ModelConfig(path=options.teacher, tokenizer=options.tokenizer, trust_remote_code=options.trust_remote_code)
    collectives.on_main_rank(lambda: _make(options.out, model, init, data))


def _make(out: Path, model: ModelConfig, init: InitConfig, data: DataConfig) -> None:
    path = materialize(model, default_cache_dir(""))
    made_once(out, lambda folder: report(prune_model(model, path, init, data, folder)))
    print(f"student: {out}")


def report(record: dict) -> None:
    for choice, kl_nats in record.get("depth_kl_nats", {}).items():
        print(f"layers {choice}: KL {kl_nats:.3f} nats")
    kept = record["kept"]
    print(f"kept layers {','.join(map(str, kept['layers']))}")
    if "calibration" in record:
        found = record["calibration"]
        print(
            f"on {found['rows']} x {found['row_tokens']} tokens of {found['source']}: KL to the teacher "
            f"{found['kl_nats']:.3f} nats, top-1 agreement {found['top1_agreement']:.1%}"
        )
