"Statistics, records, the closed loop and the report: what each must get right, with values worked out by other means."
import inspect
import json
import math

import numpy as np
import pytest
from scipy import stats

from dreamer4_nb.core import UserError, asset
from dreamer4_nb.data.demonstrations import load_demonstrations
from dreamer4_nb.data.tasks import TASKS, TaskInfo
from dreamer4_nb.evaluation import closed_loop as evaluation
from dreamer4_nb.evaluation.closed_loop import (check_fresh, closed_loop_rows, closed_loop_table,
                                                evaluate_policy, text_table)
from dreamer4_nb.evaluation.report import report
from dreamer4_nb.evaluation.statistics import Records, bootstrap, compare, interval, pmpo_gains, runs_interval
from dreamer4_nb.runs.cli import Evaluate
from dreamer4_nb.runs.presets import TINY
from dreamer4_nb.runs.study import study


def records(name, hits, seeds=None):
    "Records of episodes of four decisions that get a reward at the last one or never."
    rewards = np.zeros((len(hits), 4))
    rewards[:, -1] = hits
    return Records.of_rewards(name, "ball_in_cup-catch", range(len(hits)) if seeds is None else seeds, rewards)


def test_success_final_and_first():
    rewards = np.zeros((4, 8))
    rewards[1, 2] = 1          # once, then lost
    rewards[2, 5:] = 2         # from decision 5 to the end
    rewards[3, 7] = 1          # only at the very end: the last quarter is two decisions
    r = Records.of_rewards("p", "ball_in_cup-catch", range(4), rewards)
    assert r.success.tolist() == [False, True, True, True]
    assert r.final_success.tolist() == [False, False, True, False]
    assert r.first_success.tolist() == [-1, 2, 5, 7]
    assert r.returns.tolist() == [0, 1, 6, 1]


@pytest.mark.parametrize("k, n", [(0, 10), (5, 10), (10, 10), (46, 500), (230, 500)])
def test_wilson_is_the_root_of_its_quadratic(k, n):
    z, p = stats.norm.ppf(0.975), k / n
    roots = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p])   # (p_hat - p)^2 = z^2 p (1 - p) / n
    assert interval([True] * k + [False] * (n - k)) == pytest.approx(sorted(roots.real), abs=1e-9)


def test_wilson_known_values():
    assert interval([True] * 5 + [False] * 5) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    low, high = interval([False] * 20)
    assert low == 0 and 0.1 < high < 0.2


def test_sign_test_is_exact():
    for wins, losses, ties in [(0, 0, 5), (1, 0, 3), (5, 0, 0), (8, 2, 10), (30, 22, 48), (12, 12, 0)]:
        a = records("a", [1] * wins + [0] * losses + [1] * ties)
        b = records("b", [0] * wins + [1] * losses + [1] * ties)
        n, k = wins + losses, min(wins, losses)
        by_hand = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n)
        found = compare(a, b)
        assert (found["wins"], found["losses"], found["ties"]) == (wins, losses, ties)
        assert found["p"] == pytest.approx(by_hand, rel=1e-9)
        assert compare(b, a)["p"] == pytest.approx(found["p"])
        assert compare(b, a)["difference"] == -found["difference"]


def test_pairs_are_by_seed_not_by_row():
    a = records("a", [1, 0, 1, 0], seeds=[0, 1, 2, 3])
    b = records("b", [0, 1, 0, 1], seeds=[3, 2, 1, 0])    # the same outcomes, in another order
    assert compare(a, b)["ties"] == 4
    with pytest.raises(UserError, match="same task, length and seeds"):
        compare(a, records("c", [1, 0, 1, 0], seeds=[4, 5, 6, 7]))
    with pytest.raises(UserError, match="unknown measure"):
        compare(a, a, "score")


def test_paired_interval_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    a, b = records("a", hard < 0.6), records("b", hard < 0.5)
    low, high = compare(a, b)["interval"]
    unpaired = 1.96 * math.sqrt(0.6 * 0.4 / 200 + 0.5 * 0.5 / 200)
    assert 0 < low < a.success.mean() - b.success.mean() < high and high - low < unpaired


def test_bootstrap_agrees_with_the_normal_interval():
    x = np.random.default_rng(1).normal(3, 2, 400)
    half = 1.96 * x.std() / 20
    assert bootstrap(x) == pytest.approx((x.mean() - half, x.mean() + half), abs=0.03)
    assert bootstrap(x) == bootstrap(x)


def test_runs_interval_is_the_t_interval():
    rates = [0.36, 0.45, 0.41, 0.38]
    expected = stats.t.interval(0.95, 3, np.mean(rates), stats.sem(rates))
    assert runs_interval(rates) == pytest.approx(expected)
    with pytest.raises(UserError, match="at least two"):
        runs_interval([0.4])


def test_records_survive_the_disk(tmp_path):
    r = records("policy, mean", [1, 0, 1])
    r.save(tmp_path / "r.json")
    again = Records.load(tmp_path / "r.json")
    assert again.summary() == r.summary() and (again.seed == r.seed).all() and (again.first_success == r.first_success).all()
    (tmp_path / "cut.json").write_text((tmp_path / "r.json").read_text(encoding="utf-8")[:-40])
    for name in ("cut.json", "none.json"):
        with pytest.raises(UserError, match="cannot be read|holds a|no file"):
            Records.load(tmp_path / name)


def test_gains_are_paired_by_the_run_of_phase_2():
    def row(policy, seed, success, **more):
        like = {"run": "r", "task": "t", "setting": None, "value": None, "decisions": 125, "readout": "sample"}
        return like | {"policy": policy, "agent_seed": seed, "success": success} | more

    plain, strict = pmpo_gains([
        row("cloning", 0, 0.5), row("cloning", 1, 0.4), row("cloning", 2, 0.9),            # the third has no phase 3
        row("PMPO", 0, 0.6), row("PMPO", 0, 0.7), row("PMPO", 1, 0.4), row("PMPO", 3, 0.0),
        row("PMPO", 1, 0.1, setting="imagination.beta", value=0),                          # on the same cloning
        row("PMPO", 0, 0.9, readout="mean")])                                              # without a cloning
    assert plain["by_agent"] == pytest.approx([0.15, 0.0]) and plain["mean"] == pytest.approx(0.075)
    assert plain["interval"] == pytest.approx(runs_interval([0.15, 0.0]))
    assert strict["setting"] == "imagination.beta" and strict["by_agent"] == pytest.approx([-0.3])
    assert strict["interval"] is None


class Corridor:
    "A stand-in for VectorEnv: a position in [0, 1] moved by the action; reward at the far end; each episode ends at its own time."
    def __init__(self, task, seeds, workers, image):
        self.seeds, self.t, self.x, self.image = np.array(seeds), 0, np.zeros(len(seeds)), image

    def __enter__(self): return self

    def __exit__(self, *exception): pass

    def frames(self): return np.full((len(self.seeds), 4, 4, 3), self.t, np.uint8) if self.image else np.full(len(self.seeds), None)

    def reset(self): return self.frames()

    def states(self): return np.stack([self.x, self.seeds], 1)

    def step(self, actions):
        self.t, self.x = self.t + 1, np.clip(self.x + 0.25 * actions[:, 0], 0, 1)
        last = self.t >= 4 + self.seeds
        return self.frames(), (self.x == 1).astype(float), np.ones(len(self.x)), last


@pytest.fixture
def corridor(monkeypatch):
    monkeypatch.setattr(evaluation, "VectorEnv", Corridor)
    monkeypatch.setitem(TASKS, "corridor", TaskInfo("corridor", "corridor", 1, "none"))


def test_nothing_counts_after_the_end(corridor):
    r = evaluate_policy(lambda frames: np.ones((len(frames), 1)), "corridor", [0, 2], decisions=10)
    assert r.returns.tolist() == [1, 3] and r.first_success.tolist() == [3, 3]


def test_kept_frames_and_actions_line_up(corridor):
    r = evaluate_policy(lambda frames: frames[:, 0, 0, :1] / 10, "corridor", [5, 6, 7], decisions=4, keep=2)
    assert r.frames.shape == (2, 5, 4, 4, 3) and r.actions.shape == (2, 4, 1)
    assert (r.frames[:, :4, 0, 0, 0] == np.round(r.actions[..., 0] * 10)).all()   # action t was chosen at frame t


def test_what_a_policy_sees(corridor):
    class Peeks:
        name, sees, seen = "peeks", "states", []
        def act(self, states):
            self.seen.append(states.copy())
            return np.ones((len(states), 1))
    policy = Peeks()
    evaluate_policy(policy, "corridor", [3, 4], decisions=2)
    assert policy.seen[1].tolist() == [[0.25, 3], [0.25, 4]]


def test_episodes_in_chunks_are_the_same_episodes(corridor):
    class Few:
        "Acts by the number of the row, and can hold three at a time."
        def __init__(self, fitting): self.fitting, self.begun = fitting, []
        def rows(self): return self.fitting
        def reset(self, n, first=0):
            self.numbers = np.arange(first, first + n)
            self.begun.append((n, first))
        def act(self, frames): return 0.2 + self.numbers[:, None] / 10
    few, all_at_once = Few(3), Few(100)
    seeds = [5, 1, 2, 0, 7, 3, 4]
    a, b = (evaluate_policy(policy, "corridor", seeds, decisions=9, keep=4) for policy in (few, all_at_once))
    assert few.begun == [(2, 0), (2, 2), (3, 4)] and all_at_once.begun == [(7, 0)]
    assert a.seed.tolist() == seeds and np.array_equal(a.returns, b.returns) and np.array_equal(a.first_success, b.first_success)
    assert np.array_equal(a.actions, b.actions) and a.frames.shape == b.frames.shape == (4, 10, 4, 4, 3)
    assert np.array_equal(a.frames[:, :7], b.frames[:, :7])           # until the first chunk is over


def test_a_kl_counts_where_the_episode_still_runs(corridor):
    "Episodes of 4 and 6 decisions."
    class Moved:
        def act(self, frames):
            self.kl = np.array([1.0, 10.0])
            return np.ones((2, 1))
    r = evaluate_policy(Moved(), "corridor", [0, 2], decisions=10)
    assert r.info["kl"] == pytest.approx((4 * 1 + 6 * 10) / 10)
    row, = closed_loop_rows([r])
    assert row["kl"] == r.info["kl"]


def test_seeds_of_the_data_are_not_fresh():
    "Shipped demonstrations begin at seeds 0 to 399 and 20,000 to 21,399."
    store = load_demonstrations(episodes=12)
    known = store.seeds.tolist()
    assert len(set(known)) == 12 and min(known) >= 0
    check_fresh("ball_in_cup-catch", range(10_000, 10_100), store)
    with pytest.raises(UserError, match=f"1 of 3 seeds.*--first-seed {max(known) + 1}"):
        check_fresh("ball_in_cup-catch", [10_000, known[4], 10_001], store)
    check_fresh("cartpole-swingup", known, store)                # other tasks begin elsewhere
    shipped = np.load(asset("demos_ball_in_cup-catch.npz"))["seeds"]
    for first in (Evaluate().first_seed, TINY.evaluation.first_seed, inspect.signature(study).parameters["first_seed"].default):
        assert not set(range(first, first + 1000)) & set(shipped.tolist())


def test_a_dense_reward_counts_from_half_of_the_most():
    rewards = np.array([[0.2, 0.9, 0.9, 0.9], [0.2, 1.1, 0.9, 1.1]])      # two control steps, each 1 at most
    r = Records.of_rewards("p", "cartpole-swingup", [0, 1], rewards)
    assert r.success.tolist() == [False, True] and r.final_success.tolist() == [False, True] and r.first_success.tolist() == [-1, 1]


@pytest.mark.parametrize("bad", [np.full((2, 1), np.nan), np.ones((3, 1)), np.ones(2)])
def test_a_broken_policy_is_named(corridor, bad):
    with pytest.raises(UserError, match="policy .* gave actions"):
        evaluate_policy(lambda frames: bad, "corridor", [0, 1], decisions=3)


def test_no_episodes():
    with pytest.raises(UserError, match="no seeds"):
        evaluate_policy(lambda frames: frames, "ball_in_cup-catch", [])
    with pytest.raises(UserError, match="no episodes"):
        interval([])


def test_table_and_report(tmp_path):
    a, b = records("random", [0] * 8 + [1] * 2), records("<PMPO>", [1] * 9 + [0])
    rows = closed_loop_rows([a, b])
    assert "p" not in rows[0] and rows[1]["against"] == "random" and rows[1]["wins"] == 8
    assert "8 : 1" in text_table(closed_loop_table(rows))
    with pytest.raises(UserError, match="no file .*results.json"):
        report(tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "tokenizer-frames.png").write_bytes(b"png")
    (tmp_path / "results.json").write_text(json.dumps({"task": "corridor", "closed_loop": rows, "phases": {"tokenizer": {"seconds": 90}},
                                                       "captions": {"tokenizer-frames": "a caption"}}), encoding="utf-8")
    page = report(tmp_path).read_text(encoding="utf-8")
    assert "&lt;PMPO&gt;" in page and "<PMPO>" not in page
    assert "a caption" in page and "data:image/png;base64,cG5n" in page and "1.5" in page
    assert "http" not in page and 'src="/' not in page


def test_records_of_an_earlier_version_are_read(tmp_path):
    "They called what came of an episode any, held and first."
    records = Records.of_rewards("old", "ball_in_cup-catch", range(3), np.eye(3, 8))
    records.save(tmp_path / "new.json")
    text = (tmp_path / "new.json").read_text(encoding="utf-8")
    for name, former in (("first_success", "first"), ("final_success", "held"), ("success", "any")):
        text = text.replace(f'"{name}"', f'"{former}"')
    (tmp_path / "old.json").write_text(text, encoding="utf-8")
    now, former = Records.load(tmp_path / "new.json"), Records.load(tmp_path / "old.json")
    for name in ("seed", "success", "final_success", "returns", "first_success"):
        assert np.array_equal(getattr(now, name), getattr(former, name))
