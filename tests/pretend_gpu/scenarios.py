"""What a GPU is asked to do, on the pretend one: `python -m pretend_gpu.scenarios`.

It works in the folder in which it is started, and writes a line of outcomes.jsonl there for each scenario."""
import contextlib
import copy
import json
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from pretend_gpu.load import load
from helpers.toy_presets import thin_preset

from dreamer4_nb.runs import chain, folder, judge, study
from dreamer4_nb.method.agent import AgentHeads, Policy, agent_loss
from dreamer4_nb.runs.chain import Run, by_task
from dreamer4_nb.core import cache_dir, pick_device
from dreamer4_nb.data.windows import Windows
from dreamer4_nb.method.dynamics import dynamics_loss
from dreamer4_nb.method.forcing import Schedule, sample_sequence
from dreamer4_nb.evaluation.closed_loop import evaluate_policy
from dreamer4_nb.evaluation.dream_env import DreamEnv
from dreamer4_nb.evaluation.metrics import rollout_report, tokenizer_report
from dreamer4_nb.evaluation.report import beside_dream, dreams, reconstructions
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.imagination import imagination_loss
from dreamer4_nb.runs.presets import MICRO, PRESETS, Preset, phase_shapes
from dreamer4_nb.runs.bench import bench
from dreamer4_nb.training.loop import fit

DEVICE = "fakegpu"
MICRO_HERE = thin_preset(MICRO, device=DEVICE)
SWITCHES = {
    "image rows": ("dynamics.model.image_rows", 0.3),
    "short clips": ("dynamics.model.short_clip_length", 4),
    "committed context": ("dynamics.model.train_on_context", True),
    "context levels": ("dynamics.model.p_context", 0.2),
    "gaussian policy": ("agent.model.policy", "gaussian"),
}
OF_PRESETS = ("tiny", "small", "base", "paper")
TASKS = ("ball_in_cup-catch", "cartpole-swingup")       # two and one action dimensions


def micro_of(name: str) -> Preset:
    "A preset's switches in sizes, data and number of tasks of micro."
    preset = thin_preset(PRESETS[name], device=DEVICE, compile=False)
    return replace(preset, tasks=MICRO.tasks, data=MICRO.data, episodes=MICRO.episodes)


@cache
def plain() -> Run:
    "The run that most scenarios look at; its phases are made where they are first asked for."
    run = Run(Path("plain"), MICRO_HERE)
    run.train("imagination")
    return run


def train(preset: Preset, name: str) -> None:
    Run(Path(name), preset).train("imagination")


def train_with(setting: str, value) -> None:
    "All phases from the one that a setting belongs to; what comes before is the plain run's."
    phase = setting.partition(".")[0]
    before = folder.ORDER[folder.ORDER.index(phase) - 1]
    preset = study.with_setting(MICRO_HERE, setting, value)
    act(study.branch(plain(), Path(setting, str(value)), before, preset))


def act(run: Run) -> None:
    "A few actions of the policy after phase 3, on frames of a held-out episode."
    run.train("imagination")
    frames = run.split[1].episode(0).frames
    policy = Policy(run.world, run.imagination)
    policy.reset(2)
    for t in range(3):
        assert np.isfinite(policy.act(np.stack([frames[t], frames[t]]))).all()


def keys() -> None:
    "Phases 2 and 3 with a policy of keys, which are down or up: the demonstrations' actions by their sign."
    run = plain()
    batch = Windows(run.latents[0], 12, 4)(0)
    batch = replace(batch, intended=(batch.intended > 0).float(), relevant=torch.arange(4) < 2)
    heads = AgentHeads(replace(run.agent[1].config, policy="bernoulli"))
    dynamics = copy.deepcopy(run.agent[0])
    world = WorldModel(run.tokenizer, dynamics)
    modules = {"dynamics": dynamics, "heads": heads}
    fit("agent", modules, agent_loss, lambda step: batch, run.preset.agent.train)
    modules = {"policy": heads.policy, "value": heads.value}
    loss = imagination_loss(world, heads, run.preset.imagination.model)
    fit("imagination", modules, loss, lambda step: batch, run.preset.imagination.train)


def of_phase_1() -> WorldModel:
    return WorldModel(plain().tokenizer, plain().dynamics)


def rollouts(world: WorldModel) -> None:
    rollout_report(world, plain().split[1], plain().latents[1], prefix=4, length=10, windows=4)


def closed_loop(readout: str) -> None:
    run = plain()
    policy = Policy(run.world, run.imagination, readout)
    records = evaluate_policy(policy, run.preset.tasks[0], [1, 2], decisions=4, workers=1, keep=1)
    assert np.isfinite(records.actions).all()


def real_and_dreamed() -> None:
    run = plain()
    episode = run.split[1].episode(0)
    policy = Policy(run.world, run.imagination)
    policy.reset(1)
    beside_dream(policy, episode.frames[:6], episode.actions[1:6], prefix=3)


def dream_env(world: WorldModel, with_reward: bool = False) -> None:
    heads, given = plain().agent[1], {}
    if with_reward:
        tokens = heads.tokens(torch.zeros(1, dtype=torch.long, device=DEVICE))
        given = {"reward": heads.reward, "agent": tokens.detach()}
    env = DreamEnv(world, plain().latents[1], prefix=4, length=5, **given)
    env.reset(seed=0)
    for _ in range(3):
        env.step(np.zeros(2, np.float32))


def fork() -> None:
    dream = plain().world.start(2, torch.Generator(), torch.zeros(2, 1, 32, device=DEVICE))
    dream.fork(torch.tensor([0, 0, 1]))
    dream.fork(torch.tensor([0, 0, 1], device=DEVICE))


def continue_sequence(generator: torch.Generator) -> None:
    sample_sequence(lambda z, i, j: z, torch.randn(2, 3, 4, device=DEVICE), 2, Schedule(), generator)


def resumed() -> None:
    "Training that broke off after a save goes on, with weights, moments and averages put back on the device."
    windows = Windows(plain().latents[0], 12, 4)
    config = replace(MICRO_HERE.dynamics.train, steps=4, save_every=2, muon=20.0, ema=0.9)

    def broken(step: int):
        if step == 3:
            raise EOFError
        return windows(step)

    for batches in (broken, windows):
        with contextlib.suppress(EOFError):
            modules = {"dynamics": copy.deepcopy(plain().dynamics)}
            history = fit("dynamics", modules, dynamics_loss, batches, config, Path("resumed"))
    assert [row["step"] for row in history] == [1, 2, 3, 4]


def two_tasks() -> None:
    "All phases, and for each task its policy and the reports."
    run = Run(Path("two tasks"), replace(MICRO_HERE, tasks=TASKS))
    run.train("imagination")
    for number, view in enumerate(chain.by_task(run)):
        train, held = view.split
        tokenizer_report(run.tokenizer, held, train, frames=60)
        rollout_report(run.world, held, view.latents[1], prefix=4, length=10, windows=4)
        policy = Policy(run.world, run.imagination, task=number)
        evaluate_policy(policy, view.task, [1, 2], decisions=4, workers=1)
        study.dreamed_return(view, run.imagination, 4, 3)


def time_it(preset: Preset, **options) -> None:
    shape = phase_shapes(preset)["dynamics"]
    assert bench(shape, seconds=0.0, device=DEVICE, **options)["frame_decoded_ms"] > 0


def refuses(call: Callable, *words: str) -> None:
    try:
        call()
    except RuntimeError as error:
        assert all(word in str(error) for word in words), error
    else:
        raise AssertionError("it was done")


def refusals() -> None:
    "The device refuses what CUDA refuses, and only that."
    here, there, x = torch.Generator(DEVICE), torch.Generator(), torch.rand(3, device=DEVICE)
    for name, sizes in {"rand": (3,), "randn": (3,), "randint": (4, (3,)), "randperm": (4,)}.items():
        draw = partial(getattr(torch, name), *sizes)
        refuses(lambda: draw(generator=here), "Expected a 'cpu' device type for generator")
        refuses(lambda: draw(generator=there, device=DEVICE), "Expected a 'fakegpu' device type")
        assert draw(generator=here, device=DEVICE).device.type == DEVICE
    for draw in (torch.bernoulli, partial(torch.multinomial, num_samples=1)):
        refuses(lambda: draw(x.cpu(), generator=here), "generator")
        refuses(lambda: draw(x, generator=there), "generator")
        draw(x, generator=here)
    ones = torch.ones(3)
    for mix in (lambda: x + ones, lambda: torch.cat([x, ones]), lambda: torch.where(x > 0, x, ones)):
        refuses(mix, "two devices")
    refuses(lambda: torch.ones(3)[x.long()], "indices")
    assert (x[torch.tensor([0, 1])] + torch.tensor(1.0)).device.type == DEVICE == pick_device(DEVICE).type


SCENARIOS = {
    "what it refuses": refusals,
    "phases": lambda: plain().imagination,
    "tokenizer report": lambda: tokenizer_report(plain().tokenizer, *plain().split[::-1], frames=60),
    "rollout report, phase 1": lambda: rollouts(of_phase_1()),
    "rollout report, phase 2": lambda: rollouts(plain().world),
    "reconstructions": lambda: reconstructions(plain().tokenizer, plain().split[1], 2),
    "dreams, phase 1": lambda: dreams(of_phase_1(), plain().split[1], 4, 10, 2),
    "dreams, phase 2": lambda: dreams(plain().world, plain().split[1], 4, 10, 2),
    **{f"closed loop, {readout}": partial(closed_loop, readout) for readout in ("sample", "mean", "mode")},
    "beside dream": real_and_dreamed,
    "dreamed return": lambda: study.dreamed_return(by_task(plain())[0], plain().imagination, 4, 3),
    "DreamEnv, phase 1": lambda: dream_env(of_phase_1()),
    "DreamEnv, phase 2 without agent": lambda: dream_env(plain().world),
    "DreamEnv, phase 2 with reward": lambda: dream_env(plain().world, with_reward=True),
    "fork": fork,
    "sample sequence": lambda: continue_sequence(torch.Generator()),
    "sample sequence, its own generator": lambda: continue_sequence(torch.Generator(DEVICE)),
    "finish": lambda: judge.finish(plain()),
    **{name: partial(train_with, *setting) for name, setting in SWITCHES.items()},
    **{f"switches of {name}": partial(train, micro_of(name), name) for name in OF_PRESETS},
    "bernoulli policy": keys,
    "resumed training": resumed,
    "two tasks": two_tasks,
    "bench": lambda: time_it(MICRO_HERE),
    **{f"bench, {name}": partial(time_it, study.with_setting(MICRO_HERE, *setting))
       for name, setting in SWITCHES.items() if setting[0].startswith("dynamics")},
    **{f"bench, switches of {name}": partial(time_it, micro_of(name), recompute=name == "paper")
       for name in OF_PRESETS},
}


def outcome(scenario: Callable) -> str | None:
    "None, or what went wrong and where in the package."
    try:
        scenario()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "dreamer4_nb" in frame.filename]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in ours]
        return f"{type(error).__name__}: {error} (at {', '.join(places[-3:])})"
    return None


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    load(cache_dir() / "pretend_gpu")
    for name, scenario in SCENARIOS.items():
        began = time.perf_counter()
        line = {"name": name, "error": outcome(scenario), "seconds": round(time.perf_counter() - began, 1)}
        with open("outcomes.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
