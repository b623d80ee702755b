"""The benchmark of a whole model: its rivals, its gate, its record and its tables, in tiny."""
# the extras of the harness may be missing: it is imported after a look

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

# bench is a folder of the project and not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("threadpoolctl")
pytest.importorskip("rich")
pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("pytest_benchmark")

from bench import (
    bench_llava,
    environment,
    gpu_timing,
    llava,
    llava_docs,
    llava_rivals,
    memory,
    runner,
    suites,
    summary,
)
from bench.llava import Call, First, Ours, Prompt, Stage, Variant
from bench.llava_rivals import FastV, VisionZip
from bench.machine import CPU, Machine
from bench.record import read, write
from bench.runner import Effort
from vmtc_kernels import VMTCConfig

TINY = llava.SIZES["tiny"]
PROMPT = Prompt(2, 5, 4)
SETUP = bench_llava.Setup("tiny", 2, 40, TINY.grid, "float32", before=5, after=4, new_tokens=3)
RIVALS = ["unmodified", "VisionZip", "FastV", "as many tokens"]
NAMES = ["VMTC", "VMTC + CMAI", *RIVALS]


@pytest.fixture(scope="module", autouse=True)
def judged():
    """The tiny model has aims as others have."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_llava, "TOYS", ())
        yield


@pytest.fixture(scope="module")
def stage():
    return Stage(TINY, "cpu", torch.float32)


@pytest.fixture
def providers(stage):
    case = bench_llava.case(SETUP, CPU, stage)
    yield {provider.name: provider for provider in case.providers}
    stage.clear()


def logits(stage, variant, prompt=PROMPT):
    out = Call(stage, variant, prompt, 2, 1)().logits[0]
    stage.clear()
    return out


@pytest.fixture(scope="module")
def record(tmp_path_factory, judged):
    """A kept run of one image with each number of tokens."""
    out = tmp_path_factory.mktemp("llava") / "result.json"
    planned = suites.plan(CPU, ["llava"], only="B=1 ", size="tiny")
    results = [asdict(each.run(Effort(1, 1.0, quick=True), runner.CPU)) for each in planned]
    write(out, environment.describe(1), results)
    return read(out)


def test_run_is_recorded_with_what_it_depends_on(record):
    described = record.environment
    assert {"date", "commit", "dirty", "cpu", "threads"} <= set(described)
    assert described["versions"]["transformers"] and described["versions"]["torch"]
    assert [r["params"]["tokens"] for r in record.results] == [40, 48, 16]
    for result in record.results:
        tokens, facts = result["params"]["tokens"], result["facts"]
        assert [row["name"] for row in result["rows"]] == NAMES
        for row in result["rows"]:
            assert row["status"] == "ok" and len(row["samples_ms"]) == 3
            own = facts["rows"][row["name"]]
            assert len(own["decode_ms"]["samples"]) == 2 and own["tokens_per_second"] > 0
            assert own["peak_bytes"] > own["cache_bytes"]
            assert ("over_least" in own) == (row["name"] not in ("unmodified", "as many tokens"))
            assert ("operators_ms" in own) == row["name"].startswith("VMTC")
        # keys and values of three layers, 32 features in float32
        held = {name: own["cache_bytes"] / (2 * 32 * 4) for name, own in facts["rows"].items()}
        assert held["unmodified"] == 3 * (144 + 64)
        assert held["VMTC"] == held["VisionZip"] == held["as many tokens"] == 3 * (tokens + 64)
        assert held["FastV"] == 2 * (144 + 64) + tokens + 64
        assert held["VMTC + CMAI"] > held["VMTC"]
        assert facts["encoder_share"]["tiny"] == pytest.approx(
            facts["flops"]["encoder"] / sum(facts["flops"].values())
        )
    assert [bool(r["targets"]) for r in record.results] == [True, False, False]


def test_real_shares_of_the_work():
    shares = {n: bench_llava.encoder_share(s.flops(s.grid, 64)) for n, s in llava.SIZES.items()}
    assert shares["7b"] == pytest.approx(0.043, abs=1e-3)
    assert shares["small"] == pytest.approx(shares["7b"], rel=0.2)
    assert llava.SIZES["7b"].grid == llava.SIZES["small"].grid == 576


def test_products_are_those_that_torch_counts(stage):
    call = Call(stage, Variant("unmodified", TINY, TINY.grid), Prompt(1, 5, 4), 2, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    length, (width, depth) = TINY.grid + 9, TINY.text[:2]
    # torch counts the whole square of causal attention
    above = depth * 2 * width * length * (length - 1)
    counted = counter.get_total_flops() - above
    # some versions of transformers make the angles of rotary positions by a product
    assert counted == pytest.approx(sum(TINY.flops(TINY.grid, 9).values()), rel=1e-4)


def test_tables(record):
    record = deepcopy(record)
    results = record.results
    results[0]["rows"][0]["ms"] = {"median": 2.0, "p20": 1.5, "p80": 2.5}
    results[0]["rows"][2]["ms"]["median"] = 5.0
    results[0]["facts"]["rows"]["VMTC"] |= {
        "over_least": {"median": 0.012, "p20": -0.003, "p80": 0.02},
        "operators_ms": {"median": 0.25},
        "tokens_per_second": 41.4,
        "cache_bytes": 2**20,
        "peak_bytes": 3 * 2**20,
    }
    results[1]["rows"][3] |= {"ms": None, "status": "failed"}
    del results[1]["facts"]["rows"]["VisionZip"]
    text = llava_docs.section(record)
    assert "LLaVA-1.5 of size tiny, float32" in text
    share = results[0]["facts"]["encoder_share"]["tiny"]
    assert f"does {share:.1%} of the products" in text and "(7b: 4.3%)" in text
    lines = text.splitlines()
    assert (
        "| 40 | VMTC | 2.0 [1.5, 2.5] | 2.50x | 1.2% [-0.3%, 2.0%] | 0.25 | 41 | 1.0 | 3 |" in lines
    )
    assert "| 48 | VisionZip | failed |  |  |  |  |  |  |" in lines
    rows = [line for line in lines if line[:4] in ("| 14", "| 48", "| 40", "| 16")]
    assert [line.split(" | ")[0] for line in rows] == (
        ["| 144"] + ["| 48"] * 5 + ["| 40"] * 5 + ["| 16"] * 5
    )
    assert all(line.count("|") == 10 for line in rows)

    results[0]["rows"][1]["ms"]["median"] = 4.0
    held = results[0]["facts"]["rows"]
    held["unmodified"]["cache_bytes"], held["VMTC + CMAI"]["cache_bytes"] = 2**22, 2**21
    said = llava_docs.sentence(record)
    assert "With 40 of 144 tokens" in said
    assert "2.5 times sooner for one image (1.2 with CMAI in all layers on top)" in said
    assert "shrinks to 25% (50% with CMAI's state)" in said


def test_every_variant_passes_the_gate_and_leaves_the_model_as_it_was(stage, providers):
    def hooks():
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in stage.model.modules()]

    stage.clear()
    before, hooked = logits(stage, Variant("unmodified", TINY, TINY.grid)), hooks()
    for provider in providers.values():
        found = provider.verify(provider.run())
        assert found.ok, (provider.name, found)
        stage.clear()
        assert hooks() == hooked
        assert torch.equal(logits(stage, Variant("unmodified", TINY, TINY.grid)), before)


def _lose_a_token(tokens):
    tokens = tokens.clone()
    tokens[:, 3] = tokens[:, 4]
    return tokens


def test_wrong_merge_is_not_timed(providers, monkeypatch):
    merge = VMTCConfig.merge
    for name in ("VMTC", "VMTC + CMAI"):
        assert providers[name].verify(providers[name].run()).ok

    def wrong(self, *args, **options):
        few = merge(self, *args, **options)
        return few._replace(tokens=_lose_a_token(few.tokens))

    monkeypatch.setattr(VMTCConfig, "merge", wrong)
    for name in ("VMTC", "VMTC + CMAI"):
        found = providers[name].verify(providers[name].run())
        assert not found.ok and "against the reference" in found.detail


def test_wrong_inhibition_is_not_timed(stage, providers):
    call = providers["VMTC + CMAI"].run
    assert providers["VMTC + CMAI"].verify(call()).ok
    stage.clear()
    call.variant.cmai = replace(call.variant.cmai, keep_ratio=0.4)
    found = providers["VMTC + CMAI"].verify(call())
    assert not found.ok and "against the reference" in found.detail


def test_wrong_rivals_are_not_timed(providers, monkeypatch):
    visionzip = llava_rivals.visionzip
    monkeypatch.setattr(llava_rivals, "visionzip", lambda *a: _lose_a_token(visionzip(*a)))
    found = providers["VisionZip"].verify(providers["VisionZip"].run())
    assert not found.ok and "against a loop" in found.detail

    monkeypatch.setattr(FastV, "left", lambda self, layer: 40)
    found = providers["FastV"].verify(providers["FastV"].run())
    assert not found.ok and "[153, 153, 49], expected [49, 49, 49]" in found.detail

    monkeypatch.setattr(First, "reduce", lambda self, x: x[:, :40] * torch.nan)
    found = providers["as many tokens"].verify(providers["as many tokens"].run())
    assert (found.ok, found.detail) == (False, "logits are not finite")


def test_visionzip_is_what_its_loop_says():
    generator = torch.Generator().manual_seed(0)
    x, keys = torch.randn(2, 3, 50, 8, generator=generator, dtype=torch.float64)
    scores = torch.rand(3, 50, generator=generator, dtype=torch.float64)
    for dominant, contextual in ((20, 7), (1, 1), (10, 40), (45, 5)):
        found = llava_rivals.visionzip(x, scores, keys, dominant, contextual)
        count = dominant + contextual
        looped = [
            llava_rivals.visionzip_loop(*one, contextual, count)
            for one in zip(x, scores, keys, strict=True)
        ]
        torch.testing.assert_close(found, torch.stack(looped))
    # by hand: token 2 leads; of 0, 1, 3, 4 the targets are 0 and 3, to whose keys 4 and 1 belong
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0], [16.0]])
    keys = torch.tensor([[1.0, 0], [0, 2], [1, 1], [0, 1], [3, 1]])
    scores = torch.tensor([0.1, 0.1, 0.5, 0.1, 0.1])
    assert llava_rivals.visionzip_loop(x, scores, keys, 2, 3).flatten().tolist() == [4, 8.5, 5]


def test_visionzip_scores_by_the_attention_of_cls(stage):
    variant = VisionZip("VisionZip", TINY, 40)
    call = Call(stage, variant, PROMPT, 2, 1)
    call()
    stage.clear()
    tower = stage.model.model.vision_tower
    stage.model.set_attn_implementation({"vision_config": "eager"})
    weights = tower(call.inputs["pixel_values"], output_attentions=True).attentions[-2]
    stage.model.set_attn_implementation({"vision_config": "sdpa"})
    torch.testing.assert_close(variant.seen[1], weights[0, :, 0, 1:].mean(0))


def test_fastv_is_a_mask_over_what_the_last_token_attends_to_least(stage):
    fastv = FastV("FastV", TINY, 40, PROMPT.before)
    short = logits(stage, fastv)
    inputs = Call(stage, Variant("unmodified", TINY, TINY.grid), PROMPT, 2, 1).inputs
    model, first, end = stage.model, PROMPT.before, PROMPT.before + TINY.grid
    model.set_attn_implementation({"text_config": "eager"})
    weights = model(**inputs, output_attentions=True).attentions[1]  # [B, H, L, L]
    model.set_attn_implementation({"text_config": "sdpa"})

    places = weights[:, :, -1, first:end].mean(1).topk(TINY.grid - 40, largest=False).indices
    length = inputs["input_ids"].shape[1]
    stays = torch.ones(2, length, dtype=torch.bool).scatter(1, places + first, False)
    assert [row.nonzero()[:, 0].tolist() for row in stays] == fastv.kept.tolist()
    mask = (stays[:, None] | torch.eye(length, dtype=torch.bool)).tril()[:, None]
    with ExitStack() as stack:
        for layer in model.model.language_model.layers[FastV.LAYER :]:
            hook = layer.register_forward_pre_hook(
                lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask}), with_kwargs=True
            )
            stack.callback(hook.remove)
        masked = model(**inputs, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(short, masked, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(short, model(**inputs, logits_to_keep=1).logits[:, -1], atol=1e-2)


def test_fastv_that_keeps_all_changes_nothing(stage):
    kept = logits(stage, FastV("FastV", TINY, TINY.grid, PROMPT.before))
    plain = logits(stage, Variant("unmodified", TINY, TINY.grid))
    torch.testing.assert_close(kept, plain, rtol=1e-5, atol=1e-5)


def test_clock_starts_after_the_variant_is_in_place_and_stops_at_the_first_token(monkeypatch):
    now, variant = [0.0], Variant("v", TINY, 40)

    def passes(seconds):
        now[0] += seconds

    def generate(max_new_tokens, streamer, **_):
        passes(1.0)
        streamer.put(torch.zeros(1))  # the prompt
        for token in range(max_new_tokens):
            passes(0.25 if token else 4.0)
            streamer.put(torch.zeros(1))
        passes(64.0)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    fake = SimpleNamespace(
        device="cpu",
        put=lambda _: passes(16.0),
        inputs=lambda *_: {},
        model=SimpleNamespace(generate=generate),
    )
    call = Call(fake, variant, PROMPT, 5, decodes=2)
    assert [call.sample() for _ in range(4)] == [5.0] * 4
    assert call.steps == [0.25] * 2


class Processor:
    """Stands in for a GPU's memory and clock."""

    def peak(self, call):
        return memory.peak_workspace(call)

    def measure(self, call, calls):
        raise AssertionError("an answer is timed from the host")


def test_on_a_gpu_the_aims_are_compared(monkeypatch):
    monkeypatch.setattr(gpu_timing, "Cuda", Processor)
    pretended = Machine("cpu", gpu=True)
    usual = bench_llava.suite().setups(pretended)
    assert usual[0] == bench_llava.Setup("7b", 8, 160, 576, "bfloat16")
    assert len(usual) == 9 and {setup.dtype for setup in usual} == {"bfloat16"}
    suite = bench_llava.suite("tiny")
    setup = replace(suite.setups(pretended)[0], new_tokens=2)
    result = suite.run(setup, pretended, Effort(1, 1.0, quick=True), runner.silent)
    assert all(row.status == "ok" for row in result.rows), result.rows
    aims = [(t["against"], t["factor"], t["named"]) for t in result.targets]
    assert aims == [
        ("rival", 2.5, "unmodified"),
        ("floor", 1.01, ""),
        ("floor", 1.05, "VMTC (VMTC + CMAI)"),
    ]
    rows = {row.name: row.ms["median"] for row in result.rows}
    assert result.targets[2]["ratio"] == pytest.approx(rows["VMTC + CMAI"] / rows["VMTC"])
    assert result.others_busy is None and all(t["met"] is not None for t in result.targets)
    # its page reads it
    ceilings = {"copy_bytes_per_s": 4e12, "flops_per_s": 8e14, "dtype": "bfloat16"}
    text = "\n".join(summary._table(asdict(result), ceilings))
    assert "| unmodified | " in text and "tokens/s" in text


def test_operators_are_watched_by_events_on_a_gpu(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = 1.0 if self.at is None else None

        def elapsed_time(self, other):
            assert (self.at, other.at) == (1.0, 1.0)
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    watched = llava.Watched()
    with watched._noted(cuda=True):
        pass
    with watched._noted(cuda=False):
        time.sleep(0.01)
    on_gpu, on_cpu = (seconds() for seconds in watched.spent)
    assert on_gpu == pytest.approx(0.003) and 0.01 <= on_cpu < 1


def test_weights_are_counted_as_torch_does(stage):
    assert sum(p.numel() for p in stage.model.parameters()) == TINY.parameters
    case = bench_llava.case(SETUP, CPU, stage)
    assert case.cost.bytes == 4 * (TINY.parameters + 2 * 2 * 3 * (40 + 9) * 32)
    assert llava.SIZES["7b"].parameters == pytest.approx(7.06e9, rel=0.01)


def test_a_quick_run_is_about_the_aims():
    planned = suites.plan(CPU, ["llava"], size="tiny", quick=True)
    assert [each.setup.tokens for each in planned] == [40, 40]


def test_a_toy_has_no_aims(monkeypatch):
    monkeypatch.setattr(bench_llava, "TOYS", ("tiny",))
    assert not bench_llava.case(SETUP, CPU, Stage(TINY, "cpu", torch.float32)).targets
    real = [each.case for each in suites.plan(CPU, ["llava"], quick=True, size="small")]
    assert [bool(case.targets) for case in real] == [True, True]


def test_a_machine_without_transformers_is_told(monkeypatch):
    monkeypatch.setattr(bench_llava, "load", lambda *_: (None, "transformers does not import"))
    (each, _) = suites.plan(CPU, ["llava"], size="tiny", quick=True)
    result = each.run(Effort(1, 1.0, quick=True), runner.CPU)
    assert {row.status for row in result.rows} == {"missing"}


def test_transformers_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'transformers>=5\.17'"):
        assert Stage(TINY, "cpu", torch.float32).model


def test_ours_keeps_four_fifths():
    ours = Ours("VMTC", TINY, 40, None, inhibits=False)
    assert (ours.vmtc.num_primary, ours.vmtc.num_merged) == (32, 8)
    assert VisionZip("VisionZip", TINY, 64).contextual == 10
