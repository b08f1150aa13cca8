"""What only a GPU can tell, in under ten minutes: `python tests/gpu/run.py` writes nbs/results/gpu.json.

It needs PyTorch and the wheels in requirements.txt; nothing is drawn, simulated or downloaded. Each entry
runs in a child process with a time limit, and the file is written after each: an error, a kernel that takes
the device down, or a cut-off costs no more than what was running. This process itself touches no device.
A trial without a GPU: python tests/gpu/run.py --device cpu --small"""
import argparse
import gc
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
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
from apart import Note, Work, last_lines, noted
from helpers.toy_presets import thin_preset, thin_shape
from helpers.toy_stores import make_moving

from dreamer4_nb.runs import bench as scaling
from dreamer4_nb.method.agent import AgentHeads, Policy, agent_loss
from dreamer4_nb.runs.chain import Run
from dreamer4_nb.runs.folder import ORDER
from dreamer4_nb.core import UserError, cache_dir, pick_dtype, write_json
from dreamer4_nb.runs.costs import SHAPES, Shape, random_batches
from dreamer4_nb.runs.memory import predict
from dreamer4_nb.core import Batch
from dreamer4_nb.method.dynamics import Dynamics, dynamics_loss
from dreamer4_nb.method.generation import WorldModel
from dreamer4_nb.method.imagination import imagination_loss
from dreamer4_nb.runs.presets import MICRO, PRESETS, Preset, predict_phases, phase_shapes
from dreamer4_nb.method.tokenizer import PerceptualLoss, Tokenizer, tokenizer_loss
from dreamer4_nb.training.loop import fit
from dreamer4_nb.training.optimizers import TrainConfig

SHARES = {"machine": 0.05, "tests": 0.16, "chain": 0.2, "steps": 0.32, "bench": 0.5}     # of the time
OF_TOKENIZER = ("tokenizer", "slow")
PHASES = (*OF_TOKENIZER, "dynamics", "agent", "imagination")
STEPS = ("small", "base", "paper")
EAGER = ("peers", "paper", "base", "small")
# Last: a frame of `small` is one program of five forwards, which takes a minute to compile. The 28 and 36
# layers of `base` and `paper` would take longer than all the rest, and large matrices gain least.
COMPILED = ("peers", "small")


def kind_of(device: torch.device) -> str:
    "The machine in `memory.MACHINES` with which predictions are made."
    return "H100" if device.type == "cuda" else "2 CPU cores"


def dtype_of(device: torch.device) -> str:
    return str(pick_dtype(device)).removeprefix("torch.")


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
            outcome = report.longreprtext[-1500:] if report.failed else report.outcome
            self.note(**{report.nodeid.partition("::")[2]: outcome})


def cuda_tests(note: Note) -> None:
    import pytest
    options = ["-q", "-m", "cuda", "-p", "no:cacheprovider", str(TESTS / "gpu" / "test_cuda.py")]
    note(exit_code=int(pytest.main(options, plugins=[Noting(note)])))


# 3. The whole chain, small

def chain_preset(folder: Path, device: torch.device, compile: bool) -> Preset:
    preset = thin_preset(MICRO, steps=4, device=device.type, compile=compile)
    tokenizer = replace(preset.tokenizer, perceptual=0.0)       # LPIPS is not here
    return replace(preset, data=str(folder / "data.zarr"), episodes=None, tokenizer=tokenizer)


def chain_phase(name: str, folder: Path, device: torch.device, note: Note) -> None:
    "A phase of the chain, on what those before it left; on a GPU compiled, and eager where that fails."
    if name == "data":
        make_moving(folder / "data.zarr", MICRO.tasks[0], 2)
        return
    compile = device.type == "cuda"
    note(compiled=compile)
    try:
        Run(folder / "run", chain_preset(folder, device, compile)).train(name)
    except Exception as error:
        if not compile:
            raise
        note(compiled=last_lines(error))
        Run(folder / "run", chain_preset(folder, device, False)).train(name)


def chain_use(folder: Path, device: torch.device, note: Note) -> None:
    "The policy after phase 3 sees frames, and acts."
    run = Run(folder / "run", chain_preset(folder, device, False))
    policy, frames = Policy(run.world, run.imagination), run.split[1].episode(0).frames
    policy.reset(3)
    actions = [policy.act(np.stack([frame] * 3)) for frame in frames[:12]]
    note(finite=bool(np.isfinite(actions).all()))


# 4. Two training steps of every phase, in full width

def halved(shape: Shape, phase: str) -> Shape:
    "Half of a phase's batch. `UserError` where it cannot be halved."
    if phase in OF_TOKENIZER:
        clips, length = shape.tokenizer_clips
        return replace(shape, clips=(clips // 2, length))
    return replace(shape, batch=shape.batch // 2)


def training(preset: Preset, phase: str, shape: Shape, device: torch.device) -> tuple[dict, Callable, Batch]:
    "Modules with random weights, loss and a random batch of a phase."
    kind = "tokenizer" if phase in OF_TOKENIZER else "agent" if shape.agent else "dynamics"
    batch = random_batches(shape, device)[kind]
    with torch.device(device):
        if phase in OF_TOKENIZER:
            perceptual = PerceptualLoss("gradient") if preset.tokenizer.perceptual else None
            loss = partial(tokenizer_loss, perceptual=perceptual, part=int(phase == "slow"))
            return {"tokenizer": Tokenizer(shape.tokenizer)}, loss, batch
        dynamics = Dynamics(shape.dynamics)
        if phase == "dynamics":
            return {"dynamics": dynamics}, dynamics_loss, batch
        heads = AgentHeads(shape.agent)
        if phase == "agent":
            return {"dynamics": dynamics, "heads": heads}, agent_loss, batch
        world = WorldModel(Tokenizer(shape.tokenizer), dynamics)
        loss = imagination_loss(world, heads, preset.imagination.model)
        return {"policy": heads.policy, "value": heads.value}, loss, batch


def predicted(preset: Preset, device: torch.device, note: Note) -> None:
    "What `presets.predict_phases` says of every phase, for a step and for its memory."
    for phase, row in predict_phases(preset, kind_of(device), dtype=dtype_of(device)).items():
        note(**{phase: {"memory_gb": row["memory"]} | ({"seconds": row["step"]} if "step" in row else {})})


def two_steps(preset: Preset, phase: str, shape: Shape, device: torch.device, note: Note) -> None:
    "With the preset's batch, or half of it, and so on, where that does not fit."
    setting = getattr(preset, "tokenizer" if phase == "slow" else phase).train
    config = replace(setting, steps=2, warmup=1, log_every=1, device=device.type, compile=False, shard=1,
                     normalize=setting.normalize and phase != "imagination")
    asked = shape.tokenizer_clips if phase in OF_TOKENIZER else (shape.batch, shape.length)
    note(asked=list(asked), recompute=config.recompute)
    while True:
        try:
            return note(**try_steps(preset, phase, shape, config, device))
        except torch.OutOfMemoryError as error:
            note(did_not_fit=str(error)[:200])
        shape = halved(shape, phase)
        gc.collect()
        torch.cuda.empty_cache()


def try_steps(preset: Preset, phase: str, shape: Shape, config: TrainConfig, device: torch.device) -> dict:
    "Batch, seconds of the second step and of the first, gigabytes at most, and what the second step logged."
    modules, loss, batch = training(preset, phase, shape, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    history = fit(phase, modules, loss, lambda step: batch, config, progress=False)
    frames = batch.rewards.numel() * config.accumulate
    first, second = (frames / row.pop("frames_per_s") for row in history)
    return {"batch": list(batch.rewards.shape), "accumulate": config.accumulate, "seconds": second,
            "first": first, "memory_gb": scaling.peak_memory(device) / 1e3, "last": history[-1]}


# 5. Frames a second

def timed(name: str, compile: bool, small: bool, device: torch.device, note: Note) -> None:
    "`scaling.bench` of a shape, `paper` with `recompute`; with half of the batch where it does not fit."
    shape, seconds = SHAPES[name], 1.0
    if small:
        shape, seconds = thin_shape(shape), 0.0
    recompute = name == "paper"
    while True:
        rows = predict(shape, kind_of(device), dtype=dtype_of(device), recompute=recompute)
        note(batch=shape.batch, clips=list(shape.tokenizer_clips),
             predicted={key: {"memory_gb": row["memory"], "fps": row["fps"]} for key, row in rows.items()})
        try:
            found = scaling.bench(shape, seconds, device.type, compile=compile, recompute=recompute)
            return note(**found | {"shape": name}, decoded_fps=1e3 / found["frame_decoded_ms"])
        except UserError as error:
            if "does not fit" not in str(error) or shape.batch == 1:
                raise
            note(did_not_fit=str(error))
        clips, length = shape.tokenizer_clips
        shape = replace(shape, batch=shape.batch // 2, clips=(max(1, clips // 2), length))
        gc.collect()
        torch.cuda.empty_cache()


# All of it, in order

def plan(device: torch.device, small: bool, folder: Path) -> Iterator[tuple[str, Work]]:
    "Name and work of everything, in order; the name's first word is its part."
    yield "machine", partial(machine, device)
    yield "tests", cuda_tests
    for name in ORDER:
        yield f"chain {name}", partial(chain_phase, name, folder, device)
    yield "chain use", partial(chain_use, folder, device)
    for name in STEPS:
        preset = thin_preset(PRESETS[name]) if small else PRESETS[name]
        yield f"steps {name} predicted", partial(predicted, preset, device)
        shapes = phase_shapes(preset)
        for phase in (phase for phase in PHASES if phase in shapes):
            yield f"steps {name} {phase}", partial(two_steps, preset, phase, shapes[phase], device)
    for name in EAGER:
        yield f"bench {name}", partial(timed, name, False, small, device)
    for name in COMPILED if device.type == "cuda" else ():
        yield f"bench {name} compiled", partial(timed, name, True, small, device)


def run_all(entries: list[tuple[str, Work]], minutes: float, out: Path, results: dict) -> None:
    "Runs the entries and writes the file whenever one has noted something."
    end, part_ends = time.monotonic() + 60 * minutes, {}
    asked_for = sum(SHARES[part] for part in {name.partition(" ")[0] for name, _ in entries})
    for name, work in entries:
        part, began, record = name.partition(" ")[0], time.monotonic(), results[name]
        part_end = part_ends.setdefault(part, began + 60 * minutes * SHARES[part] / min(1.0, asked_for))
        left = min(end, part_end) - began
        if name != part:
            left /= 2       # of several entries each may take half of what is left of their part
        for values in noted(work, left) if left > 2 else [{"error": "not begun: no time was left"}]:
            record.update(values)
            write_json(out, results)
        record["took"] = time.monotonic() - began
        write_json(out, results)
        said = record.get("error", "done").strip().splitlines()[-1]
        print(f"{name}: {said} in {record['took']:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu", "fakegpu"))
    parser.add_argument("--small", action="store_true", help="shrunken sizes, for a trial")
    parser.add_argument("--minutes", type=float, default=9.0, help="what has not begun by then is left out")
    parser.add_argument("--out", type=Path, help="default: nbs/results/gpu.json; of a trial a temporary file")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME",
                        help=f"parts ({', '.join(SHARES)}) or entries that begin so, as in 'steps paper'; "
                             "what else the file holds stays")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # an exception: the child is ended too
    found = next(noted(lambda note: note(there=torch.cuda.is_available()), 60))
    if asked.device == "cuda" and not found.get("there"):
        print("gpu: PyTorch finds no CUDA device; this needs an NVIDIA GPU (80 GB for all of it), or, for a "
              "trial, --device cpu --small", file=sys.stderr)
        return 2
    if asked.device == "fakegpu":
        from pretend_gpu.load import load
        load(cache_dir() / "pretend_gpu")
    with tempfile.TemporaryDirectory() as folder:
        trial = asked.small or asked.device != "cuda"
        place = Path(tempfile.gettempdir()) if trial else TESTS.parent / "nbs" / "results"
        out = asked.out or place / "gpu.json"
        entries = [entry for entry in plan(torch.device(asked.device), asked.small, Path(folder))
                   if entry[0].startswith(tuple(asked.only))]
        kept = json.loads(out.read_text(encoding="utf-8")) if asked.only != [""] and out.exists() else {}
        results = kept | {"asked": {"device": asked.device, "small": asked.small}}
        run_all(entries, asked.minutes, out, results | {name: {} for name, _ in entries})
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
