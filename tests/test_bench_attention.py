"""Attention of others in the benchmarks: each against plain attention, packages by a stand-in that
checks how they are called."""
# bench is a folder of the project and not installed
# ruff: noqa: E402

from __future__ import annotations

import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import vmtc_kernels
from bench import attention, attention_packages, packages
from bench.focus import Setup, near, problem

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02}
SETUP = Setup(B=2, H=4, G=2, d=16, before=5, images=70, after=13)
SETUPS = [
    replace(SETUP, phase=phase, G=G, dtype=dtype)
    for phase in ("prefill", "decode")
    for G, dtype in ((2, "float32"), (4, "float32"), (1, "bfloat16"))
]


def name(value):
    return getattr(value, "name", None) or str(value).replace("torch.", "")


# ---- attention


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_sdpa_attends_as_it_should(setup):
    given = problem(setup)
    mask = attention.Mask.of(given)
    results = {True: given.masked(mask.allowed), False: given.causal()}
    assert not near(*results.values(), 0.02, rows=0.1).ok
    found = {way.name: way for way in attention.sdpa(setup, "cpu")}
    assert len(found) == 8
    for way in found.values():
        if way.missing:
            assert way.name.split()[1].strip(",") in ("cuDNN", "efficient")
            continue
        got = way.prepare(given, mask)()
        verdict = near(got, results[way.inhibits], TOLERANCES[given.q.dtype], rows=0.0)
        assert verdict.ok and got.dtype == given.q.dtype, (way.name, verdict.detail)
    assert sum(way.missing is None for way in found.values()) == 4


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_keys_are_copied_for_kernels_without_groups(setup, masked, monkeypatch):
    given = problem(setup)
    mask = attention.Mask.of(given)
    grouped = []
    plain = attention.scaled_dot_product_attention

    def sdpa(q, k, v, **options):
        grouped.append(options["enable_gqa"] or q.shape[1] != k.shape[1])
        return plain(q, k, v, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", sdpa)
    got = attention._sdpa(attention.KERNELS["math"], masked, copies=True)(given, mask)()
    expected = given.masked(mask.allowed) if masked else given.causal()
    assert near(got, expected, TOLERANCES[given.q.dtype], rows=0.0).ok
    assert grouped == [False]


def test_what_torch_refuses_is_said_in_its_words(monkeypatch):
    def refuses(q, k, v, attn_mask, is_causal, enable_gqa):
        if enable_gqa:
            for text in (
                "cuDNN attention has been runtime disabled.",
                "Flash attention kernel not used because:",
                "no groups. (Triggered internally at sdp_utils.cpp:1)",
            ):
                warnings.warn(text, stacklevel=1)
            raise RuntimeError("No available kernel.\nAborting.")
        assert is_causal != (attn_mask is not None)
        if attn_mask is not None:
            raise RuntimeError("No available kernel.\nAborting.")
        return q

    monkeypatch.setattr(attention, "scaled_dot_product_attention", refuses)
    assert attention._refusal("flash", SETUP, "cpu", masked=False) == "no groups."
    alike = replace(SETUP, G=4)
    assert attention._refusal("flash", alike, "cpu", masked=True) == "No available kernel."
    assert attention._refusal("flash", alike, "cpu", masked=False) is None
    if not torch.cuda.is_available():
        assert "CUDA" in attention.kernel("flash", SETUP, "cuda", masked=False)[1]
    refusal = attention._refusal
    monkeypatch.setattr(attention, "_refusal", lambda n, s, _, m: refusal(n, s, "cpu", m))
    assert attention.kernel("flash", SETUP, "cuda", masked=False) == (True, None)
    assert attention.kernel("flash", alike, "cuda", masked=False) == (False, None)
    for setup in (SETUP, alike):
        refused = attention.kernel("flash", setup, "cuda", masked=True)
        assert refused == (setup is SETUP, "No available kernel.")
    (way, *_) = attention.sdpa(SETUP, "cuda")
    assert way.scope == "attention alone, nothing inhibited, copies grouped keys"
    long = replace(SETUP, images=1 << 15)
    assert attention.kernel("math", long, "cuda", masked=True)[1] == "it keeps 34 GB of weights"


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("images", [31, 32, 70])
def test_both_forms_of_the_mask_say_the_same(phase, images):
    given = problem(replace(SETUP, phase=phase, images=images))
    mask, setup = attention.Mask.of(given), given.setup
    b, i, j = (
        torch.arange(count).view(shape)
        for count, shape in (
            (setup.B, (-1, 1, 1)),
            (setup.queries, (-1, 1)),
            (setup.length, (-1,)),
        )
    )
    for form in (attention._of_bools, attention._of_words):
        counts = form(setup, mask)(b, torch.tensor(0), i, j)
        assert torch.equal(counts, mask.allowed[:, 0]), form
    assert 0 < (~mask.allowed[:, :, -1]).sum() < setup.B * images


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("which", "phase"),
    [
        ("FlexAttention of bool, making its mask", "prefill"),
        ("FlexAttention of words, ready mask", "decode"),
    ],
)
def test_flex_attention_compiles_once_for_all_inputs(which, phase, monkeypatch):
    # of less than a block of keys the compiler makes C++ that none takes
    setup = replace(SETUP, phase=phase, after=60)
    (way,) = [way for way in attention.flex(setup, "cpu") if way.name == which]
    making = "making" in which
    assert way.scope == (attention.MAKING if making else attention.ALONE) and way.slow
    compiled, make = attention._compiled()
    assert torch._dynamo.config.recompile_limit >= 256
    made = []

    def block_mask(*args, **options):
        made.append(options)
        # the other makes it beforehand, in any way
        return (make if making else flex_attention.create_block_mask)(*args, **options)

    monkeypatch.setattr(attention, "_compiled", lambda: (compiled, block_mask))
    graphs = []
    for seed in (0, 1):
        given = problem(setup, seed=seed)
        mask = attention.Mask.of(given)
        with torch.inference_mode():
            attend = way.prepare(given, mask)
            got = attend()
            attend()
        assert near(got, given.masked(mask.allowed), 1e-5, rows=0.0).ok
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
    assert len(made) == (4 if making else 2)


def test_flex_attention_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert all("compiler" in way.missing for way in attention.flex(SETUP, "cpu"))
    assert not any(way.missing for way in attention.flex(SETUP, "cuda"))


@pytest.mark.parametrize("cls_index", [None, 0, 3, 36])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=name)
def test_eager_attention_returns_its_output_and_importance(dtype, cls_index):
    q, k, v = (torch.randn(2, heads, 37, 8).to(dtype) for heads in (4, 2, 2))
    out, scores = attention.importance_from_eager(q, k, v, cls_index)
    plain = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    with vmtc_kernels.use_backend("reference"):
        expected = vmtc_kernels.token_importance(
            q.double(), k.double().repeat_interleave(2, 1), cls_index=cls_index
        )
    assert near(out, plain, TOLERANCES[dtype], rows=0.0).ok
    assert near(scores[:, None], expected[:, None], TOLERANCES[dtype], rows=0.0).ok
    assert (scores.dtype, out.dtype) == (torch.float32, dtype)


# ---- packages of attention


def masked_attention(q, k, v, allowed):
    """Of one sequence, [L, heads, d]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed[None, None], enable_gqa=True
    )
    return out[0].transpose(0, 1)


def bottom_right(queries, length):
    return torch.ones(queries, length, dtype=torch.bool).tril(length - queries)


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """As in flash-attn 2.8: [B, L, heads, d], half types, the mask at the bottom right."""
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert k.shape == v.shape and q.shape[2] % k.shape[2] == 0 and q.shape[3] % 8 == 0
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and (dropout_p, softmax_scale) == (0.0, None)
    allowed = bottom_right(q.shape[1], k.shape[1])
    allowed = allowed if causal else torch.ones_like(allowed)
    return torch.stack([masked_attention(*x, allowed) for x in zip(q, k, v, strict=True)])


class Ragged:
    """As in FlashInfer 0.6: planned first, sequences of all lengths in one row."""

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        assert float_workspace_buffer.numel() == 128 * 1024 * 1024

    def plan(
        self,
        qo_indptr,
        kv_indptr,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        head_dim_vo=None,
        custom_mask=None,
        packed_custom_mask=None,
        causal=False,
        q_data_type="float16",
    ):
        assert qo_indptr.dtype == kv_indptr.dtype == torch.int32 and packed_custom_mask is None
        self.starts = [x.tolist() for x in (qo_indptr, kv_indptr)]
        sizes = [x.diff().tolist() for x in (qo_indptr, kv_indptr)]
        pairs = list(zip(*sizes, strict=True))
        self.heads, self.dtype = (num_qo_heads, num_kv_heads, head_dim_qk), q_data_type
        self.masks = [bottom_right(*pair) for pair in pairs]
        if custom_mask is not None:
            assert not causal and custom_mask.dtype == torch.bool and custom_mask.dim() == 1
            rows = custom_mask.split([queries * length for queries, length in pairs])
            self.masks = [row.view(pair) for row, pair in zip(rows, pairs, strict=True)]
        else:
            assert causal

    def run(self, q, k, v):
        heads, groups, d = self.heads
        (*_, queries), (*_, length) = self.starts
        assert q.shape == (queries, heads, d) and k.shape == v.shape == (length, groups, d)
        assert q.dtype == k.dtype == v.dtype == self.dtype
        out = torch.empty_like(q)
        for i, allowed in enumerate(self.masks):
            (a, b), (c, e) = (starts[i : i + 2] for starts in self.starts)
            out[a:b] = masked_attention(q[a:b], k[c:e], v[c:e], allowed)
        return out


@pytest.mark.parametrize("setup", [one for one in SETUPS if one.dtype == "bfloat16"], ids=str)
@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface", "flashinfer"])
def test_packages_are_called_as_they_want(package, setup, monkeypatch):
    called = []

    def cached(q, k_cache, v_cache, k=None, v=None, causal=False):
        assert k is None and v is None
        called.append("decode")
        return flash_attn_func(q, k_cache, v_cache, causal=causal)

    def whole(q, k, v, causal=False):
        called.append("prefill")
        out = flash_attn_func(q, k, v, causal=causal)
        return (out, None) if package == "flash_attn_interface" else out

    module = SimpleNamespace(
        flash_attn_func=whole,
        flash_attn_with_kvcache=cached,
        BatchPrefillWithRaggedKVCacheWrapper=Ragged,
    )
    monkeypatch.setitem(sys.modules, package, module)
    # a stand-in runs on this processor
    monkeypatch.setattr(attention_packages, "_cannot", lambda *_: None)
    given = problem(setup)
    mask = attention.Mask.of(given)
    found = [way for way in attention_packages.ways(setup, "cpu") if not way.missing]
    assert len(found) == (2 if package == "flashinfer" else 1)
    for way in found:
        expected = given.masked(mask.allowed) if way.inhibits else given.causal()
        got = way.prepare(given, mask)()
        assert got.shape == given.q.shape
        assert near(got, expected, 0.02, rows=0.0).ok, way.name
        assert way.scope == (attention.ALONE if way.inhibits else attention.PLAIN)
    assert called == ([] if package == "flashinfer" else [setup.phase])


def test_packages_tell_why_they_are_missing(monkeypatch):
    for way in attention_packages.ways(SETUP, "cpu"):
        assert way.missing == "it works on GPUs alone"
    for way in attention_packages.ways(SETUP, "cuda"):
        assert way.missing == "it takes half types alone"
    half = replace(SETUP, dtype="bfloat16")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash-attn does not import" in attention_packages.ways(half, "cuda")[0].missing

    def broken(name):
        raise OSError("undefined symbol")

    monkeypatch.setattr(packages.importlib, "import_module", broken)
    assert packages.load("a", "b") == (None, "b does not import: undefined symbol")
    assert packages.load("a", "b", "no") == (None, "no")


def test_flash_colsum_is_called_as_it_wants(monkeypatch):
    def flash_colsum(query, key, scale=None, is_causal=False, cls_len=None):
        assert query.shape == key.shape and query.dim() == 4
        assert cls_len is None or cls_len == 1
        weights = (query @ key.mT * query.shape[3] ** -0.5).softmax(-1)
        return weights[:, :, :cls_len].mean((1, 2)).half()

    monkeypatch.setitem(sys.modules, "flash_colsum", SimpleNamespace(flash_colsum=flash_colsum))
    q, k = torch.randn(2, 2, 3, 64, 8)
    for cls_index in (None, 0):
        function, missing = attention_packages.flash_colsum(cls_index, "cuda")
        expected = vmtc_kernels.token_importance(q, k, cls_index=cls_index)
        assert missing is None and near(function(q, k), expected, 0.01, rows=0.0).ok
    assert attention_packages.flash_colsum(3, "cuda") == (None, "its [CLS] tokens come first")
    assert attention_packages.flash_colsum(0, "cpu") == (None, "it works on GPUs alone")
    monkeypatch.setitem(sys.modules, "flash_colsum", None)
    assert "does not import" in attention_packages.flash_colsum(0, "cuda")[1]
