"""The reference shows what stands behind an attribute as a comment: `cells: int  # in use`, and the comments below it."""
import re
from typing import Any

import griffe

COMMENT = re.compile(r"(?:^|\s\s)# ?(.*)$")


class Comments(griffe.Extension):
    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring or attr.lineno is None or not isinstance(attr.parent, griffe.Class):
            return
        lines = attr.lines_collection[attr.filepath]
        found = COMMENT.search(lines[attr.lineno - 1])
        said = [found[1]] if found else []
        for line in lines[attr.endlineno or attr.lineno:]:
            if not line.lstrip().startswith("#"):
                break
            said.append(line.strip().lstrip("# "))
        if said:
            attr.docstring = griffe.Docstring(" ".join(said).strip(), parent=attr)
