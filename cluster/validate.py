"""Check cluster files before a cloud bill does: every key known, every value of its kind.

python cluster/validate.py                                    # all files of this folder
python cluster/validate.py --crd ray.io_rayclusters.yaml kuberay-cluster.yaml

Without `--crd` KubeRay files are held against a schema of the keys that this project uses. With one or more
custom resource definitions (from KubeRay's `config/crd/bases`) they are held against the whole of them too.
Files of `ray up` are prepared and validated by Ray's own functions, the Grafana board against what an import
needs, shell scripts by `bash -n`; and every file is searched for secrets.
"""

import argparse
import copy
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
SECRET = re.compile(
    r"(AKIA[0-9A-Z]{16}|-----BEGIN|\bghp_\w{20,}|auth_token: *[0-9a-f]{16,}|RAY_AUTH_TOKEN=[0-9a-fA-F]{8,}"
    r"|aws_secret_access_key *[:=] *\S+)"
)


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
    {
        "ports": array(closed({"name": TEXT, "containerPort": COUNT})),
        "lifecycle": closed({"preStop": closed({"exec": closed({"command": array(TEXT)})})}),
    },
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
METADATA = closed({"name": TEXT}, {"labels": TEXTS})
SCHEMAS = {
    "RayCluster": closed(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": "RayCluster"},
            "metadata": METADATA,
            "spec": RAY_CLUSTER_SPEC,
        }
    ),
    "RayJob": closed(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": "RayJob"},
            "metadata": METADATA,
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
    ),
    "PodMonitor": closed(
        {
            "apiVersion": {"const": "monitoring.coreos.com/v1"},
            "kind": {"const": "PodMonitor"},
            "metadata": METADATA,
            "spec": closed(
                {
                    "selector": closed({"matchLabels": TEXTS}),
                    "podMetricsEndpoints": array(closed({"port": TEXT, "interval": TEXT})),
                },
                {"jobLabel": TEXT},
            ),
        }
    ),
}
BOARD = {
    "type": "object",
    "required": ["title", "uid", "schemaVersion", "panels", "templating", "time", "refresh"],
    "properties": {
        "title": TEXT,
        "uid": TEXT,
        "schemaVersion": {"type": "integer", "minimum": 36},
        "panels": array(
            {
                "type": "object",
                "required": ["id", "type", "title", "gridPos", "datasource", "targets"],
                "properties": {
                    "id": COUNT,
                    "type": {"enum": ["timeseries", "stat", "bargauge", "table"]},
                    "title": TEXT,
                    "gridPos": closed({"x": COUNT, "y": COUNT, "w": COUNT, "h": COUNT}),
                    "targets": array(
                        {
                            "type": "object",
                            "required": ["expr", "refId"],
                            "properties": {"expr": TEXT, "refId": TEXT, "legendFormat": {"type": "string"}},
                        }
                    ),
                },
            }
        ),
    },
}
"""What Grafana needs of a board to import it."""


def faults(path: Path, crds: Sequence[dict[str, Any]] = ()) -> list[str]:
    """One line for each thing that is wrong with a cluster file."""
    text = path.read_text(encoding="utf-8")
    found = [
        f"{path.name}: holds what looks like a secret: {m.group(0)[:12]}…" for m in SECRET.finditer(text)
    ]
    if path.suffix == ".sh":
        return found + _bash(path)
    if path.suffix == ".json":
        return found + _against(json.loads(text), BOARD, path.name)
    if path.suffix not in (".yaml", ".yml"):
        return found
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [*found, f"{path.name}: not valid YAML ({' '.join(str(error).split())})"]
    return found + document_faults(document, path.name, crds)


def document_faults(document: Any, name: str, crds: Sequence[dict[str, Any]] = ()) -> list[str]:
    """Faults of a YAML file's content: a Kubernetes object, or a file of `ray up`."""
    if "kind" not in document:
        return ray_up_faults(document, name)
    kind = document["kind"]
    if kind not in SCHEMAS:
        return [f"{name}: kind {kind!r} is not one of {', '.join(SCHEMAS)}"]
    found = _against(document, SCHEMAS[kind], name)
    for crd in crds:
        if crd.get("spec", {}).get("names", {}).get("kind") == kind:
            found += _against(document, crd_schema(crd), name)
    return found


def crd_schema(crd: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of a custom resource definition's stored version, made as strict as the API server.

    The server prunes unknown keys in silence; here they are faults.
    """
    [version] = [one for one in crd["spec"]["versions"] if one["storage"]]
    schema = _strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
    for key in ("apiVersion", "kind", "metadata"):
        schema["properties"].setdefault(key, {})
    return schema


def _strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    free = schema.pop("x-kubernetes-preserve-unknown-fields", False)
    if isinstance(schema.get("properties"), dict):
        schema["properties"] = {key: _strict(value) for key, value in schema["properties"].items()}
        if not free:
            schema.setdefault("additionalProperties", False)
    for key in ("items", "anyOf", "allOf", "oneOf", "additionalProperties"):
        if key in schema:
            schema[key] = _strict(schema[key])
    return schema


def ray_up_faults(document: Any, name: str) -> list[str]:
    """What Ray's own preparation and validation say of a `ray up` file; no cloud is asked."""
    import jsonschema
    from ray.autoscaler._private import util

    try:
        util.validate_config(util.prepare_config(copy.deepcopy(document)))
    except jsonschema.ValidationError as error:
        return [f"{name}: {'.'.join(map(str, error.absolute_path)) or 'top'}: {error.message[:200]}"]
    except Exception as error:
        return [f"{name}: {' '.join(str(error).split())[:200]}"]
    return []


def _against(document: Any, schema: dict[str, Any], name: str) -> list[str]:
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema)
    errors = sorted(validator.iter_errors(document), key=lambda error: str(list(error.absolute_path)))
    return [
        f"{name}: {'.'.join(map(str, error.absolute_path)) or 'top'}: {error.message[:200]}"
        for error in errors
    ]


def _bash(path: Path) -> list[str]:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    return [] if done.returncode == 0 else [f"{path.name}: {' '.join(done.stderr.split())}"]


def main(arguments: Sequence[str]) -> int:
    """Check files; prints each fault and returns 2 where there is one."""
    parser = argparse.ArgumentParser(description="Check cluster files.")
    parser.add_argument("files", nargs="*", type=Path, help="All of this folder by default.")
    parser.add_argument("--crd", action="append", type=Path, default=[], help="A definition of KubeRay's.")
    options = parser.parse_args(arguments)
    crds = [
        doc for path in options.crd for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")) if doc
    ]
    files = options.files or sorted(p for p in HERE.iterdir() if p.suffix in (".yaml", ".sh", ".json"))
    found = [fault for path in files for fault in faults(path, crds)]
    for fault in found:
        print(fault)
    print(f"{len(files)} files, {len(found)} faults")
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
