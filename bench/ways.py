"""Each way of CUDA C++ on a GPU against the way that the dispatch table has: what decides whether a rule names it.

Like ``harlora doctor --tune``: compared with the reference first, then captured graphs over copies of the weight that
take turns, so that neither Python nor the last cache is what is measured. `make gpu` runs it as a process of its own,

    python -m harlora.bench.ways FILE

for a kernel that has not run on such a GPU may end the process that tries it. What was measured before is in FILE.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from harlora import configure
from harlora.files import write_json
from harlora.kernels import configurations, dispatch
from harlora.models import MAEConfig

SHAPE = (4096, 4096)
ROWS = (1, 8, 32, 128, 512)
DTYPE = torch.bfloat16

Row = dict[str, Any]


def measure(device: torch.device, report: Callable[[str], None], rows: tuple[int, ...] = ROWS) -> Iterator[Row]:
    """One row for each operator, shape and number of rows: ``times_us`` of each way by its configuration, and ``table``
    the name of the one that the table has. What proved wrong or does not serve is not in it.
    """
    model = MAEConfig()
    sizes = (model.tokens, model.heads, model.width, model.ffn, model.depth)
    _, measured = configure.measure_encoders(
        device, sizes, lambda done, total, what: report(f"{what}, {done} of {total}")
    )
    for each in measured:
        yield {**each, "table": str(dispatch.encoder_way(device, DTYPE, each["rows"]))}
    for operator in configurations.OPERATORS:
        for count in rows:
            title = f"{operator} {8 * DTYPE.itemsize}"
            report(f"{title}, {SHAPE[0]}→{SHAPE[1]}, {count} rows")
            chosen = configure.of_table(operator, device, DTYPE, count, SHAPE)
            candidates = [
                each
                for each in configurations.candidates(operator, DTYPE, count)
                if each.way in configurations.CUDA_WAYS and each != chosen
            ]
            times = configure.times(operator, device, DTYPE, count, SHAPE, [chosen, *candidates])
            yield {"title": title, "shape": list(SHAPE), "rows": count, "times_us": times, "table": str(chosen)}


def main(file: Path) -> None:
    """Measure the current GPU into ``file``, which is written anew after every row."""
    rows: list[Row] = []
    for row in measure(torch.device("cuda"), lambda what: print(f"ways: {what}", flush=True)):
        rows.append(row)
        write_json(file, {"ways": rows})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
