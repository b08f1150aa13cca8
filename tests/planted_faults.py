"""Plants faults in a copy of the package, one at a time, and says which tests notice. By hand, in 20 minutes:

    python tests/planted_faults.py [--seed 0] [--number 48] [--only MODULE] [--jobs 2] [--json FILE] [--list]

Most faults are drawn by `random.Random(seed)`: a module, an operator ("off by one", "keyword forgotten", ...)
and a place where it applies. The others are KNOWN: faults that once went unnoticed. Each is written into a
copy of the package in a temporary folder. The fast tests run against that copy, those nearest to the module
first, until one fails. A run past the time limit counts as caught. Notebooks take no part.

Nothing is planted in defaults, in checks of what a user gives (`if ...: raise`), in messages and annotations,
and in what only draws, prints, predicts memory or is called by notebooks alone (LEFT_OUT). What compiles to
the same bytecode is no fault.
"""
import argparse
import ast
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "dreamer4_nb"

# Of each module, the test files that concern it; all other fast ones follow, the cheapest first.
NEAREST = {
    "flow": ["by_hand", "generation"],
    "shortcut": ["by_hand", "wiring"],
    "forcing": ["by_hand", "forcing", "wiring"],
    "attention": ["by_hand", "conformance", "wiring"],
    "blocks": ["conformance", "generation", "dynamics"],
    "pruned": ["conformance", "tokenizer", "dynamics"],
    "tokenizer": ["wiring", "tokenizer"],
    "dynamics": ["dynamics", "wiring", "forcing"],
    "generation": ["generation", "wiring"],
    "agent": ["wiring", "agent"],
    "imagination": ["wiring", "imagination"],
    "dreamer3": ["dreamer3"],
    "perceptual": ["perceptual"],
    "loop": ["by_hand", "wiring", "training"],
    "optimizers": ["by_hand", "wiring", "training"],
    "phases": ["wiring", "presets", "training"],
    "windows": ["wiring", "data"],
    "mixtures": ["wiring", "data"],
    "ball": ["tokenizer", "evaluation"],
    "metrics": ["evaluation", "generation", "tokenizer"],
    "dream_env": ["dream_env", "generation", "evaluation"],
    "closed_loop": ["evaluation", "wiring", "chain_wiring"],
    "statistics": ["evaluation"],
    "frechet": ["frechet"],
    "probes": ["probes"],
    "ranks": ["dreamer3", "training"],
    "dreamer3_runs": ["dreamer3"],
    "report": ["evaluation", "wiring", "chain_wiring"],
    "study": ["chain_wiring"],
    "chain": ["chain_wiring"],
    "judge": ["chain_wiring"],
}
CHEAPEST = ["by_hand", "conformance", "wiring", "forcing", "dynamics", "generation", "chain_wiring",
            "evaluation", "agent", "training", "imagination", "stores", "data", "tokenizer", "endings",
            "presets"]
METHOD = ["flow", "shortcut", "forcing", "attention", "blocks", "pruned",
          "tokenizer", "dynamics", "generation", "agent", "imagination", "dreamer3", "perceptual"]
WIRING = ["loop", "optimizers", "ranks", "phases", "windows", "mixtures", "ball", "metrics", "dream_env",
          "closed_loop", "statistics", "frechet", "probes", "dreamer3_runs", "report", "study", "chain", "judge"]
# What starts processes of its own, predicts costs, or only reads text takes no part.
SLOW = {"cli", "sharding", "ddp", "gpu_run", "pretend_gpu", "costs", "scaling", "ladder", "readme", "style"}
NOT_RUN = "not compile and not kill_at_any_moment"

LEFT_OUT = {
    "flow": {"toy_centers", "toy_points", "posterior_mean", "euler_sample", "sliced_wasserstein"},
    "shortcut": {"shortcut_sample"},
    "blocks": {"draw", "compile", "compile_layers", "nbytes"},
    "tokenizer": {"PerceptualLoss"},
    "generation": {"compile", "compile_world"},
    "loop": {"RunLog", "say_stopped", "catch_stop", "read_ahead"},
    "ranks": {"asked_ranks", "join_ranks", "leave_ranks", "wait_until", "rank_mesh", "shard_module", "any_rank",
              "write_shards", "wait_written", "check_hashes", "read_shards"},
    "closed_loop": {"closed_loop_table", "text_table", "PlannerPolicy"},
    "dream_env": {"render"},
    "report": {"_table", "_picture", "_matrix", "findings", "report", "reconstructions"},
    "judge": {"machine", "figures", "save_figure", "save_dreams", "training_curves", "write_report"},
    "folder": {"differences"},
}
ALWAYS_LEFT_OUT = {"__post_init__", "__repr__"}
SAID = {"print", "print0", "tqdm", "check_shape", "use_style", "isinstance", "super", "UserError"}

# (what, module, pattern that fits once, what takes its place)
KNOWN = [
    ("fused attention repeats heads in another order", "attention",
     r"keys\.repeat_interleave\(shared, 1\)\n(\s+)values = values\.repeat_interleave\(shared, 1\)",
     r"keys.repeat(1, shared, 1, 1)\n\1values = values.repeat(1, shared, 1, 1)"),
    ("train_dynamics sets no statistics", "phases", r"\n    set_latent_statistics\(dynamics, [^\n]*\)\n", "\n"),
    ("the streaming policy passes the action one step late", "agent",
     r"self\.world\.observe\(self\.dream, latents, self\.action\[:, None\]([^\n]*)\)\n",
     r"self.world.observe(self.dream, latents, getattr(self, 'late', self.action)[:, None]\1); "
     r"self.late = self.action\n"),
    ("dreams call an episode's first action known", "report",
     r"(def dreams\(.*?torch\.arange\(length[^)]*\)) > 0", r"\1 >= 0"),
    ("the parts of a mixture share one seed", "mixtures", r"\((w\.seed \* \w+) \+ k\)", r"(\1)"),
    ("the tokenizer's second part keeps the slowness of the first", "phases",
     r", part=part\)", ")"),
    ("video_loss forgets the bound of the bootstrap", "dynamics", r"c\.p_context,(\s+)c\.clip,", r"c.p_context,\1None,"),
    ("the first half step is told the whole step", "shortcut", r"f\((z_tau, i), j_half\)", r"f(\1, j)"),
    ("the second half step is told the first one's level", "shortcut",
     r"f\((z_mid), i \+ half, ", r"f(\1, i, "),
    ("latents do not look at the action", "dynamics", r"\(name, world\) for name in world",
     '(name, world[:-1] if name == "latent" else world) for name in world'),
    ("the averaged weights are not the final ones", "loop",
     r"parameter\.copy_\(local\(value\)\)", "pass"),
    ("a resumed moment lies in memory as the file has it", "ranks",
     r"\{name: laid_out\(value, parameter\) for", "{name: value for"),
    ("Muon multiplies in bfloat16 on any hardware", "optimizers",
     r"self\.dtype = pick_dtype\([^\n]*\)", "self.dtype = torch.bfloat16"),
    ("how far phase 3 moved is read from the wrong side", "judge",
     r"self\.choice\.kl\(prior\)", "prior.kl(self.choice)"),
    ("a KL counts after the end of an episode", "closed_loop", r"policy\.kl\[alive\]", "policy.kl"),
]


@dataclass
class Fault:
    "One change of a module's source, and what came of it."
    module: str
    line: int
    operator: str
    before: str
    after: str
    source: str               # of the whole module, with the fault
    what: str = ""            # a known fault in words
    outcome: str = ""         # "caught" or "survived"
    by: str = ""              # the test that failed, or what else ended the run
    seconds: float = 0.0


# What can be changed in one node of the syntax tree: (node, what takes its place).
Pairs = Iterator[tuple[ast.AST, ast.AST]]


def changed(node: ast.AST, **fields) -> ast.AST:
    "A copy of a node with other fields."
    node = copy.copy(node)
    for name, value in fields.items():
        setattr(node, name, value)
    return node


def plus(node: ast.expr, n: int) -> ast.expr:
    "node + n, folded where it is a number."
    number = ast.unparse(node).lstrip("-")
    if number.isdigit():
        return ast.parse(str(int(ast.unparse(node)) + n), mode="eval").body
    return ast.BinOp(node, ast.Add() if n > 0 else ast.Sub(), ast.Constant(abs(n)))


def called(node: ast.AST) -> str:
    "The last name of what a call calls."
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def is_text(node: ast.AST) -> bool:
    "Whether a sum joins texts."
    parts = list(ast.walk(node))
    return any(isinstance(x, ast.JoinedStr) or isinstance(getattr(x, "value", None), str) for x in parts)


def arguments_swapped(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.Call) and called(node) not in {"min", "max", "minimum", "maximum", "equal"}:
        for k in range(len(node.args) - 1):
            pair = node.args[k:k + 2]
            if not any(isinstance(a, ast.Starred) for a in pair):
                yield node, changed(node, args=node.args[:k] + pair[::-1] + node.args[k + 2:])


def off_by_one(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.Subscript):
        for part in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
            for bound in [part.lower, part.upper] if isinstance(part, ast.Slice) else []:
                if bound is not None:
                    yield bound, plus(bound, 1)
            if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Add | ast.Sub):
                yield part, plus(part, 1)
            if ast.unparse(part).lstrip("-").isdigit():
                yield part, plus(part, -1 if ast.unparse(part).startswith("-") else 1)
    if called(node) in {"range", "arange"} and node.args:
        yield node.args[-1], plus(node.args[-1], -1)


def term_dropped(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and not is_text(node):
        yield node, node.left
        if isinstance(node.op, ast.Add):
            yield node, node.right


def wrong_sign(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and not is_text(node):
        yield node, changed(node, op=ast.Sub() if isinstance(node.op, ast.Add) else ast.Add())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if not isinstance(node.operand, ast.Constant):
            yield node, node.operand


def wrong_argument(node: ast.AST, scope: "Scope") -> Pairs:
    if not isinstance(node, ast.Call):
        return
    for value in node.args + [k.value for k in node.keywords]:
        if isinstance(value, ast.Name) and value.id in scope.locals:
            for name in sorted(scope.locals - {value.id}):
                if scope.since[name] < node.lineno:
                    yield value, ast.Name(name)
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            for name in sorted(scope.attributes[value.value.id] - {value.attr}):
                yield value, changed(value, attr=name)


def call_skipped(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and called(node.value) != "__init__":
        yield node, ast.Pass()


def boundary(node: ast.AST, scope: "Scope") -> Pairs:
    turned = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
    if isinstance(node, ast.Compare) and type(node.ops[0]) in turned:
        yield node, changed(node, ops=[turned[type(node.ops[0])]()] + node.ops[1:])


def and_for_or(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.BoolOp):
        yield node, changed(node, op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        yield node, changed(node, op=ast.BitOr())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield node, node.operand


def constant(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node not in scope.indices:
        yield node, ast.Constant(node.value + 1 if type(node.value) is int else 2 * node.value or 1.0)


def swapped(pairs: list[tuple[str, str]]) -> dict[str, str]:
    "Each name and the one it is taken for."
    return dict(pairs) | {b: a for a, b in pairs}


def renamed(node: ast.AST, names: dict[str, str]) -> Pairs:
    "A call of another function, or method, by name."
    if called(node) in names:
        other = names[called(node)]
        field = "attr" if isinstance(node.func, ast.Attribute) else "id"
        yield node, changed(node, func=changed(node.func, **{field: other}))


def mean_for_sum(node: ast.AST, scope: "Scope") -> Pairs:
    if called(node) and isinstance(node.func, ast.Attribute):       # `mean` may be a local function
        yield from renamed(node, swapped([("mean", "sum"), ("std", "var"), ("cumsum", "cumprod")]))


def min_for_max(node: ast.AST, scope: "Scope") -> Pairs:
    pairs = [("min", "max"), ("minimum", "maximum"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"),
             ("floor", "ceil")]
    yield from renamed(node, swapped(pairs))
    for keyword in getattr(node, "keywords", []):
        if called(node) == "clamp" and keyword.arg in ("min", "max"):
            yield keyword, changed(keyword, arg="max" if keyword.arg == "min" else "min")


DIMENSIONED = set("""sum mean cat stack flatten softmax log_softmax chunk split argmax argmin any all max min
    roll std var unflatten cumsum unsqueeze transpose repeat_interleave index_copy_ diff norm unbind sort
    movedim concatenate""".split())


def dimension(node: ast.AST, scope: "Scope") -> Pairs:
    if called(node) not in DIMENSIONED or not isinstance(node.func, ast.Attribute):
        return
    given = [k.value for k in node.keywords if k.arg in ("dim", "axis")] or node.args
    for value in given:
        if ast.unparse(value).lstrip("-").isdigit():
            yield value, plus(value, -1)


def true_for_false(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, ast.Constant(not node.value)


def keyword_forgotten(node: ast.AST, scope: "Scope") -> Pairs:
    if isinstance(node, ast.Call):
        for k, keyword in enumerate(node.keywords):
            if keyword.arg not in (None, "device", "dtype", "desc", "disable", "leave", "progress"):
                yield node, changed(node, keywords=node.keywords[:k] + node.keywords[k + 1:])


KEEPS_SHAPE = set("""detach clamp clone copy eval square sqrt abs softmax log_softmax sigmoid exp flip roll
    tanh tril requires_grad_ masked_fill expand clip""".split())


def method_forgotten(node: ast.AST, scope: "Scope") -> Pairs:
    if called(node) in KEEPS_SHAPE and isinstance(node.func, ast.Attribute):
        if ast.unparse(node.func.value) not in ("torch", "F", "np", "copy", "math", "nn"):
            yield node, node.func.value


OPERATORS = {f.__name__.replace("_", " "): f for f in (
    arguments_swapped, off_by_one, term_dropped, wrong_sign, wrong_argument, call_skipped, boundary,
    and_for_or, constant, mean_for_sum, min_for_max, dimension, true_for_false, keyword_forgotten,
    method_forgotten)}


class Scope:
    """What a function knows: its `locals`, the line `since` which each is known, the `attributes` that it
    reads of each name, and the nodes that are part of `indices` or dimensions."""

    def __init__(self, function: ast.FunctionDef):
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        self.since = {a.arg: 0 for a in arguments if a.arg not in ("self", "cls", "ctx")}
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != "_":
                self.since.setdefault(node.id, node.lineno)
        self.locals = set(self.since)
        self.attributes = {name: set() for name in self.locals}
        nodes = list(ast.walk(function))
        methods = {id(n.func) for n in nodes if isinstance(n, ast.Call)}
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found = self.attributes.setdefault(node.value.id, set())
                if id(node) not in methods:
                    found.add(node.attr)
        places = [n.slice for n in nodes if isinstance(n, ast.Subscript)]
        places += [a for n in nodes if called(n) in DIMENSIONED for a in n.args]
        self.indices = {x for place in places for x in ast.walk(place)}


LEFT_ALONE = (ast.Raise, ast.Assert, ast.JoinedStr, ast.ExceptHandler, ast.arguments, ast.Import,
              ast.ImportFrom)


def nodes_of(node: ast.AST) -> Iterator[ast.AST]:
    "The nodes of a function's body where a fault may be planted, parents first."
    for child in ast.iter_child_nodes(node):
        if isinstance(child, LEFT_ALONE):
            continue
        if isinstance(child, ast.If) and isinstance(child.body[0], ast.Raise) and not child.orelse:
            continue
        said = child.value if isinstance(child, ast.Expr) else child
        if called(said) in SAID or called(said) and ast.unparse(said).startswith(("bar.", "warnings.")):
            continue
        if isinstance(child, ast.FunctionDef):
            yield from nodes_of(ast.Module(child.body, []))
            continue
        if isinstance(child, ast.AnnAssign):
            yield child.value
            yield from nodes_of(child.value)
            continue
        yield child
        yield from nodes_of(child)


def functions_of(tree: ast.AST, left_out: set[str]) -> Iterator[ast.FunctionDef]:
    "Functions and methods of a module, without those left out."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in left_out:
            yield node
        if isinstance(node, ast.ClassDef) and node.name not in left_out:
            yield from functions_of(node, left_out)


def bytecode(source: str) -> tuple:
    "What a source compiles to, without names of lines and columns."
    def plain(code: CodeType) -> tuple:
        constants = tuple(plain(c) if isinstance(c, CodeType) else (type(c), c) for c in code.co_consts)
        return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars
    return plain(compile(source, "module", "exec"))


def at(source: bytes, line: int, column: int) -> int:
    "Where a line and a column (of bytes) are in a source."
    return sum(map(len, source.splitlines(keepends=True)[:line - 1])) + column


def replaced(source: str, old: ast.AST, new: ast.AST) -> str:
    "The source with one node written anew."
    data = source.encode()
    start, end = at(data, old.lineno, old.col_offset), at(data, old.end_lineno, old.end_col_offset)
    text = ast.unparse(new)
    loose = isinstance(new, ast.BinOp | ast.BoolOp | ast.Compare | ast.UnaryOp | ast.IfExp | ast.Lambda)
    return (data[:start] + (f"({text})" if loose else text).encode() + data[end:]).decode()


def places(module: str, source: str) -> dict[str, list[tuple[ast.AST, ast.AST]]]:
    "For every operator that applies somewhere in the module, the nodes and what may take their place."
    tree, found = ast.parse(source), {}
    for function in functions_of(tree, LEFT_OUT.get(module, set()) | ALWAYS_LEFT_OUT):
        scope = Scope(function)
        for node in nodes_of(ast.Module([function], [])):
            for name, operator in OPERATORS.items():
                found.setdefault(name, []).extend(operator(node, scope))
    return {name: pairs for name, pairs in found.items() if pairs}


def draw(modules: list[str], sources: dict[str, str], number: int, seed: int) -> list[Fault]:
    "So many faults: modules in turn, those of the method twice as often; an operator; a line without it yet."
    rng, faults, used = random.Random(seed), [], set()
    sites = {module: places(module, sources[module]) for module in modules}
    originals = {module: bytecode(sources[module]) for module in modules}
    turns = []
    for attempt in range(100 * number):
        if len(faults) == number:
            break
        if not turns:
            turns = [m for m in modules for _ in range(2 if m in METHOD else 1)]
            rng.shuffle(turns)
        module = turns.pop()
        operator = rng.choice(sorted(sites[module]))
        old, new = rng.choice(sites[module][operator])
        source = replaced(sources[module], old, new)
        if (module, old.lineno, operator) in used:
            continue
        try:
            same = bytecode(source) == originals[module]
        except SyntaxError:
            continue
        if not same:
            used.add((module, old.lineno, operator))
            faults.append(Fault(module, old.lineno, operator, ast.unparse(old), ast.unparse(new), source))
    return faults


def paths_of(root: Path) -> dict[str, Path]:
    "The file of each module of METHOD and WIRING, in whatever room it is. `SystemExit` names one without a file."
    files = {path.stem: path for path in sorted((root / PACKAGE).rglob("*.py"))}
    missing = [module for module in METHOD + WIRING if module not in files]
    if missing:
        sys.exit(f"{PACKAGE} has no module called {', '.join(missing)}; correct METHOD, WIRING, NEAREST and LEFT_OUT")
    return {module: files[module] for module in METHOD + WIRING}


def known(sources: dict[str, str]) -> tuple[list[Fault], list[str]]:
    "The faults of KNOWN; and a line for each that does not fit exactly once, or no longer makes Python."
    faults = []
    stale = []
    for what, module, pattern, by in KNOWN:
        found = list(re.finditer(pattern, sources[module], re.DOTALL))
        if len(found) != 1:
            stale.append(f"'{what}' fits {len(found)} places of {module}.py: {pattern}")
            continue
        match = found[0]
        line = sources[module][:match.end()].rstrip("\n").count("\n") + 1
        source = sources[module][:match.start()] + match.expand(by) + sources[module][match.end():]
        try:
            compile(source, module, "exec")
        except SyntaxError as error:
            stale.append(f"'{what}' makes no Python of {module}.py ({error}): {pattern}")
            continue
        before = match.group().strip()
        after = match.expand(by).strip()
        faults.append(Fault(module, line, "known", before, after, source, what))
    return faults, stale


def say_stale(stale: list[str]) -> None:
    "Lists known faults that cannot be planted."
    if stale:
        print(f"{len(stale)} of {len(KNOWN)} known faults are not planted; renew their patterns in KNOWN:")
        print("\n".join(f"    {line}" for line in stale), flush=True)


def difference(before: str, after: str, wide: int = 38) -> str:
    "before -> after, cut down to what differs and a few letters around it."
    before, after = (" ".join(x.split()) for x in (before, after))
    start = len(os.path.commonprefix([before, after]))
    end = len(os.path.commonprefix([before[start:][::-1], after[start:][::-1]]))
    first = max(0, start - 12)
    parts = []
    for text in (before, after):
        last = min(len(text), max(len(text) - end, start) + 8)
        part = ("…" if first else "") + text[first:last] + ("…" if last < len(text) else "")
        parts.append(part if len(part) <= wide else part[:wide - 1] + "…")
    return " -> ".join(parts)


def test_files(original: Path, module: str | None) -> list[str]:
    "The fast test files, those nearest to a module first."
    there = [path.stem.removeprefix("test_") for path in sorted((original / "tests").glob("test_*.py"))]
    ordered = dict.fromkeys(NEAREST.get(module, []) + CHEAPEST + there)
    return [f"tests/test_{name}.py" for name in ordered if name in there and name not in SLOW]


def copied(folder: Path, skipped: list[str]) -> None:
    "Package and tests as they are now, without those skipped, in a folder; assets and notebooks are linked."
    for name in (PACKAGE, "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for name in (f"{PACKAGE}/assets", "nbs"):
        (folder / name).symlink_to(ROOT / name)
    for name in skipped:
        (folder / "tests" / f"test_{name}.py").unlink()


def planted(original: Path, folder: Path, fault: Fault | None) -> None:
    "A copy of a copy, with the fault."
    shutil.copytree(original, folder, symlinks=True, dirs_exist_ok=True)
    if fault is not None:
        paths_of(folder)[fault.module].write_text(fault.source, encoding="utf-8")


RUNNING: set[int] = set()


def stop(pid: int) -> None:
    "Ends a process that `run` started, and its children."
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run(command: list[str], folder: Path, limit: float) -> tuple[int | None, str]:
    "Exit status (None: past the time limit) and output of a command in a copy; its children end with it."
    own = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1",
           "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "300"}
    with subprocess.Popen(command, cwd=folder, env=os.environ | own, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        RUNNING.add(process.pid)
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired:
            stop(process.pid)
            process.communicate()
            return None, ""
        finally:
            RUNNING.discard(process.pid)


def tested(original: Path, fault: Fault | None, limit: float) -> tuple[str, str, float]:
    "Whether the fault was caught, by what, and after how many seconds."
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="planted_") as folder:
        planted(original, Path(folder), fault)
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider",
                   f"--basetemp={folder}/tmp", "-k", NOT_RUN]
        status, output = run(command + test_files(original, fault and fault.module), Path(folder), limit)
    seconds = time.perf_counter() - began
    if status == 0:
        return "survived", "", seconds
    if status is None:
        return "caught", f"time limit of {limit:.0f} s", seconds
    test = re.search(r"^(?:FAILED|ERROR) tests/test_(.*?)(?: - .*)?$", output, re.MULTILINE)
    if test is None and status > 0:
        sys.exit(f"pytest ended with {status}:\n{output}")
    return "caught", test.group(1).replace(".py::", "::") if test else f"signal {-status}", seconds


def check_baseline(original: Path) -> float:
    "Seconds that the tests take without a fault. `SystemExit` if one fails, or if the copy is not imported."
    _, output = run([sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"], original, 60)
    if not output.startswith(str(original)):
        sys.exit(f"{PACKAGE} is imported from {output.strip()}, not from the copy in {original}")
    outcome, by, seconds = tested(original, None, 3600)
    if outcome != "survived":
        sys.exit(f"without a fault {by} fails; mend it first")
    return seconds


def line_of(fault: Fault) -> str:
    "A row of the table."
    place = f"{fault.module}:{fault.line}"
    change = fault.what or difference(fault.before, fault.after)
    return f"{place:16} {fault.operator:18} {change:80} {fault.by or fault.outcome.upper()}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--number", type=int, default=48, help="faults drawn, beside the known ones")
    parser.add_argument("--only", choices=METHOD + WIRING, help="one module only")
    parser.add_argument("--jobs", type=int, default=2, help="copies that are tested at the same time")
    parser.add_argument("--skip", nargs="*", default=[], help="test files to do without: presets, ...")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--list", action="store_true", help="say the faults and test nothing")
    options = parser.parse_args()
    modules = [options.only] if options.only else METHOD + WIRING
    with tempfile.TemporaryDirectory(prefix="planted_") as folder:
        original = Path(folder).resolve()
        copied(original, options.skip)
        paths = paths_of(original)
        sources = {module: path.read_text(encoding="utf-8") for module, path in paths.items()}
        planted_before, stale = known(sources)
        faults = [fault for fault in planted_before if fault.module in modules]
        faults += draw(modules, sources, options.number, options.seed)
        if options.list:
            print("\n".join(map(line_of, faults)))
            say_stale(stale)
            return
        say_stale(stale)
        whole = check_baseline(original)
        print(f"{len(faults)} faults; without one the tests pass in {whole:.0f} s", flush=True)

        def tried(fault: Fault) -> Fault:
            fault.outcome, fault.by, fault.seconds = tested(original, fault, limit=max(300, 5 * whole))
            print(line_of(fault), flush=True)
            return fault

        began = time.perf_counter()
        with ThreadPoolExecutor(options.jobs) as pool:
            try:
                faults = list(pool.map(tried, faults))
            except BaseException:           # Ctrl-C, say: nothing goes on alone
                pool.shutdown(wait=False, cancel_futures=True)
                for pid in list(RUNNING):
                    stop(pid)
                raise
        minutes = (time.perf_counter() - began) / 60
    survivors = [fault for fault in faults if fault.outcome == "survived"]
    print(f"\n{len(faults) - len(survivors)} of {len(faults)} caught in {minutes:.0f} minutes. Survivors:")
    print("\n".join(map(line_of, survivors)) or "none")
    by_module = {m: [f for f in faults if f.module == m] for m in modules}
    caught = {m: Counter(f.outcome for f in found)["caught"] for m, found in by_module.items()}
    shares = [f"{module} {caught[module]}/{len(found)}" for module, found in by_module.items()]
    print("\ncaught by module: " + ", ".join(shares))
    if options.json:
        rows = [{k: v for k, v in asdict(fault).items() if k != "source"} for fault in faults]
        totals = {"faults": len(faults), "caught": len(faults) - len(survivors)}
        found = {"seed": options.seed, "totals": totals, "faults": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
    main()
