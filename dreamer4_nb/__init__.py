"""Dreamer 4: a world model learned from video, and a policy trained inside it.

    import dreamer4_nb
    world = dreamer4_nb.load_world()
    film = dreamer4_nb.dream(world)             # real frames, then dreamed ones
    policy = dreamer4_nb.load_policy()
    records = dreamer4_nb.evaluate(policy)      # in the real environment
"""
__version__ = "0.2.0"

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import ArrayLike
    from torch import Generator, Tensor

    from .data.stores import Episode
    from .evaluation.statistics import Records
    from .method.agent import Policy
    from .method.generation import WorldModel

# PyTorch's threads wait for each other in GNU OpenMP, which reads this when PyTorch is loaded. By default a
# thread that waits keeps its core for long, and beside another program training becomes ten times slower.
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
    os.environ["GOMP_SPINCOUNT"] = "3000"

# These functions import inside, so that `import dreamer4_nb.method` loads nothing that draws or simulates.

__all__ = ["load_world", "load_policy", "from_pretrained", "push_to_hub", "dream", "evaluate"]


def load_world() -> "WorldModel":
    "The small world model that ships with the package."
    from .method import checkpoints
    return checkpoints.load_world()


def load_policy(readout: str = "sample") -> "Policy":
    """The policy that ships with the package, after all three phases.

    readout: how an action is read from its distribution: sample, mean or mode.
    """
    return from_pretrained(None, readout)


def from_pretrained(source: "str | Path | None", readout: str = "sample",
                    revision: str | None = None) -> "Policy":
    """A policy by the path of its folder, or by its name on the Hugging Face hub, owner/name.

    revision: of the hub: a branch, a tag or a commit.
    """
    from .runs import hub
    return hub.from_pretrained(source, readout, revision)


def push_to_hub(folder: "str | Path", name: str, private: bool = False) -> str:
    """Uploads a finished run with its model card to the Hugging Face hub; returns its address.

    name: owner/name.
    """
    from .runs import hub
    return hub.push_to_hub(folder, name, private)


def dream(
    world: "WorldModel | Policy",
    actions: "ArrayLike | None" = None,
    episode: "Episode | None" = None,
    context: int = 8,
    length: int = 40,
    seed: int = 0,
) -> "np.ndarray":
    """A film (t, h, w, 3) uint8: real frames of an episode, then dreamed ones.

    world: a world model; or a policy, for a film in its own world.
    actions: (n, a) in [-1, 1] that lead to n dreamed frames; by default the policy's, or the demonstrator's.
    episode: where the film begins, by default with a demonstration that ships.
    context: real frames at its beginning.
    length: frames of the film, where no actions are given.
    """
    import numpy as np
    import torch

    from .core import step_generator
    from .data.demonstrations import load_demonstrations
    from .evaluation.dream_env import DreamFilm
    from .method.agent import Policy
    from .method.streams import encode_stream

    policy = world if isinstance(world, Policy) else None
    model = world.world if isinstance(world, Policy) else world
    if episode is None:
        task = policy.heads.config.tasks[policy.task] if policy else "ball_in_cup-catch"
        image = model.tokenizer.config.image
        episode = load_demonstrations(task, episodes=1, image=image, progress=False).episode(0)

    latents = encode_stream(model.tokenizer, torch.as_tensor(episode.frames[None, :context]))
    led_to = torch.zeros(1, context, model.dynamics.config.action_dim, device=model.device)
    led_to[0, :, :episode.actions.shape[1]] = torch.as_tensor(episode.actions[:context])
    generator = step_generator(seed)
    tokens = _task_tokens(policy) if policy else None
    film = DreamFilm(model, latents, led_to, None, generator, tokens)
    frames = list(episode.frames[:context])
    if policy and actions is None:
        for _ in range(length - context):
            frames.append(film.step(_draw_action(policy, film.h, generator)))
    else:
        given = episode.actions[context:length] if actions is None else np.asarray(actions, np.float32)
        frames += [film.step(action) for action in given]
    return np.stack(frames)


def _task_tokens(policy: "Policy") -> "Tensor":
    "The agent tokens (1, n_agent, width) of a policy's task."
    import torch
    heads = policy.heads.to(policy.world.device)
    return heads.tokens(torch.tensor([policy.task], device=policy.world.device)).detach()


def _draw_action(policy: "Policy", h: "Tensor", generator: "Generator") -> "np.ndarray":
    "An action (a,) drawn by a policy for what it reads of the last frame, (1, n_agent, width)."
    import torch
    live = policy.heads.live(torch.tensor([policy.task], device=h.device))
    with torch.no_grad():
        choice = policy.heads.policy(h, live)
    return choice.sample(generator)[0].cpu().numpy()


def evaluate(
    policy: "Policy",
    episodes: int = 10,
    decisions: int = 125,
    first_seed: int = 10_000,
) -> "Records":
    """Plays a policy in the real environment and records what its episodes came to.

    episodes: how many, each with a seed of its own.
    first_seed: of these seeds; no shipped demonstration begins with one from 10,000 on below 20,000.
    decisions: length of an episode.
    """
    from .evaluation.closed_loop import evaluate_policy

    task = policy.heads.config.tasks[policy.task]
    seeds = range(first_seed, first_seed + episodes)
    image = policy.world.tokenizer.config.image
    return evaluate_policy(policy, task, seeds, decisions, image=image, progress=True)
