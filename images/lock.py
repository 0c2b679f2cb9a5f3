"""Write what the images install: `cpu.lock` and `cuda.lock`, every file with its SHA-256 (`make lock`).

Rules:

- The versions are those of constraints.txt, which the tests ran with; what constraints.txt does not name (CUDA's
  libraries) is chosen here and held by its hash.
- What no part of ours imports is left out, and is named in the lock's first lines.
- `cpu.lock` holds no hash for torch: each package index builds its own CPU wheel of that version. `make wheelhouse`
  takes torch by its version, everything else by its hash.

Needs uv (Flower brings it into .venv) and a package index.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = re.compile(r"(nvidia|cuda)-.*|triton")
LEFT_OUT = {
    "cuda": {"uv": "Flower installs an app's requirements with it; no app code comes over the network here"},
    "cpu": {
        "uv": "Flower installs an app's requirements with it; no app code comes over the network here",
        "torchvision": "indexes offer a CUDA build that does not load beside a CPU torch",
        "timm": "only nnU-Net's transformer trainers need it, which need torchvision",
    },
}


def compiled(variant: str) -> str:
    """The lock of one variant, as text.

    Parameters
    ----------
    variant : str
        ``cpu`` or ``cuda``.
    """
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        overrides.write_text("".join(f"{name} ; python_version < '3'\n" for name in LEFT_OUT[variant]))
        command = [
            *(str(Path(sys.executable).with_name("uv")), "pip", "compile", "pyproject.toml", "--quiet"),
            *("--extra", "appliance", "--extra", "orchestrator", "--constraint", "constraints.txt"),
            *("--override", str(overrides), "--generate-hashes", "--no-header", "--no-annotate"),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
        ]
        text = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout
    entries = re.findall(r"^([a-z0-9][\w.-]*)==(\S+)((?: \\\n    --hash=\S+)+)", text, re.MULTILINE)
    if variant == "cpu":
        entries = [entry for entry in entries if entry[0] != "torch" and not CUDA.fullmatch(entry[0])]
    lines = [f"# What the {variant} images install. Written by images/lock.py: run `make lock`."]
    lines += [f"# Left out: {name}: {why}." for name, why in LEFT_OUT[variant].items()]
    lines += [f"{name}=={version}{hashes}" for name, version, hashes in entries]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for chosen in LEFT_OUT:
        (Path(__file__).parent / f"{chosen}.lock").write_text(compiled(chosen), encoding="utf-8")
        print(f"wrote images/{chosen}.lock")
