"""What was drafted leaves no trace in a KV cache, and neither does what was rejected."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import relative_error, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    ConcatenateKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ifp_mlx.checking.rollback import Rollback, without_last

WINDOW = 8
CACHES = {
    "growing": KVCache,
    "quantised": lambda: QuantizedKVCache(group_size=32, bits=8),
    "rotating": lambda: RotatingKVCache(WINDOW),
    "chunked": lambda: ChunkedKVCache(WINDOW),
    "concatenating": ConcatenateKVCache,
    "list": lambda: CacheList(KVCache(), RotatingKVCache(WINDOW)),
    "list of more": lambda: CacheList(ChunkedKVCache(WINDOW), ConcatenateKVCache()),
}
PLACES, VOCABULARY = 96, 7
STATES = np.random.default_rng(0).normal(size=(3, VOCABULARY, PLACES, 2, 32))
RUNS = st.lists(
    # Tokens that are drafted, that are read then, and how many of these stay.
    st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(0, 6)),
    min_size=1,
    max_size=6,
)


def attended(cache, tokens):
    """Let tokens attend to what a cache has of those before, as models of mlx-lm do."""
    if hasattr(cache, "caches"):
        return mx.concatenate([attended(part, tokens) for part in cache.caches], -1)
    places = np.arange(cache.offset, cache.offset + len(tokens))
    states = STATES[:, tokens, places].transpose(0, 2, 1, 3)[:, None]
    queries, keys, values = (mx.array(part, mx.float32) for part in states)
    mask = mask_of(cache, places)
    keys, values = cache.update_and_fetch(keys, values)
    about = {"cache": cache, "scale": 0.2, "mask": mask}
    return scaled_dot_product_attention(queries, keys, values, **about)


def mask_of(cache, places):
    if not hasattr(cache, "chunk_size"):
        return cache.make_mask(len(places), return_array=True, window_size=None)
    cache.maybe_trim_front()  # and then llama4 lets tokens see their own chunk alone
    seen = np.arange(cache.start_position, places[-1] + 1)
    same = places[:, None] // cache.chunk_size == seen // cache.chunk_size
    return mx.array(same & (seen <= places[:, None]))


class Reader:
    """Reads tokens into a cache of one layer, or of a model's layers."""

    def __init__(self, make, read):
        self.cache, self.read = make(), read
        self.stands = []
        self._drawn = np.random.default_rng(1)

    def tokens(self, count):
        return self._drawn.integers(0, VOCABULARY, count).tolist()

    def begin(self, count):
        self.stands = self.tokens(count)
        if count:
            self.read(self.cache, self.stands)

    def run(self, past, drafted, read, some):
        """Draft tokens, read others, and let some of these stay."""
        past.mark()
        for token in self.tokens(drafted):
            self.read(self.cache, [token])
        past.back()
        past.mark()
        tokens = self.tokens(read)
        self.read(past.noting(), tokens)
        past.keep(some, read)
        self.stands += tokens[:some]

    def check(self, fresh):
        """Hold what follows against what a fresh cache says that read what stands."""
        if self.stands:
            self.read(fresh, self.stands)
        for count in (1, 3, 1, WINDOW):
            tokens = self.tokens(count)
            found, expected = (self.read(c, tokens) for c in (self.cache, fresh))
            assert relative_error(found, expected) <= 1e-5


def one_layer(kind):
    make = CACHES[kind]
    return lambda: [make()], lambda cache, tokens: attended(cache[0], tokens)


@pytest.mark.parametrize("kind", CACHES)
@settings(max_examples=20)
@given(before=st.integers(0, 3 * WINDOW), runs=RUNS)
def test_a_cache_answers_as_a_fresh_one_that_read_what_stands(kind, before, runs):
    make, read = one_layer(kind)
    reader = Reader(make, read)
    past = Rollback(reader.cache)
    reader.begin(before)
    for drafted, count, some in runs:
        reader.run(past, drafted, count, min(some, count))
    reader.check(make())


@pytest.mark.parametrize("kind", CACHES)
def test_the_places_around_a_full_window_are_tried_one_by_one(kind):
    make, read = one_layer(kind)
    for before in range(WINDOW - 4, WINDOW + 2):
        for drafted in (1, 4):
            for some in range(drafted + 2):
                reader = Reader(make, read)
                past = Rollback(reader.cache)
                reader.begin(before)
                reader.run(past, drafted, drafted + 1, some)
                reader.run(past, drafted, drafted + 1, 1)
                reader.check(make())


@pytest.mark.parametrize("kind", CACHES)
def test_going_back_alone_is_to_the_bit(kind):
    make, read = one_layer(kind)
    for before in (3, WINDOW - 1, WINDOW, 3 * WINDOW):
        one, other = Reader(make, read), Reader(make, read)
        one.begin(before)
        other.begin(before)
        past = Rollback(one.cache)
        for drafted in (5, 1, WINDOW + 2):
            past.mark()
            for token in one.tokens(drafted):
                read(one.cache, [token])
            past.back()
        found, expected = (read(r.cache, [2, 3, 1]) for r in (one, other))
        assert mx.array_equal(found, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@settings(max_examples=12)
@given(before=st.integers(1, 24), runs=RUNS)
def test_a_model_goes_on_as_if_nothing_had_been_drafted(family, before, runs):
    model = MODELS.setdefault(family, tiny_model(family, sliding_window=WINDOW))
    read = lambda cache, tokens: model(mx.array([tokens]), cache=cache)  # noqa: E731
    reader = Reader(lambda: make_prompt_cache(model), read)
    kinds = {type(layer) for layer in reader.cache}
    assert (RotatingKVCache in kinds) == (family == "gemma3_text")
    past = Rollback(reader.cache)
    reader.begin(before)
    for drafted, count, some in runs:
        reader.run(past, drafted, count, min(some, count))
    reader.check(make_prompt_cache(model))


MODELS: dict = {}


@pytest.mark.parametrize(
    "cache",
    [ArraysCache(2), CacheList(KVCache(), ArraysCache(2))],
    ids=["", "in a list"],
)
def test_a_cache_that_cannot_go_back_is_refused_by_its_name(cache):
    with pytest.raises(
        ValueError, match="the cache ArraysCache of this model cannot go back; generate"
    ):
        Rollback([KVCache(), cache])


# Shortened for another model


@pytest.mark.parametrize("kind", ["growing", "rotating", "list"])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_another_model_reads_the_last_tokens_and_leaves_no_trace(kind, one_by_one):
    make, read = one_layer(kind)
    for before in range(1, WINDOW):
        for tokens in range(1, before + 1):
            reader = Reader(make, read)
            reader.begin(before)
            if one_by_one:
                reader.cache, stands = make(), reader.stands
                for token in stands:
                    read(reader.cache, [token])

            with without_last(reader.cache, tokens) as shortened:
                assert shortened and {*offsets(reader.cache)} == {before - tokens}
                read(reader.cache, reader.tokens(tokens))  # others
            assert {*offsets(reader.cache)} == {before}
            reader.check(make())


def offsets(cache):
    parts = getattr(cache[0], "caches", cache)
    return [part.offset for part in parts]


def test_a_cache_that_was_lent_comes_back_even_from_what_fails():
    make, read = one_layer("growing")
    reader = Reader(make, read)
    reader.begin(5)

    with pytest.raises(KeyboardInterrupt), without_last(reader.cache, 3):
        read(reader.cache, reader.tokens(1))
        raise KeyboardInterrupt
    reader.check(make())


@pytest.mark.parametrize("kind", ["rotating", "list", "quantised", "chunked"])
def test_a_cache_that_cannot_be_shortened_is_left_as_it_is(kind):
    make, read = one_layer(kind)
    reader = Reader(make, read)
    reader.begin(WINDOW + 1)  # what rotates has forgotten something
    with without_last(reader.cache, 3) as shortened:
        assert not shortened
    assert {*offsets(reader.cache)} == {WINDOW + 1}
    reader.check(make())


def test_a_state_beside_it_cannot_be_shortened_either():
    keys = mx.ones((1, 1, 4, 8))
    cache = [KVCache(), ArraysCache(2)]
    cache[0].update_and_fetch(keys, keys)
    with without_last(cache, 2) as shortened:
        assert not shortened and cache[0].offset == 4
