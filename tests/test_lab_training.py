"""What the laboratory's model is taught: the batches, the packed questions, the training."""

import argparse

import numpy as np
import pytest
import torch

from bench.quality import batches, model, train
from bench.quality.batches import IGNORED, Batches
from bench.quality.checkpoint import load
from bench.quality.questions import FAMILIES, ask, describe, letters
from bench.quality.world import COLOURS, LETTERS, PATTERNS, SHAPES, sample

PREFIX = 1 + model.GRID**2


@pytest.fixture(scope="module")
def tokenizer():
    return model.tokenizer()


@pytest.fixture(scope="module")
def lesson(tokenizer):
    torch.manual_seed(0)
    return train.Lesson(model.build(len(tokenizer))).eval()


def test_what_is_in_capitals_is_a_token_a_letter(tokenizer):
    assert tokenizer.tokenize("MOK") == ["M", "O", "K"]
    assert tokenizer.tokenize('"RED STARS"')[1:4] == ["R", "E", "D"]
    assert tokenizer.tokenize("what colour is the star?") == [
        "what", *(f"Ġ{w}" for w in ("colour", "is", "the", "star")), "?",
    ]  # fmt: skip
    # any text comes back
    text = "Zürich \N{SNOWMAN} «x»\n\tjson: {}"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == model.VOCABULARY


def test_patches_and_tags_tell_what_is_there():
    for i in range(30):
        scene = sample("train", (4, i))
        patches, tags = batches.patches(scene), batches.tags(scene)
        grid = patches.reshape(model.GRID, model.GRID, 6)
        for t in scene.things:
            kind = SHAPES.index(t.shape) + 1, COLOURS.index(t.colour) + 1
            middle = grid[t.y // model.PATCH, t.x // model.PATCH]
            assert tuple(middle[:2]) == kind
            assert middle[2] == PATTERNS.index(t.pattern) + 1 and middle[3] == 0
        assert np.array_equal(grid[..., 4:], np.indices(grid.shape[:2]).transpose(1, 2, 0))
        letters = set(patches[:, 3].tolist()) - {0}
        word = scene.sign.word if scene.sign else ""
        assert letters == {LETTERS.index(letter) + 1 for letter in word}
        kinds = {(t.shape, t.colour) for t in scene.things}
        assert tags[:36].sum() == len(kinds) and tags[36:].sum() == len(word)
        covered = {tuple(p) for p in patches[:, :2].tolist() if p[0]}
        assert covered == {(SHAPES.index(s) + 1, COLOURS.index(c) + 1) for s, c in kinds}


def test_every_request_has_room_in_a_row(tokenizer):
    lengths = []
    for i in range(600):
        scene, rng = sample("train", (6, i)), np.random.default_rng(i)
        asked = [q for family in FAMILIES for q in ask(scene, family, rng)]
        pairs = [(q.text, q.target) for q in asked] + [describe(scene, rng), letters(rng)]
        for parts in pairs:
            prompt, answer = tokenizer([parts[0] + "\n", parts[1]])["input_ids"]
            lengths.append(len(prompt) + len(answer) + 1)
    assert max(lengths) <= train.LENGTH and np.mean(lengths) < train.LENGTH / 3
    # options alone are what the tokenizer knows
    assert tokenizer.tokenize("which letter is blue? (a) red (b) blue") == [
        *("which", "Ġletter", "Ġis", "Ġblue", "?", "Ġ(", "a", ")", "Ġred", "Ġ(", "b", ")", "Ġblue"),
    ]


@pytest.mark.parametrize("step", train.MIXES)
def test_a_mix_says_what_is_asked(step, monkeypatch):
    mix = train.MIXES[step]
    assert sum(mix.families) == pytest.approx(1)
    data, scene = Batches(None, 1, 1, 1, seed=0, mix=mix), sample("train", (1, 1))
    first, again = ([data._texts(scene, np.random.default_rng(i)) for i in range(60)] for _ in "ab")
    assert first == again
    seen = []

    def asked(scene, family, rng, plain):
        seen.append(family)
        return ask(scene, family, rng, plain=plain)

    monkeypatch.setattr(batches, "ask", asked)
    monkeypatch.setattr(batches, "letters", lambda rng: ("letters", ""))
    monkeypatch.setattr(batches, "describe", lambda scene, rng: ("described", ""))
    rng = np.random.default_rng(0)
    told = [data._texts(scene, rng)[:1] for _ in range(2000)]
    for text, share in (("letters", mix.letters), ("described", mix.described)):
        assert told.count([(text, "")]) / 2000 == pytest.approx(share, abs=0.03)
    for family, share in zip(FAMILIES, mix.families, strict=True):
        assert seen.count(family) / len(seen) == pytest.approx(share, abs=0.06)


def test_plain_questions_have_no_instruction():
    scene, rng = sample("train", (1, 1)), np.random.default_rng(0)

    def told(plain):
        questions = [q for _ in range(300) for q in ask(scene, "open", rng, plain=plain)[:1]]
        return sum(bool(q.instructions) for q in questions) / len(questions)

    assert told(1.0) == 0 and told(0.8) < 0.2 < told(0.0)


def test_the_model_of_the_package_was_trained_on_these_texts(tokenizer):
    """Other questions make another tokenizer: then it is to be trained anew."""
    _, processor = load()
    assert processor.tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_batches_are_those_of_their_place(tokenizer):
    data = iter(Batches(tokenizer, 2, 2, 80, seed=3, first=5))
    next(data)
    again = Batches(tokenizer, 2, 2, 80, seed=3).batch(6)
    for name, tensor in vars(next(data)).items():
        assert torch.equal(tensor, getattr(again, name)), name
    other = Batches(tokenizer, 2, 2, 80, seed=4).batch(6)
    assert not torch.equal(other.pixels, again.pixels)


def test_packed_questions_are_as_if_each_were_alone(tokenizer, lesson):
    batch = Batches(tokenizer, 3, 2, 96, seed=1).batch(0)
    # as where the image has its own length
    batch.prefix[:] = torch.arange(PREFIX)
    for image in range(3):
        for row in range(2):
            for number in range(int(batch.segments[image, row].max()) + 1):
                own = batch.segments[image, row] == number
                batch.positions[image, row, own] = PREFIX + torch.arange(float(own.sum()))
    with torch.inference_mode():
        seen = lesson.model.model.vision_tower(
            train.normalized(batch.pixels), output_hidden_states=True
        )
        tokens = lesson.model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])
        packed, targets = train.answers(lesson.model, batch, tokens)
    start, questions = 0, 0
    plain = model.build(len(tokenizer)).eval()  # with the attention of transformers
    plain.load_state_dict(lesson.model.state_dict())
    pixels = train.normalized(batch.pixels)
    for image in range(3):
        for row in range(2):
            for number in range(int(batch.segments[image, row].max()) + 1):
                own = batch.segments[image, row] == number
                ids, labels = batch.ids[image, row, own], batch.labels[image, row, own]
                prompt = torch.tensor([model.BOS] + [model.IMAGE] * (PREFIX - 1))
                with torch.inference_mode():
                    alone = plain(
                        input_ids=torch.cat([prompt, ids])[None],
                        pixel_values=pixels[image : image + 1],
                    ).logits[0, PREFIX:]
                asked = labels != IGNORED
                # each label is the next token
                assert torch.equal(labels[asked], ids[1:][asked[:-1]])
                assert ids[-1] == model.EOS and labels[asked][-1] == model.EOS
                end = start + int(asked.sum())
                assert torch.equal(targets[start:end], labels[asked])
                torch.testing.assert_close(packed[start:end], alone[asked], rtol=1e-4, atol=1e-4)
                start, questions = end, questions + 1
    assert start == len(packed) and questions > 12


def test_places_are_stretched_and_not_lost():
    spans = []
    for i in range(200):
        places, start = batches._positions(np.random.default_rng(i), PREFIX - 1)
        assert places.shape == (PREFIX,) and places[0] == 0 and places[1] >= 1
        assert (np.diff(places) >= 0).all() and places[-1] < start + 1e-4
        spans.append(start - 1)
    assert 60 < sum(span == PREFIX - 1 for span in spans) < 140
    assert min(spans) < 12 and max(spans) > 200


def arguments(out, steps):
    return argparse.Namespace(
        **{"out": out, "export": out / "model", "steps": steps, "every": 2, "threads": 1},
        **{
            "images": 1,
            "vision_steps": 2,
            "vision_images": 2,
            "rate": 1e-3,
            "seed": 0,
        },
    )


def test_training_goes_on_where_it_stopped(tmp_path, monkeypatch):
    # few layers are enough for it
    small = model.build

    def build(vocabulary):
        config = small(vocabulary).config
        config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 2
        import transformers

        return transformers.LlavaForConditionalGeneration(config)

    monkeypatch.setattr(model, "build", build)
    monkeypatch.setattr(train, "LENGTH", 64)

    def weights(folder):
        return torch.load(folder / "last.pt", weights_only=True)["lesson"]

    train.train(arguments(tmp_path / "whole", 4))
    with monkeypatch.context() as stopped:
        step, done = train.Optimizers.step, []

        def stop(self, index):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(index)
            step(self, index)

        stopped.setattr(train.Optimizers, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(arguments(tmp_path / "parts", 4))
    assert torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["step"] == 2
    assert done == [0, 1, 0]
    train.train(arguments(tmp_path / "parts", 4))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
