"""A ladder of demonstrations: what phase 3 adds to cloning. Trains, plays, and writes nbs/results/ladder_demonstrations.json.

    python tests/studies/demonstrations.py runs/ladder --seeds 0 1 2 3 4
    python tests/studies/demonstrations.py runs/ladder --rungs 50 --labels executed --seeds 10 11 12 13 14    # confirms a rung

Agents of 25 to 400 demonstrations, cloned from executed or from intended actions, in the world that ships. The measure was fixed
before the first run: catches within 125 decisions on 100 seeds, PMPO minus cloning, the training run as the unit, for the policy
that samples; its mean is played beside it. Rows that the results hold are not made again; two processes may share the seeds.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from dreamer4_nb.core import JsonDict
from dreamer4_nb.evaluation.statistics import compare
from dreamer4_nb.runs.chain import Run, by_task
from dreamer4_nb.runs.judge import closed_loop
from dreamer4_nb.runs.presets import LONG, TINY, Preset
from dreamer4_nb.runs.study import dreamed_return, seeded
from rows import RESULTS, Table, copy_shipped

TABLE = Table(RESULTS / "ladder_demonstrations.json")
RUNGS = (25, 50, 100, 200, 400)     # demonstrations; a tenth of them is held out
LABELS = ("executed", "intended")
JUDGE = {"episodes": 100, "decisions": 125, "readouts": ("sample", "mean"), "demonstrator": 0, "videos": 0}


def preset_of(rung: int, labels: str, seed: int) -> Preset:
    "The world that ships, and an agent as in `make demo` with a training seed of its own."
    preset = replace(LONG, episodes=rung, threads=1, workers=1, agent=replace(TINY.agent, labels=labels),
                     evaluation=replace(TINY.evaluation, **JUDGE))
    return seeded(preset, agent=seed, imagination=seed)


def trained(folder: Path, preset: Preset) -> Run:
    "The agent of a preset, before and after phase 3."
    copy_shipped(folder, "tokenizer", "dynamics")
    run = Run(folder, preset)
    run.train("imagination")
    return run


def gained(run: Run) -> JsonDict:
    """Success, held and return of both policies by each read-out, how far phase 3 moved, what both dream to get, and the minutes.

    "gains" are the paired differences, PMPO minus cloning."""
    (view,) = by_task(run)
    policies = {}
    played = {records.policy: records for records in closed_loop(view, ("cloning", "PMPO"))}
    gains = [compare(played[f"PMPO, {readout}"], played[f"cloning, {readout}"], measure)
             for readout in run.preset.evaluation.readouts for measure in ("success", "final_success", "returns")]
    for records in played.values():
        summary = records.summary()
        policies[records.policy] = {name: summary[name] for name in ("success", "final_success", "return")}
        policies[records.policy]["kl"] = records.info.get("kl")
    dreamed = {"cloning": dreamed_return(view, run.agent[1]), "PMPO": dreamed_return(view, run.imagination)}
    minutes = {name: note["seconds"] / 60 for name, note in run.phases.items()}
    return {"policies": policies, "gains": gains, "dreamed": dreamed, "minutes": minutes}


def study(folder: Path, rungs: list[int], labels: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        for rung in rungs:
            for kind in labels:
                if TABLE.has(rung=rung, labels=kind, seed=seed):
                    continue
                own = trained(folder / f"{kind}{rung}-seed{seed}", preset_of(rung, kind, seed))
                row = {"rung": rung, "labels": kind, "seed": seed} | gained(own)
                TABLE.add({"judge": JUDGE, "command": "python tests/studies/demonstrations.py runs/ladder"}, rows=[row])
                print(f"{rung} demonstrations, {kind}, seed {seed}: {row['policies']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--rungs", type=int, nargs="+", default=list(RUNGS))
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    given = parser.parse_args()
    study(given.folder, given.rungs, given.labels, given.seeds)


if __name__ == "__main__":
    main()
