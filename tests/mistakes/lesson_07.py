"Lesson 07: exercise, a typical mistake, words of its hint. The check notebook has more."

ONE_FRAME = """def velocity_r2(training, held_out):
    def table(episodes):
        inputs = torch.cat([torch.cat([z[1:], torch.ones_like(z[1:, :1])], 1) for z, _ in episodes])
        return inputs, torch.cat([place[1:] - place[:-1] for _, place in episodes])
    inputs, velocity = table(training)
    weights = torch.linalg.lstsq(inputs, velocity).solution
    inputs, velocity = table(held_out)
    return 1 - (velocity - inputs @ weights).square().sum() / (velocity - velocity.mean(0)).square().sum()
"""

MISTAKES = [
    (1, "def cut(frame, p): return frame.reshape(-1, 3 * p * p)", "as they lie in memory"),
    (1, "def cut(frame, p):\n    h, w, c = frame.shape\n"
     "    return frame.reshape(h // p, p, w // p, p, c).permute(0, 2, 1, 3, 4).reshape(-1, c * p * p)",
     "channels come last"),
    (1, "def cut(frame, p): return frame", "shape"),
    (2, "def center(z): return z - z.mean(1, keepdim=True)", "looks ahead"),
    (2, "def center(z): return z - z.cumsum(1) / z.shape[1]", "not known yet"),
    (2, "def center(z): return z", "numbers differ"),
    (3, "def pixel_weight(frames, drawn, mean): return torch.ones_like(frames)", "same everywhere"),
    (3, "def pixel_weight(frames, drawn, mean): return 10 * (frames - mean)", "negative"),
    (3, "def pixel_weight(frames, drawn, mean): return 1 + 50 * (frames > 0.9)", "where there is none"),
    (4, ONE_FRAME, "from one frame"),
    (4, ONE_FRAME.replace("z[1:], torch", "z[:-1], z[1:], torch").replace("table(held_out)", "table(training)"),
     "fitted on"),
    (4, "def velocity_r2(training, held_out): return torch.tensor(1.0)", "number differs"),
]
