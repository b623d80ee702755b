"""A LLaVA with fewer visual tokens: `python examples/llava.py`, or with --model a checkpoint.

Without --model it is the laboratory's, which comes with the package: a toy that knows only the
drawn shapes and words of its own world, but answers at once.
"""

import argparse
import time

import torch
import transformers
from PIL import Image

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.transformers import attach
from vmtc_kernels.laboratory import LAB, LAB_QUESTION, LAB_SCENE, MERGED, PRIMARY


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


def count_or_share(text):
    return int(text) if text.isdecimal() else float(text)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", default=str(LAB), help="a folder or id of a checkpoint")
    arguments.add_argument("--image", default=LAB_SCENE, help="a file; without it, a drawn scene")
    arguments.add_argument("--prompt", default=LAB_QUESTION)
    budget = {"type": count_or_share, "help": "a count, or a share as 0.25"}
    arguments.add_argument("--primary", default=PRIMARY, **budget)
    arguments.add_argument("--merged", default=MERGED, **budget)
    arguments.add_argument("--keep-ratio", type=float, default=0.5, help="1 inhibits nothing")
    arguments.add_argument("--tokens", type=int, default=32, help="longest answer")
    given = arguments.parse_args()

    model, processor = load(given.model)
    image = Image.open(given.image).convert("RGB")
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
