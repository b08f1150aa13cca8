"Lesson 06: exercise, a typical mistake, words of its hint. The check notebook has more."

BLEND = """def blend_best(plans, scores, top, temperature):
    best = np.argsort(-scores)[:top]
    weights = np.exp(scores[best] / temperature)
    return np.einsum("c,cka->ka", weights / weights.sum(), plans[best])
"""

ROWS = """def to_rows(actions, rewards, terminated):
    led_actions = np.concatenate([np.zeros_like(actions[:1]), actions])
    return led_actions, np.r_[0, rewards], np.r_[1, 1.0 - terminated], np.arange(len(rewards) + 1) > 0
"""

STARTS = """def starts(lengths, length):
    ends = np.cumsum(lengths)
    rows = np.arange(lengths.sum())
    return rows[rows + length <= np.repeat(ends, lengths)]
"""

MISTAKES = [
    (1, BLEND, "infinite"),
    (1, BLEND.replace("[:top]", ""), "not only the best"),
    (1, BLEND.replace("-scores", "scores"), "worst plans"),
    (1, "def blend_best(plans, scores, top, temperature): return plans[0]", "plan differs"),
    (2, "def score(away): return 1.0 * (np.abs(away) < 0.025).all(-1)", "near miss"),
    (2, "def score(away): return np.linalg.norm(away, axis=-1)", "sign"),
    (2, "def score(away): return (np.abs(away) < 0.025).all(-1) - np.abs(away).sum(-1)", "steep near the cup"),
    (3, ROWS.replace("[np.zeros_like(actions[:1]), actions]", "[actions, np.zeros_like(actions[:1])]"),
     "row t of your actions"),
    (3, ROWS.replace("np.r_[0, rewards]", "np.r_[rewards, 0]"), "row t of your rewards"),
    (3, ROWS.replace("1.0 - terminated", "1.0 * terminated"), "not continue flags"),
    (3, ROWS.replace("> 0", "> -1"), "not known"),
    (4, STARTS.replace("<= np", "< np"), "is missing"),
    (4, "def starts(lengths, length): return np.arange(lengths.sum() - length + 1)", "crosses the end"),
    (4, "def starts(lengths, length): return np.arange(len(lengths))", "the window from row"),
]
