"""VMTC in vLLM over two ranks, each of which has half of the heads: the answers of one rank."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

pytest.importorskip("vllm")

import torch
import vllm_models as models
import vlm

COUNTS = {"num_primary": 10, "num_merged": 4}
CASES = {
    "llava": COUNTS,
    # what is gathered, where the mean is a sum
    "llava of keys": COUNTS | {"head_reduction": "max", "feature_layer": "keys"},
    "qwen2_5_vl": {"num_primary": 0.3, "num_merged": 0.1, "feature_layer": "keys"},
}
# of the logarithms of shares: sums in another order, in float32
CLOSE = {"rtol": 0, "atol": 5e-4}
# a process of its own, with which its ranks end
RANKS = """
import json, sys
import test_vllm_parallel as test

if __name__ == "__main__":
    folders, out = json.loads(sys.argv[1]), {}
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    for case in test.CASES:
        answers = test.answers_of(folders, case, **options)
        out[case] = [(prompt, tokens, logs.tolist()) for prompt, tokens, logs in answers]
    with open(sys.argv[2], "w") as file:
        json.dump(out, file)
"""
ENV = {
    "PYTHONPATH": os.path.dirname(__file__),
    # a machine may have one node of memory, and vLLM wants one for each rank whose threads it binds
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def answers_of(folders, case, **options):
    family = case.split()[0]
    llm = models.engine(folders[family], vmtc=CASES[case], **options)
    try:
        photos = [vlm.photo(90, 70), vlm.photo(64, 64, 2), vlm.photo(120, 60, 3)]
        asked = [("what colour is it?", photos[:1]), ("how many?", []), ("it", photos[1:])]
        requests = [models.request(family, text, *images) for text, images in asked]
        return models.answers(llm, requests)
    finally:
        models.close(llm)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The answers of one rank and of two, in each case."""
    folders = {
        each: models.save(tmp_path_factory.mktemp(each), each) for each in ("llava", "qwen2_5_vl")
    }
    path = tmp_path_factory.mktemp("ranks")
    script, out, log = path / "ranks.py", path / "answers.json", path / "log"
    script.write_text(RANKS)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, script, json.dumps(folders), out],
            env={**os.environ, **ENV},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        one = {case: answers_of(folders, case) for case in CASES}
        assert process.wait(400) == 0, log.read_text(errors="replace")[-20000:]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return one, json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_answer_as_one(both, case):
    one, two = (each[case] for each in both)
    assert len(one) == len(two) == 3
    for (prompt, tokens, logs), (prompt_, tokens_, logs_) in zip(one, two, strict=True):
        assert (prompt, tokens) == (prompt_, tokens_)
        torch.testing.assert_close(logs, torch.tensor(logs_), **CLOSE)
