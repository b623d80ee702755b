"""Colours of the report, for a light and a dark screen, and the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# name -> on white, on dark; each of them occurs once, so that a drawing made of the first can be
# told the names. The numbered ones and ours were searched for the largest difference between any
# two, also to the three kinds of colour-blind eyes, at a contrast of 3 and more to the ground.
COLOURS = {
    "ink": ("#1c2128", "#e7eaee"),
    "muted": ("#59626e", "#a0a9b5"),
    "rule": ("#dfe3e8", "#333a44"),
    "ours": ("#0b62b0", "#6cb6ff"),
    "slow": ("#b3261e", "#ff8f85"),
    "c0": ("#ae8b06", "#c9a714"),
    "c1": ("#920d3e", "#de3b60"),
    "c2": ("#70954c", "#a7e681"),
    "c3": ("#cc6780", "#fc96a3"),
    "c4": ("#7c480e", "#c26329"),
    "c5": ("#7f5484", "#edcaee"),
    "c6": ("#2099c9", "#5385a1"),
}
INK, MUTED, RULE, OURS, SLOW = (
    COLOURS[name][0] for name in ("ink", "muted", "rule", "ours", "slow")
)
_RIVALS = [light for name, (light, _) in COLOURS.items() if name[1:].isdigit()]
# as many as have no divisor in common with the colours: pairs repeat late
_MARKERS = "osD^vPXd"
_DASHES: list[Any] = ["-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5))]


@dataclass(frozen=True)
class Style:
    colour: str
    marker: str
    dash: Any
    # ours is the line that one looks for
    width: float = 1.4
    filled: bool = True


Styles = dict[tuple[str, str], Style]


def styles(runs: Sequence[Sequence[dict[str, Any]]]) -> list[Styles]:
    """Of each run (kind, name) -> how it looks in its charts. A name looks the same in all runs,
    and unlike all that it meets in a suite, as long as there are looks enough; the automatic
    choice of ours always has the first look."""
    meetings = [_suites(results) for results in runs]
    taken: dict[tuple[str, str], int] = {}
    for keys in (keys for suites in meetings for keys in suites.values()):
        for key in keys:
            if key not in taken and key[0] != "ours":
                rooms = [room for suites in meetings for room in suites.values() if key in room]
                meets = {other for room in rooms for other in room if other[0] == key[0]}
                used = {taken[other] for other in meets & taken.keys()}
                taken[key] = next(i for i in range(len(used) + 1) if i not in used)
    found = []
    for suites in meetings:
        looks: Styles = {}
        for keys in suites.values():
            mine = [key for key in keys if key[0] == "ours"]
            looks |= {key: _look("ours", i) for i, key in enumerate(mine)}
            looks |= {key: _look(key[0], taken[key]) for key in keys if key[0] != "ours"}
        found.append(looks)
    return found


def _suites(results: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[str, str], None]]:
    """Suite -> who is in it, in order."""
    suites: dict[str, dict[tuple[str, str], None]] = {}
    for result in results:
        keys = [(row["kind"], row["name"]) for row in result.get("rows", [])]
        suites.setdefault(result["suite"], {}).update(dict.fromkeys(keys))
    return suites


def _look(kind: str, index: int) -> Style:
    dash = _DASHES[index % len(_DASHES)]
    if kind == "ours":
        width = 2.4 if index == 0 else 1.4
        return Style(OURS, "o" if index == 0 else _MARKERS[index % 8], dash, width, index == 0)
    if kind == "rival":
        return Style(_RIVALS[index % len(_RIVALS)], _MARKERS[index % 8], "-")
    # what is no rival is grey and hollow: the reference dashed, a floor dotted
    dash = _DASHES[1] if kind == "reference" else _DASHES[2 + index % 2]
    return Style(MUTED, _MARKERS[index % 8], dash, 1.2, filled=False)


def _variables(scheme: int) -> str:
    return "".join(f"--{name}:{pair[scheme]};" for name, pair in COLOURS.items())


SHEET = (
    f"""
:root{{color-scheme:light dark;--ground:#f6f7f8;--card:#ffffff;{_variables(0)}}}
@media(prefers-color-scheme:dark){{:root{{--ground:#0e1116;--card:#171b21;{_variables(1)}}}}}
"""
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0 auto;padding:1rem clamp(.5rem,2.5vw,2rem) 4rem;max-width:80rem;
background:var(--ground);color:var(--ink);overflow-wrap:break-word;
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;line-height:1.3;margin:0;display:inline}
h3{font-size:1.35rem;line-height:1.25;margin:3rem 0 .25rem;padding-top:.75rem;
border-top:2px solid var(--ink)}
h4{font-size:1.02rem;line-height:1.35;margin:1.75rem 0 .25rem}
p,ul,ol,dl{margin:.5rem 0;max-width:46rem}
ul,ol{padding-left:1.25rem}
a{color:var(--ours)}
code{font:.875em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.note,figcaption,.small{color:var(--muted);font-size:.875rem}
summary{cursor:pointer;padding:.4rem 0}
summary:focus-visible,a:focus-visible,.scroll:focus-visible{outline:2px solid var(--ours);
outline-offset:2px}
.run{border-top:1px solid var(--rule);padding:.5rem 0}
.run>summary .small{display:block;padding-left:1.1rem}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
.warnings{list-style:none;padding:.6rem .8rem;border-left:4px solid var(--slow);
background:var(--card);max-width:60rem}
.warnings li{margin:.2rem 0}
.verdict{font-size:1.1rem}
.faster{color:var(--ours);font-weight:600}
.slower{color:var(--slow);font-weight:600}
.even,.disturbed,.unknown{font-weight:600}
.grid{display:grid;gap:.75rem;margin:.75rem 0;
grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.beside{display:grid;gap:.75rem;align-items:start;margin:.75rem 0;
grid-template-columns:minmax(0,26rem) minmax(0,1fr)}
.beside .scroll{margin:0}
figure{margin:0;padding:.5rem .4rem;background:var(--card);border:1px solid var(--rule);
border-radius:6px;min-width:0}
figure svg{display:block;width:100%;max-width:480px;height:auto;margin:0 auto;
stroke-linejoin:round;stroke-linecap:butt}
figcaption{padding:.35rem .3rem 0}
figcaption p{margin:.25rem 0}
.scroll{overflow-x:auto;width:fit-content;max-width:100%;background:var(--card);
border:1px solid var(--rule);border-radius:6px;margin:.5rem 0}
table{border-collapse:collapse;font-size:.875rem;line-height:1.35;
font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.5rem .6rem;color:var(--muted)}
th,td{padding:.35rem .6rem;text-align:left;vertical-align:top;border-top:1px solid var(--rule)}
thead th{border-top:0;color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:400}
th:first-child,td:first-child{position:sticky;left:0;background:var(--card);z-index:1}
.num{text-align:right;white-space:nowrap}
.name{min-width:8rem;max-width:13rem}
.state{min-width:8.5rem;max-width:16rem}
.mid{min-width:13rem}
.long{min-width:32rem}
tr.mine th,tr.mine td{font-weight:600}
tr.group th{background:var(--ground);font-weight:600;color:var(--ink)}
tr.group span,caption span{position:sticky;left:.6rem;display:inline-block;
max-width:calc(100vw - 3rem)}
tr.lost td,tr.lost th{background:color-mix(in srgb,var(--slow) 12%,var(--card))}
pre{padding:.6rem;font-size:.8125rem}
.absent{color:var(--muted)}
.failed{color:var(--slow)}
.sub{display:block;color:var(--muted);font-size:.8125rem;font-weight:400}
@media(max-width:40rem){table{font-size:.8125rem}th,td{padding:.3rem .4rem}
.name{min-width:6.5rem;max-width:8rem}h3{margin-top:2rem}}
@media(max-width:52rem){.beside{grid-template-columns:minmax(0,1fr)}}
"""
)
