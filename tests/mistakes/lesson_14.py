"Lesson 14: exercise, a typical mistake, words of its hint. The check notebook has more."

MISTAKES = [
    (1, "def keep(env, random):\n    _, angle, _, turning = env.state()\n"
     "    return np.array([-3 * np.sin(angle) - 0.75 * turning])", "must its foot move"),
    (1, "def keep(env, random):\n    x, angle, v, turning = env.state()\n"
     "    return np.array([3 * angle + 0.7 * turning + 0.2 * x + 0.3 * v])", "looks at the cart"),
    (2, "def hold_out(episode, share, seed):\n"
     "    return torch.rand(len(episode), generator=torch.Generator().manual_seed(seed)) < share", "are split"),
    (2, "def hold_out(episode, share, seed):\n    numbers = episode.unique()\n"
     "    return torch.isin(episode, numbers[:max(1, round(share * len(numbers)))])", "same episodes"),
    (3, "def share_of_the_way(value, floor, ceiling):\n    return ((value - floor) / (ceiling - floor)).clamp(0, 1)",
     "do not clip"),
    (3, "def share_of_the_way(value, floor, ceiling):\n    return value / floor", "ratio to the floor"),
]
