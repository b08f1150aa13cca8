"The tokenizer: blind to the future on both sides, the same for every clip length and for streams, and its mask hides."
import pytest
import torch
from torch import nn
from toy_stores import make

from dreamer4_nb.attention import TransformerConfig
from dreamer4_nb.core import UserError, save_checkpoint, to_dict
from dreamer4_nb.stores import EpisodeStore
from dreamer4_nb.tokenizer import (BALL_SCORE, Tokenizer, TokenizerConfig, ball_metrics, ball_position, draw_mask, gradient_difference,
                                   load_tokenizer, patchify, tokenizer_loss, train_tokenizer, unpatchify)
from dreamer4_nb.training import TrainConfig

CONTEXT, FRAMES = 3, 8


@pytest.fixture(params=["time in the middle", "time last", "GQA and soft cap", "two scenes"])
def tokenizer(request):
    "Random weights everywhere; three ways to arrange time layers of a window of 3 frames, and one with two mean frames."
    scenes = 2 if request.param == "two scenes" else 1
    shapes = {"time in the middle": dict(depth=3, heads=2, kv_heads=2, time_every=2), "time last": dict(depth=2, heads=2, kv_heads=2, time_every=2),
              "GQA and soft cap": dict(depth=3, heads=4, kv_heads=2, time_every=2, softcap=20.0), "two scenes": dict(depth=2, heads=2, kv_heads=2, time_every=2)}
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image=16, n_latents=2, d_latent=4, scenes=scenes, transformer=TransformerConfig(width=32, context=CONTEXT, **shapes[request.param])))
    nn.init.normal_(model.to_patch.weight, std=0.2)
    model.mean_frame.uniform_()
    return model.eval()


def clip_and_latents():
    g = torch.Generator().manual_seed(1)
    return torch.rand(2, FRAMES, 3, 16, 16, generator=g), torch.rand(2, FRAMES, 2, 4, generator=g) * 2 - 1


def check_causal(f, x):
    "Frame t of f(x) depends on frames t - CONTEXT + 1 .. t of x and on no other, by gradients and by perturbation."
    x = x.clone().requires_grad_()
    y = f(x)
    probe = torch.randn(y.shape[2:], generator=torch.Generator().manual_seed(2))
    for t in range(FRAMES):
        influence = torch.autograd.grad((y[:, t] * probe).sum(), x, retain_graph=True)[0].flatten(2).norm(dim=2).sum(0)
        assert (influence[t + 1:] == 0).all(), f"frame {t} sees the future"
        assert (influence[max(0, t - CONTEXT + 1):t + 1] > 0).all(), f"frame {t} does not see its window"
    changed = x.detach().clone()
    changed[:, 5:] = changed[:, 5:].flip(0) + 0.3
    with torch.no_grad():
        assert torch.allclose(f(changed)[:, :5], y[:, :5], atol=1e-6)
        assert not torch.allclose(f(changed)[:, 5:], y[:, 5:], atol=1e-3)


def check_clip_length(f, x):
    "The first frames come out the same whatever follows them."
    with torch.no_grad():
        whole = f(x)
        for length in range(1, FRAMES):
            assert torch.allclose(f(x[:, :length]), whole[:, :length], atol=1e-5), f"a clip of {length} frames differs"


def check_stream(f, cache, x, pieces):
    "Pieces of a clip through a cache give what the whole clip gives."
    with torch.no_grad():
        streamed = torch.cat([f(piece, cache=cache) for piece in x.split(pieces, 1)], 1)
        assert torch.allclose(streamed, f(x), atol=1e-5)


def check_mask(encode, x):
    "Dropped patches cannot be seen; the others can."
    mask = torch.zeros(len(x), FRAMES, 4, dtype=torch.bool)
    mask[:, :, 1] = True                                            # upper right
    hidden, seen = x.clone(), x.clone()
    hidden[..., :8, 8:] = 1 - hidden[..., :8, 8:]
    seen[..., 8:, :8] = 1 - seen[..., 8:, :8]
    with torch.no_grad():
        assert torch.allclose(encode(hidden, mask=mask), encode(x, mask=mask), atol=1e-6)
        assert not torch.allclose(encode(seen, mask=mask), encode(x, mask=mask), atol=1e-4)
        assert not torch.allclose(encode(x, mask=mask), encode(x), atol=1e-4)


def test_encoder_is_causal(tokenizer):
    check_causal(tokenizer.encode, clip_and_latents()[0])


def test_decoder_is_causal(tokenizer):
    check_causal(tokenizer.decode, clip_and_latents()[1])


def test_clip_length_does_not_matter(tokenizer):
    clip, latents = clip_and_latents()
    check_clip_length(tokenizer.encode, clip)
    check_clip_length(tokenizer.decode, latents)


@pytest.mark.parametrize("pieces", [1, 2, 3, 5, [3, 1, 1, 3]])
def test_stream_is_window(tokenizer, pieces):
    clip, latents = clip_and_latents()
    encoder_cache, decoder_cache = tokenizer.init_cache(len(clip))
    check_stream(tokenizer.encode, encoder_cache, clip, pieces)
    check_stream(tokenizer.decode, decoder_cache, latents, pieces)


def test_mask_hides(tokenizer):
    check_mask(tokenizer.encode, clip_and_latents()[0])


def test_the_checks_can_fail(tokenizer):
    "Every check above against a planted fault."
    clip, latents = clip_and_latents()
    encode, decode = tokenizer.encode, tokenizer.decode
    shifted = lambda x, **kw: encode(x, **kw).roll(-1, 1)                   # one frame ahead
    clip_mean = lambda x: encode(x) - encode(x).mean(1, keepdim=True)       # statistics over the clip
    frame_only = lambda x: torch.cat([encode(x[:, t:t + 1]) for t in range(x.shape[1])], 1)     # no memory
    forgetful = lambda x, cache=None: encode(x)                             # ignores its cache
    leaky = lambda x, mask=None: encode(x)                                  # ignores the mask
    all_hidden = lambda x, mask=None: encode(x * 0)
    for fault in (lambda: check_causal(shifted, clip), lambda: check_causal(clip_mean, clip), lambda: check_causal(frame_only, clip),
                  lambda: check_causal(lambda z: decode(z.flip(1)).flip(1), latents), lambda: check_clip_length(clip_mean, clip),
                  lambda: check_clip_length(lambda z: decode(z.flip(1)).flip(1), latents), lambda: check_stream(forgetful, None, clip, 1),
                  lambda: check_mask(leaky, clip), lambda: check_mask(all_hidden, clip)):
        with pytest.raises(AssertionError):
            fault()


def test_latents_are_bounded_and_a_newborn_draws_the_mean_frame():
    model, clip = Tokenizer(TokenizerConfig(image=16)), clip_and_latents()[0]
    model.set_statistics(clip.flatten(0, 1))
    recon, z = model(clip * 50)
    assert z.abs().max() <= 1 and torch.equal(recon, model.mean_frame.expand_as(clip))


def test_scenes():
    "Each task its own mean frame: every frame is compared with the nearest, the decoder reads from the latents which to mix, and both learn it."
    g = torch.Generator().manual_seed(0)
    scenes = [torch.rand(3, 16, 16, generator=g) for _ in range(3)]
    what_moves = torch.randn(3, 1, 3, 16, 16, generator=g)                                                       # of each scene another thing
    frames = torch.stack(scenes)[:, None] + 0.05 * (1 + torch.rand(3, 40, 1, 1, 1, generator=g)) * what_moves    # (3, n, c, h, w)
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image=16, n_latents=2, d_latent=4, scenes=3, transformer=TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2)))
    for k in range(3):
        model.set_statistics(frames[k], k)
    assert torch.equal(model.scene(frames.transpose(0, 1)), torch.arange(3).expand(40, 3))                       # any leading shape
    assert torch.allclose(model.mean_frame[1], frames[1].mean(0)) and torch.allclose(model.std_frame[2], frames[2].std(0))
    nn.init.normal_(model.to_scene.weight)
    latents = torch.rand(1, 1, 2, 4, generator=g)
    shares = model.to_scene(latents.flatten(2)).softmax(-1)[0, 0]
    assert torch.allclose(model.decode(latents)[0, 0], (shares[:, None, None, None] * model.mean_frame).sum(0), atol=1e-6)
    nn.init.zeros_(model.to_scene.weight)
    clips, before = frames[:, :8], None
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        loss = (model(clips)[0] - clips).square().mean()
        before = before or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1 * before and (model.to_scene(model.encode(clips).flatten(2)).argmax(-1) == torch.arange(3)[:, None]).all()


@pytest.mark.parametrize("tube", [False, True])
def test_masks_are_drawn_as_documented(tube):
    mask = draw_mask((2000, 3, 16), 0.8, tube, torch.Generator().manual_seed(0), "cpu")
    share = mask.float().mean(2)
    assert abs(share.mean() - 0.4) < 0.02 and (share == 0).any() and (share > 0.7).any()
    assert (mask == mask[:, :1]).all() == tube
    assert torch.equal(mask, draw_mask((2000, 3, 16), 0.8, tube, torch.Generator().manual_seed(0), "cpu"))


def test_training_pass_is_masked_noised_and_reproducible():
    clip = clip_and_latents()[0]
    model = Tokenizer(TokenizerConfig(image=16, mask_max=0.9, latent_noise=0.5))
    nn.init.normal_(model.to_patch.weight, std=0.2)
    draw = lambda seed: model(clip, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0)[0], draw(0)[0]) and not torch.equal(draw(0)[0], draw(1)[0])
    assert not torch.equal(draw(0)[1], model(clip)[1])


def test_every_weight_learns():
    class Batch: frames = clip_and_latents()[0]
    model = Tokenizer(TokenizerConfig(image=16, mask_max=0.5))
    nn.init.normal_(model.to_patch.weight, std=0.2)
    losses, _ = tokenizer_loss({"tokenizer": model}, Batch, torch.Generator().manual_seed(0), gradient_difference)
    sum(losses.values()).backward()
    # no one reads the last encoder layer's patches: the position of a patch still matters through earlier layers
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_patches_go_there_and_back():
    clip = clip_and_latents()[0]
    assert torch.equal(unpatchify(patchify(clip, 4), 4, 16), clip)


def disc(x, y):
    "A frame (1, 3, 64, 64) with an orange ball at pixel (x, y) on the task's dark blue."
    v, u = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    cover = (2.0 - ((u - x) ** 2 + (v - y) ** 2).sqrt()).clamp(0, 1)
    dark, orange = torch.tensor([0.13, 0.2, 0.3]), torch.tensor([0.95, 0.58, 0.28])
    return (dark + cover[..., None] * (orange - dark)).permute(2, 0, 1)[None]


@pytest.mark.parametrize("at", [(20.0, 30.0), (20.4, 30.3), (5.0, 60.0), (40.5, 10.5)])
def test_ball_is_found(at):
    found, score = ball_position(disc(*at))
    assert (found - torch.tensor([at])).norm() < 0.4 and score > BALL_SCORE
    assert ball_metrics(disc(*at), torch.tensor([at]))["visible"] == 1
    elsewhere = ball_metrics(disc(*at), torch.tensor([[50.0, 50.0]]))
    assert elsewhere["visible"] == 0 and elsewhere["error_mean"] > 10
    assert ball_metrics(disc(-9, -9), torch.tensor([at]))["visible"] == 0
    assert ball_metrics(disc(*at), torch.tensor([[-3.0, 5.0]]))["n"] == 0            # out of view: not counted


def test_the_weights_that_ship():
    model = load_tokenizer()
    assert not model.training and model.mean_frame.std() > 0.01
    z = model.encode(model.mean_frame[0].expand(1, 2, -1, -1, -1))
    assert torch.isfinite(z).all() and (model.decode(z) - model.mean_frame).abs().mean() < 0.05


def test_bad_input_is_a_user_error(tokenizer, tmp_path):
    clip, latents = clip_and_latents()
    two_tasks = EpisodeStore.join([make(tmp_path / f"{name}.zarr", name, [20, 20]) for name in "ab"])
    other, foreign = tmp_path / "other.safetensors", tmp_path / "foreign.safetensors"
    save_checkpoint(other, {f"tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}, {"tokenizer": to_dict(TokenizerConfig(image=16))})
    save_checkpoint(foreign, {}, {"dynamics": {}})
    mistakes = [lambda: tokenizer.encode(clip[:, 0]), lambda: tokenizer.encode(clip[..., :8]), lambda: tokenizer.encode(clip[:, :, :1]),
                lambda: tokenizer.encode(clip.movedim(2, -1)), lambda: tokenizer.decode(latents[:, :, :1]), lambda: tokenizer.decode(latents.flatten(2)),
                lambda: tokenizer.encode(clip, mask=torch.zeros(2, FRAMES, 9, dtype=torch.bool)), lambda: tokenizer.set_statistics(clip),
                lambda: tokenizer.encode(clip, cache=tokenizer.init_cache(3)[0]), lambda: TokenizerConfig(image=60), lambda: TokenizerConfig(mask_max=1.5),
                lambda: TokenizerConfig(latent_noise=-1.0), lambda: TokenizerConfig(scenes=0),
                lambda: train_tokenizer(two_tasks, TokenizerConfig(image=4, patch=4, scenes=3), TrainConfig(steps=1), None), lambda: load_tokenizer(tmp_path / "missing.safetensors"), lambda: load_tokenizer(other),
                lambda: load_tokenizer(foreign), lambda: ball_metrics(torch.rand(3, 3, 64, 64), torch.zeros(2, 2)), lambda: ball_position(torch.rand(3, 64, 64))]
    for number, mistake in enumerate(mistakes):
        with pytest.raises(UserError) as caught:
            mistake()
        assert 20 < len(str(caught.value)) < 700 and "\n" not in str(caught.value), number
