"Lesson 05: exercise, a typical mistake, words of its hint. The check notebook has more."

RING = ("def ring_step(keys, values, frame, q, k, v):\n    n = keys.shape[1]\n    slot = frame % n\n"
        "    keys[:, slot], values[:, slot] = k[:, 0], v[:, 0]\n"
        "    return attend(q, keys, values, (torch.arange(n) <= frame)[None])")
QUIET = ("def quiet_registers(groups):\n    return TokenLayout(groups, (\n"
         "        ('latent', ('latent', 'register', 'signal', 'action')), ('register', REGISTERS),\n"
         "        ('signal', ('signal',)), ('action', ('action',))))")
REACTS = ("def reacts(f, x):\n    before = f(x)\n    rows = []\n    for j in range(x.shape[1]):\n"
          "        changed = x.clone()\n        changed[:, j] CHANGE\n"
          "        rows.append((f(changed) - before).abs().amax((0, 2, 3)) > 1e-6)\n    return torch.stack(rows, 1)")

MISTAKES = [
    (1, RING.replace("(torch.arange(n) <= frame)[None]", "None"), "not full yet"),
    (1, RING.replace("frame % n", "min(frame, n - 1)"), "which slot"),
    (1, RING.replace("frame % n", "frame"), "IndexError"),
    (1, "def ring_step(keys, values, frame, q, k, v): return v", "left the ring"),
    (2, "def memory(config): return config.context", "one time layer"),
    (2, "def memory(config): return 1 + config.depth * (config.context - 1)", "some of the layers"),
    (3, QUIET.replace("REGISTERS", "('register', 'latent', 'signal')"), "through whom"),
    (3, QUIET.replace("REGISTERS", "('register',)"), "could see more"),
    (4, REACTS.replace("CHANGE", "*= 2").replace("rows, 1", "rows, 0"), "exchanged"),
    (4, REACTS.replace("CHANGE", "+= 0"), "no reaction"),
    (4, REACTS.replace("[:, j] CHANGE", "[:, j, 0] += torch.randn(16)"), "single token"),
    (4, "def reacts(f, x): return torch.ones(x.shape[1], x.shape[1]).tril().bool()", "differs"),
    (1, RING.replace("<= frame)", "<= slot)"), "does your mask hide"),
    (1, RING.replace("<= frame)", "< frame)"), "does the frame see itself"),
    (2, "def memory(config): return config.context ** (config.depth // config.time_every)", "multiply"),
]
