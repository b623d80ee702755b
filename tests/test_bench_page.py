"""The page of a folder of runs: what it says, and how a browser shows it."""
# the extras of the harness may be missing: it is imported after a look
# ruff: noqa: E402

from __future__ import annotations

import itertools
import json
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

from page_runs import MARK, REASON, RUNS, contrast, environment, of_size, result, row, sweep_over

from bench import page


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
