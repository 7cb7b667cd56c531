"""Finding what an earlier run left that a later one can take over."""

import json
from typing import Any

from cluster.artifacts import MANIFEST, Output, Stage, filesystem, outputs_of


def earlier_output(stage: Stage, root: str) -> tuple[Output, dict[str, Any]] | None:
    """The newest finished output of the same instance, code version and settings but of other parents, and its manifest."""
    own = stage.output(root)
    wanted = json.loads(json.dumps({"instance": stage.instance, "version": stage.version, "settings": stage.settings}))
    system, _ = filesystem(root)
    found = []
    for output in outputs_of(root, stage.kind):
        manifest = output.manifest() if output != own else None
        if manifest is not None and all(manifest[name] == value for name, value in wanted.items()):
            found.append((system.get_file_info(output.path(MANIFEST)).mtime_ns, output, manifest))
    return max(found, key=lambda entry: entry[0])[1:] if found else None
