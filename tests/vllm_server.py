"""A server of vLLM with a tiny LLaVA, in processes of its own, and its answers; a pytest plugin.

It is one for all tests of a run, as it takes long to start.
"""

import base64
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import NamedTuple

import httpx
import pytest
import torch
import vllm_models as models

VMTC = {"num_primary": 10, "num_merged": 4}
TOKENS, LEFT = 64, 14  # of an image
# prompts are cached in blocks of so many tokens; as there are few, crowds are preempted
BLOCK, BLOCKS, TOGETHER = 32, 20, 16
OPTIONS = {
    "--dtype": "float32",
    "--max-model-len": "512",
    "--max-num-seqs": str(TOGETHER),
    "--block-size": str(BLOCK),
    # images of this size as pixels: 20 of them
    "--mm-processor-cache-gb": "0.001",
    "--num-gpu-blocks-override": str(BLOCKS),
    "--limit-mm-per-prompt": '{"image": 3}',
    "--host": "127.0.0.1",
}
FLAGS = (
    "--enforce-eager",
    "--enable-prompt-tokens-details",
    "--disable-uvicorn-access-log",
    # or requests could not ask for fewer tokens
    "--trust-request-mm-kwargs",
)
# the command `vllm`, which asks for its version by a name that the builds for a CPU do not have;
# it ends with all its processes when its input is closed, as it is when the tests have crashed
LAUNCH = """
import importlib.metadata, os, signal, threading

def watch():
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)

def version(name, known=importlib.metadata.version):
    try:
        return known(name)
    except importlib.metadata.PackageNotFoundError:
        return known(name + "-cpu") + "+cpu"

threading.Thread(target=watch, daemon=True).start()
importlib.metadata.version = version
from vllm.entrypoints.cli.main import main
main()
"""


class Answer(NamedTuple):
    prompt: list  # ids, with a placeholder for each image token
    tokens: list
    text: str
    logs: torch.Tensor  # of the shares of the tokens
    ahead: float = 0.0  # how far, at least, these logs are from those of the second best tokens
    cached: int = 0  # tokens of the prompt that were not computed


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    return models.save(tmp_path_factory.mktemp("served") / "llava")


@pytest.fixture(scope="session")
def server(served_model, tmp_path_factory):
    server = Server(served_model, tmp_path_factory.mktemp("server") / "log")
    try:
        server.wait()
        yield server
    finally:
        server.end()


def command(folder, vmtc, port):
    """The arguments and the environment of a server."""
    config = json.dumps({"vmtc": vmtc})
    given = {**OPTIONS, "--additional-config": config, "--port": str(port)}
    arguments = ["serve", str(folder), *FLAGS, *itertools.chain(*given.items())]
    # its processes are those of a server; threads that wait for one another take the time of those
    # that work, and the model is tiny
    env = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    # oneDNN keeps what it has compiled for each number of tokens, which looks like a leak
    env["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1"
    return [sys.executable, "-c", LAUNCH, *arguments], env


class Server:
    def __init__(self, folder, log, vmtc=VMTC):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        arguments, env = command(folder, vmtc, self.port)
        with open(log, "wb") as out:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=env,
                cwd=log.parent,
            )
        self.client = httpx.Client(base_url=self.url, timeout=120, trust_env=False)

    def wait(self, seconds=240):
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        pytest.fail(f"the server did not start:\n{self.log.read_text(errors='replace')[-20000:]}")

    def end(self):
        self.client.close()
        signals = itertools.chain([signal.SIGTERM], itertools.repeat(signal.SIGKILL, 3))
        for each in signals:
            try:
                os.killpg(self.process.pid, each)
                self.process.wait(20)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.process.stdin.close()

    def post(self, body):
        return self.client.post("/v1/chat/completions", json=body)

    def ask(self, text, *photos, **more):
        response = self.post(request(text, *photos, **more))
        assert response.status_code == 200, response.text
        return answer_of([response.json()])

    def stream(self, text, *photos, **more):
        """The answer, and in how many pieces it came."""
        more = {"stream": True, "stream_options": {"include_usage": True}, **more}
        response = self.post(request(text, *photos, **more))
        assert response.status_code == 200, response.text
        *parts, end = [line[6:] for line in response.text.splitlines() if line]
        assert end == "[DONE]"
        return answer_of([json.loads(part) for part in parts]), len(parts)

    def metrics(self):
        """Each metric of the engine summed over its labels, without the prefix ``vllm:``."""
        out = {}
        for line in self.client.get("/metrics").text.splitlines():
            if line.startswith("vllm:"):
                name, value = line.rsplit(" ", 1)
                name = name.partition("{")[0].removeprefix("vllm:")
                out[name] = out.get(name, 0) + float(value)
        return out

    def memory(self):
        """Bytes that its processes have for themselves."""
        import psutil

        family = psutil.Process(self.process.pid)
        return sum(p.memory_full_info().uss for p in [family, *family.children(recursive=True)])


def url_of(photo):
    file = io.BytesIO()
    photo.save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def chat(text, *photos):
    """The messages of a client of OpenAI's API, images before the text."""
    images = [{"type": "image_url", "image_url": {"url": url_of(photo)}} for photo in photos]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def request(text, *photos, new=8, vmtc=None, **more):
    """``vmtc``: how many tokens of its images this request asks for."""
    return {
        "messages": chat(text, *photos),
        "max_tokens": new,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
        **({} if vmtc is None else {"mm_processor_kwargs": {"vmtc": vmtc}}),
        **more,
    }


def answer_of(parts):
    """Of a message, or of the pieces of a stream, the last with the usage."""
    usage, choices = parts[-1]["usage"], [c for part in parts for c in part["choices"]]
    prompt = next(each["prompt_token_ids"] for each in (*parts, *choices) if usable(each))
    assert usage["prompt_tokens"] == len(prompt)
    pieces = [choice.get("message") or choice["delta"] for choice in choices]
    tokens = tokens_of(choices)
    assert usage["completion_tokens"] == len(tokens)
    logs, ahead = logs_of(choices)
    return Answer(
        prompt,
        tokens,
        "".join(piece.get("content") or "" for piece in pieces),
        logs,
        ahead,
        (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
    )


def tokens_of(choices):
    return [token for choice in choices for token in choice.get("token_ids") or ()]


def usable(part):
    return part.get("prompt_token_ids") is not None


def logs_of(choices):
    each = [x for c in choices if c.get("logprobs") for x in c["logprobs"]["content"] or ()]
    gaps = [x["top_logprobs"][0]["logprob"] - x["top_logprobs"][1]["logprob"] for x in each]
    return torch.tensor([x["logprob"] for x in each]), min(gaps, default=0.0)


@contextmanager
def apart(folder, vmtc):
    """An engine in this process, which never had another request."""
    torch.set_num_threads(1)  # as in the server; without effect once there was an engine
    llm = models.engine(folder, vmtc=vmtc, enable_prefix_caching=False)
    try:
        yield llm
    finally:
        models.close(llm)


def alone(llm, text, *photos, new=8, vmtc=None):
    """What an engine in this process answers, nothing else running."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True, logprobs=2)
    kwargs = None if vmtc is None else {"vmtc": vmtc}
    (result,) = llm.chat(chat(text, *photos), params, use_tqdm=False, mm_processor_kwargs=kwargs)
    best = result.outputs[0]
    steps = list(zip(best.token_ids, best.logprobs, strict=True))
    gaps = []
    for token, each in steps:
        others = [x.logprob for other, x in each.items() if other != token]
        gaps.append(each[token].logprob - max(others))
    logs = torch.tensor([each[token].logprob for token, each in steps])
    return Answer(list(result.prompt_token_ids), list(best.token_ids), best.text, logs, min(gaps))


def same(got, wanted, close):
    """As of one model; logs within ``close``."""
    assert (got.prompt, got.tokens, got.text) == (wanted.prompt, wanted.tokens, wanted.text)
    torch.testing.assert_close(got.logs, wanted.logs, rtol=0, atol=close)
