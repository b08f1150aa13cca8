"A shape that is trained in milliseconds."
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.method.dynamics import DynamicsConfig
from dreamer4_nb.method.tokenizer import TokenizerConfig
from dreamer4_nb.runs.costs import Shape

THIN = TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=4, context=5)
MICRO = Shape(
    TokenizerConfig(image=32, n_latents=4, d_latent=8, transformer=THIN),
    DynamicsConfig(n_latents=4, d_latent=8, pack=1, transformer=THIN),
    batch=4, length=6, context=2, generated=2)
