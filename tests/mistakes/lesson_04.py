"Lesson 04: exercise, a typical mistake, words of its hint. The check notebook has more."

GROUPED = ("def grouped_attention(q, k, v, mask):\n    q = q.unflatten(1, (k.shape[1], -1))\n"
           "    logits = torch.einsum('bhgnd,bhmd->bhgnm', q, k) / q.shape[-1] ** 0.5\n"
           "    weights = logits.masked_fill(~mask, -torch.inf).softmax(-1)\n"
           "    return torch.einsum('bhgnm,bhmd->bhgnd', weights, v).flatten(1, 2)")
ANCHORED = ("def anchored_mask(t, past, context, anchors):\n    mask = time_mask(t, past, context)\n"
            "    mask[:, :anchors] = True\n    return mask")

MISTAKES = [
    (1, "def layer_norm(x, gain): return rms_norm(x, gain)", "RMSNorm itself"),
    (1, "def layer_norm(x, gain):\n    y = rms_norm(x, gain)\n    return y - y.mean(-1, keepdim=True)", "after the norm"),
    (1, "def layer_norm(x, gain): return x", "numbers differ"),
    (2, GROUPED.replace(" / q.shape[-1] ** 0.5", ""), "factor"),
    (2, GROUPED.replace("~mask", "mask"), "may not"),
    (2, GROUPED.replace("softmax(-1)", "softmax(-2).nan_to_num()"), "over the queries"),
    (2, GROUPED.replace(".flatten(1, 2)", ""), "shape"),
    (3, "def neighbor_rope(x, positions): return apply_rope(x, positions)", "halves of the head"),
    (3, "def neighbor_rope(x, positions):\n    cos, sin = rope_table(positions, x.shape[-1])\n"
        "    a, b = x[..., 0::2], x[..., 1::2]\n    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)",
     "not their order"),
    (4, ANCHORED, "do not exist yet"),
    (4, ANCHORED.replace("    mask[:, :anchors] = True\n", ""), "window alone"),
    (4, ANCHORED.replace("return mask", "return mask.float()"), "boolean"),
    (2, GROUPED.replace("logits.masked_fill(~mask, -torch.inf)", "(logits * mask)"), "still gets weight"),
    (4, ANCHORED.replace("mask[:, :anchors] = True", "mask |= (torch.arange(past + t) < anchors) "
     "& (torch.arange(past + t) <= torch.arange(t)[:, None])"), "who may frame 6"),
]
