"""What the tests of offloading share: small models with their experts on the host."""

import dataclasses
import threading
import time
import weakref
from types import SimpleNamespace

import jax
import numpy as np
from fewer_experts_support import draw
from inference_support import CONFIG
from jax import numpy as jnp

from moejax.attention_config import LatentConfig
from moejax.inference.engine import Engine, EngineSettings
from moejax.inference.expert_weights import quantized_blueprint, quantizing
from moejax.inference.params import SamplingParams
from moejax.offload.config import OffloadConfig
from moejax.offload.load import OffloadedModel
from moejax.offload.low import lowered, restored
from moejax.offload.room import Room
from moejax.training.state import Blueprint, load_weights, weight_targets
from sharding.mesh import MeshShape, make_mesh

# What is looked at of the rows of a step.
WORKS = [SimpleNamespace(text=SimpleNamespace(slot=i), first=True, count=1) for i in range(2)]
END = 0
# Few shapes: each takes seconds to compile.
SETTINGS = {"max_rows": 4, "page_len": 16, "prefill_chunk": 16}


def replaced(config, *, router=(), experts=(), attention=(), **fields):
    """A model's configuration with other fields of its parts."""
    moe = dataclasses.replace(
        config.moe,
        router=dataclasses.replace(config.moe.router, **dict(router)),
        experts=dataclasses.replace(config.moe.experts, **dict(experts)),
    )
    attention = dataclasses.replace(config.attention, **dict(attention))
    return dataclasses.replace(config, moe=moe, attention=attention, **fields)


SOFTMAX = replaced(CONFIG, router={"selection_bias": False}, num_layers=3)
KINDS = {
    "softmax": SOFTMAX,
    # Sigmoid, groups, a shared expert, a dense first layer, latent attention.
    "deepseek": replaced(
        CONFIG,
        router={"score_function": "sigmoid", "num_groups": 4, "top_groups": 2},
        experts={"shared_hidden": 8},
        attention={
            "num_kv_heads": 4,
            "latent": LatentConfig(rank=8, rope_dim=4, value_dim=8, query_rank=None),
        },
        num_layers=3,
        first_dense_layers=1,
        dense_hidden=16,
    ),
    # Biases everywhere, sinks, a window.
    "gpt_oss": replaced(
        CONFIG,
        router={"score_function": "topk_softmax", "bias": True, "selection_bias": False},
        experts={"bias": True, "activation": "swiglu_oai"},
        attention={"bias": True, "output_bias": True, "sinks": True, "window": 8},
    ),
}


class Source:
    """Weights in memory, read one by one as from a folder."""

    files = None

    def __init__(self, config, flat):
        self.config, self.flat = config, flat

    def weights(self, blueprint, keep=lambda name, array: {name: array}):
        kept = {}
        for name, target in weight_targets(blueprint, np.dtype(self.config.compute_dtype)).items():
            value = jnp.asarray(self.flat[name]).astype(target.dtype)
            kept |= keep(name, jax.device_put(value, target.sharding))
        return kept


class Watched:
    """A store that takes its time, and counts what the host holds of its experts.

    With a gate, each reading waits for a permit.
    """

    threaded, read_bytes = True, 0

    def __init__(self, store, rng, most=0.0, *, gate=None):
        self.store, self.banks, self.gate = store, store.banks, gate
        self.delays = iter(rng.uniform(0, most, 100_000).tolist())
        self.lock, self.here, self.most = threading.Lock(), 0, 0
        self.begun = []

    def expert(self, layer, expert):
        with self.lock:
            self.begun.append((layer, expert))
            self.here += 1
            self.most = max(self.most, self.here)
            delay = next(self.delays)
        if self.gate is not None:
            self.gate.acquire()
        time.sleep(delay)
        arrays = self.store.expert(layer, expert)
        # The first of its arrays stands for the others.
        weakref.finalize(arrays[0], self._gone)
        return arrays

    def _gone(self):
        with self.lock:
            self.here -= 1


class Offloaded:
    """A small model, loaded once: its parts, and its experts on the host.

    `source` has its weights; without one they are drawn.
    """

    def __init__(self, config, rng, weights="none", *, source=None, **config_of_store):
        self.config = dataclasses.replace(config, scan_layers=False)
        self.flat = None if source else draw(rng, config)
        blueprint = Blueprint(self.config, make_mesh(MeshShape()))
        quantized = None
        if weights != "none":
            bare = quantized_blueprint(blueprint, weights)
            quantized = bare, quantizing(bare, weights)
        source = source or Source(self.config, self.flat)
        self.model = OffloadedModel(source, blueprint, quantized)
        self.params, self.biases, self.store = self.model.load(OffloadConfig(**config_of_store))
        self.resident = quantized or (blueprint, lambda name, array: {name: array})

    def experts(self, slots, wave=2, *, guesses=4, **config):
        """Slots of each layer, W, experts guessed for a layer; the fields of `OffloadConfig`.

        All guesses are sent: which ones pay depends on the machine and its load.
        """
        config = {"guesses": "all", **config}
        banks = self.store.banks.values()
        size = max(bank.expert_bytes for bank in banks)
        room = Room(tuple(min(slots, bank.experts) for bank in banks), wave, guesses * size)
        return self.model.experts(self.store, room, OffloadConfig(**config))

    def engine(self, experts, **settings):
        """The engine of such experts; None: of all on the device."""
        settings = EngineSettings(**{**SETTINGS, **settings})
        if experts is None:
            blueprint, keep = self.resident
            flat = Source(self.config, self.flat).weights(
                Blueprint(self.config, blueprint.mesh), keep
            )
            weights = load_weights(flat, blueprint, jnp.dtype(self.config.compute_dtype))
            return Engine(blueprint, *weights, end_ids=[END], settings=settings)
        blueprint = self.model.parts.blueprint
        return Engine(
            blueprint,
            self.params,
            self.biases,
            end_ids=[END],
            settings=settings,
            offload=experts,
        )


def swap(engine, experts):
    """Another state of slots, another policy or predictor, for the programs of an engine."""
    engine._programs._experts = engine._offload = experts
    engine.reset()
    return experts


def prompts_of(rng, *lengths):
    return [rng.integers(1, 257, n).tolist() for n in lengths]


def generate(engine, prompts, tokens=6, **params):
    """Tokens, and the most probable ids with their log-probabilities, of each prompt."""
    ask = {"temperature": 0, "max_tokens": tokens, "logprobs": 5, "ignore_eos": True, **params}
    ids = [engine.add(prompt, SamplingParams(**ask)) for prompt in prompts]
    engine.expect(min(len(prompts), engine.settings.max_rows), engine.max_len)
    made = {id: ([], []) for id in ids}
    while engine.has_work:
        for event in engine.step():
            made[event.id][0].extend(event.tokens)
            for told in event.logprobs:
                made[event.id][1].append(dict(zip(told.top_ids, told.top_logprobs)))
    return [made[id] for id in ids]


def random_choice(rng, most):
    """Experts, of eight, of some tokens, some of them padding; as unequal as routing is."""
    tokens = int(rng.integers(1, most))
    weight_E = rng.dirichlet(np.full(8, 0.4)) + 1e-9
    weight_E /= weight_E.sum()
    chosen = [rng.choice(8, 2, replace=False, p=weight_E) for _ in range(tokens)]
    experts_TK = np.array(chosen, np.int32)
    experts_TK[rng.random(tokens) < 0.2] = -1
    return experts_TK


def poor_of(store, layer, expert):
    """An expert as its copy of 8 bits makes it."""
    bank, arrays = store.banks[layer], store.expert(layer, expert)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = [jax.device_put(np.asarray(array), here) for array in arrays]
    return restored(bank, tuple(map(lowered, bank.names, arrays)))


def assert_close(got, want, atol=1e-4):
    """Texts agree until a near tie decides; returns how many tokens were compared."""
    compared = 0
    for (tokens, logprobs), (tokens_w, logprobs_w) in zip(got, want, strict=True):
        for token, told, token_w, told_w in zip(tokens, logprobs, tokens_w, logprobs_w):
            both = told.keys() & told_w.keys()
            np.testing.assert_allclose(
                [told[id] for id in both], [told_w[id] for id in both], atol=atol
            )
            compared += 1
            if token != token_w:
                first, second = sorted(told_w.values())[-1:-3:-1]
                assert first - second < 2 * atol, (token, token_w)
                break
            assert len(both) >= 4  # the last of five may be a near tie
    return compared
