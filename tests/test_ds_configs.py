"""Every file of ds_configs/ is parsed and trains a little on two ranks."""

import json

import pytest

from tests.run import run_cases
from tests.tiny import tiny_overrides
from toolkit.settings.ds_files import REPOSITORY

pytestmark = pytest.mark.multiprocess
FILES = sorted(path.name for path in (REPOSITORY / "ds_configs").glob("*.json"))


def test_there_is_one_for_each_need():
    stages = {name: json.loads((REPOSITORY / "ds_configs" / name).read_text())["zero_optimization"] for name in FILES}
    assert {name for name, zero in stages.items() if zero["stage"] == 2} == {"student_zero2.json"}
    assert any("zero_hpz_partition_size" in zero for zero in stages.values())
    assert any("offload_param" in zero for zero in stages.values())


@pytest.mark.parametrize("name", FILES)
def test_it_trains(tiny, ranks2, tmp_path, name):
    config = json.loads((REPOSITORY / "ds_configs" / name).read_text())
    zero = config["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2  # as many as a node has ranks, and this one has 2
    (tmp_path / name).write_text(json.dumps(config))
    role = name.partition("_")[0]
    changes = {f"{role}.ds_config": f"{tmp_path}/{name}"}
    summary = ranks2.run(run_cases.run_tiny, tiny_overrides(
        tiny, name=name, train__steps=3, optimizer__name="adamw", optimizer__lr=0.01, precision="bf16",
        schedule__policy="mixed", schedule__mixed_share=0.5, **changes))[0]  # fmt: skip
    assert summary["validation"]["final"]["kl_nats"] < summary["validation"]["initial"]["kl_nats"]


def test_stages_of_one_process_have_hpz_each(tiny, ranks1):
    for name in ("first stage", "second stage"):
        settings = {"teacher__ds_config": "ds_configs/teacher_zero3_hpz.json", "train__steps": 1}
        ranks1.run(run_cases.run_tiny, tiny_overrides(tiny, name=name, **settings))
