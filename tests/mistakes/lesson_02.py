"Lesson 02: exercise, a typical mistake, words of its hint. The check notebook has more."

RECURSIVE = ("def teachers(i, j, k_max):\n    if 2**j == k_max: return set()\n"
             "    pairs = {(i, j + 1), (i + HALF, j + 1)}\n"
             "    return pairs.union(*(teachers(*pair, k_max) for pair in pairs))")
QUARTERS = ("def target_of_quarters(f, z, i, j, grid):\n    end = z\n    for k in range(4):\n"
            "        now = i + k * grid.stride(j + 2)\n"
            "        end = shortcut_step(end, f(PLACE, now, j + 2), grid.tau(now), grid.d(j) / 4)\n    RETURN")
TARGET = "return z + expand_as((1 - grid.tau(i)) / grid.d(j), z) * (end - z)"

MISTAKES = [
    (1, "def teachers(i, j, k_max): return {(i, j + 1), (i + k_max // 2 ** (j + 1), j + 1)}", "who has taught them"),
    (1, RECURSIVE.replace("HALF", "1"), "smallest steps"),
    (1, "def teachers(i, j, k_max): return [(i, j + 1)]", "expected a set"),
    (2, "def counterexample():\n    v = lambda z, tau, d: -z / (1 - tau)\n    return v, 1.0, 0.0, 1.0, 0.0", "exact step"),
    (2, "def counterexample():\n    v = lambda z, tau, d: 2.0\n    return v, 1.0, 0.0, 1.0, 3.0", "depend on z"),
    (2, "def counterexample():\n    v = lambda z, tau, d: 1.5 - 2 * z\n    return v, 1.0, 0.0, 1.0, 0.0", "not an average"),
    (3, QUARTERS.replace("PLACE", "end").replace("RETURN", TARGET), "reaches the teacher"),
    (3, "@torch.no_grad()\n" + QUARTERS.replace("PLACE", "end").replace("RETURN", "return end"), "at level 1"),
    (3, "def target_of_quarters(f, z, i, j, grid): return bootstrap_target(f, z, i, j, grid)", "two half steps"),
    (3, "def target_of_quarters(f, z, i, j, grid): return z", "numbers differ"),
    (1, "def teachers(i, j, k_max):\n    return {(k, n) for n in range(j + 1, k_max.bit_length()) "
     "for k in range(i, k_max, k_max >> n)}", "no more than the step"),
    (3, "@torch.no_grad()\n" + QUARTERS.replace("PLACE", "end").replace("grid.tau(now), grid", "grid.tau(i), grid")
     .replace("RETURN", TARGET), "level of its own"),
]
