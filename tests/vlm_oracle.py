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
    among the placeholders of the prompt; aside: features of other layers, [N, D'] each; other: what
    is clustered instead of the tokens, [N, Df], or None."""

    x: torch.Tensor
    y: torch.Tensor
    scores: torch.Tensor
    places: list[int]
    aside: list[torch.Tensor]
    other: torch.Tensor | None = None
    tile: tuple[int, list[int]] | None = None  # LLaVA's: its number, and which of its tokens


@contextmanager
def recorded(model):
    """Of each vision layer's attention: module -> weights [heads, N, N] of each call and image,
    and (module, "keys") -> keys [N, heads * d], likewise."""
    weights = {}

    def spy(module, q, k, v, attention_mask, scaling=None, **kwargs):
        logits = q.float() @ k.float().transpose(2, 3) * scaling
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        shares = logits.softmax(-1)
        weights.setdefault(module, []).extend(shares)
        weights.setdefault((module, "keys"), []).extend(k.transpose(1, 2).flatten(2))
        return (shares.to(v.dtype) @ v).transpose(1, 2), None

    transformers.AttentionInterface.register(SPY, spy)
    masks = transformers.AttentionMaskInterface
    masks.register(SPY, masks()["sdpa"])
    model.set_attn_implementation({"vision_config": SPY})
    try:
        yield weights
    finally:
        model.set_attn_implementation({"vision_config": "sdpa"})


@contextmanager
def dropped(family, model, rows, after):
    """In the vision layers behind `after` no token attends to a patch of another row than these."""
    core = model.model
    _, attentions = encoder(family, core)
    behind, seen = attentions[after + 1 :], {}
    unit = 1 if family.startswith("llava") else 4
    left = (rows[:, None] * unit + torch.arange(unit)).flatten()  # patches, unit by unit

    def keys_left(module, count, length):
        """bool [count, length] of this call."""
        start = seen.get(module, 0)
        seen[module] = start + count * length
        if family.startswith("qwen"):  # one window after the other
            return torch.isin(torch.arange(start, start + length), left)[None]
        lead = int(family.startswith("llava"))
        side = int((length - lead) ** 0.5)
        order = torch.arange(length - lead)
        if unit > 1:
            grid = order.view(1, 1, side, side)
            order = torch.nn.functional.pixel_unshuffle(grid, 2).flatten(2)[0].T.flatten()
        mask = torch.zeros(count, length - lead, dtype=torch.bool)
        for image, patch in zip((left // len(order)).tolist(), left % len(order), strict=True):
            mask[image, order[patch]] = True
        return torch.nn.functional.pad(mask, (lead, 0), value=True)

    def spy(module, q, k, v, attention_mask, scaling=None, **kwargs):
        logits = q @ k.transpose(2, 3) * scaling
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -1e9)
        if module in behind:
            logits = logits.masked_fill(~keys_left(module, len(q), k.shape[2])[:, None, None], -1e9)
        return (logits.softmax(-1) @ v).transpose(1, 2), None

    transformers.AttentionInterface.register(SPY, spy)
    masks = transformers.AttentionMaskInterface
    masks.register(SPY, masks()["sdpa"])
    model.set_attn_implementation({"vision_config": SPY})
    try:
        yield
    finally:
        model.set_attn_implementation({"vision_config": "sdpa"})


def flat(output, name):
    """Features of all images: one tensor, or one of each layer."""
    features = getattr(output, name, None)
    if features is None:
        return []
    layers = features if name == "deepstack_features" else [features]
    parts = [[layer] if isinstance(layer, torch.Tensor) else list(layer) for layer in layers]
    return [torch.cat([x.reshape(-1, x.shape[-1]) for x in part]) for part in parts]


def shown(family, core, rows, given):
    """Which placeholders the projector's rows are, in order."""
    if family == "qwen2_5_vl":
        visual = core.visual
        order = get_vision_window_index(
            given["image_grid_thw"], 2, visual.window_size, visual.patch_size
        )[0]
        rows = order[rows].sort().values
    return rows


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


def encoder(family, core):
    """The encoder's layers and, of each, its attention."""
    if family.startswith("qwen"):
        return core.visual.blocks, [block.attn for block in core.visual.blocks]
    tower = core.vision_tower if family.startswith("llava") else core.vision_model
    return tower.encoder.layers, [layer.self_attn for layer in tower.encoder.layers]


def units(family, model, inputs, score_layer, cls=True, feature_layer=None):
    """The units of a prompt in order, and the features of all placeholders."""
    core, states = model.model, []
    layers, attentions = encoder(family, core)
    read = {"llava": _llava, "qwen": _qwen}.get(family[: 5 if family.startswith("llava") else 4])
    with recorded(model) as weights, torch.no_grad():
        if isinstance(feature_layer, int):
            hook = layers[feature_layer].register_forward_hook(lambda m, a, out: states.append(out))
        found, rows = (read or _split)(core, inputs, weights, score_layer, cls)
        if isinstance(feature_layer, int):
            hook.remove()
            (states,) = states
            states = states[0] if isinstance(states, tuple) else states
        elif feature_layer == "keys":
            states = weights[attentions[score_layer], "keys"]
            states = torch.cat(states) if read is _qwen else torch.stack(states)
    if feature_layer is not None:
        _add_features(family, core, found, states)
    return found, rows


def _add_features(family, core, found, states):
    """Hand a layer's states to the units, the patches of a token side by side."""
    if family.startswith("qwen"):
        rows = states.view(-1, 4 * states.shape[-1])
        for unit, part in zip(found, rows.split([len(u.x) for u in found]), strict=True):
            unit.other = part
    elif family.startswith("llava"):
        tiles = [tile[1:] for tile in states]
        for unit in found:
            # a tile that was cut gives what was left of it
            tile, seen = unit.tile
            unit.other = tiles[tile][seen]
    else:
        side = int(states.shape[1] ** 0.5)
        grid = states.transpose(1, 2).unflatten(2, (side, side))
        whole = torch.nn.functional.pixel_unshuffle(grid, core.config.scale_factor)
        for unit, tile in zip(found, whole.flatten(2).transpose(1, 2), strict=True):
            unit.other = tile


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
            parts = (x[tile, seen], y[tile, seen], scores[tile, seen], shown, [])
            result.append(Unit(*parts, tile=(tile, seen)))
    return result, rows


def _split(core, inputs, weights, score_layer, cls):
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


def _qwen(core, inputs, weights, score_layer, cls):
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
        other = None if unit.other is None else unit.other[None]
        tokens, owner, _ = config.merge(x[None], unit.scores[None], features=other)
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
    kept, rows = units(family, model, inputs, score_layer, cls, config.feature_layer)

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
