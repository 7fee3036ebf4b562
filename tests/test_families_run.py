"""Folders of transformers from the flags of `infer.py` to tokens and texts: those it makes itself.

Greedy continuations, each token from a forward pass of transformers over all before it. Prompts
are drawn until no token of them and of what follows hangs on rounding, so all must be equal, and
so must their log-probabilities: a model that is a little wrong often has the same best token.
"""

import json
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from engine_support import check_books, run
from families_support import COMMON, YARN, keeps_experts, make_hf, run_hf, save_hf
from serve_support import events, serving
from test_families_folder import make_tokenizer

import infer
from moejax.inference.params import SamplingParams
from moejax.inference.source import open_model
from moejax.serving import start
from moejax.serving.flags import EngineFlags
from moejax.serving.loop import EngineLoop
from moejax.serving.text_model import TextModel

pytestmark = pytest.mark.slow

MOST = 12
LENGTHS = 5, 23, 41  # the last ones in several pieces
TOP = 5
GREEDY = SamplingParams(temperature=0, max_tokens=MOST, ignore_eos=True, logprobs=TOP)
TOLERANCE = {"rtol": 0, "atol": 2e-4}
# Few shapes of steps, as compiling takes most of the time.
FLAGS = {"dtype": "float32", "prefill_chunk": 16, "max_rows": 4}
ONE, EIGHT = "data=1,expert=1,tensor=1", "data=1,expert=8,tensor=1"
LATENT_YARN = {**YARN, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.9}
# Family → mesh, tokens of a page, what differs from `families_support.CASES`.
RUNS = {
    "mixtral": (EIGHT, 4, {}),
    "qwen3_moe": (ONE, 8, {}),
    "olmoe": (ONE, 4, {}),
    "deepseek_v3": (EIGHT, 8, {"rope_parameters": LATENT_YARN}),
    "gpt_oss": (ONE, 4, {}),
}


@pytest.fixture(autouse=True)
def compiled_programs_are_not_kept(monkeypatch):
    monkeypatch.setattr(start, "keep_compiled_programs", lambda: None)


def greedy(model, prompt, rng):
    """Tokens that transformers puts behind a prompt, and their log-probabilities, largest first.

    None where rounding could change the tokens.
    """
    text, found = list(prompt), []
    for _ in range(MOST):
        logits_V = run_hf(model, np.asarray([text], np.int32))[2][0, -1]
        second, first = np.sort(logits_V)[-2:].astype(np.float64)
        if first - second < 1e-3:
            return None
        sum_of_all = np.log(np.exp(logits_V - first).sum(dtype=np.float64)) + first
        found.append(np.sort(logits_V)[: -TOP - 1 : -1] - sum_of_all)
        text.append(int(logits_V.argmax()))
    if not keeps_experts(model, np.asarray([text], np.int32), rng):
        return None
    return text[len(prompt) :], np.stack(found)


def draw(model, rng, prompt_of):
    """A prompt, what follows it, and how probable: of which nothing hangs on rounding."""
    for _ in range(30):
        prompt = prompt_of()
        made = greedy(model, prompt, rng)
        if made is not None:
            return prompt, *made
    raise AssertionError("every draw hangs on rounding")


@pytest.mark.parametrize("family", RUNS)
def test_tokens(family, tmp_path, rng):
    mesh, page_len, changes = RUNS[family]
    model = make_hf(family, rng, **changes)
    source = open_model(save_hf(model, tmp_path / family))
    # Of eight devices each runs one text, so that pages lie on several.
    rows = 8 if mesh == EIGHT else 4
    flags = EngineFlags(mesh=mesh, page_len=page_len, **{**FLAGS, "max_rows": rows})
    engine = start.make_engine(source, flags)
    engine.expect(len(LENGTHS), max(LENGTHS) + MOST)
    vocab = COMMON["vocab_size"]
    drawn = [draw(model, rng, lambda n=n: rng.integers(0, vocab, n).tolist()) for n in LENGTHS]
    check_together(engine, drawn)
    stats = engine.stats()
    assert stats.prefill_steps >= 3 and stats.prompt_tokens == sum(LENGTHS)
    # The longest one again, most of it from the pages that are still there.
    check_together(engine, drawn[-1:])
    assert engine.stats().reused_tokens >= 32


def check_together(engine, drawn):
    """An engine continues prompts as they were when they were drawn."""
    logprobs = {}

    def collect(_, events):
        for event in events:
            logprobs.setdefault(event.id, []).extend(event.logprobs)

    ids = [engine.add(prompt, GREEDY) for prompt, *_ in drawn]
    made, _ = run(engine, each=collect)
    check_books(engine)
    for id, (prompt, tokens, wanted) in zip(ids, drawn):
        assert made[id, 0] == (tokens, "length"), f"after {len(prompt)} tokens"
        found = [one.top_logprobs for one in logprobs[id]]
        np.testing.assert_allclose(found, wanted, **TOLERANCE, err_msg=f"{len(prompt)} tokens")
        assert [one.top_ids[0] for one in logprobs[id]] == tokens


# --- texts ------------------------------------------------------------------------------------


def text_folder(family, folder, rng):
    """A folder with a tokenizer of bytes, both as transformers writes them: its model, tokenizer.

    Only printable ASCII has logits, so that no text ends early and all are whole characters.
    """
    import tokenizers
    import torch
    import transformers

    plain = tokenizers.Tokenizer.from_str(make_tokenizer(post="<s> $0"))
    ends = {"bos_token_id": 256, "eos_token_id": 257}
    model = make_hf(family, rng, vocab_size=plain.get_vocab_size(), **ends)
    spelled = [plain.decode([i]) for i in range(plain.get_vocab_size())]
    silent = [i for i, text in enumerate(spelled) if not (text.isascii() and text.isprintable())]
    silent += [i for i, text in enumerate(spelled) if not text]  # special tokens
    with torch.no_grad():
        model.lm_head.weight[silent] = 0
    save_hf(model, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=plain, bos_token="<s>", eos_token="</s>"
        ).save_pretrained(folder)
        return model, transformers.AutoTokenizer.from_pretrained(folder)


def draw_text(model, tokenizer, rng, length):
    """A text of so many characters, what transformers puts behind it, and how probable that is."""
    texts = {}

    def prompt_of():
        text = "a" + "".join(chr(c) for c in rng.integers(32, 127, length - 1))
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 256 and len(ids) == length + 1
        texts[tuple(ids)] = text
        return ids

    ids, made, logprobs = draw(model, rng, prompt_of)
    follows = tokenizer.decode(made, clean_up_tokenization_spaces=False)
    assert len(follows) == MOST
    return texts[tuple(ids)], follows, logprobs


def test_the_script(tmp_path, rng, capsys):
    model, tokenizer = text_folder("qwen2_moe", tmp_path / "hf", rng)
    drawn = [draw_text(model, tokenizer, rng, length) for length in (5, 38)]
    (first, one, _), (second, two, _) = drawn
    flags = ["--mesh", ONE, "--dtype", "float32", "--prefill-chunk", "16", "--page-len", "4"]
    prompts = [f"-p={first}", f"-p={second}"]
    capsys.readouterr()
    code = infer.main(
        ["--model", str(tmp_path / "hf"), *prompts, "--max-tokens", str(MOST), *flags]
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    assert out == f"=== 1 of 2 ===\n{first}{one}\n=== 2 of 2 ===\n{second}{two}\n"


def test_the_server(tmp_path, rng):
    pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    model, tokenizer = text_folder("deepseek_v2", tmp_path / "hf", rng)
    drawn = [draw_text(model, tokenizer, rng, length) for length in (5, 38)]
    source = open_model(tmp_path / "hf")
    texts = TextModel.open(source)
    flags = EngineFlags(mesh=ONE, page_len=8, **{**FLAGS, "max_rows": 2})
    engine = start.make_engine(source, flags)
    engine.expect(2, 64)
    options = {"model": "hf", "max_tokens": MOST, "temperature": 0}
    try:
        with serving(EngineLoop(engine, texts.tokenizer), texts) as served:
            wait = {"timeout": 200}  # compiling
            connection = served.connect(**wait)
            body = {**options, "prompt": [prompt for prompt, *_ in drawn], "logprobs": TOP}
            head = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            answer = json.loads(connection.getresponse().read())
            found = [(choice["text"], choice["finish_reason"]) for choice in answer["choices"]]
            assert found == [(follows, "length") for _, follows, _ in drawn]
            for choice, (*_, wanted) in zip(answer["choices"], drawn):
                logprobs = choice["logprobs"]["token_logprobs"]
                np.testing.assert_allclose(logprobs, wanted[:, 0], **TOLERANCE)
            prompt, follows, _ = drawn[1]
            body = {**options, "prompt": prompt, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), head)
            *chunks, done = events(connection.getresponse())
            connection.close()
            assert done == "[DONE]"
            assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == follows
            served.settled()
    finally:
        texts.close()
