"Lesson 01: exercise, a typical mistake, words of its hint. The check notebook has more."

MISTAKES = [
    (1, "def velocity(noise_hat, z, tau): return (noise_hat - z) / expand_as(tau, z)", "reversed"),
    (1, "def velocity(noise_hat, z, tau): return (z - noise_hat) / (1 - expand_as(tau, z))", "between z and the data"),
    (1, "def velocity(noise_hat, z, tau): return (z - noise_hat) / tau", "RuntimeError"),
    (1, "def velocity(noise_hat, z, tau): return z", "differ"),
    (2, "def cosine_path(noise, x, tau):\n    a = expand_as(tau, x)\n    return a.cos() * noise + a.sin() * x, x - noise",
     "not arrived at the data"),
    (2, "def cosine_path(noise, x, tau):\n    a = expand_as(tau, x) * math.pi / 2\n"
     "    return a.cos() * noise + a.sin() * x, a.cos() * x - a.sin() * noise", "inner derivative"),
    (2, "def cosine_path(noise, x, tau): return x, noise", "position is wrong"),
    (3, "def velocity_loss(x_hat, x, tau, largest): return ((x_hat - x) ** 2).mean()", "loss of x̂"),
    (3, "def velocity_loss(x_hat, x, tau, largest): return ((x_hat - x) ** 2 / (1 - expand_as(tau, x)) ** 2).mean()",
     "infinite"),
    (3, "def velocity_loss(x_hat, x, tau, largest): return x_hat.sum() * 0 + 1", "value differs"),
    (1, "def velocity(noise_hat, z, tau): return velocity_from_x(noise_hat, z, tau)", "which end is the noise"),
    (2, "def cosine_path(noise, x, tau):\n    a = expand_as(tau, x) * math.pi / 2\n    s = a + 1e-3 * math.pi / 2\n"
     "    z = a.cos() * noise + a.sin() * x\n    return z, (s.cos() * noise + s.sin() * x - z) / 1e-3", "finite difference"),
    (2, "def cosine_path(noise, x, tau):\n    a = expand_as(tau, x) * math.pi / 2\n"
     "    return a.cos() * noise + a.sin() * x, (a.cos() * noise - a.sin() * x) * math.pi / 2", "changed places"),
    (3, "def velocity_loss(x_hat, x, tau, largest):\n"
     "    return ((x_hat - x) ** 2 / (1 - expand_as(tau, x)) ** 2).clamp(max=largest).mean()", "limit the error itself"),
]
