"""Stand-ins for the packages that draw, simulate or show: the method can be trained and timed without them.

`install()` before dreamer4_nb is imported. A stand-in can be imported, named in annotations and inherited
from; whoever calls it gets an error that names it."""
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

PACKAGES = ("IPython", "PIL", "absl", "dm_control", "gymnasium", "imageio", "ipywidgets", "lpips",
            "matplotlib", "mujoco", "scipy", "torchmetrics", "tyro")


class StandIn(type):
    "The type of everything that a stand-in module holds: a class whose attributes are again such classes."

    def __getattr__(cls, name: str) -> "StandIn":
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args, **kwargs):
        raise ImportError(f"{cls.__name__} was called, but only a stand-in for it is here")


class StandInModule(types.ModuleType):
    def __getattr__(self, name: str) -> StandIn:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn(f"{self.__name__}.{name}", (), {})


class Finder(MetaPathFinder, Loader):
    "Finds PACKAGES and all that is in them, before anything else does."

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in PACKAGES else None

    def create_module(self, spec: ModuleSpec) -> StandInModule:
        return StandInModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class QuietWriter:
    "In TensorBoard's place: `fit` keeps its history itself."

    def __init__(self, *args, **kwargs):
        pass

    def add_scalar(self, *args, **kwargs) -> None:
        pass

    def add_image(self, *args, **kwargs) -> None:
        pass

    def close(self) -> None:
        pass


def install() -> None:
    "Puts the stand-ins where the packages would be, also where those are: so it is the same everywhere."
    sys.meta_path.insert(0, Finder())
    board = types.ModuleType("torch.utils.tensorboard")
    board.SummaryWriter = QuietWriter
    sys.modules["torch.utils.tensorboard"] = board
