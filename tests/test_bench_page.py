"""The report of a folder of runs: arithmetic, charts, the page, and the page in a browser."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import itertools
import json
import math
import random
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

# bench is a folder of the project and not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("threadpoolctl")
matplotlib = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from bench import page, record
from bench.case import OWN_RULE
from bench.page import canvas, charts, facts, growth, roofline, sweeps
from bench.page.style import COLOURS, styles

MARK = "\"><script>alert('x')</script> & $\\alpha_1$"
REASON = "ImportError: <img src=x onerror=alert(1)> is missing"
CEILINGS = {"copy_bytes_per_s": 2e10, "flops_per_s": 1e11, "dtype": "float32"}


def environment(**changes):
    return {
        "date": "2026-03-01T10:00:00+00:00",
        "command": "vmtc bench",
        "commit": "abcdef012345",
        "dirty": False,
        "device": "cpu",
        "cpu": "Some Processor",
        "cpu_capability": "AVX2",
        "cores": 4,
        "threads": 2,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "faiss-cpu": None},
        "ceilings": CEILINGS,
        **changes,
    }


def row(name, kind, ms=None, scope="everything", spread=0.1, **changes):
    """A provider, timed where it has milliseconds; p20 and p80 lie a share of them away."""
    timed = ms is not None
    low, high = (ms * (1 - spread), ms * (1 + spread)) if timed else (None, None)
    found = {
        "name": name,
        "kind": kind,
        "scope": scope,
        "status": "ok" if timed else "missing",
        "detail": "0 labels differ" if timed else REASON,
        "ms": {"median": ms, "p20": low, "p80": high} if timed else None,
        "calls_per_sample": 3,
        "samples_ms": [low, ms, ms, high] if timed else [],
        "host_ms": None,
        "peak_bytes": 3 << 20 if timed else None,
    }
    return {**found, **changes}


def result(suite, params, rows, axis=None, images=4, **changes):
    found = {
        "suite": suite,
        "params": params,
        "axis": axis,
        "images": images,
        "unit": "sequence" if suite in ("focus", "decode") else "image",
        "cost": {"bytes": 10**6, "flops": 10**8},
        "rows": rows,
        "targets": [],
        "workspace": None,
        "others_busy": 0.0,
        "facts": {},
    }
    return {**found, **changes}


def sweep_over(axis, sizes, rows_of, **changes):
    params = {"data": "blobs", "D": 1024, "dtype": "float32", **changes}
    follows = {"N": lambda n: {"P": n // 4}}.get(axis, lambda n: {})
    return [
        result("merge", {**params, axis: n, **follows(n)}, rows_of(n), axis,
               images=n if axis == "B" else 4)
        for n in sizes
    ]  # fmt: skip


SIZES = (144, 576, 1024, 4096, 16384)


def of_size(n):
    """Ours wins from 4096 tokens on; the last size is too much for one of the rivals."""
    return [
        row("merge_tokens, cpu", "ours", 0.02 + n / 4e4),
        row("merge_tokens, reference", "reference", n / 50),
        row("faiss", "rival", n**1.2 / 1e5, "clustering alone", peak_bytes=None),
        row("torch Gram, compiled, graph", "rival", None if n > 9999 else n**2 / 1e5,
            status="failed" if n > 9999 else "ok"),
        row("flash-kmeans' kernels, graph", "rival"),
    ]  # fmt: skip


def cpu_run():
    usual = [
        row("merge_tokens, cpu", "ours", 1.0),
        row("merge_tokens, reference", "reference", 30.0),
        row("faiss", "rival", 2.5, "clustering alone"),
        row("torch Gram", "rival", 3.5, "clustering alone"),
        row("ToMe", "rival", 0.5, f"{OWN_RULE}: bipartite matching"),
        row("flash-kmeans", "rival"),
    ]
    aims = [
        {"against": "rival", "factor": 2.0, "named": "", "scope": "clustering alone",
         "provider": "faiss", "ratio": 2.5, "met": True},
        {"against": "floor", "factor": 1.3, "named": "", "provider": "k.sum(-1)", "ratio": 1.75,
         "met": False},
        {"against": "rival", "factor": 9.0, "named": "cuml", "provider": None, "ratio": None,
         "met": None},
    ]  # fmt: skip
    small = {"data": "blobs", "D": 1024, "dtype": "float32"}
    return [
        result("merge", {**small, "N": 576}, usual, targets=aims),
        result("merge", {**small, "N": 729}, usual, others_busy=1.5),
        *sweep_over("N", SIZES, of_size),
        {"suite": "merge", "params": {**small, "N": 65536, "P": 16384}, "axis": "N",
         "error": "MemoryError: too large"},
        *sweep_over("B", (1, 8, 64), lambda n: of_size(576)[:3], N=576),
        result("kmeans", {"K": 128}, [row("kmeans, cpu", "ours", 2.0),
                                      row(MARK, "rival", 1.5, MARK)]),
        {"suite": "kmeans", "params": {"K": 1000}, "axis": None, "error": f"RuntimeError: {MARK}"},
        result("importance", {"B": 1}, [row("token_importance, cpu", "ours", 1.0),
                                        row("k.sum(-1)", "floor", 1.1, "one read of k")]),
    ]  # fmt: skip


def gpu_run():
    rows = [
        row("focus_attention", "ours", 0.11, host_ms=0.02),
        row("focus_attention, triton", "ours", 0.12, host_ms=0.03),
        row("focus_attention, cuda", "ours", status="failed", detail="to time it: no graph"),
        row("torch, eager", "rival", 3.0),
        row("FlexAttention, making its mask", "rival", 0.4, "mask and attention"),
        *(row(f"SDPA {name}, ready mask", "rival", 0.2 + i / 50, "attention alone")
          for i, name in enumerate("abcdefghi")),
        *(row(f"SDPA {name}, causal", "floor", ms, "attention alone, nothing inhibited")
          for name, ms in (("flash", 0.1), ("cuDNN", 0.09), ("efficient", 0.15))),
    ]  # fmt: skip
    lengths = [
        result("focus", {"phase": "prefill", "B": 1, "L": n, "after": n - 611}, rows, "L")
        for n in (675, 1024, 4096)
    ]
    broken = [row("focus_attention", "ours", status="failed", detail="differs by 2"), rows[3]]
    params = {"phase": "prefill", "B": 8, "L": 675, "after": 64}
    return [
        result("focus", params, rows),
        *lengths,
        result("decode", {"B": 1, "dtype": "bfloat16"}, broken),
    ]


def llava_run():
    found = []
    for images, tokens in itertools.product((1, 4), (64, 160)):
        rows = [
            row("VMTC", "ours", 2.0 * tokens, "selects and merges"),
            row("VMTC + CMAI", "ours", 2.1 * tokens, "selects and merges, inhibits"),
            row("unmodified", "rival", 600.0, "nothing"),
            row("VisionZip", "rival", 2.0 * tokens, "selects and merges"),
            row("as many tokens", "floor", 1.9 * tokens, "takes the first tokens"),
        ]
        of_all = {"tokens_per_second": 43.25, "cache_bytes": 12 << 20, "peak_bytes": 34 << 20,
                  "over_least": {"median": -1e-5, "p20": -0.02, "p80": 0.03},
                  "operators_ms": {"median": 1.125}}  # fmt: skip
        params = {"size": "small", "B": images, "tokens": tokens, "of": 576, "dtype": "float32"}
        facts = {"rows": {r["name"]: of_all for r in rows}}
        found.append(result("llava", params, rows, images=images, facts=facts))
    return found


GPU = {"name": "NVIDIA H200", "capability": "9.0", "driver": "580.11", "cuda_of_torch": "13.0",
       "nvcc": "13.0"}  # fmt: skip
RUNS = {
    "cpu run": (environment(), cpu_run()),
    "gpu": (
        environment(gpu=GPU, date="2026-03-02T10:00:00+00:00", dirty=True, ceilings=None,
                    command="vmtc bench --quick"),
        gpu_run(),
    ),
    "llava": (environment(date="2026-02-01T10:00:00+00:00", dirty=None), llava_run()),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    for stem, (described, results) in RUNS.items():
        found = {"vmtc": {"environment": described, "results": results}}
        (path / f"{stem}.json").write_text(json.dumps(found))
    (path / "aot.json").write_text("[1, 2]")
    (path / "cut.json").write_text('{"vmtc": ')
    return path


@pytest.fixture(scope="module")
def report(folder):
    return page.main(folder, folder / "report")


@pytest.fixture(scope="module")
def text(report):
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tree(text):
    return Tree(text)


class Tree(HTMLParser):
    """Every element as (name, attributes, parents' names, text); fails on what is not closed."""

    VOID = ("meta", "path", "use", "circle", "rect")

    def __init__(self, text):
        super().__init__()
        self.open, self.all = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, name, attributes):
        one = {"name": name, "inside": [o["name"] for o in self.open], "text": "",
               "in": list(self.open), **{f"@{k}": v for k, v in attributes}}  # fmt: skip
        self.all.append(one)
        if name != "meta":
            self.open.append(one)

    def handle_endtag(self, name):
        assert self.open.pop()["name"] == name

    def handle_data(self, data):
        for one in self.open:
            one["text"] += data

    def __getitem__(self, name):
        return [one for one in self.all if one["name"] == name]


def run_of(name):
    return record.Run(Path(name), *RUNS[name])


def sweep_of(name, suite, axis):
    return next(s for s in facts.split(run_of(name))[suite][1] if s.axis == axis)


# arithmetic


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.25])
def test_exact_power_law_is_found(power):
    fitted = growth.fit(SIZES, [3e-3 * n**power for n in SIZES])
    assert fitted.exponent == pytest.approx(power, abs=1e-9) and fitted.error < 1e-9
    assert (fitted.smallest, fitted.largest) == (144, 16384)
    assert str(growth.fit(SIZES, [n**-1e-4 for n in SIZES])) == "0.00 ± 0.00"


def test_error_of_the_exponent_is_that_of_many_noisy_ones():
    draw, fits = random.Random(0), []
    for _ in range(300):
        fits.append(growth.fit(SIZES, [n**1.5 * math.exp(draw.gauss(0, 0.1)) for n in SIZES]))
    mean = sum(f.exponent for f in fits) / 300
    scatter = math.sqrt(sum((f.exponent - mean) ** 2 for f in fits) / 300)
    assert mean == pytest.approx(1.5, abs=0.01)
    # the root mean square of the errors told is the scatter seen
    assert math.sqrt(sum(f.error**2 for f in fits) / 300) == pytest.approx(scatter, rel=0.1)


def test_largest_sizes_tell_the_growth_behind_a_constant_cost():
    sizes = [2.0**i for i in range(8)]
    costs = [100 + n**2 for n in sizes]
    whole, largest = growth.fit(sizes, costs), growth.fit_largest(sizes, costs)
    assert largest.smallest == 16 and whole.exponent < largest.exponent < 2
    assert growth.fit_largest(sizes[:3], costs[:3]) is None
    assert growth.fit_largest(sizes[:4], costs[:4]).smallest == 2


def test_too_few_sizes_have_no_error_or_no_fit():
    assert growth.fit([2, 4], [3, 6]).error is None and str(growth.fit([2, 4], [3, 6])) == "1.00"
    assert growth.fit([2, 2], [3, 6]) is None and growth.fit([], []) is None


@pytest.mark.parametrize(
    ("mine", "rival", "verdict"),
    [(1.0, 1.3, "faster"), (1.0, 1.1, "even"), (1.1, 1.0, "even"), (1.3, 1.0, "slower")],
)
def test_faster_and_slower_are_said_only_beyond_the_spread(mine, rival, verdict):
    found = facts.speedup(result("s", {}, [row("a", "ours", mine), row("b", "rival", rival)]))
    assert found.median == pytest.approx(rival / mine)
    assert found.low == pytest.approx(rival * 0.9 / (mine * 1.1))
    assert found.high == pytest.approx(rival * 1.1 / (mine * 0.9))
    assert found.verdict == verdict


def test_a_forced_backend_does_not_stand_in_for_the_automatic_choice():
    rows = [row("auto", "ours"), row("cuda", "ours", 1.0), row("b", "rival", 2.0)]
    assert facts.speedup(result("s", {}, rows)) is None


def test_best_rival_by_our_rule_is_another_where_the_best_has_its_own():
    first = run_of("cpu run").results[0]
    assert facts.best(first)["name"] == "ToMe"
    assert facts.best_by_our_rule(first)["name"] == "faiss"
    tome = facts.best(first)
    assert facts.share(first, tome, CEILINGS) is None


def test_share_is_of_the_ceiling_that_binds():
    one = row("a", "ours", 0.5)
    products = result("s", {}, [one], cost={"bytes": 10**6, "flops": 10**8})
    # 1 ms of products in 2 ms of four images
    assert facts.share(products, one, CEILINGS) == pytest.approx(0.5)
    assert facts.binding(products, CEILINGS) == "GEMM rate"
    copies = {**products, "cost": {"bytes": 8 * 10**7, "flops": 10**8}}
    assert facts.share(copies, one, CEILINGS) == pytest.approx(2.0)
    assert facts.binding(copies, CEILINGS) == "copy bandwidth"
    assert facts.share(copies, one, None) is None


def test_sweeps_are_told_apart_by_what_does_not_vary():
    both = sweep_over("N", (576, 144), of_size) + sweep_over("N", (64, 100), of_size, D=4096)
    found = facts.sweeps(both)
    assert [s.sizes for s in found] == [[144, 576], [64, 100]]
    assert [s.base["D"] for s in found] == [1024, 4096] and "P" not in found[0].base
    over_images = sweep_of("cpu run", "merge", "B")
    assert over_images.unit == "ms a call" and over_images.scale(over_images.results[1]) == 8
    assert sweep_of("gpu", "focus", "L").sizes == [675, 1024, 4096]


def test_where_it_stops_paying_is_said_in_words():
    def words(*ratios):
        sizes = range(1, len(ratios) + 1)
        made = [
            result("s", {"N": n}, [row("a", "ours", 1.0), row("b", "rival", r)], "N")
            for n, r in zip(sizes, ratios, strict=True)
        ]
        return facts.where_it_stops(facts.sweeps(made)[0])

    assert words(2.0, 2.0, 2.0) == "nowhere in this range (N = 1 to 3)"
    assert words(0.5, 2.0, 0.6).startswith("at N = 1, 3 ours is slower")
    assert words(0.5, 0.6).startswith("everywhere in this range (N = 1 to 2)")
    assert words(1.1, 2.0, None).endswith("the two at N = 1; not judged at N = 3")
    assert words(None).startswith("not known")
    ruled = sweep_over("N", (144, 576), lambda n: [
        row("a", "ours", n), row("b", "rival", 2 * n), row("c", "rival", n * n / 2e2, OWN_RULE)
    ])  # fmt: skip
    told = facts.where_it_stops(*facts.sweeps(ruled))
    assert told.startswith("at N = 144 ours") and "by their own rule: nowhere in" in told
    noisy = sweep_over("B", (1, 2), of_size)
    noisy[1]["others_busy"] = 0.5
    assert facts.where_it_stops(*facts.sweeps(noisy)).endswith("disturbed at B = 2")
    told = facts.where_it_stops(sweep_of("cpu run", "merge", "N"))
    assert "at N = 144, 576, 1024 ours is slower" in told and "not judged at N = 65536" in told


def test_names_look_alike_in_all_runs_and_unlike_their_neighbours():
    runs = [[*results] for _, results in RUNS.values()]
    rivals = [row(f"r{i}", "rival", 1.0) for i in range(20)]
    runs.append([result("merge", {}, [*rivals, row("faiss", "rival", 1.0)])])
    looks = styles(runs)
    assert looks[0]["rival", "faiss"] == looks[-1]["rival", "faiss"]
    for found, results in zip(looks, runs, strict=True):
        for suite in {r["suite"] for r in results}:
            rows = [w for r in results if r["suite"] == suite for w in r.get("rows", [])]
            keys = {(w["kind"], w["name"]) for w in rows if w["kind"] == "rival"}
            assert len({(found[k].colour, found[k].marker) for k in keys}) == len(keys)
    automatic = looks[1]["ours", "focus_attention"]
    assert automatic.width > looks[1]["ours", "focus_attention, triton"].width
    assert automatic.colour not in {s.colour for k, s in looks[1].items() if k[0] != "ours"}


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a, b):
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_are_seen_on_their_ground(scheme):
    cards = re.findall(r"--card:(#\w{6})", page.SHEET)
    for name, pair in COLOURS.items():
        least = {"rule": 1.0, "ink": 7.0, "muted": 4.5, "ours": 4.5, "slow": 4.5}.get(name, 3.0)
        assert contrast(pair[scheme], cards[scheme]) >= least, name
    assert len({light for light, _ in COLOURS.values()}) == len(COLOURS)


# charts


def test_spread_keeps_order_and_leaves_no_overlap():
    draw = random.Random(1)
    for _ in range(200):
        sizes = [draw.uniform(5, 40) for _ in range(draw.randint(1, 9))]
        wanted = [draw.uniform(0, 300) for _ in sizes]
        found = canvas.spread(wanted, sizes, 0.0, 400.0)
        blocks = sorted(zip(found, sizes, strict=True))
        for (a, size_a), (b, size_b) in itertools.pairwise(blocks):
            assert b - a >= (size_a + size_b) / 2 - 1e-6
        assert blocks[0][0] - blocks[0][1] / 2 >= -1e-6
        assert blocks[-1][0] + blocks[-1][1] / 2 <= 400 + 1e-6
        order, kept = (sorted(range(len(at)), key=at.__getitem__) for at in (wanted, found))
        assert order == kept
    assert canvas.spread([50, 200], [10, 10], 0, 400) == [50, 200]


@pytest.mark.parametrize("words", [MARK, "flash-kmeans' kernels, graph", "x" * 99, "a" * 40 + " b"])
def test_folded_lines_fit_and_lose_nothing(words):
    lines = canvas.fold(words, 100)
    assert "".join("".join(lines).split()) == "".join(words.split())
    assert all(canvas.wide(line) <= 100 for line in lines) and all(lines)
    short = canvas.cut(words, 60)
    assert canvas.wide(short) <= 60 and short.endswith("…") and words.startswith(short[:-1])
    assert canvas.fold("one two", 500) == ["one two"] == [canvas.cut("one two", 500)]


def figures():
    for name in RUNS:
        run = run_of(name)
        (looks,) = styles([run.results])
        yield f"{name} overview", charts.overview(run)
        for suite, (usual, swept, _) in facts.split(run).items():
            yield f"{name} {suite}", charts.usual(usual[0], f"{suite}: a set-up", looks)
            yield f"{suite} roofline", roofline.roofline(suite, usual, CEILINGS, looks)
            for sweep in swept:
                yield f"{name} {sweep.axis} time", sweeps.time(sweep, suite, looks)
                yield f"{name} {sweep.axis} peak", sweeps.peak(sweep, suite, looks)
                yield f"{name} {sweep.axis} best", sweeps.against_best(sweep, suite)
            if suite == "llava":
                yield "first token", charts.first_token(usual[:2], "first token", looks)


def hidden_ticks(figure):
    """Labels of ticks beyond the ends of an axis, which are never drawn."""
    axes = [axis for both in figure.axes for axis in (both.xaxis, both.yaxis)]
    found = []
    for axis in axes:
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                found += [tick.label1, tick.label2]
    return found


def test_no_text_of_a_chart_is_cut_off_or_on_another():
    before = dict(matplotlib.rcParams)
    for name, figure in figures():
        drawn = FigureCanvasAgg(figure).get_renderer()
        figure.draw_without_rendering()
        boxes, beyond = [], hidden_ticks(figure)
        for one in figure.findobj(Text):
            if not one.get_text() or not one.get_visible() or one in beyond:
                continue
            box = one.get_window_extent(drawn)
            assert figure.bbox.x0 - 1 <= box.x0 and box.x1 <= figure.bbox.x1 + 1, (name, one)
            assert figure.bbox.y0 - 1 <= box.y0 and box.y1 <= figure.bbox.y1 + 1, (name, one)
            boxes.append((box, one.get_text()))
        for (a, one), (b, other) in itertools.combinations(boxes, 2):
            shared = a.intersection(a, b)
            assert shared is None or min(shared.width, shared.height) < 4, (name, one, other)
    assert dict(matplotlib.rcParams) == before


def test_usual_chart_has_all_providers_fastest_first_and_tells_who_is_absent():
    one = run_of("cpu run").results[0]
    (looks,) = styles([[one]])
    words = [t.get_text() for t in charts.usual(one, "title", looks).findobj(Text)]
    order = [w.split(" (")[0] for w in words]
    shown = ["ToMe", "merge_tokens, cpu", "faiss", "torch Gram", "merge_tokens, reference"]
    assert [w for w in order if w in shown] == shown
    assert "missing: flash-kmeans" in words and {"2.50x", "0.50x", "30.0x"} <= set(words)
    noisy = charts.usual({**one, "others_busy": 1.5}, "title", looks)
    assert any("disturbed" in t.get_text() for t in noisy.findobj(Text))


def test_sweep_chart_draws_the_medians_and_says_where_a_line_ends():
    sweep = sweep_of("cpu run", "merge", "N")
    (looks,) = styles([sweep.results])
    figure = sweeps.time(sweep, "merge", looks)
    lines = {tuple(line.get_ydata()) for line in figure.axes[0].get_lines()}
    assert tuple(of_size(n)[2]["ms"]["median"] for n in SIZES) in lines
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    names = " ".join(" ".join(t.get_text().split()) for t in figure.texts)
    assert "torch Gram, compiled, graph (to 4096)" in names and "flash-kmeans'" not in names
    calls = sweeps.time(sweep_of("cpu run", "merge", "B"), "merge", looks)
    times = of_size(576)[0]["ms"]["median"]
    ours = calls.axes[0].get_lines()[-1].get_ydata()
    assert list(ours) == pytest.approx([times, 8 * times, 64 * times])


def test_roofline_shows_what_is_reached_of_both_ceilings():
    cost = {"bytes": 8 * 10**6, "flops": 10**7}
    one = result("s", {}, [row("a", "ours", 0.5), row("b", "rival", 1.0)], cost=cost)
    (looks,) = styles([[one]])
    (axes,) = roofline.roofline("s", [one], CEILINGS, looks).axes
    roof, *_ = axes.get_lines()
    # both in FLOPs a second, by FLOPs a byte: the slope is the bandwidth, the rest the rate
    assert list(roof.get_ydata()[1:]) == [1e11, 1e11] and roof.get_xdata()[1] == 5.0
    assert roof.get_ydata()[0] / roof.get_xdata()[0] == pytest.approx(2e10)
    places = [line.get_xydata()[0] for line in axes.get_lines() if line.get_marker() != "None"]
    assert [list(xy) for xy in places] == [[1.25, pytest.approx(5e9)], [1.25, pytest.approx(2.5e9)]]


# the page


def test_every_run_has_its_part_newest_first(tree):
    runs = [one for one in tree["details"] if one.get("@class") == "run"]
    heads = [one["text"] for one in tree["h2"]]
    assert heads == ["NVIDIA H200", "Some Processor", "Some Processor"]
    assert ["@open" in one for one in runs] == [True, False, False]
    assert "2026-03-02 10:00 UTC" in runs[0]["text"] and "cpu run.json" in runs[1]["text"]
    ids = {one["@id"] for one in tree.all if "@id" in one}
    assert {one["@href"][1:] for one in tree["a"]} <= ids and len(tree["a"]) == 3
    assert "Skipped, as no file of a run: aot.json, cut.json." in tree["footer"][0]["text"]


def test_what_keeps_numbers_from_being_believed_is_said(tree):
    gpu, cpu, llava = (one["text"] for one in tree["ul"] if one.get("@class") == "warnings")
    assert "Uncommitted changes." in gpu and "Quick run." in gpu and "No ceilings." in gpu
    assert "Ours was not timed. decode the usual set-up: failed: differs by 2" in gpu
    assert "Uncommitted" not in cpu and "No ceilings" not in cpu
    assert "Disturbed. Others kept more than 0.1 processors busy during 1 of 14" in cpu
    assert "merge blobs N=65536" not in cpu and "N=65536 P=16384: MemoryError: too large" in cpu
    assert f"kmeans K=1000: RuntimeError: {MARK}" in cpu
    assert "Unknown state." in llava


def test_who_was_not_timed_is_listed_with_the_reason(tree):
    listed = [one["text"] for one in tree["li"]]
    assert f"missing flash-kmeans (merge N=576, N=729): {REASON}" in [
        re.sub(r"blobs |D=\d+ ", "", text) for text in listed
    ]
    assert "failed focus_attention, cuda (focus): to time it: no graph" in listed
    assert any(t.startswith("torch Gram, compiled, graph, failed at N = 16384: ") for t in listed)
    assert any(t.startswith("flash-kmeans' kernels, graph, missing at every size") for t in listed)
    assert "faiss, no peak memory at every size: not seen by torch" in listed
    assert "N=65536 failed as a whole: MemoryError: too large" in listed


def lines_of(tree, caption):
    """Cells of the rows of every table with such a caption."""
    found = []
    for one in tree["table"]:
        inside = [c for c in tree["caption"] if one in c["in"]]
        if caption in inside[0]["text"]:
            for line in (r for r in tree["tr"] if one in r["in"]):
                cells = [c for c in tree.all if c["name"] in ("td", "th") and line in c["in"]]
                found.append((line.get("@class", ""), [c["text"] for c in cells]))
    return found


def test_verdicts_tell_losses_as_they_tell_wins(tree):
    lines = [
        (class_, " | ".join(cells)) for class_, cells in lines_of(tree, "Usual set-ups; ratio")
    ]
    (mixed,) = [(c, t) for c, t in lines if "N=576" in t]
    # slower than a method of its own rule, and faster than the best of ours
    assert mixed[0] == "lost" and "0.50x, slower" in mixed[1] and "0.41x to 0.61x" in mixed[1]
    assert "not by its own rule: faiss, 2.50x" in mixed[1]
    assert "at least 2x best rival, clustering alone: 2.50x, met" in mixed[1]
    assert "at most 1.3x floor: 1.75x, missed" in mixed[1]
    assert "at least 9x cuml: not measured" in mixed[1]
    assert any(c == "" and "1.82x faster" in t and "SDPA a, ready mask" in t for c, t in lines)
    assert any(c == "lost" and "0.75x, slower" in t and MARK in t for c, t in lines)
    assert any(c == "lost" and "failed as a whole" in t for c, t in lines)
    assert any(c == "lost" and "not timed: failed" in t for c, t in lines)
    assert any(c == "" and "no rival was timed" in t for c, t in lines)
    # what others disturbed is neither won nor lost
    assert any(c == "" and "0.50x, disturbed" in t and "N=729" in t for c, t in lines)
    (cpu,) = [one["text"] for one in tree["p"] if one["text"].startswith("Of 5 usual set-ups")]
    assert "2 slower, 1 disturbed and not judged, 2 not compared" in cpu
    (lost,) = [one["text"] for one in tree["p"] if one["text"].startswith("Slower: ")]
    assert "merge, 0.50x of ToMe; kmeans, 0.75x of " in lost


def test_growth_is_told_with_its_error(tree):
    lines = {cells[0]: cells[1:] for _, cells in lines_of(tree, "Time as a power of N")}
    assert lines["merge_tokens, reference"][0] == "N1.00 ± 0.00 144 to 16384"
    assert lines["faiss"][1] == "N1.20 ± 0.00 1024 to 16384"
    assert lines["torch Gram, compiled, graph"][0].endswith("144 to 4096")
    assert "flash-kmeans' kernels, graph" not in lines
    whole = {cells[0]: cells[1] for _, cells in lines_of(tree, "Time as a power of B")}
    assert whole["faiss"].startswith("B1.00")


def test_table_holds_every_number(tree):
    lines = lines_of(tree, "times in ms")
    timed = [r for _, results in RUNS.values() for one in results for r in one.get("rows", [])]
    groups = [cells for class_, cells in lines if class_ == "group"]
    assert len(groups) == sum(len(results) for _, results in RUNS.values()) - 1
    assert len(lines) - len(groups) - len(lines_of(tree, "none")) == (
        len(timed) + 1 + sum(1 for cells in lines if cells[1][0] == "provider")
    )
    ours = next(cells for class_, cells in lines if class_ == "mine" and "0.110" in cells)
    assert ours[:5] == ["focus_attention", "0.110", "0.0990", "0.121", "4"]
    assert "0.0200" in ours and "3.00" in ours and "0 labels differ" in ours
    assert any(cells[:2] == ["flash-kmeans", "missing"] and REASON in cells for _, cells in lines)
    # a millisecond of products in four of a call
    faiss = next(cells for _, cells in lines if cells[0] == "faiss" and cells[1] == "2.50")
    assert "2.50x" in faiss and "10%" in faiss
    head = next(cells for _, cells in lines if "tokens/s" in cells)
    vmtc = next(cells for _, cells in lines if cells[0] == "VMTC" and "1280" in cells)
    named = dict(zip(head, vmtc, strict=True))
    assert named["first token, ms"] == "1280" and named["tokens/s"] == "43.2"
    assert named["cache, MiB"] == "12.0" and named["peak with the cache, MiB"] == "34.0"
    assert named["above as many tokens"] == "0.0% [-2.0%, 3.0%]"
    plain = next(cells for _, cells in lines if cells[0] == "unmodified")
    assert dict(zip(head, plain, strict=True))["visual tokens"] == "576"


def test_nothing_of_the_files_is_markup_and_nothing_leaves_the_page(tree, text):
    assert not tree["script"] and not tree["img"] and not tree["link"] and not tree["b"]
    for one in tree.all:
        assert not any(key.startswith("@on") for key in one), one
        for key in ("@href", "@src", "@xlink:href"):
            assert one.get(key, "#").startswith("#"), one
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    used = set(re.findall(r'(?:url\(|href=")#([\w.-]+)', text))
    ids = [one["@id"] for one in tree.all if "@id" in one]
    assert used <= set(ids) and len(ids) == len(set(ids))


def heading_levels(tree):
    return [int(one["name"][1]) for one in tree.all if re.fullmatch(r"h\d", one["name"])]


def test_run_of_a_sweep_alone_has_a_page(tmp_path):
    found = {"vmtc": {"environment": environment(), "results": sweep_over("N", (64, 144), of_size)}}
    (tmp_path / "run.json").write_text(json.dumps(found))
    tree = Tree(page.main(tmp_path).read_text(encoding="utf-8"))
    assert all(b - a <= 1 for a, b in itertools.pairwise(heading_levels(tree)))
    assert not tree["nav"] and len(tree["svg"]) == 3
    assert any("Where it stops paying: everywhere" in one["text"] for one in tree["p"])


def test_page_is_read_aloud_well(tree, report):
    assert tree["html"][0]["@lang"] == "en" and tree["title"][0]["text"]
    levels = heading_levels(tree)
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    drawn = tree["svg"]
    assert len(drawn) == len(list(report.parent.glob("*.png"))) > 20
    for one in drawn:
        assert one["@role"] == "img" and "figure" in one["inside"] and len(one["@aria-label"]) > 20
    labels = [one["@aria-label"] for one in drawn]
    assert len(labels) == len(set(labels))
    assert any("fastest first: ToMe 0.500; merge_tokens, cpu 1.00; faiss 2.50" in x for x in labels)
    assert all(one.get("@scope") for one in tree["th"])
    # a name is no formula
    assert any(MARK[:20] in one["text"] for one in tree["text"])


def test_same_runs_give_the_same_bytes(folder, report, tmp_path):
    again = page.main(folder, tmp_path)
    first = {path.name: path.read_bytes() for path in report.parent.iterdir()}
    assert {path.name: path.read_bytes() for path in again.parent.iterdir()} == first
    assert all(re.fullmatch(r"(cpu-run|gpu|llava)-[\w.-]+\.png|report\.html", n) for n in first)
    whole = {"cpu-run-merge-N-time", "cpu-run-merge-N-speed-up", "gpu-focus-L-memory",
             "cpu-run-merge-roofline", "llava-llava-first-token-4"}  # fmt: skip
    assert {f"{name}.png" for name in whole} <= set(first)


def test_names_of_charts_do_not_meet_and_stay_in_the_folder(tmp_path):
    odd = [result("../../etc", {"data": name}, [row("a", "ours", 1.0)]) for name in ("x/y", "x:y")]
    for stem in ("a b", "a-b"):
        found = {"vmtc": {"environment": environment(), "results": odd}}
        (tmp_path / f"{stem}.json").write_text(json.dumps(found))
    page.main(tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert len(names) == 6 and names == {path.name for path in tmp_path.rglob("*.png")}


def test_folder_without_runs_is_refused(tmp_path, capsys):
    (tmp_path / "aot.json").write_text("{}")
    with pytest.raises(ValueError, match="no file of a run"):
        page.main(tmp_path)
    assert "aot.json is skipped" in capsys.readouterr().err and not list(tmp_path.glob("*.html"))


# the page in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as started:
        path = shutil.which("chromium") or started.chromium.executable_path
        if not Path(path).exists():
            pytest.skip("no Chromium")
        # a container has no user namespaces to make a sandbox of
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=["light", "dark"])
def phone(browser, report, request):
    """The page on a phone; what it asks for and complains of is in ``seen``."""
    size = {"width": 360, "height": 740}
    opened = browser.new_page(viewport=size, color_scheme=request.param)
    opened.seen = []
    opened.on("request", lambda found: opened.seen.append(found.url))
    opened.on("console", lambda found: opened.seen.append(found.text))
    opened.on("pageerror", lambda found: opened.seen.append(str(found)))
    opened.goto(report.as_uri())
    yield opened
    assert opened.seen == [report.as_uri()]
    opened.close()


OPEN = "() => document.querySelectorAll('details').forEach(one => { one.open = true })"
# what of each chart is outside its card, or too small to be read
CHARTS = """() => [...document.querySelectorAll('figure')].flatMap(card => {
  const chart = card.querySelector('svg'), box = card.getBoundingClientRect()
  const inside = one => one.left >= box.left - 1 && one.right <= box.right + 1
    && one.top >= box.top - 1 && one.bottom <= box.bottom + 1
  const drawn = chart.getBoundingClientRect()
  const wrong = [...chart.querySelectorAll('text')].filter(
    one => !inside(one.getBoundingClientRect()) || one.getBoundingClientRect().height < 8)
  return [...wrong.map(one => one.textContent),
    ...(drawn.width > 250 && drawn.height > 80 && inside(drawn) ? [] : [chart.ariaLabel])]
})"""


def test_phone_shows_every_chart_whole(phone):
    width = "document.documentElement.scrollWidth"
    assert phone.evaluate(width) <= 360
    phone.evaluate(OPEN)
    assert phone.evaluate(width) <= 360
    assert phone.evaluate("document.querySelectorAll('figure').length") > 20
    assert phone.evaluate(CHARTS) == []


def test_phone_scrolls_tables_in_their_own_boxes(phone):
    phone.evaluate(OPEN)
    box = phone.locator(".numbers .scroll").first
    assert box.evaluate("one => one.scrollWidth > one.clientWidth + 100")
    box.evaluate("one => { one.scrollLeft = 300 }")
    name = box.locator("tbody tr.mine th").first
    left = "one => one.getBoundingClientRect().left"
    assert name.evaluate(left) == pytest.approx(box.evaluate(left), abs=3)
    assert phone.evaluate("window.scrollX") == 0


def test_details_open_by_hand_and_by_a_link(phone):
    numbers = phone.locator("details.numbers").first
    assert not numbers.locator("table").is_visible()
    numbers.locator("summary").click()
    assert numbers.locator("table").is_visible()
    older = phone.locator("details.run").nth(1)
    assert not older.locator("h3").first.is_visible()
    phone.locator("nav a").nth(1).click()
    phone.wait_for_function("document.querySelectorAll('details.run')[1].open")
    assert older.locator("h3").first.is_visible()


def test_letters_of_charts_are_seen_in_both_schemes(phone):
    colours = phone.evaluate("""() => {
      const card = document.querySelector('figure'), text = card.querySelectorAll('text')
      return [card, ...text].map(one => {
        const style = getComputedStyle(one)
        return one === card ? style.backgroundColor : style.fill
      })
    }""")
    parts = [re.findall(r"\d+", colour)[:3] for colour in colours]
    ground, *letters = ["#" + "".join(f"{int(part):02x}" for part in rgb) for rgb in parts]
    assert len(letters) > 5 and min(contrast(one, ground) for one in letters) >= 4.5
