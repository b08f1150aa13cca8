"Small stores for the tests of stores and of what is drawn from them."
import numpy as np

from dreamer4_nb.data.arrays import atomic_store
from dreamer4_nb.data.stores import Episode, EpisodeStore


def make(path, task, lengths, width=1, image=4):
    "A store whose frames are filled with the number of their episode."
    with atomic_store(path) as beside:
        store = EpisodeStore.create(beside, task, width, (image, image, 3), width)
        store.extend([Episode(actions=np.zeros((n, width)), rewards=np.arange(n), frames=np.full((n, image, image, 3), k, np.uint8),
                              states=np.full((n, width), k)) for k, n in enumerate(lengths)])
        store.finish()
    return EpisodeStore.open(path)


def make_joined(folder):
    "Views of two stores, joined, and joined once more with a third; and the first store. The frames are of episodes 2, 0, 1, 0, 1, 2."
    a, b, c = (make(folder / f"{name}.zarr", name, [70, 9, 12], width) for name, width in (("a", 1), ("b", 3), ("c", 2)))
    return EpisodeStore.join([EpisodeStore.join([a.subset([2, 0]), b.subset([1])]), c]), a


def make_moving(path, task, action_dim, episodes=12, length=40):
    "A store with a bright square that actions push about; where it is in the right half there is a reward."
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
    return store.finish()
