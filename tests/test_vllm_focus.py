"""CMAI in vLLM's engine: against answers without an engine, however it runs the requests."""

import sys
from dataclasses import asdict

import pytest

pytest.importorskip("vllm")

import torch
import vllm_models as models
from vllm import SamplingParams
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm_focus_oracle import Oracle
from vlm import photo, placeholder

from vmtc_kernels import CMAIConfig
from vmtc_kernels.integrations.vllm import _focus

LONG = "the photo shows a rocket. what colour is it? how many? two of them. "
# an image has 16 tokens: some are cut, some come after text that was read in a step before
PIECES = {"max_num_batched_tokens": 20, "block_size": 16}
# drafts of two tokens wherever the last token occurred before
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 2,
    "prompt_lookup_max": 1,
    "prompt_lookup_min": 1,
}
A, B, C = photo(96, 64, 1), photo(64, 64, 2), photo(50, 120, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("llava"), image_size=32)


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle(folder)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The many small steps of tiny models only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Running:
    """An engine and what CMAI does in it."""

    def __init__(self, folder, config, **options):
        self.config = config
        self.llm = models.engine(folder, cmai=config and asdict(config), **options)
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.image = self.runner.model_config.hf_config.image_token_id
        self.layers = [
            layer
            for layer in self.runner.model.language_model.modules()
            if isinstance(layer, _focus.Attention)
        ]

    def answers(self, requests, tokens=8, **sampling):
        """As of `vllm_models.answers`, and how many tokens of each prompt were in the cache."""
        sampling = {"temperature": 0, "logprobs": 0, "ignore_eos": True} | sampling
        # an answer that wrote images could not be told from a prompt that has them
        sampling.setdefault("logit_bias", {self.image: -100})
        params = SamplingParams(max_tokens=tokens, **sampling)
        results = self.llm.generate(requests, params, use_tqdm=False)
        answers = []
        for result in results:
            for output in result.outputs:
                chosen = zip(output.token_ids, output.logprobs, strict=True)
                logs = torch.tensor([each[token].logprob for token, each in chosen])
                answers.append((list(result.prompt_token_ids), list(output.token_ids), logs))
        return answers, [result.num_cached_tokens for result in results]

    def count(self, monkeypatch, name):
        """A list that gets an item whenever the scheduler does this."""
        calls, do = [], getattr(self.core.scheduler, name)
        monkeypatch.setattr(
            self.core.scheduler, name, lambda *args, **kw: (calls.append(1), do(*args, **kw))[1]
        )
        return calls


@pytest.fixture(scope="module")
def running(folder, request):
    """An engine at a time, kept for the tests that follow one another with it."""
    config, options = request.param
    engine = Running(folder, config, **options)
    yield engine
    models.close(engine.llm)


def on(config, **options):
    return pytest.mark.parametrize("running", [(config, options)], indirect=True, ids=[""])


def request(text, *photos):
    data = {"multi_modal_data": {"image": list(photos)}} if photos else {}
    return {"prompt": text, **data}


def mixed():
    return [
        request("<image>what colour is it?", A),
        request("how many?"),
        request("<image><image>how many? <image>what is it?", B, C, A),
        request(LONG + "<image>what colour is it?", C),
        request(LONG * 2),
        request("what colour is it? <image>two of them" + LONG + "<image>", A, B),
        request("a<image>", B),
        request("<image>what colour is it?" + LONG, C),
    ]


MEAN = CMAIConfig(keep_ratio=0.25, layers=None)
HEADS = CMAIConfig(
    keep_ratio=None,
    threshold=0.6,
    head_mode="per_head",
    aggregate="residual",
    suppression=0.1,
    layers=None,
)
SOME = CMAIConfig(keep_ratio=0.25, layers=(0, -1), renormalize=False, min_keep=3)


@pytest.fixture(scope="module")
def stock(folder):
    """What the engine answers by itself, and again from its cache."""
    engine = Running(folder, None, **PIECES | {"block_size": 32})
    assert not any(isinstance(layer.impl, _focus.FocusImpl) for layer in engine.layers)
    answers = [engine.answers(mixed())[0] for _ in range(2)]
    models.close(engine.llm)
    return answers


@on(CMAIConfig(keep_ratio=1.0, layers=None), **PIECES)
def test_nothing_inhibited(stock, running):
    assert all(isinstance(layer.impl, _focus.FocusImpl) for layer in running.layers)
    for again, expected in enumerate(stock):
        answers, cached = running.answers(mixed())
        assert sum(cached) > 200 * again
        for ours, theirs in zip(answers, expected, strict=True):
            assert ours[:2] == theirs[:2]
            torch.testing.assert_close(ours[2], theirs[2], atol=2e-4, rtol=2e-4)
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


@on(MEAN, **PIECES)
def test_prompts_in_pieces(running, oracle):
    answers, _ = running.answers(mixed())
    differences = oracle.check(MEAN, mixed(), answers)
    images = [len(each.get("multi_modal_data", {})) > 0 for each in mixed()]
    assert [d > 1e-3 for d in differences] == images


@on(MEAN, **PIECES)
def test_prompts_that_are_in_the_cache(running, oracle):
    """The same again, the same image with another question, and another image with the same."""
    running.llm.reset_prefix_cache()
    running.answers(mixed())
    answers, cached = running.answers(mixed())
    oracle.check(MEAN, mixed(), answers)
    # full blocks, and never the last token
    assert cached == [(len(prompt) - 1) // 16 * 16 for prompt, _, _ in answers]
    others = [
        request("<image>what colour is it? the photo" + LONG, A),
        request("<image><image>how many? <image>what is it?", B, C, B),
        request(LONG + "<image>what is it?", C),
        request(LONG + "<image>what colour is it?", A),
    ]
    answers, cached = running.answers(others)
    oracle.check(MEAN, others, answers)
    assert cached[0] >= 16 and cached[1] >= 32 and cached[2] >= 32 and cached[3] == 16


@on(MEAN, **PIECES)
def test_answers_that_become_prompts(running, oracle):
    """A second turn goes on from what was generated in the first, and has another image."""
    image = oracle.model.config.image_token_id
    first = [request("<image>what colour is it?", A), request("how many?")]
    answers, _ = running.answers(first, tokens=40)
    oracle.check(MEAN, first, answers)
    turns = []
    for each, (prompt, answer, _) in zip(first, answers, strict=True):
        short = [token for i, token in enumerate(prompt) if token != image or i == 1]
        photos = each.get("multi_modal_data", {}).get("image", [])
        turns.append(
            {
                "prompt_token_ids": [*short, *answer[:-1], image, *short[-4:]],
                "multi_modal_data": {"image": [*photos, B]},
            }
        )
    answers, cached = running.answers(turns)
    oracle.check(MEAN, turns, answers)
    assert cached[0] >= 48 and cached[1] >= 32


@on(MEAN, **PIECES)
def test_sampling(running, oracle):
    """Several answers to a prompt, which share its blocks until they differ."""
    answers, _ = running.answers(mixed(), n=3, temperature=1.0, tokens=12)
    requests = [each for each in mixed() for _ in range(3)]
    oracle.check(MEAN, requests, answers, greedy=False)
    assert len({tuple(answer) for _, answer, _ in answers[:3]}) > 1


@pytest.mark.parametrize("again", [0, 1])
@on(
    HEADS,
    block_size=16,
    max_model_len=192,
    num_gpu_blocks_override=14,
    enable_prefix_caching=False,
)
def test_few_blocks(running, oracle, monkeypatch, again):
    """Requests are thrown out and read anew, in blocks that others had."""
    preempted = running.count(monkeypatch, "_preempt_request")
    answers, _ = running.answers(mixed()[:: -1 if again else 1], tokens=24)
    differences = oracle.check(HEADS, mixed()[:: -1 if again else 1], answers)
    assert preempted and max(differences) > 0.1


@on(SOME, block_size=32)
def test_some_layers(running, oracle):
    """The others keep no state; prompts in one piece."""
    answers, _ = running.answers(mixed())
    differences = oracle.check(SOME, mixed(), answers)
    assert max(differences) > 0.1
    (group,) = running.runner.kv_cache_config.kv_cache_groups
    sizes = [spec.page_size_bytes for spec in group.kv_cache_spec.kv_cache_specs.values()]
    # a token's keys and values of 2 heads, then its modality and a number for each image token
    assert sizes == [32 * (512 + 208), 32 * 512, 32 * (512 + 208)]


@on(CMAIConfig(keep_ratio=1.0, head_mode="per_head", layers=None), **PIECES, dtype="bfloat16")
def test_sixteen_bits(running, oracle):
    answers, _ = running.answers(mixed())
    oracle.check(running.config, mixed(), answers, tolerance=0.5, greedy=False)


@on(MEAN, block_size=16, speculative_config=NGRAM)
def test_drafts_of_the_prompt(running, oracle, monkeypatch):
    """Several tokens of an answer at once, of which some are taken back."""
    seen, do = [], running.core.scheduler.make_spec_decoding_stats

    def note(*args, **kwargs):
        seen.append((kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"]))
        return do(*args, **kwargs)

    monkeypatch.setattr(running.core.scheduler, "make_spec_decoding_stats", note)
    # the engine takes no biases beside drafts
    answers, _ = running.answers(mixed(), tokens=40, logit_bias=None)
    whole = [[*answer, running.image].index(running.image) for _, answer, _ in answers]
    answers = [(p, a[:n], logs[:n]) for n, (p, a, logs) in zip(whole, answers, strict=True)]
    assert sum(whole) > 200
    oracle.check(MEAN, mixed(), answers)
    proposed, accepted = (sum(each) for each in zip(*seen, strict=True))
    assert 0 < accepted < proposed
    # vLLM looks at all modules for kernels when another engine starts, and stumbles over these
    for name in [name for name in sys.modules if name.split(".")[0] in ("llvmlite", "numba")]:
        del sys.modules[name]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_families(tmp_path, family):
    """Images of as many tokens as they are large; of Qwen at places in a grid."""
    folder, image = models.save(tmp_path, family), placeholder(family)
    requests = [
        request(image + "what colour is it?" + LONG, A),
        request("how many?"),
        request(LONG + image + "how many? " + image + "what is it?", B, C),
    ]
    oracle, engine = Oracle(folder), Running(folder, MEAN, **PIECES)
    try:
        for again in range(2):
            answers, cached = engine.answers(requests)
            assert min(oracle.check(MEAN, requests, answers)[::2]) > 0.1
            assert all(cached[::2]) == again
    finally:
        models.close(engine.llm)


@on(None)
def test_other_engines_of_the_process(running, oracle):
    """After those with CMAI."""
    assert not any(isinstance(layer.impl, _focus.FocusImpl) for layer in running.layers)
    oracle.check(None, mixed(), running.answers(mixed())[0])
