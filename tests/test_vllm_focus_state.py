"""CMAI's state in pages as vLLM hands them out, without vLLM: steps of any mix over used memory."""

import pytest
import torch

from vmtc_kernels import CMAIConfig
from vmtc_kernels.integrations.vllm import _focus_state
from vmtc_kernels.integrations.vllm._focus_state import Batch, Place, Tokens, attend, begin

H, G, D, BLOCK, BLOCKS, MOST = 4, 2, 12, 8, 24, 23
T, I = 1, 2  # noqa: E741
WITHOUT, BEFORE = [T] * 21, [I] * 9 + [T] * 14
AFTER = [T] * 11 + [I] * 9 + [T] * 5 + [I] * 7 + [T] * 6  # text that has not seen what comes
CONFIGS = {
    "product": CMAIConfig(keep_ratio=0.3, layers=None),
    "residual": CMAIConfig(
        keep_ratio=None,
        threshold=0.7,
        aggregate="residual",
        suppression=0.2,
        min_keep=2,
        layers=None,
    ),
    "per_head": CMAIConfig(keep_ratio=0.3, head_mode="per_head", renormalize=False, layers=None),
}
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Sequence:
    """A request with all its queries, keys and values, and what attention of it all at once is."""

    def __init__(self, modality, config, dtype=torch.float32, seed=0, inhibits=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.q, self.k, self.v = (torch.randn(n, len(modality), D).to(dtype) for n in (H, G, G))
        self.modality, self.done, self.table = modality, 0, []
        if not inhibits:
            modality = [T] * len(modality)
        given = torch.tensor([modality], dtype=torch.uint8)
        whole = config.attention(self.q[None], self.k[None], self.v[None], given, MOST)
        self.expected = whole[0].transpose(0, 1)


class Engine:
    """Pages that hold what others left: NaN, until they have been used."""

    def __init__(self, config, dtype=torch.float32, inhibits=True, gap=0):
        matrices = 1 if config.head_mode == "mean" else H
        self.config, self.place = config, Place(matrices if inhibits else 0, MOST)
        size = self.place.size(2 * G * D, dtype.itemsize)
        memory = torch.full((BLOCKS, BLOCK * size + gap), 255, dtype=torch.uint8)
        self.cache = (
            memory[:, : BLOCK * size].unflatten(1, (1, BLOCK, size)).view(dtype)
        )  # every bit set: NaN in every type
        self.free = torch.randperm(BLOCKS).tolist()
        self.tokens = Tokens()

    def leave(self, sequence):
        self.free = sequence.table + self.free  # the next one gets these
        sequence.table = []

    def step(self, *scheduled):
        """scheduled: pairs of a sequence and how many tokens."""
        starts, slots, lengths, rows, new = [0], [], [], [], []
        for sequence, count in scheduled:
            places = range(sequence.done, sequence.done + count)
            while len(sequence.table) * BLOCK < places.stop:
                sequence.table.append(self.free.pop(0))
            slots += [sequence.table[p // BLOCK] * BLOCK + p % BLOCK for p in places]
            new += [sequence.modality[p] for p in places]
            starts.append(starts[-1] + count)
            lengths.append(places.stop)
            rows.append((sequence, places))
        # what is beyond a request's blocks is no block, or another's
        table = torch.full((len(rows), 9), 10**6, dtype=torch.int32)
        table[::2] = -1
        for row, (sequence, _) in zip(table, rows, strict=True):
            row[: len(sequence.table)] = torch.tensor(sequence.table)
        slots += [-1] * 3  # padding
        longest = min(max(lengths) + 5, 9 * BLOCK)
        batch = Batch(starts, torch.tensor(slots), torch.tensor(lengths).int(), table, longest)
        views = self.place.views(self.cache, G, D)
        step = begin(batch, views, self.place, torch.tensor(new, dtype=torch.uint8))
        q, k, v = (
            torch.nn.functional.pad(
                torch.cat([getattr(s, name)[:, list(p)] for s, p in rows], 1).transpose(0, 1),
                (0, 0, 0, 0, 0, 3),
            )
            for name in "qkv"
        )
        out = torch.full_like(q, 7)
        attend(step, views, self.config, D**-0.5, q, k, v, out)
        assert (out[starts[-1] :] == 7).all()  # of no token
        for (sequence, places), start in zip(rows, starts, strict=False):
            got = out[start : start + len(places)]
            expected = sequence.expected[places.start : places.stop]
            torch.testing.assert_close(
                got, expected, atol=TOLERANCE[got.dtype], rtol=TOLERANCE[got.dtype]
            )
            sequence.done = places.stop
        return step


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.mark.parametrize("gathered", [1, 10**6])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_steps_of_any_mix(config, dtype, gathered, monkeypatch):
    monkeypatch.setattr(_focus_state, "GATHERED", gathered)
    engine = Engine(config, dtype, gap=32)
    a, b, c, d = (
        Sequence(modality, config, dtype, seed)
        for seed, modality in enumerate((WITHOUT, BEFORE, AFTER, AFTER))
    )
    engine.step((a, 13), (c, 11))  # all text
    engine.step((b, 5), (a, 1), (c, 4), (d, 4))  # the middle of an image
    engine.step((d, 22), (a, 1), (b, 11), (c, 11))
    for _ in range(4):  # decode
        engine.step((b, 1), (c, 1), (a, 1), (d, 1))
    engine.step((d, 8), (c, 8), (b, 3))


def test_blocks_of_others(config):
    """Blocks are given on as they are, with text where an image was and the other way round."""
    engine = Engine(config)
    for seed, modality in enumerate((BEFORE, AFTER, WITHOUT, AFTER, BEFORE, BEFORE[::-1])):
        sequence = Sequence(modality, config, seed=seed)
        for count in (8, 5, len(modality) - 15, 1, 1):
            engine.step((sequence, count))
        engine.leave(sequence)


def test_shared_prefix(config):
    """A request that starts as another did goes on from its blocks."""
    engine = Engine(config)
    first = Sequence(AFTER, config)
    engine.step((first, 27))
    second = Sequence(AFTER, config)
    for shared in (8, 16, 24):
        second.done, second.table = shared, first.table[: shared // BLOCK]
        engine.step((second, 27 - shared), (first, 1))
        engine.step((second, 5))
        second.done = first.done = 27


def test_layers_that_do_not_inhibit():
    config = CONFIGS["product"]
    engine = Engine(config, inhibits=False)
    sequences = [Sequence(m, config, seed=s, inhibits=False) for s, m in enumerate((BEFORE, AFTER))]
    for count in (10, 1, 6, 3):
        engine.step(*((sequence, count) for sequence in sequences))
    assert engine.place.size(2 * G * D, 4) == 2 * G * D * 4


def test_requests_run_together():
    """Those that generate, with and without images; no more state is gathered than is used."""
    config = CONFIGS["product"]
    engine = Engine(config)
    sequences = [
        Sequence(modality, config, seed=seed)
        for seed, modality in enumerate((WITHOUT, AFTER, BEFORE, WITHOUT))
    ]
    for sequence in sequences:
        engine.step((sequence, 16))
    step = engine.step(*((sequence, 1) for sequence in sequences))
    assert sorted((len(g.query), g.num_image) for g in step.groups) == [(2, 0), (2, 9)]
    assert all(g.modality.shape[1] == 17 and g.table.shape[1] == 3 for g in step.groups)


def test_too_many_images():
    config = CONFIGS["product"]
    engine, most = Engine(config), Sequence([I] * MOST, config)
    # what is left in memory beyond a request's tokens is not counted
    engine.place.views(engine.cache, G, D).modality.fill_(I)
    engine.step((most, MOST))
    sequence = Sequence([I] * (MOST + 1), config)
    with pytest.raises(RuntimeError, match=f"has {MOST + 1} image tokens, more than the {MOST} "):
        Engine(config).step((sequence, MOST + 1))


@pytest.mark.parametrize("numbers", [5, 48, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_parts_of_a_page_do_not_overlap(numbers, dtype):
    place = Place(3, 7)
    size = place.size(2 * numbers, dtype.itemsize)
    assert size % 16 == 0
    views = place.views(torch.zeros(2, 1, 4, size // dtype.itemsize, dtype=dtype), 1, numbers)
    for i, view in enumerate(views):
        view.fill_(i + 1)
    assert [view.unique().tolist() for view in views] == [[1], [2], [3], [4]]
    assert views.text_image.shape == (2, 4, 3, 7)


def test_memory_to_gather_state():
    assert Place(0, 7).gathered(10**9) == 0
    assert Place(1, 1).gathered(10) == _focus_state.GATHERED
    assert Place(2, 512).gathered(2**20) == 2**30
