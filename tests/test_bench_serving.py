"""The benchmark of vLLM's server, without a server: what it refuses to time, and what it writes."""

import argparse
import json
from types import SimpleNamespace

import pytest

from bench import docs, serving
from bench.llava import SIZES
from vmtc_kernels import CMAIConfig, VMTCConfig

OPTIONS = argparse.Namespace(words=3, answer=4)


def run(commit="abc", date="2026-01-01", dirty=False, factor=2.0):
    """A run of three rounds, with compression ``factor`` times as fast."""

    def rounds(speed):
        return [
            {"requests_per_s": speed * n, "ttft_ms": 100 * n / speed, "ttft_ms_p90": 1.0}
            for n in (1.0, 1.1, 0.9)
        ]

    environment = {"commit": commit, "date": date, "dirty": dirty, "versions": {"vllm": "vllm 1"}}
    environment |= {"cpu": "a cpu", "cpu_capability": "AVX2", "threads": 2, "device": "cpu"}
    environment["versions"] |= {"torch": "2"}
    rows = [
        {"name": "vLLM", "prompt_tokens": 608, "blocks": 5, "rounds": rounds(1.0)},
        {"name": "VMTC", "prompt_tokens": 192, "blocks": 2, "rounds": rounds(factor)},
    ]
    params = {"model": "small", "image_tokens": 576, "concurrency": 8, "words": 32, "answer": 16}
    params |= {"rounds": 3, "requests": 9, "primary": 128, "merged": 64}
    return {"serving": {"environment": environment, "params": params, "rows": rows}}


def test_ratios_are_of_the_same_round():
    noisy = run()["serving"]
    noisy["rows"][1]["rounds"][2]["requests_per_s"] *= 3
    assert serving.ratios(noisy, noisy["rows"][1], "requests_per_s") == pytest.approx([2, 2, 6])
    assert serving.ratios(noisy, noisy["rows"][0], "requests_per_s") == [1, 1, 1]


def test_summary():
    lines = serving.summary(run()["serving"]).splitlines()
    cells = "1.00 [0.90, 1.10] | 1.00x [1.00, 1.00] | 100 [90, 110] | 1.00x [1.00, 1.00]"
    assert lines[2] == f"| vLLM | 608 tokens | 5 | {cells} |"
    cells = "2.00 [1.80, 2.20] | 2.00x [2.00, 2.00] | 50 [45, 55] | 0.50x [0.50, 0.50]"
    assert lines[3] == f"| VMTC | 192 tokens | 2 | {cells} |"


def test_pages_have_the_newest_run_of_a_clean_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    assert docs.serving_table([], page) == ""
    kept = {
        "a": run("old", "2026-01-01", factor=3.0),
        "b": run("new", "2026-01-02"),
        "c": run("dirty", "2026-01-03", dirty=True, factor=4.0),
    }
    for name, each in kept.items():
        (tmp_path / f"serving-{name}.json").write_text(json.dumps(each))
    text = docs.serving_table([], page)
    assert "2.00x" in text and "serving-b.json" in text and "vllm 1" in text
    assert "VMTC leaves 128 + 64 tokens, CMAI inhibits in all layers" in text


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    return folder, *serving.save(folder, SIZES["tiny"])


def honest(model, processor, given, spoil=lambda text, tokens: (text, tokens)):
    """A server that answers as transformers does, one after the other; ``spoil`` what it says."""
    from vmtc_kernels.integrations.transformers import attach

    vmtc = VMTCConfig(**given.get("vmtc", {"num_primary": 1.0, "num_merged": 0.0}))
    cmai = CMAIConfig(**given["cmai"]) if "cmai" in given else None
    answers = {}
    with attach(model, processor, vmtc=vmtc, cmai=cmai) as handle:
        for seed in range(3):
            words = serving.words_of(OPTIONS.words, seed, SIZES["tiny"])
            photo = serving.photo(seed, SIZES["tiny"].image)
            inputs = handle.prepare(images=photo, text=f"<image> {words}")
            length = inputs["input_ids"].shape[1]
            ids = model.generate(**inputs, max_new_tokens=OPTIONS.answer, do_sample=False)
            answers[seed] = spoil(processor.decode(ids[0, length:]), length)
    return SimpleNamespace(
        name="a server", given=given, ask=lambda seed, *_: (*answers[seed], 3 - seed)
    )


VMTC = {"num_primary": 20, "num_merged": 5}


@pytest.mark.parametrize(
    "given", [{}, {"vmtc": VMTC}, {"vmtc": VMTC, "cmai": {"keep_ratio": 0.1}}], ids=str
)
def test_gate(saved, given):
    _, model, processor = saved
    size = SIZES["tiny"]
    found = serving.gate(honest(model, processor, given), model, processor, size, OPTIONS)
    tokens = 25 if given else size.grid
    assert found == {"prompt_tokens": tokens + OPTIONS.words, "blocks": 3}
    for spoil in (
        lambda text, tokens: (text + " w5", tokens),
        lambda text, tokens: (text.replace("w", "v", 1), tokens),
        lambda text, tokens: (text, tokens + 1),
    ):
        server = honest(model, processor, given, spoil)
        with pytest.raises(RuntimeError, match="nothing is timed"):
            serving.gate(server, model, processor, size, OPTIONS)
    # another server's answers do not pass for its own
    other = honest(
        model,
        processor,
        {"vmtc": {**VMTC, "weighting": "uniform", "num_primary": 5, "num_merged": 20}},
    )
    other.given = given
    with pytest.raises(RuntimeError, match="nothing is timed"):
        serving.gate(other, model, processor, size, OPTIONS)


def test_the_model_as_vllm_and_transformers_read_it(saved):
    import transformers
    from safetensors.torch import load_file

    folder, model, processor = saved
    names = load_file(folder / "model.safetensors")
    assert any(name.startswith("vision_tower.vision_model.encoder") for name in names)
    assert not any(name.startswith("vision_tower.encoder") for name in names)
    again = transformers.AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "w7 w9"}]
    text = again.apply_chat_template([{"role": "user", "content": content}])
    photo = serving.photo(0, SIZES["tiny"].image)
    ids = again(images=photo, text=text, return_tensors="pt")["input_ids"]
    assert ids.tolist() == [[1] * SIZES["tiny"].grid + [7, 9]]
    assert again.decode(ids[0, -2:]) == "w7 w9"
    assert model.config.image_token_index == 1
    assert processor.tokenizer.vocab_size == SIZES["tiny"].vocabulary
