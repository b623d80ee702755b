"""What a page says of runs before it is written: arithmetic, and charts."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import itertools
import math
import random
import re
import sys
from pathlib import Path

import pytest

# bench is a folder of the project and not installed
sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.importorskip("threadpoolctl")
matplotlib = pytest.importorskip("matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from page_runs import (
    CEILINGS,
    MARK,
    RUNS,
    SIZES,
    contrast,
    of_size,
    result,
    row,
    run_of,
    sweep_of,
    sweep_over,
)

from bench import page
from bench.case import OWN_RULE
from bench.page import canvas, charts, facts, growth, roofline, sweeps
from bench.page.style import COLOURS, styles

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
