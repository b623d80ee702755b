"""The HTTP server of `transformers serve` with an attached model, whose chats have images."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from vmtc_kernels import CMAIConfig, VMTCConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("openai")

import vlm  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402

from vmtc_kernels.integrations.transformers import attach, serve  # noqa: E402

VMTC, CMAI = VMTCConfig(num_primary=0.25, num_merged=0.125), CMAIConfig(keep_ratio=0.5)
QUESTION, NEW, TOKENS, LEFT = "what colour is it?", 12, 64, 16 + 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = vlm.save("llava", tmp_path_factory.mktemp("served") / "llava")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # pieces of a letter: a stream leaves them out where it ends, and a message does not
    pieces = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()]
    transformers.GenerationConfig(
        suppress_tokens=pieces, eos_token_id=2, pad_token_id=0, do_sample=False
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def loaded(folder):
    torch.set_num_threads(1)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    return model.eval(), transformers.AutoProcessor.from_pretrained(folder)


@pytest.fixture
def run(monkeypatch):
    """The command, to where it would listen: it calls what is given here with its application."""

    def run(arguments, use):
        def listen(app, **where):
            assert where == {"host": "localhost", "port": 8123}
            with TestClient(app) as client:
                use(client)
            ran.append(app)

        ran = []
        monkeypatch.setattr("uvicorn.run", listen)
        serve.main([*arguments, "--port", "8123", "--device", "cpu"])
        assert ran

    return run


def content(image):
    """A question on an image, or one without, as a client of OpenAI's API writes it."""
    if image is None:
        return QUESTION
    file = io.BytesIO()
    image.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]


def ask(client, image, **more):
    messages = [{"role": "user", "content": content(image)}]
    body = {"messages": messages, "max_tokens": NEW} | more
    return client.post("/v1/chat/completions", json=body)


def answer(response):
    """Its text and number of prompt tokens, of a message or of a stream of pieces."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"] == "application/json":
        message = response.json()
        return message["choices"][0]["message"]["content"], message["usage"]["prompt_tokens"]
    parts = [json.loads(line[len("data: ") :]) for line in response.text.splitlines() if line]
    text = [part["choices"][0]["delta"].get("content") or "" for part in parts]
    assert sum(map(bool, text)) > 1
    return "".join(text), parts[-1]["usage"]["prompt_tokens"]


def expected(loaded, image, **configs):
    """The same of `generate`, attached to where there are configs."""
    model, processor = loaded
    text = vlm.prompt("llava", QUESTION, images=image is not None)
    text, images = f"<s><user>{text}\n<assistant>", None if image is None else [[image]]
    given = {"images": images, "text": [text], "add_special_tokens": False}
    if configs:
        with attach(model, processor, **configs) as handle:
            inputs = handle.prepare(**given)
            ids = model.generate(**inputs, max_new_tokens=NEW)
    else:
        inputs = processor(**given, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=NEW)
    length = inputs["input_ids"].shape[1]
    return processor.decode(ids[0, length:], skip_special_tokens=True), length


def test_a_chat_has_compressed_images(folder, loaded, run):
    photos = [vlm.photo(96, 64, seed) for seed in (1, 2, 3)]
    wanted = [expected(loaded, photo, vmtc=VMTC, cmai=CMAI) for photo in photos]
    whole, text = expected(loaded, photos[0]), expected(loaded, None)
    # what is asked below, none of it holds of the model as it is, nor of one without CMAI
    assert wanted[0][1] == whole[1] - TOKENS + LEFT
    assert len({whole[0], text[0], expected(loaded, photos[0], vmtc=VMTC)[0], *dict(wanted)}) == 6

    def use(client):
        assert answer(ask(client, photos[0])) == wanted[0]
        assert answer(ask(client, photos[0], stream=True, model=folder)) == wanted[0]
        assert answer(ask(client, None)) == text
        with ThreadPoolExecutor(6) as pool:
            asked = [pool.submit(ask, client, p, stream=s) for s in (True, False) for p in photos]
        assert [answer(each.result()) for each in asked] == wanted * 2

    shares = ["--primary", "0.25", "--merged", "0.125", "--keep-ratio", "0.5"]
    run([folder, *shares], use)


def test_the_model_stays_and_no_other_is_loaded(folder, loaded):
    photo, wanted = vlm.photo(96, 64, 1), expected(loaded, vlm.photo(96, 64, 1), vmtc=VMTC)
    with attach(*loaded, vmtc=VMTC) as handle, TestClient(serve.build(handle, folder)) as client:
        assert [model["id"] for model in client.get("/v1/models").json()["data"]] == [folder]
        assert '"ready"' in client.post("/load_model", json={"model": folder}).text
        assert client.post("/reset").status_code == client.get("/health").status_code == 200
        assert answer(ask(client, photo)) == wanted
        assert ask(client, photo, model="another").status_code == 400
        other = client.post("/load_model", json={"model": "another"})
        assert other.status_code == 400 and folder in other.json()["detail"]


def test_an_image_that_is_too_small_is_the_requests_fault(folder, run):
    def use(client):
        refused = ask(client, vlm.photo(96, 64, 1))
        assert refused.status_code == 400
        assert "1 to 64" in refused.json()["detail"]

    run([folder], use)


def test_settings_are_checked_before_the_model_is_loaded(folder, capsys):
    with pytest.raises(SystemExit):
        serve.main([folder, "--primary", "0.8", "--merged", "0.7"])
    assert "at most 1 together" in capsys.readouterr().err


def test_another_server_is_refused(folder, loaded, monkeypatch):
    server = "transformers.cli.serving.server.build_server"
    with attach(*loaded, vmtc=VMTC) as handle:
        monkeypatch.setattr(server, lambda model_manager, extra: None)
        with pytest.raises(ImportError, match=r"another build_server: .*extra"):
            serve.build(handle, folder)
        monkeypatch.delattr(server)
        with pytest.raises(ImportError, match=r"no transformers.cli.serving.server.build_server"):
            serve.build(handle, folder)
