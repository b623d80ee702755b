"""Tiny vision-language models of several families, with processors that read real photos.

The weights are random and the tokenizers are trained on the spot, so nothing is downloaded. Nor is
torchvision or num2words needed: photos go through the image processors that use Pillow, and the
processors that insist on a video processor have a stand-in here (`Qwen2_5`, `Qwen3`, `SmolVLM`).
"""

from types import SimpleNamespace

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

# by module, as the package itself (5.17) hides these two where there is no torchvision
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.video_utils import VideoMetadata, make_batched_videos

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm")
QWEN, SPLIT = FAMILIES[2:4], FAMILIES[4:]

PATCH, MERGE = 8, 2  # pixels a side of a patch; patches a side of a token (not in LLaVA)
TILES = [[1, 2], [2, 1], [2, 2], [1, 3]]  # how LLaVA-NeXT may cut a photo: rows, columns
PIXELS = {"shortest_edge": 48 * 48, "longest_edge": 128 * 128}  # areas to which Qwen scales
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}

# special tokens, under the names by which the processors look them up
STANDARD = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
IMAGE_TOKEN = {"image_token": "<image>"}
QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
SPLIT_TOKENS = IMAGE_TOKEN | {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
PLACES = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
CORPUS = "what colour is it? the photo shows a rocket. <user>how many? <assistant>two of them. "
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% elif c.type == 'video' %}VIDEO"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def photo(width, height, seed=0):
    """Smooth colours with some noise: neighbouring patches are alike, and no two the same."""
    random = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    slopes, starts = random.uniform(1, 7, (2, 3)), random.uniform(0, 6, 3)
    waves = np.sin(x[..., None] * slopes[0] + y[..., None] * slopes[1] + starts)
    noisy = 0.5 + 0.4 * waves + random.normal(0, 0.05, waves.shape)
    return Image.fromarray((noisy.clip(0, 1) * 255).astype(np.uint8))


def video(width, height, frames=4, seed=0):
    """A photo that fades into another: a list of frames."""
    first, last = photo(width, height, seed), photo(width, height, seed + 1)
    return [Image.blend(first, last, i / max(frames - 1, 1)) for i in range(frames)]


def placeholder(family, kind="image"):
    return f"<|vision_start|><|{kind}_pad|><|vision_end|>" if family in QWEN else f"<{kind}>"


def prompt(family, text="what colour is it?", images=1, videos=0):
    """`text` after a placeholder for each image and each video (videos: Qwen only)."""
    return placeholder(family) * images + placeholder(family, "video") * videos + text


def make(family, dtype=torch.float32, attn_implementation="sdpa", **options):
    """A model and its processor, the same ones at each call.

    options: `layers` of text (3) and `vision_layers` (3, for Qwen 4). Not for Qwen: `image_size`,
    pixels a side of what the vision model reads. LLaVA: `strategy`, "default" or "full" (LLaVA-NeXT
    takes it too, but transformers fails to run it with "full").
    """
    build = _qwen if family in QWEN else _split if family in SPLIT else _llava
    config, processor = build(family, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation=attn_implementation
        )
    # not model.to, as from_pretrained leaves the buffers of the rotary embedding in float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval(), processor


def save(family, folder, **options):
    """Write the model and the processor of `make` to a folder for `from_pretrained`.

    AutoProcessor knows the processors of Qwen and SmolVLM only in the process that called this, as
    they are classes of this file: those of transformers can't be read without torchvision. Nor, in
    5.17, can the image processors of Idefics3 and SmolVLM: there `make` their processors instead.
    """
    model, processor = make(family, **options)
    own = type(processor)
    if own.__module__ == __name__:
        # it is found by its name, so the key need not be a configuration: that of the family would
        # be ignored in 5.17, and be for all its models in later versions
        transformers.AutoProcessor.register(own, own, exist_ok=True)
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


class Frames:
    """What a Qwen processor asks of a video processor, without torchvision."""

    temporal_patch_size, merge_size, fps = 2, MERGE, 2.0

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, videos, **_):
        pixels, grids, metadata = [], [], []
        for frames in map(list, make_batched_videos(videos)):
            indices = list(range(len(frames)))
            metadata.append(VideoMetadata(len(frames), fps=self.fps, frames_indices=indices))
            frames += frames[-1:] * (len(frames) % 2)
            inputs = self.image_processor(frames, return_tensors="pt")
            _, rows, columns = grid = inputs["image_grid_thw"][0].tolist()
            # a photo is made a still of two frames: take one each of two photos
            frame = inputs["pixel_values"].view(-1, 2, rows * columns, 3, 2, PATCH**2)[..., 0, :]
            pixels.append(frame.permute(0, 2, 3, 1, 4).flatten(0, 1).flatten(1))
            grids.append([len(frames) // 2, *grid[1:]])
        return {
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.tensor(grids),
            "video_metadata": metadata,
        }


class WithoutVideoProcessor:
    # transformers takes the parts that a processor checks, saves and loads from this signature,
    # so that a video processor which is a mere attribute may be of any class
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.video_processor = Frames(image_processor)


class Qwen2_5(WithoutVideoProcessor, transformers.Qwen2_5_VLProcessor):
    pass


class Qwen3(WithoutVideoProcessor, transformers.Qwen3VLProcessor):
    pass


class SmolVLM(transformers.SmolVLMProcessor):
    # does what its __init__ does, but for num2words and a video processor: so it reads no videos
    def __init__(self, image_processor, tokenizer, image_seq_len=169, chat_template=None):
        parts = (image_processor, tokenizer)
        transformers.ProcessorMixin.__init__(self, *parts, chat_template=chat_template)
        for name, token in SPLIT_TOKENS.items():
            setattr(self, name, token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.video_token, self.image_seq_len = "<video>", image_seq_len
        self.video_processor = SimpleNamespace(num_frames=None, fps=None)  # for the chat template


def _tokenizer(tokens, bos=True, more=()):
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = [*STANDARD.values(), *tokens.values(), *more]
    model = Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = bytes_, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 48,
        special_tokens=special,
        initial_alphabet=bytes_.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator([CORPUS] * 20, trainer)
    if bos:
        model.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        **(STANDARD if bos else STANDARD | {"bos_token": None}),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=tokens,
    )


def _template(family, bos=True):
    template = TEMPLATE.replace("IMAGE", placeholder(family))
    return "{{ bos_token }}" * bos + template.replace("VIDEO", placeholder(family, "video"))


def _text(tokenizer, layers, **more):
    ids = {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in STANDARD}
    sizes = {"num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": len(tokenizer)}
    # larger weights than the default, so that attention is far from uniform
    return {**SMALL, **sizes, **ids, "initializer_range": 0.3, **more}


def _llava(family, layers=3, vision_layers=3, image_size=None, strategy="default"):
    tiled = family == "llava_next"
    size = image_size or (32 if tiled else 64)
    tiles = [[size * rows, size * columns] for rows, columns in TILES]
    pinpoints = {"image_grid_pinpoints": tiles} if tiled else {}
    names = ("LlavaNextImageProcessorPil", "LlavaNextProcessor", "LlavaNextConfig")
    if not tiled:
        names = ("CLIPImageProcessorPil", "LlavaProcessor", "LlavaConfig")
    image_class, processor_class, config_class = (getattr(transformers, name) for name in names)
    tokenizer = _tokenizer(IMAGE_TOKEN)
    square = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    processor = processor_class(
        image_class(**square, **pinpoints),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
        chat_template=_template(family),
    )
    sizes = {"num_hidden_layers": vision_layers, "image_size": size, "patch_size": PATCH}
    config = config_class(
        vision_config=transformers.CLIPVisionConfig(**SMALL, **sizes, initializer_factor=6.0),
        text_config=transformers.LlamaConfig(**_text(tokenizer, layers)),
        image_token_index=tokenizer.image_token_id,
        vision_feature_select_strategy=strategy,
        **pinpoints,
    )
    return config, processor


def _qwen(family, layers=3, vision_layers=4):
    third = family == "qwen3_vl"
    tokenizer = _tokenizer(QWEN_TOKENS, bos=False)
    images = transformers.Qwen2VLImageProcessorPil(size=PIXELS, patch_size=PATCH, merge_size=MERGE)
    template = _template(family, bos=False)
    processor = (Qwen3 if third else Qwen2_5)(images, tokenizer, chat_template=template)
    head = SMALL["hidden_size"] // SMALL["num_attention_heads"]
    sections = [head // 4, head // 8, head // 8]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}
    if third:
        rope["mrope_interleaved"] = True
        vision = {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
        text = _text(tokenizer, layers, rope_parameters=rope, head_dim=head)
    else:
        # windows of 2 x 2 tokens, of which any photo has several
        vision = {"window_size": 2 * MERGE * PATCH, "fullatt_block_indexes": [1, 3]}
        text = _text(tokenizer, layers, rope_parameters=rope)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "depth": vision_layers}
    vision |= {
        **sizes,
        "out_hidden_size": SMALL["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
    }
    config = (transformers.Qwen3VLConfig if third else transformers.Qwen2_5_VLConfig)(
        vision_config={**vision, "initializer_range": 0.2},
        text_config=text,
        **{f"{name}_id": getattr(tokenizer, f"{name}_id") for name in QWEN_TOKENS},
    )
    return config, processor


def _split(family, layers=3, vision_layers=3, image_size=64):
    smol = family == "smolvlm"
    tokenizer = _tokenizer(SPLIT_TOKENS, bos=not smol, more=PLACES)
    # the longer side of a photo is scaled to that of 3 sub-images
    longest, tile = {"longest_edge": 3 * image_size}, {"longest_edge": image_size}
    image_class = SmolVLMImageProcessorPil if smol else Idefics3ImageProcessorPil
    processor = (SmolVLM if smol else transformers.Idefics3Processor)(
        image_class(size=longest, max_image_size=tile),
        tokenizer,
        image_seq_len=(image_size // PATCH // MERGE) ** 2,
        chat_template=_template(family, bos=not smol),
    )
    sizes = {"num_hidden_layers": vision_layers, "image_size": image_size, "patch_size": PATCH}
    config = (transformers.SmolVLMConfig if smol else transformers.Idefics3Config)(
        vision_config={**SMALL, **sizes, "initializer_range": 0.2},
        text_config=transformers.LlamaConfig(**_text(tokenizer, layers)),
        image_token_id=tokenizer.image_token_id,
        scale_factor=MERGE,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor
