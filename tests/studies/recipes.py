"""What phase 3 adds in `make demo`, by recipe and seed. Trains, plays, and writes nbs/results/ladder_demonstrations.json, "recipes".

    python tests/studies/recipes.py runs/recipes --seeds 0 1 2

A seed has a tokenizer of its own. The recipes share what they do not change. All policies play the same 100 seeds, which are not
those of `make demo`. Rows that the results hold are not made again; two processes may share the seeds.
"""
import argparse
from dataclasses import replace
from pathlib import Path

from demonstrations import gained
from dreamer4_nb.runs.chain import Run, by_task
from dreamer4_nb.runs.judge import measured
from dreamer4_nb.runs.presets import TINY, Preset
from dreamer4_nb.runs.study import branch, with_setting
from rows import RESULTS, Table

TABLE = Table(RESULTS / "ladder_demonstrations.json", "recipes")
DEMO = "make demo"
# By name: the last part that is that of `make demo`, and the settings that differ from there on.
RECIPES: dict[str, tuple[str, dict]] = {
    DEMO: ("imagination", {}),
    "beta 1": ("agent", {"imagination.model.beta": 1.0}),
    "executed labels": ("dynamics", {"agent.labels": "executed"}),
    "dynamics of 5000 steps": ("latents", {"dynamics.train.steps": 5000}),
}


def preset_of(recipe: str, seed: int) -> Preset:
    "That of `make demo` with a recipe's settings, one thread, and other seeds to judge on."
    evaluation = replace(TINY.evaluation, first_seed=30_000, demonstrator=0, videos=0)
    preset = replace(TINY, seed=seed, threads=1, workers=1, evaluation=evaluation)
    for name, value in RECIPES[recipe][1].items():
        preset = with_setting(preset, name, value)
    return preset


def trained(folder: Path, recipe: str, seed: int) -> Run:
    "The run of a recipe, in a folder of its own, after phase 3."
    demo = Run(folder / f"{DEMO.replace(' ', '-')}-{seed}", preset_of(DEMO, seed))
    run = demo
    if recipe != DEMO:
        run = branch(demo, folder / f"{recipe.replace(' ', '-')}-{seed}", RECIPES[recipe][0], preset_of(recipe, seed))
    run.train("imagination")
    return run


def study(folder: Path, recipes: list[str], seeds: list[int]) -> None:
    for seed in seeds:
        for recipe in recipes:
            if TABLE.has(recipe=recipe, seed=seed):
                continue
            run = trained(folder, recipe, seed)
            dream = measured(by_task(run)[0], in_use=True)["dream_in_use"]["mean"]["dream"]
            row = {"recipe": recipe, "seed": seed, "dream": dream} | gained(run)
            TABLE.add({"command": "python tests/studies/recipes.py runs/recipes"}, rows=[row])
            print(f"{recipe}, seed {seed}: {row['policies']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    study(given.folder, given.recipes, given.seeds)


if __name__ == "__main__":
    main()
