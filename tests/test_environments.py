"""Dockerfile and environment.yml: what they name is there. Nothing here builds an image or needs conda."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from tests.small_run import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def python_is_supported(version: str) -> bool:
    return f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_the_image_has_a_supported_python_and_the_projects_torch() -> None:
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", DOCKERFILE, re.MULTILINE)
    assert python_is_supported(version)
    (torch,) = re.findall(r'^ARG TORCH="(.*)"$', DOCKERFILE, re.MULTILINE)
    assert [torch] == PROJECT["dependencies"]


def test_the_image_installs_extras_that_there_are_after_copying_the_tree() -> None:
    (extras,) = re.findall(r"^ARG EXTRAS=(.*)$", DOCKERFILE, re.MULTILINE)
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    assert DOCKERFILE.index("COPY . .") < DOCKERFILE.index('--editable ".[$EXTRAS]"')


def test_the_instructions_are_ones_that_docker_knows() -> None:
    joined = DOCKERFILE.replace("\\\n", "")
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    known = {"FROM", "RUN", "WORKDIR", "ARG", "COPY", "ENV", "CMD"}
    assert lines[0].startswith("FROM ") and {line.split()[0] for line in lines} == known
    for line in lines:
        if line.startswith("RUN "):
            shlex.split(line)  # quotes are closed
    assert re.search(r'^CMD \["qgalore", "--help"\]$', DOCKERFILE, re.MULTILINE)


def test_scripts_of_the_usage_are_there_and_in_the_image() -> None:
    scripts = re.findall(r"qgalore bash (\S+)", DOCKERFILE)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    left_out = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    needed = {"LICENSE", "README.md", "configs", "peft_pretraining", "pyproject.toml", "qgalore", "run_pretrain.py"}
    assert not {*needed, "scripts", "setup.py"} & set(left_out) and ".venv" in left_out


def test_the_environment_of_conda_has_a_supported_python_and_the_projects_extras() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, packages = found["dependencies"]
    assert python_is_supported(python.removeprefix("python=")) and pip == "pip"
    (extras,) = re.fullmatch(r"-e \.\[(.*)\]", *(line.replace('"', "") for line in packages["pip"])).groups()  # type: ignore[union-attr]
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
