"""Hand a run to a cluster: pack program and settings, once and only once, and show how it goes.

What is packed is the package as it stands here and one file of resolved settings. A run is named by what
decides its results and by its output, so the same run handed in twice is one job.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from umarvel_ray.artifacts import fingerprint
from umarvel_ray.config import Config
from umarvel_ray.errors import ConfigError, OutputError
from umarvel_ray.pipeline.view import View
from umarvel_ray.runtime.cluster import RuntimeSettings
from umarvel_ray.runtime.jobs import RUNNING, JobServer

_CONFIG = "submitted.yaml"
_PACKAGE_LEAVES_OUT = shutil.ignore_patterns("__pycache__", "*.pyc")


def submission_name(kind: str, config: Config) -> str:
    """The same for the same settings and output, whoever hands them in: `umarvel-run-0a1b2c3d4e5f6789`."""
    deciding = config.model_dump(mode="json", exclude={"runtime", "title"})
    return f"umarvel-{kind}-{fingerprint([kind, deciding])}"


def pack(config: Config, runtime: RuntimeSettings, folder: Path) -> None:
    """Put the package and the resolved settings into `folder`, as a cluster needs them."""
    source = Path(__file__).parents[1]
    shutil.copytree(source, folder / source.name, ignore=_PACKAGE_LEAVES_OUT)
    values = {**config.model_dump(mode="json"), "runtime": runtime.model_dump(mode="json")}
    (folder / _CONFIG).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def submit(
    kind: str,
    config: Config,
    runtime: RuntimeSettings,
    view: View,
    *,
    address: str,
    detach: bool = False,
    attach: bool = True,
    connect: Callable[[str], JobServer] = JobServer,
) -> int:
    """Hand in a run or a single job, or join the one that is running.

    Args:
        kind: `run`, or a job's.
        config: Its settings.
        runtime: Who does the work there.
        view: Where its lines go.
        address: The cluster's job server, `http://HOST:8265`.
        detach: Leave once it is handed in.
        attach: Whether to follow a job that is on already; it is refused otherwise.
        connect: Makes the server.

    Returns:
        The job's exit code; 0 where it was only handed in.

    Raises:
        OutputError: It is on already, and `attach` is false.
        ResourceError: The cluster does not answer, or refuses us.
    """
    if runtime.kind == "local":
        raise ConfigError("runtime.kind is 'local': that is one process here, no cluster. Set it to 'ray'.")
    server = connect(address)
    name = submission_name(kind, config)
    known = server.states(name)
    current = next((job for job, status in known.items() if status in RUNNING), None)
    if current is None:
        # One more attempt of the same run: the first has no number, so two at once collide on the same id.
        current = name if not known else f"{name}-{len(known) + 1}"
        with tempfile.TemporaryDirectory(prefix="umarvel-") as folder:
            pack(config, runtime, Path(folder))
            new = server.submit(
                current,
                f"python -m umarvel_ray.cli {kind} {_CONFIG}",
                folder=Path(folder),
                env={"PYTHONUNBUFFERED": "1"},
                metadata={"title": getattr(config, "title", kind), "output": config.output},  # type: ignore[attr-defined]
            )
        view.line(f"{'handed in' if new else 'handed in by someone else'}: {current}")
    elif not attach:
        raise OutputError(
            f"{address}: this run is on already, as {current} ({known[current].lower()}). Leave out "
            "--no-attach to follow it, or stop it by `ray job stop`."
        )
    else:
        view.line(f"on already, following: {current}")
    view.line(f"stop it by: ray job stop --address {address} {current}")
    if detach:
        return 0
    try:
        server.follow(current, _write)
    except KeyboardInterrupt:
        view.line(f"no longer following; {current} goes on")
        raise
    code = server.exit_code(current)
    ended = server.status(current).lower()
    view.line(f"{current} {ended}" + (f" with {code}: {server.message(current)}" if code else ""))
    return code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
