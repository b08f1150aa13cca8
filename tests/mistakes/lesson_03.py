"Lesson 03: exercise, a typical mistake, words of its hint. The check notebook has more."

AFTER = ("def levels_after(known, t, schedule, generator):\n    b = len(known)\n"
         "    i = torch.randint(schedule.k_max, (b, t), generator=generator)\n"
         "    past = torch.arange(t) < known[:, None]\n"
         "    i = torch.where(past, schedule.ctx_index, i)\n    return i, torch.full_like(i, schedule.ctx_j)")
HALF = ("def half_step(f, z, i, j, grid):\n    coarse = j < grid.j_min\n    finer = torch.where(coarse, j + 1, j)\n"
        "    half = torch.where(coarse, grid.stride(j) // 2, 0)\n"
        "    return shortcut_step(z, f(z, i, finer), grid.tau(i), grid.d(j) / 2), i + half, finer")
PYRAMID = ("def pyramid(n_frames, schedule):\n    i_step, j_step = schedule.sampling_indices()[0]\n"
           "    made = torch.arange(schedule.steps + n_frames - 1)[:, None] - torch.arange(n_frames)\n"
           "    i = made.clamp(0, schedule.steps) * schedule.grid.stride(j_step)\n"
           "    return i, torch.full_like(i, j_step)")

MISTAKES = [
    (1, AFTER.replace("(b, t), gen", "(b, 1), gen"), "of its own"),
    (1, AFTER.replace("t) <", "t) >="), "yours have one"),
    (1, AFTER.replace("< known[:, None]", "< known[:, None] - 1"), "too early"),
    (1, AFTER.replace("return i,", "return schedule.grid.tau(i),"), "floats"),
    (1, AFTER.replace("schedule.ctx_j", "0"), "never draws"),
    (2, HALF, "yours have moved"),
    (2, HALF.replace("grid.d(j) / 2", "grid.tau(half)").replace("f(z, i, finer)", "f(z, i, j)"), "told d"),
    (2, HALF.replace("grid.d(j) / 2", "grid.tau(half)").replace("i + half, finer", "i + half, j"), "as long as the first"),
    (2, "def half_step(f, z, i, j, grid): return z, i, j", "no frame has moved"),
    (3, PYRAMID, "never draws"),
    (3, PYRAMID.replace("schedule.steps + n_frames - 1", "schedule.steps * n_frames"), "last round"),
    (3, PYRAMID.replace("clamp(0, schedule.steps)", "clamp(0, schedule.steps - 1)"), "finished frame is past"),
    (2, HALF.replace("grid.d(j) / 2", "grid.d(finer)"), "yours have moved"),
]
