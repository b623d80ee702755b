"""A small LLaVA of random weights with the tokenizer and the processor that belong to it."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .questions import FAMILIES, ask, describe, letters
from .world import SIDE, sample

PATCH = 16
GRID = SIDE // PATCH
VOCABULARY = 640
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(4)
# what stands around a question: the chat template
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '\\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def tokenizer() -> Any:
    """A byte-level one (BPE), from the training's questions.

    Its merges come from text in small letters, so that what is written in capitals, the words on
    signs first, is one token a letter.
    """
    texts = []
    for i in range(4000):
        scene, rng = sample("train", (0, i)), np.random.default_rng(i)
        for family in FAMILIES:
            for question in ask(scene, family, rng)[:1]:
                texts += [question.text.lower(), question.target.lower()]
                if family == "reading":
                    # the words themselves are to stay letters
                    del texts[-1]
        for text, target in (describe(scene, rng), letters(rng)):
            texts += [text, target]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        extra_special_tokens={"image_token": SPECIAL[IMAGE]},
        padding_side="left",
        chat_template=TEMPLATE,
    )


def processor(tokens: Any) -> Any:
    """With the image processor of CLIP at this world's size."""
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
        ),
        tokens,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build(vocabulary: int = VOCABULARY) -> Any:
    """The model, random; about 5.4 million parameters."""
    heads = {"hidden_size": 192, "num_attention_heads": 6}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **heads,
            intermediate_size=768,
            num_hidden_layers=6,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act="gelu",
        ),
        text_config=transformers.LlamaConfig(
            **heads,
            intermediate_size=512,
            num_hidden_layers=6,
            vocab_size=vocabulary,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
            tie_word_embeddings=True,
        ),
        image_token_id=IMAGE,
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    return transformers.LlavaForConditionalGeneration(config)
