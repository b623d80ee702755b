"""A crowd of requests to the server, some of which go away before their answer is complete."""

import asyncio
import gc
import json
import random
import time

import pytest

pytest.importorskip("vllm")
pytest.register_assert_rewrite("vllm_server")

import httpx  # noqa: E402
from vllm_server import TOGETHER, VMTC, alone, answer_of, apart, request, tokens_of  # noqa: E402
from vlm import photo  # noqa: E402

from vmtc_kernels.integrations.vllm import _vision  # noqa: E402

pytest_plugins = ["vllm_server"]

# of each of two crowds; what is not waited for would go on for long
REQUESTS, LENGTHS, ENDLESS = 100, (6, 12, 24), 400
# how far the logarithms of shares may be from those of the same request by itself: on the machine
# of 2 threads where this was written none differed. Tokens are further apart (`wanted`)
CLOSE = 1e-4
# how much larger the server's processes may be after the second crowd. Measured: 3 to 19 MB, as
# allocators settle; the images of a crowd are 60 MB of pixels, so that to keep them would show
GROWTH = 30e6
FEWER = {"num_primary": 4, "num_merged": 2}
SIZES = [(640, 480), (64, 64), (300, 800)]
PHOTOS = [photo(*SIZES[seed % 3], seed) for seed in (3, 4, 6, 7, 8, 1, 10, 13)]
ASKED = [
    *((text, (), None) for text in ("how many?", "the photo shows a rocket.", "two of them. " * 9)),
    *(("what colour is it?", (each,), None) for each in PHOTOS),
    # other answers to the same photos
    *(("what colour is it?", (each,), FEWER) for each in PHOTOS[:3]),
    *(("two of them", (each,), None) for each in PHOTOS[:3]),
    *(("how many?", tuple(PHOTOS[i : i + 2]), None) for i in (0, 2, 3)),
]


@pytest.fixture(scope="module")
def wanted(served_model):
    """Each by itself, in an engine that never has two requests."""
    with apart(served_model, VMTC) as llm:
        answers = [
            alone(llm, text, *photos, new=max(LENGTHS), vmtc=vmtc) for text, photos, vmtc in ASKED
        ]
        # what an encoding keeps for its hooks is gone with it; it would be too little to be seen in
        # the memory of the server
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, _vision.Run)]
    # so no token may differ, and none is taken for another
    assert min(answer.ahead for answer in answers) > 4 * CLOSE
    assert len({tuple(answer.tokens[: min(LENGTHS)]) for answer in answers}) == len(ASKED)
    return answers


@pytest.fixture(scope="module")
def bodies():
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return [request(text, *photos, vmtc=vmtc, **stream) for text, photos, vmtc in ASKED]


def plan_of(seed):
    """``(i, new, stop)`` of each request in some order, the same requests for each seed: what is
    asked, for how many tokens, and after how many pieces the client leaves, as a fifth does."""
    dice, plan = random.Random(0), []
    for i in range(REQUESTS):
        leaves = i % 5 == 0
        stop = (0, 1, 4, 9)[i // 5 % 4] if leaves else None
        plan.append((i % len(ASKED), ENDLESS if leaves else dice.choice(LENGTHS), stop))
    random.Random(seed).shuffle(plan)
    return plan


async def ask(client, gate, body, stop):
    """The pieces of an answer, all of them or the first ``stop``."""
    parts, complete = [], False
    async with gate, client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        lines = response.aiter_lines()
        while not complete and len(parts) != stop:
            line = await anext(lines)  # raises where a stream ends without saying so
            complete = line == "data: [DONE]"
            if line and not complete:
                parts.append(json.loads(line.removeprefix("data: ")))
    return parts


def named(body, name):
    """The same with another name for each image, under which nothing is kept of it."""
    (message,) = body["messages"]
    content = [
        part | ({"uuid": f"{name}-{i}"} if part["type"] == "image_url" else {})
        for i, part in enumerate(message["content"])
    ]
    return body | {"messages": [message | {"content": content}]}


async def crowd(url, bodies, plan, name):
    gate = asyncio.Semaphore(TOGETHER)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False) as client:
        asked = []
        for place, (i, new, stop) in enumerate(plan):
            body = bodies[i] | {"max_tokens": new}
            # every other one is encoded anew, as if it had not been there before
            body = named(body, f"{name}-{place}") if place % 2 else body
            asked.append(ask(client, gate, body, stop))
        return await asyncio.gather(*asked)


def idle(server, seconds=60):
    """The metrics once nothing runs, waits or has blocks in the cache."""
    end = time.monotonic() + seconds
    while True:
        metrics = server.metrics()
        names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        left = {name: metrics[name] for name in names if metrics[name]}
        if not left:
            return metrics
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_a_crowd_that_comes_and_goes(server, wanted, bodies):
    memory = []
    for seed in (1, 2):
        plan, before = plan_of(seed), idle(server)
        results = asyncio.run(crowd(server.url, bodies, plan, seed))
        after = idle(server)
        memory.append(server.memory())
        complete = gone = 0
        for (i, new, stop), parts in zip(plan, results, strict=True):
            whole = wanted[i]
            if stop is None:
                got = answer_of(parts)
                complete += new
                assert (got.prompt, len(got.tokens)) == (whole.prompt, new)
                assert (got.logs - whole.logs[:new]).abs().max() < CLOSE, ASKED[i]
                tokens = got.tokens
            else:
                gone += 1
                assert len(parts) == stop
                tokens = tokens_of([choice for part in parts for choice in part["choices"]])
            # a piece has several tokens where the server was busy
            known = min(len(tokens), len(whole.tokens))
            assert tokens[:known] == whole.tokens[:known], ASKED[i]
        # the server has counted the same, and those that had gone were not all answered to the end
        said = {name: after[name] - before.get(name, 0) for name in after}
        assert REQUESTS - gone <= said["request_success_total"] < REQUESTS
        assert complete < said["generation_tokens_total"] < complete + 0.9 * gone * ENDLESS
    # there were more at once than the cache has room for
    assert after["num_preemptions_total"] > 0
    first, second = memory
    assert second - first < GROWTH
