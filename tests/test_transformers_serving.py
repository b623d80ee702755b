"""Continuous batching of an attached model: requests with and without images, and their cache."""

import threading
from contextlib import contextmanager

import pytest
import torch

from vmtc_kernels import CMAIConfig, VMTCConfig

transformers = pytest.importorskip("transformers")

import vlm  # noqa: E402

from vmtc_kernels import config  # noqa: E402
from vmtc_kernels.integrations.transformers import _paged, _paged_rotary, attach  # noqa: E402

VMTC, CMAI = VMTCConfig(num_primary=0.25, num_merged=0.125), CMAIConfig(keep_ratio=0.5, layers=None)
BOTH = {"vmtc": VMTC, "cmai": CMAI}
NEW = 8
# this was renamed
PAGE = (
    "page_size" if hasattr(transformers.ContinuousBatchingConfig(), "page_size") else "block_size"
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def settings(**options):
    """Pages of 8 tokens, so that any prompt has several."""
    sizes = {"num_blocks": 64, "max_batch_tokens": 64, PAGE: 8}
    return transformers.ContinuousBatchingConfig(**(sizes | options))


def greedy(**options):
    return transformers.GenerationConfig(
        **{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
        | options
    )


def prompts(family):
    """Images and text of requests: of several lengths, two with the same image, two without."""
    text = "the photo shows a rocket. "
    return [
        ([vlm.photo(90, 64, 1)], vlm.prompt(family, "what colour is it?")),
        (None, "how many? two of them"),
        ([vlm.photo(64, 64, 1), vlm.photo(64, 90, 2)], vlm.prompt(family, text, images=2)),
        (None, text * 3),
        ([vlm.photo(90, 64, 1)], text + vlm.prompt(family, "how many?")),
    ]


def batched(model, requests, generation=None, **options):
    return list(
        model.generate_batch(
            requests,
            generation_config=generation or greedy(),
            continuous_batching_config=settings(**options),
        ).values()
    )


def alone(handle, images, text, new=NEW):
    """Tokens that `generate` adds to the prompt, and their log-probabilities."""
    inputs = handle.prepare(images=images, text=text)
    out = handle.model.generate(
        **inputs,
        generation_config=greedy(
            max_new_tokens=new, output_logits=True, return_dict_in_generate=True
        ),
    )
    tokens = out.sequences[0, inputs["input_ids"].shape[1] :]
    logprobs = torch.cat(out.logits).log_softmax(1).gather(1, tokens[:, None])[:, 0]
    return tokens.tolist(), logprobs


def check_alike(handle, outputs, given, new=NEW):
    for output, (images, text) in zip(outputs, given, strict=True):
        assert output.error is None
        tokens, logprobs = alone(handle, images, text, new)
        assert output.generated_tokens == tokens
        torch.testing.assert_close(torch.tensor(output.logprobs), logprobs, rtol=1e-3, atol=1e-4)


@contextmanager
def steps(model):
    """Queries of each request in each step of continuous batching."""
    seen = []

    def see(module, args, kwargs):
        if "cu_seq_lens_q" in kwargs:
            seen.append(kwargs["cu_seq_lens_q"].diff().tolist())

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    yield seen
    hook.remove()


def read(seen):
    return sum(map(sum, seen))


# what comes out


@pytest.mark.parametrize(
    "family, config",
    [
        ("llava", {"vmtc": VMTC}),
        ("llava", {"cmai": CMAI}),
        *((family, BOTH) for family in vlm.FAMILIES),
        (
            "llava",
            {"cmai": CMAIConfig(keep_ratio=None, threshold=0.5, head_mode="per_head", layers=(1,))},
        ),
        ("llava", {"cmai": CMAIConfig(keep_ratio=0.3, suppression=0.2, layers=None)}),
        ("qwen2_5_vl", {"cmai": CMAI}),
        ("qwen3_vl", {"vmtc": VMTC}),
    ],
)
def test_mixed_requests_equal_generate(family, config):
    model, processor = vlm.make(family)
    with attach(model, processor, **config) as handle, steps(model) as seen:
        given = prompts(family)
        requests = [handle.request(images=images, text=text) for images, text in given]
        outputs = batched(
            model, requests, max_batch_tokens=21, max_requests_per_batch=3, return_logprobs=True
        )
        # prompts in pieces beside requests that generate, none with all requests
        assert any(1 in step and max(step) > 1 for step in seen)
        assert max(map(len, seen)) == 3
        assert max(map(len, requests)) > 21
        check_alike(handle, outputs, given)


@pytest.mark.parametrize("family, config", [("llava", BOTH), ("qwen2_5_vl", {"vmtc": VMTC})])
def test_a_request_that_loses_its_blocks_begins_anew(family, config):
    model, processor = vlm.make(family)
    with attach(model, processor, **config) as handle, steps(model) as seen:
        given = prompts(family)[:3]
        requests = [handle.request(images=images, text=text) for images, text in given]
        options = {"generation": greedy(max_new_tokens=40), "return_logprobs": True}
        batched(model, requests, **options)
        enough = read(seen)
        seen.clear()
        blocks = max(map(len, requests)) // 8 + 7
        outputs = batched(model, requests, num_blocks=blocks, safety_margin=0.0, **options)
        assert read(seen) > enough
        check_alike(handle, outputs, given, new=40)


def test_decoding_requests_go_through_the_paged_operator_together(monkeypatch):
    calls = []

    def counted(q, *args, **kwargs):
        calls.append(len(q))
        return original(q, *args, **kwargs)

    original = config.paged_focus_attention
    monkeypatch.setattr(config, "paged_focus_attention", counted)
    model, processor = vlm.make("llava")
    with attach(model, processor, cmai=CMAI) as handle, steps(model) as seen:
        given = [prompts("llava")[i] for i in (0, 2, 4)]
        requests = [handle.request(images=images, text=text) for images, text in given]
        generation = greedy(eos_token_id=-1)
        batched(model, requests, generation, max_batch_tokens=512)
    decoding = [step for step in seen if max(step) == 1]
    assert len(decoding) == NEW - 1
    assert calls == [3] * (NEW - 1) * model.config.text_config.num_hidden_layers


# the cache


@pytest.mark.parametrize("family, config", [("llava", BOTH), ("qwen3_vl", {"vmtc": VMTC})])
def test_requests_that_start_alike_share_the_cache(family, config):
    model, processor = vlm.make(family)
    text = vlm.prompt(family, "what colour is it? how many? the photo shows")
    with attach(model, processor, **config) as handle, steps(model) as seen:
        options = {"generation_config": greedy(eos_token_id=-1), "persistent_manager": True}
        options["continuous_batching_config"] = settings(return_logprobs=True)
        lengths, counts = [], []
        for seed in (1, 1, 2):
            seen.clear()
            given = [([vlm.photo(90, 64, seed)], text)]
            request = handle.request(*given[0])
            (output,) = model.generate_batch([request], **options).values()
            lengths.append(len(request))
            counts.append(read(seen) - (NEW - 1))
            tokens, logprobs = alone(handle, *given[0])
            assert output.generated_tokens[: len(tokens)] == tokens
            got = torch.tensor(output.logprobs[: len(tokens)])
            torch.testing.assert_close(got, logprobs, rtol=1e-3, atol=1e-4)
        # all but the last page, of 8 tokens
        assert counts[0] == lengths[0] == lengths[1] == counts[2] >= 20
        assert 1 <= counts[1] <= 8


def served(manager, requests):
    """Outputs of a manager that runs, in the order of the requests."""
    ids = [manager.add_request(request, max_new_tokens=NEW) for request in requests]
    outputs = {}
    while len(outputs) < len(ids):
        output = manager.get_result(timeout=60)
        assert output is not None, "the manager is silent"
        outputs[output.request_id] = output
    return [outputs[i] for i in ids]


def running(model, **options):
    return model.continuous_batching_context_manager(
        generation_config=greedy(), continuous_batching_config=settings(**options)
    )


def test_no_two_handles_share_ids_of_images():
    model, processor = vlm.make("llava")
    seen = set()
    for vmtc in (VMTC, VMTCConfig(num_primary=0.125, num_merged=0.25), VMTC):
        with attach(model, processor, vmtc=vmtc) as handle:
            ids = image_ids(model, handle.request(*prompts("llava")[0]))
            assert len(ids) == 24 and not seen & set(ids)
            seen.update(ids)


def test_requests_are_made_while_the_manager_runs():
    model, processor = vlm.make("llava")
    given = [([vlm.photo(90, 64, seed)], vlm.prompt("llava", "how many?")) for seed in range(4)]
    given.append((None, "what colour is it?"))
    outputs = {}
    with attach(model, processor, **BOTH) as handle:
        with running(model, return_logprobs=True) as manager:
            served(manager, [handle.request(text="two of them")])

            def ask(i):
                outputs[i] = manager.add_request(handle.request(*given[i]), max_new_tokens=NEW)

            threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(given))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            got = {}
            while len(got) < len(given):
                output = manager.get_result(timeout=60)
                assert output is not None, "the manager is silent"
                got[output.request_id] = output
        check_alike(handle, [got[outputs[i]] for i in range(len(given))], given)


def test_several_answers_to_one_request():
    model, processor = vlm.make("llava")
    # the likeliest token alone
    sampling = greedy(do_sample=True, top_k=1, num_return_sequences=2)
    given = prompts("llava")[0]
    with attach(model, processor, vmtc=VMTC) as handle:
        outputs = batched(model, [handle.request(*given)], sampling)
        tokens, _ = alone(handle, *given)
        assert outputs
        assert all(output.generated_tokens == tokens for output in outputs)
    with attach(model, processor, cmai=CMAI) as handle:
        outputs = batched(model, [handle.request(*given)], sampling)
        assert all("send a request several times" in output.error for output in outputs)
    # of the families with positions in three dimensions these are in the way alone
    model, processor = vlm.make("qwen2_5_vl")
    with attach(model, processor, vmtc=VMTC) as handle:
        outputs = batched(model, [handle.request(*prompts("qwen2_5_vl")[0])], sampling)
        assert all("send a request several times" in output.error for output in outputs)


def test_keys_tell_prefixes_apart():
    model, processor = vlm.make("llava")
    text = vlm.prompt("llava", "how many?")
    with attach(model, processor, cmai=CMAI) as handle:
        requests = [handle.request([vlm.photo(64, 64, seed)], text) for seed in (1, 2)]
        (focus,) = (part for part in handle._parts if hasattr(part, "paged"))
        with running(model) as manager:
            served(manager, requests)
            (slots,) = focus.paged.caches.values()
            digests = slots.marks.digests[slots.marks.digests != 0]
    # the first token alone, before the image, is the same in both
    assert len(digests) >= sum(map(len, requests))
    assert len(digests.unique()) == len(digests) - 1
    assert not focus.paged.caches


def test_a_cache_from_before_attach_is_refused_by_cmai():
    model, processor = vlm.make("llava")
    text = "what colour is it? how many? two of them"
    with running(model) as manager:
        before = processor.tokenizer(text)["input_ids"]
        assert served(manager, [before])[0].error is None
        if model.config._attn_implementation == "paged|sdpa":  # transformers 5.17
            with pytest.raises(ValueError, match="cannot replace 'paged"):
                attach(model, processor, cmai=CMAI)
            return
        handle = attach(model, processor, cmai=CMAI)
        (output,) = served(manager, [handle.request(text=text)])
        assert "since attach" in output.error
    handle.detach()


def test_a_manager_that_is_kept_from_before_attach_is_refused():
    model, processor = vlm.make("llava")
    batched_once = {"generation_config": greedy(), "continuous_batching_config": settings()}
    model.generate_batch([[5, 6, 7]], **batched_once, persistent_manager=True)
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        attach(model, processor, vmtc=VMTC)
    model.destroy_cached_continuous_batching_manager()
    handle = attach(model, processor, vmtc=VMTC)
    model.generate_batch([[5, 6, 7]], **batched_once, persistent_manager=True)
    handle.detach()
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_detach_waits_for_the_manager():
    model, processor = vlm.make("llava")
    handle = attach(model, processor, **BOTH)
    given = prompts("llava")[0]
    with running(model, return_logprobs=True) as manager:
        served(manager, [handle.request(text="two of them")])
        with pytest.raises(RuntimeError, match=r"manager.stop\(\)"):
            handle.detach()
        outputs = served(manager, [handle.request(*given)])
    check_alike(handle, outputs, [given])
    handle.detach()


# images in the table


def image_ids(model, request):
    return [i for i in request if i >= model.get_input_embeddings().num_embeddings]


def test_an_image_is_encoded_once_and_has_its_ids_among_others():
    model, processor = vlm.make("llava")
    encoded = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: encoded.append(len(output))
    )
    first, second = vlm.photo(64, 64, 1), vlm.photo(64, 64, 2)
    with attach(model, processor, vmtc=VMTC) as handle:
        one = image_ids(model, handle.request([first], vlm.prompt("llava", images=1)))
        two = image_ids(model, handle.request([second, first], vlm.prompt("llava", images=2)))
        twice = image_ids(model, handle.request([first] * 2, vlm.prompt("llava", images=2)))
        assert handle.request(text="how many?") == processor.tokenizer("how many?")["input_ids"]
    hook.remove()
    assert encoded == [1, 1]
    assert len(one) == 24  # of 64
    assert two[24:] == one and not set(two[:24]) & set(one)
    assert twice == one + one


def test_tiles_are_known_again_beside_an_image_with_more_of_them():
    model, processor = vlm.make("llava_next")
    wide, square = vlm.photo(200, 60, 1), vlm.photo(64, 64, 2)
    with attach(model, processor, vmtc=VMTC) as handle:
        one = image_ids(model, handle.request([wide], vlm.prompt("llava_next")))
        two = handle.request([square, wide], vlm.prompt("llava_next", images=2))
        assert image_ids(model, two)[-len(one) :] == one


def test_released_images_make_room_and_held_ones_do_not():
    model, processor = vlm.make("llava")
    text = vlm.prompt("llava", "how many?")

    def ask(seed):
        return handle.request([vlm.photo(64, 64, seed)], text)

    with attach(model, processor, vmtc=VMTC) as handle:
        handle.reserve(3 * 24 + 5)
        requests = [ask(seed) for seed in range(3)]
        with pytest.raises(RuntimeError, match=r"24 tokens among the 77.*release.*reserve"):
            ask(3)
        with pytest.raises(RuntimeError, match="24 tokens among the 77"):
            handle.request([vlm.photo(64, 64, i) for i in (2, 3)], text + "<image>")
        # in the middle, so that its room is not at the end
        handle.release(requests[1])
        assert ask(1) == requests[1]  # known still
        handle.release(requests[1])
        requests.append(ask(3))
        assert not set(image_ids(model, requests[3])) & set(image_ids(model, requests[1]))
        for seed in (0, 2, 3):
            assert ask(seed) == requests[seed]
            handle.release(requests[seed])
        outputs = batched(model, [requests[0], requests[2], requests[3]], return_logprobs=True)
        check_alike(handle, outputs, [([vlm.photo(64, 64, seed)], text) for seed in (0, 2, 3)])
        # another image is there now
        (output,) = batched(model, [requests[1]])
        assert "was released" in output.error
        with pytest.raises(ValueError, match="released already"):
            handle.release(requests[1])
        # the request that found no room holds nothing
        handle.release(requests[2])
        with pytest.raises(ValueError, match="released already"):
            handle.release(requests[2])
        with pytest.raises(RuntimeError, match="before the first request"):
            handle.reserve(100)
        assert ask(0) == requests[0]


# errors, and the way back


@pytest.mark.parametrize(
    "given, error, words",
    [
        ({"text": ["how many?", "how many?"]}, ValueError, "one prompt"),
        ({"text": "how many? <image>"}, ValueError, "no images? w"),
        ({"images": [vlm.photo(64, 64)] * 2, "text": "<image> how many?"}, ValueError, "two|2"),
    ],
)
def test_a_request_that_is_none(given, error, words):
    model, processor = vlm.make("llava")
    with attach(model, processor, vmtc=VMTC) as handle, pytest.raises(error, match=words):
        handle.request(**given, padding=True)


def test_a_video_is_refused():
    model, processor = vlm.make("qwen2_5_vl")
    with attach(model, processor, vmtc=VMTC) as handle:
        text = vlm.prompt("qwen2_5_vl", images=0, videos=1)
        with pytest.raises(NotImplementedError, match="frames as images"):
            handle.request(text=text, videos=[vlm.video(64, 64)])


@pytest.mark.parametrize(
    "config, words",
    [
        ({"cmai": CMAI, "record": True}, "record=False"),
        ({"cmai": CMAIConfig(decode=False, layers=None)}, "the same for prefill and decode"),
    ],
)
def test_what_continuous_batching_cannot_do(config, words):
    model, processor = vlm.make("llava")
    with attach(model, processor, **config) as handle:
        (output,) = batched(model, [handle.request(text="how many?")])
        assert words in output.error


@pytest.mark.parametrize(
    "family, config", [("llava", {"cmai": CMAI}), ("qwen3_vl", {"vmtc": VMTC})]
)
def test_graphs_are_refused_where_each_step_differs(monkeypatch, family, config):
    # to compile takes 10 seconds, and CUDA graphs need a GPU
    for module in (_paged, _paged_rotary):
        monkeypatch.setattr(module, "replayed", lambda ids: True)
    model, processor = vlm.make(family)
    with attach(model, processor, **config) as handle:
        (output,) = batched(model, [handle.request(text="how many?")])
        assert "without settings to compile" in output.error


def test_another_attention_is_refused_by_cmai():
    model, processor = vlm.make("llava")
    with attach(model, processor, cmai=CMAI) as handle:
        request = handle.request(text="how many?")
        model.set_attn_implementation("paged|eager")
        (output,) = batched(model, [request])
        assert "auto_switch_to_flash" in output.error


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_detach_restores_continuous_batching_bit_for_bit(family):
    model, processor = vlm.make(family)
    requests = [
        processor.tokenizer(text)["input_ids"] for text in ("how many?", "two of them " * 9)
    ]

    def run():
        outputs = batched(model, requests, return_logprobs=True)
        return [(output.generated_tokens, output.logprobs) for output in outputs]

    before = run()
    images, text = prompts(family)[0]
    # transformers hooks what runs for the first time
    inputs = processor(images=images, text=text, return_tensors="pt")
    model.generate(**inputs, generation_config=greedy())
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    handle = attach(model, processor, **BOTH)
    batched(model, [handle.request(images, text), *requests])
    handle.detach()
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert run() == before
    with pytest.raises(RuntimeError, match="detached"):
        handle.request(images, text)
