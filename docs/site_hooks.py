"""What the site needs beyond docs/: files elsewhere in the repository that pages link to, whole examples."""

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(r"\]\(((?:\.\./)+)((?:bench|examples|python|tests)/[^)#\s]+|[A-Z]+\.md)(#[^)]*)?\)")
EXAMPLE = re.compile(r"^\[`?examples/(\w+\.py)`?\]\([^)]*\)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/, at the same path under `repository/`."""
    for page in list(files.documentation_pages()):
        for _, target, _ in OUTSIDE.findall(Path(page.abs_src_path or "").read_text(encoding="utf-8")):
            uri = f"repository/{target}"
            if uri not in files.src_uris and (ROOT / target).is_file():
                # As text, and no page of its own: links inside of it lead to places that are not in the site.
                added = File.generated(
                    config, uri + ".txt" if uri.endswith(".md") else uri, abs_src_path=ROOT / target
                )
                if added.src_uri not in files.src_uris:
                    files.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leads those links there, and shows examples where they are named on a line of their own."""
    here = os.path.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        uri = f"repository/{match[2]}"
        uri += ".txt" if uri.endswith(".md") else ""
        if uri not in files.src_uris:  # strict mode reports it
            return match[0]
        return f"]({os.path.relpath(uri, here or '.')})"

    def whole(match: re.Match[str]) -> str:
        source = (ROOT / "examples" / match[1]).read_text(encoding="utf-8").strip()
        indented = "\n".join(f"    {line}".rstrip() for line in f"```python\n{source}\n```".splitlines())
        return f'??? example "examples/{match[1]}"\n\n{indented}\n'

    return OUTSIDE.sub(inside, EXAMPLE.sub(whole, markdown))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Drops the roles that docstrings have for other renderers: `:func:` before a name."""
    return re.sub(r":(?:func|class|meth|mod|attr):(?=<)", "", html)
