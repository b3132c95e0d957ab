"""The published state-dict layouts, written out independently of the models."""

Shape = tuple[int, ...]


def linear(name: str, out_features: int, in_features: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def swiglu(name: str, width: int, inner: int) -> dict[str, Shape]:
    return {
        f"{name}.gate_proj.weight": (inner, width),
        f"{name}.up_proj.weight": (inner, width),
        f"{name}.down_proj.weight": (width, inner),
    }


def ends(width: int, channels: int, classes: int) -> dict[str, Shape]:
    return {
        "x_embedder.proj.weight": (width, channels, 2, 2),
        "x_embedder.proj.bias": (width,),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": (classes + 1, width),
        **linear("final_layer.linear", 2 * 2 * 2 * channels, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
    }


def dsmoe(width: int, depth: int, experts: int, inner: int) -> dict[str, Shape]:
    """A DSMoE with 4 latent channels, patch 2 and 1000 classes."""
    layout = ends(width, 4, 1000)
    for i in range(depth):
        block = f"blocks.{i}"
        layout |= linear(f"{block}.attn.qkv", 3 * width, width)
        layout |= linear(f"{block}.attn.proj", width, width)
        layout |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
        if i % 2 == 0:
            layout |= linear(f"{block}.mlp.fc1", 4 * width, width) | linear(f"{block}.mlp.fc2", width, 4 * width)
            continue
        layout[f"{block}.mlp.gate.weight"] = (experts, width)
        layout[f"{block}.mlp.gate.e_score_correction_bias"] = (experts,)
        layout |= swiglu(f"{block}.mlp.shared_experts", width, inner)
        for j in range(experts):
            layout |= swiglu(f"{block}.mlp.experts.blocks.{j}", width, inner)
    return layout


def dit_moe(width: int, depth: int, heads: int, experts: int, packed: bool) -> dict[str, Shape]:
    """A DiT-MoE with 4 latent channels of 32x32, patch 2 and 1000 classes."""
    layout = ends(width, 4, 1000) | {"pos_embed": (1, 256, width)}
    for i in range(depth):
        block = f"blocks.{i}"
        if packed:
            layout |= linear(f"{block}.attn.Wqkv", 3 * width, width)
            layout |= linear(f"{block}.attn.out_proj", width, width)
            for norm in ("q_norm", "k_norm"):
                layout[f"{block}.attn.{norm}.weight"] = (width // heads,)
                layout[f"{block}.attn.{norm}.bias"] = (width // heads,)
        else:
            layout |= linear(f"{block}.attn.qkv", 3 * width, width)
            layout |= linear(f"{block}.attn.proj", width, width)
        layout |= linear(f"{block}.adaLN_modulation.1", 6 * width, width)
        layout[f"{block}.moe.gate.weight"] = (experts, width)
        layout |= swiglu(f"{block}.moe.shared_experts", width, 2 * width)
        for j in range(experts):
            layout |= swiglu(f"{block}.moe.experts.{j}", width, 4 * width)
    return layout
