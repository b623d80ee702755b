"""The OpenAI-compatible server of vLLM with compressed images, over HTTP."""

import pytest

pytest.importorskip("vllm")
pytest.register_assert_rewrite("vllm_server")

import openai  # noqa: E402
from vllm_server import BLOCK, LEFT, VMTC, Server, alone, apart, chat, request, same  # noqa: E402
from vlm import photo  # noqa: E402

pytest_plugins = ["vllm_server"]

QUESTION, LONG = "what colour is it?", "the photo shows a rocket. how many? two of them. " * 3
PLACEHOLDER = 3
FEWER, FEWER_LEFT = {"num_primary": 4, "num_merged": 2}, 6
# of the logarithms of shares: sums in another order, in float32
CLOSE = 5e-4
WIDE, TALL, SQUARE = photo(200, 80, 3), photo(50, 120, 2), photo(64, 64, 4)
ASKED = {
    "one": (QUESTION, WIDE),
    "another": (QUESTION, TALL),
    "two": ("two of them", WIDE, SQUARE),
    "in another order": ("two of them", SQUARE, WIDE),
    "text": (QUESTION,),
    # more than a block of the cache
    "twice": (LONG, photo(96, 64, 5)),
    "named": (LONG, photo(96, 64, 6)),
    "refused": (LONG, photo(96, 64, 7)),
}


@pytest.fixture(scope="module")
def wanted(served_model):
    """What engines in this process answer, started with `VMTC` and with `FEWER`: none of them had
    another request, nor has heard of the server."""
    out = []
    for config in (VMTC, FEWER):
        with apart(served_model, config) as llm:
            out.append({name: alone(llm, *asked) for name, asked in ASKED.items()})
    # so none is confused with another
    texts = [answer.text for each in out for name, answer in each.items() if name != "text"]
    assert len(set(texts)) == len(texts)
    assert out[0]["text"].tokens == out[1]["text"].tokens
    return out


def cached(answer):
    """How many tokens of a prompt are found again: whole blocks, but never its last token."""
    return (len(answer.prompt) - 1) // BLOCK * BLOCK


def test_a_chat_has_compressed_images(server, wanted):
    for name in ("one", "another", "two", "in another order", "text"):
        expected = wanted[0][name]
        assert expected.prompt.count(PLACEHOLDER) == LEFT * (len(ASKED[name]) - 1)
        same(server.ask(*ASKED[name]), expected, CLOSE)
        streamed, pieces = server.stream(*ASKED[name])
        assert pieces >= len(expected.tokens)
        same(streamed, expected, CLOSE)


def test_a_client_of_openai(server, wanted):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list()
    for kwargs, expected in zip((None, {"vmtc": FEWER}), wanted, strict=True):
        stream = client.chat.completions.create(
            model=model.id,
            messages=chat(*ASKED["one"]),
            max_tokens=8,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, "mm_processor_kwargs": kwargs},
        )
        parts = list(stream)
        text = "".join(c.delta.content or "" for part in parts for c in part.choices)
        assert text == expected["one"].text
        assert parts[-1].usage.prompt_tokens == len(expected["one"].prompt)
    client.close()


@pytest.mark.parametrize("name", ["twice", "named"])
def test_an_image_is_found_again_where_its_settings_are_the_same(server, wanted, name):
    # a client may say what an image is called, so that it is not compared by its pixels
    more = [{}, {"vmtc": FEWER}]
    if name == "named":
        named = chat(*ASKED[name])
        named[0]["content"][0]["uuid"] = "mine"
        more = [each | {"messages": named} for each in more]
    for each, expected in zip(more, wanted, strict=True):
        first = server.ask(*ASKED[name], **each)
        same(first, expected[name], CLOSE)
        assert first.cached == 0
        again = server.ask(*ASKED[name], **each)
        same(again, expected[name], CLOSE)
        assert again.cached == cached(again) >= BLOCK
    assert expected[name].prompt.count(PLACEHOLDER) == FEWER_LEFT
    # and the first is still what it was
    last = server.ask(*ASKED[name], **more[0])
    same(last, wanted[0][name], CLOSE)
    assert last.cached == cached(last)


@pytest.mark.parametrize(
    "vmtc, message",
    [
        (
            {"num_primary": 20, "num_merged": 2},
            f"asks for 22 tokens of an image, for which the engine was started with {LEFT}",
        ),
        ({"num_primary": 1.0, "num_merged": 0}, f"for which the engine was started with {LEFT}"),
        ({"metric": "euclidean"}, "must be an object of num_primary and num_merged, got"),
        (12, "must be an object of num_primary and num_merged, got 12"),
        ({"num_primary": -1}, "num_primary"),
    ],
)
def test_a_request_that_is_refused(server, wanted, vmtc, message):
    refused = server.post(request(*ASKED["refused"], vmtc=vmtc))
    assert refused.status_code == 400, refused.text
    assert message in refused.json()["error"]["message"]
    # the server lives on, and what it has kept of the request does no harm
    same(server.ask(*ASKED["refused"]), wanted[0]["refused"], CLOSE)
    same(server.ask(*ASKED["refused"], vmtc=FEWER), wanted[1]["refused"], CLOSE)


def test_a_server_with_wrong_settings_does_not_start(served_model, tmp_path):
    server = Server(served_model, tmp_path / "log", vmtc={"num_primary": 61, "num_merged": 4})
    try:
        assert server.process.wait(240) not in (0, None)
    finally:
        server.end()
    message = "must be 1 to 64 for an image of 64 tokens, got 61 + 4"
    assert message in server.log.read_text(errors="replace")
