#!/usr/bin/env bash
# axolotl documents BasePlugin.create_optimizer(cfg, trainer), "Creates and returns an optimizer for training", and its
# PluginManager has a method that asks every plugin for one. Nothing in the package calls that method: a plugin's
# optimizer is left out without a word, and the run trains with the one of its configuration. What works is to set
# trainer.optimizer_cls_and_kwargs in post_trainer_create.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps axolotl==0.19.0
"$folder/venv/bin/python" - <<'PY'
import ast
import sysconfig
from pathlib import Path

package = Path(sysconfig.get_path("purelib")) / "axolotl"
calls, defined = [], []
for path in sorted(package.rglob("*.py")):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "create_optimizer":
            defined.append(f"{path.relative_to(package)}:{node.lineno}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "create_optimizer":
            calls.append(f"{path.relative_to(package)}:{node.lineno}: {ast.unparse(node)}")
print("defined:", *defined, sep="\n  ")
print("called:", *calls, sep="\n  ")
of_plugins = [call for call in calls if "super()" not in call]
assert sum("integrations/base.py" in place for place in defined) == 2, "the behaviour has changed"
assert [call.split(": ")[1] for call in of_plugins] == ["plugin.create_optimizer(self.cfg, trainer)"], (
    "the behaviour has changed"
)
print("as described: only PluginManager.create_optimizer asks plugins, and nothing asks it")
PY
