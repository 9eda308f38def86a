"""A notebook with its outputs becomes a page of the site; a link to it leads there."""
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter


def on_files(files: Files, *, config: Any) -> Files:
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name = notebook.src_uri.removesuffix(".ipynb")
        folder = {"output_files_dir": f"{Path(name).name}_files"}
        text, found = MarkdownExporter().from_filename(notebook.abs_src_path, resources=folder)
        files.append(File.generated(config, f"{name}.md", content=text))
        for picture, data in found["outputs"].items():
            files.append(File.generated(config, str(Path(name).parent/picture), content=data))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(".ipynb)", ".md)")
