#!/usr/bin/env python3
"""Makes docs/VALUES.md from the comments of the chart's values.yaml; with --check only says whether it is up to date.

A value is documented by a comment `# -- …` above its key, as helm-docs reads it too. One without is an error.
"""

import json
import pathlib
import re
import sys

import yaml

REPO = pathlib.Path(__file__).resolve().parents[2]
VALUES = REPO / "deploy/helm/clip-csi/values.yaml"
DOCUMENT = REPO / "docs/VALUES.md"
HEAD = """# Values of the Helm chart

Made from `deploy/helm/clip-csi/values.yaml` by `deploy/helm/values_doc.py`: change it there. A key that is not listed is refused
(`values.schema.json`). A default of `null` leaves the driver's own default, which [CONFIGURATION.md](CONFIGURATION.md) gives.
"""


def comments(text: str) -> dict[tuple[str, ...], str]:
    """The comment above each key that has one, by the key's path. Lists are values: their insides are not keys."""
    out: dict[tuple[str, ...], str] = {}
    stack: list[tuple[int, str]] = []
    pending = ""
    for line in text.splitlines():
        if match := re.match(r"\s*# -- (.*)", line):
            pending = match.group(1).strip()
        elif match := re.match(r"( *)([A-Za-z][A-Za-z0-9]*):", line):
            indent = len(match.group(1))
            stack = [it for it in stack if it[0] < indent] + [(indent, match.group(2))]
            if pending:
                out[tuple(name for _, name in stack)] = pending
            pending = ""
    return out


def leaves(values: dict, documented: dict, path: tuple[str, ...] = ()):
    """Paths and defaults of all values: what has a comment is one as a whole, whatever it contains."""
    for name, value in values.items():
        here = (*path, name)
        if isinstance(value, dict) and value and here not in documented:
            yield from leaves(value, documented, here)
        else:
            yield here, value


def document() -> str:
    text = VALUES.read_text(encoding="utf-8")
    documented = comments(text)
    parts, section = [HEAD], None
    for path, default in leaves(yaml.safe_load(text), documented):
        if path not in documented:
            raise SystemExit(f"values_doc.py: {'.'.join(path)} has no comment `# -- …` in {VALUES.relative_to(REPO)}")
        group = path[0] if len(path) > 1 else "general"
        if group != section:
            section = group
            parts.append(f"\n## {section}\n\n| value | default | meaning |\n|---|---|---|\n")
        meaning = documented[path].replace("|", "\\|")
        shown = json.dumps(default, ensure_ascii=False)
        parts.append(f"| `{'.'.join(path)}` | `{shown}` | {meaning} |\n")
    return "".join(parts)


def main() -> None:
    made = document()
    if sys.argv[1:] == ["--check"]:
        if not DOCUMENT.exists() or DOCUMENT.read_text(encoding="utf-8") != made:
            raise SystemExit("values_doc.py: docs/VALUES.md is not what values.yaml says: run deploy/helm/values_doc.py")
    elif sys.argv[1:]:
        raise SystemExit("usage: values_doc.py [--check]")
    else:
        DOCUMENT.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
