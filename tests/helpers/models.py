"Small models whose outputs are not near zero, so that what could matter does; and batches for them."
from collections.abc import Iterable
from dataclasses import fields

import torch
from torch import Tensor, nn

from dreamer4_nb.core import Batch
from dreamer4_nb.method.agent import AgentHeads
from dreamer4_nb.method.dynamics import Dynamics, DynamicsConfig
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.tokenizer import Tokenizer, TokenizerConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def spread_weights(layers: Iterable[nn.Linear], std: float = 0.3) -> None:
    "Gives layers that begin at zero, or close to it, weights that show."
    for layer in layers:
        nn.init.normal_(layer.weight, std=std)


def output_layers(heads: AgentHeads) -> list[nn.Linear]:
    "The last layers of policy, reward, value and continue heads."
    return [heads.policy.net[-1], heads.reward.net[-1], heads.value.net[-1], heads.continues.net[-1]]


def make_world(tokenizer: TokenizerConfig, dynamics: DynamicsConfig, seed: int = 0) -> WorldModel:
    "A world model in eval mode with output layers that show."
    torch.manual_seed(seed)
    world = WorldModel(Tokenizer(tokenizer), Dynamics(dynamics)).eval()
    spread_weights([world.dynamics.to_latent, world.tokenizer.to_patch])
    return world


def make_batch(config: DynamicsConfig, rows: int, length: int, relevant: int = 0, seed: int = 1) -> Batch:
    "Random latents, actions and rewards; the first `relevant` rows are relevant; tasks 0 and 1 in turn."
    g = generator(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g) * 2 - 1

    return Batch(
        frames=None,
        latents=uniform(rows, length, config.n_latents, config.d_latent),
        actions=uniform(rows, length, config.action_dim),
        action_known=torch.ones(rows, length, dtype=torch.bool),
        intended=uniform(rows, length, config.action_dim),
        rewards=uniform(rows, length),
        continues=torch.ones(rows, length),
        task=torch.arange(rows) % 2,
        relevant=torch.arange(rows) < relevant)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    "Whether two modules have the same weights."
    a = one.state_dict()
    b = other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def same_batches(one: Batch, other: Batch) -> bool:
    "Whether two batches hold the same."
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch)]
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)
