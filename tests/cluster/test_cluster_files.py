"""The cluster files: every key is known, Ray can read every group, and a failed run is a failed job."""

import copy
import importlib.util
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> Any:
    """A cluster file as data."""
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def validator() -> Any:
    """`cluster/validate.py` as a module; the folder is no package."""
    spec = importlib.util.spec_from_file_location("cluster_validate", CLUSTER / "validate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


validate = validator()
FILES = sorted(path for path in CLUSTER.iterdir() if path.suffix in (".yaml", ".sh", ".json"))


def bytes_of(size: str) -> int:
    """`16Gi` → bytes."""
    return int(size[:-2]) * {"Mi": 2**20, "Gi": 2**30}[size[-2:]]


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group name → group, with the head as `head`."""
    return {
        "head": spec["headGroupSpec"],
        **{group["groupName"]: group for group in spec["workerGroupSpecs"]},
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_passes_its_validator(path):
    assert validate.faults(path) == []


def plant(document: Any, path: list[Any], value: Any) -> Any:
    """A copy with one value put somewhere."""
    document = copy.deepcopy(document)
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return document


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "workerGroupSpecs", 0, "idleTimeoutSecond"], 60),
        (["spec", "workerGroupSpecs", 1, "replicas"], "x"),
        (["spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "lifecycle", "prestop"], {}),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "authOptions", "mode"], "disabled"),
        (["spec", "autoscalerOptions", "version"], "v1"),
        (["apiVersion"], "ray.io/v1alpha1"),
        (["kind"], "RayClusters"),
        (["spec", "headGroupSpec", "template", "spec", "restartPolicy"], "Always"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "securityContext", "runAsUser"], 0),
    ],
)
def test_a_planted_fault_is_caught_in_a_kuberay_file(path, value):
    assert validate.document_faults(load("kuberay-cluster.yaml"), "f") == []
    assert validate.document_faults(plant(load("kuberay-cluster.yaml"), path, value), "f")
    if path[0] == "spec":
        in_job = ["spec", "rayClusterSpec", *path[1:]]
        assert validate.document_faults(plant(load("kuberay-job.yaml"), in_job, value), "f")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "podMetricsEndpoint"], []),
        (["spec", "podMetricsEndpoints", 0, "port"], 8080),
        (["spec", "selector", "matchLabels", "ray.io/cluster"], 1),
    ],
)
def test_a_planted_fault_is_caught_in_the_monitor(path, value):
    assert validate.document_faults(plant(load("kuberay-monitor.yaml"), path, value), "f")


# A definition as KubeRay's are, with as much of it as the law needs.
CRD = {
    "spec": {
        "names": {"kind": "RayCluster"},
        "versions": [
            {"name": "v1alpha1", "storage": False, "schema": {"openAPIV3Schema": {}}},
            {
                "name": "v1",
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "spec": {
                                "type": "object",
                                "required": ["headGroupSpec"],
                                "properties": {
                                    "rayVersion": {"type": "string"},
                                    "enableInTreeAutoscaling": {"type": "boolean"},
                                    "authOptions": {
                                        "type": "object",
                                        "properties": {"mode": {"type": "string"}},
                                    },
                                    "autoscalerOptions": {
                                        "type": "object",
                                        "x-kubernetes-preserve-unknown-fields": True,
                                        "properties": {"idleTimeoutSeconds": {"type": "integer"}},
                                    },
                                    "headGroupSpec": {
                                        "type": "object",
                                        "additionalProperties": {
                                            "x-kubernetes-preserve-unknown-fields": True
                                        },
                                    },
                                    "workerGroupSpecs": {
                                        "type": "array",
                                        "items": {
                                            "type": "object",
                                            "required": ["maxReplicas"],
                                            "properties": {
                                                "maxReplicas": {
                                                    "x-kubernetes-int-or-string": True,
                                                    "type": "x",
                                                },
                                                **{
                                                    key: {}
                                                    for key in (
                                                        *("groupName", "replicas", "minReplicas", "priority"),
                                                        *("idleTimeoutSeconds", "rayStartParams", "template"),
                                                    )
                                                },
                                            },
                                        },
                                    },
                                },
                            }
                        },
                    }
                },
            },
        ],
    }
}


def test_a_whole_definition_is_held_against_its_kind(tmp_path, capsys):
    definition = tmp_path / "crd.yaml"
    definition.write_text(yaml.safe_dump(CRD))
    good = str(CLUSTER / "kuberay-cluster.yaml")
    assert validate.main(["--crd", str(definition), good]) == 0
    del CRD["spec"]["versions"][1]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"][
        "rayVersion"
    ]
    definition.write_text(yaml.safe_dump(CRD))
    assert validate.main(["--crd", str(definition), good]) == 2
    assert "'rayVersion' was unexpected" in capsys.readouterr().out
    assert validate.main(["--crd", str(definition), str(CLUSTER / "kuberay-job.yaml")]) == 0  # another kind


def test_the_strict_form_of_a_definition():
    schema = validate.crd_schema(CRD)["properties"]["spec"]["properties"]
    assert schema["workerGroupSpecs"]["items"]["properties"]["maxReplicas"] == {
        "anyOf": [{"type": "integer"}, {"type": "string"}]
    }
    assert schema["authOptions"]["additionalProperties"] is False
    assert "additionalProperties" not in schema["autoscalerOptions"]


def test_the_job_brings_the_cluster_of_the_cluster_file():
    assert load("kuberay-job.yaml")["spec"]["rayClusterSpec"] == load("kuberay-cluster.yaml")["spec"]


def test_ray_is_the_locked_version():
    [locked] = re.findall(
        r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert load("kuberay-cluster.yaml")["spec"]["rayVersion"] == locked


def test_mounts_have_volumes_and_the_object_store_fits_its_shared_memory():
    for name, group in groups(load("kuberay-cluster.yaml")["spec"]).items():
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes), name
        shared = bytes_of(volumes["shm"]["emptyDir"]["sizeLimit"])
        assert int(group["rayStartParams"]["object-store-memory"]) < shared, name
        assert shared < bytes_of(container["resources"]["limits"]["memory"]), name
        assert container["resources"]["requests"] == container["resources"]["limits"], name


def test_the_autoscaler_reads_the_groups_as_meant():
    """Independent reader: the function of Ray's own autoscaler."""
    reader = pytest.importorskip("ray.autoscaler._private.kuberay.autoscaling_config")
    derive = getattr(reader, "_derive_autoscaling_config_from_ray_cr", None)
    if derive is None:
        pytest.skip("this Ray has no _derive_autoscaling_config_from_ray_cr")
    document = load("kuberay-cluster.yaml")
    document["metadata"]["namespace"] = "default"
    types = derive(document)["available_node_types"]
    resources = {name: node["resources"] for name, node in types.items()}
    assert resources["headgroup"]["CPU"] == 0
    assert (resources["cpu"]["CPU"], resources["cpu"].get("GPU", 0)) == (16, 0)
    for name in ("gpu-spot", "gpu-on-demand"):
        assert (resources[name]["CPU"], resources[name]["GPU"], types[name]["max_workers"]) == (64, 8, 8)
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    assert types["gpu-spot"]["idle_timeout_s"] == 300


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_up_reads_the_file_as_meant(name):
    from ray.autoscaler._private.util import prepare_config

    prepared = prepare_config(load(name))
    types = prepared["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu_spot", "gpu_on_demand"}
    assert types["gpu_spot"]["priority"] > types["gpu_on_demand"]["priority"]
    assert types["head"]["resources"]["CPU"] == 0
    # Ray's defaults would install another Ray over the image's.
    setup = prepared["setup_commands"] + prepared["head_setup_commands"] + prepared["worker_setup_commands"]
    assert not [command for command in setup if "ray" in command]
    # Whoever reaches an open port runs code: the token is on for every process, the dashboard stays local.
    assert "--env RAY_AUTH_MODE=token" in prepared["docker"]["run_options"]
    for command in prepared["head_start_ray_commands"] + prepared["worker_start_ray_commands"]:
        assert "--dashboard-host" not in command
        assert "ray start" not in command or "--disable-usage-stats" in command
    assert f"watch_spot.sh {name.removesuffix('.yaml')} " in prepared["worker_start_ray_commands"][-1]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(
    ("key", "value"), [("idle_timeout_minute", 5), ("head_node_type", "boss"), ("max_workers", "many")]
)
def test_a_planted_fault_is_caught_in_a_file_of_ray_up(name, key, value):
    [fault] = validate.document_faults({**load(name), key: value}, name)
    assert fault.startswith(f"{name}: ")


def test_other_faults_are_caught(tmp_path):
    broken = {
        "a.yaml": "spec: [",
        "a.sh": "if true; then",
        "b.sh": "export RAY_AUTH_TOKEN=0123456789abcdef",
        "c.yaml": "kind: RayCluster\n# AKIAABCDEFGHIJKLMNOP",
        "board.json": '{"title": "x", "panels": [{"id": "1"}]}',
    }
    for name, text in broken.items():
        (tmp_path / name).write_text(text)
        assert validate.faults(tmp_path / name), name
    assert any("secret" in fault for fault in validate.faults(tmp_path / "c.yaml"))


def texts_of_the_project() -> Iterator[tuple[Path, str]]:
    """Every file that is no picture."""
    folders = [ROOT / name for name in ("umarvel_ray", "jobs", "configs", "docs", "cluster")]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    files += [path for path in ROOT.iterdir() if path.is_file()]
    for path in files:
        if path.suffix not in (".pyc", ".png", ".webp"):
            yield path, path.read_text(encoding="utf-8", errors="replace")


def test_no_file_of_the_project_holds_a_secret():
    for path, text in texts_of_the_project():
        found = validate.SECRET.search(text)
        assert found is None or path.name == "validate.py", f"{path}: {found}"


def test_no_file_of_the_project_names_a_host_of_somebody():
    """Addresses are this machine's, the clouds' own for every customer, examples, or public pages."""
    known = re.compile(
        r"(localhost|HOST|(www\.)?(ray\.io|arxiv\.org|apache\.org)|metadata\.google\.internal"
        r"|127\.\d+\.\d+\.\d+|0\.0\.0\.0|10\.\d+\.\d+\.\d+|169\.254\.169\.254)"
    )
    address = re.compile(r"https?://([\w.-]+)|(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?![\w.])")
    for path, text in texts_of_the_project():
        for found in address.finditer(text):
            host = found[1] or found[2]
            assert known.fullmatch(host), f"{path}: {host}"


def test_the_board_asks_for_what_we_and_ray_publish():
    from umarvel_ray.pipeline.progress import Recorder, Tally

    published: set[str] = set()
    Recorder(CLUSTER, "job", published.update)._publish(Tally("s", 1).figures())
    board = json.loads((CLUSTER / "grafana.json").read_text(encoding="utf-8"))
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b((?:ray|autoscaler)_\w+)\{", target["expr"])
    }
    ours = {name.removeprefix("ray_umarvel_") for name in asked if name.startswith("ray_umarvel_")}
    assert ours and ours <= published
    [package] = importlib.util.find_spec("ray").submodule_search_locations  # type: ignore[union-attr]
    folder = Path(package) / "dashboard" / "modules" / "metrics" / "dashboards"
    theirs = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    for name in asked - {f"ray_umarvel_{own}" for own in ours}:
        assert name in theirs, f"no board of Ray's own asks for {name}"
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.fixture
def spot(tmp_path):
    """Runs watch_spot.sh with stand-ins for curl and Ray: the notice comes at the third look."""

    def run(cloud: str) -> tuple[Any, str]:
        count, told = tmp_path / "count", tmp_path / "told"
        curl = (
            f'[[ "$*" == *latest/api/token* ]] && echo token && exit 0\n'
            f"echo x >> {count}; [[ $(wc -l < {count}) -ge 3 ]] || exit 22\n"
            '[[ "$*" == *preempted* ]] && echo TRUE || true'
        )
        for name, body in (("curl", curl), ("ray", f'echo "$*" > {told}')):
            (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        done = subprocess.run(
            ["bash", str(CLUSTER / "watch_spot.sh"), cloud],
            env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "UMARVEL_WATCH_EVERY": "0.01"},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done, told.read_text() if told.exists() else ""

    return run


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 115), ("gcp", 25)])
def test_ray_hears_that_a_spot_machine_goes(spot, cloud, seconds):
    done, told = spot(cloud)
    assert done.returncode == 0, done.stderr
    assert told.startswith("drain-node --reason DRAIN_NODE_REASON_PREEMPTION ")
    assert told.rstrip().endswith(f"--deadline-remaining-seconds {seconds}")


def test_a_spot_watcher_wants_a_cloud(spot):
    done, told = spot("moon")
    assert (done.returncode, told) == (2, "") and "no cloud named" in done.stderr


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh with stand-ins for SLURM and Ray; gives the finished process and what they noted."""
    bin_folder, submit = tmp_path / "bin", tmp_path / "submit"
    venv = submit / ".venv" / "bin"
    for folder in (bin_folder, venv):
        folder.mkdir(parents=True)
    notes = tmp_path / "notes"

    def program(path: Path, body: str) -> None:
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    program(bin_folder / "scontrol", "printf 'node1\\nnode2\\n'")
    program(bin_folder / "hostname", "echo '10.0.0.1 10.1.0.1'")
    # srun: drops its own options, runs the rest.
    program(bin_folder / "srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')

    def run(*arguments: str, status: int = 0, ray_starts: bool = True) -> tuple[Any, list[str]]:
        start = 'while [[ $1 != -- ]]; do shift; done; shift; "$@"' if ray_starts else "true"
        program(
            bin_folder / "ray",
            f'echo "ray $*" >> {notes}\n'
            f'echo "mode $RAY_AUTH_MODE token $(cat $RAY_AUTH_TOKEN_PATH)" >> {notes}\n'
            f"{start}",
        )
        program(venv / "umarvel", f'echo "umarvel at $RAY_ADDRESS:" "$@" >> {notes}; exit {status}')
        environment = {
            **os.environ,
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(submit),
            "SLURM_JOB_ID": "17",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_GPUS_ON_NODE": "8",
        }
        done = subprocess.run(
            ["bash", str(CLUSTER / "slurm.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert not list(submit.glob(".umarvel-*")), "the token must not outlive the job"
        return done, notes.read_text().splitlines() if notes.exists() else []

    return run


@pytest.mark.parametrize("status", [0, 2, 137])
def test_slurm_hands_on_how_the_run_ended(slurm, status):
    done, notes = slurm("configs/run.yaml", "note=two words", status=status)
    assert done.returncode == status, done.stderr
    assert notes[0].startswith("ray symmetric-run --address 10.0.0.1:6379 --min-nodes 2 ")
    assert "--num-cpus=64 --num-gpus=8 -- " in notes[0]
    assert re.fullmatch(r"mode token token [0-9a-f]{64}", notes[1])
    assert notes[2] == "umarvel at 10.0.0.1:6379: run configs/run.yaml note=two words"


def test_slurm_fails_where_ray_did_not_start(slurm):
    """`ray symmetric-run` itself ends with 0 then."""
    done, _ = slurm("configs/run.yaml", ray_starts=False)
    assert done.returncode == 1
    assert "Ray did not start on all nodes" in done.stderr


def test_slurm_wants_a_config(slurm):
    done, notes = slurm()
    assert (done.returncode, notes) == (2, [])
    assert "no config given" in done.stderr


@pytest.fixture
def slurm_array(tmp_path):
    """Runs slurm_embed.sh as one task of an array; gives the finished process and what umarvel was told."""
    venv = tmp_path / ".venv" / "bin"
    venv.mkdir(parents=True)
    told = tmp_path / "told"
    (venv / "umarvel").write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" > {told}\n')
    (venv / "umarvel").chmod(0o755)

    def run(*arguments: str, task: int = 5) -> tuple[Any, list[str]]:
        environment = {
            **os.environ,
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_TMPDIR": str(tmp_path / "scratch"),
            "SLURM_ARRAY_JOB_ID": "17",
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_MIN": "4",
            "SLURM_ARRAY_TASK_COUNT": "16",
        }
        done = subprocess.run(
            ["bash", str(CLUSTER / "slurm_embed.sh"), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert not list((tmp_path / "scratch").glob("*"))
        return done, told.read_text().splitlines() if told.exists() else []

    return run


def test_a_task_of_an_array_takes_its_part(slurm_array):
    done, told = slurm_array("embed.yaml", "note=two words")
    assert done.returncode == 0, done.stderr
    assert told == ["embed", "embed.yaml", "note=two words", "only.part=1/16"]


def test_the_last_task_takes_what_is_left_and_finishes(slurm_array):
    done, told = slurm_array("embed.yaml", "only.part=all")
    assert done.returncode == 0, done.stderr
    assert told == ["embed", "embed.yaml"]
    done, _ = slurm_array()
    assert done.returncode == 2 and "no config given" in done.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cpu"])
def test_images_run_as_an_ordinary_user_and_copy_what_the_context_holds(name):
    lines = (CLUSTER / name).read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("USER")][-1] == "USER ray"
    assert not [line for line in lines if line.startswith("ADD ")]
    let_through = {
        line.removeprefix("!")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line[:1] == "!"
    }
    for line in lines:
        if line.startswith("COPY"):
            sources = [part for part in line.split()[1:-1] if not part.startswith("--")]
            assert {s if s in let_through else s.split("/")[0] for s in sources} <= let_through, line
