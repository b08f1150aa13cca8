"Lesson 00: exercise, a typical mistake, words of its hint. The check notebook has more."

MISTAKES = [
    (1, "def led_to(taken, paid):\n    stay = torch.ones_like(taken[:, :1])\n"
     "    return torch.cat([taken, stay], 1), torch.cat([paid, 0 * paid[:, :1]], 1)", "which frame does"),
    (1, "def led_to(taken, paid): return taken, paid", "shape"),
    (1, "def led_to(taken, paid):\n    zero = torch.zeros_like(taken[:, :1])\n"
     "    return torch.cat([zero, taken], 1), torch.cat([zero, paid], 1)", "means stay"),
    (2, "def two_agents(n):\n    sees = torch.ones(n, n, dtype=torch.bool)\n    sees[:-2, -2:] = False\n    return sees",
     "each other"),
    (2, "def two_agents(n):\n    sees = torch.ones(n, n, dtype=torch.bool)\n    sees[:-1, -1] = False\n    return sees",
     "one agent token"),
    (2, "def two_agents(n):\n    sees = torch.ones(n, n, dtype=torch.bool)\n    sees[:, -2:] = False\n    return sees",
     "see itself"),
    (3, "def returns_with_ends(rewards, continues, values, gamma, lam):\n    out, last = [], values[:, -1]\n"
     "    for t in reversed(range(rewards.shape[1])):\n"
     "        last = rewards[:, t] + gamma * ((1 - lam) * values[:, t + 1] + lam * last)\n"
     "        out.append(last)\n    return torch.stack(out[::-1], 1)", "still counts"),
    (3, "def returns_with_ends(rewards, continues, values, gamma, lam):\n    out, last = [], values[:, -1]\n"
     "    for t in reversed(range(rewards.shape[1])):\n"
     "        last = continues[:, t] * (rewards[:, t] + gamma * ((1 - lam) * values[:, t + 1] + lam * last))\n"
     "        out.append(last)\n    return torch.stack(out[::-1], 1)", "that ends an episode counts"),
    (3, "def returns_with_ends(rewards, continues, values, gamma, lam):\n    out, last = [], values[:, -1]\n"
     "    for t in reversed(range(rewards.shape[1])):\n"
     "        last = rewards[:, t] + gamma * ((1 - lam) * values[:, t + 1] + lam * continues[:, t] * last)\n"
     "        out.append(last)\n    return torch.stack(out[::-1], 1)", "value of the next frame"),
    (3, "def returns_with_ends(rewards, continues, values, gamma, lam):\n    out, last = [], values[:, -1]\n"
     "    for t in reversed(range(rewards.shape[1])):\n        ahead = lam * values[:, t + 1] + (1 - lam) * last\n"
     "        last = rewards[:, t] + gamma * continues[:, t] * ahead\n"
     "        out.append(last)\n    return torch.stack(out[::-1], 1)", "gave it to the value"),
]
