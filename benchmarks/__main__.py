"""Run every benchmark, or those named: ``python -m benchmarks [--quick] [NAME …]``."""

import argparse
import importlib
import os
import pkgutil
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and torch are imported: one core each, a fair race

import benchmarks


def main() -> int:
    """Run the benchmarks; exit 1 if one of them failed."""
    known = sorted(m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.name.startswith("_"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="small sizes, seconds each")
    args = parser.parse_args()
    if unknown := set(args.names) - set(known):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = []
    for name in args.names or known:
        print(f"\n=== {name}", flush=True)
        try:
            importlib.import_module(f"benchmarks.{name}").run(quick=args.quick)
        except Exception as error:
            print(f"failed: {type(error).__name__}: {error}", file=sys.stderr)
            failed.append(name)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
