"""What compression must come to: one image after the other, with what the model itself gives away.

Attention weights are recorded by an attention function, features by the model's own methods, and
the language model runs on embeddings, row by row and without padding.
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from transformers.vision_utils import get_vision_window_index

import vmtc_kernels

SPY = "vmtc_test_spy"


@dataclass
class Unit:
    """x: [N, D] before the projector; y: [N, D'] after it; scores: [N]; places: of the N tokens
    among the placeholders of the prompt; aside: features of other layers, [N, D'] each."""

    x: torch.Tensor
    y: torch.Tensor
    scores: torch.Tensor
    places: list[int]
    aside: list[torch.Tensor]


@contextmanager
def recorded(model):
    """Attention weights of each vision layer: module -> [heads, N, N] of each call and image."""
    weights = {}

    def spy(module, q, k, v, attention_mask, scaling=None, **kwargs):
        logits = q.float() @ k.float().transpose(2, 3) * scaling
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        shares = logits.softmax(-1)
        weights.setdefault(module, []).extend(shares)
        return (shares.to(v.dtype) @ v).transpose(1, 2), None

    transformers.AttentionInterface.register(SPY, spy)
    masks = transformers.AttentionMaskInterface
    masks.register(SPY, masks()["sdpa"])
    model.set_attn_implementation({"vision_config": SPY})
    try:
        yield weights
    finally:
        model.set_attn_implementation({"vision_config": "sdpa"})


def hidden_after(layer, run):
    """The output of one module while `run` runs, and what that returns."""
    seen = []
    hook = layer.register_forward_hook(lambda *a: seen.append(a[2]))
    try:
        result = run()
    finally:
        hook.remove()
    (states,) = seen
    return states[0] if isinstance(states, tuple) else states, result


def entering(module, run):
    """The input of one module while `run` runs."""
    seen = []
    hook = module.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    try:
        result = run()
    finally:
        hook.remove()
    return seen[0], result


def received(weights, cls):
    """Of one image, [heads, N, N]: by each token from [CLS], or from all on average."""
    mean = weights.mean(0)
    return mean[0] if cls else mean.mean(0)


def units(family, model, inputs, score_layer, cls=True):
    """The units of a prompt in order, and the features of all placeholders."""
    with recorded(model) as weights, torch.no_grad():
        core = model.model
        if family.startswith("llava"):
            return _llava(core, inputs, weights, score_layer, cls)
        if family.startswith("qwen"):
            return _qwen(core, inputs, weights, score_layer)
        return _split(core, inputs, weights, score_layer)


def _llava(core, inputs, weights, score_layer, cls):
    given = {k: inputs[k] for k in ("pixel_values", "image_sizes") if k in inputs}
    projector = core.multi_modal_projector
    x, (y, out) = entering(
        projector, lambda: hidden_after(projector, lambda: core.get_image_features(**given))
    )
    attention = core.vision_tower.encoder.layers[score_layer].self_attn
    scores = torch.stack([received(w, cls)[1:] for w in weights[attention]])
    rows = torch.cat(list(out.pooler_output))
    flat = y.flatten(0, 1)
    # which token of which tile a placeholder shows: the one that has the same features
    same = (rows[:, None] == flat[None]).all(-1)
    places = [[None] * y.shape[1] for _ in y]
    for i, row in enumerate(same):
        for j in row.nonzero()[:1, 0].tolist():
            places[j // y.shape[1]][j % y.shape[1]] = i
    result = []
    for tile in range(len(y)):
        seen = [t for t, place in enumerate(places[tile]) if place is not None]
        if seen:
            shown = [places[tile][t] for t in seen]
            result.append(Unit(x[tile, seen], y[tile, seen], scores[tile, seen], shown, []))
    return result, rows


def _split(core, inputs, weights, score_layer):
    given = {k: inputs[k] for k in ("pixel_values", "pixel_attention_mask")}
    projector = core.connector.modality_projection
    x, (y, out) = entering(
        projector, lambda: hidden_after(projector, lambda: core.get_image_features(**given))
    )
    attention = core.vision_model.encoder.layers[score_layer].self_attn
    side, factor = int(weights[attention][0].shape[-1] ** 0.5), core.config.scale_factor
    result = []
    for tile, w in enumerate(weights[attention]):
        patches = received(w, False).view(1, 1, side, side)
        scores = torch.nn.functional.avg_pool2d(patches, factor).flatten()
        first = tile * y.shape[1]
        result.append(Unit(x[tile], y[tile], scores, list(range(first, first + y.shape[1])), []))
    return result, torch.cat([z.flatten(0, -2) for z in out.pooler_output])


def _qwen(core, inputs, weights, score_layer):
    visual, result, features = core.visual, [], []
    unit = visual.spatial_merge_size**2
    grid = inputs["image_grid_thw"]
    attention = visual.blocks[score_layer].attn

    def encode():
        return core.get_image_features(inputs["pixel_values"], grid)

    x, (y, out) = entering(visual.merger, lambda: hidden_after(visual.merger, encode))
    x, count = x.reshape(len(y), -1), grid.prod(1) // unit
    # each window says how much its tokens receive, times its size
    scores = torch.cat([received(w, False) * w.shape[-1] for w in weights[attention]])
    scores = scores.view(-1, unit).mean(1)
    if hasattr(visual, "window_size"):
        order = get_vision_window_index(grid, 2, visual.window_size, visual.patch_size)[0]
    else:
        order = torch.arange(len(y))
    aside = [torch.cat(list(a)) if isinstance(a, tuple | list) else a for a in _deepstack(out)]
    for tokens in torch.arange(len(y)).split(count.tolist()):
        places = order[tokens].tolist()
        # in the encoder's order, as that is what the choice between equals goes by
        result.append(
            Unit(x[tokens], y[tokens], scores[tokens], places, [a[order[tokens]] for a in aside])
        )
    features = torch.cat(list(out.pooler_output))
    return result, features


def _deepstack(out):
    return getattr(out, "deepstack_features", None) or []


def merge(unit, config, project):
    """{place: (token, aside)} of one unit; the place is that of the heaviest member."""
    total = len(unit.scores)
    primary, merged = config.counts(total)
    x = unit.y if config.placement == "after_projector" else unit.x
    with vmtc_kernels.use_backend("reference"):
        tokens, owner, _ = config.merge(x[None], unit.scores[None])
    tokens = tokens[0] if config.placement == "after_projector" else project(tokens[0])
    result = {}
    for slot in range(primary + merged):
        members = (owner[0] == slot).nonzero()[:, 0].tolist()
        heaviest = max(members, key=lambda m: (float(unit.scores[m]), -m))
        w = unit.scores[members] / unit.scores[members].sum()
        if config.weighting == "uniform":
            w = torch.full_like(w, 1 / len(members))
        aside = [(w[:, None] * a[members]).sum(0) for a in unit.aside]
        result[unit.places[heaviest]] = (tokens[slot], aside)
    return result


def logits(family, model, inputs, config, score_layer=-2, cls=True):
    """What the compressed prompts, one row each, must lead to: a list of [tokens, vocabulary]."""
    core = model.model
    kept, rows = units(family, model, inputs, score_layer, cls)

    def project(tokens):
        if family.startswith("llava"):
            return core.multi_modal_projector(tokens)
        if family.startswith("qwen"):
            return core.visual.merger(tokens.reshape(-1, tokens.shape[-1] // 4))
        return core.connector.modality_projection(tokens)

    with torch.no_grad():
        merged = {}
        for unit in kept:
            merged |= merge(unit, config, project)
        of_units = {place for unit in kept for place in unit.places}
        newlines = [i for i in range(len(rows)) if i not in of_units]
        merged |= {i: (rows[i], []) for i in newlines}
        positions = None
        if family.startswith("qwen"):
            positions, _ = core.get_rope_index(
                **{k: v for k, v in inputs.items() if k != "pixel_values"}
            )
        result, seen = [], 0
        for b, ids in enumerate(inputs["input_ids"]):
            embeds, columns, visual, aside = [], [], [], []
            for column, token in enumerate(ids.tolist()):
                is_image = token == model.config.image_token_id
                place, seen = seen, seen + is_image
                if not inputs["attention_mask"][b, column] or (is_image and place not in merged):
                    continue
                embed = core.get_input_embeddings()(ids[column])
                embeds.append(merged[place][0] if is_image else embed)
                columns.append(column)
                visual.append(is_image)
                aside += [merged[place][1]] if is_image else []
            more = {}
            if aside and aside[0]:
                more["visual_pos_masks"] = torch.tensor([visual])
                more["deepstack_visual_embeds"] = [torch.stack(a) for a in zip(*aside, strict=True)]
            if positions is not None:
                more["position_ids"] = positions[:, b : b + 1, columns]
            text = core.text_model if hasattr(core, "text_model") else core.language_model
            states = text(inputs_embeds=torch.stack(embeds)[None], **more).last_hidden_state
            result.append(model.lm_head(states)[0])
    return result
