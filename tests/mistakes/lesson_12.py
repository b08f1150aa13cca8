"Lesson 12: exercise, a typical mistake, words of its hint. The check notebook has more."

IMPORTS = "import numpy as np\nfrom scipy import stats\n"
SIMULATED = IMPORTS + """def power(n, a, b):
    rng = np.random.default_rng(0)
    wins, losses, _ = rng.multinomial(n, [a * (1 - b), b * (1 - a), 1 - a * (1 - b) - b * (1 - a)], 4000).T
"""

MISTAKES = [
    (1, IMPORTS + "def exact_interval(k, n, level): return interval(np.arange(n) < k, level)", "Wilson's"),
    (1, IMPORTS + "def exact_interval(k, n, level):\n"
     "    return stats.beta.ppf(1 - level, k, n - k + 1), stats.beta.ppf(level, k + 1, n - k)", "two ends"),
    (1, IMPORTS + "def exact_interval(k, n, level):\n    tail = (1 - level) / 2\n"
     "    return stats.beta.ppf(tail, k, n - k + 1), stats.beta.ppf(1 - tail, k + 1, n - k)", "what if k is 0"),
    (1, "def exact_interval(k, n, level): return 0.0, 1.0", "numbers differ"),
    (2, SIMULATED + "    return (stats.binom.cdf(losses, wins + losses, 0.5) < 0.05).mean()", "one-sided"),
    (2, SIMULATED + "    return (2 * stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5) >= 0.05).mean()",
     "finds nothing"),
    (2, "def power(n, a, b): return 0.8", "is not how often"),
    (3, "def gain_of_method(before, after): return bootstrap((after * 1.0 - before).ravel())", "unit here is the episode"),
    (3, "def gain_of_method(before, after): return runs_interval((after * 1.0 - before).ravel())", "too narrow"),
    (3, "def gain_of_method(before, after): return runs_interval(after.mean(1))", "method's rate"),
    (4, "def honest_rate(hits): return hits.mean(1).max()", "all seeds"),
    (4, "def honest_rate(hits):\n    return hits.mean(1)[hits[:, :hits.shape[1] // 2].mean(1).argmax()]", "also chose"),
    (4, "def honest_rate(hits): return 0.5", "rate differs"),
    (1, IMPORTS + "def exact_interval(k, n, level):\n    t = (1 - level) / 2\n"
     "    low = 0.0 if k == 0 else stats.beta.ppf(t, k, n - k + 1)\n"
     "    return low, 1.0 if k == n else stats.beta.ppf(1 - t, k, n - k + 1)", "the lower end is right"),
    (2, IMPORTS + "def power(n, a, b):\n    u = np.random.default_rng(0).random((4000, n))\n"
     "    wins, losses = ((u < a) & (u >= b)).sum(1), ((u < b) & (u >= a)).sum(1)\n"
     "    return (2 * stats.binom.cdf(np.minimum(wins, losses), wins + losses, 0.5) < 0.05).mean()", "share their luck"),
]
