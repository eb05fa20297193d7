"""Execute notebooks where they stand, and store what they showed: outputs, but no widgets and no clock times.

Widgets are left out because GitHub refuses to render their state; what they said of progress is over anyway.
Where the app would be, those who read without a kernel see a picture of it.

    python notebooks/execute.py notebooks/*.ipynb
"""

import sys
from base64 import encodebytes
from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"


def picture(path: Path) -> nbformat.NotebookNode:
    """Return a picture as a cell's output."""
    data = {"image/png": encodebytes(path.read_bytes()).decode(), "text/plain": "a picture of the app"}
    return nbformat.v4.new_output("display_data", data)


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, resources=resources, store_widget_state=False, record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
            if "ShardApp(" in cell.source:
                cell.outputs = [picture(path.with_name("app.png"))]
    notebook.metadata = {key: notebook.metadata[key] for key in ("kernelspec", "language_info")}
    notebook.metadata["language_info"] = {"name": "python"}
    nbformat.validate(notebook)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(name)
        execute(Path(name))
