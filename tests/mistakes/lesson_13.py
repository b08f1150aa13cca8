"Lesson 13: exercise, a typical mistake, words of its hint. The check notebook has more."

MISTAKES = [
    (1, "def switch(logit, u): return logit.sigmoid()", "a decision"),
    (1, "def switch(logit, u): return (u < logit.sigmoid()).double()", "no gradient"),
    (1, "def switch(logit, u):\n    on = (u < logit.sigmoid()).double()\n    return on + logit - logit.detach()", "as if it were"),
    (2, "def alpha_kl(log_q, log_p, alpha):\n    dynamics, representation = balanced_kl(log_q, log_p, free=0.0)\n"
     "    return ((1 - alpha) * dynamics + alpha * representation).mean()", "exchanged"),
    (2, "def alpha_kl(log_q, log_p, alpha): return categorical_kl(log_q, log_p).mean()", "whole gradient"),
    (2, "def alpha_kl(log_q, log_p, alpha):\n    dynamics, representation = balanced_kl(log_q, log_p, free=0.0)\n"
     "    return (alpha * dynamics + (1 - alpha) * representation).sum()", "not the sum"),
    (3, "def reinforced(log_prob, entropy, returns, values, spread, eta):\n"
     "    return -(((returns - values) / spread.clamp(min=1)) * log_prob + eta * entropy).mean()", "must not train"),
    (3, "def reinforced(log_prob, entropy, returns, values, spread, eta):\n"
     "    return -(((returns - values) / spread).detach() * log_prob + eta * entropy).mean()", "small returns stay small"),
    (3, "def reinforced(log_prob, entropy, returns, values, spread, eta):\n"
     "    return -((returns / spread.clamp(min=1)).detach() * log_prob + eta * entropy).mean()", "critic's value"),
]
