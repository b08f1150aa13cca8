"Lesson 08: exercise, a typical mistake, words of its hint. The check notebook has more."

TWICE = """def twice(t, window):
    age = torch.arange(t)[:, None] - torch.arange(t)
    sees = (age >= 0) & (age < window)
    context = torch.cat([sees, torch.zeros_like(sees)], 1)
    return torch.cat([context, torch.cat([sees & (age > 0), age == 0], 1)])
"""

RATIO = """def one_step_ratio(model, z, actions, other, noise):
    s = model.config.schedule
    clean = model.normalize(z)
    i = torch.full(z.shape[:2], s.ctx_index)
    i[:, -1] = 0
    tau = (i / s.k_max)[..., None, None]
    noised = (1 - tau) * noise + tau * clean
    known = torch.ones(z.shape[:2], dtype=torch.bool)
    errors = []
    for given in (torch.cat([actions[:, :-1], other[:, -1:]], 1), actions):
        x_hat = model(noised, i, torch.full_like(i, s.ctx_j), given, known)[0]
        errors.append((x_hat - clean)[:, -1].square().mean())
    return errors[0] / errors[1]
"""

FLIP = """def flip_test(model, z, actions, frame, seed):
    known = torch.ones(z.shape[:2], dtype=torch.bool)
    known[:, 0] = False
    flipped = actions.clone()
    flipped[:, frame] *= -1
    generator = torch.Generator().manual_seed(seed)
    dreams = []
    for given in (actions, flipped):
        def f(zn, i, j):
            n = zn.shape[1]
            return model(zn, i, j, given[:, :n], known[:, :n])[0]
        dreams.append(sample_sequence(f, model.normalize(z[:, :2]), z.shape[1] - 2, Schedule(), generator))
    return (dreams[0] - dreams[1]).abs().amax((0, 2, 3))
"""

MISTAKES = [
    (1, "def three_lengths(b, t, generator):\n"
        "    size = torch.tensor([t, 8, 2])[torch.randint(3, (1, 1), generator=generator)]\n"
        "    return (torch.arange(t) // size).expand(b, t)", "one length"),
    (1, "def three_lengths(b, t, generator): return torch.randint(3, (b, t), generator=generator)", "clip numbers"),
    (1, "def three_lengths(b, t, generator): return torch.zeros(b, t)", "two seeds"),
    (2, TWICE.replace("sees & (age > 0)", "sees"), "own clean copy"),
    (2, TWICE.replace(", age == 0", ", sees"), "each other"),
    (2, "def twice(t, window): return time_mask(2 * t, 0, window)", "one sequence"),
    (3, RATIO.replace("torch.cat([actions[:, :-1], other[:, -1:]], 1)", "other"), "of all frames"),
    (3, RATIO.replace("    i[:, -1] = 0\n", ""), "can be seen"),
    (3, RATIO.replace("[:, -1].square", ".square"), "measure all frames"),
    (4, FLIP, "same noise"),
    (4, FLIP.replace("[:, frame]", "[:, frame:]").replace(
        "Schedule(), generator", "Schedule(), torch.Generator().manual_seed(seed)"), "later actions"),
    (4, FLIP.replace("actions.clone()", "actions"), "work on a copy"),
]
