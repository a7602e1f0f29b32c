"""The cluster files: every key is known, Ray can read every group, and a failed run is a failed job."""

import copy
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"


def load(name: str) -> Any:
    """A cluster file as data."""
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def closed(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object that has these keys and no others."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
    }


def array(item: dict[str, Any]) -> dict[str, Any]:
    """A list of at least one."""
    return {"type": "array", "items": item, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
YES = {"const": True}
# Kubernetes refuses 1.5 and yes here: start parameters are strings all through.
TEXTS = {"type": "object", "additionalProperties": TEXT}
SIZE = {"type": "string", "pattern": r"^[0-9]+(Mi|Gi)$"}
AMOUNTS = closed({"cpu": TEXT, "memory": SIZE}, {"nvidia.com/gpu": {"type": "string", "pattern": "^[0-9]+$"}})
RESOURCES = closed({"requests": AMOUNTS, "limits": AMOUNTS})
CONTAINER = closed(
    {
        "name": TEXT,
        "image": {"type": "string", "pattern": r"^[^:]+:[^:]+$"},
        "securityContext": closed(
            {"allowPrivilegeEscalation": {"const": False}, "capabilities": closed({"drop": array(TEXT)})}
        ),
        "env": array(closed({"name": TEXT, "value": TEXT})),
        "resources": RESOURCES,
        "volumeMounts": array(closed({"name": TEXT, "mountPath": TEXT})),
    },
    {"ports": array(closed({"name": TEXT, "containerPort": COUNT}))},
)
VOLUME = closed(
    {"name": TEXT},
    {
        "emptyDir": closed({"sizeLimit": SIZE}, {"medium": {"const": "Memory"}}),
        "persistentVolumeClaim": closed({"claimName": TEXT}),
    },
)
POD = closed(
    {
        # Autoscaler v2 counts a restarted pod as the node it lost.
        "restartPolicy": {"const": "Never"},
        "securityContext": closed(
            {"runAsNonRoot": YES, "runAsUser": {"const": 1000}, "runAsGroup": COUNT, "fsGroup": COUNT}
        ),
        "containers": array(CONTAINER),
        "volumes": array(VOLUME),
    },
    {
        "terminationGracePeriodSeconds": COUNT,
        "nodeSelector": TEXTS,
        "tolerations": array(closed({"key": TEXT, "operator": TEXT, "effect": TEXT})),
    },
)
WORKERS = closed(
    {
        "groupName": TEXT,
        "replicas": COUNT,
        "minReplicas": COUNT,
        "maxReplicas": {"type": "integer", "minimum": 1},
        "idleTimeoutSeconds": COUNT,
        "rayStartParams": TEXTS,
        "template": closed({"spec": POD}),
    },
    {"priority": COUNT},
)
RAY_CLUSTER_SPEC = closed(
    {
        "rayVersion": TEXT,
        "authOptions": closed({"mode": {"const": "token"}}),
        "enableInTreeAutoscaling": YES,
        "autoscalerOptions": closed(
            {
                "version": {"const": "v2"},
                "upscalingMode": {"enum": ["Default", "Conservative", "Aggressive"]},
                "idleTimeoutSeconds": COUNT,
                "resources": RESOURCES,
            }
        ),
        "headGroupSpec": closed({"rayStartParams": TEXTS, "template": closed({"spec": POD})}),
        "workerGroupSpecs": array(WORKERS),
    }
)
RAY_CLUSTER = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayCluster"},
        "metadata": closed({"name": TEXT}),
        "spec": RAY_CLUSTER_SPEC,
    }
)
RAY_JOB = closed(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayJob"},
        "metadata": closed({"name": TEXT}),
        "spec": closed(
            {
                "entrypoint": TEXT,
                "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
                "backoffLimit": COUNT,
                "preRunningDeadlineSeconds": COUNT,
                "activeDeadlineSeconds": COUNT,
                "shutdownAfterJobFinishes": {"type": "boolean"},
                "ttlSecondsAfterFinished": COUNT,
                "runtimeEnvYAML": TEXT,
                "rayClusterSpec": RAY_CLUSTER_SPEC,
            }
        ),
    }
)


def bytes_of(size: str) -> int:
    """`16Gi` → bytes."""
    return int(size[:-2]) * {"Mi": 2**20, "Gi": 2**30}[size[-2:]]


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Group name → group, with the head as `head`."""
    return {
        "head": spec["headGroupSpec"],
        **{group["groupName"]: group for group in spec["workerGroupSpecs"]},
    }


@pytest.mark.parametrize(
    ("name", "schema"), [("kuberay-cluster.yaml", RAY_CLUSTER), ("kuberay-job.yaml", RAY_JOB)]
)
def test_kuberay_files_have_known_keys_only(name, schema):
    jsonschema.validate(load(name), schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["spec", "workerGroupSpecs", 0, "idleTimeoutSecond"], 60),
        (["spec", "workerGroupSpecs", 1, "replicas"], "x"),
        (["spec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["spec", "authOptions", "mode"], "disabled"),
        (["spec", "autoscalerOptions", "version"], "v1"),
        (["apiVersion"], "ray.io/v1alpha1"),
        (["spec", "headGroupSpec", "template", "spec", "restartPolicy"], "Always"),
        (["spec", "workerGroupSpecs", 0, "template", "spec", "securityContext", "runAsUser"], 0),
    ],
)
def test_a_planted_fault_is_caught(path, value):
    document = copy.deepcopy(load("kuberay-cluster.yaml"))
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, RAY_CLUSTER)


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


@pytest.fixture
def ray_up():
    """Ray's own preparation and validation of a `ray up` file, with no call to a cloud."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    if not hasattr(util, "prepare_config") or not hasattr(util, "validate_config"):
        pytest.skip("this Ray has no prepare_config and validate_config")

    def check(config: dict[str, Any]) -> dict[str, Any]:
        prepared = util.prepare_config(copy.deepcopy(config))
        util.validate_config(prepared)
        return prepared

    return check


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_ray_up_accepts_the_file(ray_up, name):
    prepared = ray_up(load(name))
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


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
@pytest.mark.parametrize(
    ("key", "value"), [("idle_timeout_minute", 5), ("head_node_type", "boss"), ("max_workers", "many")]
)
def test_ray_up_refuses_a_planted_fault(ray_up, name, key, value):
    with pytest.raises((ValueError, TypeError, jsonschema.ValidationError)):
        ray_up({**load(name), key: value})


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


def test_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


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
            assert {source.split("/")[0] for source in sources} <= let_through, line


def test_no_file_holds_a_secret():
    secret = re.compile(
        r"(AKIA[0-9A-Z]{16}|-----BEGIN|auth_token: *[0-9a-f]{16,}|RAY_AUTH_TOKEN=[0-9a-fA-F]{8,})"
    )
    for path in CLUSTER.iterdir():
        assert not secret.search(path.read_text(encoding="utf-8")), path.name
