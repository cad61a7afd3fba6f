"""`LLM` against transformers' own generation, and its promises to the caller."""

import shutil

import pytest
import torch
import transformers as hf

from foveal.attention.catalogue import BY_NAME
from foveal.core.errors import ArgumentError, LoadError, RequestError
from foveal.engine.llm import LLM
from foveal.engine.request import SamplingParams
from foveal.text.bytes import BEGIN_ID, END_ID, write_byte_tokenizer
from models.checkpoints import directory as checkpoint
from models.checkpoints import reference
from tiny import CONTEXT, write_tiny_model

PROMPTS = ["def f(x):", "a", "import os\nimport sys\n\nprint(os.getcwd())", "naïve é"]
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def llm(directory):
    return LLM(directory)


@pytest.fixture(scope="module")
def theirs(directory):
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def generate(model, ids: list[int], **fields) -> list[int]:
    """The answer by transformers, greedy, for one prompt."""
    settings = {"do_sample": False, "max_new_tokens": 64, "eos_token_id": None, **fields}
    out = model.generate(torch.tensor([ids]), pad_token_id=0, **settings)
    return out[0, len(ids) :].tolist()


def test_greedy_equals_transformers(llm, theirs):
    """A batch of unequal prompts, each against transformers alone."""
    made = llm.generate(PROMPTS, GREEDY)
    for prompt, completion in zip(PROMPTS, made, strict=True):
        assert list(completion.token_ids) == generate(theirs, llm.tokenizer.encode(prompt))
        assert completion.finish_reason == "length"
        assert completion.num_prompt_tokens == len(prompt.encode()) + 1


def test_repetition_penalty_equals_transformers(llm, theirs):
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, repetition_penalty=1.3)
    for prompt, completion in zip(PROMPTS, llm.generate(PROMPTS, params), strict=True):
        ids = llm.tokenizer.encode(prompt)
        assert list(completion.token_ids) == generate(theirs, ids, repetition_penalty=1.3)


def test_end_of_sequence_equals_transformers(llm, theirs):
    """The end token is the one that greedy decoding meets after a while."""
    ids = llm.tokenizer.encode(PROMPTS[0])
    free = generate(theirs, ids)
    end = next(token for token in free[5:] if token not in free[:5])
    params = SamplingParams(temperature=0, max_tokens=64, stop_ids=(end,), ignore_eos=True)
    completion = llm.generate(PROMPTS[0], params)[0]
    assert list(completion.token_ids) == generate(theirs, ids, eos_token_id=end)
    assert completion.finish_reason == "stop"
    assert completion.token_ids[-1] == end


def test_the_models_end_tokens_end_answers(llm):
    params = SamplingParams(temperature=0, logit_bias={END_ID: 1000.0}, max_tokens=9)
    completion = llm.generate("x", params)[0]
    assert completion.token_ids == (END_ID,)
    assert (completion.finish_reason, completion.text) == ("stop", "")


# Without FlexAttention, which compiles anew for every shape.
@pytest.mark.parametrize("backend", sorted(BY_NAME.keys() - {"flex"}))
def test_backends_agree(directory, llm, backend):
    other = LLM(directory, backend=backend)
    expected = [c.token_ids for c in llm.generate(PROMPTS, GREEDY)]
    assert [c.token_ids for c in other.generate(PROMPTS, GREEDY)] == expected
    assert {choice.name for choice in other.explain(9)} == {backend}


@pytest.mark.parametrize("fields", [{"max_batch": 1}, {"max_batch": 3}, {"prefill_chunk": 7}])
def test_batching_and_chunks_change_nothing(directory, llm, fields):
    params = [
        SamplingParams(seed=at, max_tokens=length, logprobs=2, temperature=0.8)
        for at, length in enumerate((5, 40, 1, 17))
    ]
    expected = llm.generate(PROMPTS, params)
    made = LLM(directory, **fields).generate(PROMPTS, params)
    for one, other, asked in zip(made, expected, params, strict=True):
        assert one.token_ids == other.token_ids
        assert len(one.token_ids) == asked.max_tokens or one.finish_reason == "stop"
        assert one.logprobs is not None and other.logprobs is not None
        for a, b in zip(one.logprobs, other.logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
            assert [i for i, _ in a.top] == [i for i, _ in b.top]


@pytest.mark.parametrize(
    "name",
    ["mistral-window", "gemma2", "gemma3", "qwen3", "gpt2", "llama-dynamic", "phi3-longrope"],
)
def test_families_in_an_uneven_batch(name, tmp_path):
    """Greedy like transformers, each prompt alone there; the answers pass the lengths at which
    windows, dynamic scaling and LongRoPE begin to matter."""
    root = tmp_path / "model"
    shutil.copytree(checkpoint(name), root)
    write_byte_tokenizer(root)
    prompts = [[5, 9, 2], list(range(1, 18)), list(range(30, 41))]
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    made = LLM(root, prefill_chunk=5).generate(prompts, params)
    for prompt, completion in zip(prompts, made, strict=True):
        expected = generate(reference(name), prompt, max_new_tokens=len(completion.token_ids))
        assert list(completion.token_ids) == expected
        assert len(expected) == 16 or len(prompt) + len(expected) == LLM(root).context


def test_seeds(llm):
    seeded = SamplingParams(seed=3, max_tokens=20)
    assert llm.generate("ab", seeded)[0].token_ids == llm.generate("ab", seeded)[0].token_ids
    other = SamplingParams(seed=4, max_tokens=20)
    assert llm.generate("ab", seeded)[0].token_ids != llm.generate("ab", other)[0].token_ids


def test_log_probabilities_equal_transformers(llm, theirs):
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3, repetition_penalty=1.2)
    completion = llm.generate(PROMPTS[2], params)[0]
    ids = [*llm.tokenizer.encode(PROMPTS[2]), *completion.token_ids]
    with torch.no_grad():
        exact = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert completion.logprobs is not None
    for at, one in enumerate(completion.logprobs):
        row = exact[completion.num_prompt_tokens - 1 + at]
        assert one.logprob == pytest.approx(row[one.token_id].item(), abs=1e-4)
        assert [i for i, _ in one.top] == row.topk(3).indices.tolist()


def test_stream_is_generate_in_pieces(llm):
    params = SamplingParams(seed=8, max_tokens=40)
    pieces = list(llm.stream("for x in", params))
    completion = pieces[-1].completion
    assert completion is not None
    assert all(piece.completion is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == completion.text
    assert completion.token_ids == llm.generate("for x in", params)[0].token_ids
    assert 0 < completion.timing.first_token_s <= completion.timing.total_s
    assert completion.timing.tokens_per_s > 0


def test_a_stop_string_across_tokens(llm):
    free = llm.generate("q", SamplingParams(seed=1, max_tokens=60, ignore_eos=True))[0].text
    stop = free[10:13]
    cut = llm.generate("q", SamplingParams(seed=1, max_tokens=60, ignore_eos=True, stop=stop))[0]
    assert cut.text == free[: free.index(stop)]
    assert cut.finish_reason == "stop"


def test_prompts_as_ids_and_texts(llm):
    ids = llm.tokenizer.encode("ab")
    expected = llm.generate("ab", GREEDY)[0].token_ids
    assert llm.generate(ids, GREEDY)[0].token_ids == expected
    assert [c.token_ids for c in llm.generate([ids, "ab"], GREEDY)] == [expected] * 2
    assert llm.generate([], GREEDY) == []


def test_the_context_is_never_exceeded(llm):
    prompt = [BEGIN_ID] * (CONTEXT - 5)
    completion = llm.generate(prompt, SamplingParams(max_tokens=64, ignore_eos=True))[0]
    assert (len(completion.token_ids), completion.finish_reason) == (5, "length")
    with pytest.raises(RequestError, match=f"got {CONTEXT} tokens.*at most {CONTEXT - 1}"):
        llm.generate(["fine", [BEGIN_ID] * CONTEXT])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[1], [258]],), RequestError, "prompt: got token id 258; accepted: 0 to 257"),
        (("a", SamplingParams(logit_bias={999: 1.0})), RequestError, "logit_bias: got token id 9"),
        ((["a", "b"], [SamplingParams()]), ArgumentError, "params: got 1; accepted: .* 2 prompts"),
        (([1, "a"],), ArgumentError, "prompts: "),
    ],
)
def test_bad_requests(llm, arguments, error, words):
    with pytest.raises(error, match=words):
        llm.generate(*arguments)


def test_stream_refuses_at_the_call(llm):
    with pytest.raises(RequestError, match="prompt: got"):
        llm.stream([BEGIN_ID] * CONTEXT)


def test_an_empty_prompt_needs_a_begin_token(directory, llm):
    begun = llm.generate("", GREEDY)[0]
    assert begun.num_prompt_tokens == 1
    assert llm.generate([[]], GREEDY)[0].token_ids == begun.token_ids
    other = LLM(directory)
    other.tokenizer.bos_id = None
    with pytest.raises(RequestError, match="no token that begins a text"):
        other.generate([[]])


def test_chat(llm, tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    ids = llm.encode_chat(messages)
    assert ids == [BEGIN_ID, *b"[user] hi\n[assistant] "]
    assert llm.chat(messages, GREEDY).token_ids == llm.generate([ids], GREEDY)[0].token_ids
    with pytest.raises(RequestError, match="no system messages"):
        llm.chat([{"role": "system", "content": "x"}])
    write_tiny_model(tmp_path, chat=False)
    with pytest.raises(RequestError, match="no chat template"):
        LLM(tmp_path).chat(messages)


def test_dtypes_and_loading(directory, tmp_path):
    assert LLM(directory, dtype="bf16").model.dtype == torch.bfloat16
    with pytest.raises(ArgumentError, match="dtype"):
        LLM(directory, dtype="int7")
    with pytest.raises(ArgumentError, match="max_batch"):
        LLM(directory, max_batch=0)
    with pytest.raises(LoadError, match="no such directory"):
        LLM(tmp_path / "nothing")
