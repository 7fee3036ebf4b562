"""Generation with a cache equals recomputing, on any mesh; batches, ends, stop strings."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from draws import draws
from inference_support import CONFIG, check_greedy, make_generator, random_weights

from moejax.data.tokenizer import Tokenizer
from moejax.errors import UserError
from moejax.inference.sampling import SamplingConfig
from moejax.inference.shapes import bucket
from moejax.inference.text import TextStream, complete

MESHES = [(1, 1, 1), (2, 4, 1), (2, 2, 2)]
GREEDY = SamplingConfig()


@pytest.fixture(scope="module")
def flat():
    return random_weights(CONFIG, draws(__name__))


@pytest.fixture(scope="module", params=MESHES, ids=str)
def generator(request, flat):
    return make_generator(CONFIG, flat, request.param)


@pytest.fixture(scope="module")
def single(flat):
    return make_generator(CONFIG, flat)


def prompts_of(rng, *lengths):
    return [rng.integers(0, 257, n).astype(np.int32) for n in lengths]


def tokens_of(results):
    return [result.tokens.tolist() for result in results]


def test_greedy_equals_recomputing(generator, flat, rng, caplog):
    """A batch of 3, so 5 of 8 devices have only empty rows."""
    prompts = prompts_of(rng, 1, 5, 17)
    results = generator.generate(prompts, sampling=GREEDY, max_tokens=12)
    compared = 0
    for prompt, result in zip(prompts, results):
        assert (len(result.tokens), result.reason) == (12, "max_tokens")
        compared += check_greedy(CONFIG, flat, prompt, result.tokens)
    assert compared >= 12

    # Other lengths, counts and settings in the same buckets compile nothing; what draws and
    # filters is a program of its own, which a first call compiles.
    others = prompts_of(rng, 20, 30, 2)
    generator.generate(others, sampling=SamplingConfig(1.0, 3, 0.8), max_tokens=3)
    with jax.log_compiles():
        again = generator.generate(prompts, sampling=GREEDY, max_tokens=12)
        sampled = generator.generate(
            others, sampling=SamplingConfig(0.8, 9, 0.9, 0.01), max_tokens=9
        )
    assert not [r for r in caplog.records if "Compiling" in r.message]
    assert tokens_of(again) == tokens_of(results)
    assert [len(result.tokens) for result in sampled] == [9, 9, 9]


def test_batch_and_mesh_do_not_matter(generator, single, rng):
    prompts = prompts_of(rng, 20, 3, 9)
    sampling = SamplingConfig(temperature=0.7, top_p=0.9, seed=int(rng.integers(2**32)))
    options = {"sampling": sampling, "max_tokens": 8}
    together = tokens_of(generator.generate(prompts, **options))
    # Rounding differs from mesh to mesh, but a draw is decided by less only once in 10⁵.
    assert together == tokens_of(single.generate(prompts, **options))
    other = [prompts[2], *prompts_of(rng, 30), prompts[0]]
    mixed = tokens_of(generator.generate(other, requests=[2, 9, 0], **options))
    assert (mixed[0], mixed[2]) == (together[2], together[0])


@pytest.mark.slow
def test_more_requests_than_devices(rng, flat):
    generator = make_generator(CONFIG, flat, (1, 2, 1))
    prompts = prompts_of(rng, *rng.integers(1, 16, 5))
    results = tokens_of(generator.generate(prompts, sampling=GREEDY, max_tokens=6))
    for prompt, result in zip(prompts, results):
        check_greedy(CONFIG, flat, prompt, np.array(result))


def test_ends(single, rng):
    prompts = prompts_of(rng, 17, 30, 4)  # the shapes of the other tests
    # Greedy texts of a random model may soon repeat themselves.
    drawn = SamplingConfig(2.0, seed=int(rng.integers(2**32)))
    whole = tokens_of(single.generate(prompts, sampling=drawn, max_tokens=10))

    end = next(t for t in whole[0][2:] if t not in whole[0][:2])
    first, second, _ = single.generate(prompts, sampling=drawn, max_tokens=10, end_id=end)
    assert (first.tokens.tolist(), first.reason) == (whole[0][: whole[0].index(end)], "end")
    cut = whole[1].index(end) if end in whole[1] else 10
    assert second.tokens.tolist() == whole[1][:cut]

    seen = []

    def on_token(index, token):
        seen.append((index, token))
        return index == 1 and len(seen) > 6

    first, second, _ = single.generate(prompts, sampling=drawn, max_tokens=10, on_token=on_token)
    assert (first.tokens.tolist(), first.reason) == (whole[0], "max_tokens")
    assert (second.tokens.tolist(), second.reason) == (whole[1][:3], "stopped")
    assert [token for index, token in seen if index == 0] == whole[0]
    assert [token for index, token in seen if index == 1] == whole[1][:3]

    _, full, longest = single.generate(prompts, sampling=drawn, max_tokens=40)
    assert (len(full.tokens), full.reason) == (CONFIG.max_context - 30, "context")
    assert full.tokens.tolist()[:10] == whole[1]
    assert (len(longest.tokens), longest.reason) == (40, "max_tokens")


def test_ids_beyond_the_tokenizer_never_come(flat, rng):
    generator = make_generator(CONFIG, flat, num_ids=7)
    for seed in range(30):
        sampling = SamplingConfig(100.0, seed=seed)
        for result in generator.generate(prompts_of(rng, 4, 9), sampling=sampling, max_tokens=1):
            assert result.tokens < 7


def test_what_is_refused(single, rng):
    for prompts, options, match in [
        ([], {}, "no prompt"),
        ([np.zeros(0, np.int32)], {}, "without tokens"),
        (prompts_of(rng, 48), {}, r"a prompt of 48 tokens: .* 48 tokens; give at most 47"),
        (prompts_of(rng, 3), {"max_tokens": 0}, "max_tokens=0"),
    ]:
        with pytest.raises(UserError, match=match):
            single.generate(prompts, sampling=GREEDY, **{"max_tokens": 5, **options})
    with pytest.raises(UserError, match=r"max_len=49: .* max_context=48"):
        make_generator(CONFIG, {**random_weights(CONFIG, rng)}, max_len=49)


def test_buckets():
    assert [bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"scan_layers": True, "num_layers": 3, "first_dense_layers": 1, "dense_hidden": 32},
        {"tie_embeddings": True, "num_layers": 3, "top_k_by_layer": (1, 3, 3)},
    ],
)
def test_greedy_of_other_models(changes, rng):
    config = dataclasses.replace(CONFIG, **changes)
    weights = random_weights(config, rng)
    generator = make_generator(config, weights, (1, 3, 2))
    prompts = prompts_of(rng, 7, 12)
    results = generator.generate(prompts, sampling=GREEDY, max_tokens=12)
    compared = [check_greedy(config, weights, p, r.tokens) for p, r in zip(prompts, results)]
    assert sum(compared) >= 8


@pytest.mark.slow
def test_bfloat16_gives_the_same_twice(flat, rng):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    generator = make_generator(config, flat, (2, 2, 2))
    prompts = prompts_of(rng, 3, 11)
    options = {"sampling": SamplingConfig(0.8, top_k=50), "max_tokens": 20}
    first = tokens_of(generator.generate(prompts, **options))
    assert first == tokens_of(generator.generate(prompts, **options))
    assert [len(tokens) for tokens in first] == [20, 20]


# --- text -------------------------------------------------------------------------------------


def text_before_stop(text, stops):
    """Character by character: the first stop to be complete, the longest of these."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def test_stop_strings_wherever_tokens_end(rng):
    tokenizer = Tokenizer()
    for _ in range(300):
        text = "".join(rng.choice(list("ab€"), rng.integers(0, 14)))
        stops = [
            "".join(rng.choice(list("ab€"), rng.integers(1, 5))) for _ in range(rng.integers(3))
        ]
        stream, shown = TextStream(tokenizer, stops), []
        for token in tokenizer.encode(text):
            shown.append(stream.push(int(token)))
            # All that can no longer begin a stop string is shown at once.
            if not stream.stopped:
                assert len(stream._held) < max(map(len, stops), default=1)
        shown.append(stream.flush())
        assert ("".join(shown), stream.stopped) == text_before_stop(text, stops), (text, stops)


def test_an_unfinished_character_is_shown_at_the_end():
    stream = TextStream(Tokenizer(), ["€€"])
    shown = [stream.push(int(byte)) for byte in "a€".encode() + "€".encode()[:2]]
    assert shown == ["a", "", "", "", "", ""]
    assert stream.flush() == "€\ufffd"


def test_completion_of_texts(single, rng):
    tokenizer = Tokenizer()
    options = {"sampling": SamplingConfig(1.0, seed=int(rng.integers(2**32))), "max_tokens": 20}
    prompts = ["def ", "", "é" * 10]
    parts = [[], [], []]
    plain = complete(single, tokenizer, prompts, on_text=lambda i, t: parts[i].append(t), **options)
    assert ["".join(p) for p in parts] == [result.text for result in plain]
    ids = [np.array([tokenizer.eos_id]) if not p else tokenizer.encode(p) for p in prompts]
    raw = single.generate(ids, end_id=tokenizer.eos_id, **options)
    for result, tokens in zip(plain, raw):
        assert result.text == tokenizer.decode(tokens.tokens)
        assert (result.num_tokens, result.reason) == (len(tokens.tokens), tokens.reason)

    long = max(range(3), key=lambda i: len(plain[i].text))
    stop = plain[long].text[3:6]
    stopped = complete(single, tokenizer, prompts, stop=[stop], **options)
    for result, before in zip(stopped, plain):
        text, ended = text_before_stop(before.text, [stop])
        assert result.text == text
        assert (result.reason == "stop") == ended
    assert stopped[long].reason == "stop"
    assert stopped[long].num_tokens < plain[long].num_tokens

    with pytest.raises(UserError, match="stop ''"):
        complete(single, tokenizer, prompts, stop=["x", ""], **options)
    with pytest.raises(UserError, match="not UTF-8"):
        complete(single, tokenizer, ["a\udcff"], **options)


def test_the_texts_of_a_batch_are_those_of_single_prompts(single, rng):
    """Greedy text depends on its own prompt alone."""
    tokenizer = Tokenizer()
    prompts = ["ab", "cdefgh" * 4, "x = "]
    options = {"sampling": GREEDY, "max_tokens": 6}
    together = complete(single, tokenizer, prompts, **options)
    for order in itertools.permutations(range(3)):
        again = complete(single, tokenizer, [prompts[i] for i in order], **options)
        assert [together[i].text for i in order] == [result.text for result in again]
