"""The picture of `vmtc focus`."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from vmtc_kernels import CMAIConfig
from vmtc_kernels.focus_picture import draw, label, neighbours, sheet, summary
from vmtc_kernels.llava import Focus
from vmtc_kernels.patches import InputError, load_photo
from vmtc_kernels.sheet import ACCENT, fitted

WORDS = ["\n", "What", " colour", " is", " the", " rocket", "?", " ASSISTANT", ":"]


def focus_of(words, grid=24, scores=None, config=None, model="tiny"):
    tokens = grid**2
    if scores is None:
        scores = np.random.default_rng(0).exponential(1 / tokens, (len(words), tokens))
    rank = np.argsort(np.argsort(-scores, axis=1), axis=1)
    return Focus(
        photo=load_photo(None, grid * 14),
        grid=grid,
        words=words,
        scores=scores.astype(np.float32),
        inhibited=rank >= tokens // 2,
        config=config or CMAIConfig(),
        layer=16,
        layers=32,
        model=model,
        backend="reference",
    )


@pytest.fixture(scope="module")
def focus():
    return focus_of(WORDS)


def texts(figure):
    return [text for text in figure.texts if text.get_text()]


@pytest.mark.parametrize(
    "words, chosen",
    [
        (WORDS, 2),
        ([":"], 0),
        (["W" * 80] * 3, 1),
        ([f" word{i}" for i in range(200)], 100),
        (["$x_", "^$", "\\frac", " 火箭", "\n", "  ", ""], 3),
        (["'quoted'", "%", "{}"], 2),
    ],
)
def test_texts_stay_on_the_sheet_and_apart(words, chosen, recwarn):
    figure = sheet(focus_of(words, model="m" * 200), chosen, "Photograph: SpaceX.")
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    boxes = [text.get_window_extent() for text in texts(figure)]
    # the axes of the colour bar with its numbers
    boxes += [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert box.x0 > 0 and box.x1 <= width - 40 and box.y0 > 0 and box.y1 < height
    for a, b in combinations(boxes, 2):
        assert not a.overlaps(b)
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


@pytest.mark.parametrize("chosen", range(0, 200, 21))
def test_the_chosen_token_alone_is_marked(chosen):
    words = [f" word{i}" for i in range(200)]
    figure = sheet(focus_of(words), chosen)
    boxes = [box for box in figure.get_children() if hasattr(box, "get_boxstyle")]
    marked = [box for box in boxes if box.get_facecolor()[0] < 0.5]
    assert len(boxes) > 10 and len(marked) == 1
    named = [text.get_text() for text in texts(figure) if text.get_color() in ("white", ACCENT)]
    # in the strip and over its small map
    assert named == [f"word{chosen}"] * 2


def test_the_title_says_the_number(focus):
    shown = [text.get_text() for text in texts(sheet(focus, 2))]
    assert shown[0] == "288 of 576 image tokens inhibited for 'colour'"
    assert "grey: the 288 that the token does not see" in shown


def test_summary_names_layer_and_rule(focus):
    start = "In layer 16 of 32 (counted from 0), a text token keeps"
    assert summary(focus) == f"{start} the 50% of image tokens that it focuses on most."
    other = focus_of(WORDS, config=CMAIConfig(keep_ratio=None, threshold=0.2))
    assert summary(other) == f"{start} image tokens of at least 20% of its highest focus score."
    lower = focus_of(WORDS, config=CMAIConfig(layers=(3,)))
    would = start.replace("keeps", "does not inhibit but would keep")
    assert summary(lower) == f"{would} the 50% of image tokens that it focuses on most."


def test_the_map_and_the_kept_patches_are_those_of_the_scores(tmp_path):
    scores = np.full((1, 16), 0.01)
    scores[0, 5] = 0.5
    out = tmp_path / "a.png"
    focus = focus_of([":"], 4, scores)
    draw(focus, 0, out)
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    side, patch = 552, 138
    heat = pixels[232 : 232 + side, 652 : 652 + side]
    kept = pixels[232 : 232 + side, 1392 : 1392 + side]
    colours = np.array(
        [heat[r + 69, c + 69] for r in range(0, side, patch) for c in range(0, side, patch)]
    )
    # yellow is red and green, the lowest colour is neither
    assert colours[:, 1].argmax() == 5 and colours[5, 1] > 150
    assert np.delete(colours[:, 1], 5).max() < 100
    grey = np.array(
        [
            np.ptp(kept[r + 20 : r + 118, c + 20 : c + 118], axis=-1).max() == 0
            for r in range(0, side, patch)
            for c in range(0, side, patch)
        ]
    )
    assert np.array_equal(grey, focus.inhibited[0])


@pytest.mark.parametrize("value", [0, 1e-7, 0.01])
def test_equal_scores_can_be_drawn(value):
    sheet(focus_of(WORDS, 4, np.full((len(WORDS), 16), value)), 0).draw_without_rendering()


def test_neighbours_are_the_nearest_words():
    assert neighbours(WORDS, 2) == [1, 2, 3, 4, 5, 7]
    assert neighbours(WORDS, 8) == [2, 3, 4, 5, 7, 8]
    assert neighbours([":"], 0) == [0]


def test_labels_can_be_seen():
    shown = [label(word) for word in (" a ", "\n", " ", "", "火", "\x00", "$x$")]
    assert shown == ["a", "↵", "␣", "∅", "□", "□", "$x$"]


def test_fitted_cuts_to_the_width():
    assert fitted("colour", 200) == "colour"
    assert fitted("colour" * 50, 200).endswith("…") and 8 < len(fitted("colour" * 50, 200)) < 20


def test_draw_refuses_what_cannot_be_written(focus, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*gone.a\.png: No such file"):
        draw(focus, 2, tmp_path / "gone" / "a.png")
