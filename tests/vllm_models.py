"""Tiny models on disk as vLLM reads them, and engines of these; only where vLLM is installed."""

import os

# before vLLM is imported: one process, a small cache, no network
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_NO_USAGE_STATS="1",
    VLLM_DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
)

import gc

import torch
import transformers
import vlm
from safetensors.torch import load_file, save_file

FAMILIES = ("llava", "llava_next", "qwen2_5_vl", "qwen3_vl")
# heads of 32 features, the fewest that vLLM's attention on a CPU takes
WIDE = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 4}


def save(folder, family="llava", **options):
    """A model of `vlm.make`, wider, in a folder that vLLM and transformers read."""
    narrow, vlm.SMALL = vlm.SMALL, WIDE
    try:
        model, processor = vlm.make(family, **options)
    finally:
        vlm.SMALL = narrow
    transformers.logging.disable_progress_bar()
    model.save_pretrained(folder)
    if family in vlm.QWEN:
        third = family == "qwen3_vl"
        names = ("Qwen3VLProcessor", "Qwen3VLVideoProcessor")
        names = names if third else ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor")
        kind, videos = (getattr(transformers, name) for name in names)
        sizes = {"size": vlm.PIXELS, "patch_size": vlm.PATCH, "merge_size": vlm.MERGE}
        processor = kind(
            transformers.Qwen2VLImageProcessor(**sizes),
            processor.tokenizer,
            videos(**sizes),
            chat_template=processor.chat_template,
        )
    processor.save_pretrained(folder)
    # vLLM knows the names that checkpoints have, of which those of CLIP were longer
    path = f"{folder}/model.safetensors"
    weights = {}
    for name, weight in load_file(path).items():
        old = "vision_tower."
        if name.startswith(old) and not name.startswith(old + "vision_model."):
            name = old + "vision_model." + name.removeprefix(old)
        weights[name] = weight
    save_file(weights, path, metadata={"format": "pt"})
    return str(folder)


def engine(folder, vmtc=None, cmai=None, **options):
    """An engine in this process; ``vmtc`` and ``cmai`` as for the plugin."""
    from vllm import LLM

    given = {name: value for name, value in (("vmtc", vmtc), ("cmai", cmai)) if value is not None}
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 8,
        "limit_mm_per_prompt": {"image": 3},
        "additional_config": given,
        "disable_log_stats": True,
        "seed": 0,
        **options,
    }
    return LLM(model=folder, **options)


def model_of(llm):
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.model


def close(llm):
    """End an engine, so that the next one finds the process as it was."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
    gc.collect()


def request(family, text, *photos, **more):
    """A prompt with the photos before its text."""
    prompt = vlm.prompt(family, text, images=len(photos))
    # vLLM lets the tokenizer begin the prompt
    data = {"multi_modal_data": {"image": list(photos)}} if photos else {}
    return {"prompt": prompt, **data, **more}


def answers(llm, requests, tokens=8, **sampling):
    """Of each request: the ids of its prompt, those of the answer, and the log of their shares."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=tokens, min_tokens=tokens, temperature=0, logprobs=0, **sampling
    )
    out = []
    for result in llm.generate(requests, params, use_tqdm=False):
        best = result.outputs[0]
        chosen = zip(best.token_ids, best.logprobs, strict=True)
        logs = torch.tensor([each[token].logprob for token, each in chosen])
        out.append((list(result.prompt_token_ids), list(best.token_ids), logs))
    return out
