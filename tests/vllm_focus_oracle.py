"""What an engine's answers must come to: the whole prompt and answer at once, without any cache,
attended as CMAI's definition says."""

import numpy as np
import torch
import transformers

import vmtc_kernels

KEY = "vmtc_test_whole"


def whole(model, config, ids, given):
    """log softmax f64 ``[L, vocabulary]`` at each token; ``config`` None attends plainly, ``given``
    is what the image processor made."""
    modality = torch.where(ids == model.config.image_token_id, 2, 1).to(torch.uint8)[None]
    images = int((modality == 2).sum())
    layers = model.config.text_config.num_hidden_layers

    def attend(module, q, k, v, attention_mask, scaling=None, **kwargs):
        inhibits = config is not None and config.applies(module.layer_idx, layers)
        used = config if inhibits else vmtc_kernels.CMAIConfig(keep_ratio=1.0)
        with vmtc_kernels.use_backend("reference"):
            out = used.attention(q, k, v, modality, images, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register(KEY, attend)
    masks = transformers.AttentionMaskInterface
    masks.register(KEY, masks()["sdpa"])
    former = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": KEY})
    try:
        with torch.no_grad():
            if "image_grid_thw" in given:
                given["mm_token_type_ids"] = (modality == 2).int()
            return model(input_ids=ids[None], use_cache=False, **given).logits[0].log_softmax(-1)
    finally:
        model.set_attn_implementation({"text_config": former})


class Oracle:
    """Answers of engines of one model, checked token by token."""

    def __init__(self, folder):
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype="float64", attn_implementation="sdpa"
        ).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.known = {}

    def expected(self, config, request, ids):
        photos = request.get("multi_modal_data", {}).get("image", [])
        key = (config, tuple(ids), tuple(np.asarray(photo).tobytes() for photo in photos))
        if key not in self.known:
            images = self.processor.image_processor
            given = dict(images(photos, return_tensors="pt")) if photos else {}
            if photos:
                given["pixel_values"] = given["pixel_values"].double()
            self.known[key] = whole(self.model, config, torch.tensor(ids), given)
        return self.known[key]

    def check(self, config, requests, answers, tolerance=2e-4, greedy=True):
        """answers: as of `vllm_models.answers`. Returns by how much they differ from those of a
        model in which nothing is inhibited."""
        differences = []
        for request, (prompt, answer, logs) in zip(requests, answers, strict=True):
            at = slice(len(prompt) - 1, -1)
            logits = self.expected(config, request, prompt + answer)[at]
            expected = logits.gather(1, torch.tensor(answer)[:, None])[:, 0].float()
            torch.testing.assert_close(logs, expected, atol=tolerance, rtol=tolerance)
            if greedy:
                logits[:, self.model.config.image_token_id] = -torch.inf
                assert ((logits.amax(1) - expected) <= 2 * tolerance).all()
            plain = self.expected(None, request, prompt + answer)[at]
            plain = plain.gather(1, torch.tensor(answer)[:, None])[:, 0].float()
            differences.append((plain - logs).abs().max().item())
        return differences
