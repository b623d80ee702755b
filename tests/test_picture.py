"""The demo's photograph, patches, baselines, errors and picture."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import color, data

from vmtc_kernels import VMTCConfig, merge_tokens
from vmtc_kernels.patches import (
    InputError,
    describe,
    join,
    load_photo,
    photo_tokens,
    psnr,
    saliency,
    split,
    weighted_psnr,
)
from vmtc_kernels.picture import downsampling, draw, make_demo, nearest, palette, sheet

PATCH, GRID = 14, 24


@pytest.fixture(scope="module")
def photo():
    return load_photo(None)


@pytest.fixture(scope="module")
def tokens(photo):
    return photo_tokens(photo)


@pytest.fixture(autouse=True)
def one_thread(same_start):
    # the reference's many small steps only wait for one another on a busy machine
    torch.set_num_threads(1)


def demo_of(photo, tokens, primary, merged, **options):
    config = VMTCConfig(num_primary=primary, num_merged=merged, **options)
    return make_demo(photo, PATCH, tokens, config, "Photograph: SpaceX.")


@pytest.fixture(scope="module")
def demo(photo, tokens):
    return demo_of(photo, tokens, 128, 32)


def patch_of(image, position):
    row, column = PATCH * (position // GRID), PATCH * (position % GRID)
    return image[row : row + PATCH, column : column + PATCH]


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_default_photo_is_the_resized_centre(photo):
    whole = Image.fromarray(data.rocket())
    left = (whole.width - whole.height) // 2
    square = whole.crop((left, 0, left + whole.height, whole.height))
    expected = np.asarray(square.resize((336, 336), Image.Resampling.BICUBIC), dtype=int)
    # the margins are half pixels: the crop may be off by one column
    assert photo.shape == (336, 336, 3) and photo.dtype == np.uint8
    assert abs(photo.astype(int) - expected).mean() < 2


def test_exif_rotation_is_undone(tmp_path):
    upright = Image.fromarray(data.coffee())
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    a = load_photo(saved(tmp_path / "a.png", upright))
    b = load_photo(saved(tmp_path / "b.png", turned, exif=exif))
    # resizing rows before columns rounds differently
    assert abs(a.astype(int) - b).max() <= 2


def test_transparency_goes_over_white(tmp_path):
    pixels = np.zeros((50, 50, 4), np.uint8)
    pixels[:, 25:, 3] = 255
    loaded = load_photo(saved(tmp_path / "a.png", Image.fromarray(pixels)), 50)
    assert (loaded[:, :25] == 255).all() and (loaded[:, 25:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "F"])
def test_greyscale_keeps_its_values(tmp_path, mode):
    ramp = np.tile(np.arange(256, dtype=np.uint8), (256, 1))
    if mode == "I;16":
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode == "F":
        image = Image.fromarray(ramp.astype(np.float32) / 255)
    else:
        image = Image.fromarray(ramp).convert(mode)
    loaded = load_photo(saved(tmp_path / "a.tif", image), 256)
    assert np.array_equal(loaded, np.repeat(ramp[..., None], 3, axis=2))


def test_extreme_sizes_load(tmp_path):
    for size in ((1, 1), (4000, 2), (2, 4000)):
        image = Image.new("RGB", size, (10, 20, 30))
        loaded = load_photo(saved(tmp_path / "a.png", image))
        assert (loaded == [10, 20, 30]).all() and loaded.shape == (336, 336, 3)


def test_split_is_row_major_and_join_its_inverse(photo):
    x = split(photo, PATCH)
    assert x.shape == (1, 576, PATCH * PATCH * 3) and x.dtype == torch.float32
    for position in (0, 1, 24, 575):
        assert np.array_equal(x[0, position].numpy(), patch_of(photo, position).ravel())
    assert np.array_equal(join(x[0], GRID, PATCH), photo)


def test_join_rounds_and_clamps():
    flat = torch.tensor([[-3.0], [255.7], [7.5], [8.4]]).repeat(1, 12)
    assert join(flat, 2, 2)[::2, ::2, 0].tolist() == [[0, 255], [8, 8]]


def test_saliency_finds_what_stands_out():
    photo = np.full((336, 336, 3), 90, np.uint8)
    photo[14 * 8 : 14 * 10, 14 * 15 : 14 * 17] = (200, 40, 40)
    scores = saliency(photo).reshape(GRID, GRID)
    assert scores.sum() == pytest.approx(1) and (scores > 0).all()
    brightest = np.unravel_index(np.argsort(scores, axis=None)[-4:], scores.shape)
    assert sorted(zip(*map(list, brightest), strict=True)) == [(8, 15), (8, 16), (9, 15), (9, 16)]


def test_saliency_without_contrast_is_the_centre_prior():
    scores = saliency(np.full((336, 336, 3), 255, np.uint8)).reshape(GRID, GRID)
    assert np.allclose(scores, scores[::-1, ::-1]) and np.isclose(scores[11, 11], scores.max())


def test_descriptors_are_equal_where_patches_are():
    photo = np.zeros((336, 336, 3), np.uint8)
    photo[:, 168:] = (200, 180, 20)
    features = describe(photo).reshape(GRID, GRID, -1)
    # gradients reach across the border: leave out the patches beside it
    left, right = features[:, :11].reshape(264, -1), features[:, 13:].reshape(264, -1)
    assert np.ptp(left, axis=0).max() < 1e-9 and np.ptp(right, axis=0).max() < 1e-9
    assert np.linalg.norm(left[0] - right[0]) > 1


@pytest.mark.parametrize("value", [0, 255])
def test_a_flat_photo_gives_finite_tokens(value):
    flat = np.full((336, 336, 3), value, np.uint8)
    features, scores, _ = photo_tokens(flat)
    assert features.isfinite().all() and scores.isfinite().all()
    assert all(np.isinf(each.psnr) for each in demo_of(flat, photo_tokens(flat), 4, 2).rebuilt)


def test_psnr_of_known_errors(photo):
    grey = np.full_like(photo, 100)
    assert psnr(grey, grey + np.uint8(10)) == pytest.approx(20 * np.log10(25.5))
    assert np.isinf(psnr(photo, photo))


def test_weighted_psnr_of_known_errors():
    grey, other = np.full((28, 28, 3), 100, np.uint8), np.full((28, 28, 3), 100, np.uint8)
    other[:14, 14:] += 10
    for weights, share in (([1, 1, 1, 1], 0.25), ([1, 3, 0, 0], 0.75), ([1, 0, 1, 1], 0)):
        got = weighted_psnr(grey, other, np.array(weights), 14)
        with np.errstate(divide="ignore"):
            assert got == pytest.approx(10 * np.log10(255**2 / np.float64(100 * share)))


def test_all_tokens_rebuild_the_crop_bit_for_bit(photo, tokens):
    for each in demo_of(photo, tokens, 576, 0).rebuilt:
        assert each.tokens == 576 and np.array_equal(each.photo, photo)
        assert np.isinf(each.psnr) and np.isinf(each.weighted)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_vmtc_keeps_primary_patches_and_averages_the_others(photo, tokens, metric):
    demo = demo_of(photo, tokens, 100, 20, metric=metric)
    rebuilt, scores, owner = demo.rebuilt[0].photo, tokens.scores[0].numpy(), demo.owner.numpy()
    primary = np.argsort(-scores, kind="stable")[:100]
    for position in primary:
        assert np.array_equal(patch_of(rebuilt, position), patch_of(photo, position))
    for slot in range(100, 120):
        members = np.flatnonzero(owner == slot)
        assert not set(members) & set(primary)
        pixels = [patch_of(photo, position) for position in members]
        mean = np.average(pixels, axis=0, weights=scores[members])
        for position in members:
            assert abs(patch_of(rebuilt, position) - mean).max() <= 0.5 + 1e-3


def test_clusters_come_from_the_descriptors(photo, tokens, demo):
    other = merge_tokens(split(photo, PATCH), tokens.scores, 128, 32)
    assert not torch.equal(other.owner[0], demo.owner)


def test_baselines_show_their_tokens(photo, demo):
    names = [(each.name, each.tokens) for each in demo.rebuilt]
    assert names == [
        ("VMTC", 160),
        ("Average pooling", 144),
        ("Random", 160),
        ("Strided", 160),
        ("Smaller photo", 144),
    ]
    _, pooled, random, strided, smaller = (each.photo for each in demo.rebuilt)
    mean = np.mean([patch_of(photo, i).astype(float) for i in (0, 1, 24, 25)], axis=0)
    for position in (0, 1, 24, 25):
        assert abs(patch_of(pooled, position) - mean).max() <= 0.5
    for image in (random, strided):
        verbatim = [np.array_equal(patch_of(image, i), patch_of(photo, i)) for i in range(576)]
        assert 160 <= sum(verbatim) < 200
    half = Image.fromarray(photo).resize((168, 168), Image.Resampling.BICUBIC)
    assert np.array_equal(smaller, np.asarray(half.resize((336, 336), Image.Resampling.BICUBIC)))


def test_errors_of_the_default_picture(demo):
    vmtc, pooled, random, strided, smaller = demo.rebuilt
    assert vmtc.psnr > smaller.psnr > pooled.psnr > strided.psnr
    assert vmtc.weighted > smaller.weighted + 5 and min(pooled.psnr, strided.psnr) > random.psnr
    assert vmtc.psnr == pytest.approx(35.7, abs=0.2)


def test_pruned_positions_show_their_nearest_kept_token(photo, tokens):
    rebuilt = demo_of(photo, tokens, 3, 0).rebuilt[0].photo
    kept = tokens.scores[0].topk(3).indices.sort().values.numpy()
    for position in range(576):
        away = (position // GRID - kept // GRID) ** 2 + (position % GRID - kept % GRID) ** 2
        shown = patch_of(rebuilt, position)
        assert np.array_equal(shown, patch_of(photo, kept[away.argmin()]))


def test_nearest_breaks_ties_to_the_smaller_position():
    assert nearest(torch.tensor([0, 2, 6]), 3).tolist() == [0, 0, 1, 0, 0, 1, 2, 2, 1]


@pytest.mark.parametrize(
    "budget, expected",
    [(576, (1, 24)), (575, (2, 12)), (160, (2, 12)), (143, (3, 8)), (48, (4, 6)), (1, (24, 1))],
)
def test_downsampling_is_the_finest_within_the_budget(budget, expected):
    assert downsampling(GRID, budget) == expected


def test_palette_colours_differ():
    colours = palette(32)
    lab = color.rgb2lab(colours / 255)
    apart = [np.linalg.norm(a - b) for a, b in combinations(lab, 2)]
    assert colours.shape == (32, 3) and min(apart) > 15
    assert palette(0).shape == (0, 3) and palette(576).shape == (576, 3)


@pytest.mark.parametrize("source", ["", "layer -2 of " + "m" * 200])
@pytest.mark.parametrize("budget", [(128, 32), (32, 16), (0, 32), (128, 0), (576, 0), (0, 1)])
def test_texts_stay_on_the_sheet_and_apart(photo, tokens, budget, source):
    named = tokens._replace(source=source or tokens.source)
    figure = sheet(demo_of(photo, named, *budget, metric="euclidean"))
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    boxes += [axes.get_window_extent() for axes in figure.axes]
    assert len(figure.axes) == 8
    for box in boxes:
        assert box.x0 > 0 and box.x1 <= 2000 - 40 and box.y0 > 0 and box.y1 < 1570
    for a, b in combinations(boxes, 2):
        assert not a.overlaps(b)


def test_draw_writes_a_png(demo, photo, tmp_path):
    out = tmp_path / "demo.png"
    draw(demo, out)
    with Image.open(out) as image:
        assert image.format == "PNG" and image.size == (2000, 1570)
        pixels = np.asarray(image.convert("RGB").crop((1496, 232, 1944, 680)).resize((24, 24)))
    # the fourth panel is the rebuilt photograph
    expected = np.asarray(Image.fromarray(demo.rebuilt[0].photo).resize((24, 24)))
    assert abs(pixels.astype(int) - expected).mean() < 2


def test_draw_refuses_what_cannot_be_written(demo, tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*gone.demo\.png: No such file"):
        draw(demo, tmp_path / "gone" / "demo.png")
