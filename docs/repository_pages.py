"""Pages and pictures of the repository that stand outside docs/, as parts of the site (a hook of mkdocs)."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BROUGHT = ("*.md", "bench/README.md", "kernels/README.md", "bench/results/*.png", "notebooks/*.ipynb")


def on_files(files: Files, config: Any) -> Files:
    """The site's files and those of BROUGHT, each at its place below the root."""
    for pattern in BROUGHT:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            if name not in ("README.md", "AGENTS.md"):
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as the site has them: docs/ is its root, so `../` from there and `docs/` elsewhere fall away."""
    below = page.file.src_uri.count("/")
    if Path(page.file.abs_src_path).is_relative_to(ROOT / "docs"):
        return re.sub(rf"\]\((?:\.\./){{{below + 1}}}(?=\w)", "](" + "../" * below, markdown)
    return re.sub(r"\]\(((?:\.\./)*)docs/", r"](\1", markdown)
