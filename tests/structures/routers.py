"""Source of a router: from token rows `h` to who computes what.

    token choice, capacity   ids, weights [*, k]          (and `place` [B, T, k] in the queue of an expert)
    threshold                gate [*, E]                  zero where an expert is not asked
    expert choice            chosen, weights [B, E, C]    or [E, B*C] for flat rows
`*` is N = B*T for flat rows, B, T for batched ones.
"""

from tests.structures.structure import Structure

SCALE, TAU = 1.5, 0.5


def init_lines(structure: Structure) -> list[str]:
    """Statements of `__init__`."""
    count = structure.choices
    lines = {
        "linear": [f"self.gate = nn.Linear(width, {count}, bias=False)"],
        "parameter": [f"self.gate_weight = nn.Parameter(torch.randn({count}, width) / width**0.5)"],
        "conv": [f"self.gate = nn.Conv1d(width, {count}, kernel_size=1)"],
        "mlp": [f"self.gate = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, {count}))"],
        "cosine": [
            "self.project = nn.Linear(width, 8, bias=False)",
            f"self.prototypes = nn.Parameter(torch.randn({count}, 8))",
            "self.temperature = nn.Parameter(torch.tensor(0.3))",
        ],
    }[structure.gate]
    if structure.selection == "bias":
        lines.append(f'self.register_buffer("correction_bias", 0.1 * torch.randn({count}))')
    if structure.selection == "noisy":
        lines.append(f"self.noise = nn.Linear(width, {count})")
    return lines


def lines(structure: Structure) -> list[str]:
    """Statements of the layer's forward between `x` [B, T, H] with its `h`, and the dispatch."""
    made = _logits(structure)
    if structure.selection == "noisy":
        made += [
            "if self.training:",
            "    logits = logits + torch.randn_like(logits) * F.softplus(self.noise(h))",
        ]
    if structure.routing == "threshold":
        return made + _threshold(structure)
    if structure.routing == "expert_choice":
        return made + _expert_choice(structure)
    made += _token_choice(structure)
    return made + _limit(structure) if structure.routing == "capacity" else made


def _logits(structure: Structure) -> list[str]:
    if structure.gate == "parameter":
        return ["logits = F.linear(h.float(), self.gate_weight.float())"]
    if structure.gate == "conv":
        flat = ".reshape(batch * tokens, -1)" if structure.rows == "flat" else ""
        return [f"logits = self.gate(x.transpose(1, 2)).transpose(1, 2){flat}"]
    if structure.gate == "cosine":
        return [
            "direction = F.normalize(self.project(h), dim=-1)",
            "logits = direction @ F.normalize(self.prototypes, dim=-1).t() / self.temperature",
        ]
    return ["logits = self.gate(h)"]


def _token_choice(structure: Structure) -> list[str]:
    k = structure.top_k
    scores = {"softmax": "logits.softmax(dim=-1)", "softmax_of_chosen": "logits"}.get(
        structure.scores, "logits.sigmoid()"
    )
    made = [f"scores = {scores}"]
    choice = "logits.softmax(dim=-1)" if structure.scores == "both" else "scores"
    if structure.selection == "bias":
        choice = f"{choice} + self.correction_bias"
    if structure.selection == "groups":
        each = structure.num_experts // 2
        made += [
            f"groups = ({choice}).unflatten(-1, (2, {each}))",
            "best = groups.topk(2, dim=-1).values.sum(dim=-1).argmax(dim=-1, keepdim=True)",
            "allowed = F.one_hot(best, 2).bool().transpose(-1, -2)",
            'choice = groups.masked_fill(~allowed, float("-inf")).flatten(-2)',
        ]
        choice = "choice"
    if choice == "scores":
        made += [f"weights, ids = torch.topk(scores, {k}, dim=-1)"]
    else:
        made += [f"ids = torch.topk({choice}, {k}, dim=-1, sorted=False)[1]", "weights = scores.gather(-1, ids)"]
    if structure.scores == "softmax_of_chosen":
        made += ["weights = weights.softmax(dim=-1)"]
    return made + _finished(structure, "weights", "weights.sum(dim=-1, keepdim=True)")


def _finished(structure: Structure, name: str, total: str) -> list[str]:
    made = []
    if structure.weights.startswith("renormalised"):
        made.append(f"{name} = {name} / ({total} + 1e-20)")
    if structure.weights.endswith("scaled"):
        made.append(f"{name} = {name} * {SCALE}")
    return made


def _limit(structure: Structure) -> list[str]:
    """Drop branches beyond an expert's capacity, counted in each sample alone."""
    k, count = structure.top_k, structure.choices
    made = [
        f"capacity = max(1, tokens * {k} // {count})",
        f"queue = ids.reshape(batch, tokens * {k})",
        f"before = F.one_hot(queue, {count}).cumsum(dim=1)",
        f"place = before.gather(2, queue.unsqueeze(-1)).view(batch, tokens, {k}) - 1",
    ]
    if structure.dispatch in ("onehot", "bmm"):
        return made  # the buffers hold no more
    if structure.dispatch in ("where_loop", "masks"):
        return [*made, f"ids = ids.masked_fill(place.view(ids.shape) >= capacity, {count})"]
    return [*made, "weights = weights * (place.view(ids.shape) < capacity)"]


def _threshold(structure: Structure) -> list[str]:
    choice = "scores + self.correction_bias" if structure.selection == "bias" else "scores"
    return [
        "scores = logits.sigmoid()",
        f"gate = scores * (({choice}) > {TAU})",
        *_finished(structure, "gate", "gate.sum(dim=-1, keepdim=True)"),
    ]


def _expert_choice(structure: Structure) -> list[str]:
    scores = "logits.softmax(dim=-1)" if structure.scores == "softmax" else "logits.sigmoid()"
    count = structure.num_experts
    made = [
        f"scores = {scores}.view(batch, tokens, {count}).transpose(1, 2)",
        f"weights, chosen = scores.topk(max(1, tokens * {structure.top_k} // {count}), dim=-1)",
    ]
    if structure.weights.startswith("renormalised"):
        made.append("asked = torch.zeros_like(scores).scatter(2, chosen, weights).sum(dim=1, keepdim=True)")
    made += _finished(structure, "weights", "asked.expand_as(scores).gather(2, chosen)")
    if structure.rows == "flat":
        made += [
            "chosen = chosen + torch.arange(batch, device=x.device).view(-1, 1, 1) * tokens",
            f"chosen = chosen.transpose(0, 1).reshape({count}, -1)",
            f"weights = weights.transpose(0, 1).reshape({count}, -1)",
        ]
    return made
