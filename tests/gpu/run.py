"""What only a GPU can tell, in under ten minutes: `python tests/gpu/run.py` writes nbs/results/gpu.json.

It needs PyTorch and the wheels in requirements.txt beside it; nothing is drawn, simulated or downloaded. Everything
runs in a child process of its own with a time limit, and the file is written after each: an error, a kernel that
takes the device down, or a cut-off cost no more than what was running. `--device cpu --small` tries it without a GPU."""
import argparse
import contextlib
import gc
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "gpu"), str(TESTS), str(TESTS.parent)]

import stand_ins

stand_ins.install()

import numpy as np
import torch
from toy_presets import shape_of, thin_preset, thin_shape

from dreamer4_nb import costs, scaling
from dreamer4_nb.agent import AgentHeads, Policy, agent_loss
from dreamer4_nb.chain import ORDER, Run
from dreamer4_nb.core import UserError, cache_dir, pick_dtype, write_json
from dreamer4_nb.costs import SHAPES, Shape, predict, random_batches
from dreamer4_nb.dynamics import Dynamics, dynamics_loss
from dreamer4_nb.generation import WorldModel
from dreamer4_nb.imagination import imagination_loss
from dreamer4_nb.presets import MICRO, PRESETS, Preset, linked
from dreamer4_nb.stores import Episode, EpisodeStore
from dreamer4_nb.tokenizer import PerceptualLoss, Tokenizer, tokenizer_loss
from dreamer4_nb.training import TrainConfig, fit

SHARES = {"machine": 0.1, "tests": 0.2, "chain": 0.25, "steps": 0.4, "bench": 0.4}     # of the minutes, at most
PHASES = ("tokenizer", "settle", "dynamics", "agent", "imagination")
STEPS = ("small", "base", "paper")
# The compiled ones last: a frame of `small` is one program of five forwards, which takes a minute or more to compile.
# For the 28 and 36 layers of `base` and `paper` it would take longer than all the rest, for matrices that gain little.
BENCHES = (("peers", False), ("paper", False), ("base", False), ("small", False), ("peers", True), ("small", True))
Note = Callable[..., None]


def last_lines(error: BaseException) -> str:
    "The end of a traceback."
    return "".join(traceback.format_exception(error))[-1500:]


# 1. The machine

def machine(device: torch.device, note: Note) -> None:
    "What it is, and how fast it multiplies."
    note(**scaling.describe_machine(device), platform=platform.platform(), cuda=torch.version.cuda)
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        note(memory_gb=found.total_memory / 1e9, capability=f"{found.major}.{found.minor}")
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                               capture_output=True, text=True)
        note(driver=asked.stdout.strip())
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        note(**{f"peak_gflops_{name}": scaling.matmul_peak(dtype, device)})


# 2. The tests that need a GPU

class Noting:
    "A pytest plugin that notes the outcome of each test as it comes."

    def __init__(self, note: Note):
        self.note = note

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            self.note(**{report.nodeid.partition("::")[2]: report.longreprtext[-1500:] if report.failed else report.outcome})


def cuda_tests(note: Note) -> None:
    import pytest
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", str(TESTS / "gpu" / "test_cuda.py")]
    note(exit_code=int(pytest.main(options, plugins=[Noting(note)])))


# 3. The whole chain, small

def synthetic_store(path: Path, task: str, action_dim: int, episodes: int = 12, length: int = 40) -> None:
    "Episodes in which actions push a bright square about, and the right half of the picture brings a reward."
    rng, store = np.random.default_rng(0), EpisodeStore.create(path, task, action_dim, (64, 64, 3))
    for number in range(episodes):
        actions = rng.uniform(-1, 1, (length, action_dim)).astype(np.float32)
        actions[0] = 0
        places = (28 + 4 * actions[:, :1].cumsum(0) * [1, 0.5]).clip(0, 56).astype(int)
        frames = np.full((length, 64, 64, 3), 40, np.uint8)
        for frame, (x, y) in zip(frames, places):
            frame[y:y + 8, x:x + 8] = 220
        store.append(Episode(actions, rewards=2.0 * (places[:, 0] > 32), frames=frames, task=task,
                             quality="expert" if number % 2 else "random"))
    store.finish()


def chain_preset(folder: Path, device: torch.device, compile: bool) -> Preset:
    preset = thin_preset(MICRO, steps=4, device=device.type, compile=compile)
    return replace(preset, data=str(folder / "data.zarr"), episodes=None)


def chain_phase(name: str, folder: Path, device: torch.device, note: Note) -> None:
    "A phase of the chain, on what those before it left in the folder; on a GPU compiled, and eager where that fails."
    if name == "data":
        return synthetic_store(folder / "data.zarr", MICRO.tasks[0], 2)
    compile = device.type == "cuda"
    note(compiled=compile)
    try:
        getattr(Run(folder / "run", chain_preset(folder, device, compile)), name)
    except Exception as error:
        if not compile:
            raise
        note(compiled=last_lines(error))
        getattr(Run(folder / "run", chain_preset(folder, device, False)), name)


def chain_use(folder: Path, device: torch.device, note: Note) -> None:
    "The policy after phase 3 sees frames, and acts."
    run = Run(folder / "run", chain_preset(folder, device, False))
    policy, frames = Policy(run.world, run.imagination), run.split[1].episode(0).frames
    policy.reset(3)
    actions = [policy.act(np.stack([frame] * 3)) for frame in frames[:12]]
    note(finite=bool(np.isfinite(actions).all()))


# 4. Two training steps of every phase, in full width

def resized(shape: Shape, preset: Preset, phase: str, batch: int) -> Shape:
    "The shape of a phase's batch: `batch` clips, in the second part of the tokenizer's training long ones."
    if phase == "tokenizer":
        return replace(shape, clips=(batch, preset.tokenizer.length))
    if phase == "settle":
        return replace(shape, clips=(batch, preset.tokenizer.model.transformer.context + 1))
    length = preset.imagination.model.context if phase == "imagination" else getattr(preset, phase).length
    return replace(shape, batch=batch, length=length)


def whole_batch(preset: Preset, phase: str) -> int:
    if phase != "settle":
        return getattr(preset, phase).batch
    return max(1, preset.tokenizer.batch * preset.tokenizer.length // (preset.tokenizer.model.transformer.context + 1))


def training(preset: Preset, phase: str, shape: Shape, device: torch.device) -> tuple[dict, Callable, object]:
    "Modules with random weights, loss and a random batch of a phase."
    kind = "tokenizer" if phase in ("tokenizer", "settle") else "dynamics"
    batch, n_agent = random_batches(shape, device)[kind], preset.agent.model.n_agent
    with torch.device(device):
        if kind == "tokenizer":
            perceptual = PerceptualLoss("gradient") if preset.tokenizer.perceptual else None
            loss = partial(tokenizer_loss, perceptual=perceptual, part=int(phase == "settle"))
            return {"tokenizer": Tokenizer(shape.tokenizer)}, loss, batch
        if phase == "dynamics":
            return {"dynamics": Dynamics(shape.dynamics)}, dynamics_loss, batch
        dynamics, heads = Dynamics(replace(shape.dynamics, n_agent=n_agent)), AgentHeads(preset.agent.model)
        if phase == "agent":
            relevant = torch.arange(shape.batch) < shape.batch // 2
            return {"dynamics": dynamics, "heads": heads}, agent_loss, replace(batch, relevant=relevant)
        world = WorldModel(Tokenizer(shape.tokenizer), dynamics)
        loss = imagination_loss(world, heads, preset.imagination.model)
        return {"policy": heads.policy, "value": heads.value}, loss, batch


def predicted_gb(shape: Shape, device: torch.device, recompute: bool = False, ema: bool = False) -> dict[str, float]:
    "What `costs.predict` says of the memory of a training step of both models."
    name, dtype = "H100" if device.type == "cuda" else "2 CPU cores", str(pick_dtype(device)).removeprefix("torch.")
    return {key: row["memory"] for key, row in predict(shape, name, dtype=dtype, recompute=recompute, ema=ema).items()}


def two_steps(preset: Preset, phase: str, device: torch.device, note: Note) -> None:
    "With the preset's batch, or half of it, and so on, where that does not fit; seconds are the second step's."
    preset = linked(preset)
    setting = getattr(preset, "tokenizer" if phase == "settle" else phase).train
    config = replace(setting, steps=2, warmup=1, log_every=1, device=device.type, compile=False, shard=1,
                     normalise=setting.normalise and phase != "imagination")
    batch = whole_batch(preset, phase)
    note(asked=batch, recompute=config.recompute)
    while True:
        shape = resized(shape_of(preset), preset, phase, batch)
        try:
            return try_steps(preset, phase, shape, config, device, note)
        except torch.OutOfMemoryError:
            if batch <= (2 if phase == "agent" else 1):        # half of the agent's rows are cloned, half are not
                raise
        batch //= 2
        gc.collect()
        torch.cuda.empty_cache()


def try_steps(preset: Preset, phase: str, shape: Shape, config: TrainConfig, device: torch.device, note: Note) -> None:
    modules, loss, batch = training(preset, phase, shape, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history = fit(phase, modules, loss, lambda step: batch, config, progress=False)
    b, t = batch.actions.shape[:2]
    first, second = (b * t / row.pop("frames_per_s") for row in history)
    note(batch=b, length=t, seconds=second, first=first, memory_gb=scaling.peak_memory(device) / 1e3, last=history[-1])
    name = {"settle": "tokenizer"}.get(phase, phase)
    if name in costs.LOSSES:
        note(predicted_gb=predicted_gb(shape, device, config.recompute, config.ema > 0)[name])


# 5. Frames a second

def timed(name: str, compile: bool, small: bool, device: torch.device, note: Note) -> None:
    "`scaling.bench` of a shape, of `paper` with activation checkpointing; with half of the batch where it does not fit."
    shape, recompute = thin_shape(SHAPES[name]) if small else SHAPES[name], name == "paper"
    note(about="compiled" if compile else "eager")
    while True:
        clips = shape.tokenizer_clips
        note(batch=shape.batch, predicted_gb=predicted_gb(shape, device, recompute))
        try:
            found = scaling.bench(shape, 0.0 if small else 1.0, device.type, compile=compile, recompute=recompute)
            return note(**found | {"shape": name}, decoded_fps=1e3 / found["frame_decoded_ms"])
        except UserError as error:
            if "does not fit" not in str(error) or shape.batch == 1:
                raise
        shape = replace(shape, batch=shape.batch // 2, clips=(max(1, clips[0] // 2), clips[1]))
        gc.collect()
        torch.cuda.empty_cache()


# One after another, each in a child

def child(work: Callable[[Note], None], sender) -> None:
    os.setsid()         # so that its own children end with it
    try:
        work(lambda **values: sender.send(values))
    except BaseException as error:
        sender.send({"error": last_lines(error)})
    sender.send(None)


def noted(work: Callable[[Note], None], seconds: float) -> Iterator[dict]:
    "What `work(note)` notes, as it comes, in a child that is killed after so many seconds."
    fork = multiprocessing.get_context("fork")      # this process has all imports, and never touches the device
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(work, sender))
    process.start()
    sender.close()
    end = time.monotonic() + seconds
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            if (values := receiver.recv()) is None:
                return
            yield values
        yield {"error": f"stopped after {seconds:.0f} seconds"}
    except EOFError:
        process.join()
        yield {"error": f"the process died with exit code {process.exitcode}"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def plan(device: torch.device, small: bool, folder: Path) -> Iterator[tuple[str, Callable[[Note], None]]]:
    "Name and work of everything, in order; the name's first word is its part."
    yield "machine", partial(machine, device)
    yield "tests", cuda_tests
    for name in ORDER:
        yield f"chain {name}", partial(chain_phase, name, folder, device)
    yield "chain use", partial(chain_use, folder, device)
    for name in STEPS:
        preset = thin_preset(PRESETS[name]) if small else PRESETS[name]
        for phase in PHASES:
            yield f"steps {name} {phase}", partial(two_steps, preset, phase, device)
    for name, compile in BENCHES:
        if device.type == "cuda" or not compile:
            yield f"bench {name}{' compiled' * compile}", partial(timed, name, compile, small, device)


def run_all(entries: list[tuple[str, Callable]], minutes: float, out: Path, results: dict) -> None:
    "Runs the entries; each may take half of what is left of its part's time. The file is written whenever one has noted something."
    end, part_ends = time.monotonic() + 60 * minutes, {}
    for name, work in entries:
        part, began = name.partition(" ")[0], time.monotonic()
        part_end = min(end, part_ends.setdefault(part, began + 60 * minutes * SHARES[part]))
        record = results.setdefault(name, {})
        left = part_end - began if part in ("machine", "tests") else (part_end - began) / 2
        for values in noted(work, left) if left > 2 else [{"error": "not begun: no time was left"}]:
            record.update(values)
            write_json(out, results)
        record["took"] = time.monotonic() - began
        write_json(out, results)
        print(f"{name}: {record.get('error', 'done').strip().splitlines()[-1]} in {record['took']:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "fakegpu"))
    parser.add_argument("--small", action="store_true", help="shrunken sizes, for a trial")
    parser.add_argument("--minutes", type=float, default=9.0, help="what has not begun by then is left out")
    parser.add_argument("--out", type=Path, help="default: nbs/results/gpu.json, of a trial gpu.json in a temporary folder")
    parser.add_argument("--parts", nargs="+", default=list(SHARES), choices=list(SHARES))
    asked = parser.parse_args()
    if asked.device == "cuda" and not next(noted(lambda note: note(there=torch.cuda.is_available()), 60)).get("there"):
        print("gpu: PyTorch finds no CUDA device; this needs an NVIDIA GPU (80 GB for all of it), or, for a trial, "
              "--device cpu --small", file=sys.stderr)
        return 2
    if asked.device == "fakegpu":
        from pretend_gpu.load import load
        load(cache_dir() / "pretend_gpu")
    with tempfile.TemporaryDirectory() as folder:
        trial = asked.small or asked.device != "cuda"
        out = asked.out or (Path(tempfile.gettempdir()) if trial else TESTS.parent / "nbs" / "results") / "gpu.json"
        entries = [entry for entry in plan(torch.device(asked.device), asked.small, Path(folder))
                   if entry[0].partition(" ")[0] in asked.parts]
        run_all(entries, asked.minutes, out, {"asked": {"device": asked.device, "small": asked.small}})
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
