"""Benchmarks of lmms-eval made of a few local photos, and what must come of their requests."""

import json

import torch
import transformers
import vlm
import yaml
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.tasks import TaskManager

from vmtc_kernels import CMAIConfig, VMTCConfig
from vmtc_kernels.integrations.lmms_eval import _model
from vmtc_kernels.integrations.transformers import attach

VMTC = VMTCConfig(num_primary=12, num_merged=4)
CMAI = CMAIConfig(keep_ratio=0.5)
# the four rows of the paper: what model_args say beside the model, and what it must come to
ROWS = {
    "baseline": ("", {}),
    "spatial downsampling": (",downsample=2", {"downsample": 2}),
    "VMTC": (",num_primary=12,num_merged=4", {"vmtc": VMTC}),
    "VMTC+CMAI": (",num_primary=12,num_merged=4,keep_ratio=0.5", {"vmtc": VMTC, "cmai": CMAI}),
}

NEW = 8  # tokens of an answer
# photos, each its size and seed, and a question: with one, none and two of them
QUESTIONS = [
    ([(96, 64, 1)], "what colour is it?"),
    ([(50, 120, 2)], "how many? two of them."),
    ([], "the photo shows a rocket. what is it?"),
    ([(64, 64, 3), (80, 40, 4)], "what is it?"),
    ([(120, 90, 5)], "is it a rocket? how many of them? what colour?"),
    ([(33, 70, 6)], "what?"),
    ([], "how many?"),
]
CHOICES = ["a rocket", "two of them, what colour is it", "photo"]
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(name) for name in doc["photos"]]
"""


def write(folder, answers, name="photos_vqa"):
    """Tasks `name` and `name`_ppl (multiple choice), with these answers to be given."""
    folder.mkdir(parents=True)
    lines = []
    for number, ((photos, question), answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        names = []
        for i, photo in enumerate(photos):
            names.append(str(folder / f"{number}-{i}.png"))
            vlm.photo(*photo).save(names[-1])
        doc = {"photos": names, "question": question, "answer": answer, "right": number % 3}
        lines.append(json.dumps(doc))
    data = folder / "docs.jsonl"
    data.write_text("\n".join(lines))
    (folder / "utils.py").write_text(UTILS)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    asked = {"max_new_tokens": NEW, "temperature": 0, "do_sample": False}
    answered = {"doc_to_target": "answer", "output_type": "generate_until"}
    save(folder, name, common | answered | {"generation_kwargs": asked}, "exact_match")
    chosen = {"doc_to_target": "{{right}}", "doc_to_choice": CHOICES}
    save(folder, f"{name}_ppl", common | chosen | {"output_type": "multiple_choice"}, "acc")
    return folder


def save(folder, name, task, metric):
    task |= {"task": name, "metric_list": [measured(metric)]}
    text = yaml.safe_dump(task) + "doc_to_visual: !function utils.visual\n"
    (folder / f"{name}.yaml").write_text(text)


def measured(metric):
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def chat(family, photos, question):
    """The prompt as the chat template of `vlm` writes it."""
    begin = "" if family in vlm.QWEN or family == "smolvlm" else "<s>"
    return f"{begin}<user>{vlm.placeholder(family) * len(photos)}{question}\n<assistant>"


class Plain:
    """A model on its own, a prompt at a time: what the plugin must come to."""

    def __init__(self, family, model, processor, parts):
        self.family, self.model, self.processor, self.parts = family, model, processor, parts

    def inputs(self, photos, text, handle):
        images = [vlm.photo(*photo) for photo in photos]
        given = {"images": [images] if images else None, "text": [text]}
        given["add_special_tokens"] = not text.startswith("<s>")
        if handle is not None:
            return handle.prepare(**given)
        return self.processor(**given, return_tensors="pt")

    def run(self, use):
        with torch.no_grad():
            if not self.parts:
                return use(None)
            with attach(self.model, self.processor, **self.parts) as handle:
                return use(handle)

    def answers(self, **options):
        """To each of QUESTIONS, and how many tokens its prompt has."""

        def use(handle):
            found = []
            for photos, question in QUESTIONS:
                text = chat(self.family, photos, question)
                inputs = self.inputs(photos, text, handle)
                length = inputs["input_ids"].shape[1]
                given = {"max_new_tokens": NEW, "do_sample": False, **options}
                (ids,) = self.model.generate(**inputs, **given)
                answer = self.processor.decode(ids[length:], skip_special_tokens=True)
                found.append((answer, length))
            return found

        return self.run(use)

    def losses(self, continuations):
        """To each of QUESTIONS, of each continuation: the mean of -log p, and if it is greedy."""

        def use(handle):
            return [
                [self.loss(photos, question, more, handle) for more in continuations]
                for photos, question in QUESTIONS
            ]

        return self.run(use)

    def likeliest(self):
        """What is greedy after the first questions, where that is text that can be encoded."""

        def use(handle):
            found = []
            for photos, question in QUESTIONS:
                text = chat(self.family, photos, question)
                logits = self.model(**self.inputs(photos, text, handle)).logits
                token = int(logits[0, -1].argmax())
                tokenizer = self.processor.tokenizer
                if tokenizer.encode(tokenizer.decode(token), add_special_tokens=False) == [token]:
                    found.append(tokenizer.decode(token))
            return found[:2]

        return self.run(use)

    def loss(self, photos, question, more, handle):
        text = chat(self.family, photos, question)
        ids = self.inputs(photos, text + more, handle)
        # the tokens one after the other, each after all before it
        count = ids["input_ids"].shape[1] - self.inputs(photos, text, handle)["input_ids"].shape[1]
        logits = self.model(**ids).logits[0].double()
        tokens, shares = ids["input_ids"][0].tolist(), []
        greedy = True
        for at in range(len(tokens) - count, len(tokens)):
            before = logits[at - 1]
            shares.append(float(before[tokens[at]] - before.logsumexp(0)))
            greedy &= int(before.argmax()) == tokens[at]
        return -sum(shares) / count, greedy


def save_model(family, folder):
    """A tiny model whose answers are letters."""
    vlm.save(family, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # no pieces of a letter, and none that stand for images
    left_out = [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()]
    left_out += [i for i in tokenizer.all_special_ids if i != tokenizer.eos_token_id]
    transformers.GenerationConfig(
        suppress_tokens=sorted(set(left_out)),
        begin_suppress_tokens=[tokenizer.eos_token_id],  # lmms-eval keeps no empty answers
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    return folder


def evaluate(folder, tasks, more="", name="photos_vqa", **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return evaluator.simple_evaluate(
        "vmtc_hf",
        model_args=f"pretrained={folder},device=cpu{more}",
        tasks=[name],
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )


def made(folder, **arguments):
    return _model.VmtcHf(pretrained=folder, device="cpu", **arguments)


def messages(doc):
    photos, question = doc
    content = [{"type": "image", "url": vlm.photo(*photo)} for photo in photos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def instance(number, options, kind="generate_until", ask=messages):
    metadata = {"task": "local", "doc_id": number, "repeats": 1}
    arguments = ("unused", ask, options, number, "local", "test")
    return Instance(kind, arguments, idx=0, metadata=metadata)


def asked(model, numbers=None, options=None, **more):
    """Requests as lmms-eval makes them, of QUESTIONS by number."""
    model.task_dict = {"local": {"test": QUESTIONS}}
    options = {"max_new_tokens": NEW, "temperature": 0.0} if options is None else options
    numbers = range(len(QUESTIONS)) if numbers is None else numbers
    return [instance(number, dict(options), **more) for number in numbers]


def texts(results):
    return [result.text for result in results]
