"""Run the benchmark rows, print a table, write JSON.

./run bench                     every row
./run bench get create list     only rows whose name begins with one of these words
./run bench --reference-apiserver PATH --reference-etcd PATH    the rows of the API server also against another
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from bench import (
    api_rows,
    cluster_rows,
    http_rows,
    machine,
    network_rows,
    node_rows,
    scale_rows,
    scheduler_core_rows,
    scheduler_perf_rows,
    scheduler_rows,
    watch_rows,
)
from bench.row import Row, table

MODULES = (http_rows, watch_rows, api_rows, scheduler_core_rows, scheduler_perf_rows, scheduler_rows, network_rows, cluster_rows, node_rows, scale_rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="beginnings of row names; none means all")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each timed load")
    parser.add_argument("--repeat", type=int, default=3, help="measurements per row; the median is shown")
    parser.add_argument("--json", type=Path, default=Path("bench/out/results.json"))
    parser.add_argument("--reference-apiserver", default=os.environ.get("BENCH_REFERENCE_APISERVER", ""), help="program of another API server to measure beside ours")
    parser.add_argument("--reference-etcd", default=os.environ.get("BENCH_REFERENCE_ETCD", "etcd"), help="its etcd")
    parser.add_argument("--reference-scheduler", default="", help="its scheduler, for the scheduling rows")
    options = parser.parse_args()
    measured: list[Row] = []
    print(machine.describe(), file=sys.stderr)
    for module in MODULES:
        names = [name for name in module.ROWS if not options.rows or any(name.startswith(word) for word in options.rows)]
        if names:
            for row in module.measure(names, options):
                measured.append(row)
                print(row.line(), file=sys.stderr, flush=True)
    print(table(measured))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps(
            {
                "machine": machine.describe(),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "rows": [row.as_dict() for row in measured],
            },
            indent=1,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
