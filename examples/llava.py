"""A LLaVA with fewer visual tokens: `python examples/llava.py`, or with --model a checkpoint.

Without --model it makes a tiny one of random weights, which answers nonsense, but at once.
"""

import argparse
import time

import torch
import transformers
from PIL import Image

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.transformers import attach


def tiny():
    """A random LLaVA that sees 24 x 24 patches, as LLaVA-1.5 does, and its processor."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    bytes_ = Tokenizer(models.BPE(vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    small = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ids = {f"{name}_token_id": i for i, name in enumerate(("pad", "bos", "eos"))}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            **small, num_hidden_layers=4, image_size=336, patch_size=14
        ),
        text_config=transformers.LlamaConfig(
            **small, num_hidden_layers=4, vocab_size=len(vocabulary), **ids
        ),
        image_token_id=vocabulary["<image>"],
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval(), processor


def load(source):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForImageTextToText.from_pretrained(source, dtype="auto")
    return model.to(device).eval(), transformers.AutoProcessor.from_pretrained(source)


def prompt_of(processor, text):
    if not getattr(processor, "chat_template", None):
        return f"USER: {processor.image_token}\n{text} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    turn = [{"role": "user", "content": content}]
    return processor.apply_chat_template(turn, add_generation_prompt=True)


def answer(model, processor, inputs, tokens):
    """The answer's text, and seconds to its first token: the second of two runs, the first warms"""
    for _ in range(2):
        begin = time.perf_counter()
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        first = time.perf_counter() - begin
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    new = ids[0, inputs["input_ids"].shape[1] :]
    return processor.decode(new, skip_special_tokens=True), first


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", help="a folder or id of a checkpoint")
    arguments.add_argument("--image", help="a file; without it, a picture is computed")
    arguments.add_argument("--prompt", default="What is in this picture?")
    arguments.add_argument("--primary", type=int, default=128, help="visual tokens kept")
    arguments.add_argument("--merged", type=int, default=32, help="merged visual tokens")
    arguments.add_argument("--keep-ratio", type=float, default=0.5, help="1 inhibits nothing")
    arguments.add_argument("--tokens", type=int, default=32, help="length of the answer")
    given = arguments.parse_args()

    model, processor = load(given.model) if given.model else tiny()
    image = (
        Image.open(given.image).convert("RGB")
        if given.image
        else Image.effect_mandelbrot((672, 448), (-2.1, -1.2, 1.1, 1.2), 100).convert("RGB")
    )
    prompt = prompt_of(processor, given.prompt)
    plain = processor(images=image, text=prompt, return_tensors="pt")
    plain = plain.to(model.device, model.dtype)

    vmtc = VMTCConfig(num_primary=given.primary, num_merged=given.merged)
    cmai = CMAIConfig(keep_ratio=given.keep_ratio)
    runs = [("unmodified", plain, *answer(model, processor, plain, given.tokens))]
    for name, parts in (("VMTC", {"vmtc": vmtc}), ("VMTC and CMAI", {"vmtc": vmtc, "cmai": cmai})):
        with attach(model, processor, **parts) as handle:
            inputs = handle.prepare(images=image, text=prompt)
            runs.append((name, inputs, *answer(model, processor, inputs, given.tokens)))
    for name, inputs, text, first in runs:
        length = inputs["input_ids"].shape[1]
        print(f"{name}: {length} tokens in the prompt, first token after {first * 1e3:.1f} ms")
        print(f"    {text!r}")


if __name__ == "__main__":
    main()
