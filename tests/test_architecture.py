"""The arrows of the house: who may import whom, read from the source of every module.

An import counts wherever it stands: at the top, inside a function, under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "umarvel_ray"

BASE = {"errors", "config", "logs", "cache", "storage", "artifacts"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "logs": set(),
    "config": {"errors"},
    "cache": set(),
    "storage": {"errors", "cache"},
    "artifacts": {"errors", "storage"},
    "data": BASE,
    "evaluate": BASE | {"data"},
    "model": BASE | {"data"},
    "train": BASE | {"data", "model"},
    "retrieve": BASE | {"data", "model"},
    "runtime": BASE | {"data", "model", "train", "retrieve"},
    "pipeline": BASE | {"data", "model", "train", "retrieve", "evaluate", "runtime"},
    "plan": BASE | {"data", "model", "train", "retrieve", "runtime", "pipeline"},
    "demo": BASE | {"data"},
    "export": BASE | {"data", "model"},
    "bench": BASE | {"data", "model", "train", "retrieve", "evaluate", "runtime", "pipeline", "plan", "demo"},
    "cli": BASE
    | {"data", "model", "train", "retrieve", "evaluate", "runtime", "pipeline"}
    | {"plan", "demo", "bench", "export", PACKAGE},
    # The package's own __init__ names what users import.
    PACKAGE: {"data", "model"},
}
"""Room → rooms it may import, beside itself. A room is a folder or a lone module of the package."""

HEAVY = {"torch", "transformers", "ray", "peft", "deepspeed", "faiss", "matplotlib"}
NEVER_HEAVY = {"errors", "config", "logs", "cache", "storage", "artifacts", "data"}
"""Rooms that do without the heavy libraries altogether, even inside functions."""


def modules() -> dict[str, Path]:
    """Dotted name → file, of all modules of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    """`umarvel_ray.data.trec` → `data`; the package itself is its own room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def imports(source: str, module: str, *, is_package: bool, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in `source`; `from a import b` is a.b where `known` has it."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                if base == PACKAGE and alias.name == "__version__":
                    continue
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in known else base
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.lineno, node.args[0].value


def faults(source: str, module: str, *, is_package: bool = False, known: set[str] | None = None) -> list[str]:
    """One line for each import of `source` that goes against an arrow."""
    room = room_of(module)
    if room not in MAY_IMPORT:
        return [f"{module}: room {room!r} has no arrows. Say in MAY_IMPORT what it may import."]
    found = []
    for line, target in imports(source, module, is_package=is_package, known=known or set()):
        top = target.split(".")[0]
        where = f"{module}:{line} imports {target}"
        if top == PACKAGE:
            other = room_of(target)
            if other != room and other not in MAY_IMPORT[room]:
                found.append(
                    f"{where}: {room} → {other} is no arrow of the house (it may use {allowed(room)})"
                )
        elif top == "ray" and room != "runtime":
            found.append(f"{where}: only runtime imports ray, {room} does not")
        elif top in HEAVY and room in NEVER_HEAVY:
            found.append(f"{where}: {room} does without {top}, even inside a function")
    return found


def allowed(room: str) -> str:
    """The rooms `room` may import, for people."""
    return ", ".join(sorted(MAY_IMPORT[room])) or "none"


def test_imports_follow_the_arrows():
    known = modules()
    found = []
    for module, path in known.items():
        source = path.read_text(encoding="utf-8")
        found += faults(source, module, is_package=path.name == "__init__.py", known=set(known))
    assert not found, "\n".join([f"{len(found)} imports go against the arrows:", *found])


def test_the_arrows_have_no_circle():
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        ready = [room for room in MAY_IMPORT if room not in order and MAY_IMPORT[room] <= set(order)]
        assert ready, f"rooms that need one another: {sorted(set(MAY_IMPORT) - set(order))}"
        order += ready


def test_job_scripts_use_the_command_line_and_the_pipeline_only():
    found = []
    for path in sorted((ROOT / "jobs").glob("*.py")):
        for line, target in imports(
            path.read_text(encoding="utf-8"), path.stem, is_package=False, known=set(modules())
        ):
            ours = target.split(".")[0] == PACKAGE
            if target.split(".")[0] in HEAVY or (ours and room_of(target) not in {"cli", "pipeline"}):
                found.append(f"jobs/{path.name}:{line} imports {target}: a job uses cli and pipeline only")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "arrow"),
    [
        ("umarvel_ray.train.loop", "from umarvel_ray.retrieve.store import open_shard", "train → retrieve"),
        ("umarvel_ray.retrieve.mine", "def f():\n    import umarvel_ray.train.losses", "retrieve → train"),
        ("umarvel_ray.model.encoder", "from ..runtime import cluster", "model → runtime"),
        ("umarvel_ray.data.trec", "from umarvel_ray import model", "data → model"),
        ("umarvel_ray.evaluate.report", "import_module('umarvel_ray.pipeline.jobs')", "evaluate → pipeline"),
        (
            "umarvel_ray.errors",
            "if TYPE_CHECKING:\n    from umarvel_ray.config import Config",
            "errors → config",
        ),
        ("umarvel_ray.pipeline.jobs", "def f():\n    from ray import data", "only runtime imports ray"),
        ("umarvel_ray.data.mbeir", "def f():\n    import torch.nn", "data does without torch"),
        ("umarvel_ray.newroom.thing", "", "room 'newroom' has no arrows"),
    ],
)
def test_a_wrong_import_is_named(module, source, arrow):
    known = {"umarvel_ray.model", "umarvel_ray.runtime"}
    [fault] = faults(source, module, known=known)
    assert module in fault and arrow in fault


def test_right_imports_pass():
    source = (
        "import torch\nfrom . import losses\nfrom .gather import f\nfrom umarvel_ray.model import encoder"
    )
    assert faults(source, "umarvel_ray.train.loop") == []
    assert faults("import ray\nfrom umarvel_ray.train import loop", "umarvel_ray.runtime.training") == []


def test_light_modules_load_nothing_heavy():
    """What `umarvel --help` and `umarvel check` load, in one fresh process; names the first offender."""
    light = NEVER_HEAVY | {PACKAGE, "evaluate", "demo", "pipeline", "cli"}
    names = [module for module in modules() if room_of(module) in light and not module.endswith("__main__")]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "    if heavy:\n"
        "        sys.exit(f'importing {name} loads {heavy}: import them where they are used')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
