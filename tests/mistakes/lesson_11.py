"Lesson 11: exercise, a typical mistake, words of its hint. The check notebook has more."

MISTAKES = [
    (1, "def n_step_returns(rewards, continues, values, gamma, n):\n    out = values\n    for _ in range(n):\n"
     "        out = torch.cat([rewards + gamma * out[:, 1:], values[:, -1:]], 1)\n    return out[:, :-1]",
     "continue flags"),
    (1, "def n_step_returns(rewards, continues, values, gamma, n):\n"
     "    return lambda_returns(rewards, continues, values, gamma, 1.0)", "whole dream"),
    (1, "def n_step_returns(rewards, continues, values, gamma, n): return rewards", "last value is missing"),
    (2, "def reinforce_loss(log_prob, returns, values): return -((returns - values) * log_prob).mean()", "value head"),
    (2, "def reinforce_loss(log_prob, returns, values): return -(returns.detach() * log_prob).mean()", "baseline"),
    (2, "def reinforce_loss(log_prob, returns, values): return ((returns - values).detach() * log_prob).mean()",
     "sign is reversed"),
    (3, "def wrong_sentence(): return 2, torch.tensor([[1., 0, 0], [2, 0, 0]]), torch.tensor([[1., 0, 0], [-1, 0, 5]])",
     "sentence 2 holds"),
    (3, "def wrong_sentence(): return 3, torch.tensor([[1., 0, 0], [2, 0, 0]]), torch.tensor([[1., 0, 0], [2, 0, 0]])",
     "does not move the policy"),
    (4, "def slope(p, prior, alpha, beta): return beta * p * (1 - p) * (p.logit() - prior.logit())", "differ"),
    (4, "def slope(p, prior, alpha, beta):\n"
     "    return beta * (p.logit() - prior.logit()) - (1 - alpha) / (1 - p) - alpha / p", "slope by p"),
    (4, "def slope(p, prior, alpha, beta): return beta * (p - prior) - (1 - alpha) * p - alpha * (1 - p)",
     "other way"),
    (5, "def false_reward(): return 6, 1.0, 2.0", "too little harm"),
    (5, "def false_reward(): return 5, 1.0, 0.5", "still runs after"),
    (1, "def n_step_returns(rewards, continues, values, gamma, n):\n    out = values\n    for _ in range(n):\n"
     "        ahead = continues * (rewards + gamma * out[:, 1:])\n"
     "        out = torch.cat([ahead, values[:, -1:]], 1)\n    return out[:, :-1]", "still paid"),
]
