"""Writes docs/meta-benchmark.md: mediation bench meta --json | python docs/make_meta_benchmark.py"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TEXT = """# Which meta-dictionary names the planted fact?

Rows of width 128 whose facts are known, decomposed by every method; parts are named on one half of the rows and scored
on the other. The figure is the share of (row, attribute) whose first part is named by the right attribute *and* value,
mean over seeds {seeds} (least over seeds in brackets). Rows, noise, correlation and score are defined in
`mediation/metabench.py`; `null` is a meta-SAE of rotated rows. Made by

```bash
mediation bench meta --json | python docs/make_meta_benchmark.py
```

in {seconds:.0f} s on {cores} shared CPU cores, {threads} thread(s).

{value}

The right attribute, whatever the value:

{attribute}

Seconds for one training and decomposition, mean:

{time}
"""


def table(result: dict, key: str, digits: int, least: bool = False) -> str:
    names = result["methods"]
    lines = [f"| rows | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for row in result["settings"]:
        cells = []
        for name in names:
            if name not in row[key]:
                cells.append("")
                continue
            low = f" ({min(row['value_by_seed'][name]):.{digits}f})" if least else ""
            cells.append(f"{row[key][name]:.{digits}f}{low}")
        lines.append(f"| {row['setting']} | {' | '.join(cells)} |")
    return "\n".join(lines)


result = json.load(sys.stdin)
Path(__file__).with_name("meta-benchmark.md").write_text(
    TEXT.format(
        **{name: result[name] for name in ("seconds", "cores", "threads")},
        seeds=f"{min(result['seeds'])} to {max(result['seeds'])}",
        value=table(result, "value", 3, least=len(result["seeds"]) > 1),
        attribute=table(result, "attribute", 3),
        time=table(result, "seconds", 1),
    ),
    encoding="utf-8",
)
