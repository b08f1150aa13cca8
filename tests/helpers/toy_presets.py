"Presets and shapes with every switch as it is and every size small: what they do can be tried in seconds."
from dataclasses import replace

from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.runs.costs import Shape
from dreamer4_nb.method.dynamics import DynamicsConfig
from dreamer4_nb.runs.presets import Preset
from dreamer4_nb.method.tokenizer import TokenizerConfig


def thin(config: TransformerConfig, context: int) -> TransformerConfig:
    "Two layers or more, one of them along time."
    kv_heads = 1 if config.kv_heads < config.heads else 2
    return replace(config, width=32, depth=max(2, config.time_every), heads=2, kv_heads=kv_heads,
                   context=min(config.context, context))


def thin_tokenizer(config: TokenizerConfig) -> TokenizerConfig:
    blocks = thin(config.transformer, 3)
    return replace(config, image=64, patch=16, n_latents=4, d_latent=8, transformer=blocks)


def thin_dynamics(config: DynamicsConfig) -> DynamicsConfig:
    blocks = thin(config.transformer, 8)
    return replace(config, n_latents=4, d_latent=8, short_clip_length=min(config.short_clip_length, 4), transformer=blocks)


def thin_shape(shape: Shape) -> Shape:
    models = {"tokenizer": thin_tokenizer(shape.tokenizer), "dynamics": thin_dynamics(shape.dynamics)}
    clips = (2, min(shape.tokenizer_clips[1], 4))
    return replace(shape, **models, batch=min(shape.batch, 4), length=12, context=4, generated=2, clips=clips)


def thin_preset(preset: Preset, steps: int = 2, **train) -> Preset:
    "The preset for runs of a few `steps` a phase; `train`: other settings of all its TrainConfigs."
    def phase(name: str, model, **sizes):
        old = getattr(preset, name)
        short = replace(old.train, steps=steps, warmup=1, log_every=1, **train)
        return replace(old, model=model, train=short, **sizes)

    tokenizer, agent, imagination = preset.tokenizer, preset.agent.model, preset.imagination.model
    length, slow_steps = min(tokenizer.length, 4), min(tokenizer.slow_steps, steps)
    return replace(
        preset, threads=1, workers=1, held_out=0.25,
        tokenizer=phase("tokenizer", thin_tokenizer(tokenizer.model), batch=4, length=length, slow_steps=slow_steps),
        dynamics=phase("dynamics", thin_dynamics(preset.dynamics.model), batch=4, length=12),
        agent=phase("agent", replace(agent, hidden=32), batch=4, length=12),
        imagination=phase("imagination", replace(imagination, context=4, horizon=3), batch=4),
        evaluation=replace(preset.evaluation, episodes=2, decisions=10, demonstrator=0, dreams=4, videos=1))
