"""The files under launch/ are what their readers take: the shell, the hostfile's reader, Kubernetes and the training
operator.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.cli import make_parser
from sft.launcher.hostfile import read_hostfile

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
_IMAGE = "sft:latest"


def documents() -> list[dict[str, Any]]:
    return [
        document
        for file in sorted((LAUNCH / "kubernetes").glob("*.yaml"))
        for document in yaml.safe_load_all(file.read_text())
    ]


def one(kind: str) -> dict[str, Any]:
    (found,) = [document for document in documents() if document["kind"] == kind]
    return found


@pytest.mark.parametrize("name", ["slurm.sbatch", "torchrun.sh"])
def test_scripts_pass_shellcheck(name: str):
    program = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, "--shell=bash", LAUNCH / name], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pod_s_script_passes_shellcheck():
    container = one("PyTorchJob")["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    program = Path(sys.executable).with_name("shellcheck")
    command = [program, "--shell=bash", "--exclude=SC2086", "-"]  # numbers need no quotes
    done = subprocess.run(command, input=container["args"][0], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_core_kinds_follow_kubernetes_schema():
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents():
        if document["apiVersion"].partition("/")[0] != "kubeflow.org":
            validate.validate(document, validate.latest_version(), strict=True)
    for spec in one("PyTorchJob")["spec"]["pytorchReplicaSpecs"].values():
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "x", **spec["template"]["metadata"]},
            "spec": spec["template"]["spec"],
        }
        validate.validate(pod, validate.latest_version(), strict=True)


def test_the_job_follows_the_training_operator_s_schema():
    models = pytest.importorskip("kubeflow.training.models")
    job = one("PyTorchJob")
    assert job["apiVersion"] == "kubeflow.org/v1"
    wrong = list(_unknown(models, job, "KubeflowOrgV1PyTorchJob", "job"))
    assert not wrong, wrong
    assert list(_unknown(models, {**job, "spec": {**job["spec"], "nproc": 8}}, "KubeflowOrgV1PyTorchJob", "job")) == [
        "job.spec.nproc"
    ]


def _unknown(models: Any, value: Any, kind: str, where: str) -> Any:
    """Keys that the operator's own classes lack, and values of another type than theirs."""
    inner = re.fullmatch(r"dict\(str, (\w+)\)|list\[(\w+)\]", kind)
    if inner and inner[1]:
        for key, part in value.items():
            yield from _unknown(models, part, inner[1], f"{where}.{key}")
    elif kind in ("str", "int", "bool"):
        if type(value).__name__ != kind:
            yield f"{where} is no {kind}"
    elif hasattr(models, kind):
        known = getattr(models, kind)
        fields = {shown: known.openapi_types[name] for name, shown in known.attribute_map.items()}
        for key, part in value.items():
            yield from _unknown(models, part, fields[key], f"{where}.{key}") if key in fields else [f"{where}.{key}"]


def test_all_name_the_same_things():
    """Labels that the network policy selects, the volume that pods mount, the image that is built."""
    job, policy, claim = one("PyTorchJob"), one("NetworkPolicy"), one("PersistentVolumeClaim")
    for spec in job["spec"]["pytorchReplicaSpecs"].values():
        template = spec["template"]
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        claims = [
            volume["persistentVolumeClaim"]["claimName"]
            for volume in template["spec"]["volumes"]
            if "persistentVolumeClaim" in volume
        ]
        assert claims == [claim["metadata"]["name"]]
        assert [container["image"] for container in template["spec"]["containers"]] == [_IMAGE]
    assert f"docker build -t {_IMAGE} -f launch/Dockerfile ." in (LAUNCH / "Dockerfile").read_text()


def test_the_image_is_made_of_files_that_there_are_and_versions_that_are_supported():
    text = (LAUNCH / "Dockerfile").read_text()
    sources = [word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert [source for source in sources if not (ROOT / source).exists()] == []
    extras = re.search(r"pip install '\.\[([\w,]+)\]'", text)
    assert extras is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(extras[1].split(",")) <= project["optional-dependencies"].keys()
    version = re.search(r"FROM pytorch/pytorch:(\d+)\.(\d+)", text)
    assert version is not None
    assert (int(version[1]), int(version[2])) >= (2, 11)


def test_the_example_of_a_hostfile_is_one():
    hosts = read_hostfile(LAUNCH / "hostfile")
    assert [one.slots for one in hosts] == [8] * 8


def test_every_sft_command_line_has_flags_that_there_are(capsys: pytest.CaptureFixture[str]):
    """Of scripts, pods and the page that explains them."""
    from sft.config.flags import add_flags

    parser = make_parser()
    add_flags(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    text = "\n".join(file.read_text() for file in LAUNCH.rglob("*") if file.is_file())
    used = {
        word
        for line in text.replace("\\\n", " ").splitlines()
        if re.search(r"(^|[\s'])sft (--|\"|\.\.\.)", line)
        for word in _flags(line)
    }
    assert len(used) > 8
    assert used - known == set()


def _flags(line: str) -> list[str]:
    line = line[re.search(r"(^|[\s'])sft ", line).start() :]  # type: ignore[union-attr]
    line = re.sub(r"[`'\"|$]", " ", line)
    return [
        word.partition("=")[0] for word in shlex.split(line, comments=False) if word.startswith("--") and word != "--"
    ]
