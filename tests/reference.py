"""Step3-VL written plainly from its description, in float64: the judge of the model.

Slow on purpose: one sequence, one head, one token and one expert at a time, with weights under their names on disk.
"""

import math

import torch
from torch.nn import functional as F


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


def layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps) * weight + bias


def swiglu(x, gate, up, down):
    gated = x @ gate.T
    return (gated / (1 + torch.exp(-gated)) * (x @ up.T)) @ down.T


def frequencies(config):
    """
    The angles by which the rotary embedding turns from one position to the next, and what it multiplies by: as it is,
    with linear scaling (https://arxiv.org/abs/2306.15595), or with YaRN's (https://arxiv.org/abs/2309.00071).
    """
    head_dim, theta, scaling = config["head_dim"], config["rope_theta"], config.get("rope_scaling") or {}
    plain = torch.tensor([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)], dtype=torch.float64)
    if not scaling:
        return plain, 1
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"], 1

    def index(turns):
        """Where a frequency makes this many turns over the length that the model was trained for."""
        length = config["max_position_embedding"] / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = max(math.floor(index(32)), 0), min(math.ceil(index(1)), head_dim - 1)
    slowed = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - slowed) + plain / scaling["factor"] * slowed, 0.1 * math.log(scaling["factor"]) + 1


def rotate(x, angles, factor=1):
    """Rotary embedding of one head's vector, the first half of it paired with the second."""
    first, second = x.chunk(2)
    turned = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
    return torch.cat(turned) * factor


def text_attention(x, w, prefix, config, positions):
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    low_rank = rms_norm(x @ w[prefix + "q_proj.weight"].T, w[prefix + "inter_norm.weight"], config["rms_norm_eps"])
    queries = (low_rank @ w[prefix + "wq.weight"].T).view(-1, heads, head_dim)
    turn, factor = frequencies(config)
    angles = positions[:, None] * turn
    keys = torch.stack([rotate(k, angles[i], factor) for i, k in enumerate(x @ w[prefix + "k_proj.weight"].T)])
    values = x @ w[prefix + "v_proj.weight"].T
    outputs = []
    for i in range(len(x)):
        attended = []
        for head in range(heads):
            scores = keys[: i + 1] @ rotate(queries[i, head], angles[i], factor) / math.sqrt(head_dim)
            attended.append(torch.softmax(scores, 0) @ values[: i + 1])
        outputs.append(torch.cat(attended))
    return torch.stack(outputs) @ w[prefix + "o_proj.weight"].T


def mixture(x, w, prefix, config):
    outputs = []
    for token in x:
        probabilities = torch.softmax(w[prefix + "gate.weight"] @ token, 0)
        weights, experts = probabilities.topk(config["moe_top_k"])
        if config["norm_expert_weight"]:
            weights = weights / weights.sum()
        output = torch.zeros_like(token)
        for weight, expert in zip(weights, experts.tolist(), strict=True):
            names = ("gate_proj", "up_proj", "down_proj")
            output = output + weight * swiglu(token, *(w[f"{prefix}{name}.weight"][expert] for name in names))
        outputs.append(output)
    return torch.stack(outputs)


def moe_layers(config):
    entries = config.get("moe_layers_enum")
    if not entries:
        return set(range(1, config["num_hidden_layers"]))
    return {int(entry) for entry in entries.split(",")}


def decode(embeddings, w, config, positions):
    """Logits (tokens, vocabulary) of one sequence of embeddings (tokens, hidden) at `positions` (tokens)."""
    x = embeddings
    eps = config["rms_norm_eps"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, w[prefix + "input_layernorm.weight"], eps)
        x = x + text_attention(h, w, prefix + "self_attn.", config, positions)
        h = rms_norm(x, w[prefix + "post_attention_layernorm.weight"], eps)
        names = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
        if layer in moe_layers(config):
            shared = swiglu(h, *(w[f"{prefix}share_expert.{name}"] for name in names))
            x = x + mixture(h, w, prefix + "moe.", config) + shared
        else:
            x = x + swiglu(h, *(w[f"{prefix}mlp.{name}"] for name in names))
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


def encode(picture, w, config):
    """Image features (tokens, hidden) of one square picture (channels, side, side)."""
    vision = config["vision_config"]
    size, hidden = vision["patch_size"], vision["hidden_size"]
    grid = picture.shape[-1] // size
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    rows = [
        torch.stack(
            [
                (picture[:, r * size : (r + 1) * size, c * size : (c + 1) * size] * kernel).sum((1, 2, 3))
                for c in range(grid)
            ]
        )
        for r in range(grid)
    ]
    patches = torch.cat(rows) + w["vision_model.embeddings.patch_embedding.bias"]

    positions = w["vision_model.embeddings.position_embedding.weight"]
    trained = vision["image_size"] // size
    grid_positions = positions[1:]
    if grid != trained:
        square = grid_positions.float().T.reshape(1, hidden, trained, trained)
        square = F.interpolate(square, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
        grid_positions = square.reshape(hidden, -1).T.double()
    class_row = w["vision_model.embeddings.class_embedding"] + positions[:1]
    x = torch.cat([class_row] * 4 + [patches + grid_positions])

    heads = vision["num_attention_heads"]
    eps = vision["layer_norm_eps"]
    for layer in range(vision["num_hidden_layers"]):
        prefix = f"vision_model.transformer.layers.{layer}."

        def linear(x, name, prefix=prefix):
            return x @ w[f"{prefix}{name}.weight"].T + w[f"{prefix}{name}.bias"]

        def norm(x, name, prefix=prefix):
            return layer_norm(x, w[f"{prefix}{name}.weight"], w[f"{prefix}{name}.bias"], eps)

        q, k, v = linear(x, "self_attn.qkv_proj").split(hidden, -1)
        attended = []
        for head in torch.arange(hidden).view(heads, -1):
            scores = q[:, head] @ k[:, head].T / math.sqrt(len(head))
            attended.append(torch.softmax(scores, -1) @ v[:, head])
        x = x + norm(linear(torch.cat(attended, -1), "self_attn.out_proj"), "layer_norm1")
        h = linear(x, "mlp.fc1")
        x = x + norm(linear(h * torch.sigmoid(1.702 * h), "mlp.fc2"), "layer_norm2")

    feature_map = x[4:].T.reshape(1, hidden, grid, grid)
    stride = config["understand_projector_stride"]
    feature_map = F.conv2d(feature_map, w["vit_downsampler.weight"], w["vit_downsampler.bias"], stride=stride)
    feature_map = F.conv2d(feature_map, w["vit_downsampler2.weight"], w["vit_downsampler2.bias"], stride=2, padding=1)
    features = feature_map.flatten(2)[0].T @ w["vit_large_projector.weight"].T
    return features + w["vit_large_projector.bias"] if config["projector_bias"] else features


def step3_logits(
    config,
    weights,
    input_ids,
    attention_mask=None,
    pixel_values=None,
    patch_pixel_values=None,
    num_patches=None,
    position_ids=None,
):
    """
    Logits (batch, tokens, vocabulary) from the contents of a `config.json` and a state dict with the names on disk;
    zero at padding.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    features = []
    patches = [] if patch_pixel_values is None else list(patch_pixel_values.double())
    for i, picture in enumerate([] if pixel_values is None else pixel_values.double()):
        count = 0 if num_patches is None else int(num_patches[i])
        features += [encode(patch, w, config) for patch in patches[:count]] + [encode(picture, w, config)]
        patches = patches[count:]
    features = torch.cat(features) if features else None

    text = config["text_config"]
    logits = torch.zeros(*input_ids.shape, text["vocab_size"], dtype=torch.float64)
    used = 0
    for row, ids in enumerate(input_ids):
        real = torch.ones_like(ids).bool() if attention_mask is None else attention_mask[row].bool()
        embeddings = w["model.embed_tokens.weight"][ids[real]]
        places = ids[real] == config["image_token_id"]
        if places.any():
            embeddings = embeddings.clone()
            embeddings[places] = features[used : used + int(places.sum())]
            used += int(places.sum())
        positions = torch.arange(len(embeddings)) if position_ids is None else position_ids[row][real]
        logits[row, real] = decode(embeddings, w, text, positions.double())
    assert features is None or used == len(features)
    return logits
