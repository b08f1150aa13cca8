"The tokenizer: blind to the future on both sides, the same for every clip length and for streams, and its mask hides."
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from helpers.toy_stores import make

from dreamer4_nb.method import tokenizer as module
from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import UserError, inference_dtype, load_checkpoint, save_checkpoint
from dreamer4_nb.inputs import to_dict
from dreamer4_nb.core import Batch, to_float
from dreamer4_nb.data.demonstrations import _shipped
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.data.envs import object_pixels, render_states
from dreamer4_nb.data.arrays import atomic_store
from dreamer4_nb.data.stores import Episode, EpisodeStore
from dreamer4_nb.evaluation.ball import BALL_SCORE, ball_metrics, ball_position
from dreamer4_nb.evaluation.metrics import tokenizer_report
from dreamer4_nb.method.blocks import empty_cache
from dreamer4_nb.method.checkpoints import load_tokenizer
from dreamer4_nb.method.streams import coding_bytes, decode_stream, encode_stream
from dreamer4_nb.method.tokenizer import (PLAIN_OBJECTIVE, Tokenizer, TokenizerConfig, draw_mask,
                                          gradient_difference, latent_std_loss, mean_of_valid,
                                          nearest_background, patchify, reconstruct, set_frame_statistics,
                                          slowness_loss, tokenizer_loss, unpatchify)
from dreamer4_nb.training import phases
from dreamer4_nb.training.phases import encode_store, frame_statistics, train_tokenizer
from dreamer4_nb.training.optimizers import TrainConfig

CONTEXT, FRAMES = 3, 8


@pytest.fixture(params=["time in the middle", "time last", "GQA and soft cap", "two scenes"])
def tokenizer(request):
    "Random weights everywhere; three ways to arrange time layers of a window of 3 frames, and one with two mean frames."
    scenes = 2 if request.param == "two scenes" else 1
    shapes = {"time in the middle": dict(depth=3, heads=2, kv_heads=2, time_every=2), "time last": dict(depth=2, heads=2, kv_heads=2, time_every=2),
              "GQA and soft cap": dict(depth=3, heads=4, kv_heads=2, time_every=2, softcap=20.0), "two scenes": dict(depth=2, heads=2, kv_heads=2, time_every=2)}
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image=16, n_latents=2, d_latent=4, n_backgrounds=scenes, transformer=TransformerConfig(width=32, context=CONTEXT, **shapes[request.param])))
    nn.init.normal_(model.to_patch.weight, std=0.2)
    model.mean_frame.uniform_()
    return model.eval()


def clip_and_latents():
    g = torch.Generator().manual_seed(1)
    return torch.rand(2, FRAMES, 3, 16, 16, generator=g), torch.rand(2, FRAMES, 2, 4, generator=g) * 2 - 1


def batch_of(frames, valid=None):
    "A batch of frames, with nothing else in it that a tokenizer would look at."
    b, t = frames.shape[:2]
    actions, zeros, no_task = torch.zeros(b, t, 1), torch.zeros(b, t), torch.zeros(b)
    return Batch(frames=frames, latents=None, actions=actions, action_known=zeros > 0, intended=actions,
                 rewards=zeros, continues=zeros + 1, task=no_task.long(), relevant=no_task > 0, valid=valid)


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
    encoder_cache, decoder_cache = (empty_cache(part, len(clip)) for part in (tokenizer.encoder, tokenizer.decoder))
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
    set_frame_statistics(model, clip.flatten(0, 1))
    recon, z = reconstruct(model, clip * 50)
    assert z.abs().max() <= 1 and torch.equal(recon, model.mean_frame.expand_as(clip))


def test_scenes():
    "Each task its own mean frame: every frame is compared with the nearest, the decoder reads from the latents which to mix, and both learn it."
    g = torch.Generator().manual_seed(0)
    scenes = [torch.rand(3, 16, 16, generator=g) for _ in range(3)]
    what_moves = torch.randn(3, 1, 3, 16, 16, generator=g)                                                       # of each scene another thing
    frames = torch.stack(scenes)[:, None] + 0.05 * (1 + torch.rand(3, 40, 1, 1, 1, generator=g)) * what_moves    # (3, n, c, h, w)
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image=16, n_latents=2, d_latent=4, n_backgrounds=3, transformer=TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2)))
    for k in range(3):
        set_frame_statistics(model, frames[k], k)
    assert torch.equal(nearest_background(frames.transpose(0, 1), model.mean_frame, model.config.patch), torch.arange(3).expand(40, 3))                       # any leading shape
    assert torch.allclose(model.mean_frame[1], frames[1].mean(0)) and torch.allclose(model.std_frame[2], frames[2].std(0))
    nn.init.normal_(model.to_background.weight)
    latents = torch.rand(1, 1, 2, 4, generator=g)
    shares = model.to_background(latents.flatten(2)).softmax(-1)[0, 0]
    assert torch.allclose(model.decode(latents)[0, 0], (shares[:, None, None, None] * model.mean_frame).sum(0), atol=1e-6)
    nn.init.zeros_(model.to_background.weight)
    clips, before = frames[:, :8], None
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(200):
        loss = (reconstruct(model, clips)[0] - clips).square().mean()
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * before and (model.to_background(model.encode(clips).flatten(2)).argmax(-1) == torch.arange(3)[:, None]).all()


@pytest.mark.parametrize("budget", [None, "half", "a few frames", 1])
def test_episodes_in_pieces_are_whole_episodes(tokenizer, budget):
    "Whatever fits: many rows and frames at a time, or single frames of single rows."
    g = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (3, 41, 16, 16, 3), dtype=torch.uint8, generator=g)
    given = {"half": 1.5 * coding_bytes(tokenizer.encoder, tokenizer.config, 32),
             "a few frames": coding_bytes(tokenizer.encoder, tokenizer.config, 5)}.get(budget, budget)
    with torch.no_grad():
        latents = tokenizer.encode(to_float(raw))
        frames = tokenizer.decode(latents)
    assert torch.allclose(encode_stream(tokenizer, raw, given), latents, atol=1e-5)
    assert torch.allclose(encode_stream(tokenizer, to_float(raw), given), latents, atol=1e-5)
    assert torch.allclose(decode_stream(tokenizer, latents, given), frames, atol=1e-5)


class AliveBytes(TorchDispatchMode):
    "Counts the bytes of tensors that operations inside made and that are still in use; `peak` is the most."

    def __init__(self):
        super().__init__()
        self.known = {}
        self.alive = self.peak = 0

    def note(self, tree, counted):
        for x in (x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)):
            storage = x.untyped_storage()
            if storage._cdata not in self.known:
                self.known[storage._cdata] = counted * storage.nbytes()
                self.alive += self.known[storage._cdata]
                weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.alive -= self.known.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.note((args, kwargs), counted=False)
        out = function(*args, **(kwargs or {}))
        self.note(out, counted=True)
        self.peak = max(self.peak, self.alive)
        return out


@pytest.mark.parametrize("scenes", [1, 30])
def test_pieces_stay_within_their_budget(scenes):
    "By a count of what is alive; the result comes on top."
    shape = TransformerConfig(width=48, depth=4, heads=4, kv_heads=2, time_every=2, context=12)
    config = TokenizerConfig(image=32, n_latents=3, d_latent=4, n_backgrounds=scenes, transformer=shape)
    model = Tokenizer(config).eval()
    raw = torch.zeros(4, 40, 32, 32, 3, dtype=torch.uint8)
    latents = torch.zeros(4, 40, 3, 4)
    for coder, x, stream in ((model.encoder, raw, encode_stream), (model.decoder, latents, decode_stream)):
        for pieces in (2, 20, 100):
            budget = coding_bytes(coder, config, pieces)
            with AliveBytes() as count:
                out = stream(model, x, budget)
            assert count.peak - out.nbytes <= budget, (pieces, stream)
            assert pieces == 100 or count.peak - out.nbytes > budget / 4, (pieces, stream)     # and uses it


def test_a_store_is_encoded_as_its_episodes(tmp_path):
    torch.manual_seed(0)
    shape = TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2, context=3)
    model = Tokenizer(TokenizerConfig(image=4, patch=4, n_latents=2, d_latent=4, transformer=shape)).eval()
    store = make(tmp_path / "a.zarr", "a", [9, 9, 14, 5])
    latents = encode_store(store, model, tmp_path / "z.zarr", budget=1)
    for k in range(4):
        with torch.no_grad():
            whole = model.encode(to_float(torch.from_numpy(store.episode(k).frames))[None])[0]
        kept = torch.from_numpy(latents.episode(k).latents).float()
        assert torch.allclose(kept, whole, atol=1e-3)           # in float16


def test_inference_on_a_cpu_is_in_float32():
    assert inference_dtype(torch.device("cpu")) == torch.float32


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
    draw = lambda seed: reconstruct(model, clip, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0)[0], draw(0)[0]) and not torch.equal(draw(0)[0], draw(1)[0])
    assert not torch.equal(draw(0)[1], reconstruct(model, clip)[1])


def test_every_weight_learns():
    model = Tokenizer(TokenizerConfig(image=16, mask_max=0.5))
    nn.init.normal_(model.to_patch.weight, std=0.2)
    batch, generator = batch_of(clip_and_latents()[0]), torch.Generator().manual_seed(0)
    losses, _ = tokenizer_loss({"tokenizer": model}, batch, generator, gradient_difference)
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


def filmed(path, image, episodes=3, length=30):
    "Shipped states of ball_in_cup, drawn at a size, as a store."
    data, _ = _shipped("ball_in_cup-catch")
    starts = np.cumsum(data["lengths"]) - data["lengths"]
    with atomic_store(path) as beside:
        width = data["states"].shape[1]
        store = EpisodeStore.create(beside, "ball_in_cup-catch", 2, (image, image, 3), width)
        for start in starts[:episodes]:
            states = data["states"][start:start + length]
            frames = np.asarray(render_states("ball_in_cup-catch", states.astype(np.float64), image=image))
            actions, rewards = np.zeros((length, 2)), np.zeros(length)
            store.extend([Episode(actions=actions, rewards=rewards, frames=frames, states=states)])
        store.finish()
    return EpisodeStore.open(path)


def test_ball_metrics_hold_at_every_image_size(tmp_path):
    "True frames against themselves, alone and in the report; the pixels are the same for all sizes."
    reports = {}
    for image in (64, 96, 128):
        store = filmed(tmp_path / f"{image}.zarr", image)
        episode = store.episode(0)
        pixels = object_pixels(episode.task, episode.states, image)
        truth = ball_metrics(to_float(torch.from_numpy(episode.frames)), pixels)
        assert truth["visible"] >= 0.95 and truth["error_median"] < 0.6
        torch.manual_seed(0)
        shape = TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2, context=2)
        config = TokenizerConfig(image=image, patch=16, n_latents=2, d_latent=4, transformer=shape)
        model = Tokenizer(config).eval()
        set_frame_statistics(model, to_float(torch.from_numpy(store.column("frames"))))
        reports[image] = tokenizer_report(model, store, frames=60)
    for report in reports.values():
        truth, floor = report["true_frames"], report["mean_frame"]
        assert truth["ball_visible"] >= 0.95 and truth["ball_error_median"] < 0.6
        assert floor["ball_visible"] < 0.5
        assert floor["probe_error"] == pytest.approx(reports[64]["mean_frame"]["probe_error"], rel=1e-3)


@pytest.mark.parametrize("image", [48, 96, 128])
def test_a_place_is_in_pixels_of_its_image_and_an_error_in_those_of_64(image):
    fine = disc(30.0, 20.0)
    frame = torch.nn.functional.interpolate(fine, (image, image), mode="bicubic", antialias=True).clamp(0, 1)
    at = (torch.tensor([[30.0, 20.0]]) + 0.5) * image / 64 - 0.5
    found, score = ball_position(frame)
    assert (found - at).norm() < 0.1 * image / 64 and score > BALL_SCORE
    beside = ball_metrics(frame, at + torch.tensor([[5.0, 0.0]]) * image / 64)
    assert abs(beside["error_mean"] - 5) < 0.4 and beside["visible"] == 0
    assert ball_metrics(frame, at + torch.tensor([[2.0, 0.0]]) * image / 64)["visible"] == 1
    assert ball_metrics(frame, torch.tensor([[image - 1.0, 5.0]]))["n"] == 0


def test_padding_does_not_count():
    "In no term and in no gradient, whatever it shows; and all other frames do."
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([7, 4, 2])
    valid = torch.arange(7) < lengths[:, None]
    frames = torch.rand(3, 7, 3, 16, 16, generator=g)
    shape = TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2, context=3)
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image=16, n_latents=2, d_latent=4, mask_max=0.5, latent_noise=0.1,
                                      slowness=(0.5, 3.0), transformer=shape))
    nn.init.normal_(model.to_patch.weight, std=0.2)

    def run(frames, valid, part, n_perceptual=100):
        model.zero_grad()
        modules, generator = {"tokenizer": model}, torch.Generator().manual_seed(3)
        losses, metrics = tokenizer_loss(modules, batch_of(frames, valid), generator, gradient_difference,
                                         n_perceptual, part)
        sum(losses.values()).backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
        return torch.stack([*losses.values(), *metrics.values(), gradients.norm()]).detach(), gradients

    other = torch.where(valid[..., None, None, None], frames, 1 - frames)
    for part in (0, 1):
        for n_perceptual in (2, 100):
            values, gradients = run(frames, valid, part, n_perceptual)
            values_other, gradients_other = run(other, valid, part, n_perceptual)
            assert torch.allclose(values, values_other, atol=1e-6)
            assert torch.allclose(gradients, gradients_other, atol=1e-6)
        assert not torch.allclose(run(frames, None, part)[0], run(other, None, part)[0], atol=1e-4)
        for k in range(3):
            changed = frames.clone()
            last = lengths[k] - 1                                       # the last frame that counts
            changed[k, last] = 1 - changed[k, last]
            assert not torch.allclose(run(changed, valid, part)[0], run(frames, valid, part)[0], atol=1e-4)
        all_valid = run(frames, torch.ones_like(valid), part)[0]
        assert torch.allclose(all_valid, run(frames, None, part)[0], atol=1e-6)


def test_terms_under_padding_are_those_of_the_frames_that_count():
    g = torch.Generator().manual_seed(0)
    latents, valid = torch.randn(2, 6, 2, 3, generator=g), torch.arange(6) < torch.tensor([[6], [3]])
    kept = torch.cat([latents[0], latents[1, :3]])
    assert torch.allclose(mean_of_valid(latents, valid), kept.mean())
    assert torch.allclose(latent_std_loss(latents, 0.35, valid), (kept.std(0) - 0.35).abs().mean())
    steps = torch.cat([latents[0].diff(dim=0), latents[1, :3].diff(dim=0)]).square().mean()
    assert torch.allclose(slowness_loss(latents, valid), steps / (2 * kept.var(0).mean() + 1e-6))
    assert slowness_loss(latents, torch.arange(6) < torch.tensor([[1], [1]])) == 0   # no pair: nothing, and not NaN
    assert slowness_loss(latents, torch.zeros(2, 6, dtype=torch.bool)) == 0


def test_plain_objective_is_the_mean_squared_error():
    clip = clip_and_latents()[0]
    shape = TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2, context=2)
    torch.manual_seed(0)
    config = TokenizerConfig(**PLAIN_OBJECTIVE, image=16, n_latents=2, d_latent=4, transformer=shape)
    model = Tokenizer(config)
    model.mean_frame.uniform_()
    nn.init.normal_(model.to_patch.weight, std=0.2)
    perceptual = lambda recon, frames: (recon - frames).abs().mean()
    for part in (0, 1):
        modules, generator = {"tokenizer": model}, torch.Generator().manual_seed(1)
        losses, _ = tokenizer_loss(modules, batch_of(clip), generator, perceptual, part=part)
        generator.manual_seed(1)
        recon, _ = reconstruct(model, clip, generator)
        rows = torch.randperm(2 * FRAMES, generator=generator)[:8]
        mse = (recon - clip).square().mean()
        assert losses.keys() == {"mse", "perceptual"} and torch.equal(losses["mse"], mse)
        drawn, true = recon.flatten(0, 1)[rows], clip.flatten(0, 1)[rows]
        assert torch.equal(losses["perceptual"], perceptual(drawn, true))
        weights = list(model.parameters())
        gradients, of_mse = (torch.autograd.grad(x, weights, allow_unused=True) for x in (losses["mse"], mse))
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(gradients, of_mse))
    modules = {"tokenizer": Tokenizer(replace(config, latent_std_weight=3.0))}
    with_spread, _ = tokenizer_loss(modules, batch_of(clip), torch.Generator())
    assert with_spread["mse"] > 1.2 * (clip - 0.5).square().mean()


TINY = TransformerConfig(width=32, depth=2, heads=2, kv_heads=2, time_every=2, context=3)
SMALL = dict(image=4, patch=4, n_latents=2, d_latent=4, transformer=TINY)
FEW = TrainConfig(steps=4, warmup=1, log_every=1, save_every=1, dtype="float32", device="cpu")


def test_one_clip_says_nothing_of_change():
    "Two frames of one clip: the ratio is 1 whatever they are, so there is nothing to learn from it."
    for seed in range(3):
        z = torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
        assert abs(slowness_loss(z) - 1) < 1e-3
        assert torch.autograd.grad(slowness_loss(z), z)[0].abs().max() < 1e-4


def train_small(store, config={}, train=FEW, run_dir=None, **settings):
    "The smallest training, without the perceptual term."
    settings = {"perceptual": 0.0} | settings
    return train_tokenizer(store, TokenizerConfig(**SMALL | config), train, run_dir, **settings)


NO_SPREAD, LATE = {"latent_std_weight": 0.0}, {"latent_std_weight": 0.0, "slowness": (0.0, 0.5)}


@pytest.mark.parametrize("config, batch, length, slow_steps, remedy", [
    ({}, 1, 8, 0, "batch of 2"), ({}, 1, 8, 4, "batch of 2"), (NO_SPREAD, 1, 8, 0, "batch of 2"),
    ({"slowness": (0.0, 0.0)}, 1, 8, 0, "batch of 2"), ({}, 2, 2, 4, "batch x length of 8 or more"),
    ({}, 3, 2, 4, "slow_steps=0"), (LATE, 1, 4, 4, "slow_steps=0"), ({}, 4, 4, -1, "slow_steps")])
def test_single_clips_are_refused_at_the_door(tmp_path, monkeypatch, config, batch, length, slow_steps, remedy):
    monkeypatch.setattr(phases, "fit", lambda *args, **kwargs: pytest.fail("a step was taken"))
    monkeypatch.setattr(phases, "Windows", lambda *args, **kwargs: pytest.fail("data was read"))
    store = make(tmp_path / "a.zarr", "a", [20, 20])
    with pytest.raises(UserError, match=remedy):
        train_small(store, config, batch=batch, length=length, slow_steps=slow_steps)


@pytest.mark.parametrize("config, batch, length, slow_steps", [
    (PLAIN_OBJECTIVE, 1, 8, 0), (PLAIN_OBJECTIVE, 1, 8, 2), ({}, 2, 2, 0), ({}, 4, 2, 2), (LATE, 1, 8, 0)])
def test_batches_that_can_be_compared_are_trained_on(tmp_path, config, batch, length, slow_steps):
    store = make(tmp_path / "a.zarr", "a", [20, 20])
    train_small(store, config, replace(FEW, steps=1), batch=batch, length=length, slow_steps=slow_steps)


@pytest.mark.parametrize("slow_steps", [0, 3])
def test_each_part_trains_as_it_should(tmp_path, monkeypatch, slow_steps):
    "Name, steps, slowness and windows of the parts; without a second part the first makes the tokenizer."
    fits = []

    def noted(name, modules, loss, batches, train, run_dir, **kwargs):
        fits.append((name, loss.keywords["part"], train.steps, batches.length, batches.batch))

    monkeypatch.setattr(phases, "fit", noted)
    train_small(make(tmp_path / "a.zarr", "a", [20, 20]), batch=6, length=2, slow_steps=slow_steps)
    second = [("tokenizer", 1, 3, 4, 3)]
    assert fits == ([("tokenizer.draft", 0, 4, 2, 6)] + second if slow_steps else [("tokenizer", 0, 4, 2, 6)])


def test_the_second_part_is_the_slow_one():
    clip = clip_and_latents()[0]
    model = Tokenizer(TokenizerConfig(image=16, mask_max=0.0, slowness=(0.0, 100.0), transformer=TINY))
    modules, batch = {"tokenizer": model}, batch_of(clip)
    first, second = (tokenizer_loss(modules, batch, torch.Generator(), part=part)[0] for part in (0, 1))
    assert second["mse"] > 10 * first["mse"]


def test_training_without_a_second_part_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    store = make(tmp_path / "a.zarr", "a", [20, 20])
    run = lambda folder: train_small(store, run_dir=folder, batch=2, length=2, slow_steps=0)
    run(tmp_path / "unbroken")
    loss, calls = module.tokenizer_loss, []

    def stopping(*args, **kwargs):
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*args, **kwargs)

    monkeypatch.setattr(phases, "tokenizer_loss", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken")
    assert not (tmp_path / "broken" / "tokenizer.safetensors").exists()
    run(tmp_path / "broken")
    assert len(calls) == 5                                                # steps 1, 2, 3 (stopped), 3, 4
    path = "tokenizer.safetensors"
    unbroken, broken = (load_checkpoint(tmp_path / name / path)[0] for name in ("unbroken", "broken"))
    assert all(torch.equal(value, broken[key]) for key, value in unbroken.items())
    assert not list(tmp_path.glob("*/tokenizer.draft*"))
    assert load_tokenizer(tmp_path / "broken" / "tokenizer.safetensors").config == TokenizerConfig(**SMALL)


def test_every_task_has_statistics_of_its_own_however_many_there_are(tmp_path):
    "Of 30 tasks, one frame value each, 32 batches of two clips do not show all."
    stores = [make(tmp_path / f"{k}.zarr", f"task {k}", [12] * (k + 1)).subset([k]) for k in range(30)]
    joined = EpisodeStore.join(stores)
    model = train_small(joined, {"n_backgrounds": 30}, replace(FEW, steps=1), batch=2, length=2, slow_steps=0)
    assert torch.isfinite(model.mean_frame).all() and torch.isfinite(model.std_frame).all()
    assert (model.mean_frame * 255 - torch.arange(30.0)[:, None, None, None]).abs().max() < 1e-3


def test_a_task_of_one_episode_among_hundreds_has_statistics_of_its_own(tmp_path):
    many, one = make(tmp_path / "a.zarr", "a", [6] * 200), make(tmp_path / "b.zarr", "b", [3] * 251)
    joined = EpisodeStore.join([many, one.subset([250])])
    config = PLAIN_OBJECTIVE | {"n_backgrounds": 2}
    model = train_small(joined, config, replace(FEW, steps=1), batch=1, length=3, slow_steps=0)
    assert torch.allclose(model.mean_frame[1] * 255, torch.tensor(250.0)) and model.std_frame[1].max() < 1e-4
    assert 0 < model.mean_frame[0].mean() * 255 < 200 and model.std_frame[0].min() > 0.01


def test_statistics_are_those_of_all_frames_that_count(tmp_path):
    g = torch.Generator().manual_seed(0)
    batches = [batch_of(torch.rand(3, 5, 3, 4, 4, generator=g)) for _ in range(4)]
    frames = torch.cat([batch.frames.flatten(0, 1) for batch in batches])
    mean, std = frame_statistics(iter(batches))
    assert torch.allclose(mean, frames.mean(0), atol=1e-6) and torch.allclose(std, frames.std(0), atol=1e-6)
    valid = torch.arange(5) < torch.tensor([[5], [2], [1]])
    shown = valid[..., None, None, None]
    padded = [batch_of(torch.where(shown, batch.frames, torch.tensor(9.0)), valid) for batch in batches]
    kept = torch.cat([batch.frames[valid] for batch in batches])
    mean, std = frame_statistics(padded)
    assert torch.allclose(mean, kept.mean(0), atol=1e-6) and torch.allclose(std, kept.std(0), atol=1e-6)
    store = make(tmp_path / "a.zarr", "a", [20, 20, 30])
    model = train_small(store, train=replace(FEW, steps=1), batch=3, length=2, slow_steps=0)
    drawn = Windows(store, 2, 3, 0, focus=0.7)
    frames = torch.cat([drawn(-1 - k).frames for k in range(32)]).flatten(0, 1)
    assert torch.allclose(model.mean_frame[0], frames.mean(0), atol=1e-6)
    assert torch.allclose(model.std_frame[0], frames.std(0), atol=1e-6)


def test_short_episodes_are_trained_on(tmp_path):
    "A store of which no episode is as long as the second part's clips."
    store = make(tmp_path / "a.zarr", "a", [2, 3, 3, 2])
    model = train_small(store, train=replace(FEW, steps=2), batch=4, length=2, slow_steps=2, perceptual=0.2)
    assert all(torch.isfinite(p).all() for p in model.parameters()) and torch.isfinite(model.std_frame).all()


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
                lambda: tokenizer.encode(clip, mask=torch.zeros(2, FRAMES, 9, dtype=torch.bool)), lambda: set_frame_statistics(tokenizer, clip),
                lambda: tokenizer.encode(clip, cache=empty_cache(tokenizer.encoder, 3)), lambda: TokenizerConfig(image=60), lambda: TokenizerConfig(mask_max=1.5),
                lambda: TokenizerConfig(latent_noise=-1.0), lambda: TokenizerConfig(n_backgrounds=0),
                lambda: TokenizerConfig(latent_std_weight=-1.0), lambda: TokenizerConfig(latent_std=0.0),
                lambda: set_frame_statistics(Tokenizer(TokenizerConfig(image=16)), clip[0, :1]),
                lambda: encode_stream(tokenizer, torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)),
                lambda: train_small(two_tasks, {"n_backgrounds": 3}),
                lambda: load_tokenizer(tmp_path / "missing.safetensors"), lambda: load_tokenizer(other),
                lambda: load_tokenizer(foreign), lambda: ball_metrics(torch.rand(3, 3, 64, 64), torch.zeros(2, 2)), lambda: ball_position(torch.rand(3, 64, 64))]
    for number, mistake in enumerate(mistakes):
        with pytest.raises(UserError) as caught:
            mistake()
        assert 20 < len(str(caught.value)) < 700 and "\n" not in str(caught.value), number
