"Small stores for the tests of stores and of what is drawn from them."
import numpy as np

from dreamer4_nb.stores import Episode, EpisodeStore, building


def make(path, task, lengths, width=1, image=4):
    "A store whose frames are filled with the number of their episode."
    with building(path) as beside:
        store = EpisodeStore.create(beside, task, width, (image, image, 3), width)
        store.extend([Episode(actions=np.zeros((n, width)), rewards=np.arange(n), frames=np.full((n, image, image, 3), k, np.uint8),
                              states=np.full((n, width), k)) for k, n in enumerate(lengths)])
        store.finish()
    return EpisodeStore.open(path)


def make_joined(folder):
    "Views of two stores, joined, and joined once more with a third; and the first store. The frames are of episodes 2, 0, 1, 0, 1, 2."
    a, b, c = (make(folder / f"{name}.zarr", name, [70, 9, 12], width) for name, width in (("a", 1), ("b", 3), ("c", 2)))
    return EpisodeStore.join([EpisodeStore.join([a.subset([2, 0]), b.subset([1])]), c]), a
