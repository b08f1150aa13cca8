"Lesson 10: exercise, a typical mistake, words of its hint. The check notebook has more."

PLAN = """def plan(world, heads, dream, forks, horizon, generator):
    branch = dream.fork(torch.zeros(forks, dtype=torch.long))
    actions, paid = [], []
    for _ in range(horizon):
        actions.append(heads.policy(branch.h).sample(generator))
        world.imagine(branch, actions[-1])
        paid.append(heads.reward(branch.h))
    return """

MISTAKES = [
    (1, "def best_logits(samples, bins): return two_hot(samples, bins).mean(0)", "these are the probabilities"),
    (1, "def best_logits(samples, bins): return two_hot(samples.mean(), bins).clamp(min=1e-12).log()", "code of the mean"),
    (1, "def best_logits(samples, bins): return torch.zeros_like(bins)", "smaller loss"),
    (2, "def two_agents(groups):\n    everybody = tuple(name for name, _ in groups)\n"
     "    return TokenLayout(groups, tuple((name, everybody) for name in everybody))", "somebody wants"),
    (2, "def two_agents(groups):\n    world = ('latent', 'action')\n    sees = tuple((name, world) for name in world)\n"
     "    return TokenLayout(groups, (*sees, ('red', ('red',)), ('blue', ('blue',))))", "blind"),
    (3, "def targets(chosen, paid, distances):\n"
     "    return *multi_step_targets(chosen, distances, 1), *multi_step_targets(paid, distances, 0)", "alignment of the lesson"),
    (3, "def targets(chosen, paid, distances):\n"
     "    return *multi_step_targets(chosen, distances, 0), *multi_step_targets(paid, distances, 0)", "next frame"),
    (3, "def targets(chosen, paid, distances): return chosen, paid", "four tensors"),
    (4, PLAN + "actions[0][paid[0].argmax()]", "most in its first frame"),
    (4, PLAN + "actions[-1][sum(paid).argmax()]", "last action"),
    (4, PLAN.replace("dream.fork(torch.zeros(forks, dtype=torch.long))", "dream") + "actions[0][0]", "fork it"),
]
