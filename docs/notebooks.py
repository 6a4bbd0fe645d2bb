"""``pages``: the notebooks as pages of the site, with the outputs that they hold."""

import base64
import json
import pathlib
import re
from collections.abc import Iterator

ELSEWHERE = re.compile(r"\[([^]]+)\]\(\.\./(\w+/[^)]*/[^)]*)\)")
FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"


def paths() -> list[pathlib.Path]:
    """All of them, in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def navigation() -> list[dict[str, str]]:
    """A title and a page for every notebook."""
    return [{title(path): f"notebooks/{path.stem}.md"} for path in paths()]


def title(path: pathlib.Path) -> str:
    """The notebook's first heading."""
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    return first.partition("\n")[0].removeprefix("# ")


def pages() -> Iterator[tuple[str, str | bytes]]:
    """Names in the site's folder, each with its content: pages and their pictures."""
    for path in paths():
        parts, heading = [], title(path)
        for number, cell in enumerate(json.loads(path.read_text())["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                found = re.findall(r"^#+ (.*)$", source, flags=re.MULTILINE)
                heading = found[-1] if found else heading
                # From the notebook's folder to the site's; what it lacks is named.
                source = source.replace("](../docs/", "](../")
                parts.append(ELSEWHERE.sub(r"\1 (`\2`)", source))
                if number == 0:
                    parts.append(
                        f"This is `notebooks/{path.name}`, as it was last run."
                    )
                continue
            parts.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                data = output.get("data", {})
                if "image/png" in data:
                    picture = f"{path.stem}-{number}.png"
                    yield f"notebooks/{picture}", base64.b64decode(data["image/png"])
                    parts.append(f"![{heading}: what the lines above draw]({picture})")
                    continue
                text = "".join(output.get("text", data.get("text/plain", "")))
                if text.strip():
                    parts.append(f"```text\n{text.rstrip()}\n```")
        yield f"notebooks/{path.stem}.md", "\n\n".join(parts) + "\n"
