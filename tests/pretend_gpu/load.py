"""A pretend GPU: operations run on the CPU, but refuse what CUDA refuses, two devices and foreign generators.

`load(folder)` once, then `device="fakegpu"`, in a process of its own: the backend holds for all of it. It is
compiled once, with a C++ compiler and nothing else. Of CUDA's kernels, bfloat16 and speed it says nothing."""
import hashlib
import os
import shutil
import subprocess
import types
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "fakegpu.cpp"
COMPILERS = (os.environ.get("CXX", ""), "g++", "c++", "clang++")
COMPILER = next((path for path in map(shutil.which, COMPILERS) if path), None)


def compiled(folder: Path) -> Path:
    "The backend as a library in `folder`; compiled in half a minute where it is not there for this PyTorch."
    torch_folder = Path(torch.__file__).parent
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    library = folder / f"fakegpu-{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}.so")
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        flags = ["-std=c++20", "-O0", "-shared", "-fPIC", "-w", abi, f"-I{torch_folder / 'include'}"]
        links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([COMPILER, *flags, str(SOURCE), *links, "-o", str(part)], check=True)
        os.replace(part, library)       # of two processes that compile, both are right
    return library


def device_module() -> types.ModuleType:
    "What PyTorch asks of `torch.fakegpu`."
    module = types.ModuleType("torch.fakegpu")
    module.is_available = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda *device: torch.zeros(1, dtype=torch.uint8)
    module.set_rng_state = lambda *state: None
    module.synchronize = lambda *device: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    return module


def copy_by_cloning() -> None:
    "Deep copies of this device's tensors. PyTorch would copy their storage, on devices that it knows."
    known = torch.Tensor.__deepcopy__

    def deepcopy(self: torch.Tensor, memo: dict) -> torch.Tensor:
        if self.device.type != "fakegpu":
            return known(self, memo)
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    torch.Tensor.__deepcopy__ = deepcopy


def load(folder: Path) -> None:
    "Makes the device \"fakegpu\" known to PyTorch, for this process; the library is kept in `folder`."
    torch.utils.rename_privateuse1_backend("fakegpu")
    torch.ops.load_library(str(compiled(folder)))
    torch._register_device_module("fakegpu", device_module())
    copy_by_cloning()
