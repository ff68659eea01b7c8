"""Which drafted tokens stand: what is said is what the dense model says, or as near to it
as a tolerance asks for.
"""

import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import thinned
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm import sample_utils
from mlx_lm.models.cache import KVCache

from ifp_mlx.checking.loop import CheckedRun, DraftLength
from ifp_mlx.checking.rule import Rule
from ifp_mlx.decoding.options import Decoding

VOCABULARY = 6
NEVER = mx.array([[-math.inf] * 2 + [0.0] * 4])  # no chance for two of the tokens


def logits_of(rows, seed, spread=2.0):
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(0, spread, (rows, VOCABULARY)), mx.float32)


# Without a temperature


def test_tokens_stand_up_to_the_first_that_is_not_the_dense_models_choice():
    logits = logits_of(5, 0)
    choices = logits.argmax(axis=-1).tolist()
    rule = Rule("exact", Decoding())
    for wrong in range(5):
        drafted = [*choices[:wrong], (choices[wrong] + 1) % VOCABULARY, *choices[:4]]
        assert rule.judge(drafted[:4], logits) == (wrong, choices[wrong])
    assert rule.judge([], logits[:1]) == (0, choices[0])


@given(
    drafted=st.lists(st.integers(0, VOCABULARY - 1), max_size=6), seed=st.integers(0)
)
def test_a_tolerance_goes_from_exact_to_whatever_was_drafted(drafted, seed):
    logits = logits_of(len(drafted) + 1, seed)
    exact = Rule("exact", Decoding()).judge(drafted, logits)
    assert Rule(1 - 1e-9, Decoding()).judge(drafted, logits) == exact
    stand, following = Rule(1e-30, Decoding()).judge(drafted, logits)
    assert (stand, following) == (len(drafted), int(logits[-1].argmax()))


@given(seed=st.integers(0), tolerance=st.floats(0.01, 0.99))
def test_a_token_stands_within_so_much_of_the_best_ones_probability(seed, tolerance):
    logits = logits_of(2, seed)
    chances = np.array(mx.softmax(logits.astype(mx.float32), axis=-1))[0]
    for token, chance in enumerate(chances):
        stand, following = Rule(tolerance, Decoding()).judge([token], logits)
        if abs(chance - tolerance * chances.max()) > 1e-5:
            assert stand == (chance > tolerance * chances.max())
            assert following == int(logits[stand].argmax())


def test_a_token_that_falls_outside_a_tolerance_is_replaced_by_a_draw():
    logits = mx.array([[0.0, 0.0, -9, -9, -9, -9], [-99.0] * 5 + [9]])
    drawn = {
        Rule(0.5, Decoding(temp=1.0, top_k=2, seed=seed)).judge([3], logits)
        for seed in range(30)
    }
    assert drawn == {(0, 0), (0, 1)}
    assert Rule(0.5, Decoding(temp=1.0)).judge([1], logits) == (1, 5)


# With one: the analytic part


class Draws:
    """Draws what it is told to."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value


class Watched(Rule):
    """A rule that is told its draws, and says the weights of what it would draw."""

    def judged(self, proposals, drafted, logits, draw):
        self._proposals, self._draws, self.weights = proposals, Draws(draw), None
        stand, _ = self.judge(drafted, logits)
        return stand, self.weights / self.weights.sum()

    def _draw(self, weights):
        self.weights = weights
        return 0


def first_token(rule, q, logits):
    """Return the probability of each first token, and of those that were drafted: over
    all drafts, and all draws that decide on them.
    """
    total, stands = np.zeros(len(q)), np.zeros(len(q))
    for token in np.flatnonzero(q):
        accepts, rejects = (
            0.0,
            1.0,
        )  # the draw at which it no longer stands lies between
        if rule.judged([q], [token], logits, np.nextafter(1, 0))[0]:
            accepts = 1.0
        while accepts < 1 and rejects - accepts > 1e-16:
            middle = (accepts + rejects) / 2
            if middle in (accepts, rejects):
                break
            stood = rule.judged([q], [token], logits, middle)[0]
            accepts, rejects = (middle, rejects) if stood else (accepts, middle)
        stands[token] = q[token] * accepts
        total[token] += stands[token]
        if accepts < 1:
            _, left = rule.judged([q], [token], logits, np.nextafter(1, 0))
            total += q[token] * (1 - accepts) * left
    return total, stands


DECODINGS = [
    {"temp": 1.0},
    {"temp": 0.3},
    {"temp": 1.7, "top_p": 0.6},
    {"temp": 0.8, "top_k": 3},
    {"temp": 1.2, "min_p": 0.2},
    {"temp": 0.9, "top_p": 0.9, "min_p": 0.05, "top_k": 4},
]


@pytest.mark.parametrize("how", DECODINGS, ids=str)
@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), near=st.booleans())
def test_drafts_that_stand_and_draws_that_follow_make_the_dense_distribution(
    how, seed, near
):
    rule = Watched("exact", Decoding(**how))
    dense = logits_of(2, seed)
    compact = dense[:1] + logits_of(1, seed + 1, 0.05 if near else 2.0)
    q, p = (rule.decoding.chances(part)[0] for part in (compact, dense[:1]))
    found, stood = first_token(rule, q, dense)
    assert np.abs(found - p).max() <= 1e-12
    assert np.abs(stood - np.minimum(p, q)).max() <= 1e-12  # no draft is wasted
    # And once all stand, what follows is the dense model's too.
    _, weights = rule.judged([p], [int(p.argmax())], dense, 0.0)
    assert np.abs(weights - rule.decoding.chances(dense[1:])[0]).max() <= 1e-12


def test_a_draft_that_the_dense_model_never_says_never_stands():
    dense = mx.concatenate([NEVER, NEVER])
    for seed in range(200):
        rule = Rule("exact", Decoding(temp=1.0, seed=seed))
        rule.begin()
        rule.draft(mx.zeros((1, VOCABULARY)))
        stand, following = rule.judge([seed % 2], dense)
        assert stand == 0 and following >= 2


def test_a_draft_that_is_the_dense_models_own_always_stands():
    logits = mx.concatenate([logits_of(1, 3)] * 2)
    for seed in range(200):
        rule = Rule("exact", Decoding(temp=0.7, seed=seed))
        rule.begin()
        drafted = rule.draft(logits[:1]).tolist()
        assert rule.judge(drafted, logits)[0] == 1


# With one: the whole loop, by drawing


class Table:
    """A model that says of every token what follows it, and counts as the dense one too."""

    def __init__(self, seed):
        self.dense = logits_of(VOCABULARY, seed, 1.0)
        self.compact = self.dense + logits_of(VOCABULARY, seed + 1, 1.0)
        self.bytes_read = 0
        self.sizes = []

    def model(self, tokens, cache):
        return self.compact[tokens]

    def __call__(self, tokens, cache, last):
        self.sizes.append(tokens.size)
        return self.dense[tokens][:, tokens.shape[1] - last :]


def said(table, seed, count, *, draft=3, **how):
    run = CheckedRun(
        table, [2], Rule("exact", Decoding(seed=seed, **how)), DraftLength(draft, draft), [KVCache()]
    )  # fmt: skip
    tokens = []
    while len(tokens) < count:
        tokens += [one.token for one in run.check(count - len(tokens))]
    return tokens


def chi_square(counts, chances):
    """Return the statistic, and what it exceeds once in a thousand times (Wilson and
    Hilferty's approximation).
    """
    expected = counts.sum() * chances
    assert counts[chances == 0].sum() == 0
    some = expected > 0
    freedom = some.sum() - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return (np.square(counts - expected)[some] / expected[some]).sum(), limit


@pytest.mark.parametrize("how", thinned([DECODINGS[-1], DECODINGS[0]], 2), ids=str)
def test_the_first_two_tokens_have_the_dense_models_distribution(how):
    table, counts = Table(5), np.zeros((VOCABULARY, VOCABULARY))
    for seed in range(1500):
        one, two, _ = said(table, seed, 3, draft=1 + seed % 2, **how)
        counts[one, two] += 1
    both = []
    for logits in (table.dense, table.compact):
        chances = Decoding(**how).chances(logits)
        both.append((chances[2][:, None] * chances).ravel())
    found, limit = chi_square(counts.ravel(), both[0])
    assert found < limit
    assert np.abs(both[1] - both[0]).sum() > 0.5  # or drafts alone might do it


def test_the_same_seed_draws_the_same_tokens():
    table = Table(7)
    texts = [said(table, seed, 30, temp=1.0) for seed in (4, 4, 5)]
    assert texts[0] == texts[1] != texts[2]


# What chooses


@pytest.mark.parametrize("how", DECODINGS, ids=str)
def test_chances_are_those_that_mlx_lm_samples_by(how, monkeypatch):
    seen = []

    def categorical(logits, temp):
        seen.append(mx.softmax(logits / temp, axis=-1))
        return mx.argmax(logits, axis=-1)

    monkeypatch.setattr(sample_utils, "categorical_sampling", categorical)
    logits = logits_of(40, 9)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    for row in logprobs:  # one at a time, as mlx-lm does
        sample_utils.make_sampler(**how)(row[None])
    expected = np.array(mx.concatenate(seen))
    found = Decoding(**how).chances(logits)
    assert found.dtype == np.float64 and np.abs(found.sum(axis=-1) - 1).max() < 1e-12
    assert np.abs(found - expected).max() < 1e-6
    assert ((found == 0) == (expected == 0)).all()


def test_mlx_lms_own_options_say_the_same():
    how = {"temp": 0.9, "top_p": 0.8, "min_p": 0.01, "top_k": 4}
    logits = logits_of(1, 1)
    counts = np.zeros(VOCABULARY)
    options = Decoding(seed=3, **how).for_mlx_lm()
    for _ in range(1000):
        counts[options["sampler"](logits - mx.logsumexp(logits)).item()] += 1
    found, limit = chi_square(counts, Decoding(**how).chances(logits)[0])
    assert found < limit and options["logits_processors"] == []


def test_processors_see_at_every_place_the_tokens_before_it():
    seen = []

    def note(tokens, logits):
        seen.append((tokens.tolist(), logits.shape))
        return logits

    penalty = sample_utils.make_repetition_penalty(1.7, 3)
    decoding = Decoding(processors=[note, penalty])
    tokens, logits = [4, 2, 2, 5, 1, 0], logits_of(3, 2)
    before = np.array(logits)
    found = decoding.processed(logits, tokens)
    assert seen == [(tokens[:n], (1, VOCABULARY)) for n in (4, 5, 6)]
    rows = [
        penalty(mx.array(tokens[: 4 + n]), mx.array(before[n : n + 1]))
        for n in range(3)
    ]
    assert mx.array_equal(found, mx.concatenate(rows))
    assert not np.array_equal(np.array(found), before)
    assert Decoding().processed(logits, tokens) is logits


# How many to draft


def test_the_number_of_drafts_follows_what_stood_within_its_bounds():
    length = DraftLength(12, 2)
    first = length()
    for _ in range(40):
        length.note(length(), length())
    assert 2 <= first < length() == 12
    for _ in range(40):
        length.note(0, length())
    assert length() == 2
    for _ in range(40):
        drafted = length()
        length.note(min(3, drafted), drafted)
    assert 2 < length() < 12


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 99)), max_size=30))
def test_no_history_leads_out_of_the_bounds(history):
    length = DraftLength(9, 3)
    for stood, drafted in history:
        length.note(min(stood, drafted), drafted)
        assert 3 <= length() <= 9
