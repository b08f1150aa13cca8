"Weights spread over two and four ranks (FSDP2, HSDP): the run of one process, resumed on other ranks, continued after a kill."
import json
import subprocess
import sys

import pytest
import torch

from safetensors.torch import load_file

from dreamer4_nb.core import UserError, load_checkpoint
from dreamer4_nb.method.dynamics import Dynamics, dynamics_loss
from dreamer4_nb.training.ranks import Checkpoints
from dreamer4_nb.training.loop import fit
from helpers.processes import ENVIRONMENT, HELPERS, torchrun
from helpers.toy_sharding import CONFIG, make_batch, make_config

TOY = HELPERS / "toy_sharding.py"
LIMIT = 600  # seconds, on a busy machine


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The history and the weights of one process that takes all four batches of a step."
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("alone")
    fit("toy", {"dynamics": Dynamics(CONFIG)}, dynamics_loss, make_batch, make_config(accumulate=4), folder, progress=False)
    return folder


def assert_same_run(folder, alone):
    histories = [[json.loads(line) for line in (f / "toy.log.jsonl").read_text(encoding="utf-8").splitlines()] for f in (folder, alone)]
    assert [row["step"] for row in histories[0]] == list(range(1, 9))
    for key in ("dynamics", "gradient"):
        here, there = (torch.tensor([row[key] for row in history]) for history in histories)
        torch.testing.assert_close(here, there, rtol=2e-4, atol=1e-5)
    weights, wanted = (load_checkpoint(f / "toy.safetensors")[0] for f in (folder, alone))
    assert weights.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(weights[key], wanted[key], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("ranks, options", [(2, ("--shard", 0, "--accumulate", 2, "--recompute", 1)), (4, ("--shard", 2))])
def test_spread_over_ranks_it_is_the_run_of_one_process(tmp_path, alone, ranks, options):
    stale = tmp_path / "toy.train" / "step-00000008"      # as a save by more ranks leaves it that was cut short
    stale.mkdir(parents=True)
    (stale / "shard-00005-model-00001-of-00001.safetensors").write_bytes(b"")
    code, output = torchrun(TOY, ranks, tmp_path, *options)
    assert code == 0, output
    assert_same_run(tmp_path, alone)
    step, = (tmp_path / "toy.train").iterdir()
    assert step.name == "step-00000008" and len(list(step.glob("*.safetensors"))) == ranks
    files = [load_file(path) for path in step.glob("*.safetensors")]
    key = "weights.dynamics.embed_latent.weight"
    held = 2 if ranks == 4 else ranks      # HSDP: a copy for each pair
    assert all(state[key].shape[0] == 32 // held for state in files if key in state) and sum(key in state for state in files) == held


def test_muon_makes_whole_matrices_of_spread_ones(tmp_path):
    "Orthogonalised part by part they would be others; and what it remembers is saved, so that a run goes on bit for bit."
    def run(folder, batches=make_batch):
        torch.manual_seed(0)
        fit("toy", {"dynamics": Dynamics(CONFIG)}, dynamics_loss, batches, make_config(accumulate=4, muon=1), tmp_path / folder, progress=False)

    def stop(i):
        if i == 5 * 4:
            raise ZeroDivisionError
        return make_batch(i)

    run("alone")
    code, output = torchrun(TOY, 2, tmp_path / "spread", "--shard", 0, "--accumulate", 2, "--muon", 1)
    assert code == 0, output
    here, there = ([json.loads(line)["dynamics"] for line in (tmp_path / name / "toy.log.jsonl").read_text(encoding="utf-8").splitlines()] for name in ("alone", "spread"))
    assert there == pytest.approx(here, rel=1e-3) and abs(here[-1] - here[0]) > 0.01
    with pytest.raises(ZeroDivisionError):
        run("broken", stop)
    run("broken")
    assert (tmp_path / "broken" / "toy.safetensors").read_bytes() == (tmp_path / "alone" / "toy.safetensors").read_bytes()


def test_a_rank_killed_in_mid_step_is_started_again_and_the_run_goes_on(tmp_path, alone):
    code, output = torchrun(TOY, 2, tmp_path, "--shard", 0, "--accumulate", 2, "--dies", 6, restarts=1)
    assert code == 0 and (tmp_path / "died").exists(), output
    assert_same_run(tmp_path, alone)
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], stdout=subprocess.PIPE).stdout == b""      # every rank is gone


def test_a_run_of_four_ranks_goes_on_with_two_and_ends_with_one(tmp_path, alone):
    code, output = torchrun(TOY, 4, tmp_path, "--shard", 2, "--dies", 4)
    assert code != 0
    assert Checkpoints(tmp_path, "toy", 0, None).last().name == "step-00000002", output
    code, output = torchrun(TOY, 2, tmp_path, "--shard", 0, "--accumulate", 1)
    assert code != 0 and "batches a step was 4, now 2" in output
    (tmp_path / "died").unlink()
    code, output = torchrun(TOY, 2, tmp_path, "--shard", 0, "--accumulate", 2, "--dies", 4)      # step 6 of the run
    assert code != 0
    assert Checkpoints(tmp_path, "toy", 0, None).last().name == "step-00000004", output
    fit("toy", {"dynamics": Dynamics(CONFIG)}, dynamics_loss, make_batch, make_config(accumulate=4), tmp_path, progress=False)
    assert_same_run(tmp_path, alone)
    assert not (tmp_path / "toy.train").exists() and (tmp_path / "toy.train.safetensors").exists()


def test_a_save_that_was_cut_short_does_not_count(tmp_path):
    kept = Checkpoints(tmp_path, "toy", 0, None)
    for step, complete in ((2, True), (4, False)):
        folder = tmp_path / "toy.train" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
        if complete:
            (folder / "about.json").write_text("{}", encoding="utf-8")
    assert kept.last().name == "step-00000002"


def test_ranks_that_cannot_be_grouped_are_refused(tmp_path):
    with pytest.raises(UserError, match="shard=3 does not divide"):
        fit("toy", {"dynamics": Dynamics(CONFIG)}, dynamics_loss, make_batch, make_config(shard=3), tmp_path, progress=False)


def test_the_documented_line_trains_a_phase_and_one_that_needs_latents(tmp_path):
    from dreamer4_nb.runs.cli import Train
    line = " ".join(Train.__doc__.split()).partition("torchrun ")[2]
    assert line.startswith("--standalone --nproc-per-node 8 --max-restarts 3 -m -- dreamer4_nb train dynamics --preset base --run ")
    line = line.replace("per-node 8", "per-node 2").replace("restarts 3", "restarts 0").replace("base", "micro").partition(" --run")[0]
    for phase in ("tokenizer", "dynamics"):
        command = line.replace("train dynamics", f"train {phase}").split() + ["--run", str(tmp_path), f"--{phase}.train.shard", "0", "--episodes", "4"]
        done = subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], env=ENVIRONMENT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT)
        assert done.returncode == 0, done.stdout
        assert (tmp_path / f"{phase}.safetensors").exists() and (tmp_path / f"{phase}.train").exists()
