"Presets with their switches as they are and their sizes small, and stores of noise to train them on."
from dataclasses import replace
from pathlib import Path

import numpy as np

from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.data.tasks import task_info
from dreamer4_nb.runs.presets import Preset
from dreamer4_nb.data.arrays import atomic_store
from dreamer4_nb.data.stores import Episode, EpisodeStore

IMAGE = 32


def frames(n: int) -> int:
    "A quarter of a length or of a context; short ones stay."
    return n if n <= 4 else max(2, n // 4)


def rows(batch: int) -> int:
    "At most eight rows, as odd or even as they were."
    return batch if batch <= 8 else 8 - batch % 2


def thin(c: TransformerConfig) -> TransformerConfig:
    "Two rounds of layers at most, 32 channels, keys shared as before."
    heads = 4
    return replace(c, width=32, depth=min(c.depth, 2 * c.time_every), heads=heads,
                   kv_heads=max(1, heads * c.kv_heads // c.heads), context=frames(c.context))


def shrunk(preset: Preset, steps: int = 2) -> Preset:
    """The preset with small models, few rows, short windows and `steps` steps in each phase, on a CPU and not compiled.

    All other settings stay: what is accumulated, run again, averaged, masked, cut or committed."""
    t, d, a, i = preset.tokenizer, preset.dynamics, preset.agent, preset.imagination

    def phase(old, model, **sizes):
        train = replace(old.train, steps=steps, warmup=1, log_every=1, save_every=1, compile=False,
                        device="cpu")
        return replace(old, model=model, train=train, batch=rows(old.batch), **sizes)

    tokens = replace(t.model, image=IMAGE, patch=8, n_latents=8, d_latent=8,
                     transformer=thin(t.model.transformer))
    world = replace(d.model, n_latents=8, d_latent=8, short_clip_length=frames(d.model.short_clip_length),
                    transformer=thin(d.model.transformer))
    dream = replace(i.model, context=frames(i.model.context), horizon=3)
    return replace(
        preset, episodes=None, held_out=0.2, workers=1, threads=1,
        tokenizer=phase(t, tokens, length=frames(t.length), slow_steps=min(t.slow_steps, steps)),
        dynamics=phase(d, world, length=frames(d.length)),
        agent=phase(a, replace(a.model, hidden=32), length=frames(a.length)),
        imagination=phase(i, dream))


def noise_store(folder: Path, preset: Preset) -> EpisodeStore:
    """Episodes of noise for a shrunk preset, of each of its tasks, with actions as wide as the task's: some shorter
    and some longer than the longest window, of both qualities that are cloned and of others."""
    tokens = preset.tokenizer
    window = max(tokens.length, tokens.model.transformer.context + 1, preset.dynamics.length, preset.agent.length)
    shortest = max(2, window // 2, preset.imagination.model.context)
    lengths = 2 * window, shortest, window + 3, shortest, 2 * window
    qualities = "expert", "medium", "poor", "random", "medium"
    rng, parts = np.random.default_rng(0), []
    for task in preset.tasks:
        width = task_info(task).action_dim
        episodes = []
        for n, quality in zip(2 * lengths, 2 * qualities):
            actions = rng.uniform(-1, 1, (n, width)).astype(np.float32)
            actions[0] = 0
            pictures = rng.integers(0, 256, (n, IMAGE, IMAGE, 3), np.uint8)
            episodes.append(Episode(actions=actions, rewards=rng.integers(0, 3, n), frames=pictures, task=task,
                                    quality=quality))
        with atomic_store(folder / f"{task}.zarr") as beside:
            store = EpisodeStore.create(beside, task, width, (IMAGE, IMAGE, 3))
            store.extend(episodes)
            store.finish()
        parts.append(EpisodeStore.open(folder / f"{task}.zarr"))
    return parts[0] if len(parts) == 1 else EpisodeStore.join(parts)
