"""Command line: `python -m benchmarks list | run | speed | report`, installed as `pyro-zoo`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["main"]

_EXAMPLES = """examples:
  python -m benchmarks run quick --jobs 2              the built-in suite, in half an hour
  python -m benchmarks run quick --models vae --seeds 1 --budget demo
  python -m benchmarks run autoguides                  Pyro's autoguides beside this project's
  python -m benchmarks run my_task.py                  a model, data and guides of your own
  python -m benchmarks speed --without-peers --tasks eight_schools
  python -m benchmarks report runs/quick               the report again, from records alone

A task file needs `model` (any Pyro program) and `args` (its data); `held_out`, `guides` and the
other fields of benchmarks.Task are optional."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pyro-zoo",
        description="Compare approximate posteriors on one model, with records and a report.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser(
        "list", help="show suites and guides, or the tasks of one source"
    )
    listing.add_argument("source", nargs="?", help="a suite or a task file")
    running = commands.add_parser("run", help="run a suite or a task file, then write its report")
    running.add_argument("source", help="a suite (see list) or a Python file with a task")
    running.add_argument("--jobs", type=int, default=0, help="runs at a time (default: all cores)")
    running.add_argument("--seeds", type=int, default=3, help="seeds per method (default: 3)")
    running.add_argument("--out", help="folder of records (default: runs/SOURCE)")
    running.add_argument("--models", nargs="+", help="only these tasks")
    running.add_argument("--methods", nargs="+", help="only these methods")
    running.add_argument("--regimes", nargs="+", choices=("joint", "frozen"), help="only these")
    running.add_argument(
        "--budget",
        default="full",
        choices=("full", "demo", "smoke"),
        help="full: to rely on; demo: to see all parts in minutes; smoke: to see that it runs",
    )
    running.add_argument(
        "--mode",
        default="auto",
        choices=("auto", "eager", "graph", "inductor"),
        help="eager: Pyro at each update; graph: captured; inductor: compiled; auto: what pays",
    )
    running.add_argument("--retry-failed", action="store_true", help="run failed methods again")
    running.add_argument("--no-report", action="store_true", help="write records only")
    reporting = commands.add_parser("report", help="write the report of a folder of records")
    reporting.add_argument("folder", help="a folder with *.jsonl records")
    reporting.add_argument("--to", help="file to write (default: report.html in the folder)")
    speeding = commands.add_parser(
        "speed", help="time compiled steps beside Pyro, torch, NumPyro, JAX, PCX and FabricPC"
    )
    speeding.add_argument(
        "--peers", help="folder of their environments, made where they are missing"
    )
    speeding.add_argument("--without-peers", action="store_true", help="Pyro and torch only")
    speeding.add_argument("--tasks", nargs="+", help="only these tasks")
    speeding.add_argument("--rounds", type=int, default=9, help="blocks of each side (default: 9)")
    speeding.add_argument("--threads", type=int, default=2, help="of each side (default: 2)")
    speeding.add_argument("--to", help="file of the record (default: the committed one)")
    return parser


def _speed(options: argparse.Namespace) -> int:
    from benchmarks.speed.peers.environments import REQUIREMENTS, build
    from benchmarks.speed.runner import RECORDS, compare_speed

    if options.peers is None and not options.without_peers:
        raise ValueError(
            "speed needs --peers DIR, where the environments of NumPyro, JAX, PCX and FabricPC "
            "are or shall be made; or --without-peers."
        )
    if options.peers is not None:
        for name in REQUIREMENTS:
            build(name, options.peers)
    compare_speed(
        options.peers,
        options.to or RECORDS,
        rounds=options.rounds,
        threads=options.threads,
        only=options.tasks,
    )
    return 0


def _list(source: str | None) -> int:
    from benchmarks.suites import SUITES
    from benchmarks.task_file import task_names

    if source is not None:
        for name, line in task_names(source).items():
            print(f"{name:20} {line}")
        return 0
    import guides

    for suite in SUITES:
        print(f"suite {suite}")
        for name, line in task_names(suite).items():
            print(f"  {name:20} {line}")
    print("guides")
    for name in guides.GUIDES:
        print(f"  {name}")
    print("loops\n  svi\n  predictive_coding")
    return 0


def _run(options: argparse.Namespace, typed: Sequence[str]) -> int:
    from benchmarks.progress import duration
    from benchmarks.records import read_records
    from benchmarks.runner import run
    from benchmarks.table import text_table

    if options.seeds < 1 or options.jobs < 0:
        raise ValueError("--seeds must be at least 1, and --jobs at least 0 (all cores).")
    out = Path(options.out or Path("runs") / Path(options.source).stem)
    outcome = run(
        options.source,
        out,
        jobs=options.jobs or os.cpu_count() or 1,
        seeds=options.seeds,
        budget=options.budget,
        models=options.models,
        methods=options.methods,
        regimes=options.regimes,
        retry_failed=options.retry_failed,
        mode=options.mode,
        command=_shown(typed),
    )
    if outcome.skipped:
        print(f"{outcome.skipped} of {outcome.total} runs were recorded already and were skipped.")
    if outcome.interrupted:
        print(
            f"Stopped. {outcome.skipped + outcome.ended} of {outcome.total} runs "
            f"are recorded in {out}; the same command goes on from there."
        )
        return 130
    if outcome.ended:
        refused = f", {outcome.refused} refused" if outcome.refused else ""
        print(
            f"{outcome.done} runs finished, {outcome.failed} failed{refused}, in "
            f"{duration(outcome.seconds)}. Records: {out}"
        )
    print(text_table(read_records(out)))
    if not options.no_report:
        _report(str(out), None)
    if outcome.fruitless:
        where = "" if options.no_report else "; the report says why"
        print(f"pyro-zoo: every run failed{where}.", file=sys.stderr)
        return 1
    return 0


def _shown(typed: Sequence[str]) -> list[str]:
    """Return the command as a reader types it: folders of this machine are left out."""
    words = ["python", "-m", "benchmarks"]
    for word in typed:
        words.append(Path(word).name if Path(word).is_absolute() else word)
    return words


def _report(folder: str, target: str | None) -> int:
    from benchmarks.report import write_report

    print(f"Report: {write_report(folder, target)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What was typed after the command's name; those of the process by default.

    Returns:
        The exit code: 0, 1 for a mistake in the request or where every run failed, 130 for Ctrl-C.
        A method that fails beside others that do not is a result, not an error.
    """
    typed = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(typed)
    try:
        if options.command == "list":
            return _list(options.source)
        if options.command == "speed":
            return _speed(options)
        if options.command == "report":
            return _report(options.folder, options.to)
        return _run(options, typed)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        print(f"pyro-zoo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped before the first run.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
