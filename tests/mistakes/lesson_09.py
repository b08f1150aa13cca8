"Lesson 09: exercise, a typical mistake, words of its hint. The check notebook has more."

RATIO = """def time_shuffle_ratio(world, clip, prefix, seed):
    reversed_ = torch.cat([clip.actions[:, :prefix], clip.actions[:, prefix:].flip(1)], 1)
    truth = world.dynamics.normalize(clip.latents)
    errors = []
    for actions in (reversed_, clip.actions):
        generator = torch.Generator().manual_seed(seed)
        out = rollout(world, clip.latents, actions, prefix, generator, action_known=clip.action_known)
        errors.append((world.dynamics.normalize(out) - truth)[:, prefix:].square().mean())
    return errors[0] / errors[1]
"""

RANKS = """def rank_correlation(u, error):
    def centered(x):
        ranks = x.argsort(0).argsort(0).double()
        return ranks - ranks.mean(0)
    a, b = centered(u), centered(error)
    return ((a * b).sum(0) / (a.square().sum(0) * b.square().sum(0)).sqrt()).mean()
"""

MISTAKES = [
    (1, "def cost(prefix, dreamed, K): return prefix + dreamed * K, 0", "once more, for the cache"),
    (1, "def cost(prefix, dreamed, K): return prefix + dreamed * (K + 1), dreamed * K", "each has all frames so far"),
    (1, "def cost(prefix, dreamed, K): return 84, 800", "streamed"),
    (2, "def useful_frames(dream, floor): return (dream < floor).sum(1)", "once behind"),
    (2, "def useful_frames(dream, floor): return (dream >= floor).long().argmax(1)", "in all its frames"),
    (2, "def useful_frames(dream, floor): return torch.zeros(len(dream))", "differ"),
    (3, RATIO.replace("errors[0] / errors[1]", "errors[1] / errors[0]"), "upside down"),
    (3, RATIO.replace("reversed_ = torch.cat([clip.actions[:, :prefix], clip.actions[:, prefix:].flip(1)], 1)",
                      "reversed_ = clip.actions.flip(1)"), "given frames"),
    (3, RATIO.replace("manual_seed(seed)", "manual_seed(len(errors))"), "same seed"),
    (4, RANKS.replace(".argsort(0).argsort(0)", ".argsort(0)"), "at which place"),
    (4, RANKS.replace("x.argsort(0).argsort(0).double()", "x"), "large errors"),
    (4, RANKS.replace("centered(u), centered(error)", "centered(u.flatten()), centered(error.flatten())"),
     "all frames at once"),
]
