"""What the tests of the engine share: running it, and devices that only keep books."""

import hashlib
import math
from types import SimpleNamespace

import jax
import numpy as np
from draws import draws
from jax.sharding import PartitionSpec as P

from moejax.inference import engine as engine_module
from moejax.inference import memory
from moejax.inference.engine import Engine, EngineSettings
from moejax.inference.sampling import RowSettings, sample
from moejax.training.state import Blueprint, load_weights
from sharding.mesh import MeshShape, make_mesh
from sharding.specs import specs_of

END = 0
_sample = jax.jit(sample)


def run(engine, most_steps=10_000, each=None):
    """Steps until nothing is left.

    Args:
        each: called with the engine and the events of a step, after it.

    Returns:
        (id, index) → (tokens, finish), and the number of steps.
    """
    made, finishes, steps = {}, {}, 0
    while engine.has_work:
        events = engine.step()
        steps += 1
        assert steps < most_steps, "the engine does not end"
        for event in events:
            key = event.id, event.index
            assert key not in finishes, "an event after the end"
            made.setdefault(key, []).extend(event.tokens)
            if event.finish is not None:
                finishes[key] = event.finish
        if each is not None:
            each(engine, events)
    assert made.keys() == finishes.keys()
    return {key: (made[key], finishes[key]) for key in made}, steps


def check_books(engine):
    """Pages and slots are free, kept or held, as often as texts hold them; who came first, is."""
    scheduler = engine._scheduler
    queue = [text.age for text in scheduler._waiting]
    assert queue == sorted(queue)
    living = [text for texts in engine._requests.values() for text in texts]
    for device, home in enumerate(scheduler._homes):
        here = [text for text in living if text.device == device]
        assert {id(text) for text in here} == {id(text) for text in home.texts}
        pool = home.pool
        holders = np.zeros(pool.size, int)
        for text in here:
            assert len(set(text.pages)) == len(text.pages)
            holders[text.pages] += 1
        assert pool._holders == holders.tolist()
        free, kept = set(pool._free), set(pool._kept)
        assert len(free) == len(pool._free) and not free & kept
        assert free | kept == set(np.flatnonzero(holders == 0).tolist())
        slots = [text.slot for text in here] + home.slots
        assert sorted(slots) == list(range(scheduler._shapes.rows))


def next_token(tokens, num_ids):
    """A text that depends on every token before it."""
    digest = hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % num_ids


def expected(prompt, num_ids, limit, ends=(END,)):
    """The text of a prompt alone, and why it ends."""
    tokens = list(prompt)
    while len(tokens) < limit:
        token = next_token(tokens, num_ids)
        if token in ends:
            return tokens[len(prompt) :], "stop"
        tokens.append(token)
    return tokens[len(prompt) :], "length"


def make_engine(config, flat, sizes=(1, 1, 1), num_ids=None, **settings):
    """An engine of a real model, whose texts end with `END`."""
    blueprint = Blueprint(config, make_mesh(MeshShape(*sizes)))
    weights = load_weights(flat, blueprint, np.dtype(config.compute_dtype))
    settings = EngineSettings(**settings)
    return Engine(blueprint, *weights, num_ids=num_ids, end_ids=[END], settings=settings)


class BookDevices:
    """Stands in for `Programs`: devices that keep tokens in the place of keys and values.

    A row's next token follows from what its table leads to, so a page that was given away too
    early, written twice or reused for another text gives another text.
    """

    def __init__(
        self,
        blueprint,
        params,
        biases,
        *,
        num_ids,
        slots,
        pages,
        page_len,
        max_len,
        one_wave=False,
        placing=None,
    ):
        del one_wave, placing  # there are no experts
        self.num_ids, self.page_len = num_ids, page_len
        devices = blueprint.shape.data * blueprint.shape.expert
        self.pages = np.full((devices, pages, page_len), -1)
        self.history = np.full((devices, slots, max_len + 1), -1)
        self.shapes, self.steps = set(), []

    def reset(self):
        self.pages[:] = self.history[:] = -1

    def compile_all(self, shapes, report):
        self.shapes.update(shapes)
        return len(shapes)

    def compiled(self):
        return len(self.shapes)

    def run(self, plan):
        shape = plan.shape
        self.shapes.add(shape)
        self.steps.append(plan)
        drawn = np.zeros(len(plan.rows) * shape.rows, np.int32)
        for device, works in enumerate(plan.rows):
            assert len(works) <= shape.rows
            for row, work in enumerate(works):
                drawn[device * shape.rows + row] = self._row(device, work, shape)
        nothing = np.zeros((len(drawn), 1))
        return SimpleNamespace(read=lambda: (drawn, nothing[:, 0], nothing, nothing))

    def _row(self, device, work, shape):
        text, last = work.text, work.start + work.count
        table = text.pages[: shape.pages]
        assert last <= len(table) * self.page_len
        if shape.tokens:
            assert work.count <= shape.tokens
            new = text.tokens[work.start : last]
        else:
            new = [self.history[device, text.slot, work.start]]
        places = [(table[i // self.page_len], i % self.page_len) for i in range(last)]
        for place, token in zip(places[work.start :], new):
            self.pages[device][place] = token
        token = next_token([self.pages[device][place] for place in places], self.num_ids)
        if work.draws:
            self.history[device, text.slot, last] = token
        return token


def book_engine(monkeypatch, devices, num_ids, max_context, **settings):
    """An engine over `BookDevices`."""
    monkeypatch.setattr(engine_module, "Programs", BookDevices)
    # They are of no model whose pages could be weighed: all are taken to fit.
    monkeypatch.setattr(memory, "_host_bytes", lambda: math.inf)
    config = SimpleNamespace(max_context=max_context, vocab_size=num_ids)
    mesh = SimpleNamespace(local_devices=[SimpleNamespace(memory_stats=lambda: None)])
    blueprint = SimpleNamespace(config=config, shape=MeshShape(expert=devices), mesh=mesh)
    return Engine(blueprint, None, None, end_ids=[END], settings=EngineSettings(**settings))


class Oracle:
    """The next token of any text from one forward pass over all of it, without a cache.

    Args:
        config: the model.
        flat: its weights.
        width: most tokens of a text.
    """

    def __init__(self, config, flat, width):
        self.config, self.width = config, width
        blueprint = Blueprint(config, make_mesh(MeshShape()))
        self._weights = load_weights(flat, blueprint, np.float32)

        def run(weights, tokens_BS):
            model = blueprint.merge(*weights)
            return model.logits(model(tokens_BS, inference=True).hidden_BSD)[0]

        specs = (specs_of(blueprint.params), blueprint.bias_specs), P()
        options = {"mesh": blueprint.mesh, "in_specs": specs, "out_specs": P()}
        self._run = jax.jit(jax.shard_map(run, check_vma=False, **options))

    def logits(self, tokens, first):
        """float32 [len(tokens) - first + 1, V]: after each beginning of at least `first` tokens."""
        tokens_BS = np.zeros((1, self.width), np.int32)
        tokens_BS[0, : len(tokens)] = tokens
        logits_SV = np.asarray(self._run(self._weights, tokens_BS))
        return logits_SV[first - 1 : len(tokens), : self.config.vocab_size]

    def check(self, prompt, made, params, index=0, logprobs=()):
        """The tokens are those that these settings draw, as far as no near tie decides.

        Returns:
            how many were compared.
        """
        text = [*prompt, *made]
        if not made:
            return 0
        raw_BV = self.logits(text[:-1], len(prompt)).astype(np.float64)
        logits_BV = np.zeros((self.width, self.config.vocab_size))
        for i, token in enumerate(made):
            if logprobs:
                self._check_logprobs(raw_BV[i], token, params.logprobs, logprobs[i])
            before = text[: len(prompt) + i]
            logits_BV[i] = penalties_by_hand(raw_BV[i], before, len(prompt), params)
        rows = RowSettings.of([(params, params.seed or 0, index)] * len(logits_BV))
        positions_B = (len(prompt) + np.arange(len(logits_BV))).astype(np.int32)
        noises = [0, *(draws(__name__).normal(size=(4, *logits_BV.shape)) * 1e-4)]
        noisy = [np.float32(logits_BV + noise) for noise in noises]
        drawn = np.stack([_sample(logits, positions_B, rows) for logits in noisy])
        for i, token in enumerate(made):
            if len(set(drawn[:, i])) > 1:
                return i  # a near tie: the rest of the text is not comparable
            assert drawn[0, i] == token, f"token {i} of {len(made)}"
        return len(made)

    def _check_logprobs(self, logits_V, token, k, found):
        top = logits_V.max()
        want_V = logits_V - top - np.log(np.exp(logits_V - top).sum())
        np.testing.assert_allclose(found.logprob, want_V[token], atol=1e-3)
        assert len(found.top_ids) == len(found.top_logprobs) == k
        np.testing.assert_allclose(found.top_logprobs, -np.sort(-want_V)[:k], atol=1e-3)
        np.testing.assert_allclose(found.top_logprobs, want_V[list(found.top_ids)], atol=1e-3)


def penalties_by_hand(logits_V, text, prompt_len, params):
    """The logits after the penalties of one row."""
    logits_V = logits_V.copy()
    for token in set(text):
        factor = params.repetition_penalty
        logits_V[token] = (
            logits_V[token] / factor if logits_V[token] > 0 else (logits_V[token] * factor)
        )
    made = text[prompt_len:]
    for token in set(made):
        logits_V[token] -= params.presence_penalty + params.frequency_penalty * made.count(token)
    if len(made) < params.min_tokens:
        logits_V[[END, *params.stop_token_ids]] = -1e30
    return logits_V
