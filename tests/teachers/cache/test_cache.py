"""Caches as a user makes and uses them: built on one rank and on two, read by whole runs, held against a live teacher.

With k = the whole vocabulary a cache differs from the live teacher by its 16 bits alone.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.evaluation.evaluation_cases import command
from tests.run import run_cases
from tests.teachers.cache import cache_cases
from tests.tiny import make_tokenizer, save_llama, tiny_overrides
from toolkit.ranks.signals import EXIT_LATER

pytestmark = pytest.mark.multiprocess
ROOT = Path(__file__).resolve().parents[3]
SHARD_TOKENS = 60


def arguments(tiny, out, form, **changes):
    recipe = tiny / "recipe.py"
    recipe.write_text('from toolkit.settings import RunConfig\n\nRECIPE = RunConfig(name="tiny")\n')
    return [
        "cache-teacher", str(recipe), *form, "--out", str(out), "--shard-tokens", str(SHARD_TOKENS),
        *tiny_overrides(tiny, **changes),
    ]  # fmt: skip


def made(tiny, ranks, name, form, **changes):
    out = tiny / name
    if not out.exists():
        for code, _, said, _ in ranks.run(command, arguments(tiny, out, form, **changes)):
            assert code == 0, said
    return out


@pytest.fixture(scope="module")
def whole(tiny, ranks1):
    """A cache of the whole distribution."""
    return made(tiny, ranks1, "cache whole", ["--top-k", str(len(make_tokenizer()))])


@pytest.fixture(scope="module")
def draws(tiny, ranks1):
    return made(tiny, ranks1, "cache draws", ["--draws", "20"])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weights(tiny, name):
    return load_file(tiny / "runs" / name / "student" / "model.safetensors")


def records(tiny, name):
    return [json.loads(line) for line in (tiny / "runs" / name / "metrics.jsonl").open()]


def distance(tiny, one, other):
    a, b = weights(tiny, one), weights(tiny, other)
    return max((a[name] - b[name]).abs().max().item() for name in a)


def test_the_launchers_two_ranks_build_the_same_bytes(tiny, draws):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["deepspeed", "--log_level", "error", "--num_accelerators", "2", "--master_port", str(port)]
    given = arguments(tiny, tiny / "cache of two", ["--draws", "20"])
    done = subprocess.run(
        [*launcher, "--module", "toolkit", *given], cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 draws of" in done.stdout and done.stdout.count("made in") == 1
    found = content(tiny / "cache of two")
    assert len(found) > 4 and found == content(draws)


def test_a_build_that_was_stopped_goes_on(tiny, ranks2, draws):
    given = arguments(tiny, tiny / "cache stopped", ["--draws", "20"])
    for code, *_ in ranks2.run(cache_cases.stopped_command, given, after_rounds=2):
        assert code == EXIT_LATER
    unfinished = tiny / "cache stopped.unfinished"
    there = {path.name: path.stat().st_mtime_ns for path in unfinished.glob("*.safetensors")}
    assert len(there) == 4 and not (tiny / "cache stopped").exists()  # two rounds of two ranks
    (unfinished / "shard-000004.safetensors.unfinished").write_bytes(b"half a shard, as a kill leaves it")
    code, _, err, _ = ranks2.run(command, [*given[:2], "--draws", "21", *given[4:]])[0]
    assert code == 2 and "holds another cache" in err and "'draws': 20" in err and "'draws': 21" in err
    result = ranks2.run(command, given)[0]
    assert result[0] == 0 and result[1].startswith("4 of "), result
    assert content(tiny / "cache stopped") == content(draws) and not unfinished.exists()
    assert {name: (tiny / "cache stopped" / name).stat().st_mtime_ns for name in there} == there
    assert "was finished before" in ranks2.run(command, given)[0][1]


def test_shards_belong_to_a_plan_until_they_have_their_place(tiny, ranks2, draws):
    out = tiny / "cache planned"
    given, unfinished = arguments(tiny, out, ["--draws", "20"]), tiny / "cache planned.unfinished"
    code, _, err, _ = ranks2.run(cache_cases.command_that_cannot_rename, given, str(out))[0]
    assert code == 2 and "no place for it" in err
    plan = unfinished / "plan.json"
    begun = json.loads(plan.read_text())  # still there: else shards of any plan would be taken for those of the next
    plan.unlink()
    code, _, err, _ = ranks2.run(command, given)[0]
    assert code == 2 and "shards and no plan.json" in err and str(unfinished) in err
    plan.write_text(json.dumps(begun))
    assert ranks2.run(command, given)[0][0] == 0
    assert content(out) == content(draws) and not unfinished.exists()


def test_a_folder_that_is_there_is_refused_before_any_work(tiny, ranks2):
    (tiny / "cache taken").mkdir()
    (tiny / "cache taken" / "notes.txt").write_text("mine")
    given = [*arguments(tiny, tiny / "cache taken", ["--draws", "20"]), "teacher.path=nowhere"]
    for code, _, err, _ in ranks2.run(command, given):
        assert code == 2 and (not err or "is there already and is no finished cache" in err), err
    assert not (tiny / "cache taken.unfinished").exists()


def test_nodes_without_a_shared_folder_are_told(ranks2, tmp_path):
    for said in ranks2.run(cache_cases.error_of_build, [tmp_path / "one" / "cache", tmp_path / "two" / "cache"]):
        assert "/cache.unfinished of rank 0 is not there for rank 1 on " in said


def test_a_node_that_sees_the_cache_late_is_told_what_it_is(tiny, ranks2, draws):
    given = arguments(tiny, tiny / "cache late", ["--draws", "20"])
    for said in ("made in", "was finished before"):
        (code, out, err, manifest), other = ranks2.run(
            cache_cases.command_of_a_late_node, given, str(tiny / "cache late")
        )
        assert (code, other[0]) == (0, 0) and said in out, err
        assert manifest == other[3] == json.loads((draws / "manifest.json").read_text())


@pytest.mark.parametrize("divergence", ["fkl", "srkl"])
def test_a_cached_run_equals_the_live_one_and_loads_no_teacher(tiny, ranks1, ranks2, whole, divergence):
    """To the 16 bits of a log-probability. Whatever the layout, to 1e-5 with each other."""
    common = {"loss.divergence": divergence, "train.steps": 4, "loss.cross_entropy_weight": 0.2}
    built = ranks2.run(cache_cases.run_counting_teachers, tiny_overrides(tiny, name=f"live {divergence}", **common))
    assert built == [1, 1]
    layouts = {
        "2x4": (ranks2, {}),
        "1x2": (ranks1, {"train.rows_per_micro_batch": 2}),
        "packed": (ranks2, {"data.packing": True}),
    }
    for label, (ranks, changes) in layouts.items():
        settings = tiny_overrides(
            tiny, name=f"cached {divergence} {label}", teacher__cache=str(whole), **common, **changes
        )
        assert set(ranks.run(cache_cases.run_counting_teachers, settings)) == {0}
        assert distance(tiny, f"cached {divergence} {label}", f"cached {divergence} 2x4") < 1e-5
    start = load_file(tiny / "student" / "model.safetensors")
    moved = max(
        (tensor - start[name]).abs().max().item() for name, tensor in weights(tiny, f"live {divergence}").items()
    )
    assert distance(tiny, f"cached {divergence} 2x4", f"live {divergence}") < 1e-4 < 0.01 * moved
    for ours, theirs in zip(
        records(tiny, f"cached {divergence} 2x4"), records(tiny, f"live {divergence}"), strict=True
    ):
        assert (ours["teacher"], theirs["teacher"]) == ("cache", "live")
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
        assert ours["top1_agreement"] == theirs["top1_agreement"]
    final = [records(tiny, f"{kind} {divergence}{label}")[-1]["validation"] for kind, label in
             (("cached", " 2x4"), ("live", ""))]  # fmt: skip
    assert final[0]["kl_nats"] == pytest.approx(final[1]["kl_nats"], abs=1e-4)


def test_generated_text_asks_the_live_teacher_in_the_same_run(tiny, ranks2, whole):
    common = {"schedule.policy": "adaptive", "schedule.phi_initial": 0.6, "train.steps": 8}
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="mixed live", **common))
    cached = tiny_overrides(tiny, name="mixed cached", teacher__cache=str(whole), **common)
    assert ranks2.run(cache_cases.run_counting_teachers, cached) == [1, 1]
    found = records(tiny, "mixed cached")
    assert {record["source"] for record in found} == {"dataset", "replay", "generate"}
    assert all(record["teacher"] == ("cache" if record["source"] == "dataset" else "live") for record in found)
    assert {record["teacher"] for record in records(tiny, "mixed live")} == {"live"}
    assert found[0]["kl"] == pytest.approx(records(tiny, "mixed live")[0]["kl"], abs=1e-4)


def test_temperature_and_validation_at_one(tiny, ranks1, ranks2):
    common = {"loss.temperature": 2.0, "loss.divergence": "fkl"}
    cache = made(tiny, ranks1, "cache warm", ["--top-k", str(len(make_tokenizer()))], **common)
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="warm live", **common))
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="warm cached", teacher__cache=str(cache), **common))
    assert distance(tiny, "warm cached", "warm live") < 1e-4
    live, cached = (records(tiny, f"warm {kind}")[-1]["validation"]["kl_nats"] for kind in ("live", "cached"))
    assert cached == pytest.approx(live, abs=1e-4)


def test_plain_text_is_found_document_by_document(tiny, ranks1, ranks2):
    lines = [json.loads(line)["response"] for line in (tiny / "rows.jsonl").open()]
    (tiny / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines * 2))
    common = {
        "data.kind": "text", "data.source": f"{tiny}/text.jsonl", "data.validation_source": f"{tiny}/text.jsonl",
        "train.rows_per_step": 2, "train.rows_per_micro_batch": 1, "data.max_length": 64,
    }  # fmt: skip
    cache = made(tiny, ranks1, "cache text", ["--top-k", str(len(make_tokenizer()))], **common)
    assert json.loads((cache / "manifest.json").read_text())["texts"] < len(lines)  # each once
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="text live", **common))
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="text cached", teacher__cache=str(cache), **common))
    assert distance(tiny, "text cached", "text live") < 1e-4


def test_without_the_teachers_files_and_on_after_a_stop(tiny, ranks2, draws):
    """Draws train; the run begins with the teacher's folder named and goes on without."""
    common = {"loss.divergence": "fkl", "teacher.cache": str(draws), "train.steps": 5, "resume": "auto"}
    named = tiny_overrides(tiny, name="named", **common)
    whole_run = ranks2.run(run_cases.run_tiny, named)[0]
    assert whole_run["validation"]["final"]["kl_nats"] < whole_run["validation"]["initial"]["kl_nats"]
    stopped = tiny_overrides(tiny, name="unnamed", **common)
    assert ranks2.run(run_cases.run_until, stopped, 3, signal.SIGTERM)[0][0] == EXIT_LATER
    code, said, err = ranks2.run(run_cases.run_saying, [*stopped, "teacher.path="])[0]
    assert code == 0 and "goes on from" in said and "no teacher is loaded" in said, err
    assert distance(tiny, "unnamed", "named") == 0
    weightless = shutil.copytree(tiny / "teacher", tiny / "no weights", ignore=lambda *_: ["model.safetensors"])
    ranks2.run(run_cases.run_tiny, tiny_overrides(tiny, name="no weights", teacher__path=str(weightless), **common))
    assert distance(tiny, "no weights", "named") == 0
    other = tiny_overrides(tiny, name="other cache", **common)
    assert ranks2.run(run_cases.run_until, other, 3, signal.SIGTERM)[0][0] == EXIT_LATER
    cache = made(tiny, ranks2, "cache 19 draws", ["--draws", "19"])
    code, said, err = ranks2.run(run_cases.run_saying, [*other, f"teacher.cache={cache}"])[0]
    assert code == 2 and "the teacher cache had SHA-256" in err


def test_a_finished_run_does_not_read_its_cache_and_does_not_miss_it(tiny, ranks2, draws, tmp_path):
    cache = Path(damaged(draws, tmp_path / "cache", lambda folder: None))
    changes = {"teacher.cache": str(cache), "loss.divergence": "fkl", "resume": "auto"}
    given = tiny_overrides(tiny, name="needs no cache", **changes)
    assert ranks2.run(run_cases.run_saying, given)[0][0] == 0
    for change in (flip, shutil.rmtree):
        change(cache)
        code, said, err = ranks2.run(run_cases.run_saying, given)[0]
        assert code == 0 and "this run is finished" in said, err
    foreign = save_llama(tmp_path / "foreign", make_tokenizer(), seed=11, hidden=48, extra_rows=5)
    code, _, err = ranks2.run(run_cases.run_saying, [*given, f"teacher.path={foreign}"])[0]
    assert code == 2 and "the teacher's model.safetensors had SHA-256" in err
    (tiny / "runs" / "needs no cache" / "student" / "config.json").unlink()  # now there is something left to do
    code, _, err = ranks2.run(run_cases.run_saying, given)[0]
    assert code == 2 and f"no finished teacher cache in {cache}" in err


def damaged(cache, folder, change):
    shutil.copytree(cache, folder)
    change(folder)
    return str(folder)


def changed_manifest(change):
    def damage(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def flip(folder):
    file = folder / "shard-000001.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("data_sha256: ", {"data.template": "plain"}),
        ("temperature: 1.0 in the cache, 2.0 in the run", {"loss.temperature": 2.0}),
        ("the teacher's model.safetensors: ", {"teacher.path": "{tiny}/foreign"}),
        ("draws: counts stand for probabilities only", {"loss.divergence": "skl"}),
        ("loss.divergence = 'jsd' with teacher.cache", {"loss.divergence": "jsd"}),
        ("loss.alpha_per_sequence = True", {"loss.divergence": "skl", "loss.alpha_per_sequence": True}),
        ("loss.cross_entropy_weight = 0.5", {"loss.temperature": 2.0, "loss.cross_entropy_weight": 0.5}),
        ("is for a teacher's answers", {"student.cache": "x"}),
        ("no finished teacher cache in", {"teacher.cache": "{tiny}/nothing"}),
        ("shard-000001.safetensors has SHA-256", {"teacher.cache": flip}),
        ("shard-000002.safetensors has None bytes", {
            "teacher.cache": lambda folder: (folder / "shard-000002.safetensors").unlink()
        }),
        ("does not say what a teacher cache's says (KeyError: 'identity')", {
            "teacher.cache": changed_manifest(lambda manifest: manifest.pop("identity"))
        }),
        ("does not say what a teacher cache's says (KeyError: 'vocabulary_size')", {
            "teacher.cache": changed_manifest(lambda manifest: manifest["identity"].pop("vocabulary_size"))
        }),
        ("does not say what a teacher cache's says (TypeError", {
            "teacher.cache": changed_manifest(lambda manifest: manifest.update(files={"shard-000000.safetensors": 3}))
        }),
        ("manifest.json cannot be read", {
            "teacher.cache": lambda folder: os.truncate(folder / "manifest.json", 100)
        }),
    ],
)  # fmt: skip
def test_what_does_not_belong_or_is_damaged_is_refused(tiny, ranks2, draws, tmp_path, message, changes):
    if not (tiny / "foreign").exists():
        save_llama(tiny / "foreign", make_tokenizer(), seed=11, hidden=48, extra_rows=5)
    given = {"teacher.cache": str(draws), "loss.divergence": "fkl"}
    for name, value in changes.items():
        given[name] = damaged(draws, tmp_path / "damaged", value) if callable(value) else value
        if isinstance(value, str):
            given[name] = value.format(tiny=tiny)
    (code, said), other = ranks2.run(run_cases.run_expecting_exit, tiny_overrides(tiny, name="refused", **given))
    assert (code, *other) == (2, 2, "") and said.startswith("error: ") and message in said
    if message.startswith(("data_sha256: ", "temperature: ", "the teacher's model")):
        assert "is another run's:" in said and " in the cache, " in said and " in the run" in said
