"""What is behind `vmtc explain-image`: its mosaic, what it finds out, and its picture."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.patches import InputError

transformers = pytest.importorskip("transformers")

import vlm  # noqa: E402

from vmtc_kernels import explain_picture  # noqa: E402
from vmtc_kernels.explained import CUT, DROPPED, OUTSIDE, Explained, Explainer, Focus  # noqa: E402
from vmtc_kernels.focus_mask import unpack  # noqa: E402
from vmtc_kernels.integrations.transformers import attach  # noqa: E402
from vmtc_kernels.mosaic import make_mosaic  # noqa: E402
from vmtc_kernels.sheet import TIMES  # noqa: E402

FEW = VMTCConfig(num_primary=0.25, num_merged=0.125)
PROMPT = "what colour is it?"
TILED = ("llava_next", *vlm.SPLIT)
TILE = 4  # cells a side
# photos that no processor has to pad, and how it cuts them
PHOTOS = [
    ("llava", (64, 64), (1, 1)),
    ("llava_next", (96, 32), (1, 3)),
    ("llava_next", (32, 64), (2, 1)),
    ("qwen2_5_vl", (112, 80), (1, 1)),
    ("qwen3_vl", (112, 80), (1, 1)),
    ("idefics3", (192, 128), (2, 3)),
    ("smolvlm", (64, 192), (3, 1)),
]


@pytest.fixture(autouse=True)
def one_thread(same_start):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def explainers():
    return {family: Explainer(*vlm.make(family), "tiny") for family in vlm.FAMILIES}


def read(explainer, photo):
    """A processor's output for a photo, its layout, and the model's family."""
    with attach(explainer.model, explainer.processor, vmtc=FEW) as handle:
        inputs = explainer._inputs(handle, photo, explainer._text(PROMPT))
        return inputs, handle._family.layout("image", inputs), handle._family


def cells_of(photo, grid):
    """[G, G, side, side, 3]"""
    side = len(photo) // grid
    return photo.reshape(grid, side, grid, side, 3).swapaxes(1, 2)


def joined(cells):
    return np.vstack([np.hstack(row) for row in cells])


def away(picture, photo):
    expected = photo.resize(picture.shape[1::-1], Image.Resampling.BICUBIC)
    return abs(picture.astype(int) - np.asarray(expected)).mean()


@pytest.mark.parametrize("family, size, cut", PHOTOS)
def test_tiles_lie_where_they_are_in_the_photo(explainers, family, size, cut):
    photo = vlm.photo(*size)
    mosaic = make_mosaic(*read(explainers[family], photo), explainers[family].processor)
    cells, left = cells_of(mosaic.photo, len(mosaic.rows)), mosaic.rows.copy()
    assert max(mosaic.shape) == len(left) and (cells[left < 0] == 255).all()
    if family in TILED:
        assert mosaic.tiles == f"{cut[0] * cut[1] + 1} tiles of {TILE} {TIMES} {TILE}"
        where = "top: all of it, below" if cut[1] > cut[0] else "left: all of it, right"
        assert mosaic.where == f"{where}: {cut[0]} {TIMES} {cut[1]} pieces"
        assert away(joined(cells[:TILE, :TILE]), photo) < 12
        left[:TILE, :TILE] = -1
    else:
        assert mosaic.where == "" and (left >= 0).sum() == mosaic.shape[0] * mosaic.shape[1]
    pieces = joined(cells[(left >= 0).any(1)][:, (left >= 0).any(0)])
    # pieces are enlarged each for itself, and so differ at their edges
    assert away(pieces, photo) < (5 if family in TILED else 0.5)
    assert min(away(pieces[:, ::-1], photo), away(pieces[::-1], photo)) > 20


@pytest.mark.parametrize("family, size, _", PHOTOS)
def test_a_cell_is_the_row_that_its_pixels_change(family, size, _):
    explainer = Explainer(*vlm.make(family), "tiny")
    inputs, layout, model = read(explainer, vlm.photo(*size))
    # without what layers add, a token knows of its own pixels only
    for name, parameter in model.layers.named_parameters():
        if any(part in name for part in ("out_proj", "fc2", "attn.proj", "down_proj")):
            parameter.data.zero_()
    seen = []
    model.projector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    pixels = inputs["pixel_values"]
    # of a still, Qwen has two frames
    places = pixels.view(-1, 3, 2, vlm.PATCH**2) if family in vlm.QWEN else pixels.view(-1, 1, 1, 1)
    names = {"pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask"}
    given = {name: value for name, value in inputs.items() if name in names}

    def look():
        with torch.no_grad():
            model.core.get_image_features(**given)
        mosaic = make_mosaic(inputs, layout, model, explainer.processor)
        return mosaic, cells_of(mosaic.photo, len(mosaic.rows)).astype(int)

    mosaic, cells = look()
    for index in np.random.default_rng(0).choice(len(places), 5, replace=False):
        before = places[index].clone()
        places[index, 0, :, 0] = torch.where(before[0, :, 0] > 0, -5, 5)
        _, others = look()
        places[index] = before
        changed = (seen[-1] != seen[0]).reshape(layout.size, -1).any(1).nonzero()[:, 0].tolist()
        most = abs(others - cells).sum((2, 3, 4))
        # enlarged pixels reach into the next cell
        assert changed == [mosaic.rows[np.unravel_index(most.argmax(), most.shape)]]


# the last photo has a piece that is whole and others that are cut
@pytest.mark.parametrize(
    "family, size", [*((family, (180, 100)) for family in vlm.FAMILIES), ("llava_next", (80, 32))]
)
def test_slots_scores_and_focus_are_those_of_the_handle(explainers, family, size):
    explainer, photo = explainers[family], vlm.photo(*size)
    cmai = CMAIConfig(keep_ratio=0.5, layers=None)
    explained = explainer.explain(photo, PROMPT, FEW, cmai, layer=-1, token="colour")
    mosaic = make_mosaic(*read(explainer, photo), explainer.processor)
    with attach(explainer.model, explainer.processor, vmtc=FEW, cmai=cmai, record=True) as handle:
        inputs = explainer._inputs(handle, photo, explainer._text(PROMPT))
        layout = handle._family.layout("image", inputs)
        with torch.no_grad():
            explainer.model(**inputs)
    focus, count, places = explained.focus, 0, {}
    expected = np.full(mosaic.rows.shape, CUT)
    scores = np.full(mosaic.rows.shape, np.nan)
    for units in handle.last.merged["image"]:
        for rows, owner, score, place, sizes in zip(*units, strict=True):
            for i, row in enumerate(rows.tolist()):
                expected[mosaic.rows == row] = count + owner[i]
                scores[mosaic.rows == row] = score[i]
            kept = FEW.counts(len(rows), clip=True)[0]
            assert explained.primary[count : count + len(sizes)].tolist() == [
                slot < kept for slot in range(len(sizes))
            ]
            assert explained.group[count + kept : count + len(sizes)].tolist() == list(
                range(len(sizes) - kept)
            )
            for slot, index in enumerate(place.tolist()):
                places[(layout.rows == rows[index]).nonzero().item()] = count + slot
            count += len(sizes)
    expected[mosaic.rows < 0] = OUTSIDE
    np.testing.assert_array_equal(explained.slot, expected)
    np.testing.assert_array_equal(explained.scores, scores.astype(np.float32))
    assert len(explained.primary) == count and (expected == CUT).any() == (family == "llava_next")

    # newlines are tokens too
    places |= dict.fromkeys((layout.rows < 0).nonzero()[:, 0].tolist())
    assert explained.extra == len(places) - count and explained.after == len(places)
    assert explained.before == len(layout.rows)
    ids, result = inputs["input_ids"][0], handle.last.focus[2]
    # the template writes the first token, where there is one
    starts = ids.tolist().count(explainer.processor.tokenizer.bos_token_id)
    assert starts == (explainer.processor.tokenizer.bos_token is not None)
    text = explainer.processor.tokenizer.decode
    (last,) = [i for i in range(len(ids)) if text(ids[: i + 1]).endswith("colour")]
    assert (focus.word, focus.place, focus.layer) == (text(ids[last]), last - len(ids), 2)
    assert (ids == explainer.model.config.image_token_id).sum() == len(places)
    inhibited = unpack(result.mask[0, 0, last], len(places))
    assert focus.hidden == inhibited.sum() == len(places) // 2 and focus.tokens == len(places)
    for rank, slot in enumerate(slot for _, slot in sorted(places.items())):
        if slot is not None:
            assert focus.scores[slot] == result.scores[0, 0, last, rank]
            assert focus.inhibited[slot] == inhibited[rank]
    assert focus.scores.std() > 0


def test_a_row_of_cls_is_a_token_but_no_patch():
    explainer = Explainer(*vlm.make("llava", strategy="full"), "tiny")
    explained = explainer.explain(vlm.photo(64, 64), PROMPT, FEW, CMAIConfig(layers=None))
    assert (explained.before, explained.after, explained.extra) == (65, 25, 1)
    assert explained.focus.tokens == 25 and len(explained.focus.scores) == 24
    assert explained.slot.min() == 0 and explained.slot.max() == 23


def test_nothing_is_merged_where_all_tokens_stay(explainers):
    config = VMTCConfig(num_primary=0.5, num_merged=0.5)
    explained = explainers["llava"].explain(vlm.photo(64, 64), PROMPT, config)
    assert explained.primary.all() and explained.before == explained.after == 64
    assert explained.backend.startswith("none") and explained.focus is None
    assert explain_picture.summary(explained) == "64 patches stay as they are."


def test_the_model_is_as_before(explainers):
    explainer = explainers["qwen2_5_vl"]
    explainer.explain(vlm.photo(64, 64), PROMPT, FEW, CMAIConfig(layers=None))
    with pytest.raises(InputError, match="tiny cannot run: "):
        explainer.explain(None, PROMPT, FEW, CMAIConfig(layers=None))
    assert getattr(explainer.model, "vmtc_handle", None) is None
    assert not any(module._forward_hooks for module in explainer.model.modules())


def made(rows=24, columns=24, cell=8, kept=3, groups=2, focus=None, **options):
    """A mosaic of random pixels, of which a last row was cut away and one cell dropped."""
    random, side = np.random.default_rng(0), max(rows, columns)
    slot = np.full((side, side), OUTSIDE)
    number = np.arange(rows * columns).reshape(rows, columns)
    slot[:rows, :columns] = np.where(number < kept, number, kept + number % max(groups, 1))
    if rows > 2:
        slot[rows - 1, :columns], slot[0, columns - 1] = CUT, DROPPED
    photo = random.integers(0, 256, (side * cell, side * cell, 3), dtype=np.uint8)
    scores = np.where(slot >= DROPPED, random.random((side, side)), np.nan).astype(np.float32)
    total = kept + groups
    if focus is not None:
        values = random.random(total), random.random(total) < 0.5
        focus = Focus(focus, -1, *values, hidden=3, tokens=total, layer=16, layers=32)
    explained = Explained(
        **{"photo": photo, "shape": (rows, columns), "cell": 14, "slot": slot, "scores": scores},
        primary=np.arange(total) < kept,
        group=np.arange(total) - kept,
        **{"before": rows * columns, "after": total + 4, "extra": 4},
        **{
            "tiles": f"{rows} {TIMES} {columns} tokens",
            "where": f"left: all of it, right: 2 {TIMES} 2 pieces",
        },
        **{"layer": 22, "layers": 24, "source": "attention from [CLS]", "config": FEW},
        **{"model": "tiny", "prompt": "what?", "backend": "cpu", "device": "cpu", "seconds": 1.0},
        focus=focus,
    )
    return replace(explained, **options)


LONG = {"model": "m" * 200, "prompt": "What is $x_ in 火箭?\n" * 20}


@pytest.mark.parametrize(
    "explained",
    [
        made(),
        made(focus="colour", **LONG),
        made(49, 74, focus="W" * 80, **LONG),
        made(5, 60, focus="\n"),
        made(60, 5),
        made(60, 50, cell=6),
        made(1, 1, kept=1, groups=0, extra=0, where=""),
        made(128, 128, cell=6, kept=1000, groups=600, focus="$", before=16384, after=16000),
    ],
)
def test_texts_stay_on_the_sheet_and_apart(explained, recwarn):
    figure = explain_picture.sheet(explained, "Photograph: SpaceX, public domain.")
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    for box in boxes:
        assert box.x0 > 0 and box.x1 <= width - 40 and box.y0 > 0 and box.y1 < height
    for a, b in combinations(boxes, 2):
        assert not a.overlaps(b)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def painted(explained, paint, *more):
    from matplotlib.figure import Figure

    axes = Figure().add_axes((0, 0, 1, 1))
    paint(axes, explained, *more)
    (image,) = axes.images
    return axes, cells_of(np.asarray(image.get_array()), len(explained.slot))


def test_tokens_are_painted_with_what_stands_for_them():
    explained = made(6, 8, cell=24)
    photo = cells_of(explained.photo, 8)
    axes, cells = painted(explained, explain_picture._tokens)
    assert axes.get_xlim() == (0, 8) and axes.get_ylim() == (6, 0)
    inner, slot = (slice(None), slice(None), slice(4, -4), slice(4, -4)), explained.slot
    kept = (slot >= 0) & (slot < 3)
    np.testing.assert_array_equal(cells[inner][kept], photo[inner][kept])
    outlines = []
    for group in (3, 4):
        mean = photo[slot == group].mean((0, 1, 2))
        assert abs(cells[inner][slot == group] - mean).max() <= 1
        # the upper left corner of a cell with no other of its group around
        outlines.append(cells[1:5, 1:7][slot[1:5, 1:7] == group][:, 0, 0])
        assert (outlines[-1] == outlines[-1][0]).all() and abs(outlines[-1][0] - mean).max() > 20
    assert (outlines[0][0] != outlines[1][0]).any()
    grey = np.ptp(cells.astype(int), axis=-1).max((2, 3)) == 0
    np.testing.assert_array_equal(grey[:6], (slot[:6] == CUT) | (slot[:6] == DROPPED))
    stripes = (cells == 150).all(-1).mean((2, 3))
    assert ((stripes > 0.2) == (slot == CUT)).all()


def test_focus_is_painted_on_all_patches_of_a_token():
    explained = made(6, 8, cell=24, focus="colour")
    values, inhibited = np.linspace(0, 1, 5), np.array([False, True, False, False, True])
    focus = explained.focus._replace(scores=values, inhibited=inhibited)
    flat = replace(explained, photo=np.full_like(explained.photo, 99))
    _, cells = painted(flat, explain_picture._focus, focus)
    grey = np.ptp(cells.astype(int), axis=-1).max((2, 3)) == 0
    expected = np.isin(explained.slot, (1, 4, CUT, DROPPED, OUTSIDE))
    np.testing.assert_array_equal(grey, expected)
    colours = {
        slot: np.unique(cells[explained.slot == slot].reshape(-1, 3), axis=0) for slot in (0, 2, 3)
    }
    assert all(len(each) == 1 for each in colours.values())
    # green rises with the score
    assert colours[0][0, 1] < colours[2][0, 1] < colours[3][0, 1]


def test_all_patches_may_be_inhibited():
    explained = made(6, 8, focus="colour")
    focus = explained.focus._replace(inhibited=np.ones(5, dtype=bool))
    explain_picture.sheet(replace(explained, focus=focus)).draw_without_rendering()


def test_the_title_and_the_key_say_what_is_seen():
    texts = [text.get_text() for text in explain_picture.sheet(made(focus=" is")).texts]
    assert texts[0] == "576 image tokens become 9"
    assert texts[1].startswith("3 patches stay as they are; 548 are clustered by cosine distance")
    assert {"dropped", "cut away by the model", "Focus of 'is'", "Kept and merged"} <= set(texts)
    texts = [text.get_text() for text in explain_picture.sheet(made(2, 2, kept=4, groups=0)).texts]
    facts = dict(explain_picture.facts(made()))
    assert facts["image tokens"] == "576 → 9 (3 primary + 2 merged + 4 that are no patches)"
    assert (facts["dropped"], facts["cut away"][:10]) == ("1 of the patches", "24 patches")
    assert "kept as it is" in texts and not {"dropped", "cut away by the model"} & set(texts)
