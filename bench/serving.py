"""``python -m vmtc_kernels.bench.serving``: vLLM's server with and without the plugin's methods.

Servers of the same model stand side by side and are asked in turn, round by round, by vLLM's
own client (the library of ``vllm bench serve``). The model is a LLaVA-1.5 of random weights, `SIZE`
of `llava.SIZES`; every request has an image of its own. Nothing is timed before each server gave
the answers that transformers gives.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from vmtc_kernels import CMAIConfig, VMTCConfig

from .environment import describe
from .llava import SIZES, Size, build

SIZE = "small"
TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %} {{ c.text }}{% endif %}{% endfor %}{% endfor %}"
)


def save(folder: Path, size: Size) -> tuple[Any, Any]:
    """The model as vLLM reads it, and what transformers has of it."""
    import transformers
    from safetensors.torch import load_file, save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    model, processor = build(size, "cpu", torch.float32)
    known = processor.tokenizer.get_vocab()
    words = {**known, **{f"w{i}": i for i in range(len(known), size.vocabulary)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    processor.tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    side = size.image
    processor.image_processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    processor.num_additional_image_tokens = 1  # [CLS]
    processor.chat_template = TEMPLATE
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "model.safetensors"
    old, new = "vision_tower.", "vision_tower.vision_model."
    weights = {
        new + name.removeprefix(old) if name.startswith(old) and new not in name else name: weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})
    return model, processor


def photo(seed: int, side: int) -> Any:
    """Smooth colours with some noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = smooth + random.normal(0, 12, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def content(seed: int, side: int) -> dict[str, Any]:
    file = io.BytesIO()
    photo(seed, side).save(file, format="PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


# as the plugin is configured: fields of VMTCConfig and CMAIConfig
Given = dict[str, dict[str, Any]]


class Server:
    """One that runs until it is closed."""

    def __init__(self, folder: Path, name: str, given: Given, options: Any) -> None:
        self.name, self.given = name, given
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        # what `vllm serve` runs; the command itself asks for the version of a package that builds
        # for CPUs have another name for
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(folder),
        ]
        command += ["--served-model-name", "model", "--dtype", "float32", "--host", "127.0.0.1"]
        command += ["--port", self.url.rpartition(":")[2], "--max-model-len", "1024"]
        command += ["--max-num-seqs", str(options.concurrency), "--limit-mm-per-prompt"]
        command += ['{"image": 1}', "--additional-config", json.dumps(given)]
        self.log = open(folder / f"{name}.log", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2"},
        )

    def wait(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/health", timeout=5)
                return
            time.sleep(0.5)
        self.log.seek(0)
        raise RuntimeError(f"the server {self.name} did not start:\n{self.log.read()[-20000:]}")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()

    def ask(self, seed: int, words: str, tokens: int, side: int) -> tuple[str, int, int]:
        """The answer, the tokens of the prompt, and the blocks of the cache that it took."""
        body = {
            "model": "model",
            "messages": [
                {"role": "user", "content": [content(seed, side), {"type": "text", "text": words}]}
            ],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        request = urllib.request.Request(
            self.url + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        text, prompt, share = "", 0, 0.0
        with urllib.request.urlopen(request) as answer:
            for line in answer:
                if not line.startswith(b"data: {"):
                    continue
                part = json.loads(line.removeprefix(b"data: "))
                if part.get("usage"):
                    prompt = part["usage"]["prompt_tokens"]
                for choice in part["choices"]:
                    text += choice["delta"].get("content") or ""
                share = max(share, self.metric("vllm:kv_cache_usage_perc"))
        return text, prompt, round(share * self.blocks())

    def metric(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)}\{{.*\}} (\S+)$", self.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def blocks(self) -> int:
        found = re.search(r'vllm:cache_config_info\{.*num_gpu_blocks="(\d+)"', self.metrics())
        if found is None:
            raise RuntimeError("vLLM does not tell the number of its blocks")
        return int(found[1])

    def metrics(self) -> str:
        with urllib.request.urlopen(self.url + "/metrics") as answer:
            return str(answer.read().decode())


@contextlib.contextmanager
def servers(folder: Path, configs: dict[str, Given], options: Any) -> Iterator[Any]:
    running = []
    try:
        for name, given in configs.items():
            running.append(Server(folder, name, given, options))
            running[-1].wait()
        yield running
    finally:
        for server in running:
            server.close()


def words_of(count: int, seed: int, size: Size) -> str:
    random = np.random.default_rng(seed)
    return " ".join(f"w{i}" for i in random.integers(3, size.vocabulary, count))


def gate(server: Server, model: Any, processor: Any, size: Size, options: Any) -> dict[str, int]:
    """Raises where a server's answer is not that of transformers; its tokens and blocks."""
    from vmtc_kernels.integrations.transformers import attach

    found: dict[str, int] = {}
    vmtc = VMTCConfig(**server.given.get("vmtc", {"num_primary": 1.0, "num_merged": 0.0}))
    cmai = CMAIConfig(**server.given["cmai"]) if "cmai" in server.given else None
    handle = attach(model, processor, vmtc=vmtc, cmai=cmai)
    try:
        for seed in range(3):
            words = words_of(options.words, seed, size)
            inputs = handle.prepare(images=photo(seed, size.image), text=f"<image> {words}")
            length = inputs["input_ids"].shape[1]
            wanted = model.generate(**inputs, max_new_tokens=options.answer, do_sample=False)
            wanted = processor.decode(wanted[0, length:])
            given, tokens, blocks = server.ask(seed, words, options.answer, size.image)
            if given.split() != wanted.split() or tokens != length:
                raise RuntimeError(
                    f"{server.name} answered {given!r} to a prompt of {tokens} tokens, transformers"
                    f" {wanted!r} to one of {length}: nothing is timed"
                )
            found = {"prompt_tokens": tokens, "blocks": max(blocks, found.get("blocks", 0))}
    finally:
        handle.detach()
    return found


def round_of(server: Server, number: int, size: Size, options: Any) -> dict[str, float]:
    """One round of vLLM's client: requests per second, and milliseconds to the first token."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    first = 1000 * (number + 1)
    requests = [
        SampleRequest(
            prompt=words_of(options.words, first + i, size),
            prompt_len=options.words,
            expected_output_len=options.answer,
            multi_modal_data=content(first + i, size.image),
        )
        for i in range(options.requests)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        result = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="openai-chat",
                api_url=server.url + "/v1/chat/completions",
                base_url=server.url,
                model_id="model",
                model_name="model",
                tokenizer=None,
                input_requests=requests,
                logprobs=None,
                request_rate=float("inf"),
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=["ttft"],
                selected_percentiles=[90],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=options.concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0},
            )
        )
    if result["completed"] != options.requests:
        raise RuntimeError(f"{server.name} answered {result['completed']} requests: {result}")
    return {
        "requests_per_s": result["request_throughput"],
        "ttft_ms": 1e3 * float(np.median(result["ttfts"])),
        "ttft_ms_p90": 1e3 * float(np.percentile(result["ttfts"], 90)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="file of the results, JSON")
    add = parser.add_argument
    add("--requests", type=int, default=32, help="of a round, to each server")
    add("--rounds", type=int, default=5)
    add("--concurrency", type=int, default=8, help="requests at a time")
    add("--words", type=int, default=32, help="of a prompt, beside its image")
    add("--answer", type=int, default=16, help="tokens of an answer")
    add("--primary", type=int, default=128)
    add("--merged", type=int, default=32)
    add("--keep-ratio", type=float, default=0.5, help="of the image tokens, with CMAI")
    options = parser.parse_args(argv)
    size = SIZES[SIZE]
    vmtc: Given = {"vmtc": {"num_primary": options.primary, "num_merged": options.merged}}
    cmai: Given = {"cmai": {"keep_ratio": options.keep_ratio, "layers": None}}
    configs: dict[str, Given] = {
        "vLLM": {},
        "VMTC": vmtc,
        "CMAI": cmai,
        "VMTC and CMAI": {**vmtc, **cmai},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, processor = save(folder, size)
        with servers(folder, configs, options) as running:
            rows = [
                {"name": s.name, **gate(s, model, processor, size, options), "rounds": []}
                for s in running
            ]
            del model
            for server in running:  # what is compiled or filled once
                round_of(server, -1, size, options)
            for number in range(options.rounds):
                for server, row in zip(running, rows, strict=True):
                    row["rounds"].append(round_of(server, number, size, options))
                    print(f"{number + 1} {server.name}: {row['rounds'][-1]}", flush=True)
    environment = describe(os.cpu_count() or 1)
    environment["versions"]["vllm"] = vllm_version()
    result = {
        "serving": {
            "environment": environment,
            "params": {"model": SIZE, "image_tokens": size.grid, **_plain(options)},
            "rows": rows,
        }
    }
    print(summary(result["serving"]))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return "unknown"


def _plain(options: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(options).items() if name != "out"}


def ratios(serving: dict[str, Any], row: dict[str, Any], key: str) -> list[float]:
    """Of each round, how many times as much as the first server, which is vLLM as it is."""
    stock = serving["rows"][0]["rounds"]
    return [b[key] / a[key] for a, b in zip(stock, row["rounds"], strict=True)]


def summary(serving: dict[str, Any]) -> str:
    """The table of a run, in Markdown."""
    lines = [
        "| | prompt | cache blocks | requests/s | | first token, ms | |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in serving["rows"]:
        cells = [row["name"], f"{row['prompt_tokens']} tokens", str(row["blocks"])]
        for key, digits in (("requests_per_s", 2), ("ttft_ms", 0)):
            cells.append(_spread([each[key] for each in row["rounds"]], digits))
            cells.append(_spread(ratios(serving, row, key), 2, "x"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int, unit: str = "") -> str:
    least, most = min(values), max(values)
    return f"{median(values):.{digits}f}{unit} [{least:.{digits}f}, {most:.{digits}f}]"


if __name__ == "__main__":
    main()
