"The world model: who sees whom, what is hidden, which indices are trained, where gradients go."
import math
from dataclasses import replace

import pytest
import torch

from dreamer4_nb.method.attention import TransformerConfig
from dreamer4_nb.core import UserError, save_checkpoint
from dreamer4_nb.inputs import to_dict
from dreamer4_nb.core import Batch
from dreamer4_nb.method.blocks import empty_cache
from dreamer4_nb.method.checkpoints import load_dynamics
from dreamer4_nb.method.dynamics import (Dynamics, DynamicsConfig, draw_segments, dynamics_loss,
                                         set_latent_statistics, video_loss)
from dreamer4_nb.method.forcing import Schedule, noise_context

B, T = 3, 7
SMALL = DynamicsConfig(n_latents=4, d_latent=6, transformer=TransformerConfig(width=32, depth=4, heads=2, kv_heads=1, time_every=2, context=5))


def make_model(seed=0, **changes):
    "A small model whose output layer is not near zero, so that what could matter does."
    torch.manual_seed(seed)
    model = Dynamics(replace(SMALL, **changes))
    torch.nn.init.normal_(model.to_latent.weight, std=0.3)
    return model


def make_inputs(model, seed=1, t=T):
    g, c = torch.Generator().manual_seed(seed), model.config
    inputs = {"z": torch.randn(B, t, c.n_tokens, c.d_token, generator=g), "i": torch.randint(c.schedule.k_max, (B, t), generator=g),
              "j": torch.full((B, t), c.schedule.grid.j_min), "actions": torch.rand(B, t, c.action_dim, generator=g) * 2 - 1,
              "action_known": torch.ones(B, t, dtype=torch.bool)}
    if c.n_agent:
        inputs["agent"] = torch.randn(B, c.n_agent, c.transformer.width, generator=g)
    return inputs


def make_batch(config, seed=2, b=8, t=T):
    g = torch.Generator().manual_seed(seed)
    ones = torch.ones(b, t)
    return Batch(frames=None, latents=torch.rand(b, t, config.n_latents, config.d_latent, generator=g) * 2 - 1,
                 actions=torch.rand(b, t, config.action_dim, generator=g) * 2 - 1, action_known=ones.bool(),
                 intended=torch.zeros(b, t, config.action_dim), rewards=0 * ones, continues=ones,
                 task=torch.zeros(b, dtype=torch.long), relevant=torch.zeros(b, dtype=torch.bool))


def gradient(output, source):
    "Of a random projection of `output`: its square would be blind behind a norm."
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    (found,) = torch.autograd.grad((output * weights).sum(), source, retain_graph=True, allow_unused=True)
    return torch.zeros_like(source) if found is None else found


def test_nothing_sees_the_agent_and_the_agent_sees_everything():
    model = make_model(n_agent=2)
    inputs = make_inputs(model)
    for name in ("z", "actions", "agent"):
        inputs[name].requires_grad_()
    x_hat, h = model(**inputs)
    assert h.shape == (B, T, 2, 32)
    assert gradient(x_hat, inputs["agent"]).abs().max() == 0
    for name in ("z", "actions", "agent"):
        assert gradient(h[:, -1], inputs[name]).abs().max() > 1e-3, name


def test_the_world_without_agent_tokens_is_the_same_world():
    with_agent, without = make_model(n_agent=1), make_model(seed=5)
    without.load_state_dict(with_agent.state_dict())           # phase 2 starts from the weights of phase 1
    inputs = make_inputs(with_agent)
    torch.testing.assert_close(with_agent(**inputs)[0], without(**{k: v for k, v in inputs.items() if k != "agent"})[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["z", "actions"])
def test_no_output_sees_a_later_frame_or_action(name):
    model = make_model(n_agent=1)
    inputs = make_inputs(model)
    inputs[name].requires_grad_()
    for output in model(**inputs):
        reach = gradient(output[:, 3], inputs[name]).flatten(2).abs().amax((0, 2))
        assert reach[4:].max() == 0
        assert reach[:4].min() > 0                             # also: a_t, which led to frame t, and the three before it


@pytest.mark.parametrize("committed", [False, True])
def test_a_predicted_velocity_leads_to_the_clean_latents(committed):
    "The same weights, read as a velocity: x_hat = z + (1 - tau) v."
    models = [make_model(prediction=prediction).eval() for prediction in ("x", "v")]
    inputs = make_inputs(models[0])
    if committed:
        inputs["context"] = torch.randn(inputs["z"].shape, generator=torch.Generator().manual_seed(3))
    v, found = (model(**inputs)[0] for model in models)
    tau = inputs["i"][..., None, None] / models[0].config.schedule.k_max
    torch.testing.assert_close(found, inputs["z"] + (1 - tau) * v)


def test_a_hidden_action_is_hidden_and_none_is_not_zero():
    model = make_model()
    inputs = make_inputs(model)
    inputs["action_known"][:, 2] = False
    base = model(**inputs)[0]
    other = inputs["actions"].clone()
    other[:, 2] = -other[:, 2]
    torch.testing.assert_close(model(**inputs | {"actions": other})[0], base, atol=0, rtol=0)
    zero = inputs | {"actions": torch.zeros_like(other), "action_known": torch.ones(B, T, dtype=torch.bool)}
    unknown = zero | {"action_known": torch.zeros(B, T, dtype=torch.bool)}
    assert (model(**zero)[0] - model(**unknown)[0]).abs().max() > 1e-3


def test_a_segment_is_a_separate_clip():
    model = make_model(n_agent=1)
    inputs = make_inputs(model)
    segments = torch.tensor([0, 0, 0, 1, 1, 1, 1]).expand(B, T)
    joined = model(**inputs, segments=segments)
    for part in (slice(0, 3), slice(3, 7)):
        alone = model(**{k: v if k == "agent" else v[:, part] for k, v in inputs.items()})
        for x, y in zip(joined, alone):
            torch.testing.assert_close(x[:, part], y, atol=1e-5, rtol=1e-5)
    whole = model(**inputs)[0]
    assert (whole[:, 3:] - joined[0][:, 3:]).abs().max() > 1e-3


def test_image_rows_and_short_clips_have_one_shape():
    g = torch.Generator().manual_seed(0)
    config = replace(SMALL, image_rows=0.3, short_clip_length=3)
    segments, images = draw_segments(config, 4000, T, g)
    assert segments.shape == (4000, T) and images.shape == (4000, 1)
    whole, short = (segments == 0).all(1), (segments == torch.arange(T) // 3).all(1)
    assert (segments[images[:, 0]] == torch.arange(T)).all()
    assert torch.equal(whole | short, ~images[:, 0])
    for share, wanted in ((images, 0.3), (whole, 0.35), (short, 0.35)):
        assert abs(share.float().mean().item() - wanted) < 0.03
    assert draw_segments(SMALL, 4, T, g) == (None, None)


def record_calls(model):
    "Rows, indices, hidden actions and whether a gradient is tracked, of every forward."
    calls = []

    def hook(module, args, output):
        z, i, j, actions, known = args[:5]
        calls.append({"rows": len(z), "pairs": set(zip(i.flatten().tolist(), j.flatten().tolist())), "known": known, "graph": output[0].requires_grad})

    model.register_forward_hook(hook)
    return calls


def test_the_teacher_gives_no_gradient():
    model = make_model(bootstrap_share=0.5)
    calls = record_calls(model)
    losses, metrics = dynamics_loss({"dynamics": model}, make_batch(SMALL), torch.Generator().manual_seed(0))
    assert [call["rows"] for call in calls] == [4, 4, 8]        # two half steps on the bootstrap rows, then the student
    assert [call["graph"] for call in calls] == [False, False, True]
    assert 0.2 < metrics["bootstrap_share"] < 0.5 and losses["dynamics"].requires_grad    # half of the rows, less their frames at d_min


def test_the_loss_is_one_mean_over_all_frames():
    model = make_model(bootstrap_share=0.25)
    losses, metrics = dynamics_loss({"dynamics": model}, make_batch(SMALL), torch.Generator().manual_seed(0))
    only_data, _ = dynamics_loss({"dynamics": make_model(bootstrap_share=0.0)}, make_batch(SMALL), torch.Generator().manual_seed(0))
    assert losses.keys() == {"dynamics"} and 0.1 < metrics["bootstrap_share"] <= 0.25
    assert 0 < losses["dynamics"] < only_data["dynamics"]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_every_index_that_is_used_was_trained(steps):
    schedule = Schedule(k_max=8, steps=steps, tau_ctx=0.9)
    model = make_model(schedule=schedule)
    calls = record_calls(model)
    g = torch.Generator().manual_seed(0)
    for _ in range(12):
        losses, _ = dynamics_loss({"dynamics": model}, make_batch(SMALL, b=16), g)
        losses["dynamics"].backward()
    trained = set().union(*(call["pairs"] for call in calls if call["graph"]))
    assert set(schedule.used_indices()) <= trained
    reached = model.embed_d.weight.grad.abs().amax(1) > 0        # one row a step size, d = 1 among them
    assert reached.all() and len(reached) == int(math.log2(8)) + 1
    assert (model.embed_tau.weight.grad.abs().amax(1) > 0).all()


def test_unlabelled_video_and_single_images_train_no_action_embedding():
    batch = make_batch(SMALL)
    batch.action_known[:] = False
    for config, rows in ((SMALL, batch), (replace(SMALL, image_rows=1.0), make_batch(SMALL))):
        model = make_model(image_rows=config.image_rows)
        dynamics_loss({"dynamics": model}, rows, torch.Generator().manual_seed(0))[0]["dynamics"].backward()
        assert model.embed_action.weight.grad.abs().max() == 0 and model.tokens.grad[-1].abs().max() > 0


def test_normalise_and_back():
    model = make_model()
    latents = make_batch(SMALL).latents
    set_latent_statistics(model, latents.mean((0, 1)), latents.std((0, 1)))
    z = model.normalize(latents)
    assert z.shape == (8, T, 2, 12) and z.mean().abs() < 1e-5 and abs(z.std().item() - 1) < 0.01
    torch.testing.assert_close(model.denormalize(z), latents)
    resting = torch.ones(4, 6)
    resting[0, 0] = 0
    set_latent_statistics(model, torch.zeros(4, 6), resting)
    assert model.latent_std.min() > 0.05                        # a channel at rest is not blown up


def test_wrong_input_is_named(tmp_path):
    model = make_model(n_agent=1)
    inputs = make_inputs(model)
    for name, wrong in (("z", inputs["z"][..., :5]), ("actions", inputs["actions"][:, :3]), ("agent", None), ("action_known", inputs["action_known"][:1])):
        with pytest.raises(UserError, match=name):
            model(**inputs | {name: wrong})
    with pytest.raises(UserError, match="divisor"):
        DynamicsConfig(n_latents=4, pack=3)
    with pytest.raises(UserError, match="no checkpoint"):
        load_dynamics(tmp_path / "none.safetensors")
    save_checkpoint(tmp_path / "other.safetensors", {}, {"tokenizer": {}})
    with pytest.raises(UserError, match="no dynamics"):
        load_dynamics(tmp_path / "other.safetensors")
    state = {f"dynamics.{k}": v for k, v in make_model().state_dict().items()}
    save_checkpoint(tmp_path / "narrow.safetensors", state, {"dynamics": to_dict(replace(SMALL, n_registers=5))})
    with pytest.raises(UserError, match="another config"):
        load_dynamics(tmp_path / "narrow.safetensors")


def committed_inputs(model):
    "Noised frames and the same frames as committed context."
    inputs = make_inputs(model)
    clean = torch.randn(inputs["z"].shape, generator=torch.Generator().manual_seed(3))
    return inputs | {"context": noise_context(clean, model.config.schedule, torch.Generator().manual_seed(4))}


def test_training_on_committed_context_is_what_the_stream_meets():
    "Each frame tried against the cache and then committed gives the x_hat and h of one pass; also when the window of 5 rolls."
    model = make_model(n_agent=1)
    inputs = committed_inputs(model)
    with torch.no_grad():
        x_hat, h = model(**inputs)
        cache, schedule = empty_cache(model.transformer, B), model.config.schedule
        for t in range(T):
            now = {k: v if k == "agent" else v[:, t:t + 1] for k, v in inputs.items() if k != "context"}
            torch.testing.assert_close(model(**now, cache=cache, commit=False)[0], x_hat[:, t:t + 1], atol=1e-5, rtol=1e-5)
            now |= {"z": inputs["context"][:, t:t + 1], "i": torch.full((B, 1), schedule.ctx_index), "j": torch.full((B, 1), schedule.ctx_j)}
            torch.testing.assert_close(model(**now, cache=cache)[1], h[:, t:t + 1], atol=1e-5, rtol=1e-5)


def test_a_noised_frame_does_not_see_its_own_committed_copy_nor_other_noised_frames():
    model = make_model(n_agent=1)
    inputs = committed_inputs(model)
    for name in ("z", "context"):
        inputs[name].requires_grad_()
    x_hat, h = model(**inputs)
    reach = lambda output, name: gradient(output[:, 4], inputs[name]).flatten(2).abs().amax((0, 2)) > 0
    assert reach(x_hat, "context").tolist() == [True] * 4 + [False] * 3
    assert reach(x_hat, "z").tolist() == [False] * 4 + [True] + [False] * 2
    assert reach(h, "context").tolist() == [True] * 5 + [False] * 2 and not reach(h, "z").any()


def test_the_video_loss_of_committed_rows_also_gives_h():
    model = make_model(n_agent=1, train_on_context=True)
    batch, agent = make_batch(SMALL), torch.randn(8, 1, 32, generator=torch.Generator().manual_seed(1))
    loss, metrics, h = video_loss(model, batch, torch.Generator().manual_seed(0), agent)
    assert loss.isfinite() and h.shape == (8, T, 1, 32)
    assert video_loss(make_model(n_agent=1), batch, torch.Generator().manual_seed(0), agent)[2] is None
    schedule, z = model.config.schedule, model.normalize(batch.latents)
    context = noise_context(z, schedule, torch.Generator().manual_seed(0))       # the first draw of the pass
    level = torch.full((8, T), schedule.ctx_index), torch.full((8, T), schedule.ctx_j)
    torch.testing.assert_close(model(context, *level, batch.actions, batch.action_known, agent)[1], h, atol=1e-5, rtol=1e-5)
