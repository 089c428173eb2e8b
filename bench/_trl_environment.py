"""The environment that TRL runs in, apart from this project's; made once and kept."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
PACKAGES = ("trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0")
FOLDER = Path(__file__).parents[1] / ".venv-trl"


def trl_python(folder: Path = FOLDER) -> Path:
    """The interpreter of an environment that has TRL, made in `folder` where it is not there yet.

    torch is installed first and alone, so that no other package's range brings in a build for GPUs.

    Raises:
        subprocess.CalledProcessError: the environment could not be made, because the package index cannot
            be reached, say.
    """
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = hashlib.sha256(" ".join((TORCH, *PACKAGES)).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the environment of TRL in {folder} (once)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    for packages in ((TORCH,), PACKAGES):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    stamp.write_text(wanted)
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions of what was installed for the race."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({p: m.version(p) for p in ('torch', 'trl', 'transformers', 'accelerate')}))"
    )
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)
