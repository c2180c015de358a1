"""vLLM is imported by the modules made for it only; the proxy starts without torch."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Modules called vllm*, and the plug-in, whose whole folder is loaded inside vLLM.
ADAPTERS = ("libs/engine/src/omni_engine/vllm", "libs/omni_kernels/src/omni_kernels/quantize/vllm")
PLUGIN = "libs/omni_kernels/src/omni_kernels/vllm/"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_only_modules_made_for_it_import_vllm() -> None:
    sources = [p for d in ("libs", "services", "cli") for p in (ROOT / d).rglob("src/**/*.py")]
    paths = {str(p.relative_to(ROOT)) for p in sources if "vllm" in imports(p)}
    offenders = {path for path in paths if not path.startswith((*ADAPTERS, PLUGIN))}
    assert not offenders


def test_services_that_need_no_engine_start_without_torch() -> None:
    for module in ("omni_proxy.app", "omni_kvstore.app", "omni_placement.app", "omni_cli.main"):
        code = f"import {module}, sys; sys.exit(bool({{'torch', 'vllm'}} & sys.modules.keys()))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{module} imports torch or vllm {done.stderr[-500:]}"
