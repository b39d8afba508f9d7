import copy
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from toolkit.rollout.schedule import Schedule, ScheduleState, Source
from toolkit.seeds import philox, uniform
from toolkit.settings import POLICIES, ScheduleConfig


def make(seed=0, total_steps=8000, state=None, **fields):
    return Schedule(ScheduleConfig(**fields), seed, total_steps, state)


def sources(schedule, steps):
    return [schedule.decide(step) for step in steps]


def assert_binomial(hits, trials, probability):
    sigma = math.sqrt(trials * probability * (1 - probability))
    assert abs(hits - trials * probability) <= 4.5 * sigma + 1e-9, (hits, trials, probability)


# (fields, progress) -> (P(generate), P(replay)), written out by hand from Algorithm 1 and its variants.
PROBABILITIES = [
    (dict(phi_initial=0.4), 0.0, 0.4, 0.0),
    (dict(phi_initial=0.4), 0.25, 0.3, 0.1),
    (dict(phi_initial=0.4), 1.0, 0.0, 0.4),
    (dict(phi_initial=1.0), 0.5, 0.5, 0.5),
    (dict(phi_initial=0.4, generation_share="constant"), 0.25, 0.2, 0.2),
    (dict(phi_initial=0.4, generation_share="increasing"), 0.25, 0.1, 0.3),
    (dict(phi_initial=0.0), 0.25, 0.0, 0.0),
    (dict(policy="on_policy"), 0.25, 1.0, 0.0),
    (dict(policy="mixed", mixed_share=0.3, phi_initial=0.9), 0.25, 0.3, 0.0),
    (dict(policy="off", phi_initial=0.9), 0.25, 0.0, 0.0),
]


@pytest.mark.parametrize("fields, progress, generate, replay", PROBABILITIES)
def test_probabilities_and_draws_around_one_point(fields, progress, generate, replay):
    schedule = make(**fields, total_steps=1000)
    expected = {Source.GENERATE: generate, Source.REPLAY: replay, Source.DATASET: 1 - generate - replay}
    assert schedule.probabilities(int(progress * 1000)) == pytest.approx(expected)
    drawn = [make(seed, 1000, **fields).decide(int(progress * 1000)) for seed in range(2000)]
    for source, probability in expected.items():
        assert_binomial(drawn.count(source), len(drawn), probability)


@pytest.mark.parametrize("share, first_half", [("decreasing", 0.75), ("constant", 0.5), ("increasing", 0.25)])
def test_frequencies_over_a_run(share, first_half):
    schedule = make(phi_initial=0.6, generation_share=share)
    half = schedule.total_steps // 2
    for steps, mean_share in ((range(half), first_half), (range(half, 2 * half), 1 - first_half)):
        drawn = sources(schedule, steps)
        assert_binomial(drawn.count(Source.GENERATE), half, 0.6 * mean_share)
        assert_binomial(drawn.count(Source.REPLAY), half, 0.6 * (1 - mean_share))
        assert_binomial(drawn.count(Source.DATASET), half, 0.4)


def test_every_policy_is_tested():
    assert {fields.get("policy", "adaptive") for fields, *_ in PROBABILITIES} == set(POLICIES)


def test_decisions_depend_on_seed_step_and_phi_alone():
    first, second = make(phi_initial=0.5, total_steps=500), make(phi_initial=0.5, total_steps=500)
    np.random.seed(7)  # a rank that used its own generator must not matter
    forward = sources(first, range(500))
    np.random.seed(8)
    backward = sources(second, reversed(range(500)))
    assert forward == backward[::-1] == sources(first, range(500))
    assert forward != sources(make(seed=1, phi_initial=0.5, total_steps=500), range(500))


def test_raising_phi_never_turns_student_text_into_data():
    low, high = make(phi_initial=0.3, total_steps=500), make(phi_initial=0.6, total_steps=500)
    for step in range(500):
        assert low.decide(step) is Source.DATASET or high.decide(step) is not Source.DATASET


# losses -> phi after each, epsilon 0.25 and phi_step 0.5 (exact in binary); the first loss is only a reference
PHI_TABLE = [
    ("previous", [2.0, 1.5, 1.0], [0, 0, 0]),
    ("previous", [2.0, 2.25, 2.5, 2.75], [0, 0, 0, 0]),  # a rise by epsilon is not above it
    ("previous", [2.0, 2.5, 3.0, 3.5], [0, 0.5, 1, 1]),  # capped
    ("previous", [3.0, 2.0, 2.5], [0, 0, 0.5]),  # above the previous, below the first
    ("released", [3.0, 2.0, 2.5], [0, 0, 0]),
    ("released", [2.0, 2.25, 2.5], [0, 0, 0.5]),  # small rises add up: 2.5 is held against 2.0
    ("released", [2.0, 2.5, 2.6, 2.0, 2.7, 2.8], [0, 0.5, 0.5, 0.5, 0.5, 1]),  # reference 2.5 from the rise on
]


@pytest.mark.parametrize("reference_loss, losses, phis", PHI_TABLE)
def test_phi_rule(reference_loss, losses, phis):
    schedule = make(phi_step=0.5, epsilon=0.25, reference_loss=reference_loss)
    moved = [schedule.observe_validation(step, loss) for step, loss in enumerate(losses)]
    assert [phi for _, _, phi in schedule.state.history] == phis
    assert moved == [after > before for before, after in zip([0, *phis], phis, strict=False)]
    assert [(step, loss) for step, loss, _ in schedule.state.history] == list(enumerate(losses))


def test_ten_tenths_reach_exactly_one():
    schedule = make()
    moved = [schedule.observe_validation(step, float(step)) for step in range(12)]
    assert moved == [False] + [True] * 10 + [False] and schedule.state.phi == 1.0


@pytest.mark.parametrize("policy", ["on_policy", "mixed", "off"])
def test_other_policies_record_and_do_not_move(policy):
    schedule = make(policy=policy)
    assert not any(schedule.observe_validation(step, float(step)) for step in range(3))
    assert schedule.state.phi == 0 and len(schedule.state.history) == 3


@pytest.mark.parametrize("reference_loss", ["previous", "released"])
def test_state_round_trip_through_json(reference_loss):
    losses = [3.0, 2.0, 3.5, 2.0, 2.7, 3.0, 3.8, 4.5]
    whole, first = (make(reference_loss=reference_loss, total_steps=800) for _ in range(2))
    for i, loss in enumerate(losses):
        whole.observe_validation(100 * i, loss)
        if i < 4:
            first.observe_validation(100 * i, loss)
    state = ScheduleState(**json.loads(json.dumps(dataclasses.asdict(first.state))))
    state.history = [tuple(entry) for entry in state.history]
    resumed = make(reference_loss=reference_loss, total_steps=800, state=state)
    for i, loss in list(enumerate(losses))[4:]:
        resumed.observe_validation(100 * i, loss)
    assert resumed.state == whole.state
    assert sources(resumed, range(400, 800)) == sources(whole, range(400, 800))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_refused_and_not_recorded(loss):
    schedule = make()
    schedule.observe_validation(0, 2.0)
    state = copy.deepcopy(schedule.state)
    with pytest.raises(ValueError, match="step 10"):
        schedule.observe_validation(10, loss)
    assert schedule.state == state


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(policy="adaptve"), "one of adaptive, on_policy, mixed, off; did you mean 'adaptive'"),
        (dict(policy="on-policy"), "did you mean 'on_policy'"),
        (dict(policy="adaptive-srkl"), "schedule.policy = 'adaptive-srkl' is not one of"),
        (dict(generation_share="decrease"), "did you mean 'decreasing'"),
        (dict(reference_loss="release"), "did you mean 'released'"),
        (dict(phi_initial=1.1), "schedule.phi_initial = 1.1; it has to be at least 0 and at most 1"),
        (dict(phi_step=-0.1), "phi_step = -0.1"),
        (dict(mixed_share=math.nan), "mixed_share = nan"),
        (dict(epsilon=-1), "epsilon = -1"),
        (dict(epsilon=math.inf), "epsilon = inf; it has to be at least 0 and finite"),
    ],
)
def test_invalid_configs_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        ScheduleConfig(**fields).validate()
    with pytest.raises(ValueError, match=message):
        make(**fields)


def test_steps_and_lengths_out_of_range():
    for step in (-1, 11):
        with pytest.raises(ValueError, match=f"step {step} is outside 0..10"):
            make(total_steps=10).decide(step)
    with pytest.raises(ValueError, match="total_steps is 0"):
        make(total_steps=0)
    schedule = make()
    schedule.observe_validation(5, 1.0)
    with pytest.raises(ValueError, match="step 4 comes after one at step 5"):
        schedule.observe_validation(4, 1.0)


def test_uniform_is_uniform_pure_and_pinned():
    draws = np.array([uniform(3, step) for step in range(20_000)])
    assert draws.min() >= 0 and draws.max() < 1
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 50  # chi-square, 19 degrees of freedom: p about 1e-4
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03
    assert uniform(3, 5) == draws[5]
    assert len({uniform(3), uniform(3, 0), uniform(3, 0, 0), uniform(3, 0, 0, 0), uniform(4), uniform(0, 3)}) == 6
    assert uniform(1, 2, 3) == 0.9838691559789375  # a change here changes every resumed run


def test_streams_do_not_overlap():
    first, second = philox(0, 1).random_raw(2000), philox(0, 2).random_raw(2000)
    assert not set(first.tolist()) & set(second.tolist())


@pytest.mark.parametrize("arguments", [(-1,), (0, -1), (2**64,), (0, 1, 2, 3, 4)])
def test_uniform_refuses_what_it_cannot_count(arguments):
    with pytest.raises(ValueError, match="at most 3 counters"):
        uniform(*arguments)


def test_the_table_in_docs_is_what_the_loop_does():
    """Two rows of it, made again by the loop's own decisions."""
    from benchmarks.schedule_plot import CASES, simulate, table

    page = (Path(__file__).parents[2] / "docs" / "schedule.md").read_text().splitlines()
    written = {line.split("|")[1].strip(" `"): line.split() for line in page if line.startswith("| `")}
    for name in ("adaptive, phi 0.2", "released reference, phi 0.5"):
        row = table({name: simulate(CASES[name])}).splitlines()[-1]
        assert row.split() == written[name]
